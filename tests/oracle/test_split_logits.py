"""Virtual pipeline, uneven stages and layout strings: stages as megatron-core builds them, and its logits from them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv.errors import LayoutError
from ckptconv.formats.megatron_split import Split
from ckptconv.spec import ModelSpec
from commands import convert
from fixtures import config, logits
from layouts import IDS, difference
from mcore import Case, Outcome, run

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

VIRTUAL = ("--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage")
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
EMBEDDING, LOSS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"
STRING = "--pipeline-model-parallel-layout"
BOTH = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}

#: fixture, tp, pp, vpp, flags, what TransformerConfig is told
CASES: dict[str, tuple[str, int, int, int, tuple[object, ...], dict[str, Any]]] = {
    "virtual": ("llama2", 2, 2, 2, ("--target-vpp", 2), {}),
    "virtual by layers": ("qwen2_tied", 1, 2, 2, (VIRTUAL[1], 1), {}),
    "first": ("llama2", 1, 2, 1, (FIRST, 1), {"num_layers_in_first_pipeline_stage": 1}),
    "first and last": ("qwen2_tied", 1, 3, 1, (FIRST, 1, LAST, 1),
                       {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1}),
    "accounted": ("llama2", 1, 2, 3, (EMBEDDING, LOSS, VIRTUAL[0], 3), BOTH),
    "string": ("llama2", 1, 2, 2, (STRING, "Et|t*2|(t)*1,|L"), {"pipeline_model_parallel_layout": "Et|tt|t|L"}),
    "experts": ("deepseek_v3", 1, 2, 2, ("--target-vpp", 2), {}),
    "mtp": ("deepseek_v3_mtp", 1, 2, 2, ("--target-vpp", 2), {}),
    # The pipeline's schedule carries what a stage of MTP layers alone computes, which is not rebuilt here: names only.
    "mtp alone": ("deepseek_v3_mtp", 2, 2, 2, (STRING, "Ett|tt|m|L"),
                  {"pipeline_model_parallel_layout": "Ett|tt|m|L"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("split")
    return {
        key: convert(hf(name), root / key, "megatron_mcore", "--loader", f"hf_{config(name)['model_type']}",
                     "--target-tp", tp, "--target-pp", pp, "--saver-transformer-impl", "local",
                     "--mtp-module", "transformer_layer", "--make-vocab-size-divisible-by", 1, *flags)
        for key, (name, tp, pp, vpp, flags, _) in CASES.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(
    hf: Callable[..., Path], converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    cases = {}
    for key, (name, tp, pp, vpp, _, told) in CASES.items():
        ids = {} if key == "mtp alone" else {"short": IDS.tolist()}
        cases[key] = Case(str(hf(name)), str(converted[key]), tp, pp, ids, 1, vpp=vpp, split=told)
    return run(cases, tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("key", CASES)
def test_logits_are_those_of_transformers(hf: Callable[..., Path], outcomes: dict[str, Outcome], key: str) -> None:
    assert not outcomes[key].error, outcomes[key].error
    if key != "mtp alone":
        assert difference(outcomes[key], "short", logits(hf(CASES[key][0]), IDS)) < 1e-4


@pytest.mark.parametrize("key", CASES)
def test_back_to_other_stages(hf: Callable[..., Path], converted: dict[str, Path], tmp_path: Path, key: str) -> None:
    """Every layout is read: the tensors that come back are the source's."""
    from safetensors.torch import load_file

    other = convert(converted[key], tmp_path / "even", "megatron_mcore", "--target-pp", 1, "--target-tp", 1)
    back = load_file(convert(other, tmp_path / "back", "hf") / "model.safetensors")
    want = load_file(hf(CASES[key][0]) / "model.safetensors")
    assert back.keys() == want.keys()
    assert all(torch.equal(back[name], want[name]) for name in want)


UPSTREAM = """
import json, sys, types
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
found = []
for layers, pp, vpp, told in json.load(sys.stdin):
    try:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp if vpp > 1 else None)
        config = TransformerConfig(
            num_layers=layers, hidden_size=8, num_attention_heads=2, pipeline_dtype=torch.float32,
            pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None, **told)
        counts, firsts = [], []
        for c in range(vpp):
            for p in range(pp):
                parallel_state.set_pipeline_model_parallel_rank(p)
                stage = c if vpp > 1 else None
                counts.append(get_num_layers_to_build(config, vp_stage=stage, pp_rank=p))
                firsts.append(get_transformer_layer_offset(config, vp_stage=stage, pp_rank=p))
        found.append([counts, firsts])
    except (AssertionError, ValueError) as error:
        found.append(str(error) or "assert")
print(json.dumps(found))
"""


def test_stages_are_those_of_megatron_core() -> None:
    """The layers of every stage, and the first of them, for many sizes; what megatron-core refuses is refused."""
    asked: list[tuple[int, int, int, dict[str, Any]]] = []
    ours: list[Any] = []
    for layers, pp, vpp, first, last, embedding, loss in product(
        (4, 8, 13, 30), (1, 2, 4), (1, 2, 3), (None, 2), (None, 4), (False, True), (False, True)
    ):
        if pp == 1 and (vpp > 1 or first or last):
            continue  # senseless, and not asked by the functions: ours are refused
        told = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last,
                "account_for_embedding_in_pipeline_split": embedding, "account_for_loss_in_pipeline_split": loss}
        split = Split(vpp if vpp > 1 else None, None, first, last, embedding, loss)
        asked.append((layers, pp, vpp, told))
        ours.append(_stages(split, layers, pp))
    for layers, pp, text in ((8, 2, "Ett|t*3|(t|)*2tL"), (8, 4, "Ett|tt|tt|ttL"), (6, 3, "E|t|t|t|t|ttL"),
                             (6, 2, "E|tt(t|)*2t|tL"), (6, 2, "Ettt|ttL"), (4, 2, "Ett|tt")):  # fmt: skip
        stages = text.count("|")
        try:
            count = len(_parsed(text))
        except LayoutError:
            count = stages + 1
        asked.append((layers, pp, max(1, count // pp), {"pipeline_model_parallel_layout": text}))
        ours.append(_stages(Split(pipeline_model_parallel_layout=text), layers, pp))
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", UPSTREAM], input=json.dumps(asked),
                            capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    theirs = json.loads(answer.stdout.splitlines()[-1])
    wrong = [
        (question, mine, yours) for question, mine, yours in zip(asked, ours, theirs, strict=True)
        if mine != (yours if _tiles(yours, question[0]) else None)
    ]  # fmt: skip
    assert not wrong, (len(wrong), wrong[:5])
    assert sum(mine is not None for mine in ours) > 30


def _tiles(answer: list[list[int]] | str, layers: int) -> bool:
    """Not every size that it has no assertion for is one that a model can be built with."""
    return not isinstance(answer, str) and min(answer[0]) >= 0 and sum(answer[0]) == layers


def _parsed(text: str) -> list[str]:
    from ckptconv.formats.megatron_split import stages_of

    return stages_of(text)


def _stages(split: Split, layers: int, pp: int) -> list[list[int]] | None:
    spec = ModelSpec(
        family="llama", num_layers=layers, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2,
        kv_channels=4, vocab_size=8, max_position_embeddings=8, seq_length=8, dtype="float32",
    )  # fmt: skip
    try:
        layout = split.layout(spec, 1, pp, 1)
    except LayoutError:
        return None
    chunks = [(stage, chunk) for chunk in range(layout.vpp) for stage in range(pp)]
    return [list(layout.counts), [layout.layers_of(stage, chunk).start for stage, chunk in chunks]]
