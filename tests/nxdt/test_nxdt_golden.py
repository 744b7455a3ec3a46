"""Against files that AWS's own converter wrote, tensor by tensor, in both directions.

Elements of the inputs are unique numbers, so that a row in the wrong place is seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import nxdt_files
import pytest
import torch

from commands import Weights, convert, same
from goldens import golden

GOLDEN = golden("nxdt")

CASES = {case["case"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}


def flags_of(case: str) -> list[str]:
    """The flags AWS's converter was run with, but for --n_layers: always 4 there and never looked at, checked here."""
    words = CASES[case]["forward"].split()
    config = json.loads((GOLDEN / "inputs" / CASES[case]["input"] / "config.json").read_text())
    words[words.index("--n_layers") + 1] = str(config["num_hidden_layers"])
    return words


def full(file: Path) -> Weights:
    """A full state as AWS's converter reads and writes it."""
    content: Weights = torch.load(file, weights_only=True)
    return content


@pytest.mark.parametrize("case", CASES)
def test_same_files(case: str, tmp_path: Path) -> None:
    source = GOLDEN / "inputs" / CASES[case]["input"]
    flags = [*flags_of(case), "--nxdt-xser-layout", "inline"]
    convert(source, tmp_path / "out", "nxdt", *flags)
    want, have = (nxdt_files.ranks(folder / "model") for folder in (GOLDEN / "cases" / case / "nxdt", tmp_path / "out"))
    assert sorted(have) == sorted(want)
    for name, tensors in want.items():
        same(have[name], tensors)


@pytest.mark.parametrize("case", CASES)
def test_back(case: str, tmp_path: Path) -> None:
    source, where = GOLDEN / "inputs" / CASES[case]["input"], GOLDEN / "cases" / case
    words = flags_of(case)
    words[words.index("--convert_from_full_state")] = "--convert_to_full_state"
    flags = ["--config", source / "config.json", "--full-state-file", *words]
    convert(where / "nxdt" / "model", tmp_path / "out", "hf", *flags)
    have = full(tmp_path / "out" / "checkpoint.pt")
    same(have, full(where / "back" / "checkpoint.pt"))
    same(have, full(source / "pytorch_model.bin"))


@pytest.mark.parametrize("name", ["dev_xser_info/model", "out_dev_xser_save/model", "v1"])
def test_other_generations(name: str, tmp_path: Path) -> None:
    """References with and without info file, and v1 names: what trainers write, of the model `gqa`."""
    source = GOLDEN / "inputs" / "gqa"
    convert(GOLDEN / "bad" / name, tmp_path / "out", "hf", "--config", source / "config.json", "--hw-backend", "trn1",
            "--full-state-file")  # fmt: skip
    same(full(tmp_path / "out" / "checkpoint.pt"), full(source / "pytorch_model.bin"))


def test_references_are_as_torch_xla_writes_them(tmp_path: Path) -> None:
    """Main file, info file and tensors of a device, number by number."""
    flags = [*flags_of("hf_gqa_tp4pp2_m2_xser"), "--save_xser"]
    convert(GOLDEN / "inputs" / "gqa", tmp_path / "out", "nxdt", *flags)
    want, have = GOLDEN / "bad" / "dev_xser_info" / "model", tmp_path / "out" / "model"
    assert nxdt_files.listing(have) == nxdt_files.listing(want)
    for name, tensors in nxdt_files.ranks(want).items():
        same(nxdt_files.ranks(have)[name], tensors)
    for info in want.glob("*.info.pt"):
        theirs, ours = (torch.load(folder / info.name, weights_only=True) for folder in (want, have))
        assert ours == theirs
