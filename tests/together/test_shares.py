"""What ranks write together is what one process writes, byte for byte, and each byte is read and written once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local import on_ranks, tree

from ckptconv import companions, conversion, engine, shares
from ckptconv.errors import CkptconvError
from commands import convert
from inprocess import main
from test_any_to_any import FORMATS

Hf = Callable[..., Path]
#: Flags that make several files where a format would have one.
SHARDS = {"hf": ("--max-shard-size", "40KB"), "mindspore": ("--max-shard-size", "40KB")}
#: Sources beside Llama: fixture, saver, flags. Experts over ranks, tied embeddings, quantised weights, fused tensors.
CASES: dict[str, tuple[str, str, tuple[object, ...]]] = {
    "experts": ("mixtral", "megatron_mcore", ("--target-tp", 2, "--target-pp", 2, "--target-ep", 2)),
    "experts apart": ("mixtral", "megatron_dist", ()),
    "mla": ("deepseek_v3", "megatron_mcore", ("--target-tp", 2, "--target-ep", 4)),
    "fp8": ("deepseek_v3", "hf", ("--quantize", "fp8", "--max-shard-size", "40KB")),
    "tied": ("llama32", "megatron_mcore", ("--target-tp", 4, "--target-pp", 4)),
    "transposed": ("gpt2", "megatron_mcore", ("--target-tp", 4, "--pad-vocab", "mean")),
    "cast": ("llama2", "megatron_mcore", ("--target-tp", 2, "--dtype", "bf16")),
    "legacy": ("gpt2", "megatron_legacy", ("--target-tp", 2, "--target-pp", 2)),
}


@given(
    st.integers(0, 40), st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 45), st.integers(0, 45)), max_size=12),
)  # fmt: skip
def test_every_row_counts_once(rows: int, ranks: int, spans: list[tuple[int, int, int]]) -> None:
    targets = [(who % ranks, (min(a, b), max(a, b))) for who, a, b in spans]
    found: Counter[int] = Counter()
    for rank in range(ranks):
        own = shares.counted(rows, targets, [ranks - 1], rank)
        assert all(a < b for a, b in own) or own == [(0, 0)]
        assert all(end < start for (_, end), (start, _) in pairwise(own))
        found.update(row for start, end in own for row in range(start, end))
        if rows == 0:
            found.update({-1: len(own)})
    assert found == (dict.fromkeys(range(rows), 1) if rows else {-1: 1})


def test_who_writes_a_row_reads_it_for_the_digest() -> None:
    """Rows that one rank alone writes are read by no other; what all write is shared."""
    targets = [(0, (0, 10)), (1, (10, 20)), (0, (20, 30)), (1, (20, 30))]
    assert shares.counted(30, targets, [0], 0) == [(0, 10), (20, 25)]
    assert shares.counted(30, targets, [0], 1) == [(10, 20), (25, 30)]


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 8))
def test_files_are_dealt_in_order(sizes: list[int], ranks: int) -> None:
    found = shares.dealt({f"{n:03d}": size for n, size in enumerate(sizes)}, ranks)
    assert list(found) == [f"{n:03d}" for n in range(len(sizes))]
    assert list(found.values()) == sorted(found.values()) and all(0 <= rank < ranks for rank in found.values())
    loads = Counter(dict.fromkeys(range(ranks), 0))
    for name, rank in found.items():
        loads[rank] += sizes[int(name)]
    assert max(loads.values()) <= sum(sizes) / ranks + max(sizes, default=0)


def together(tmp_path: Path, ranks: int, *words: object) -> tuple[dict[str, bytes], list[conversion.Report]]:
    """What `ranks` write, after it was compared with what one process writes into the same place."""
    out = tmp_path / "out"
    load, saver = words[:2]
    convert(Path(str(load)), out, str(saver), *words[2:])
    want = tree(out)
    shutil.rmtree(out)
    fixed = ("--load-dir", load, "--saver", saver, "--save-dir", out, "--no-progress")
    reports = on_ranks(ranks, *fixed, *words[2:])
    found = tree(out)
    assert found.keys() == want.keys()
    assert [name for name in want if found[name] != want[name]] == []
    return found, reports


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("saver", FORMATS)
def test_every_format(saver: str, ranks: int, hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptconv.savers.megatron_dist.FILE_BYTES", 40_000)
    flags = (*FORMATS[saver], *SHARDS.get(saver, ()))
    together(tmp_path, ranks, hf("llama2", vocab_size=132), saver, *flags)


@pytest.mark.parametrize("source", [name for name in FORMATS if name != "hf"])
def test_every_source(source: str, hf: Hf, tmp_path: Path) -> None:
    there = convert(hf("llama2", vocab_size=132), tmp_path / "there", source, *FORMATS[source])
    together(tmp_path, 2, there, "hf", *SHARDS["hf"])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, ranks: int, hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptconv.savers.megatron_dist.FILE_BYTES", 40_000)
    name, saver, flags = CASES[case]
    together(tmp_path, ranks, hf(name), saver, *flags)


def test_work_is_shared(hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of two stages read together hardly more than one process does, and neither reads all."""
    read: Counter[tuple[str, int]] = Counter()
    units = engine._units

    def counting(job: engine.Job, message: object) -> object:
        for unit in units(job, message):  # type: ignore[arg-type]
            for row, count, _ in unit.blocks:
                read.update({(str(job.tensor), n): 1 for n in range(row, row + count)})
            yield unit

    monkeypatch.setattr(engine, "_units", counting)
    _, reports = together(tmp_path, 2, hf("llama2"), "megatron_mcore", "--target-pp", 2)
    assert len(reports) == 2
    # Once alone and once together: nothing in this layout belongs to both ranks.
    assert read and set(read.values()) == {2}


#: Without padding, which has to be made but not read.
BARE = ("--make-vocab-size-divisible-by", 1)


@pytest.mark.parametrize(("name", "saver", "flags"), [
    ("llama2", "megatron_mcore", ("--target-tp", 4, *BARE)), ("llama2", "megatron_mcore", ("--target-pp", 4, *BARE)),
    ("mixtral", "megatron_mcore", ("--target-tp", 2, "--target-ep", 2, *BARE)), ("llama2", "hf", SHARDS["hf"]),
])  # fmt: skip
def test_a_plan_says_what_is_read(
    name: str, saver: str, flags: tuple[object, ...], hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = hf(name, vocab_size=132)
    words = ["--load-dir", source, "--saver", saver, "--save-dir", tmp_path / "out", "--no-progress", *flags]
    assert main(["plan", *words, "--ranks", 3, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    taken = []
    get = engine._Buffers.get

    def counting(self: engine._Buffers, which: int, rows: int, cols: int, dtype: str) -> object:
        block = get(self, which, rows, cols, dtype)
        taken.extend([block.nbytes] * (which == 0))
        return block

    monkeypatch.setattr(engine._Buffers, "get", counting)
    on_ranks(3, *words)
    assert sum(taken) == sum(rank["read"] for rank in plan["ranks"])
    weights = [name for name in plan["files"] if name.endswith((".pt", ".safetensors"))]
    assert sum(rank["written"] for rank in plan["ranks"]) == sum(plan["files"][name] for name in weights)
    assert sum(rank["files"] for rank in plan["ranks"]) == len(weights)


def test_more_ranks_than_files(hf: Hf, tmp_path: Path) -> None:
    together(tmp_path, 5, hf("llama2"), "hf")


def test_digests_are_those_of_one_process(hf: Hf, tmp_path: Path) -> None:
    """Column-cut weights are in all files of a stage: each rank digests a part of their rows."""
    found, _ = together(tmp_path, 4, hf("llama2"), "megatron_mcore", "--target-tp", 4)
    digests = json.loads(found[f"iter_0000001/{companions.PROVENANCE}"])["digests"]
    assert len(digests["transformer layer 0"]["mlp l1 weight"]) == len("crc32:00000000")


def test_the_first_error_is_every_rank_s(hf: Hf, tmp_path: Path) -> None:
    with pytest.raises(CkptconvError, match="tp 3 does not divide"):
        on_ranks(2, "--load-dir", hf("llama2"), "--saver", "megatron_mcore", "--save-dir", tmp_path / "out",
                 "--target-tp", 3)  # fmt: skip
    assert not (tmp_path / "out").exists()
