"""Plugins written for Megatron-LLM's checkpoint_util.py, unchanged: its loaders and savers say other things.

The stand-ins follow `tools/checkpoint_loader_megatron.py` and `tools/checkpoint_saver_megatron.py` of
epfLLM/Megatron-LLM at 806a833: attributes of the metadata, order, names and keys, and what the tensors hold. They take
their weights from Hugging Face fixtures, turned row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import convert, run, same, weights_of
from fixtures import logits
from inprocess import here
from stand_ins import DONE, LOAD, QUEUE_GET, QUEUE_PUT

Hf = Callable[..., Path]
Write = Callable[[str, str], str]

LOADER = '''
import json, types
import torch
from safetensors.torch import load_file

def add_arguments(parser):
    group = parser.add_argument_group(title="Megatron loader")
    group.add_argument("--true_vocab_size", type=int, default=None)
    group.add_argument("--megatron_path", type=str, default=None)
''' + LOAD + '''
def turned(qkv, heads, d):
    """Query and key rows of each group, whose heads are `heads` and a value, from halves into pairs."""
    rows = list(qkv)
    order = []
    for head in range(len(rows) // d):
        for row in range(d):
            source = row if head % (heads + 1) == heads else row // 2 + (row % 2) * (d // 2)
            order.append(head * d + source)
    return torch.stack([rows[n] for n in order])

def _load_checkpoint(queue, args):
    c = json.load(open(args.load_dir + "/config.json"))
    w = load_file(args.load_dir + "/model.safetensors")
    llama = c["model_type"] == "llama"
    a, h = c["num_attention_heads"], c["hidden_size"]
    new = c.get("new_decoder_architecture")
    g = c["num_key_value_heads"] if llama else c["num_kv_heads"] if new else 1
    d = h // a
    md = types.SimpleNamespace()
    md.model_type = args.model_type
    md.num_layers, md.hidden_size, md.seq_length = c["num_hidden_layers"], h, c["max_position_embeddings"]
    md.num_attention_heads, md.max_position_embeddings = a, c["max_position_embeddings"]
    md.tokenizer_type, md.iteration = "SentencePieceTokenizer", "release"
    md.previous_tensor_parallel_size = md.previous_pipeline_parallel_size = 1
    md.true_vocab_size, md.make_vocab_size_divisible_by = args.true_vocab_size, 128
    md.num_attention_heads_kv = g
    md.parallel_attn, md.parallel_layernorm = not llama, bool(new)
    md.use_flash_attn, md.hidden_dropout, md.lima_dropout, md.use_bias = False, 0.0, False, False
    md.use_rms_norm = llama
    md.ffn_hidden_size = c["intermediate_size"] if llama else c.get("ffn_hidden_size") or 4 * h
    md.glu_activation = "swiglu" if llama else None
    md.tie_embed_logits = not llama
    md.params_dtype, md.sliding_window_size = torch.float32, None
    md.position_embedding_type = "rotary"
    md.consumed_train_samples = md.consumed_valid_samples = 0
    queue.put(md)
''' + QUEUE_PUT + '''
    def pad(weight):
        return torch.cat([weight, weight[-1:].expand(128 * 2 - len(weight), -1)])

    embedding = w["model.embed_tokens.weight" if llama else "transformer.word_embeddings.weight"]
    queue_put("embeddings", {"word embeddings": pad(embedding)})
    if llama:
        queue_put("lm_head", {"lm_head": pad(w["lm_head.weight"])})
    for i in range(md.num_layers):
        if llama:
            p = f"model.layers.{i}."
            q, k, v = (w[p + f"self_attn.{x}_proj.weight"] for x in "qkv")
            msg = {
                "input layernorm weight": w[p + "input_layernorm.weight"],
                "post layernorm weight": w[p + "post_attention_layernorm.weight"],
                "mlp l0 weight": torch.cat([w[p + "mlp.up_proj.weight"], w[p + "mlp.gate_proj.weight"]]),
                "mlp l1 weight": w[p + "mlp.down_proj.weight"],
                "dense weight": w[p + "self_attn.o_proj.weight"],
            }
            qkv = torch.cat([q.view(g, -1, h), k.view(g, d, h), v.view(g, d, h)], 1).reshape(-1, h)
        else:
            p = f"transformer.h.{i}."
            first = "ln_attn" if new else "input_layernorm"
            msg = {
                "input layernorm weight": w[p + first + ".weight"], "input layernorm bias": w[p + first + ".bias"],
                "mlp l0 weight": w[p + "mlp.dense_h_to_4h.weight"],
                "mlp l1 weight": w[p + "mlp.dense_4h_to_h.weight"],
                "dense weight": w[p + "self_attention.dense.weight"],
            }
            if new:
                msg["mlp layernorm weight"] = w[p + "ln_mlp.weight"]
                msg["mlp layernorm bias"] = w[p + "ln_mlp.bias"]
            qkv = w[p + "self_attention.query_key_value.weight"]
        msg["qkv weight"] = turned(qkv, a // g + 1, d)
        queue_put(f"transformer layer {i}", msg)
    end = "model.norm" if llama else "transformer.ln_f"
    queue_put("final layernorm", {n: w[f"{end}.{n}"] for n in (("weight",) if llama else ("weight", "bias"))})
    queue.put("done")
'''

SAVER = '''
import os
import torch

def add_arguments(parser):
    group = parser.add_argument_group(title="Megatron saver")
    group.add_argument("--megatron_path", type=str, default=None)
    group.add_argument("--target_tensor_parallel_size", type=int)
    group.add_argument("--target_pipeline_parallel_size", type=int)

def save_checkpoint(queue, args):''' + QUEUE_GET + '''
    md = queue_get()
    if args.target_tensor_parallel_size is None:
        if hasattr(md, 'previous_tensor_parallel_size'):
            args.target_tensor_parallel_size = md.previous_tensor_parallel_size
    argv = ['--num_layers', str(md.num_layers), '--hidden_dropout', str(md.hidden_dropout)]
    if md.num_attention_heads_kv is not None:
        argv += ["--num_attention_heads_kv", str(md.num_attention_heads_kv)]
    names = ("parallel_attn", "parallel_layernorm", "use_flash_attn", "glu_activation", "use_rms_norm",
             "tie_embed_logits", "lima_dropout", "use_bias", "position_embedding_type", "ffn_hidden_size",
             "params_dtype", "model_type", "sliding_window_size", "true_vocab_size", "make_vocab_size_divisible_by")
    seen = {"md": {name: getattr(md, name) for name in names}, "argv": argv}
    assert isinstance(md.params_dtype, torch.dtype)

    msg = queue_get("embeddings")
    seen["embeddings"] = {"word embeddings": msg.pop("word embeddings")}
    check_message(msg)
    if not md.tie_embed_logits:
        seen["lm_head"] = {"lm_head": queue_get("lm_head").pop("lm_head")}
    for layer in range(md.num_layers):
        msg = queue_get(f"transformer layer {layer}")
        keys = ["input layernorm weight", "dense weight", "mlp l1 weight", "qkv weight", "mlp l0 weight"]
        keys += ["mlp layernorm weight"] if md.parallel_layernorm else []
        keys += ["input layernorm bias"] if not md.use_rms_norm else []
        keys += ["mlp layernorm bias"] if not md.use_rms_norm and md.parallel_layernorm else []
        keys += ["post layernorm weight"] if not md.parallel_attn else []
        seen[f"transformer layer {layer}"] = {key: msg.pop(key) for key in keys}
        check_message(msg)
    msg = queue_get("final layernorm")
    seen["final layernorm"] = {key: msg.pop(key) for key in (["weight"] if md.use_rms_norm else ["weight", "bias"])}
    check_message(msg)''' + DONE

#: A saver of Megatron-LM's generation: names and order of today, and a look at everything in the metadata.
MEGATRON_SAVER = '''
import os
import torch

def add_arguments(parser):
    pass

def save_checkpoint(queue, args):
    md = queue.get()
    print(md)
    seen = {"position": md.position_embedding_type, "vars": sorted(vars(md))}
    seen["order"] = []
    while (msg := queue.get()) != "done":
        seen["order"].append(str(msg.pop("name")))
        seen[seen["order"][-1]] = {key: msg[key] for key in list(msg)}
    os.makedirs(args.save_dir)
    torch.save(seen, args.save_dir + "/seen.pt")
'''

#: A loader of Megatron-LM's generation, which sends the output layer last.
MEGATRON_LOADER = '''
import json, types
import torch
from safetensors.torch import load_file

def add_arguments(parser):
    pass

def load_checkpoint(queue, args):
    c = json.load(open(args.load_dir + "/config.json"))
    w = load_file(args.load_dir + "/model.safetensors")
    g, h = c["num_key_value_heads"], c["hidden_size"]
    queue.put(types.SimpleNamespace(
        model_type="GPT", num_layers=c["num_hidden_layers"], hidden_size=h, seq_length=4096, params_dtype=torch.float32,
        num_attention_heads=c["num_attention_heads"], max_position_embeddings=4096, output_layer=True,
        position_embedding_type="rope", linear_bias=False, qkv_bias=False, swiglu=True, norm_has_bias=False))
    queue.put({"name": "embeddings", "word embeddings": w["model.embed_tokens.weight"]})
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        queue.put({
            "name": f"transformer layer {i}", "input norm weight": w[p + "input_layernorm.weight"],
            "post norm weight": w[p + "post_attention_layernorm.weight"],
            "qkv weight": torch.cat([w[p + f"self_attn.{x}_proj.weight"].view(g, -1, h) for x in "qkv"], 1).view(-1, h),
            "dense weight": w[p + "self_attn.o_proj.weight"], "mlp l1 weight": w[p + "mlp.down_proj.weight"],
            "mlp l0 weight W": w[p + "mlp.gate_proj.weight"], "mlp l0 weight V": w[p + "mlp.up_proj.weight"]})
    queue.put({"name": "final norm", "weight": w["model.norm.weight"]})
    queue.put({"name": "output layer", "weight": w["lm_head.weight"]})
    queue.put("done")
'''


def _seen(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "seen.pt", weights_only=False)
    return found


def _sent(source: Path, model_type: str) -> dict[str, Any]:
    """What the stand-in of the loader sends, message by message."""
    space: dict[str, Any] = {}
    exec(LOADER, space)
    messages: list[Any] = []
    queue = type("Queue", (), {"put": lambda self, item: messages.append(item)})()
    args = type("Args", (), {"load_dir": str(source), "model_type": model_type, "true_vocab_size": None})()
    space["load_checkpoint"](queue, args)
    return {message.pop("name"): message for message in messages[1:-1]}


MODELS = {"llama2": "llama2", "falcon_7b": "falcon", "falcon_40b": "falcon"}


@pytest.mark.parametrize("name", list(MODELS))
def test_its_loader(hf: Hf, write: Write, tmp_path: Path, name: str) -> None:
    """What it sends is the model: in Hugging Face's form, logit by logit, and in Megatron-LLM's own."""
    source, loader = hf(name), write("checkpoint_loader", LOADER)
    flags = ("--loader", loader, "--model_type", MODELS[name], "--true_vocab_size", 131)
    back = convert(source, tmp_path / "hf", "hf", *flags)
    same(weights_of(back), weights_of(source))
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(logits(back, ids), logits(source, ids), rtol=0, atol=0)
    # Megatron-LLM's own files, from there and straight.
    convert(source, tmp_path / "there", "megatron_llm", *flags, "--target-tp", 1)
    convert(source, tmp_path / "straight", "megatron_llm")
    one, two = (torch.load(tmp_path / n / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
                for n in ("there", "straight"))  # fmt: skip
    for part in ("embedding", "transformer"):
        left, right = (x["model"]["language_model"][part] for x in (one, two))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", list(MODELS))
def test_its_saver(hf: Hf, write: Write, tmp_path: Path, name: str) -> None:
    """It is known by what it reads of the metadata, and gets its own order, names and tensors."""
    source, saver = hf(name), write("checkpoint_saver", SAVER)
    seen = _seen(convert(source, tmp_path / "out", saver, "--model_type", MODELS[name]))
    want = _sent(source, MODELS[name])
    assert list(seen)[2:] == list(want)
    for message, tensors in want.items():
        assert seen[message].keys() == tensors.keys()
        for key, tensor in tensors.items():
            found = seen[message][key]
            assert torch.equal(found, tensor[: len(found)]), (message, key)  # words come without padding
    told = seen["md"]
    assert (told["position_embedding_type"], told["model_type"]) == ("rotary", MODELS[name])
    assert told["glu_activation"] == ("swiglu" if name == "llama2" else None)
    assert (told["parallel_attn"], told["parallel_layernorm"]) == (name != "llama2", name == "falcon_40b")
    assert told["tie_embed_logits"] == (name != "llama2") and told["true_vocab_size"] == 131


def test_its_loader_and_its_saver(hf: Hf, write: Write, tmp_path: Path) -> None:
    """checkpoint_util.py with two plugins of others: messages arrive as they were sent."""
    names = ["--loader", write("checkpoint_loader", LOADER), "--saver", write("checkpoint_saver", SAVER)]
    result = here("checkpoint_util", *names, "--model_type", "llama2", "--load_dir", hf("llama2"), "--save_dir",
                  tmp_path / "out", "--no-progress")  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    seen, want = _seen(tmp_path / "out"), _sent(hf("llama2"), "llama2")
    assert list(seen)[2:] == list(want)
    assert all(torch.equal(seen[m][key], tensor) for m, tensors in want.items() for key, tensor in tensors.items())


def test_a_saver_of_megatron_lm_is_not_taken_for_one(hf: Hf, write: Write, tmp_path: Path) -> None:
    """It gets today's names, order and tensors from either kind of loader, whatever it prints of the metadata."""
    saver, loader = write("checkpoint_saver", MEGATRON_SAVER), write("checkpoint_loader", LOADER)
    ours = _seen(convert(hf("llama2"), tmp_path / "ours", saver))
    theirs = _seen(convert(hf("llama2"), tmp_path / "theirs", saver, "--loader", loader, "--true_vocab_size", 131,
                           "--model_type", "llama2"))  # fmt: skip
    assert ours["order"] == ["embeddings", *(f"transformer layer {i}" for i in range(4)), "final norm", "output layer"]
    assert theirs["order"] == ours["order"] and theirs["position"] == ours["position"] == "rope"
    assert not {"tie_embed_logits", "parallel_attn", "_own"} & set(ours["vars"])
    for name in ours["order"]:
        assert ours[name].keys() == theirs[name].keys()
        assert all(torch.equal(ours[name][key], theirs[name][key]) for key in ours[name])


def test_dialect_by_flag(hf: Hf, write: Write, tmp_path: Path) -> None:
    """A saver that reads nothing telling can be told apart by a flag, and a loader taken for one can be, too."""
    saver = write("checkpoint_saver", MEGATRON_SAVER)
    seen = _seen(convert(hf("llama2"), tmp_path / "out", saver, "--queue-dialect", "megatron_llm"))
    assert seen["order"][:2] == ["embeddings", "lm_head"] and seen["position"] == "rotary"
    assert seen["transformer layer 0"]["mlp l0 weight"].shape == (176, 48)
    result = here("--load-dir", hf("llama2"), "--save-dir", tmp_path / "no", "--saver", "hf", "--loader",
                  write("checkpoint_loader", LOADER), "--queue-dialect", "megatron", "--no-progress")  # fmt: skip
    assert result.returncode == 4 and not (tmp_path / "no").exists()


def test_head_that_comes_too_late(hf: Hf, write: Write, tmp_path: Path) -> None:
    """Real tensors of a loader of Megatron-LM cannot wait in memory for the last of them: said, with what to do."""
    result = here("--load-dir", hf("llama2"), "--save-dir", tmp_path / "out", "--loader",
                  write("checkpoint_loader", MEGATRON_LOADER), "--saver", write("checkpoint_saver", SAVER),
                  "--no-progress")  # fmt: skip
    assert result.returncode == 4 and "--saver megatron_llm" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_its_messages_cannot_carry(hf: Hf, write: Write, tmp_path: Path) -> None:
    saver = write("checkpoint_saver", SAVER)
    for name, word in (("llama31", "rope"), ("qwen2", "biases"), ("llama_both_bias", "gated MLP with biases")):
        result = here("--load-dir", hf(name), "--save-dir", tmp_path / name, "--saver", saver, "--no-progress")
        assert result.returncode == 4 and word in result.stderr, (name, result.stderr)


def test_assumptions_are_said(hf: Hf, write: Write, tmp_path: Path) -> None:
    """The metadata has neither epsilon nor theta: a model type has its usual ones, and it is said."""
    loader = write("checkpoint_loader", LOADER)
    result = here("--load-dir", hf("llama2"), "--save-dir", tmp_path / "out", "--saver", "hf", "--loader", loader,
                  "--model_type", "codellama", "--no-progress")  # fmt: skip
    assert result.returncode == 0 and "rope_theta 1000000.0" in result.stderr
    assert '"rope_theta": 1000000.0' in (tmp_path / "out" / "config.json").read_text()


def test_a_broken_message(hf: Hf, write: Write, tmp_path: Path) -> None:
    heads = "md.num_attention_heads_kv = "
    for old, new in (('"lm_head": pad', '"head": pad'), (heads + "g", heads + "3"),
                     ('queue_put("lm_head"', 'queue_put("lmhead"')):  # fmt: skip
        assert old in LOADER
        loader = write("checkpoint_loader", LOADER.replace(old, new))
        assert run(hf("llama2"), tmp_path / "out", "hf", "--loader", loader, "--model_type", "llama2") == 4
