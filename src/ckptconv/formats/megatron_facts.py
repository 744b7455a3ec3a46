"""A model in Megatron's words: ModelSpec -> *facts* (one value per row of `megatron_args.ROWS`), and back.

A fact is what Megatron has an argument for: `untied`, not `tied`; `window_skip`, not `window_layers`. What an argument
means was read where Megatron uses it, at core_v0.12.0 to 0.19.0: `core_transformer_config_from_args` (activations: the
approximate GELU is what the *fused* kernel computes, so a fusion flag decides, and only with biases),
`core/transformer/transformer_config.py`, `mlp.py`, `attention.py` (no_rope_freq), `utils.py` (windows), `moe_utils.py`
(routing), `yarn_rotary_pos_embedding.py`. No attribute names and no flags here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckptconv.errors import SourceError
from ckptconv.spec import MLA, ModelSpec, MoE, Rope

Facts = dict[str, Any]

#: Facts that are fields of ModelSpec under the same name.
COPIED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "seq_length", "max_position_embeddings", "sliding_window", "norm", "norm_epsilon", "norm_offset", "softmax_scale",
    "activation_clamp",
)  # fmt: skip

#: (activation, gated) of a spec -> the one fact that switches it on.
ACTIVATIONS = {("silu", True): "swiglu", ("squared_relu", False): "squared_relu", ("quick_gelu", True): "quick_geglu"}

#: Rope kinds that `position_embedding_type=rope` can be: fact -> key of Rope.scaling, or True.
ROPES: dict[str, dict[str, str | bool]] = {
    "default": {},
    "dynamic": {},
    "linear":  {"linear_factor": "factor"},
    "llama3":  {"llama3": True, "llama3_factor": "factor"},
}  # fmt: skip
#: RotaryEmbedding._apply_scaling has these as constants; only original / low and original / high matter in it.
LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

#: Transformers' and Megatron's yarn where nothing is said.
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def linear_bias(spec: ModelSpec) -> bool:
    """Whether the Megatron model has biases on qkv, proj, fc1, fc2 and the router: all or none (`add_bias_linear`)."""
    return spec.dense_bias or spec.mlp_bias or (spec.moe is not None and spec.moe.router_bias)


def qkv_bias(spec: ModelSpec) -> bool:
    """Whether the Megatron model has a bias on qkv. True with `linear_bias`, as validate_args leaves the Namespace."""
    return spec.qkv_bias or linear_bias(spec)


def position(spec: ModelSpec) -> str:
    """Megatron's position_embedding_type. Multi-latent attention has its own rope_type beside it."""
    if spec.rope is None:
        return "learned_absolute" if spec.learned_positions else "none"
    return "yarn" if spec.rope.kind == "yarn" and spec.mla is None else "rope"


def fused_gelu(spec: ModelSpec) -> bool:
    """Whether this is the approximate GELU that Megatron's fused kernel is: not gated, with biases, not in experts."""
    return (spec.activation, spec.gated) == ("gelu_tanh", False) and linear_bias(spec) and spec.moe is None


def from_spec(spec: ModelSpec) -> Facts:
    """Megatron's view of a spec. None: nothing to say. What Megatron cannot express is left out."""
    facts: Facts = {name: getattr(spec, name) for name in COPIED}
    facts |= {
        # With group_query_attention false every release ignores num_query_groups and uses the number of heads.
        "grouped": spec.num_query_groups != spec.num_attention_heads,
        "linear_bias": linear_bias(spec),
        "qkv_bias": qkv_bias(spec),
        "untied": not spec.tied,
        "position": position(spec),
        "rotary": position(spec) == "rope",
        "llama3": False,
        "window_skip": spec.window_layers if spec.sliding_window is not None else None,
        "no_rope": None if spec.rope_layers is None else tuple(1 - has for has in spec.rope_layers),
        "softmax_type": "learnable" if spec.sinks else None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # False would leave out the norms of multi-latent attention, too.
        "qk_norm": spec.qk_norm == "head" or spec.mla is not None,
        "mtp_layers": spec.mtp_layers or None,
        "num_experts": None,
        "mla": spec.mla is not None,
    }
    facts |= _activation(spec)
    if spec.moe:
        facts |= _moe(spec.moe)
    if spec.rope:
        facts |= _rope(spec, spec.rope)
    if spec.mla:
        facts |= _mla(spec, spec.mla)
    return facts


def _activation(spec: ModelSpec) -> Facts:
    switch = ACTIVATIONS.get((spec.activation, spec.gated))
    facts: Facts = {name: name == switch for name in ACTIVATIONS.values()}
    facts["gate_offset"] = spec.gate_offset or None
    if switch == "swiglu":
        # The fused kernel knows neither of the two.
        facts["swiglu_fusion"] = False if spec.activation_clamp is not None or spec.gate_offset else None
    elif switch == "quick_geglu":
        # Fused only where every MLP is an expert: a dense one raises.
        facts["gelu_fusion"] = None if spec.moe and all(spec.moe.layers) else False
    else:
        facts["gelu_fusion"] = fused_gelu(spec)
    if not switch and not fused_gelu(spec) and (spec.activation, spec.gated) != ("gelu", False):
        facts |= {"activation_func": spec.activation, "gated_linear_unit": spec.gated}
    return facts


def _moe(moe: MoE) -> Facts:
    return {
        "num_experts": moe.num_experts,
        "moe_layers": moe.layers,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_topk": moe.topk,
        "moe_pre_softmax": moe.score == "softmax" and not moe.normalize,
        "moe_score": moe.score,
        "moe_score_bias": moe.score_bias,
        "moe_scaling": None if moe.scaling_factor == 1 else moe.scaling_factor,
        "moe_groups": moe.num_groups,
        "moe_topk_groups": moe.topk_groups,
        "moe_router_dtype": "fp32" if moe.router_fp32 else None,
        "moe_shared": moe.shared_ffn_hidden_size,
        "moe_shared_gate": moe.shared_gate,
    }


def _rope(spec: ModelSpec, rope: Rope) -> Facts:
    facts: Facts = {
        "rope_theta": rope.theta,
        "rope_percent": rope.percent,
        # Multi-latent attention always takes pairs, and its config refuses the word.
        "rope_interleaved": rope.interleaved and spec.mla is None,
    }
    for fact, key in ROPES.get(rope.kind, {}).items():
        facts[fact] = rope.scaling.get(key) if isinstance(key, str) else key
    if rope.kind == "yarn":
        prefix = "yarn" if spec.mla is None else "mla"
        for name in ("beta_fast", "beta_slow"):
            facts[f"{prefix}_{name}"] = rope.scaling.get(name, BETAS[name])
        original = rope.scaling.get("original_max_position_embeddings")
        facts[f"{prefix}_original"] = original or spec.max_position_embeddings
        facts["yarn_factor"] = rope.scaling.get("factor")
        facts["yarn_mscale"], facts["yarn_mscale_all_dim"] = mscales(rope.scaling, spec.mla is not None)
        if spec.mla is None:
            facts["yarn_round"] = rope.scaling.get("truncate", True)
    return facts


def _mla(spec: ModelSpec, mla: MLA) -> Facts:
    return {
        "mla_q_lora": mla.q_lora_rank,
        "mla_kv_lora": mla.kv_lora_rank,
        "mla_qk": mla.qk_head_dim,
        "mla_rope": mla.qk_rope_head_dim,
        "mla_v": mla.v_head_dim,
        # None would mean yarn.
        "mla_rope_type": "yarn" if spec.rope and spec.rope.kind == "yarn" else "rope",
        # Releases differ in which rope of multi-latent attention may be fused; plain rope never.
        "rope_fusion": False,
    }


def _log(factor: float | None) -> float:
    """A tenth of the logarithm that yarn's factors are made of; 0 where yarn has none."""
    return 0.1 * math.log(factor) if factor and factor > 1 else 0.0


def mscales(scaling: Mapping[str, Any], latent: bool) -> tuple[float, float]:
    """Megatron's mscale m and mscale_all_dim n for transformers' yarn: cos and sin get (m L + 1) / (n L + 1).

    Transformers reads mscale and mscale_all_dim only together, lets an attention_factor win, and else has L + 1; with
    L = 0.1 ln(factor). latent: multi-latent attention also scales its softmax by (n L + 1) squared, so n is kept.
    """
    one, every, given = (scaling.get(name) for name in ("mscale", "mscale_all_dim", "attention_factor"))
    if given is None and one and every:
        return one, every
    log, every = _log(scaling.get("factor")), float(every or 0) if latent else 0.0
    if not log or (given is None and not every):
        return 1.0, every
    wanted = 1 + log if given is None else given
    return (wanted * (every * log + 1) - 1) / log, every


def _yarn(facts: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Transformers' rope_scaling; the inverse of what `_rope` says."""
    scaling = {name: facts[f"{prefix}_{name}"] for name in ("beta_fast", "beta_slow")}
    scaling = {name: BETAS[name] if value is None else value for name, value in scaling.items()}
    original = facts[f"{prefix}_original"]
    scaling |= {"factor": facts["yarn_factor"], "original_max_position_embeddings": original or 4096}
    one, every = facts["yarn_mscale"], facts["yarn_mscale_all_dim"]
    if one and every:
        scaling |= {"mscale": one, "mscale_all_dim": every}
    elif (one, every) != (1, 0):
        log = _log(scaling["factor"])
        # 15 digits: what was divided by a logarithm comes back as it was written in config.json.
        scaling["attention_factor"] = float(f"{(one * log + 1) / (every * log + 1):.15g}")
        scaling |= {"mscale_all_dim": every} if every else {}
    if prefix == "yarn" and facts["yarn_round"] is False:
        scaling["truncate"] = False
    return scaling


def read_rope(facts: Mapping[str, Any]) -> Rope | None:
    """The rotary embedding that facts describe."""
    kind, scaling = "default", {}
    if facts["mla"]:
        # A factor of 1 is what releases without --rope-type have for plain rope.
        if facts["mla_rope_type"] in (None, "yarn") and facts["yarn_factor"] != 1:
            kind, scaling = "yarn", _yarn(facts, "mla")
    elif facts["position"] == "yarn" and not facts["rotary"]:
        kind, scaling = "yarn", _yarn(facts, "yarn")
    elif facts["position"] != "rope" and not facts["rotary"]:
        return None
    elif facts["llama3"]:
        kind, scaling = "llama3", {"factor": facts["llama3_factor"], **LLAMA3}
    elif facts["linear_factor"] not in (None, 1):
        kind, scaling = "linear", {"factor": facts["linear_factor"]}
    return Rope(float(facts["rope_theta"]), kind, scaling, facts["rope_percent"],
                facts["mla"] or facts["rope_interleaved"])  # fmt: skip


def read_moe(facts: Mapping[str, Any], where: str) -> MoE | None:
    """The experts that facts describe. Raises SourceError for a frequency below 1."""
    if not facts["num_experts"]:
        return None
    layers = facts["moe_layers"]
    if isinstance(layers, int):
        if layers < 1:
            raise SourceError(f"{where}: args.moe_layer_freq is {layers}, expected at least 1.")
        layers = tuple(int(layer % layers == 0) for layer in range(facts["num_layers"]))
    topk, groups = facts["moe_topk"], facts["moe_topk_groups"] or None
    sigmoid = facts["moe_score"] == "sigmoid"
    return MoE(
        num_experts=facts["num_experts"],
        topk=topk,
        ffn_hidden_size=facts["moe_ffn_hidden_size"] or facts["ffn_hidden_size"],
        layers=layers,
        score=facts["moe_score"],
        # One sigmoid score is never divided by itself.
        normalize=topk > 1 if sigmoid else not facts["moe_pre_softmax"],
        scaling_factor=facts["moe_scaling"] or 1.0,
        score_bias=facts["moe_score_bias"],
        num_groups=facts["moe_groups"] if groups else None,
        topk_groups=groups,
        group_score="top2" if groups and topk // groups == 2 else "max",
        router_bias=facts["linear_bias"],
        router_fp32=facts["moe_router_dtype"] is not None,
        shared_ffn_hidden_size=facts["moe_shared"],
        shared_gate=facts["moe_shared_gate"],
    )


def _every(facts: Mapping[str, Any], fact: str, attribute: str, where: str) -> tuple[int, ...] | None:
    """1 for the layers that are not the last of n, or as the list says; None where nothing is said."""
    said = facts[fact]
    if not isinstance(said, int):
        return None if said is None else tuple(said)
    if said < 1:
        raise SourceError(f"{where}: args.{attribute} is {said}, expected at least 1.")
    return tuple(int((layer + 1) % said != 0) for layer in range(facts["num_layers"]))


def read_windows(facts: Mapping[str, Any], where: str) -> Facts:
    """Window size and layers. n stands for a window on all but every nth layer. Raises SourceError."""
    layers = _every(facts, "window_skip", "window_attn_skip_freq", where) if facts["sliding_window"] else None
    if layers is not None and not any(layers):
        return {"sliding_window": None, "window_layers": None}
    return {"sliding_window": facts["sliding_window"], "window_layers": layers if layers and not all(layers) else None}


def read_rope_layers(facts: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """Layers with rope: a list has 1 for those without, n stands for none on every nth. Raises SourceError."""
    if facts["mla"] or not facts["no_rope"]:
        return None
    layers = _every(facts, "no_rope", "no_rope_freq", where)
    assert layers is not None
    has = layers if isinstance(facts["no_rope"], int) else tuple(1 - skipped for skipped in layers)
    return None if all(has) else has


def read_activation(facts: Mapping[str, Any]) -> tuple[str, bool]:
    """(activation, gated)."""
    pair = next((pair for pair, fact in ACTIVATIONS.items() if facts[fact]), None)
    if pair is not None:
        return pair
    name, gated = facts["activation_func"] or "gelu", bool(facts["gated_linear_unit"])
    return "gelu_tanh" if name == "gelu" and facts.get("gelu_fusion") else name, gated
