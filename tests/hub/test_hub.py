"""Models of the hub: the real client against a server on the loopback, gated and missing models, no network."""

from __future__ import annotations

import logging
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loopback import TOKEN, Hub

from ckptconv import hub
from ckptconv.errors import SourceError
from commands import same, weights_of
from fixtures import build
from inprocess import main

SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
         "special_tokens_map.json"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with shards, and with what nobody needs: other weights, a README, another format's folder."""
    folder = build("llama2", tmp_path_factory.mktemp("repository"), max_shard_size=200_000)
    (folder / "pytorch_model.bin").write_bytes(b"not for us")
    (folder / "README.md").write_text("about it")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"not for us")
    return folder


@pytest.fixture
def server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, which knows `org/model` and the gated `org/gated`; the client has a cache of its own."""
    from huggingface_hub import constants

    with Hub({"org/model": model, "org/gated": model}, gated={"org/gated"}).running() as running:
        reach(running.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        yield running


def reach(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when the client is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def fetch(name: str, revision: str | None = None, tmp_path: Path | None = None) -> str:
    return hub.fetch(name, revision, str((tmp_path or Path.cwd()) / "cache"), progress=False)


def convert(*words: object) -> int:
    return main(["--saver", "hf", "--save-dir", "out", "--no-progress", "--cache-dir", "cache", *map(str, words)])


@pytest.mark.parametrize("flag", ["--load-dir", "--hf-model-name", "--hf_model_name"])
def test_a_model_is_fetched_and_converted(flag: str, server: Hub, model: Path) -> None:
    assert convert(flag, "org/model") == 0
    (model / "pytorch_model.bin").stat()  # it is there, and was not fetched
    assert sorted(server.asked) == sorted([*SMALL, *(p.name for p in model.glob("model*"))])
    same(weights_of(Path("out")), weights_of(model))
    for name in SMALL - {"config.json"}:
        assert (Path("out") / name).read_bytes() == (model / name).read_bytes()
    server.asked.clear()
    assert convert(flag, "org/model", "--overwrite") == 0
    assert server.asked == []  # the cache has it


def test_what_is_left_of_the_command_line_is_checked_first(server: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert convert("--load-dir", "org/model", "--no-such-flag") == 2
    Path("out").mkdir()
    Path("out/file").touch()
    assert convert("--load-dir", "org/model") == 2
    assert convert("--load-dir", "org/model", "--loader", "megatron_mcore") == 2
    assert convert("--hf-model-name", "org/model", "--loader", "megatron_mcore") == 2
    assert server.asked == []
    said = capfd.readouterr().err
    assert "exists and is not empty" in said and "megatron_mcore reads no models of the hub" in said


def test_a_directory_that_is_there_is_no_name(server: Hub, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(model, "org/model")
    assert convert("--load-dir", "org/model", "--hf-model-name", "org/other") == 0
    assert server.asked == []
    assert "--hf-model-name org/other is ignored" in caplog.text


def test_a_pinned_loader_reads_the_hub_too(server: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert convert("--load-dir", "org/model", "--loader", "hf_mistral") == 3
    assert "--loader hf_mistral takes mistral only" in capfd.readouterr().err
    assert convert("--load-dir", "org/model", "--loader", "hf_llama") == 0


def test_a_revision_is_a_branch_a_tag_or_a_commit(server: Hub, model: Path, tmp_path: Path) -> None:
    other = build("llama2", tmp_path / "other", vocab_size=140)
    server.revisions["v2"] = other
    same(weights_of(Path(fetch("org/model", "v2"))), weights_of(other))
    same(weights_of(Path(fetch("org/model"))), weights_of(model))
    with pytest.raises(SourceError, match=r"org/model.*has no such revision.*--hf-revision"):
        fetch("org/model", "v3")


def test_bin_files_are_fetched_where_there_is_nothing_better(server: Hub, tmp_path: Path) -> None:
    import torch

    folder = build("llama2", tmp_path / "older", tokenizer=False)
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    server.models["org/older"] = folder
    found = Path(fetch("org/older"))
    assert sorted(server.asked) == ["config.json", "generation_config.json", "pytorch_model.bin"]
    assert (found / "pytorch_model.bin").read_bytes() == (folder / "pytorch_model.bin").read_bytes()


def test_a_repository_that_is_no_model_is_refused(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "README.md").touch()
    server.models["org/empty"] = folder
    with pytest.raises(SourceError, match=r"has no config.json; it has README.md"):
        fetch("org/empty")
    (folder / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds no safetensors or \.bin weights"):
        fetch("org/empty")


# Tokens


def test_a_gated_model_wants_a_token_from_the_environment(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    with pytest.raises(SourceError, match=r"lets in only those who were granted access.*HF_TOKEN"):
        fetch("org/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(SourceError, match="lets in only those") as wrong:
        fetch("org/gated")
    assert "hf_of_another" not in str(wrong.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (Path(fetch("org/gated")) / "config.json").is_file()
    assert server.tokens == {"hf_of_another", TOKEN}


def test_a_gated_model_is_read_with_the_saved_login(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    assert (Path(fetch("org/gated")) / "config.json").is_file()


def test_a_token_is_asked_for_at_a_terminal_and_kept_nowhere(model: Path, tmp_path: Path) -> None:
    """A process with a terminal of its own: what is typed is not shown, and no file has it afterwards."""
    with Hub({"org/gated": model}, gated={"org/gated"}).running() as server:
        master, slave = pty.openpty()
        path = os.pathsep.join([str(Path(hub.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        plain = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
        home = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": path}
        command = [sys.executable, "-m", "ckptconv", "--saver", "hf", "--load-dir", "org/gated", "--save-dir",
                   str(tmp_path / "out"), "--no-progress", "-v"]  # fmt: skip
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env={**plain, **home},
                                   start_new_session=True, cwd=tmp_path)  # fmt: skip
        os.close(slave)
        said, typed = b"", False
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:
                break
            if not part:
                break
            said += part
            if not typed and b"needs a token" in said:
                os.write(master, TOKEN.encode() + b"\n")
                typed = True
        os.close(master)
        assert process.wait(60) == 0, said.decode()
    assert typed
    assert TOKEN.encode() not in said
    same(weights_of(tmp_path / "out"), weights_of(model))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


# What is not there


def test_a_missing_model_and_a_missing_directory_are_told_together(server: Hub) -> None:
    with pytest.raises(SourceError, match=r"org/none: there is no such directory, and .* has no such model"):
        fetch("org/none")


def test_without_a_network_the_cache_is_read(
    server: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch("org/model")
    reach("http://127.0.0.1:9", monkeypatch)  # nobody listens there
    with caplog.at_level(logging.WARNING):
        assert fetch("org/model") == folder
    assert "the hub was not reached" in caplog.text
    same(weights_of(Path(folder)), weights_of(model))
    with pytest.raises(SourceError, match=r"org/other.*was not reached.*nor is it in the cache"):
        fetch("org/other")
    next(Path(folder).glob("model-00002*")).unlink()  # an interrupted fetch
    assert convert("--load-dir", "org/model") == 3


def test_an_error_of_ours_is_not_taken_for_one_of_the_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptconv.hub.fnmatch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch("org/model")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("meta-llama/Llama-3.1-8B", True), ("/org/model", False), ("./org/model", False), ("org/model/", False),
     ("model", False), ("a/b/c", False), ("../model", False), ("~/model", False)],
)  # fmt: skip
def test_what_a_name_looks_like(text: str, is_one: bool) -> None:
    assert hub.is_name(text) == is_one


def test_the_tokenizer_of_another_model_is_fetched_alone(
    server: Hub, hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    source = hf("llama2", tokenizer=False)
    assert (
        main(["--saver", "hf", "--load-dir", str(source), "--save-dir", "out", "--tokenizer-model", "org/model"]) == 0
    )
    assert sorted(server.asked) == sorted(SMALL - {"config.json"})
