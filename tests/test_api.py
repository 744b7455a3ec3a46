"""`ckptconv.convert` and `ckptconv.open`: the command line for programs."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckptconv
from ckptconv import api, conversion
from commands import same, weights_of
from inprocess import _Saver

Hf = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Savers in a thread."""
    monkeypatch.setattr(conversion, "_Saver", _Saver)


def test_in_a_script_without_a_main_guard(hf: Hf, tmp_path: Path) -> None:
    """The saver's process does not run the script again, and nothing heavy is imported before it is needed."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys, ckptconv
heavy = {{"torch", "numpy", "transformers", "ckptconv.api", "ckptconv.cli", "ckptconv.conversion"}} & set(sys.modules)
assert not heavy, heavy
print("once")
report = ckptconv.convert({str(hf("llama2"))!r}, {str(tmp_path / "out")!r}, saver="hf", progress=False)
assert report.bytes > 300_000 and report.seconds > 0 and report.peak_memory > 0, report
assert "torch" not in sys.modules
""")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "once\n"
    same(weights_of(tmp_path / "out"), weights_of(hf("llama2")))


@pytest.mark.usefixtures("quick")
def test_flags_are_those_of_the_command_line(hf: Hf, tmp_path: Path) -> None:
    ckptconv.convert(hf("llama2"), tmp_path / "out", saver="megatron_mcore", target_tp=2, target_pp=2, overwrite=False,
                     loader="hf", dtype="bf16", checking=True, max_memory=None)  # fmt: skip
    with ckptconv.open(tmp_path / "out") as found:
        assert (found.loader, found.metadata.tp, found.metadata.pp) == ("megatron_mcore", 2, 2)
        assert found.spec.dtype == "bfloat16" and found.spec.num_layers == 4


def test_words() -> None:
    flags = {"target_tp": 2, "overwrite": True, "resume": False, "threads": None, "shards": [1, 2], "checking": False,
             "progress": True, "scale": -1.5}  # fmt: skip
    assert api._words(flags) == ["--target-tp=2", "--overwrite", "--shards", "1", "2", "--no-checking", "--scale=-1.5"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ({"saver": "hff"}, 2, "Did you mean 'hf'"),
        ({"saver": "megatron_mcore", "target_tpp": 2}, 2, "unknown flag --target-tpp.*--target-tp"),
        ({"saver": "megatron_mcore", "target_tp": 3}, 6, "."),
    ],
)
def test_errors_are_raised(hf: Hf, tmp_path: Path, flags: dict[str, object], code: int, message: str) -> None:
    with pytest.raises(ckptconv.CkptconvError, match=message) as caught:
        ckptconv.convert(hf("llama2"), tmp_path / "out", **flags)  # type: ignore[arg-type]
    assert caught.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_open_reads_on_demand(hf: Hf, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(hf("llama2") / "model.safetensors")
    found = ckptconv.open(str(hf("llama2")))
    names = ["embeddings", *(f"transformer layer {i}" for i in range(4)), "final norm", "output layer"]
    assert [message.name for message in found] == names == [message.name for message in found]
    layer = found["transformer layer 2"]
    assert torch.equal(layer["mlp l1 weight"], weights["model.layers.2.mlp.down_proj.weight"])
    assert layer.lazy["qkv weight"].shape == (96, 48) and layer.layer == 2
    assert "qkv weight" in layer and "qkv bias" not in layer and len(layer) == 7
    assert layer["dense weight"] is not layer["dense weight"]  # nothing is kept
    total = sum(tensor.numel() for message in found for tensor in message.values())
    assert total == sum(tensor.numel() for tensor in weights.values())
    with pytest.raises(KeyError, match="no message 'transformer layer 4'"):
        found["transformer layer 4"]
    with pytest.raises(KeyError, match="Did you mean 'qkv weight'"):
        layer["qkv weights"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ({"loader": "meta"}, 3, "params.json"),
        ({"loader": "megatron_mcore", "iteraton": 3}, 2, "unknown flag --iteraton. Did you mean '--iteration'"),
        ({"loader": "nothing"}, 2, "no loader called 'nothing'"),
    ],
)
def test_what_cannot_be_opened(hf: Hf, flags: dict[str, object], code: int, message: str) -> None:
    with pytest.raises(ckptconv.CkptconvError, match=message) as caught:
        ckptconv.open(hf("llama2"), **flags)  # type: ignore[arg-type]
    assert caught.value.exit_code == code


@pytest.mark.usefixtures("quick")
def test_a_loader_of_others(hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugins"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    ckptconv.convert(hf("llama_both_bias"), tmp_path / "numpy", saver="numpy")
    weights = weights_of(hf("llama_both_bias"))
    with ckptconv.open(tmp_path / "numpy", loader="numpy") as found:
        with pytest.raises(ckptconv.CkptconvError, match="loader numpy sends its messages one after the other"):
            found["embeddings"]
        before = None
        for message in found:
            if message.layer is not None:
                down = weights[f"model.layers.{message.layer}.mlp.down_proj.weight"]
                assert torch.equal(message["mlp l1 weight"], down)
            if before is not None:
                with pytest.raises(ckptconv.CkptconvError, match="read them in time"):
                    before[next(iter(before))]
            before = message
        with pytest.raises(ckptconv.CkptconvError, match="open the checkpoint again"):
            next(iter(found))


@pytest.mark.usefixtures("quick")
def test_no_thread_outlives_a_failure(hf: Hf, tmp_path: Path) -> None:
    """The one that samples memory did: hundreds of them made every later conversion of a process many times slower."""
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(ckptconv.CkptconvError, match="tp 3"):
            ckptconv.convert(hf("llama2"), tmp_path / "no", saver="megatron_mcore", target_tp=3)
    gc.collect()
    for _ in range(100):  # a thread that was told to end needs a moment
        if threading.active_count() > before:
            time.sleep(0.02)
    assert threading.active_count() <= before


@pytest.mark.usefixtures("quick")
def test_shared_memory_is_given_back(hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may convert often: memory of a loader of others ends with its conversion."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugins"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    ckptconv.convert(hf("llama2"), tmp_path / "numpy", saver="numpy")

    def shared() -> int:
        files = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum("memfd:ckptconv" in os.readlink(file) for file in files if os.path.lexists(file))

    before = shared()
    ckptconv.convert(tmp_path / "numpy", tmp_path / "back", loader="numpy", saver="hf")
    with pytest.raises(ckptconv.CkptconvError, match="tp 3"):
        ckptconv.convert(tmp_path / "numpy", tmp_path / "no", loader="numpy", saver="megatron_mcore", target_tp=3)
    assert shared() == before


def test_public_names() -> None:
    assert all(getattr(ckptconv, name) is getattr(api, name) for name in ckptconv.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        ckptconv.nothing  # noqa: B018
