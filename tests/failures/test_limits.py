"""Few descriptors, little or no /dev/shm, big messages: what a container gives must do."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Tree, other, run, spec, tree, words

Sources = dict[str, Path]


def descriptors(count: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in 100 shards, and on 32 ranks."""
    import models

    top = tmp_path_factory.mktemp("many")
    model = spec(num_layers=32, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=8,
                 kv_channels=8, vocab_size=512)  # fmt: skip
    models.write(model, top / "hf", shard=20_000)
    assert len(list((top / "hf").glob("*.safetensors"))) >= 100
    flags = ("--target-tp", 8, "--target-pp", 4)
    run("--saver", "megatron_mcore", *flags, "--load-dir", top / "hf", "--save-dir", top / "mcore").succeeded()
    return {"hf": top / "hf", "megatron_mcore": top / "mcore"}


@pytest.mark.parametrize(("saver", "flags", "limit"), [
    ("megatron_mcore", ("--target-tp", 8, "--target-pp", 4), 64),
    ("hf", ("--max-shard-size", "20KB"), 64),
])  # fmt: skip
def test_many_files(saver: str, flags: tuple[object, ...], limit: int, many: dict[str, Path], tmp_path: Path) -> None:
    ended = run(
        "--saver", saver, *flags, "--threads", 4, "--load-dir", many[other(saver)], "--save-dir", tmp_path / "out",
        preexec=descriptors(limit),
    )  # fmt: skip
    ended.succeeded()
    assert len(list((tmp_path / "out").rglob("*.pt" if saver == "megatron_mcore" else "*.safetensors"))) >= 32


def in_shm(size: str) -> list[str]:
    """A prefix that runs a command with a /dev/shm of `size`. Skips where that is not permitted."""
    prefix = ["unshare", "-m", "bash", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "-"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("unshare -m or mount is not permitted here")
    return prefix


def test_hardly_any_descriptors(sources: Sources, tmp_path: Path) -> None:
    """Not enough to start with: an error, no traceback, and nothing in a /dev/shm of its own."""
    target = tmp_path / "out"
    prefix = in_shm("1m")
    prefix[4] = prefix[4].replace('exec "$@"', '{ (ulimit -n 8; exec "$@"); code=$?; ls -A /dev/shm; exit $code; }')
    ended = run(*words("megatron_mcore", sources["hf"], target), prefix=prefix)
    ended.failed("Too many open files")
    assert "sem." not in ended.err
    assert not target.exists()


BIG = ("--layers", 2, "--hidden", 512, "--ffn", 12000, "--vocabulary", 1000)


def test_messages_larger_than_dev_shm(tmp_path: Path) -> None:
    """Layers of 38 MB each as torch tensors, which `torch.multiprocessing` would send through /dev/shm.

    A container gives 64 MB; here it is one.
    """
    flags = ("--loader", "torch", *BIG, "--saver", "megatron_mcore", "--load-dir", tmp_path)
    run(*flags, "--save-dir", tmp_path / "out", prefix=in_shm("1m"), limit=60).succeeded()
    files = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert sum(size for size, _ in files.values()) > 76e6


def test_no_dev_shm_to_speak_of(sources: Sources, tmp_path: Path, whole: Callable[[str], Tree]) -> None:
    run(*words("megatron_mcore", sources["hf"], tmp_path / "out", loader="hf"), prefix=in_shm("64k")).succeeded()
    assert tree(tmp_path / "out") == whole("megatron_mcore")


def test_a_full_dev_shm(sources: Sources, tmp_path: Path) -> None:
    """Not a byte: an error that says where."""
    prefix = in_shm("4k")
    prefix[4] = prefix[4].replace("&& exec", "&& (cat /dev/zero > /dev/shm/full; true) 2>/dev/null && exec")
    flags = words("megatron_mcore", sources["hf"], tmp_path / "out", loader="hf")
    run(*flags, prefix=prefix).failed("/dev/shm: no semaphore can be made: No space left on device")
    assert not (tmp_path / "out").exists()
