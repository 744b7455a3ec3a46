"""Loaders and savers of others: as they are written for Megatron-LM's convert.py, today and in 2023, unchanged.

The stand-ins below follow `tools/checkpoint/loader_llama_mistral.py` and `saver_base.py` at core_v0.13.0, and
`tools/checkpoint_saver_megatron.py` of branch 23.08 for the older names.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inprocess
from ckptconv import plugins, transport
from ckptconv.cli import main
from ckptconv.errors import UsageError
from fixtures import config
from stand_ins import DONE, LOAD, QUEUE_GET, QUEUE_PUT

pytestmark = pytest.mark.timeout(120)

Hf = Callable[..., Path]
Write = Callable[[str, str], str]
Weights = dict[str, torch.Tensor]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "plugins"

# Stand-ins. %(x)s are the words in which the two generations differ.

LOADER = '''
import argparse, json, sys, types
import torch
from safetensors.torch import load_file

def add_arguments(parser):
    group = parser.add_argument_group(title="Llama loader.")
    group.add_argument("--true-vocab-size", type=int, default=None)
    group.add_argument("--megatron-path", type=str, default=None)
''' + LOAD + '''
def _load_checkpoint(queue, args):
    c = json.load(open(args.load_dir + "/config.json"))
    w = load_file(args.load_dir + "/model.safetensors")
    a, g, h = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
    d = c.get("head_dim", h // a)
    md = types.SimpleNamespace()
    md.model_type, md.num_layers, md.hidden_size, md.seq_length = "GPT", c["num_hidden_layers"], h, 4096
    md.num_attention_heads, md.max_position_embeddings = a, c["max_position_embeddings"]
    md.tokenizer_type, md.iteration, md.params_dtype, md.bert_binary_head = "Llama2Tokenizer", 1, torch.float32, False
    md.output_layer, md.position_embedding_type = not c["tie_word_embeddings"], "rope"
    md.linear_bias, md.swiglu = False, True
    md.previous_tensor_parallel_size = md.previous_pipeline_parallel_size = 1
    %(metadata)s
    queue.put(md)
''' + QUEUE_PUT + '''
    def pad(weight):
        return torch.cat([weight, torch.zeros(%(rows)s - len(weight), h)])

    queue_put("embeddings", {"word embeddings": pad(w["model.embed_tokens.weight"])})
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        q, k, v = (w[p + f"self_attn.{x}_proj.weight"] for x in "qkv")
        queue_put(f"transformer layer {i}", {
            "%(input)s": w[p + "input_layernorm.weight"],
            "%(post)s": w[p + "post_attention_layernorm.weight"],
            "qkv weight": torch.cat([q.view(g, -1, h), k.view(g, d, h), v.view(g, d, h)], 1).reshape(-1, h),
            "dense weight": w[p + "self_attn.o_proj.weight"].t().contiguous().t(),
            "mlp l1 weight": torch.nn.Parameter(w[p + "mlp.down_proj.weight"]),
            "mlp l0 weight W": w[p + "mlp.gate_proj.weight"],
            "mlp l0 weight V": w[p + "mlp.up_proj.weight"],
        })
    queue_put("%(final)s", {"weight": w["model.norm.weight"]})
    if md.output_layer:
        queue_put("output layer", {"weight": pad(w["lm_head.weight"])})
    queue.put("done")
    queue.put("done")
'''

SAVER = '''
import os, sys
import torch

def add_arguments(parser):
    group = parser.add_argument_group(title="Megatron saver")
    group.add_argument("--megatron-path", type=str, default=None)
    group.add_argument("--target-tensor-parallel-size", type=int)

def save_checkpoint(queue, args):''' + QUEUE_GET + '''
    md = queue_get()
    assert not isinstance(md, dict)
    seen = {"md": {k: str(v) for k, v in vars(md).items()}}
    assert isinstance(md.params_dtype, torch.dtype)
    %(metadata)s

    def take(name, keys):
        msg = queue_get(name)
        seen[name] = {key: msg.pop(key) for key in keys}
        check_message(msg)

    take("embeddings", ["word embeddings"])
    keys = ["%(input)s", "%(post)s", "dense weight", "mlp l1 weight", "qkv weight"]
    keys += ["mlp l0 weight W", "mlp l0 weight V"] if md.swiglu else ["mlp l0 weight"]
    keys += ["qkv bias"] if md.qkv_bias else []
    keys += ["dense bias", "mlp l1 bias", "mlp l0 bias W", "mlp l0 bias V"] if md.linear_bias else []
    for layer in range(md.num_layers):
        take(f"transformer layer {layer}", keys)
    take("%(final)s", ["weight"])
    if md.output_layer:
        take("output layer", ["weight"])''' + DONE

NEW = {"input": "input norm weight", "post": "post norm weight", "final": "final norm"}
OLD = {"input": "input layernorm weight", "post": "post layernorm weight", "final": "final layernorm"}
NEW_LOADER = LOADER % (NEW | {"rows": "len(weight) + 0", "metadata": """
    md.qkv_bias, md.norm_has_bias = False, False
    md.true_vocab_size, md.make_vocab_size_divisible_by = None, None
    md.use_legacy_models, md.consumed_train_samples, md.consumed_valid_samples = False, 0, 0
    md.checkpoint_args = argparse.Namespace(
        num_layers=md.num_layers, num_query_groups=g, group_query_attention=True, kv_channels=d, rotary_base=10000,
        norm_epsilon=1e-5, normalization="RMSNorm", rotary_percent=1.0, padded_vocab_size=c["vocab_size"],
        ffn_hidden_size=c["intermediate_size"], tokenizer_model="/data/tokenizer.model", swiglu=True,
        untie_embeddings_and_output_weights=True, add_bias_linear=False, dataloader_type="single",
        sequence_parallel=False, apply_query_key_layer_scaling=False)
"""})  # fmt: skip
#: No args of the source; the misspelt field; the embedding padded as Megatron stores it.
OLD_LOADER = LOADER % (OLD | {"rows": "256", "metadata": """
    md.true_vocab_size, md.make_vocab_size_divisble_by = c["vocab_size"], 128
"""})  # fmt: skip
#: The same without the upstream habit of saying `exit` before an exception goes on.
PLAIN_LOADER = NEW_LOADER.replace("""    try:
        _load_checkpoint(queue, args)
    except:
        queue.put("exit")
        raise
""", "    _load_checkpoint(queue, args)\n")
NEW_SAVER = SAVER % (
    NEW | {"metadata": "assert md.checkpoint_args.kv_channels; assert not md.checkpoint_args.sequence_parallel"}
)
OLD_SAVER = SAVER % (OLD | {"metadata": "seen['divisor'] = md.make_vocab_size_divisble_by"})

LOADERS, SAVERS = {"new": NEW_LOADER, "old": OLD_LOADER}, {"new": NEW_SAVER, "old": OLD_SAVER}


def convert(source: Path, out: Path, *flags: object, main: Callable[[list[str]], int] = inprocess.main) -> int:
    return main(["--load-dir", str(source), "--save-dir", str(out), "--no-progress", *map(str, flags)])


#: The same with a process for the saver.
in_processes = functools.partial(convert, main=main)


def ranks(folder: Path) -> dict[str, Weights]:
    paths = sorted(folder.rglob("model_optim_rng.pt"))
    return {path.parent.name: torch.load(path, weights_only=False)["model"] for path in paths}


def same(found: Weights, expected: Weights) -> None:
    assert sorted(found) == sorted(expected)
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def by_hand(weights: Weights, c: dict[str, Any], words: dict[str, str]) -> dict[str, Weights]:
    """The messages of a fixture, as a saver that knows `words` takes them."""
    g, h = c["num_key_value_heads"], c["hidden_size"]
    out = {"embeddings": {"word embeddings": weights["model.embed_tokens.weight"]}}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        qkv = [weights[f"{p}self_attn.{x}_proj.weight"].view(g, -1, h) for x in "qkv"]
        out[f"transformer layer {i}"] = {
            words["input"]: weights[p + "input_layernorm.weight"],
            words["post"]: weights[p + "post_attention_layernorm.weight"],
            "dense weight": weights[p + "self_attn.o_proj.weight"],
            "mlp l1 weight": weights[p + "mlp.down_proj.weight"],
            "qkv weight": torch.cat(qkv, 1).reshape(-1, h),
            "mlp l0 weight W": weights[p + "mlp.gate_proj.weight"],
            "mlp l0 weight V": weights[p + "mlp.up_proj.weight"],
        }
        if f"{p}self_attn.q_proj.bias" in weights:
            parts = [weights[f"{p}self_attn.{x}_proj.bias"].view(g, -1) for x in "qkv"]
            out[f"transformer layer {i}"]["qkv bias"] = torch.cat(parts, 1).reshape(-1)
    out[words["final"]] = {"weight": weights["model.norm.weight"]}
    if not c["tie_word_embeddings"]:
        out["output layer"] = {"weight": weights["lm_head.weight"]}
    return out


def check_seen(out: Path, source: Path, name: str, words: dict[str, str]) -> dict[str, Any]:
    seen: dict[str, Any] = torch.load(out / "seen.pt")
    expected = by_hand(load_file(source / "model.safetensors"), config(name), words)
    for message, tensors in expected.items():
        same(seen[message], tensors)
    assert set(seen) - {"md", "divisor"} == set(expected)
    return seen


# All combinations


@pytest.mark.parametrize("generation", LOADERS)
def test_their_loader_and_our_savers(hf: Hf, write: Write, tmp_path: Path, generation: str) -> None:
    loader = write("loader", LOADERS[generation])
    layout = ("--target-tp", 2, "--target-pp", 2, "--saver", "megatron_mcore")
    assert convert(hf("llama2"), tmp_path / "theirs", "--loader", loader, *layout) == 0
    assert convert(hf("llama2"), tmp_path / "ours", *layout) == 0
    theirs, ours = ranks(tmp_path / "theirs"), ranks(tmp_path / "ours")
    assert list(theirs) == list(ours)
    for rank, tensors in ours.items():
        same(theirs[rank], tensors)
    assert convert(hf("llama2"), tmp_path / "hf", "--loader", loader, "--saver", "hf") == 0
    same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(hf("llama2") / "model.safetensors"))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    keys = ("model_type", "num_key_value_heads", "rope_theta", "rms_norm_eps", "vocab_size", "tie_word_embeddings")
    assert {key: written[key] for key in keys} == {key: config("llama2")[key] for key in keys}


@pytest.mark.parametrize(("name", "generation"), [("llama2", "old"), ("qwen2_tied", "new")])
def test_our_loaders_and_their_saver(hf: Hf, write: Write, tmp_path: Path, name: str, generation: str) -> None:
    saver, words = write("saver", SAVERS[generation]), {"new": NEW, "old": OLD}[generation]
    assert convert(hf(name), tmp_path / "one", "--saver", saver) == 0
    check_seen(tmp_path / "one", hf(name), name, words)
    assert convert(hf(name), tmp_path / "mcore", "--saver", "megatron_mcore", "--target-tp", 4, "--target-pp", 2) == 0
    assert convert(tmp_path / "mcore", tmp_path / "two", "--saver", saver, "--megatron-path", "/nowhere") == 0
    seen = check_seen(tmp_path / "two", hf(name), name, words)
    expected = {"num_layers": "4", "hidden_size": "48", "num_attention_heads": "4", "params_dtype": "torch.float32",
                "model_type": "GPT", "swiglu": "True", "true_vocab_size": "131", "iteration": "1",
                "previous_tensor_parallel_size": "4", "previous_pipeline_parallel_size": "2",
                "position_embedding_type": "rope", "norm_has_bias": "False"}  # fmt: skip
    assert {key: seen["md"][key] for key in expected} == expected


@pytest.mark.parametrize(("loader", "saver"), [("old", "old"), ("new", "old"), ("old", "new")])
def test_their_loader_and_their_saver(hf: Hf, write: Write, tmp_path: Path, loader: str, saver: str) -> None:
    flags = ("--loader", write("loader", LOADERS[loader]), "--saver", write("saver", SAVERS[saver]))
    assert in_processes(hf("llama2"), tmp_path / "out", *flags, "--max-queue-size", 1) == 0
    seen = check_seen(tmp_path / "out", hf("llama2"), "llama2", {"new": NEW, "old": OLD}[saver])
    if (loader, saver) == ("old", "old"):
        assert seen["divisor"] == 128


def test_padding_of_a_loader_that_says_no_true_size_is_kept(hf: Hf, write: Write, tmp_path: Path) -> None:
    text = OLD_LOADER.replace('md.true_vocab_size, md.make_vocab_size_divisble_by = c["vocab_size"], 128', "pass")
    assert convert(hf("llama2"), tmp_path / "out", "--loader", write("loader", text), "--saver", "hf") == 0
    embedding = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding.shape == (256, 48)
    assert not embedding[131:].any()


KEEPER = """
import os, torch

def add_arguments(parser):
    pass

def save_checkpoint(queue, args):
    md = queue.get()
    kept, before = [], []
    while (msg := queue.get()) != "done":
        for key, tensor in msg.items():
            if key != "name":
                kept.append(tensor)
                before.append(tensor.clone())
    assert len(kept) == 31, len(kept)
    assert all(torch.equal(*pair) for pair in zip(kept, before))
    for tensor in kept:
        tensor.zero_()  # theirs, and no other tensor changes
    assert not any(tensor.any() for tensor in kept)
    os.makedirs(args.save_dir)
"""


@pytest.mark.parametrize("ours", [True, False])
def test_kept_tensors_do_not_change(
    hf: Hf, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    """With room for less than two layers in shared memory, so that its buffers are used again and again."""
    monkeypatch.setattr(transport, "MEMORY", 100_000)
    loader = "hf" if ours else write("loader", NEW_LOADER)
    flags = ("--loader", loader, "--saver", write("saver", KEEPER), "--max-queue-size", 1)
    before = (hf("llama2") / "model.safetensors").read_bytes()
    assert (convert if ours else in_processes)(hf("llama2"), tmp_path / "out", *flags) == 0
    assert (hf("llama2") / "model.safetensors").read_bytes() == before


# Loaders that go wrong. What is replaced in the stand-in, exit code, what is said.

START, NORM = '    queue_put("embeddings"', '    queue_put("final norm"'
LAYERS, UP = 'range(c["num_hidden_layers"])', '"mlp l0 weight V"'
GATE, DOWN = 'w[p + "mlp.gate_proj.weight"]', 'w[p + "mlp.down_proj.weight"]'
CAME = "came where 'transformer layer"
WRONG_LOADERS: dict[str, tuple[str, str, int, str]] = {
    "sends exit": (START, '    queue.put("exit"); return\n' + START, 4, "gave up (it sent 'exit')"),
    "raises": (START, '    raise RuntimeError("boom")\n' + START, 1, "boom"),
    "raises after some layers": (NORM, '    raise RuntimeError("boom")\n' + NORM, 1, "boom"),
    "calls exit": (START, "    sys.exit(5)\n" + START, 1, "called exit(5)"),
    "calls exit as if all were well": (START, "    sys.exit(0)\n" + START, 1, "called exit(0)"),
    "says done too early": (NORM, '    queue.put("done")\n' + NORM, 4, "ended before sending 'final norm'"),
    "ends without a word": (NORM, "    return\n" + NORM, 4, "ended before sending 'final norm'"),
    "sends nothing": ("    queue.put(md)", "    return", 4, "ended before sending"),
    "misses a layer": (LAYERS, "(0, 1, 3)", 4, f"'transformer layer 3' {CAME} 2' was expected"),
    "swaps layers": (LAYERS, "(0, 2, 1, 3)", 4, f"'transformer layer 2' {CAME} 1' was expected"),
    "sends a layer too many": (LAYERS, "(0, 1, 2, 3, 3)", 4, "layer 3' came where 'final norm' was expected"),
    "transposes a weight": (DOWN, DOWN + ".t()", 4, "'mlp l1 weight' is [88, 48], expected [48, 88]"),
    "transposes what sizes are read from": (GATE, GATE + ".t()", 4, "'mlp l0 weight W' is [48, 88], expected [88, 48]"),
    "misses a key": (UP + ': w[p + "mlp.up_proj.weight"],', "", 4, "lacks mlp l0 weight V"),
    "misspells a key": (UP, '"mlp l0 weigth V"', 4, "Did you mean 'mlp l0 weigth V'?"),
    "sends a key too many": (UP, '"dense bias": torch.zeros(h), ' + UP, 4, "unexpected dense bias"),
    "begins with a dict": ("queue.put(md)", "queue.put(vars(md))", 4, "began with a dict, expected a Namespace"),
    "sends a list": (NORM, "    queue.put([1])\n" + NORM, 4, "put a list"),
    "sends another word": (NORM, '    queue.put("end")\n' + NORM, 4, "'end'"),
    "is of a BERT": ('"GPT"', '"BERT"', 4, "BERT"),
    "says no sizes": ("md.num_layers, md.hidden_size, md.seq", "md.layers, md.hidden_size, md.seq", 4, "num_layers"),
}  # fmt: skip


def wrong(case: str, text: str = PLAIN_LOADER) -> tuple[str, int, str]:
    """(loader, exit code, what is said)."""
    old, new, code, message = WRONG_LOADERS[case]
    assert old in text
    return text.replace(old, new).replace("md.num_layers, num_query", "4, num_query"), code, message


#: Here a process that waits has to be ended; elsewhere that is the same, and the words are the subject.
PROCESSES = ("sends exit", "raises after some layers", "calls exit", "misses a layer")


def run(case: str, source: Path, out: Path, *flags: object) -> tuple[int, str]:
    """(exit code, what a bug in a plugin's own code says): such a bug keeps its traceback."""
    try:
        return (in_processes if case in PROCESSES else convert)(source, out, *flags), ""
    except RuntimeError as error:
        return 1, str(error)


@pytest.mark.parametrize("case", WRONG_LOADERS)
def test_loaders_that_go_wrong(
    hf: Hf, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    text, code, message = wrong(case)
    flags = ("--loader", write("loader", text), "--saver", "megatron_mcore", "--target-tp", 2)
    found, bug = run(case, hf("llama2"), tmp_path / "out", *flags)
    said = capfd.readouterr().err + bug
    assert found == code
    assert message in said
    if not case.startswith("raises"):
        assert said.count("ckptconv: error: ") == 1
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["raises", "calls exit", "misses a layer", "transposes a weight", "says no sizes"])
def test_the_first_error_is_told_not_the_exit_that_follows(
    hf: Hf, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    """Upstream's loaders put `exit` and re-raise whatever went wrong, our own refusal of a message included."""
    text, code, message = wrong(case, NEW_LOADER)
    found, bug = run(case, hf("llama2"), tmp_path / "out", "--loader", write("loader", text), "--saver", "hf")
    assert not (tmp_path / "out").exists()
    assert message in capfd.readouterr().err + bug
    assert found == code


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"dense weight":', '"dense bias": torch.zeros(h), "head scale weight": torch.ones(d), "dense weight":'),
        ('f"transformer layer {i}"', 'f"layer {i}"'),
        ('queue_put("final norm"', 'queue_put("the end"'),
    ],
)
def test_no_checking_lets_names_and_unknown_keys_pass(
    hf: Hf, write: Write, tmp_path: Path, old: str, new: str
) -> None:
    assert old in PLAIN_LOADER
    flags = ("--loader", write("loader", PLAIN_LOADER.replace(old, new)), "--saver", "hf")
    assert convert(hf("llama2"), tmp_path / "no", *flags) == 4
    assert convert(hf("llama2"), tmp_path / "out", *flags, "--no-checking") == 0
    same(load_file(tmp_path / "out" / "model.safetensors"), load_file(hf("llama2") / "model.safetensors"))


@pytest.mark.parametrize("case", ["misses a key", "transposes a weight", "misses a layer", "says done too early"])
def test_no_checking_never_turns_off_shapes_and_counts(hf: Hf, write: Write, tmp_path: Path, case: str) -> None:
    text, code, _ = wrong(case)
    flags = ("--loader", write("loader", text), "--saver", "hf", "--no-checking")
    assert convert(hf("llama2"), tmp_path / "out", *flags) == code
    assert not (tmp_path / "out").exists()


def test_another_element_type_than_announced_is_said(
    hf: Hf, write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = NEW_LOADER.replace('w[p + "mlp.gate_proj.weight"]', 'w[p + "mlp.gate_proj.weight"].double()')
    assert convert(hf("llama2"), tmp_path / "out", "--loader", write("loader", text), "--saver", "hf") == 0
    assert "'mlp l0 weight W' is torch.float64, sent as float32" in caplog.text
    same(load_file(tmp_path / "out" / "model.safetensors"), load_file(hf("llama2") / "model.safetensors"))


# Savers that go wrong

BODY = """
import os, signal, sys, time
def add_arguments(parser): pass
def save_checkpoint(queue, args):
    for _ in range({}):
        queue.get()
    {}
"""
WRONG_SAVERS: dict[str, tuple[str, str]] = {
    "raises": ("raise ValueError('boom')", "ValueError: boom"),
    "calls exit(1)": ("sys.exit(1)", "called exit(1)"),
    "calls exit(0)": ("sys.exit(0)", "called exit(0)"),
    "leaves": ("os._exit(9)", "ended with exit code 9"),
    "leaves as if all were well": ("os._exit(0)", "ended with exit code 0"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    "is stopped": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", "ended"),
}


@pytest.mark.parametrize(
    ("case", "size"), [*((case, 1) for case in WRONG_SAVERS), ("raises", 50), ("leaves as if all were well", 50)]
)
def test_savers_that_go_wrong(
    hf: Hf, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str, size: int
) -> None:
    statement, message = WRONG_SAVERS[case]
    saver = write("saver", BODY.format(2 if size == 50 else 0, statement))
    assert in_processes(hf("llama2"), tmp_path / "out", "--saver", saver, "--max-queue-size", size) == 1
    said = capfd.readouterr().err
    assert message in said
    assert said.count("ckptconv: error: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("taken", "size"), [(0, 1), (3, 50)])
def test_a_saver_that_returns_early_has_not_saved(
    hf: Hf, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str], taken: int, size: int
) -> None:
    saver = write("saver", BODY.format(taken, "return"))
    assert in_processes(hf("llama2"), tmp_path / "out", "--saver", saver, "--max-queue-size", size) != 0
    said = capfd.readouterr().err
    assert saver in said
    assert said.count("ckptconv: error: ") == 1


def test_a_saver_need_not_take_the_last_word(hf: Hf, write: Write, tmp_path: Path) -> None:
    """Metadata, embeddings, 4 layers, norm, head: 8; not `done`."""
    assert in_processes(hf("llama2"), tmp_path / "out", "--saver", write("saver", BODY.format(8, "return"))) == 0


def test_a_saver_that_wants_more_than_there_is(hf: Hf, write: Write, tmp_path: Path) -> None:
    saver = write("saver", BODY.format(20, "os.makedirs(args.save_dir)"))
    assert in_processes(hf("llama2"), tmp_path / "out", "--saver", saver) == 0


def test_a_saver_asks_for_a_key_there_is_not(
    hf: Hf, write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saver = write("saver", BODY.format(2, "queue.get().pop('dense bias')"))
    assert in_processes(hf("llama2"), tmp_path / "out", "--saver", saver) == 1
    said = capfd.readouterr().err
    assert "KeyError: 'dense bias'" in said
    assert "Traceback" in said  # a bug of theirs


# Lookup


def module(folder: Path, name: str, text: str = "") -> None:
    path = folder.joinpath(*name.split("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".py").write_text(text or f'"""{name}."""\n' + FINE)


FINE = """
def add_arguments(parser): pass
def load_checkpoint(queue, args): pass
def save_checkpoint(queue, args): pass
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the Python path; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def installed(folder: Path, kind: str, name: str, target: str) -> None:
    """A distribution with an entry point, as pip leaves it."""
    info = folder / "others-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ckptconv.{kind}s]\n{name} = {target}\n")


@pytest.mark.parametrize("kind", ["loader", "saver"])
def test_lookup_order(path: Path, kind: str) -> None:
    """Every candidate exists; each is found when the ones before it are gone."""
    module(path, "package.inside")
    installed(path, kind, "mine", "package.inside")
    for name in (f"{kind}_mine", f"checkpoint_{kind}_mine", "mine"):
        module(path, name)
    found = plugins.find(kind, "mine")
    assert (found.module, found.ours, found.summary) == ("package.inside", False, "package.inside.")
    (path / "others-1.0.dist-info" / "entry_points.txt").unlink()
    for name in (f"{kind}_mine", f"checkpoint_{kind}_mine", "mine"):
        assert plugins.find(kind, "mine").module == name
        (path / f"{name}.py").unlink()
        del sys.modules[name]
        importlib.invalidate_caches()
    with pytest.raises(UsageError, match=f"no {kind} called 'mine'.*{kind}_mine, checkpoint_{kind}_mine, mine"):
        plugins.find(kind, "mine")


def test_built_in_names_win(path: Path) -> None:
    module(path, "saver_hf")
    assert plugins.find("saver", "hf").module == "ckptconv.savers.hf"


@pytest.mark.parametrize("name", ["package.sub.saver_mine", "package.sub.other"])
def test_names_may_be_dotted(path: Path, name: str) -> None:
    module(path, name)
    assert plugins.find("saver", name).module == name


def test_an_entry_point_works_and_is_listed(
    hf: Hf, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module(path, "package.saving", "'''Keeps nothing.'''\n" + BODY.format(9, "os.makedirs(args.save_dir)"))
    installed(path, "saver", "nothing", "package.saving")
    assert main(["plugins"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "nothing" in line)
    assert line.split()[:2] == ["saver", "nothing"]
    assert "package.saving" in line
    assert "Keeps nothing." in line
    assert in_processes(hf("llama2"), path / "out", "--saver", "nothing") == 0
    assert (path / "out").is_dir()


def test_a_broken_entry_point_is_listed_as_broken(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed(path, "saver", "nothing", "package.gone")
    assert main(["plugins"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "nothing" in line)
    assert "broken" in line


NO_DEPENDENCY = "import a_package_nobody_has.part\n" + FINE


@pytest.mark.parametrize("name", ["saver_mine", "checkpoint_saver_mine", "mine", "package.mine"])
def test_a_missing_dependency_is_not_a_missing_plugin(path: Path, name: str) -> None:
    module(path, name, NO_DEPENDENCY)
    wanted = name if "." in name else "mine"
    with pytest.raises(UsageError, match=f"saver module {name} was found, but it needs 'a_package_nobody_has'"):
        plugins.find("saver", wanted)


def test_a_missing_dependency_of_an_entry_point(path: Path) -> None:
    module(path, "package.inside", NO_DEPENDENCY)
    installed(path, "saver", "mine", "package.inside")
    with pytest.raises(UsageError, match=r"saver mine \(entry point package.inside\).*a_package_nobody_has"):
        plugins.find("saver", "mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from json import nothing_of_the_kind\n" + FINE, "saver_mine was found, but importing it failed.*nothing_of"),
        ("def add_arguments(parser) pass\n", "saver_mine was found, but importing it failed"),
        ("def add_arguments(parser): pass\n", r"saver_mine has no function save_checkpoint\(queue, args\)"),
        ("def save_checkpoint(queue, args): pass\n", r"saver_mine has no function add_arguments\(parser\)"),
        ("save_checkpoint = 3\ndef add_arguments(parser): pass\n", "no function save_checkpoint"),
        (
            "def add_arguments(parser): pass\ndef save_checkpoint(queue): pass\n",
            r"saver_mine: save_checkpoint\(queue\) cannot be called as save_checkpoint\(queue, args\)",
        ),
        (
            "def add_arguments(): pass\ndef save_checkpoint(queue, args): pass\n",
            r"saver_mine: add_arguments\(\) cannot be called as add_arguments\(parser\)",
        ),
        (
            "def add_arguments(parser): pass\ndef save_checkpoint(queue, args, *, device): pass\n",
            r"saver_mine: save_checkpoint\(queue, args, \*, device\) cannot be called",
        ),
    ],
)
def test_modules_that_are_no_savers(path: Path, text: str, message: str) -> None:
    module(path, "saver_mine", text)
    with pytest.raises(UsageError, match=message):
        plugins.find("saver", "mine")


def test_other_parameter_names_are_fine(path: Path) -> None:
    text = "def add_arguments(p, more=1): pass\ndef save_checkpoint(q, arguments, *rest, **named): pass\n"
    module(path, "saver_mine", text)
    assert plugins.find("saver", "mine").origin == "module saver_mine"


@pytest.mark.parametrize(
    "error",
    ["ValueError('bad table')", "RuntimeError('no device')", "KeyError('HOME')"],
)
def test_a_module_that_fails_while_it_is_imported_is_not_missing(path: Path, error: str) -> None:
    module(path, "saver_mine", f"raise {error}\n")
    with pytest.raises(Exception, match=r"bad table|no device|HOME"):
        plugins.find("saver", "mine")


# The examples


@pytest.mark.parametrize("name", ["loader_numpy", "saver_numpy"])
def test_the_examples_are_short_and_need_nothing_of_ours(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 60
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert "ckptconv" not in imported


def test_the_examples_work_both_ways(hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "llama_both_bias"
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert in_processes(hf(name), tmp_path / "numpy", "--saver", "numpy", "--numpy-dtype", "float32") == 0
    assert (tmp_path / "numpy" / "sizes.json").is_file()
    flags = ("--loader", "numpy", "--saver", "megatron_mcore", "--target-tp", 2, "--target-pp", 2)
    assert convert(tmp_path / "numpy", tmp_path / "mcore", *flags) == 0
    assert convert(tmp_path / "mcore", tmp_path / "back", "--saver", "hf") == 0
    same(load_file(tmp_path / "back" / "model.safetensors"), load_file(hf(name) / "model.safetensors"))


def test_the_process_of_a_saver_goes_with_a_loader_that_is_killed(hf: Hf, write: Write, tmp_path: Path) -> None:
    """The loader's process leaves without a word: nothing looks complete, and nobody keeps running."""
    loader = write("loader", PLAIN_LOADER.replace(NORM, "    import os; os._exit(3)\n" + NORM))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path / "plugins")])}
    command = [sys.executable, "-m", "ckptconv", "--loader", loader, "--saver", "megatron_mcore",
               "--load-dir", str(hf("llama2")), "--save-dir", str(tmp_path / "out")]  # fmt: skip
    # communicate() returns when nobody holds the pipes any more: the saver has ended too.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 3
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()
