"""The command line: help, plugins, spellings, contradictions, exit codes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptconv import errors
from fixtures import config
from inprocess import here, main

Hf = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]

SOURCE = Path(__file__).resolve().parents[1] / "src"
MCORE = ("--saver", "megatron_mcore")
RANK = Path("iter_0000001") / "mp_rank_00" / "model_optim_rng.pt"


def run(source: Path, out: Path, *flags: object) -> int:
    return main(["--load-dir", str(source), "--save-dir", str(out), *map(str, flags)])


# Help and listings


def test_help_is_light() -> None:
    """No torch, numpy, transformers or safetensors is imported for it: it is there at once."""
    code = (
        "import sys, ckptconv.cli\n"
        "try: ckptconv.cli.main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'safetensors', 'tqdm'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for flag in ("--loader", "--saver", "--load-dir", "--save-dir", "--overwrite", "--dtype", "--max-queue-size",
                 "--no-checking", "--model-type", "--bf16", "--fp16", "--no-progress", "plugins"):  # fmt: skip
        assert flag in done.stdout


def test_python_dash_m(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ckptconv ")


def test_help_of_named_plugins(cli: Cli) -> None:
    done = cli("--loader", "megatron_mcore", "--saver", "hf", "--help")
    assert done.returncode == 0
    assert "--true-vocab-size" in done.stdout
    assert "--max-shard-size" in done.stdout
    saver = cli("--saver", "megatron_mcore", "--help").stdout
    for flag in ("--target-tensor-parallel-size", "--target-tp", "--target-pipeline-parallel-size", "--target-pp",
                 "--saver-transformer-impl", "--make-vocab-size-divisible-by", "--pad-vocab"):  # fmt: skip
        assert flag in saver


def test_no_arguments_show_the_help(cli: Cli) -> None:
    done = cli()
    assert done.returncode == 2
    assert "usage: ckptconv" in done.stdout + done.stderr


def test_plugins_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    lines = [line.split(None, 3) for line in capsys.readouterr().out.splitlines()]
    found = {(line[0], line[1]) for line in lines}
    assert {("loader", "hf"), ("loader", "hf_llama"), ("loader", "hf_mistral"), ("loader", "megatron_mcore"),
            ("saver", "hf"), ("saver", "megatron_mcore")} <= found  # fmt: skip
    assert all("built in" in " ".join(line[2:]) and len(line) == 4 for line in lines if line[1].startswith("hf"))


# Flags


@pytest.mark.parametrize(
    "flags",
    [
        ("--target-tp", "2", "--target-pp", "2"),
        ("--target_tp", "2", "--target_pp=2"),
        ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"),
        ("--target_tensor_parallel_size=2", "--target_pipeline_parallel_size", "2"),
        ("--target-tensor_parallel-size", "2", "--target_pp", "2", "--max_queue_size", "1", "--no_checking"),
    ],
)
def test_spellings(hf: Hf, tmp_path: Path, flags: tuple[str, ...]) -> None:
    arguments = ["--load_dir", str(hf("llama2")), f"--save_dir={tmp_path / 'out'}", "--saver=megatron_mcore", *flags]
    assert main(["--no_progress", *arguments]) == 0
    assert len(list((tmp_path / "out").rglob("model_optim_rng.pt"))) == 4


def test_a_value_may_have_underscores_and_dashes(hf: Hf, tmp_path: Path) -> None:
    out = tmp_path / "--an_odd-name"
    assert main([*MCORE, "--load-dir", str(hf("llama2")), f"--save-dir={out}"]) == 0
    assert (out / RANK).is_file()


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (("--target-tp-size", "2"), ("unknown flag --target-tp-size", "Did you mean '--target-tp'?")),
        (("--max-shard-size", "5GB"), ("unknown flag --max-shard-size",)),
        (("--targettp=2",), ("unknown flag --targettp", "--target-tp")),
        (("--target", "2"), ("unknown flag --target",)),  # no abbreviations
        (("stray",), ("stray",)),
        (("--target-tp", "two"), ("--target-tp", "two")),
        (("--target-tp",), ("--target-tp", "expected one argument")),
        (("--max-queue-size", "0"), ("--max-queue-size", "above 0")),
        (("--dtype", "int8"), ("--dtype", "int8", "bf16")),
        (("--bf16", "--fp16"), ("contradict",)),
        (("--bf16", "--dtype", "fp32"), ("contradict",)),
        (("--fp16", "--dtype", "bf16"), ("contradict",)),
        (("--saver-transformer-impl", "jax"), ("--saver-transformer-impl", "jax", "transformer_engine")),
        (("--pad-vocab", "one"), ("--pad-vocab", "one", "repeat")),
    ],
)
def test_flags_that_make_no_sense(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    assert run(hf("llama2"), tmp_path / "out", *MCORE, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("ckptconv: error: ")
    assert all(message in said for message in messages), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, -2])
def test_parallel_sizes_are_above_zero(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    assert run(hf("llama2"), tmp_path / "out", *MCORE, "--target-tp", size) in (2, 6)
    assert str(size) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, -2])
def test_the_vocabulary_divisor_is_above_zero(hf: Hf, tmp_path: Path, size: int) -> None:
    assert run(hf("llama2"), tmp_path / "out", *MCORE, "--make-vocab-size-divisible-by", size) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["5 apples", "0", "-1GB", "GB"])
def test_shard_sizes(hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert run(hf("llama2"), tmp_path / "out", "--saver", "hf", f"--max-shard-size={size}") == 2
    assert "not a size such as 5GB" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["--saver", "--load-dir", "--save-dir"])
def test_what_is_needed(hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], lacking: str) -> None:
    flags = {"--saver": "hf", "--load-dir": str(hf("llama2")), "--save-dir": str(tmp_path / "out")}
    del flags[lacking]
    assert main([word for pair in flags.items() for word in pair]) == 2
    assert lacking in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (("--saver", "megatron-core"), ("no saver called 'megatron-core'", "Did you mean 'megatron_mcore'?")),
        (("--saver", "hf", "--loader", "hf_lama"), ("no loader called 'hf_lama'", "Did you mean 'hf_llama'?")),
        (("--saver", "hf", "--loader", "a..b"), ("no loader called 'a..b'",)),
        (("--saver", "hf", "--loader", ""), ("no loader called ''",)),
    ],
)
def test_plugins_that_are_not_there(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    assert run(hf("llama2"), tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said


SAVER_THAT_SHARES_A_FLAG = """
def add_arguments(parser):
    parser.add_argument("--iteration", default="of the saver", help="the saver's own")
    parser.add_argument("--true-vocab-size", type=int)
def save_checkpoint(queue, args):
    import pathlib
    while queue.get() != "done":
        pass
    pathlib.Path(args.save_dir).mkdir()
    (pathlib.Path(args.save_dir) / "seen").write_text(f"{args.iteration} {args.true_vocab_size}")
"""


def test_loader_and_saver_may_declare_the_same_flag(
    hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saver_sharing.py").write_text(SAVER_THAT_SHARES_A_FLAG)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(hf("llama2"), tmp_path / "mcore", *MCORE) == 0
    flags = ("--loader", "megatron_mcore", "--saver", "sharing", "--iteration", "1", "--true-vocab-size", "131")
    assert run(tmp_path / "mcore", tmp_path / "out", *flags) == 0
    assert (tmp_path / "out" / "seen").read_text() == "1 131"


# --model-type


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("llama2", "GPT", 0), ("llama2", "llama", 0), ("llama2", "llama2", 0), ("codellama", "codellama", 0),
        ("mistral", "mistral", 0), ("llama2", "BERT", 2), ("llama2", "mistral", 2), ("qwen2", "llama", 2),
        ("llama2", "lama", 2),
    ],
)  # fmt: skip
def test_model_type(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str, code: int
) -> None:
    assert run(hf(name), tmp_path / "out", *MCORE, "--model-type", kind) == code
    if code:
        assert f"--model-type {kind}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


# Directories


def test_a_target_with_files_is_refused_and_replaced_when_asked(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(hf("llama2"), out, "--saver", "hf", "--max-shard-size", "50KB") == 0
    (out / "README.md").write_text("mine")
    (out / "logs").mkdir()
    (out / "logs" / "1.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(hf("qwen2"), out, "--saver", "hf") in (2, 7)
    assert "--overwrite" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(hf("qwen2"), out, "--saver", "hf", "--overwrite") == 0
    assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"
    assert (out / "README.md").read_text() == (out / "logs" / "1.txt").read_text() == "mine"
    found, expected = load_file(out / "model.safetensors"), load_file(hf("qwen2") / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_overwriting_a_checkpoint_of_another_layout(hf: Hf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(hf("llama2"), out, *MCORE, "--target-tp", 2, "--target-pp", 2) == 0
    assert run(hf("llama2"), out, *MCORE, "--target-tp", 1, "--overwrite") == 0
    assert [path.parent.name for path in out.rglob("model_optim_rng.pt")] == ["mp_rank_00"]


def test_overwriting_a_checkpoint_of_another_format(hf: Hf, tmp_path: Path) -> None:
    """The directory must not be taken for what was there before."""
    out = tmp_path / "out"
    assert run(hf("llama2"), out, *MCORE) == 0
    assert run(hf("qwen2"), out, "--saver", "hf", "--overwrite") == 0
    assert run(out, tmp_path / "again", "--saver", "hf") == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize("spelling", ["in", "in/../in", "link"])
def test_the_source_is_not_the_target(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    shutil.copytree(hf("llama2"), tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert run(tmp_path / "in", tmp_path / spelling, "--saver", "hf", "--overwrite") == 2
    assert "is the --load-dir" in capsys.readouterr().err
    assert before == sorted(path.name for path in (tmp_path / "in").iterdir())


def test_less_memory_than_the_processes_hold(hf: Callable[..., Path], tmp_path: Path) -> None:
    done = here("--load-dir", hf("llama2"), "--save-dir", tmp_path / "out", "--saver", "hf", "--max-memory", "1MB")
    assert done.returncode == 2 and "Give at least" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["s3://bucket/llama", "gs://bucket/llama", "memory://llama"])
@pytest.mark.parametrize("flag", ["--load-dir", "--save-dir"])
def test_object_stores(place: str, flag: str, hf: Callable[..., Path], tmp_path: Path) -> None:
    said = {"--load-dir": hf("llama2"), "--save-dir": tmp_path / "out", "--saver": "hf"} | {flag: place}
    done = here(*itertools.chain(*said.items()))
    assert done.returncode == 2 and f"{flag} {place}: is an address" in done.stderr and "Mount it" in done.stderr
    assert not list(tmp_path.iterdir()) and not Path(place.partition("/")[0]).exists()


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "unknown"])
def test_sources_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    source = tmp_path / "in"
    if kind == "file":
        source.write_text("x")
    elif kind != "missing":
        source.mkdir()
    if kind == "unknown":
        (source / "data.csv").write_text("1,2")
    assert run(source, tmp_path / "out", "--saver", "hf") == 2
    said = capsys.readouterr().err
    assert f"--load-dir {source}" in said
    assert not (tmp_path / "out").exists()


# Layouts


@pytest.mark.parametrize(
    ("name", "overrides", "flags", "message"),
    [
        ("llama2", {}, ("--target-pp", 3), "4 layers do not divide into pp 3"),
        ("llama2", {}, ("--target-tp", 3), "tp 3 does not divide 4 attention heads in 2 query groups"),
        ("llama2", {}, ("--target-tp", 8), "tp 8 does not divide 4 attention heads"),
        ("llama2", {"intermediate_size": 90}, ("--target-tp", 4), "90 rows do not divide by tp 4"),
        ("llama2", {"num_attention_heads": 12, "num_key_value_heads": 6}, ("--target-tp", 4), "6 query groups"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_anything_is_written(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, overrides: dict[str, Any],
    flags: tuple[object, ...], message: str,
) -> None:  # fmt: skip
    assert run(hf(name, **overrides), tmp_path / "out", *MCORE, *flags) == 6
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Exit codes


def test_the_tree_of_exit_codes() -> None:
    assert {code: kind.__name__ for code, kind in errors.BY_EXIT_CODE.items()} == {
        1: "CkptconvError", 2: "UsageError", 3: "SourceError", 4: "ProtocolError", 5: "TableError", 6: "LayoutError",
        7: "TargetError", 8: "VerifyError",
    }  # fmt: skip
    assert all(issubclass(kind, errors.CkptconvError) for kind in errors.BY_EXIT_CODE.values())


PROTOCOL = """
def add_arguments(parser): pass
def load_checkpoint(queue, args): queue.put("nonsense")
"""


def test_exit_codes_of_the_process(hf: Hf, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell sees them; each says one thing and leaves nothing. Code 8 is in test_roundtrip.py, 5 is a bug."""
    broken = tmp_path / "broken"
    shutil.copytree(hf("llama2"), broken)
    (broken / "model.safetensors").unlink()
    (tmp_path / "loader_wrong.py").write_text(PROTOCOL)
    (tmp_path / "longrope").mkdir()
    shutil.copy(hf("llama2") / "model.safetensors", tmp_path / "longrope")
    factors = {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6}
    longrope = config("llama2") | {"rope_scaling": {"rope_type": "longrope", "factor": 4.0, **factors}}
    (tmp_path / "longrope" / "config.json").write_text(json.dumps(longrope))
    cases = {
        2: (hf("llama2"), "--saver", "nothing"),
        3: (broken, *MCORE),
        6: (hf("llama2"), *MCORE, "--target-pp", "3"),
        7: (tmp_path / "longrope", *MCORE),
    }
    for code, (source, *flags) in cases.items():
        done = cli("--load-dir", source, "--save-dir", tmp_path / "out", *flags)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("ckptconv: error: ") == 1
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)  # `python -m` looks there
    done = cli("--load-dir", hf("llama2"), "--save-dir", tmp_path / "out", "--loader", "wrong", *MCORE)
    assert done.returncode == 4, done.stderr


def test_errors_are_not_tracebacks_but_verbose_shows_them(hf: Hf, cli: Cli, tmp_path: Path) -> None:
    arguments = (*MCORE, "--load-dir", hf("llama2"), "--save-dir", tmp_path / "out", "--target-pp", "3")
    assert "Traceback" not in cli(*arguments).stderr
    assert "Traceback" in cli(*arguments, "-v").stderr


def test_a_run_says_what_it_did_without_a_bar(hf: Hf, cli: Cli, tmp_path: Path) -> None:
    done = cli(*MCORE, "--load-dir", hf("llama2"), "--save-dir", tmp_path / "out")
    assert done.returncode == 0
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("hf -> megatron_mcore: ")
    assert "\r" not in done.stderr


def test_auto_is_the_default_loader(hf: Hf, tmp_path: Path) -> None:
    assert run(hf("llama2"), tmp_path / "a", *MCORE) == 0
    assert run(tmp_path / "a", tmp_path / "b", "--saver", "hf", "--loader", "auto") == 0
    assert run(tmp_path / "b", tmp_path / "c", "--saver", "hf", "--loader", "megatron_mcore") == 3


@pytest.mark.parametrize(("tp", "said"), [(1, False), (2, True)])
def test_more_ranks_than_query_groups_is_a_limit_of_older_releases(
    hf: Hf, tmp_path: Path, capfd: pytest.CaptureFixture[str], tp: int, said: bool
) -> None:
    assert run(hf("llama_mqa"), tmp_path / "out", *MCORE, "--target-tp", tp) == 0
    sentence = "tp 2 is larger than the 1 query groups"
    assert (sentence in capfd.readouterr().err) == said
    assert (sentence in (tmp_path / "out" / "megatron_args.txt").read_text()) == said
