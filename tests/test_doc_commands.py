"""Every command and every piece of Python in README.md and docs/*.md is run, and what it is said to print is printed.

The convention is that of docs/README.md: a block that is indented, or fenced as `sh`, holds commands; `console` holds
commands after `$ ` with what they print; `python` is run; `text` is not, nor `sh old`, commands of other systems: no
command of ours may stand in these two. What is run in no block is in ELSEWHERE, with the reason.

Commands of a page run in order in a directory of its own. A directory that is read and was not written before is made
by SOURCES. Conversions run in this process (inprocess.py), on tiny models.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

import inprocess
from ckptconv import commands, conversion, oldcommands, staging
from ckptconv.testing import __main__ as kit
from commands import weights_of
from fixtures import build, tokenizer_files
from test_docs import known_flags

TOP = Path(__file__).resolve().parent.parent
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
OURS = re.compile(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:ckptconv|python3? -m ckptconv(?:\.testing)?)(?: |$)")

#: Beginnings of commands that no page runs, and why.
ELSEWHERE = {
    "python3 -m venv": "installs from the package index; it is how these tests themselves were set up",
    ".venv/bin/pip install": "the same, and runs all tests",
    "python examples/quickstart.py": "tests/test_examples.py runs it",
    "torchrun": "several machines: the tests of its page start the processes themselves",
}


@dataclass(frozen=True)
class Block:
    """A block of a page: the line it begins in, its info string (empty: indented), its lines."""

    line: int
    info: str
    lines: tuple[str, ...]


def blocks(page: Path) -> Iterator[Block]:
    """Fenced and indented blocks."""
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        end = at + 1
        if lines[at].startswith("```"):
            while lines[end] != "```":
                end += 1
            yield Block(at + 1, lines[at][3:] or "text", tuple(lines[at + 1 : end]))
            end += 1
        elif lines[at].lstrip().startswith("```"):
            raise AssertionError(f"{page.name}:{at + 1}: a fence that is not at the left is not seen")
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(line[4:] for line in lines[at:end]).rstrip()
            yield Block(at + 1, "", tuple(text.splitlines()))
        at = end


def joined(lines: tuple[str, ...] | list[str]) -> list[str]:
    """Commands, without comments and line breaks."""
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


# What the commands of the pages read


def model(name: str, **options: Any) -> Callable[[Path], object]:
    """A Hugging Face directory."""
    return lambda path: build(name, path, **options)


def wide(name: str, **options: Any) -> Callable[[Path], object]:
    """One that divides into tp 8, pp 4."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 16, "num_key_value_heads": 8,
             "num_hidden_layers": 8, "vocab_size": 352}  # fmt: skip
    return model(name, dtype="bfloat16", **(sizes | options))


def converted(saver: str, source: Callable[[Path], object], *flags: str) -> Callable[[Path], object]:
    """A checkpoint of another format."""

    def make(path: Path) -> None:
        hf = path.parent / f"{path.name}-source"
        source(hf)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(TOP / "examples" / "plugins"))
            done = inprocess.here("--load-dir", hf, "--save-dir", path, "--saver", saver, "--no-progress", *flags)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(hf)

    return make


def without_args(path: Path) -> None:
    """A legacy GPT as NVIDIA published the first ones: weights only."""
    converted("megatron_legacy", model("gpt2", n_embd=64, n_head=16, vocab_size=50257, tokenizer=False))(path)
    for file in path.glob("iter_*/*/*.pt"):
        torch.save({"model": torch.load(file, weights_only=False)["model"]}, file)
    for name in ("ckptconv.json", "hf"):
        for found in path.rglob(name):
            shutil.rmtree(found) if found.is_dir() else found.unlink()


def interrupted(path: Path) -> None:
    """What a killed run leaves: the conversion of `llama`, all files finished and none in place."""
    build("llama2", path.parent / "llama")
    words = shlex.split(f"--load-dir llama --saver megatron_mcore --target-tp 2 --save-dir {path.name} --no-progress")
    with mock.patch.object(staging.Staging, "publish", side_effect=KeyboardInterrupt):
        assert inprocess.here(*words).returncode


def tampered(change: Callable[[dict[str, Any]], object], name: str = "llama2") -> Callable[[Path], object]:
    """A Hugging Face directory whose config.json says something else."""

    def make(path: Path) -> None:
        build(name, path)
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))

    return make


def quickstart(path: Path) -> None:
    """What examples/quickstart.py makes, and nothing else of what it does."""
    spec = importlib.util.spec_from_file_location("quickstart", TOP / "examples" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_llama(path)


def changed(path: Path) -> None:
    """Another theta and one other number."""
    weights = weights_of(build("llama2", path, rope_theta=1000000.0))
    weights["model.layers.3.self_attn.k_proj.weight"][0, 0] = 9
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def with_adapter(path: Path) -> None:
    """A model with a tensor too many."""
    weights = weights_of(build("llama2", path)) | {"model.layers.0.self_attn.lora_A.weight": torch.zeros(2, 2)}
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def bare(path: Path) -> None:
    """A Megatron checkpoint as Megatron writes it: no files of ours, no tokenizer."""
    converted("megatron_mcore", model("llama2", tokenizer=False), "--target-tp", "2")(path)
    shutil.rmtree(path / "hf")
    (path / "iter_0000001" / "ckptconv.json").unlink()


def torch_file(path: Path) -> None:
    """A Hugging Face directory with weights as a torch file."""
    wide("llama3")(path)
    torch.save(weights_of(path), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def mindspore(path: Path) -> None:
    """A file that nobody noted the layout of."""
    hf = wide("llama2", num_attention_heads=32, num_key_value_heads=16, num_hidden_layers=32)
    converted("mindspore", hf, "--ms-fc1-layout", "contiguous")(path)
    (path / "ckptconv.json").unlink()


def half(path: Path) -> None:
    """One of two ranks."""
    bare(path)
    shutil.rmtree(path / "iter_0000001" / "mp_rank_01")


def copied(*names: str) -> Callable[[Path], object]:
    """A file of the repository."""
    return lambda path: shutil.copy(TOP.joinpath(*names), path)


#: A Llama that knows the words of docs/logits.md, and as many ids as Llama 3.
SPEAKING = model("llama31", vocab_size=128256, hidden_size=16, intermediate_size=32, num_hidden_layers=1)

#: What a page's commands read: the name, or `page:name` where it is not the same everywhere -> how it is made.
SOURCES: dict[str, Callable[[Path], object]] = {
    "llama": wide("llama31"),
    "inspect:mcore": converted("megatron_mcore", model("llama31"), "--target-tp", "2", "--target-pp", "2"),
    "DIR": converted("megatron_mcore", model("llama31"), "--target-tp", "2", "--target-pp", "2"),
    "A": model("llama2"),
    "B": converted("megatron_mcore", model("llama2"), "--target-tp", "2"),
    "loader_mine.py": copied("examples", "plugins", "loader_numpy.py"),
    "saver_mine.py": copied("examples", "plugins", "saver_numpy.py"),
    "examples": lambda path: path.symlink_to(TOP / "examples"),
    "api:DIR": converted("numpy", model("llama2")),
    "api:a/checkpoint": converted("numpy", model("llama2")),
    "diff:changed": changed,
    "diff:llama": model("llama2"),
    "gaudi:mlm": converted("megatron_gaudi", wide("llama31"), "--iteration", "4"),
    "coming_from:Llama-2-13b": converted("meta", wide("llama2"), "--target-tp", "2"),
    "coming_from:gpt": converted("megatron_legacy", model("gpt2")),
    "coming_from:llama2-7b": wide("llama2", vocab_size=32000),
    "coming_from:llama3-8b": wide("llama3"),
    "coming_from:mixtral": model("mixtral"),
    "coming_from:ms": mindspore,
    "coming_from:nxd-source": torch_file,
    "coming_from:trained": converted("megatron_mcore", wide("llama3"), "--target-tp", "2", "--target-pp", "4"),
    "deepseek-fp8": converted("hf", model("deepseek_v3"), "--quantize", "fp8"),
    "huggingface:trained": bare,
    "logits:llama3-8b": SPEAKING,
    "logits:mcore": converted("megatron_mcore", SPEAKING, "--iteration", "500"),
    "logits:hf-of-another-converter": SPEAKING,
    "megatron_legacy:gpt-of-2021": converted("megatron_legacy", model("gpt2", n_head=8)),
    "megatron_legacy:bert": model("megatron_bert"),
    "megatron_legacy:megatron_lm_345m": without_args,
    "megatron_llm:Llama-2-7b-hf": wide("llama2"),
    "meta:llama-2-13b": converted("meta", wide("llama2"), "--target-tp", "2"),
    "meta:llama-2-70b": converted("meta", wide("llama2"), "--target-tp", "8"),
    "meta:Llama-3.1-8B-hf": wide("llama31"),
    "mindspore:hf_model": model("llama31"),
    "mindspore:DIR_WITH_CONFIG_JSON": model("llama31"),
    "mindspore:merged": converted("mindspore", model("llama31"), "--ms-fc1-layout", "interleaved"),
    "run": converted("megatron_mcore", model("llama31"), "--iteration", "1000"),
    "plan:trained": converted("megatron_mcore", model("llama31"), "--target-tp", "2", "--target-pp", "2"),
    "nxdt:llama3-8b": wide("llama3"),
    "plan:llama": model("llama31"),
    "tokenizers:CKPT": converted("megatron_mcore", model("llama2", vocab_size=340, tokenizer=False)),
    "tokenizers:tokenizer.model": lambda path: path.write_bytes(tokenizer_files(300)["tokenizer.model"]),
    "troubleshooting:adapter": with_adapter,
    "troubleshooting:awq": tampered(lambda config: config.update(quantization_config={"quant_method": "awq"})),
    "troubleshooting:bare": bare,
    "troubleshooting:broken": lambda path: path.with_name("loader_broken.py").write_text("import numpi\n"),
    "troubleshooting:empty": Path.mkdir,
    "troubleshooting:full": lambda path: (path.mkdir(), (path / "notes.txt").touch()),
    "troubleshooting:half": half,
    "troubleshooting:llama": model("llama2"),
    "troubleshooting:longer": tampered(lambda config: config.update(num_hidden_layers=5)),
    "troubleshooting:longrope": model(
        "llama2", rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    ),
    "troubleshooting:mamba": tampered(lambda config: config.update(model_type="mamba2")),
    "troubleshooting:other-theta": model("llama2", rope_theta=500000.0),
    "troubleshooting:stopped": interrupted,
    "tokenizer.model": lambda path: path.write_bytes(tokenizer_files(100)["tokenizer.model"]),
    "work/llama": quickstart,
}
#: Models of the hub, by name.
HUB = {
    "ORG/NAME": model("llama2"),
    "meta-llama/Llama-2-7b-hf": wide("llama2", num_key_value_heads=16, num_hidden_layers=2),
}

#: What happens while the commands of a block run, by the words after `console`.
CIRCUMSTANCES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "full disk": lambda: mock.patch("shutil.disk_usage", return_value=SimpleNamespace(total=10**9, used=0, free=10**4)),
}


#: Flags with the directory that a command writes.
TARGETS = ("--save-dir", "--output-dir", "--save-path", "--out")


class Place:
    """The directory that a page's commands run in."""

    def __init__(self, folder: Path) -> None:
        self.page, self.folder = "", folder
        self.written: set[str] = set()

    def supply(self, text: str) -> None:
        """Make the sources that a text names and that are not there."""
        for name, make in sorted(SOURCES.items(), key=lambda item: ":" not in item[0]):
            page, _, name = name.rpartition(":")
            named = re.search(rf"(?<![\w./-]){re.escape(name.removesuffix('.py'))}(?![\w.-])", text)
            if page in ("", self.page) and named and not os.path.lexists(self.folder / name):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                make(self.folder / name)

    def run(self, line: str) -> tuple[int, str]:
        """(exit code, what it printed). What an earlier command has written is removed before it is written again."""
        words = shlex.split(line, comments=True)
        targets = [word for flag, word in itertools.pairwise(words) if flag.replace("_", "-") in TARGETS]
        if not {"--overwrite", "--resume"} & set(words):
            for target in self.written.intersection(targets):
                shutil.rmtree(target, ignore_errors=True)
        self.written.update(targets)
        self.supply(" ".join(words))
        with pytest.MonkeyPatch.context() as patch:
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                patch.setenv(name, value)
                if name == "PYTHONPATH":
                    patch.syspath_prepend(str(self.folder / value))
            patch.syspath_prepend(str(self.folder))
            if {"|", "&&", ">"} & set(words) or words[0] not in ("ckptconv", "python"):
                done = subprocess.run(line, shell=True, capture_output=True, text=True)
            elif words[:3] == ["python", "-m", "ckptconv.testing"]:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    done = subprocess.CompletedProcess(line, kit.main(words[3:]), out.getvalue(), "")
            else:
                assert words[0] == "ckptconv", f"{line}: add it to ELSEWHERE, or say how it is run"
                done = inprocess.here(*words[1:])
        return done.returncode, done.stderr + done.stdout

    def python(self, code: str) -> None:
        """Run a piece of Python, and the tests it defines."""
        self.supply(code)
        with pytest.MonkeyPatch.context() as patch, mock.patch.object(conversion, "_Saver", inprocess._Saver):
            patch.syspath_prepend(str(self.folder))
            names: dict[str, Any] = {}
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, self.page, "exec"), names)
                for name in [name for name in names if name.startswith("test_")]:
                    names[name]()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a hub with the models of HUB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOP / "tests" / "hub"))
        from loopback import Hub
    top = tmp_path_factory.mktemp("hub")
    for name, make in HUB.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        make(top / name)
    with Hub({name: top / name for name in HUB}, revisions={"v1.0": top / "ORG/NAME"}).running() as hub:
        yield hub.url


@pytest.fixture
def place(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An empty directory; the hub is the one on the loopback. Plugins that were imported from it are forgotten."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", served)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path.parent / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path.parent / "no-token"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # most of the time; what it is for is tested elsewhere
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield Place(tmp_path)
    for name in set(sys.modules) - before:
        if re.match(r"(loader|saver)_", name):
            del sys.modules[name]


def is_elsewhere(line: str) -> bool:
    return line.startswith(tuple(ELSEWHERE))


def shown(line: str) -> re.Pattern[str]:
    """What a line of a `console` block has to look like: spaces, times, sizes may differ, and `...` is anything."""
    line = re.sub(r"\d[\d.,]* ?(?:GB|MB|kB|MiB|GiB|bytes)\b", "\1", " ".join(line.split()))
    line = re.sub(r"\d[\d.,]*(?= ?s\b)", "\0", line)
    line = re.escape(line).replace("\0", r"[\d.,]+").replace("\1", r"[\d.,]+ (?:[kMG]i?B|bytes)")
    return re.compile(line.replace(r"\.\.\.", ".*"))


def check(page: Path, place: Place) -> None:
    """Run a page: commands end with exit code 0, or as a comment or an error shown says, and print what is shown."""
    place.page = page.stem
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        kind, _, rest = block.info.partition(" ")
        if kind == "python":
            place.python("\n".join(block.lines))
        elif kind == "console":
            with CIRCUMSTANCES[rest]() if rest else contextlib.nullcontext():
                console(block, place, where)
        elif block.info in ("", "sh"):
            for line in joined(block.lines):
                if not is_elsewhere(line):
                    code, said = place.run(line)
                    told = re.search(r"# exit code (\d+)$", line)
                    assert code == int(told[1] if told else 0), f"{where}: {line}\n{said}"
        else:
            assert block.info in ("text", "sh old"), f"{where}: {block.info} is no kind of block"
            assert not [line for line in block.lines if OURS.match(line.strip())], f"{where}: a command that is not run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page: Path, place: Place) -> None:
    check(page, place)


@pytest.mark.parametrize("text", [
    "    ckptconv inspect nowhere\n",
    "    ckptconv inspect A  # exit code 3\n",
    "```sh\nckptconv --load-dir A --saver hf --save-dir out --target-tp 2\n```\n",
    "```text\nckptconv inspect A\n```\n",
    "```sh old\nPYTHONPATH=. ckptconv inspect A\n```\n",
    "```sh later\nls\n```\n",
    "```console\n$ ckptconv inspect A\nformat      hf: B\n```\n",
    "```console\n$ ckptconv inspect A\nckptconv: error: ...\n```\n",
    "```python\nassert not 'true'\n```\n",
    "- a list\n\n  ```sh\n  ls\n  ```\n",
])  # fmt: skip
def test_a_page_that_is_wrong_is_noticed(text: str, place: Place) -> None:
    page = place.folder / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError):
        check(page, place)


def console(block: Block, place: Place, where: str) -> None:
    """Run the commands of a block and compare."""
    parts = re.split(r"^\$ ", "\n".join(block.lines), flags=re.MULTILINE)
    assert not parts[0].strip(), f"{where}: does not begin with a command"
    for part in parts[1:]:
        line, *_ = joined(part.splitlines())
        want = re.sub(r"\\\n\s*", " ", part).splitlines()[1:]
        code, said = place.run(line)
        told = re.search(r"# exit code (\d+)$", line)
        if told or not any("ckptconv: error: " in one for one in want):
            assert code == int(told[1] if told else 0), f"{where}: {line}\n{said}"
        else:
            assert code != 0, f"{where}: {line}\n{said}"
        there = [" ".join(one.split()) for one in said.splitlines()]
        for one in filter(None, map(str.strip, want)):
            assert one == "..." or any(map(shown(one).fullmatch, there)), f"{where}: not printed: {one}\n{said}"


# What stands between the blocks


def errors_in_the_list() -> list[re.Pattern[str]]:
    """The messages of docs/errors.md that have words enough to be told from others, as patterns."""
    rows = [line[2:] for line in (TOP / "docs" / "errors.md").read_text().splitlines() if line.startswith("- ")]
    texts = [re.sub(r"\[.*?\]", "\0", re.sub(r"\\<.*?\\>", "\0", row)) for row in rows]
    texts = [re.sub(r"\\(.)", r"\1", text) for text in texts if len(text.replace("\0", "")) > 20]
    return [re.compile(re.escape(text).replace("\0", ".*?")) for text in texts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_errors_that_are_shown_exist(page: Path) -> None:
    """Those that a command prints are compared with what it prints."""
    known = errors_in_the_list()
    for block in blocks(page):
        for line in block.lines:
            if block.info == "text" and line.startswith("ckptconv: error: "):
                assert any(one.fullmatch(line.removeprefix("ckptconv: error: ")) for one in known), line


def all_flags() -> set[str]:
    """Those of every parser there is, in one spelling."""
    flags = known_flags()
    for add_arguments, _ in oldcommands.COMMANDS.values():
        made = ArgumentParser()
        add_arguments(made)
        flags |= set(made._option_string_actions)
    return {flag.replace("_", "-") for flag in flags}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_a_line_have_flags_and_names_that_exist(page: Path) -> None:
    """`ckptconv ...` in tables and sentences, which no test runs."""
    first = {"plan", "plugins", "convert", *commands.names(), *oldcommands.COMMANDS}
    for span in re.findall(r"`(ckptconv [^`]*)`", page.read_text()):
        flags = {word.replace("_", "-") for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
        assert flags <= all_flags(), span
        word = span.split()[1]
        assert word in first or word.startswith("-") or not re.fullmatch(r"[a-z_]+", word), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    soon = {"torchrun.md"}
    for text, path, anchor in re.findall(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        if path.startswith(("http:", "https:")) or (target.name in soon and not target.exists()):
            continue
        assert target.exists(), f"[{text}]({path})"
        if anchor:
            assert anchor[1:] in anchors(target), f"[{text}]({path}{anchor})"


def anchors(page: Path) -> set[str]:
    """Headings, as links name them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_page_is_in_the_index() -> None:
    index = (TOP / "docs" / "README.md").read_text()
    assert "(docs/README.md)" in (TOP / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index]


def test_what_runs_elsewhere_is_named_by_a_page() -> None:
    lines = [line for page in PAGES for block in blocks(page) for line in joined(block.lines)]
    assert not [start for start in {*ELSEWHERE} - {"torchrun"} if not any(line.startswith(start) for line in lines)]
