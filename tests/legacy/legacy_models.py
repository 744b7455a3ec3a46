"""Legacy Megatron-LM checkpoints made, put together and computed by hand: nothing of ckptconv is imported.

Names, cuts and arithmetic were written from Megatron-LM core_v0.12.0 `megatron/legacy/model` (language_model.py,
transformer.py, bert_model.py) and `megatron/training/checkpointing.py`; tests/oracle/test_legacy_megatron.py has the
real classes do the same.

Shape legend: b batch, s tokens, h hidden, v vocabulary (padded), a heads, g query groups, d head dim, f ffn.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Weights = dict[str, torch.Tensor]
gelu = torch.nn.functional.gelu
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": gelu,
    "tanh": lambda x: gelu(x, approximate="tanh"),
    "squared_relu": lambda x: torch.relu(x) ** 2,
    "swiglu": lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


@dataclass(frozen=True)
class Model:
    """A model; `said` is what its args say beside the sizes."""

    groups: int = 4
    activation: str = "tanh"
    bias: bool = True
    rms: bool = False
    rotary: float = 0.0
    tied: bool = True
    bert: bool = False
    types: int = 0
    pooled: bool = False
    offset: bool = False
    said: dict[str, Any] = field(default_factory=dict)
    layers: int = 4
    h: int = 48
    a: int = 4
    f: int = 88
    v: int = 136  # 131 tokens
    s: int = 16
    eps: float = 1e-5

    @property
    def d(self) -> int:
        return self.h // self.a


GPT = Model()
LLAMA = Model(2, "swiglu", False, True, 1.0, False, said={
    "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope", "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True, "group_query_attention": True, "num_query_groups": 2,
})  # fmt: skip
NEMOTRON = Model(4, "squared_relu", False, False, 0.5, False, offset=True, said={
    "squared_relu": True, "position_embedding_type": "rope", "rotary_percent": 0.5, "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True, "apply_layernorm_1p": True,
})  # fmt: skip
BERT = Model(activation="gelu", bert=True, types=2, pooled=True, said={"bias_gelu_fusion": False})


def shapes(m: Model) -> dict[str, tuple[int, ...]]:
    """Names, as newest code spells them, joined by dots, and full shapes."""
    qkv, fc1 = (m.a + 2 * m.groups) * m.d, m.f * (2 if m.activation == "swiglu" else 1)
    linears = {
        "self_attention.query_key_value": (qkv, m.h), "self_attention.dense": (m.h, m.a * m.d),
        "mlp.dense_h_to_4h": (fc1, m.h), "mlp.dense_4h_to_h": (m.h, m.f),
    }  # fmt: skip
    norm: dict[str, tuple[int, ...]] = {"weight": (m.h,)} | ({} if m.rms else {"bias": (m.h,)})
    found: dict[str, tuple[int, ...]] = {"language_model.embedding.word_embeddings.weight": (m.v, m.h)}
    if not m.rotary:
        found["language_model.embedding.position_embeddings.weight"] = (m.s, m.h)
    if m.types:
        found["language_model.embedding.tokentype_embeddings.weight"] = (m.types, m.h)
    for i in range(m.layers):
        at = f"language_model.encoder.layers.{i}."
        for name in ("input_norm", "post_attention_norm"):
            found |= {f"{at}{name}.{kind}": shape for kind, shape in norm.items()}
        for name, linear in linears.items():
            found[f"{at}{name}.weight"] = linear
            if m.bias:
                found[f"{at}{name}.bias"] = linear[:1]
    found |= {f"language_model.encoder.final_norm.{kind}": shape for kind, shape in norm.items()}
    if not m.tied:
        found["language_model.output_layer.weight"] = (m.v, m.h)
    if m.bert:
        found |= {"lm_head.dense.weight": (m.h, m.h), "lm_head.dense.bias": (m.h,), "lm_head.bias": (m.v,)}
        found |= {f"lm_head.norm.{kind}": shape for kind, shape in norm.items()}
    if m.pooled:
        found |= {"language_model.pooler.dense.weight": (m.h, m.h), "language_model.pooler.dense.bias": (m.h,),
                  "binary_head.weight": (2, m.h), "binary_head.bias": (2,)}  # fmt: skip
    return found


def weights(m: Model) -> Weights:
    found = {}
    for name, shape in shapes(m).items():
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        one = "norm.weight" in name and not m.offset
        found[name] = 0.2 * noise + 1 if one else noise / math.sqrt(shape[-1]) if len(shape) > 1 else 0.2 * noise
    return found


# The arithmetic


def _norm(x: torch.Tensor, w: Weights, at: str, m: Model) -> torch.Tensor:
    if m.rms:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.eps) * w[at + ".weight"]
    return torch.nn.functional.layer_norm(x, (m.h,), w[at + ".weight"] + m.offset, w[at + ".bias"], m.eps)


def _linear(x: torch.Tensor, w: Weights, at: str) -> torch.Tensor:
    return torch.nn.functional.linear(x, w[at + ".weight"], w.get(at + ".bias"))


def _rotated(x: torch.Tensor, m: Model) -> torch.Tensor:
    """Rope with base 10000 on the first numbers of heads [b, s, n, d], halves against each other."""
    width = int(m.d * m.rotary)
    angle = torch.arange(x.shape[1])[:, None] / 10000.0 ** (torch.arange(0, width, 2) / width)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[None, :, None] for f in (torch.cos, torch.sin))
    one, two = x[..., :width].chunk(2, -1)
    return torch.cat([x[..., :width] * cos + torch.cat([-two, one], -1) * sin, x[..., width:]], -1)


def _attention(x: torch.Tensor, w: Weights, at: str, m: Model) -> torch.Tensor:
    b, s, _ = x.shape
    grouped = _linear(x, w, at + "query_key_value").view(b, s, m.groups, m.a // m.groups + 2, m.d)
    q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    if m.rotary:
        q, k = _rotated(q, m), _rotated(k, m)
    k, v = (t.repeat_interleave(m.a // m.groups, dim=2) for t in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(m.d)
    if not m.bert:
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -10000.0)
    out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)
    return _linear(out.flatten(2), w, at + "dense")


def forward(w: Weights, m: Model, ids: torch.Tensor, types: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Logits [b, s, v], and of BERT with a binary head [b, 2]."""
    at = "language_model.embedding."
    words = w[at + "word_embeddings.weight"]
    x = words[ids]
    if not m.rotary:
        x = x + w[at + "position_embeddings.weight"][: ids.shape[1]]
    if types is not None:
        x = x + w[at + "tokentype_embeddings.weight"][types]
    for i in range(m.layers):
        layer = f"language_model.encoder.layers.{i}."
        x = x + _attention(_norm(x, w, layer + "input_norm", m), w, layer + "self_attention.", m)
        inner = _linear(_norm(x, w, layer + "post_attention_norm", m), w, layer + "mlp.dense_h_to_4h")
        x = x + _linear(ACTIVATIONS[m.activation](inner), w, layer + "mlp.dense_4h_to_h")
    x = _norm(x, w, "language_model.encoder.final_norm", m)
    found = {}
    if m.pooled:
        pooled = torch.tanh(_linear(x[:, 0], w, "language_model.pooler.dense"))
        found["binary"] = _linear(pooled, w, "binary_head")
    if m.bert:
        tanh = m.said.get("openai_gelu")
        head = gelu(_linear(x, w, "lm_head.dense"), approximate="tanh" if tanh else "none")
        return found | {"logits": _norm(head, w, "lm_head.norm", m) @ words.T + w["lm_head.bias"]}
    return found | {"logits": x @ (words if m.tied else w["language_model.output_layer.weight"]).T}


# Files


ROWS = ("word_embeddings.weight", "output_layer.weight", "lm_head.bias", "word_embeddings_for_head.weight")
COLUMNS = ("self_attention.dense.weight", "dense_4h_to_h.weight")


def _part(name: str, full: torch.Tensor, t: int, tp: int, m: Model) -> torch.Tensor:
    """What tensor rank t holds."""
    if name.endswith("dense_h_to_4h.weight") or name.endswith("dense_h_to_4h.bias"):
        halves = full.chunk(2) if m.activation == "swiglu" else (full,)
        return torch.cat([half.chunk(tp)[t] for half in halves])
    if name.endswith(COLUMNS):
        return full.chunk(tp, 1)[t].contiguous()
    return full.chunk(tp)[t].clone() if name.endswith(ROWS) or "query_key_value" in name else full


def _ordered(name: str, value: torch.Tensor, version: int, d: int) -> torch.Tensor:
    """qkv of one rank, [n, 3, d], as that version had it: [3, n, d] or [n, d, 3]."""
    if "query_key_value" not in name or version > 1:
        return value
    rows = value.view(-1, 3, d, *value.shape[1:])
    return (rows.transpose(0, 1) if version == 0 else rows.transpose(1, 2)).reshape(value.shape)


def _spelled(name: str, older: bool) -> str:
    if not older:
        return name
    name = name.replace("language_model.encoder.", "language_model.transformer.")
    name = name.replace(".self_attention.", ".attention.").replace("lm_head.norm", "lm_head.layernorm")
    return name.replace("_norm.", "_layernorm.")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The dicts of state_dict_for_save_checkpoint: modules above the encoder and the heads are dicts of their own."""
    model: dict[str, Any] = {}
    for name, value in flat.items():
        keys = name.split(".")
        depth = {"lm_head": 1, "binary_head": 1, "word_embeddings_for_head": 1}.get(keys[0], 2)
        depth += keys[1] == "embedding"
        inner = model
        for key in keys[:depth]:
            inner = inner.setdefault(key, {})
        inner[".".join(keys[depth:])] = value
    return model


def stages(m: Model, pp: int, vpp: int, counts: tuple[int, ...] = ()) -> list[list[range]]:
    """Layers of each virtual stage of each stage: stages[p][c]."""
    counts = counts or (m.layers // pp // vpp,) * (pp * vpp)
    firsts = [sum(counts[:n]) for n in range(pp * vpp)]
    return [[range(firsts[c * pp + p], firsts[c * pp + p] + counts[c * pp + p]) for c in range(vpp)] for p in range(pp)]


def on_stage(m: Model, w: Weights, layers: range, first: bool, last: bool) -> Weights:
    """What a stage holds, its layers counted from 0."""
    found: Weights = {}
    for name, value in w.items():
        if ".layers." in name:
            before, _, behind = name.partition(".layers.")
            number, _, rest = behind.partition(".")
            if int(number) in layers:
                found[f"{before}.layers.{int(number) - layers.start}.{rest}"] = value
        elif first if ".embedding." in name else last:
            found[name] = value
    if last and not first and m.tied:
        found["word_embeddings_for_head.weight"] = w["language_model.embedding.word_embeddings.weight"]
    return found


def arguments(m: Model, tp: int = 1, pp: int = 1) -> dict[str, Any]:
    return {
        "num_layers": m.layers, "encoder_num_layers": m.layers, "hidden_size": m.h, "num_attention_heads": m.a,
        "ffn_hidden_size": m.f, "kv_channels": m.d, "seq_length": m.s, "max_position_embeddings": m.s,
        "padded_vocab_size": m.v, "make_vocab_size_divisible_by": 8, "layernorm_epsilon": m.eps,
        "params_dtype": torch.float32, "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
        "use_legacy_models": True, "openai_gelu": False, "onnx_safe": None, "bert_binary_head": m.pooled, **m.said,
    }  # fmt: skip


def write(
    top: Path, m: Model, w: Weights, tp: int = 1, pp: int = 1, vpp: int = 1, *, version: int = 3, older: bool = False,
    counts: tuple[int, ...] = (), said: dict[str, Any] | None = None, iteration: str = "7",
    change: Callable[[int, int, dict[str, Any]], None] | None = None, file: str = "model_optim_rng.pt",
) -> Path:  # fmt: skip
    """A checkpoint. said: all args; change(tp rank, stage, root) may damage the file."""
    folder = top / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")
    args = arguments(m, tp, pp) if said is None else said
    if version < 3 and said is None:
        args["model_parallel_size"] = args.pop("tensor_model_parallel_size")
        del args["pipeline_model_parallel_size"]
    for p, chunks in enumerate(stages(m, pp, vpp, counts)):
        for t in range(tp):
            root: dict[str, Any] = {"iteration": 7, **({"checkpoint_version": float(version)} if version else {})}
            if args:
                root["args"] = argparse.Namespace(**args)
            for c, layers in enumerate(chunks):
                held = on_stage(m, w, layers, p == c == 0, (p, c) == (pp - 1, vpp - 1))
                parts = {
                    _spelled(name, older): _ordered(name, _part(name, value, t, tp, m), version, m.d)
                    for name, value in held.items()
                }
                root["model" if vpp == 1 else f"model{c}"] = nested(parts)
            if change:
                change(t, p, root)
            place = folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            place.mkdir(parents=True)
            torch.save(root, place / file)
    (top / "latest_checkpointed_iteration.txt").write_text(iteration)
    return top


def _shape(model: Any) -> Any:
    return {key: _shape(value) for key, value in model.items()} if isinstance(model, dict) else None


def flat(model: dict[str, Any], prefix: str = "") -> Weights:
    found: Weights = {}
    for key, value in model.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def read(top: Path, m: Model, tp: int, pp: int, vpp: int) -> Weights:
    """The full tensors of a checkpoint of even stages, joined by hand; the copy of the embedding is compared."""
    (folder,) = top.glob("iter_*")
    found: Weights = {}
    for p in range(pp):
        roots = [
            torch.load(folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")) / "model_optim_rng.pt",
                       weights_only=False)
            for t in range(tp)
        ]  # fmt: skip
        for c in range(vpp):
            models = [root["model" if vpp == 1 else f"model{c}"] for root in roots]
            assert _shape(models[0]) == _shape(nested(flat(models[0])))
            for name in flat(models[0]):
                parts = [flat(model)[name] for model in models]
                one = name
                if ".layers." in name:
                    number = int(name.split(".layers.")[1].split(".")[0])
                    layer = stages(m, pp, vpp)[p][c][number]
                    one = name.replace(f".layers.{number}.", f".layers.{layer}.")
                assert one not in found, one
                found[one] = _joined(name, parts, m)
    copy = found.pop("word_embeddings_for_head.weight", None)
    if copy is not None:
        assert torch.equal(copy, found["language_model.embedding.word_embeddings.weight"])
    assert (copy is not None) == (m.tied and pp > 1)
    return found


def _joined(name: str, parts: list[torch.Tensor], m: Model) -> torch.Tensor:
    if "dense_h_to_4h" in name:
        halves = [part.chunk(2) if m.activation == "swiglu" else (part,) for part in parts]
        return torch.cat([part[n] for n in range(len(halves[0])) for part in halves])
    if name.endswith(COLUMNS):
        return torch.cat(parts, 1)
    if name.endswith(ROWS) or "query_key_value" in name:
        return torch.cat(parts)
    assert all(torch.equal(part, parts[0]) for part in parts), name
    return parts[0]
