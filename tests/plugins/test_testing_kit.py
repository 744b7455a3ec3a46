"""The conformance kit names what is wrong with loaders and savers, and finds nothing wrong with those that work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_protocol import (
    BODY,
    DOWN,
    EXAMPLES,
    GATE,
    LOADERS,
    NORM,
    PLAIN_LOADER,
    SAVERS,
    START,
    UP,
    WRONG_LOADERS,
    Hf,
    Write,
    wrong,
)

from ckptconv import testing
from ckptconv.errors import UsageError
from ckptconv.testing import __main__ as command
from ckptconv.testing import saving
from ckptconv.testing.models import MODELS
from inprocess import here


def loader(hf: Hf, name: str) -> testing.Report:
    return testing.check_loader(name, str(hf("llama2")))


@pytest.mark.parametrize("generation", LOADERS)
def test_loaders_that_work(hf: Hf, write: Write, generation: str) -> None:
    report = loader(hf, write("loader", LOADERS[generation]))
    assert report.wrong == []
    assert "7 messages with 31 tensors, named, ordered and shaped as said" in report.fine
    text = str(report)
    assert "note   understood as: num_layers 4, hidden_size 48, ffn_hidden_size 88" in text
    assert "'done' was said 2 times" in text
    assert ("older names are used" in text) == (generation == "old")


@pytest.mark.parametrize("case", WRONG_LOADERS)
def test_loaders_that_do_not(hf: Hf, write: Write, case: str) -> None:
    text, _, message = wrong(case)
    report = loader(hf, write("loader", text))
    said = "\n".join(report.wrong)
    assert message in said or (case == "sends nothing" and "nothing was sent" in said)
    assert not any("as said" in line for line in report.fine)


#: More than the queue checks, or more than the first mistake.
MORE = {
    "an array": (GATE, GATE + ".numpy()", "'mlp l0 weight W' is a ndarray, expected a torch.Tensor"),
    "None": (UP + ":", '"dense bias": None, ' + UP + ":", "'dense bias' is a NoneType"),
    "infinite": (DOWN, DOWN + " / 0", "'mlp l1 weight' has elements that are infinite"),
    "where it is": (START, "    md.nothing\n" + START, "no attribute 'nothing' (loader_"),
}


@pytest.mark.parametrize("case", MORE)
def test_what_else_is_looked_at(hf: Hf, write: Write, case: str) -> None:
    old, new, message = MORE[case]
    assert old in PLAIN_LOADER
    report = loader(hf, write("loader", PLAIN_LOADER.replace(old, new)))
    assert any(message in line for line in report.wrong), report


def test_all_mistakes_are_told_at_once_and_layers_folded(hf: Hf, write: Write) -> None:
    text = PLAIN_LOADER.replace(UP, '"mlp l0 weigth V"').replace(DOWN, DOWN + ".t()").replace(GATE, GATE + "[:80]")
    text = text.replace('queue_put("final norm"', 'queue_put("the end"')
    found = loader(hf, write("loader", text)).wrong
    assert any(line.startswith("message 'transformer layer {0..3}' lacks mlp l0 weight V") for line in found)
    assert "never sent: final norm." in found
    assert "sent, but not of this model: the end." in found
    assert len(found) == 3


@pytest.mark.parametrize("generation", SAVERS)
def test_savers_that_work(write: Write, generation: str, capfd: pytest.CaptureFixture[str]) -> None:
    report = testing.check_saver(write("saver", SAVERS[generation]))
    assert report.wrong == []
    saved = next(line for line in report.fine if line.startswith("saved: "))
    # Both know gated Llamas with and without biases, and refuse what has more: they call exit(1) and say why.
    assert saved == "saved: dense, dense in bf16, tied embeddings, biases"
    assert "stops at the word 'exit'" in report.fine
    refused = [line.split(":")[0] for line in report.notes if "refused" in line]
    assert refused == ["norms of queries and keys", "experts"] or refused == ["GPT-2", *refused[1:]]


WRONG_SAVERS = {
    "raises": ("raise KeyError('boom')", "dense: KeyError: 'boom' (saver_"),
    "takes nothing": ("return", "dense: it returned before it had taken 'final norm'"),
    "writes nothing": ("while queue.get() != 'done': pass", "nothing was written into args.save_dir"),
}


@pytest.mark.parametrize("case", WRONG_SAVERS)
def test_savers_that_go_wrong(write: Write, case: str) -> None:
    statement, message = WRONG_SAVERS[case]
    report = testing.check_saver(write("saver", BODY.format(4, statement)))
    assert any(message in line for line in report.wrong), report


SAVER = """
import os, torch
def add_arguments(parser): pass
def save_checkpoint(queue, args):
    os.makedirs(args.save_dir)
    queue.get()
    kept = {{}}
    while (message := queue.get()) != "done":
        {}
    torch.save(kept, args.save_dir + "/kept.pt")
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("kept[message['name']] = message.get('qkv weight')", "transformer layer {0..1}/dense weight"),
        ("kept[message['name']] = dict(message)", None),
        ("kept[message['name']] = {**message}", None),
        ("kept[message['name']] = list(message.items())", None),
        ("name = message.pop('name'); kept[name] = [message.pop(key) for key in list(message)]", None),
    ],
)
def test_tensors_that_are_dropped_without_a_word(write: Write, statement: str, message: str | None) -> None:
    text = SAVER.format("if message == 'exit': raise SystemExit(1)\n        " + statement)
    report = testing.check_saver(write("saver", text))
    if message is None:
        assert report.wrong == [], report
        assert any(line.startswith("saved: dense,") and "experts" in line for line in report.fine)
    else:
        dropped = [line for line in report.wrong if "never looked at" in line]
        assert len(dropped) == len(MODELS) and message in dropped[0]


@pytest.mark.parametrize(
    ("what", "message"),
    [("break", "returned as if everything had been saved"), ("continue", "it asked for more")],
)
def test_a_saver_that_does_not_stop_at_exit(write: Write, what: str, message: str) -> None:
    text = SAVER.format(f"if message == 'exit': {what}\n        kept[message['name']] = dict(message)")
    assert any(message in line for line in testing.check_saver(write("saver", text)).wrong)


def test_a_saver_that_hangs(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PATIENCE", 0.1)
    report = testing.check_saver(write("saver", BODY.format(1, "time.sleep(3)")))
    assert any("it did not end within" in line for line in report.wrong)


@pytest.mark.parametrize("takes", [False, True])
def test_slices_go_to_savers_that_take_them(write: Write, takes: bool) -> None:
    text = SAVER.format("""if message == 'exit': raise SystemExit(1)
        kept[message['name']] = dict(message)
        if 'experts' in message['name']: raise KeyError('a slice')""")
    wrong = testing.check_saver(write("saver", f"takes_expert_slices = {takes}\n{text}")).wrong
    assert [line.split(" (")[0] for line in wrong] == ["experts: KeyError: 'a slice'"] * takes


# The examples, and a saver whose loader does not give back what was sent.


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.mark.usefixtures("examples")
def test_the_examples_keep_to_the_protocol(hf: Hf, tmp_path: Path) -> None:
    report = testing.check_saver("saver_numpy", loader="numpy")
    assert report.wrong == []
    assert "saved: dense, dense in bf16, tied embeddings, biases" in report.fine
    assert here("--saver", "numpy", "--load-dir", hf("llama2"), "--save-dir", tmp_path / "out").returncode == 0
    assert testing.check_loader("loader_numpy", str(tmp_path / "out")).wrong == []


@pytest.mark.usefixtures("examples")
def test_what_a_loader_does_not_give_back(write: Write) -> None:
    text = (EXAMPLES / "loader_numpy.py").read_text()
    loses = write("loader", text.replace('path)).to(dtype)', 'path)).to(dtype) * (1 + (key == "mlp l1 weight"))'))
    report = testing.check_saver("saver_numpy", loader=loses)
    layers = "transformer layer {0..1}/mlp l1 weight"
    assert f"dense: read back by loader {loses}, tensors differ: {layers}." in report.wrong
    changes = write("loader", text.replace("rotary_base=sizes.pop(", "rotary_base=2 * sizes.pop("))
    report = testing.check_saver("saver_numpy", loader=changes)
    assert f"dense: read back by loader {changes}, settings differ: rope.theta: 10000.0 != 20000.0." in report.wrong


def test_the_command(tmp_path: Path, hf: Hf, cli: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    root = EXAMPLES.parents[1]
    environment = {"PYTHONPATH": f"{root / 'src'}:{EXAMPLES}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ckptconv.testing", "saver_numpy", "--loader", "numpy"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].startswith("ok     module saver_numpy: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["mine"], 2, "is it a loader or a saver"),
        (["loader_none", "--load-dir", "."], 2, "no loader called 'loader_none'"),
        (["hf", "--kind", "saver"], 2, "is built in"),
        (["loader_numpy"], 2, "--load-dir is needed"),
        (["loader_numpy", "--load-dir", ".", "--numpi", "1"], 2, "unknown flag --numpi"),
        (["loader_numpy", "--load-dir", "."], 4, "sizes.json"),
    ],
)
@pytest.mark.usefixtures("examples")
def test_wrong_commands(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == code
    assert message in capsys.readouterr().out


def test_built_in_plugins_are_checked_elsewhere() -> None:
    with pytest.raises(UsageError, match="built in"):
        testing.check_saver("hf")
    assert NORM in PLAIN_LOADER
