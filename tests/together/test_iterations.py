"""--iterations: many checkpoints of one run, each complete or absent, done once, shared by ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from local import on_ranks, tree
from safetensors.torch import save_file

from ckptconv import companions
from ckptconv.containers import rankdir
from ckptconv.containers.rankdir import TRACKER
from ckptconv.errors import SourceError
from ckptconv.files import PARTIAL
from ckptconv.iterations import WORK
from commands import convert, same, weights_of
from inprocess import here

Hf = Callable[..., Path]
NUMBERS = (1000, 2000, 3000)


@pytest.fixture(scope="module")
def models(hf: Hf, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three states of one model."""
    top, made = tmp_path_factory.mktemp("models"), []
    for seed in range(len(NUMBERS)):
        made.append(Path(shutil.copytree(hf("llama2"), top / str(seed))))
        weights = {key: tensor.roll(seed).contiguous() for key, tensor in weights_of(hf("llama2")).items()}
        save_file(weights, made[-1] / "model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def run(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Megatron's with an iteration of each state."""
    top = tmp_path_factory.mktemp("run")
    for seed, number in enumerate(NUMBERS):
        made = convert(models[seed], top / str(number), "megatron_mcore", "--iteration", number,
                       "--target-tp", 2)  # fmt: skip
        for entry in made.iterdir():
            if not (top / entry.name).exists():
                entry.rename(top / entry.name)
        shutil.rmtree(made)
    (top / TRACKER).write_text("3000")
    return top


def words(run: Path, out: Path, saver: str = "hf", iterations: str = "all", *flags: object) -> list[object]:
    return ["--load-dir", run, "--save-dir", out, "--saver", saver, "--iterations", iterations, "--no-progress", *flags]


def name(number: int) -> str:
    return rankdir.iteration_name(number)


def test_to_hugging_face(run: Path, models: list[Path], tmp_path: Path) -> None:
    done = here(*words(run, tmp_path, "hf", "all", "--verify"))
    assert done.returncode == 0, done.stderr
    assert "3 iterations: 3 converted, 0 were there" in done.stderr and done.stderr.count("verified") == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [WORK, *map(name, NUMBERS)]
    for seed, number in enumerate(NUMBERS):
        same(weights_of(tmp_path / name(number)), weights_of(models[seed]))
        source = json.loads((tmp_path / name(number) / companions.PROVENANCE).read_text())["source"]
        assert source["iteration"] == number


def test_to_megatron_as_if_one_by_one(run: Path, tmp_path: Path) -> None:
    """Every file is as a conversion of that iteration alone writes it, and the trainer's tracker names the last."""
    done = here(*words(run, tmp_path / "out", "megatron_mcore", "3000,1000", "--target-tp", 1, "--target-pp", 2))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / TRACKER).read_text() == "3000"
    assert not (tmp_path / "out" / name(2000)).exists()
    found = tree(tmp_path / "out")
    for number in (1000, 3000):
        shutil.rmtree(tmp_path / "out")
        convert(run, tmp_path / "out", "megatron_mcore", "--iteration", number, "--target-tp", 1, "--target-pp", 2)
        for path, data in tree(tmp_path / "out").items():
            assert found[path] == data or path == TRACKER, path


def test_what_is_there_is_not_done_again(run: Path, tmp_path: Path) -> None:
    assert here(*words(run, tmp_path, "hf", "1000")).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / name(1000)).iterdir()}
    done = here(*words(run, tmp_path, "hf", "all", "--verify"))
    assert "3 iterations: 2 converted, 1 were there" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / name(1000)).iterdir()} == before


def test_other_flags_are_another_run(run: Path, tmp_path: Path) -> None:
    assert here(*words(run, tmp_path, "megatron_mcore", "1000", "--target-tp", 1)).returncode == 0
    done = here(*words(run, tmp_path, "megatron_mcore", "all", "--target-tp", 2))
    assert done.returncode == 2 and "--overwrite" in done.stderr and "--target-tp 1" in done.stderr
    assert not (tmp_path / name(2000)).exists()
    assert here(*words(run, tmp_path, "megatron_mcore", "all", "--target-tp", 2, "--overwrite")).returncode == 0
    ranks = [len(list((tmp_path / name(number)).glob("mp_rank_*"))) for number in NUMBERS]
    assert ranks == [2, 2, 2]


def test_a_damaged_iteration_is_left_out_and_told_of(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    file = source / name(2000) / "mp_rank_01" / rankdir.FILE
    file.write_bytes(file.read_bytes()[:-1000])
    done = here(*words(source, tmp_path / "out", "megatron_mcore"))
    assert done.returncode == SourceError.exit_code
    assert "1 of 3 iterations are not converted" in done.stderr and str(file) in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").glob("iter_*")) == [name(1000), name(3000)]
    assert (tmp_path / "out" / TRACKER).read_text() == "3000"
    shutil.copyfile(run / name(2000) / "mp_rank_01" / rankdir.FILE, file)
    assert "3 iterations: 1 converted, 2 were there" in here(*words(source, tmp_path / "out", "megatron_mcore")).stderr


def test_an_iteration_that_is_being_saved_is_not_of_all(run: Path, tmp_path: Path) -> None:
    """Behind the one that the tracker names a trainer may be writing."""
    source = tmp_path / "run"
    shutil.copytree(run, source)
    (source / TRACKER).write_text("2000")
    done = here(*words(source, tmp_path / "out"))
    assert done.returncode == 0 and "2 iterations" in done.stderr and "3000" in done.stderr
    assert not (tmp_path / "out" / name(3000)).exists()
    assert here(*words(source, tmp_path / "out", "hf", "3000")).returncode == 0


@pytest.mark.parametrize("left", ["partial", "whole"])
@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_what_a_killed_process_left_is_replaced(
    left: str, flags: tuple[str, ...], run: Path, tmp_path: Path, models: list[Path]
) -> None:
    assert here(*words(run, tmp_path, "hf", "1000")).returncode == 0
    work = tmp_path / WORK / name(2000)
    if left == "partial":
        (work / PARTIAL).mkdir(parents=True)
        (work / PARTIAL / "journal.json").write_text("{")
    else:
        shutil.copytree(tmp_path / name(1000), work)
    done = here(*words(run, tmp_path, "hf", "all", *flags))
    if left == "partial" and flags:
        assert done.returncode == 2 and "journal" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    same(weights_of(tmp_path / name(2000)), weights_of(models[1]))
    assert [entry.name for entry in (tmp_path / WORK).iterdir()] == ["flags.json"]


def test_folders_of_a_trainer(models: list[Path], tmp_path: Path) -> None:
    """Hugging Face's Trainer saves a directory for each; Megatron counts them."""
    for seed in (1, 2):
        shutil.copytree(models[seed], tmp_path / "run" / f"checkpoint-{seed * 500}")
    done = here(*words(tmp_path / "run", tmp_path / "out", "megatron_mcore"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / TRACKER).read_text() == "1000"
    for seed in (1, 2):
        back = convert(tmp_path / "out", tmp_path / f"back{seed}", "hf", "--iteration", seed * 500)
        same(weights_of(back), weights_of(models[seed]))


@pytest.mark.parametrize(("flags", "said"), [
    (("--iterations", "1000,x"), "expected all, or numbers"),
    (("--iterations", "1000,4000"), "has no 4000; it has 1000, 2000, 3000"),
    (("--iterations", "all", "--iteration", "1000"), "contradict"),
    (("--iterations", "all", "--dry-run"), "a plan is of one"),
])  # fmt: skip
def test_wrong_use(flags: tuple[str, ...], said: str, run: Path, tmp_path: Path) -> None:
    done = here("--load-dir", run, "--save-dir", tmp_path / "out", "--saver", "hf", *flags)
    assert done.returncode == 2 and said in done.stderr
    assert not list((tmp_path / "out").glob("iter_*"))


def test_a_directory_of_one_checkpoint(hf: Hf, tmp_path: Path) -> None:
    done = here(*words(hf("llama2"), tmp_path / "out"))
    assert done.returncode == SourceError.exit_code and "holds no iterations" in done.stderr


def test_a_target_of_something_else(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = here(*words(run, tmp_path))
    assert done.returncode == 2 and "notes.txt" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_ranks_share_iterations(run: Path, models: list[Path], tmp_path: Path) -> None:
    reports = on_ranks(2, *words(run, tmp_path, "megatron_mcore", "all", "--target-tp", 1))
    assert (tmp_path / TRACKER).read_text() == "3000"
    one = sum((tmp_path / name(3000) / "mp_rank_00" / rankdir.FILE).stat().st_size for _ in NUMBERS)
    assert sum(report.bytes for report in reports) == one
    for seed, number in enumerate(NUMBERS):
        back = convert(tmp_path, tmp_path / f"back{seed}", "hf", "--iteration", number)
        same(weights_of(back), weights_of(models[seed]))


def test_a_refusal_ends_all(run: Path, tmp_path: Path) -> None:
    done = here(*words(run, tmp_path / "out", "megatron_mcore", "all", "--target-tp", 3))
    assert done.returncode == 6 and done.stderr.count("tp 3") == 1
    assert not list((tmp_path / "out").glob("iter_*"))
