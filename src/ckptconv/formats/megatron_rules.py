"""What Megatron cannot express, what its stock trainer cannot be told, and which Namespaces are not read.

Each rule is a condition and a sentence that names the property. `REFUSALS` and `CUSTOM` stop a conversion, `LIMITS`
tell the user what to do beside the checkpoint and the flags, `UNSUPPORTED` and `unsupported` stop reading.

Facts read in Megatron-LM core_v0.12.0 to 0.19.0: `core/transformer` (transformer_config.py, moe, mlp.py,
multi_latent_attention.py), `core/models/gpt/gpt_model.py`, `core/models/bert/bert_model.py`, `gpt_builders.py`,
`pretrain_bert.py`, `megatron/training/arguments.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ckptconv.errors import TargetError
from ckptconv.formats.megatron_facts import ACTIVATIONS, BETAS, LLAMA3, ROPES, fused_gelu, linear_bias
from ckptconv.spec import ModelSpec

Rules = tuple[tuple[Callable[[ModelSpec], bool], str], ...]

MODEL_TYPES = ("GPT", "BERT")


def _factor(spec: ModelSpec) -> float:
    return float(spec.rope.scaling.get("factor") or 0) if spec.rope else 0.0


def _rope_is(*kinds: str) -> Callable[[ModelSpec], bool]:
    return lambda spec: spec.rope is not None and spec.rope.kind in kinds


def _yarn(latent: bool) -> Callable[[ModelSpec], bool]:
    return lambda spec: _rope_is("yarn")(spec) and (spec.mla is not None) == latent


def _llama3_fits(spec: ModelSpec) -> bool:
    scaling = spec.rope.scaling if spec.rope else {}
    original, low, high = (scaling.get(name) or 0 for name in LLAMA3)
    return bool(low and high) and (original / low, original / high) == (8192, 2048)


def _yarn_moved(spec: ModelSpec) -> bool:
    """Latent attention's yarn with other numbers than those MLATransformerConfig has without being told."""
    scaling = spec.rope.scaling if spec.rope else {}
    original = scaling.get("original_max_position_embeddings") or spec.max_position_embeddings
    return original != 4096 or any(scaling.get(name, BETAS[name]) != BETAS[name] for name in BETAS)


def _attention_factor(spec: ModelSpec) -> bool:
    """Yarn that multiplies by something although its factor has no logarithm."""
    given = spec.rope.scaling.get("attention_factor") if spec.rope else None
    return _rope_is("yarn")(spec) and given not in (None, 1) and _factor(spec) <= 1


def _softmax(spec: ModelSpec) -> bool:
    return spec.moe is not None and spec.moe.score == "softmax"


def _sigmoid(spec: ModelSpec) -> bool:
    return spec.moe is not None and spec.moe.score == "sigmoid"


def _groups(spec: ModelSpec) -> bool:
    return spec.moe is not None and bool(spec.moe.num_groups) and bool(spec.moe.topk_groups)


def _groups_fit(spec: ModelSpec) -> bool:
    moe = spec.moe
    if moe is None or not moe.num_groups or not moe.topk_groups:
        return True
    best = {"max": 1, "top2": 2}[moe.group_score]
    return not moe.num_experts % moe.num_groups and moe.topk // moe.topk_groups == best


def _expert_biases(spec: ModelSpec) -> bool:
    return spec.moe is not None and linear_bias(spec)


def _some_biases(spec: ModelSpec) -> bool:
    return linear_bias(spec) and not (spec.qkv_bias and spec.dense_bias and spec.mlp_bias)


def _unlike_experts(spec: ModelSpec) -> bool:
    return spec.moe is not None and len({spec.dense_bias, spec.mlp_bias, spec.moe.router_bias}) > 1


def _flagless_activation(spec: ModelSpec) -> bool:
    """An activation for which a config has room, but no flag exists."""
    pair = (spec.activation, spec.gated)
    return pair not in ACTIVATIONS and pair != ("gelu", False) and not fused_gelu(spec)


def _heads(spec: ModelSpec) -> bool:
    return bool(spec.num_tokentypes or spec.lm_head or spec.head_activation or spec.binary_head or spec.pooler)


def _bert(spec: ModelSpec) -> bool:
    return spec.model_type == "BERT"


def _encoder(spec: ModelSpec) -> bool:
    return bool(spec.encoder_layers or spec.relative_buckets or spec.relative_distance)


#: The functions that `activation_func` of a TransformerConfig has to be.
FUNCTIONS = {
    "silu": "torch.nn.functional.silu", "gelu": "torch.nn.functional.gelu", "relu": "torch.nn.functional.relu",
    "gelu_tanh": "functools.partial(torch.nn.functional.gelu, approximate='tanh')",
    "squared_relu": "megatron.core.activations.squared_relu",
    "quick_gelu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
}  # fmt: skip
#: What user code does for a setting without a flag: the config takes every attribute of args that has a field's name.
IN_CODE = "before core_transformer_config_from_args (in your copy of pretrain_gpt.py): there is no flag for it."


LLAMA3_FIXED = (
    "llama3 rope {0.rope.scaling}: in megatron-core original_max_position_embeddings / low_freq_factor is fixed at "
    "8192 and original_max_position_embeddings / high_freq_factor at 2048."
)
FACTOR_DROPPED = (
    "No Megatron-LM release passes --rope-scaling-factor on, the model uses 8 instead of {0.rope.scaling[factor]}: add "
    "rope_scaling_factor=args.rope_scaling_factor where gpt_builders.py (before 0.15 pretrain_gpt.py) builds "
    "GPTModel, from 0.19 on the same entry to gpt_config_from_args in megatron/training/argument_utils.py."
)
LINEAR_DROPPED = (
    "Before Megatron-LM 0.19 --rotary-seq-len-interpolation-factor does not reach the model: use 0.19, or add "
    "seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor where gpt_builders.py (before 0.15 "
    "pretrain_gpt.py) builds GPTModel."
)
DYNAMIC = (
    "Megatron has no dynamic rope: the model is the same up to {0.max_position_embeddings} positions and differs "
    "beyond, so do not raise --max-position-embeddings or --seq-length above that."
)
YARN_FLAGS = (
    "YaRN without multi-latent attention has flags from Megatron-LM 0.19 on. In 0.15 to 0.18 leave out the --yarn-* "
    "flags and --position-embedding-type (--use-checkpoint-args restores it), and set yarn_rotary_scaling_factor, "
    "yarn_original_max_position_embeddings, yarn_beta_fast, yarn_beta_slow, yarn_mscale, yarn_mscale_all_dim and "
    "yarn_correction_range_round_to_int on the TransformerConfig in code; older releases have no such rope."
)
LATENT_YARN_FLAGS = (
    "No Megatron-LM release has flags for these numbers of YaRN with multi-latent attention: set "
    "args.original_max_position_embeddings, args.beta_fast and args.beta_slow as in {0.rope.scaling} "
    "before core_transformer_config_from_args (in your copy of pretrain_gpt.py)."
)
LATENT_YARN_OLD = (
    "Up to Megatron-LM 0.13 YaRN of multi-latent attention starts from --max-position-embeddings: use 0.14 or newer."
)
LATENT_EPSILON = (
    "Megatron uses --norm-epsilon {0.norm_epsilon} in the norms of the latent queries, keys and values, where "
    "transformers always has 1e-6: a difference below rounding in bfloat16."
)
WINDOW_FLAG = (
    "--window-size exists from Megatron-LM 0.15 on: use 0.15 or newer, or keep --seq-length within {0.sliding_window}, "
    "where the window does nothing."
)
SOME_WINDOWS = "So does --window-attn-skip-freq, which has 1 for the layers with the window."
SINKS = (
    "--softmax-type learnable exists from Megatron-LM 0.15 on, and with --transformer-impl transformer_engine needs "
    "Transformer Engine 2.8."
)
GEGLU_FLAGS = (
    "--quick-geglu, --activation-func-clamp-value and --glu-linear-offset exist from Megatron-LM 0.15 on: use 0.15 or "
    "newer."
)
ROUTER_BIAS = "The router has a bias from Megatron-LM 0.15 on: use 0.15 or newer."
SHARED_GATE = (
    "--moe-shared-expert-gate exists from Megatron-LM 0.16 on: with an older one set gate to True in "
    "moe_module_specs.py."
)
LOCAL_OFFSET = (
    "--apply-layernorm-1p works with --transformer-impl transformer_engine; the local one has it only for LayerNorm "
    "with apex: use transformer_engine."
)
ZERO_BIASES = (
    "Megatron has biases on all linear layers or on none: those this model lacks are zeros in the checkpoint and would "
    "be trained; freeze them to keep the architecture."
)
BERT_TRAINER = (
    "pretrain_bert.py is in Megatron-LM up to 0.17; newer releases have only BertModel, for code of your own."
)
BERT_TYPES = (
    "pretrain_bert.py has 2 token types with a binary head and none without: write num_tokentypes = "
    "{0.num_tokentypes} into your copy."
)

#: What stock GPTModel and BertModel cannot be told, but layers of one's own (`--spec`) can do. {0} is the spec.
CUSTOM: Rules = (
    (lambda s: s.norms != "pre", "norms at other places than before attention and the MLP ({0.norms})."),
    (lambda s: s.parallel_residual, "attention and MLP side by side (parallel residual)."),
    (lambda s: s.qk_norm == "full", "norms over all query heads together (qk_norm full)."),
    (lambda s: s.attention_softcap is not None, "a soft cap on attention scores."),
    (lambda s: s.logit_softcap is not None, "a soft cap on logits."),
    (lambda s: s.embedding_multiplier != 1, "embeddings multiplied by {0.embedding_multiplier}."),
    (lambda s: s.local_rope is not None, "a rope of their own for windowed layers."),
)  # fmt: skip

#: What nothing in megatron-core can be told. {0} is the spec.
REFUSALS: Rules = (
    (lambda s: s.model_type not in MODEL_TYPES, "model_type {0.model_type}: only GPT and BERT models are written."),
    (_encoder, "an encoder beside the decoder, or biases of scores by distance."),
    (lambda s: s.shared_norm and not s.parallel_residual, "one norm for attention and MLP in a serial layer."),
    (lambda s: s.alibi, "alibi positions."),
    (lambda s: s.residual_multiplier != 1, "residuals multiplied by {0.residual_multiplier}."),
    (lambda s: s.logit_multiplier != 1, "logits multiplied by {0.logit_multiplier}."),
    (lambda s: s.norm == "LayerNorm" and not s.norm_bias, "LayerNorm without biases: megatron-core's has them."),
    (lambda s: s.qkv_clip is not None, "queries, keys and values clipped at {0.qkv_clip}."),
    (lambda s: s.norm not in ("RMSNorm", "LayerNorm"), "norm {0.norm}: megatron-core has RMSNorm and LayerNorm."),
    (lambda s: s.norm_has_bias and (s.qk_norm is not None or s.mla is not None or s.mtp_layers > 0),
     "LayerNorm on queries and keys, in latent attention or in multi-token prediction: megatron-core's has biases."),
    # Activations
    (lambda s: s.activation not in FUNCTIONS, "activation {0.activation}: megatron-core has no such function."),
    (lambda s: not s.gated and (s.activation_clamp is not None or s.gate_offset != 0),
     "a clamped activation in an MLP without gate."),
    # Experts
    (lambda s: _sigmoid(s) and s.moe is not None and s.moe.normalize != (s.moe.topk > 1),
     "sigmoid scores with norm_topk_prob {0.moe.normalize} and top {0.moe.topk}: megatron-core always divides more "
     "than one of them by their sum, and never a single one."),
    (lambda s: _softmax(s) and s.moe is not None and s.moe.normalize and s.moe.topk == 1,
     "one expert per token with a normalised softmax score: megatron-core takes top 1 only with the score itself."),
    (lambda s: s.moe is not None and s.moe.score not in ("softmax", "sigmoid"), "router scores {0.moe.score}."),
    (lambda s: _softmax(s) and s.moe is not None and s.moe.score_bias,
     "a score correction bias with softmax scores: megatron-core has it for sigmoid scores only."),
    (lambda s: not _groups_fit(s), "experts chosen from {0.moe.topk_groups} of {0.moe.num_groups} groups by "
     "{0.moe.group_score}: megatron-core scores a group by the sum of its best {0.moe.topk} // {0.moe.topk_groups}."),
    (lambda s: _groups(s) and _softmax(s) and s.moe is not None and s.moe.normalize and s.moe.group_score != "max",
     "groups of experts scored by sums of softmax scores that are normalised later: megatron-core adds logits then."),
    (_unlike_experts, "biases on some of attention output, router and experts: megatron-core has all or none."),
    (lambda s: _expert_biases(s) and s.moe is not None and s.moe.shared_ffn_hidden_size is not None,
     "shared experts beside linear biases, which megatron-core's shared experts cannot have."),
    # Multi-latent attention
    (lambda s: s.mla is not None and s.qkv_bias, "biases on the projections of multi-latent attention."),
    (lambda s: s.mla is not None and s.qk_norm is not None, "norms per head in multi-latent attention."),
    (lambda s: s.mla is not None and s.softmax_scale is not None, "a softmax scale with multi-latent attention."),
    (lambda s: s.mla is not None and s.rope_layers is not None, "layers without rope in multi-latent attention."),
    (lambda s: s.mla is not None and (s.rope is None or s.rope.percent != 1),
     "multi-latent attention without full rope."),
    (lambda s: s.mla is not None and s.rope is not None and not _rope_is("yarn", "default")(s),
     "rope kind {0.rope.kind} with multi-latent attention."),
    (lambda s: _yarn(True)(s) and s.rope is not None and s.rope.scaling.get("truncate") is False,
     "YaRN with truncate false in multi-latent attention."),
    # Rope
    (lambda s: s.position_offset > 0,
     "{0.position_offset} rows of positions before that of the first token: megatron-core has none, they would be "
     "lost."),
    (lambda s: s.rope is not None and s.learned_positions, "learned positions beside rope."),
    (lambda s: s.rope is not None and s.rope.kind not in (*ROPES, "yarn"),
     "rope kind {0.rope.kind}: megatron-core has no such rotary embedding."),
    (lambda s: _rope_is("linear", "llama3", "yarn")(s) and not _factor(s),
     "rope kind {0.rope.kind} without a factor above 0."),
    (lambda s: _rope_is("llama3")(s) and not _llama3_fits(s), LLAMA3_FIXED),
    (lambda s: _yarn(False)(s) and s.rope is not None and (s.rope.percent != 1 or s.rope.interleaved),
     "YaRN on a part of the head or on interleaved pairs."),
    (_attention_factor, "YaRN with attention_factor {0.rope.scaling[attention_factor]} and no factor above 1."),
    # BERT
    (lambda s: not _bert(s) and _heads(s), "token types and heads other than the output layer in a GPT model."),
    (lambda s: _bert(s) and not (s.learned_positions and s.rope is None),
     "BERT without learned positions: pretrain_bert.py builds no others."),
    (lambda s: _bert(s) and not (s.lm_head and s.pooler == s.binary_head),
     "a BERT with language model head {0.lm_head}, pooler {0.pooler} and binary head {0.binary_head}: megatron-core's "
     "always has the first, and the others together or not at all."),
    (lambda s: _bert(s) and s.lm_head and (s.head_activation or s.activation) != "gelu",
     "activation {0.activation} in a BERT with a language model head: megatron-core's head has the exact GELU."),
    (lambda s: _bert(s) and bool(s.moe or s.mla or s.mtp_layers), "experts, latent attention or MTP in BERT."),
)  # fmt: skip

#: What the stock trainer cannot be told, or only from some release on; each says what to do. {0} is the spec.
LIMITS: Rules = (
    (lambda s: _rope_is("llama3")(s) and _factor(s) not in (0, 8), FACTOR_DROPPED),
    (_rope_is("linear"), LINEAR_DROPPED),
    (lambda s: _rope_is("linear")(s) and _factor(s) % 1 != 0,
     "--rotary-seq-len-interpolation-factor takes whole numbers: make its type float in arguments.py for this model."),
    (lambda s: s.rope is not None and s.rope.theta % 1 != 0,
     "--rotary-base takes whole numbers: use --use-checkpoint-args, which restores {0.rope.theta} as it is."),
    (_rope_is("dynamic"), DYNAMIC),
    (_yarn(False), YARN_FLAGS),
    (_yarn(True), LATENT_YARN_OLD),
    (lambda s: _yarn(True)(s) and _yarn_moved(s), LATENT_YARN_FLAGS),
    (lambda s: s.mla is not None and s.norm_epsilon != 1e-6, LATENT_EPSILON),
    (lambda s: s.rope is not None and s.rope.interleaved and s.mla is None,
     "Interleaved rope: add --no-rope-fusion unless Transformer Engine is 2.3 or newer."),
    (lambda s: s.rope_layers is not None, "--no-rope-freq exists from Megatron-LM 0.13 on: use 0.13 or newer."),
    (lambda s: s.sliding_window is not None, WINDOW_FLAG),
    (lambda s: s.sliding_window is not None and s.window_layers is not None, SOME_WINDOWS),
    (lambda s: s.sinks, SINKS),
    (lambda s: (s.activation, s.gated) == ("quick_gelu", True) or s.activation_clamp is not None or s.gate_offset != 0,
     GEGLU_FLAGS),
    (_expert_biases, ROUTER_BIAS),
    (lambda s: s.moe is not None and s.moe.shared_gate, SHARED_GATE),
    (lambda s: s.norm_offset, LOCAL_OFFSET),
    (_some_biases, ZERO_BIASES),
    (lambda s: s.mtp_layers > 0 and s.learned_positions,
     "Multi-token prediction with learned positions is refused by Megatron-LM before 0.19."),
    (lambda s: s.mtp_layers > 0 and _yarn(False)(s),
     "Multi-token prediction with YaRN is refused by validate_args in every Megatron-LM release: change it there."),
    (_bert, BERT_TRAINER),
    (lambda s: _bert(s) and s.num_tokentypes != 2 * s.binary_head, BERT_TYPES),
)  # fmt: skip


def refusals(spec: ModelSpec, custom: bool = False, tp: int = 1) -> list[str]:
    """What megatron-core's model cannot express, one sentence each; empty when it can be written.

    custom: the user has layers of their own (`--spec`), which provide what is in `CUSTOM`. tp: tensor parallel size.
    """
    rules = REFUSALS if custom else (*REFUSALS, *CUSTOM)
    found = [text.format(spec) for applies, text in rules if applies(spec)]
    if tp > 1 and _expert_biases(spec):
        found.append(
            f"experts with biases at tensor parallel size {tp}: megatron-core has them only with expert tensor "
            "parallel size 1, and in the torch format that is the tensor parallel size. Choose 1."
        )
    return found


def limits(spec: ModelSpec, custom: bool = False) -> list[str]:
    """What the stock trainer does not do with a checkpoint that is right, one sentence each, with what to do.

    custom: as in `refusals`.
    """
    found = [text.format(spec) for applies, text in LIMITS if applies(spec)]
    if _flagless_activation(spec) and spec.activation in FUNCTIONS:
        gate = " and args.gated_linear_unit = True" if spec.gated else ""
        found.append(f"Set args.activation_func = {FUNCTIONS[spec.activation]}{gate} {IN_CODE}")
    if spec.softmax_scale is not None and not custom:
        found.append(f"Set args.softmax_scale = {spec.softmax_scale!r} {IN_CODE}")
    return found


def check(spec: ModelSpec, custom: bool, tp: int) -> None:
    """Raise TargetError when `refusals` is not empty."""
    if reasons := refusals(spec, custom, tp):
        raise TargetError(f"Megatron cannot express this model: {' '.join(reasons)} --saver hf may express it.")


#: attribute, values beside None that mean "not used", what it is.
UNSUPPORTED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("qk_l2_norm",                              (False,),     "L2 norms on queries and keys"),
    ("softmax_type",                            ("vanilla", "learnable"), "a sink that is not trained"),
    ("attention_output_gate",                   (False,),     "a gate on the attention output"),
    ("experimental_attention_variant",          (),           "an experimental attention"),
    ("use_te_activation_func",                  (False,),     "Transformer Engine's activations"),
    ("use_mup",                                 (False,),     "muP multipliers"),
    ("is_hybrid_model",                         (False,),     "a hybrid of attention and other layers"),
    ("hybrid_override_pattern",                 ("",),        "a hybrid of attention and other layers"),
    ("hybrid_layer_pattern",                    ("",),        "a hybrid of attention and other layers"),
    ("heterogeneous_layers_config_path",        ("",),        "layers that differ in shape"),
    ("heterogeneous_layers_config_encoded_json",("",),        "layers that differ in shape"),
    ("apply_residual_connection_post_layernorm",(False,),     "residuals after the norm"),
    ("enable_gpt_oss",                          (False,),     "a YaRN whose numbers are in Megatron's code"),
    ("moe_router_score_function",               ("softmax", "sigmoid"), "scores of the router"),
    ("moe_router_topk_limited_devices",         (),           "experts chosen by device"),
    ("moe_apply_probs_on_input",                (False,),     "router scores on the input of experts"),
    ("moe_latent_size",                         (),           "experts in a smaller space"),
    ("moe_mlp_glu_interleave_size",             (),           "gates and ups of experts in turn"),
    ("moe_shared_expert_glu_interleave_size",   (),           "gates and ups of shared experts in turn"),
    ("moe_single_grouped_weight",               (False,),     "experts in one tensor"),
    ("moe_single_grouped_bias",                 (False,),     "biases of experts in one tensor"),
    ("mla_down_proj_fusion",                    (False,),     "down projections of latent attention in one tensor"),
    ("mtp_use_repeated_layer",                  (False,),     "one MTP layer used again and again"),
    ("mtp_hybrid_override_pattern",             ("",),        "hybrid MTP layers"),
)  # fmt: skip

POSITIONS = ("rope", "yarn", "learned_absolute", "none")


def unsupported(args: Mapping[str, object], model_type: str = "GPT", custom: bool = False) -> list[str]:
    """Why a Namespace describes a model that is not read; empty when `spec_of` says all there is to it.

    custom: layers of one's own (`spec`) are known to the caller.
    """
    reasons = [
        f"{attr}={args[attr]!r}: {what}" for attr, unused, what in UNSUPPORTED if args.get(attr) not in (None, *unused)
    ]
    if args.get("spec") is not None and not custom and not (model_type == "BERT" and args["spec"] == ["local"]):
        reasons.append(f"spec={args['spec']!r}: layers of its own (--spec)")
    return [*reasons, *_attention(args, model_type), *_router(args), *_mlp(args)]


def _attention(args: Mapping[str, object], model_type: str) -> list[str]:
    reasons = []
    position = args.get("position_embedding_type") or "learned_absolute"
    rotary, latent = args.get("use_rotary_position_embeddings"), args.get("multi_latent_attention")
    norm = args.get("normalization") or "LayerNorm"
    if position not in POSITIONS and not rotary:
        reasons.append(f"position_embedding_type={position!r}: only {', '.join(POSITIONS)} are read")
    if (rotary or position != "learned_absolute") and model_type == "BERT":
        reasons.append(f"position_embedding_type={position!r}: only learned positions are read in BERT")
    if latent and position in ("learned_absolute", "yarn") and not rotary:
        reasons.append(f"position_embedding_type={position!r}: positions beside those of multi-latent attention")
    if latent and not args.get("qk_layernorm"):
        reasons.append("qk_layernorm=False: multi-latent attention without norms")
    if norm not in ("RMSNorm", "LayerNorm"):
        reasons.append(f"normalization={norm!r}: only RMSNorm and LayerNorm are read")
    if norm == "LayerNorm" and (args.get("qk_layernorm") or args.get("mtp_num_layers")):
        reasons.append("normalization='LayerNorm': norms with biases on queries and keys or in MTP")
    window = args.get("window_size")
    if isinstance(window, Sequence) and len(window) == 2 and window[0] != -1 and window[1] != 0:
        reasons.append(f"window_size={window!r}: a window that looks ahead")
    if args.get("use_rope_scaling") and args.get("rotary_seq_len_interpolation_factor") not in (None, 1):
        reasons.append("use_rope_scaling and rotary_seq_len_interpolation_factor: two rope scalings at once")
    return reasons


def _router(args: Mapping[str, object]) -> list[str]:
    if not args.get("num_experts"):
        return []
    reasons = []
    if args.get("moe_router_load_balancing_type") in ("sinkhorn", ["sinkhorn"]):
        reasons.append("moe_router_load_balancing_type='sinkhorn': experts chosen by balance")
    topk, groups = args.get("moe_router_topk", 2), args.get("moe_router_group_topk")
    if isinstance(topk, int) and isinstance(groups, int) and groups:
        logits = args.get("moe_router_score_function") != "sigmoid" and not args.get("moe_router_pre_softmax")
        if topk // groups not in (1, 2) or (logits and topk // groups == 2):
            what = "logits" if logits else "scores"
            reasons.append(
                f"moe_router_group_topk={groups!r}: groups of experts by the sum of their best {topk // groups} {what}"
            )
    return reasons


def _mlp(args: Mapping[str, object]) -> list[str]:
    clamped = args.get("activation_func_clamp_value") is not None or args.get("glu_linear_offset")
    gated = args.get("swiglu") or args.get("quick_geglu") or args.get("gated_linear_unit")
    if clamped and args.get("swiglu") and args.get("bias_swiglu_fusion", True):
        return ["bias_swiglu_fusion=True: the fused swiglu knows no activation_func_clamp_value or glu_linear_offset"]
    if clamped and not gated:
        return ["activation_func_clamp_value or glu_linear_offset without a gated MLP: Megatron ignores them"]
    return []

