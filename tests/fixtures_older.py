"""Tiny checkpoints of the older families: the meaning of the three tables is that in fixtures.py.

config.json as transformers 4.45 wrote it; names as in its modeling files. Sizes as in fixtures.py.

Shape legend: h hidden, f ffn, a query heads, g kv heads, d head dim, v vocabulary, s positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Config = dict[str, Any]
Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.45.2"}
_SIZES = _IDS | {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
NEOX = _SIZES | {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.5,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
FALCON = {key: value for key, value in _SIZES.items() if key != "intermediate_size"} | {
    "model_type": "falcon",
    "activation": "gelu",
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "tie_word_embeddings": True,
}
BERT = _SIZES | {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
GPT2 = _IDS | {
    "model_type": "gpt2",
    "vocab_size": 131,
    "n_embd": 48,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": True,
}
BIGCODE = {key: value for key, value in GPT2.items() if "inverse" not in key and "reorder" not in key} | {
    "model_type": "gpt_bigcode",
    "activation_function": "gelu_pytorch_tanh",
    "multi_query": True,
    "n_inner": 88,
}
STARCODER2 = _SIZES | {
    "model_type": "starcoder2",
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "norm_type": "layer_norm",
    "mlp_type": "default",
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "sliding_window": 8,
    "use_bias": True,
    "tie_word_embeddings": True,
}
OPT = {key: value for key, value in _SIZES.items() if key != "intermediate_size"} | {
    "model_type": "opt",
    "ffn_dim": 88,
    "activation_function": "relu",
    "max_position_embeddings": 64,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": 48,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
T5 = _IDS | {
    "model_type": "t5",
    "vocab_size": 131,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 88,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": True,
    "n_positions": 512,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}

FIXTURES: dict[str, Config] = {
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 88},
    "gpt_bigcode": BIGCODE,
    "gpt_bigcode_mha": BIGCODE | {"multi_query": False},
    "starcoder2": STARCODER2,
    "starcoder2_no_bias": STARCODER2 | {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False},
    "opt": OPT,
    "t5": T5,
    "t5_v11": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "pythia": NEOX,
    "neox_serial": NEOX | {"use_parallel_residual": False, "rotary_pct": 0.25, "rotary_emb_base": 25000},
    "neox_no_attention_bias": NEOX | {"attention_bias": False, "tie_word_embeddings": True},
    "falcon_7b": FALCON,
    "falcon_40b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 88},
    "falcon_11b": FALCON | {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 88,
        "rope_theta": 500042.0, "tie_word_embeddings": False,
    },
    "falcon_rw": FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    "bert": BERT,
    "bert_mlm": BERT | {"architectures": ["BertForMaskedLM"]},
    "bert_bare": BERT | {"architectures": ["BertModel"], "hidden_act": "gelu_new"},
    "megatron_bert": BERT | {"model_type": "megatron-bert"},
    "megatron_bert_tanh": BERT | {"model_type": "megatron-bert", "hidden_act": "gelu_new"},
    "megatron_bert_mlm": BERT | {"model_type": "megatron-bert", "architectures": ["MegatronBertForMaskedLM"]},
}  # fmt: skip
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "opt": "OPTForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "gpt_neox": "GPTNeoXForCausalLM",
    "falcon": "FalconForCausalLM",
    "bert": "BertForPreTraining",
    "megatron-bert": "MegatronBertForPreTraining",
}


def _affine(name: str, *shape: int, bias: bool = True) -> Named:
    """A linear layer or a norm: weight and bias."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _neox(c: Config) -> Named:
    h, f, v, bias = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["attention_bias"]
    yield "gpt_neox.embed_in.weight", (v, h)
    for i in range(c["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}."
        yield from _affine(layer + "input_layernorm", h)
        yield from _affine(layer + "post_attention_layernorm", h)
        yield from _affine(layer + "attention.query_key_value", 3 * h, h, bias=bias)
        yield from _affine(layer + "attention.dense", h, h, bias=bias)
        yield from _affine(layer + "mlp.dense_h_to_4h", f, h)
        yield from _affine(layer + "mlp.dense_4h_to_h", h, f)
    yield from _affine("gpt_neox.final_layer_norm", h)
    if not c["tie_word_embeddings"]:
        yield "embed_out.weight", (v, h)


def _falcon(c: Config) -> Named:
    h, v, a, new = c["hidden_size"], c["vocab_size"], c["num_attention_heads"], c["new_decoder_architecture"]
    f, d = c.get("ffn_hidden_size", 4 * h), h // a
    groups = c.get("num_kv_heads", a) if new or not c["multi_query"] else 1
    norms = ("input_layernorm",)
    if new and c.get("num_ln_in_parallel_attn", 2) == 2:
        norms = ("ln_attn", "ln_mlp")
    elif not c["parallel_attn"]:
        norms = ("input_layernorm", "post_attention_layernorm")
    yield "transformer.word_embeddings.weight", (v, h)
    for i in range(c["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        for norm in norms:
            yield from _affine(layer + norm, h)
        yield from _affine(layer + "self_attention.query_key_value", (a + 2 * groups) * d, h, bias=c["bias"])
        yield from _affine(layer + "self_attention.dense", h, h, bias=c["bias"])
        yield from _affine(layer + "mlp.dense_h_to_4h", f, h, bias=c["bias"])
        yield from _affine(layer + "mlp.dense_4h_to_h", h, f, bias=c["bias"])
    yield from _affine("transformer.ln_f", h)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


def _bert(c: Config) -> Named:
    h, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    post, kind = c["model_type"] == "bert", c["architectures"][0]
    prefix = "" if kind == "BertModel" else "bert."
    yield prefix + "embeddings.word_embeddings.weight", (v, h)
    yield prefix + "embeddings.position_embeddings.weight", (c["max_position_embeddings"], h)
    yield prefix + "embeddings.token_type_embeddings.weight", (c["type_vocab_size"], h)
    if post:
        yield from _affine(prefix + "embeddings.LayerNorm", h)
    for i in range(c["num_hidden_layers"]):
        layer = f"{prefix}encoder.layer.{i}."
        for name in ("query", "key", "value"):
            yield from _affine(f"{layer}attention.self.{name}", h, h)
        yield from _affine(layer + "attention.output.dense", h, h)
        yield from _affine(layer + "intermediate.dense", f, h)
        yield from _affine(layer + "output.dense", h, f)
        for name in ("attention.output.LayerNorm", "output.LayerNorm") if post else ("attention.ln", "ln"):
            yield from _affine(layer + name, h)
    if not post:
        yield from _affine(prefix + "encoder.ln", h)
    if not kind.endswith("MaskedLM"):
        yield from _affine(prefix + "pooler.dense", h, h)
    if kind.endswith(("MaskedLM", "PreTraining")):
        yield "cls.predictions.bias", (v,)
        yield from _affine("cls.predictions.transform.dense", h, h)
        yield from _affine("cls.predictions.transform.LayerNorm", h)
    if kind.endswith("PreTraining"):
        yield from _affine("cls.seq_relationship", 2, h)


def _gpt2(c: Config) -> Named:
    h, v = c["n_embd"], c["vocab_size"]
    f, d = c["n_inner"] or 4 * h, h // c["n_head"]
    turned, qkv = c["model_type"] == "gpt2", 3 * h
    if c.get("multi_query"):
        qkv = h + 2 * d
    yield "transformer.wte.weight", (v, h)
    yield "transformer.wpe.weight", (c["n_positions"], h)
    for i in range(c["n_layer"]):
        layer = f"transformer.h.{i}."
        yield from _affine(layer + "ln_1", h)
        yield from _affine(layer + "ln_2", h)
        linears = (("attn.c_attn", qkv, h), ("attn.c_proj", h, h), ("mlp.c_fc", f, h), ("mlp.c_proj", h, f))
        for name, rows, cols in linears:
            yield f"{layer}{name}.weight", (cols, rows) if turned else (rows, cols)
            yield f"{layer}{name}.bias", (rows,)
    yield from _affine("transformer.ln_f", h)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


def _starcoder2(c: Config) -> Named:
    h, f, v, a, bias = (c[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
                                           "use_bias"))  # fmt: skip
    g, d = c["num_key_value_heads"], h // a
    yield "model.embed_tokens.weight", (v, h)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        linears = (("self_attn.q_proj", a * d, h), ("self_attn.k_proj", g * d, h), ("self_attn.v_proj", g * d, h),
                   ("self_attn.o_proj", h, a * d), ("mlp.c_fc", f, h), ("mlp.c_proj", h, f))  # fmt: skip
        for name, rows, cols in linears:
            yield from _affine(layer + name, rows, cols, bias=bias)
        yield from _affine(layer + "input_layernorm", h)
        yield from _affine(layer + "post_attention_layernorm", h)
    yield from _affine("model.norm", h)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


def _opt(c: Config) -> Named:
    h, f, v = c["hidden_size"], c["ffn_dim"], c["vocab_size"]
    yield "model.decoder.embed_tokens.weight", (v, h)
    yield "model.decoder.embed_positions.weight", (c["max_position_embeddings"] + 2, h)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.decoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{layer}self_attn.{name}", h, h)
        yield from _affine(layer + "fc1", f, h)
        yield from _affine(layer + "fc2", h, f)
        yield from _affine(layer + "self_attn_layer_norm", h)
        yield from _affine(layer + "final_layer_norm", h)
    yield from _affine("model.decoder.final_layer_norm", h)


def _t5(c: Config) -> Named:
    h, f, v, a, inner = c["d_model"], c["d_ff"], c["vocab_size"], c["num_heads"], c["num_heads"] * c["d_kv"]
    first = ("wi_0", "wi_1") if c["feed_forward_proj"].startswith("gated-") else ("wi",)
    yield "shared.weight", (v, h)
    for side, layers in (("encoder", c["num_layers"]), ("decoder", c["num_decoder_layers"])):
        attentions = ("SelfAttention",) if side == "encoder" else ("SelfAttention", "EncDecAttention")
        for i in range(layers):
            layer = f"{side}.block.{i}.layer."
            for number, attention in enumerate(attentions):
                for name in "qkv":
                    yield f"{layer}{number}.{attention}.{name}.weight", (inner, h)
                yield f"{layer}{number}.{attention}.o.weight", (h, inner)
                yield f"{layer}{number}.layer_norm.weight", (h,)
            for name in first:
                yield f"{layer}{len(attentions)}.DenseReluDense.{name}.weight", (f, h)
            yield f"{layer}{len(attentions)}.DenseReluDense.wo.weight", (h, f)
            yield f"{layer}{len(attentions)}.layer_norm.weight", (h,)
        buckets = (c["relative_attention_num_buckets"], a)
        yield f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", buckets
        yield f"{side}.final_layer_norm.weight", (h,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


SHAPES: dict[str, Callable[[Config], Named]] = {
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "starcoder2": _starcoder2,
    "opt": _opt,
    "t5": _t5,
    "gpt_neox": _neox,
    "falcon": _falcon,
    "bert": _bert,
    "megatron-bert": _bert,
}
