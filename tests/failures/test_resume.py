"""`--resume`: nothing finished is done again, the result is the same to the byte, and nothing different is mixed in."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import LAST, MIDDLE, Run, Tree, check_incomplete, finished, inside, other, run, tree, words

from ckptconv.files import PARTIAL

Sources = dict[str, Path]
Whole = Callable[[str], Tree]
TERM = "signal:SIGTERM"


def interrupt(saver: str, source: Path, target: Path, *flags: object, deed: str = TERM, at: str = MIDDLE) -> Tree:
    """A run that ends when at least one file is finished; returns number of inode and time of each."""
    assert run(*words(saver, source, target, *flags, "--at", at, "--deeds", f"finished:1,{deed}")).code != 0
    if "--overwrite" not in flags:
        check_incomplete(target)
    return {name: stamp(target / PARTIAL / name) for name in finished(target)}


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def resumed(saver: str, source: Path, target: Path, *flags: object) -> list[object]:
    return words(saver, source, target, "--resume", *flags, loader=other(saver))


@pytest.mark.parametrize(("saver", "deed", "at"), [
    ("megatron_mcore", TERM, MIDDLE),
    ("megatron_mcore", "saver:SIGKILL", MIDDLE),
    ("megatron_mcore", "signal:SIGKILL", MIDDLE),
    ("hf", TERM, MIDDLE),
    ("hf", "saver:SIGKILL", LAST),
    ("hf", "signal:SIGKILL", LAST),
])  # fmt: skip
def test_finished_files_stay(saver: str, deed: str, at: str, sources: Sources, tmp_path: Path, whole: Whole) -> None:
    source, target = sources[other(saver)], tmp_path / "out"
    kept = interrupt(saver, source, target, deed=deed, at=at)
    assert kept
    run(*resumed(saver, source, target)).succeeded()
    assert tree(target, ()) == whole(saver)
    assert {name: stamp(target / name) for name in kept} == kept


def test_interrupted_again_and_again(sources: Sources, tmp_path: Path, whole: Whole) -> None:
    target = tmp_path / "out"
    for count in (1, 2, 4):
        deeds = f"finished:{count},signal:SIGTERM"
        flags = ("--resume", "--at", LAST, "--deeds", deeds)
        run(*words("megatron_mcore", sources["hf"], target, *flags)).failed(code=130)
        assert len(finished(target)) >= count
    run(*resumed("megatron_mcore", sources["hf"], target), "--verify").succeeded()
    assert tree(target, ()) == whole("megatron_mcore")


def test_beside_an_older_output(
    sources: Sources, tmp_path: Path, whole: Whole, older: Callable[[str, Path], Tree]
) -> None:
    target = tmp_path / "out"
    before = older("megatron_mcore", target)
    kept = interrupt("megatron_mcore", sources["hf"], target, "--overwrite")
    assert kept
    assert tree(target) == before
    run(*resumed("megatron_mcore", sources["hf"], target, "--overwrite")).succeeded()
    assert tree(target, ()) == {**whole("megatron_mcore"), "notes.txt": before["notes.txt"]}
    assert {name: stamp(target / name) for name in kept} == kept


def test_nothing_to_resume(sources: Sources, tmp_path: Path, whole: Whole) -> None:
    inside(*resumed("megatron_mcore", sources["hf"], tmp_path / "out")).succeeded()
    assert tree(tmp_path / "out", ()) == whole("megatron_mcore")
    inside(*resumed("megatron_mcore", sources["hf"], tmp_path / "out")).failed("not empty", code=2)
    assert tree(tmp_path / "out", ()) == whole("megatron_mcore")


@pytest.fixture(scope="module")
def interrupted(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], None]:
    """`interrupted(directory, saver)`: what an interrupted run has left."""
    top = tmp_path_factory.mktemp("interrupted")

    def put(directory: Path, saver: str = "megatron_mcore") -> None:
        if not (top / saver).exists():
            assert interrupt(saver, sources[other(saver)], top / saver)
        shutil.copytree(top / saver, directory)

    return put


Interrupted = Callable[..., None]


@pytest.mark.parametrize(("saver", "flags", "differs"), [
    ("megatron_mcore", ("--target-tp", 4), "tp"),
    ("megatron_mcore", ("--target-pp", 2), "pp"),
    ("megatron_mcore", ("--saver-transformer-impl", "local"), "transformer_impl"),
    ("megatron_mcore", ("--make-vocab-size-divisible-by", 3), "make_vocab_size_divisible_by"),
    ("megatron_mcore", ("--pad-vocab", "mean"), "pad_vocab"),
    ("megatron_mcore", ("--dtype", "fp16"), "model"),
    ("megatron_mcore", ("--tokenizer-model", "other"), "tokenizer"),
    ("hf", ("--max-shard-size", "4MB"), "max_shard_size"),
    ("hf", ("--dtype", "fp16"), "model"),
])  # fmt: skip
def test_other_flags(
    saver: str, flags: tuple[object, ...], differs: str, sources: Sources, tmp_path: Path, interrupted: Interrupted
) -> None:
    target = tmp_path / "out"
    interrupted(target, saver)
    inside(*resumed(saver, sources[other(saver)], target, *flags)).failed(differs, "--overwrite", code=2)
    check_incomplete(target)


def test_another_source(sources: Sources, tmp_path: Path, interrupted: Interrupted) -> None:
    target, copied = tmp_path / "out", tmp_path / "copy"
    interrupted(target)
    shutil.copytree(sources["hf"], copied)
    inside(*resumed("megatron_mcore", copied, target)).failed("source", code=2)


@pytest.mark.parametrize("change", ["touch", "grow"])
def test_a_changed_source(change: str, sources: Sources, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources["hf"], source)
    assert interrupt("megatron_mcore", source, target)
    shard = sorted(source.glob("*.safetensors"))[-1]
    if change == "touch":
        os.utime(shard, ns=(1, 1))
    else:
        header = int.from_bytes(shard.read_bytes()[:8], "little")
        data = bytearray(shard.read_bytes())
        data[8 + header] ^= 1
        shard.write_bytes(data)
    inside(*resumed("megatron_mcore", source, target)).failed("source files", code=2)


def test_a_refusal_keeps_what_there_is(sources: Sources, tmp_path: Path, interrupted: Interrupted) -> None:
    target = tmp_path / "out"
    interrupted(target)
    before = tree(target, ())
    inside(*resumed("megatron_mcore", sources["hf"], target, "--target-tp", 4)).failed("tp", code=2)
    inside(*words("megatron_mcore", sources["hf"], target, loader="hf")).failed("--resume", "--overwrite", code=2)
    assert tree(target, ()) == before


def test_begun_again(sources: Sources, tmp_path: Path, interrupted: Interrupted, whole: Whole) -> None:
    target = tmp_path / "out"
    interrupted(target)
    inside(*words("megatron_mcore", sources["hf"], target, "--overwrite", loader="hf")).succeeded()
    assert tree(target, ()) == whole("megatron_mcore")


@pytest.mark.parametrize("text", [
    None, "", "{", "\0\1\2", "{}",
    "[]",
    "null",
    "finished:5",
    "finished:{\"x\":[]}",
    "digests:7",
])  # fmt: skip
def test_a_damaged_journal(text: str | None, sources: Sources, tmp_path: Path, interrupted: Interrupted) -> None:
    target = tmp_path / "out"
    interrupted(target)
    journal = target / PARTIAL / "journal.json"
    if text is None:
        journal.unlink()
    elif ":" in text and text[0] != "{":
        key, _, value = text.partition(":")
        journal.write_text(json.dumps(json.loads(journal.read_text()) | {key: json.loads(value)}))
    else:
        journal.write_text(text)
    inside(*resumed("megatron_mcore", sources["hf"], target)).failed("--overwrite", str(target), code=2)
    check_incomplete(target)


@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_a_finished_file_that_is_damaged(
    how: str, sources: Sources, tmp_path: Path, interrupted: Interrupted, whole: Whole
) -> None:
    target = tmp_path / "out"
    interrupted(target)
    path = target / PARTIAL / next(iter(finished(target)))
    path.unlink() if how == "removed" else os.truncate(path, 1000)
    inside(*resumed("megatron_mcore", sources["hf"], target)).succeeded()
    assert tree(target, ()) == whole("megatron_mcore")


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_two_runs_at_once(flag: str, sources: Sources, tmp_path: Path, whole: Whole) -> None:
    """The second is refused, whatever its flags, and the first is not disturbed."""
    target, note, go = tmp_path / "out", tmp_path / "note", tmp_path / "go"
    deeds = ("--at", MIDDLE, "--deeds", f"finished:1,touch:{note},wait:{go}")
    running = Run(words("megatron_mcore", sources["hf"], target, *deeds))
    while not note.exists():
        time.sleep(0.01)
    second = inside(*words("megatron_mcore", sources["hf"], target, flag, loader="hf"))
    go.touch()
    first = running.wait()
    second.failed(str(target), "another|running|in use")
    first.succeeded()
    assert tree(target, ()) == whole("megatron_mcore")


def test_a_loader_of_others(tmp_path: Path) -> None:
    """It says neither files nor digests; if the tensors are others, they must not be mixed."""
    target = tmp_path / "out"
    big = ("--layers", 8, "--hidden", 256, "--ffn", 704)
    where = ("--load-dir", tmp_path, "--save-dir", target)
    flags = ("--saver", "megatron_mcore", "--target-pp", 4, "--max-queue-size", 1, *where)
    deeds = ("--saver", "meddling", "--writes", "megatron_mcore", "--saver-after", 1, "--saver-at", 9)
    run("--loader", "torch", *flags, *big, *deeds, limit=40).failed("SIGKILL")
    assert finished(target)
    ended = run("--loader", "torch", *flags, *big, "--seed", 1, "--resume", limit=40)
    assert ended.code == 2 or not ended.succeeded() or one_seed(target)


def one_seed(target: Path) -> bool:
    """Whether all weights are of one seed (every element of a model has the same value)."""
    import torch

    values = set()
    for path in target.rglob("*.pt"):
        model = torch.load(path, weights_only=False)["model"]
        values |= {float(tensor.flatten()[0]) for tensor in model.values() if tensor is not None}
    return len(values - {0.0}) == 1
