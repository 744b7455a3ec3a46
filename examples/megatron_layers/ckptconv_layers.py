"""Layers for Megatron-LM that make models exact which its GPTModel alone cannot express.

`ckptconv --saver megatron_mcore --custom-layers` writes checkpoints for these layers, and `ckptconv_layers.json`
beside them, which says what the model needs (`Settings`): norms behind attention and the MLP (Gemma 2, Gemma 3,
GLM-4-0414, OLMo 2), norms that store gamma - 1 without Transformer Engine (Gemma), attention and MLP side by side
(GPT-NeoX, Falcon), norms behind the residual sums (BERT), q/k norms over all heads (OLMo 2), soft caps (Gemma 2),
multiplied embeddings (Gemma), a rope of their own for windowed layers (Gemma 3), activations that have no flag.

Needs megatron-core and torch; copy the file where you like. Two ways to use it, with the flags of megatron_args.txt:

1. As layers, with an unchanged pretrain_gpt.py (pretrain_bert.py for BERT):

       PYTHONPATH=<this folder> torchrun ... pretrain_gpt.py --spec ckptconv_layers local ...

   `local` has the names of --transformer-impl local, `te` those of transformer_engine; --use-checkpoint-args restores
   the choice. The layers take everything that lies within them from the settings. What does not (the final norm, the
   gradients of q/k norms) follows the trainer's flags, which are checked; what no flag can say is refused, and the
   error says so: soft caps on logits and logit multipliers (Gemma 2), and the final norm of models whose norms store
   gamma - 1 where Transformer Engine is not installed.
2. As the whole model, for these too: this file runs the trainer's script with `gpt_builder` below as its builder,

       PYTHONPATH=<this folder> torchrun ... ckptconv_layers.py pretrain_gpt.py ...

   In Megatron-LM 0.15 to 0.18. A model provider of your own calls `gpt_model`.

The settings are read from the file that CKPTCONV_LAYERS names, else from ckptconv_layers.json in --load,
--pretrained-checkpoint or --save. Copy it to --save when training goes on from there. Checkpoints that the trainer
writes carry them in `args.ckptconv_layers`, from which ckptconv reads them.

What has been run (tests/oracle/test_custom_layers.py of ckptconv): `local` on the CPU in float32, logits equal to
transformers' with megatron-core 0.16.1 at TP1, TP2 and PP2, and on one rank with the argument parser and the builder of
Megatron-LM 0.15.0 to 0.18.0. No training, and never `te`, which follows the source of 0.16.1. Not built: experts,
multi-latent attention, MTP, context parallelism with `local` (its attention has none), flash decoding.

Facts: megatron-core 0.16.1 transformer/transformer_layer.py, attention.py, dot_product_attention.py, torch_norm.py,
models/gpt/gpt_layer_specs.py, gpt_model.py.

Shape legend: s tokens, b batch, h hidden, d head dim.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import transformer_block
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer

# Without it, some releases of megatron-core have placeholders for these.
HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
if HAVE_TE:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

FILE = "ckptconv_layers.json"
VARIABLE = "CKPTCONV_LAYERS"

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.nn.functional.relu,
    "squared_relu": lambda x: torch.nn.functional.relu(x).square(),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding. kind: default, linear or llama3; scaling: the numbers of Hugging Face's rope_scaling."""

    theta: float
    kind: str
    scaling: dict[str, Any]
    percent: float
    interleaved: bool

    def table(self, head_dim: int) -> RotaryEmbedding:
        """The module that makes the angles, one for all layers."""
        return _table(json.dumps(dataclasses.asdict(self)), head_dim)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ckptconv_layers.json says: the properties of a model that its layers are built from.

    norms: `pre` (before attention and the MLP), `sandwich` (also after both), `output` (only after both, inside the
    residual), `post` (after the residual sums: a layer starts with the norm of the one before it); qk_norm: `head`,
    `full` (over all heads together) or None; window_layers, rope_layers: 1 for every layer with the sliding window or
    with rope, None for all.
    """

    model_type: str
    norm: str
    norm_epsilon: float
    norm_offset: bool
    norms: str
    qk_norm: str | None
    activation: str
    gated: bool
    parallel_residual: bool
    shared_norm: bool
    softmax_scale: float | None
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_multiplier: float
    residual_multiplier: float
    logit_multiplier: float
    sliding_window: int | None
    window_layers: list[int] | None
    rope: Rope | None
    rope_layers: list[int] | None
    local_rope: Rope | None

    @classmethod
    def of(cls, data: dict[str, Any], where: str) -> Settings:
        """From the JSON object. Raises ValueError if it has other fields than these."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if data.keys() != fields:
            raise ValueError(f"{where}: fields that differ: {sorted(data.keys() ^ fields)}. Take ckptconv_layers.py "
                             "from the ckptconv that wrote the file.")  # fmt: skip
        ropes = {name: Rope(**data[name]) for name in ("rope", "local_rope") if data[name]}
        return cls(**{**data, **ropes})

    def windowed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has the window."""
        return self.sliding_window is not None and (self.window_layers is None or bool(self.window_layers[layer]))

    def applied(self, config: Any) -> Any:
        """A copy of a TransformerConfig with everything that the layers are built from."""
        config = copy.copy(config)
        config.ckptconv_layers = self
        config.normalization = self.norm
        config.layernorm_epsilon = self.norm_epsilon
        config.layernorm_zero_centered_gamma = self.norm_offset
        config.activation_func = ACTIVATIONS[self.activation]
        config.gated_linear_unit = self.gated
        config.bias_activation_fusion = False  # its gelu is always the approximation
        config.use_te_activation_func = False
        config.softmax_scale = self.softmax_scale
        config.qk_layernorm = self.qk_norm is not None
        config.rotary_interleaved = bool(self.rope and self.rope.interleaved)
        config.no_rope_freq = self.rope_layers and [1 - layer for layer in self.rope_layers]
        return config

    def check(self, config: Any) -> None:
        """Raise ValueError where a config is not this model's in what lies outside of the layers."""
        wanted = {
            "normalization": (self.norm, "--normalization"),
            "layernorm_epsilon": (self.norm_epsilon, "--norm-epsilon"),
            "layernorm_zero_centered_gamma": (self.norm_offset, "--apply-layernorm-1p"),
            "qk_layernorm": (self.qk_norm is not None, "--qk-layernorm"),
        }
        for name, (value, flag) in wanted.items():
            if getattr(config, name) != value:
                raise ValueError(f"{name} is {getattr(config, name)}, this model has {value}: give {flag}")
        beyond = []
        if self.logit_softcap is not None or self.logit_multiplier != 1:
            beyond.append("a cap or multiplier on logits")
        if self.norm_offset and transformer_block.LayerNormImpl is WrappedTorchNorm:
            beyond.append("a final norm that stores gamma - 1, without Transformer Engine,")
        if beyond:
            raise ValueError(f"{' and '.join(beyond)} cannot be had with --spec: run the trainer through "
                             "ckptconv_layers.py, as its first lines say")  # fmt: skip


def _trainer_args() -> Any:
    """The trainer's arguments, None outside of it."""
    variables = sys.modules.get("megatron.training.global_vars")
    return getattr(variables, "_GLOBAL_ARGS", None)


def read() -> Settings:
    """The settings of the model that is being built. Raises FileNotFoundError, ValueError."""
    args = _trainer_args()
    named = os.environ.get(VARIABLE)
    folders = [getattr(args, name, None) for name in ("load", "pretrained_checkpoint", "save")]
    paths = [Path(named)] if named else [Path(folder, FILE) for folder in folders if folder]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        looked = ", ".join(map(str, paths)) or "nowhere"
        raise FileNotFoundError(f"no {FILE} (looked for {looked}): copy it there, or name it in {VARIABLE}")
    data = json.loads(path.read_text())
    if args is not None:
        args.ckptconv_layers = data  # goes into the checkpoints
    return Settings.of(data, str(path))


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, with weights that may store gamma - 1, and with sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps, self.shape, self.offset = eps, (hidden_size,), config.layernorm_zero_centered_gamma
        start = 0.0 if self.offset else 1.0
        self.weight = torch.nn.Parameter(torch.full(self.shape, start, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(self.shape, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 1 + self.weight.float() if self.offset else self.weight.float()
        if self.bias is None:
            out = torch.nn.functional.rms_norm(x.float(), self.shape, None, self.eps) * weight
        else:
            out = torch.nn.functional.layer_norm(x.float(), self.shape, weight, self.bias.float(), self.eps)
        return out.type_as(x)


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over all heads of all tensor ranks together. Every rank holds the whole weight [heads * d].

    Megatron sums the gradients of parameters called q_layernorm and k_layernorm over tensor ranks.
    """

    heads = "num_attention_heads"

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps, self.total = eps, getattr(config, self.heads)
        self.offset = config.layernorm_zero_centered_gamma
        start = 0.0 if self.offset else 1.0
        self.weight = torch.nn.Parameter(torch.full((self.total * hidden_size,), start, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [s, b, heads of this rank, d]."""
        heads, head_dim = x.shape[-2:]
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        squares = x.float().square().sum((-2, -1), keepdim=True)
        if ranks > 1:
            # Forth and back: the sum is of all ranks, and so is its gradient.
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        mean = squares / (ranks * heads * head_dim)  # heads that several ranks have count several times in both
        first = rank * self.total // ranks
        weight = self.weight.view(self.total, head_dim)[first : first + heads].float()
        return (x.float() * torch.rsqrt(mean + self.eps) * (1 + weight if self.offset else weight)).type_as(x)


class AllKeyHeadsNorm(AllHeadsNorm):
    """The same for keys."""

    heads = "num_query_groups"


class _Output:
    """A row-parallel linear, then what comes between it and the residual: a norm, a multiplier."""

    norm: Any = None

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        settings = config.ckptconv_layers
        self.multiplier = settings.residual_multiplier
        self.post_layernorm = None
        if settings.norms in ("sandwich", "output"):
            self.post_layernorm = self.norm(config, output_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        out, bias = super().forward(*args, **kwargs)  # type: ignore[misc]
        out = out if bias is None else out + bias
        out = out if self.post_layernorm is None else self.post_layernorm(out)
        return (out if self.multiplier == 1 else out * self.multiplier), None


class LocalOutput(_Output, RowParallelLinear):
    """With megatron-core's linear."""

    norm = Norm


if HAVE_TE:

    class TEOutput(_Output, TERowParallelLinear):
        """With Transformer Engine's linear."""

        norm = TENorm


class _Capped(torch.nn.Module):
    """A softmax over capped scores: cap * tanh(scores / cap), before the mask."""

    def __init__(self, softmax: torch.nn.Module, cap: float) -> None:
        super().__init__()
        self.softmax, self.cap = softmax, cap

    def forward(self, scores: torch.Tensor, *args: Any) -> torch.Tensor:
        return self.softmax(self.cap * torch.tanh(scores / self.cap), *args)


class CappedAttention(DotProductAttention):
    """Core attention with a soft cap, which Transformer Engine's has not."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.scale_mask_softmax = _Capped(self.scale_mask_softmax, config.ckptconv_layers.attention_softcap)


@functools.cache
def _table(rope: str, head_dim: int) -> RotaryEmbedding:
    """`Rope.table`; rope is JSON, since a cache needs what can be hashed."""
    said = Rope(**json.loads(rope))
    table = RotaryEmbedding(
        head_dim, said.percent, rotary_interleaved=said.interleaved, rotary_base=said.theta, use_cpu_initialization=True
    )
    table.inv_freq = _scaled(table.inv_freq, said)
    return table


def _scaled(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Frequencies scaled as the model says. Raises ValueError for other kinds."""
    if rope.kind in ("default", "dynamic"):  # dynamic: the same up to the trained length
        return frequencies
    factor = rope.scaling["factor"]
    if rope.kind == "linear":
        return frequencies / factor
    if rope.kind != "llama3":
        raise ValueError(f"rope kind {rope.kind}")
    low, high = rope.scaling["low_freq_factor"], rope.scaling["high_freq_factor"]
    turns = rope.scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    part = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - part) * frequencies / factor + part * frequencies


class Attention(SelfAttention):
    """Self-attention with the window and the rope of its layer."""

    def __init__(self, config: Any, submodules: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        settings = config.ckptconv_layers
        windowed = settings.windowed(layer_number - 1)
        config = copy.copy(config)
        # Keys before and after the query.
        config.window_size = (settings.sliding_window - 1, 0) if windowed else None
        config.window_attn_skip_freq = None
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        rope = settings.local_rope if windowed and settings.local_rope else settings.rope
        self.rope = rope and rope.table(config.kv_channels)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """Arguments after the first two come by keyword from TransformerLayer."""
        if kwargs.get("rotary_pos_cos") is not None:
            raise NotImplementedError("ckptconv_layers: flash decoding")
        given = kwargs.get("rotary_pos_emb")
        if self.rope is not None and given is None:
            raise ValueError("the model makes no rotary embedding: give --position-embedding-type rope")
        if self.rope is not None:
            packed = kwargs.get("packed_seq_params")
            tokens = given.shape[0] * (1 if packed is not None else self.config.context_parallel_size)
            kwargs["rotary_pos_emb"] = self.rope(tokens, packed_seq=packed is not None).to(given.device)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


def submodules(settings: Settings, te: bool) -> Any:
    """The parts of a layer. Raises RuntimeError when Transformer Engine is asked for and not installed."""
    if te and not HAVE_TE:
        raise RuntimeError("--spec ckptconv_layers te: Transformer Engine is not installed")
    if te:
        parts = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=settings.qk_norm == "head").submodules
    else:
        parts = get_gpt_layer_local_spec(
            qk_layernorm=settings.qk_norm == "head", normalization=settings.norm
        ).submodules
    attention = parts.self_attention
    mlp = getattr(parts.mlp, "submodules", None) or parts.mlp.keywords["submodules"]  # from 0.18 on a partial
    attention.module = Attention
    if settings.model_type == "BERT":
        attention.params = {**attention.params, "attn_mask_type": AttnMaskType.padding}
    norm = TENorm if te else Norm
    if settings.norms == "post" or not te:
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if settings.norms == "output":
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    if te and settings.norms in ("post", "output"):  # no norm in the linears
        attention.submodules.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
    if settings.norms in ("sandwich", "output") or settings.residual_multiplier != 1:
        attention.submodules.linear_proj = mlp.linear_fc2 = TEOutput if te else LocalOutput
    if settings.attention_softcap is not None:
        attention.submodules.core_attention = CappedAttention
    if settings.qk_norm == "full":
        attention.submodules.q_layernorm, attention.submodules.k_layernorm = AllHeadsNorm, AllKeyHeadsNorm
    elif settings.qk_norm == "head":
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    return parts


class Layer(TransformerLayer):
    """A layer as the settings say."""

    te = False

    def __init__(self, config: Any, submodules: Any = None, layer_number: int = 1, **kwargs: Any) -> None:
        settings = getattr(config, "ckptconv_layers", None)  # set by `gpt_model`
        if settings is None:
            settings = read()
            settings.check(config)
            config = settings.applied(config)
        if config.num_moe_experts or config.multi_latent_attention:
            raise NotImplementedError("ckptconv_layers: experts or multi-latent attention")
        super().__init__(config, _parts(settings, self.te), layer_number, **kwargs)
        self.settings = settings
        if settings.shared_norm:
            self._share_norm()

    def _share_norm(self) -> None:
        """One norm under two names: trained as one, and both names are in the checkpoint."""
        if not self.te:
            self.pre_mlp_layernorm = self.input_layernorm
            return
        one, other = self.self_attention.linear_qkv, self.mlp.linear_fc1
        other.layer_norm_weight = one.layer_norm_weight
        if self.settings.norm == "LayerNorm":
            other.layer_norm_bias = one.layer_norm_bias

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        settings = self.settings
        if self.layer_number == 1 and settings.embedding_multiplier != 1:
            # As transformers does: the number in the model's type first.
            factor = torch.tensor(settings.embedding_multiplier, dtype=self.config.params_dtype)
            hidden_states = hidden_states * factor.to(hidden_states)
        if settings.norms != "post" and not settings.parallel_residual:
            return super().forward(hidden_states, *args, **kwargs)
        return self._forward(hidden_states, *args, **kwargs)

    def _forward(
        self, x: torch.Tensor, attention_mask: Any = None, context: Any = None, context_mask: Any = None,
        rotary_pos_emb: Any = None, padding_mask: Any = None, dynamic_inference_decode_only: Any = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """Both halves read the same input, or both add to what they read."""
        normed = self.input_layernorm(x)
        attended = self.self_attention(normed, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb, **kwargs)
        if self.settings.parallel_residual:
            read = normed if self.settings.shared_norm else self.pre_mlp_layernorm(x)
            out = self._add(self.self_attn_bda, attended, x)
            return self._add(self.mlp_bda, self.mlp(read), out), context
        out = self.pre_mlp_layernorm(self._add(self.self_attn_bda, attended, normed))
        return self._add(self.mlp_bda, self.mlp(out), out), context

    def _add(self, add: Any, out: Any, residual: torch.Tensor) -> Any:
        with self.bias_dropout_add_exec_handler():
            return add(self.training, self.config.bias_dropout_fusion)(out, residual, self.hidden_dropout)


_parts = submodules  # `Layer.__init__` has a parameter of that name, which Megatron passes


class TELayer(Layer):
    """The same of Transformer Engine's parts."""

    te = True


# `Layer` makes its own parts; these are for BertModel, which looks at them to see whose attention it will be.
local = ModuleSpec(module=Layer, submodules=get_gpt_layer_local_spec().submodules)
te = ModuleSpec(
    module=TELayer, submodules=get_gpt_layer_with_transformer_engine_spec().submodules if HAVE_TE else None
)


def gpt_model(config: Any, *, transformer_engine: bool = False, **arguments: Any) -> GPTModel:
    """A GPTModel of these layers, with its final norm, and logits as the model has them.

    arguments: GPTModel's, less the layer spec. The settings are read as described at the top.
    """
    settings = read()
    config = settings.applied(config)
    stage = {name: arguments[name] for name in ("vp_stage",) if arguments.get(name) is not None}
    number = transformer_block.get_num_layers_to_build(config, **stage)
    layers = transformer_block.TransformerBlockSubmodules(
        layer_specs=[te if transformer_engine else local] * number, layer_norm=TENorm if transformer_engine else Norm
    )
    model = GPTModel(config=config, transformer_layer_spec=layers, **arguments)
    if arguments.get("post_process", True):
        _finish(model.output_layer, settings)
    return model


def _finish(output_layer: torch.nn.Module, settings: Settings) -> None:
    """What comes between the output layer and the loss."""
    cap, multiplier = settings.logit_softcap, settings.logit_multiplier

    def finish(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        logits = logits if multiplier == 1 else logits * multiplier
        return (logits if cap is None else cap * torch.tanh(logits / cap)), bias

    if cap is not None or multiplier != 1:
        output_layer.register_forward_hook(finish)


def gpt_builder(
    args: Any, pre_process: bool, post_process: bool, vp_stage: Any = None, config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:  # fmt: skip
    """Megatron-LM's builder of the same name (gpt_builders.py), with `gpt_model`."""
    if config is None:
        config = importlib.import_module("megatron.training.arguments").core_transformer_config_from_args(args)
    return gpt_model(
        config,
        transformer_engine=args.transformer_impl == "transformer_engine",
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def main() -> None:
    """Run a trainer's script with `gpt_builder` in the place of its own."""
    if len(sys.argv) < 2:
        sys.exit("usage: ckptconv_layers.py pretrain_gpt.py [flags of the trainer]")
    script = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(script.parent), str(Path(__file__).resolve().parent)]
    if "gpt_config_from_args(" in script.read_text():
        sys.exit(f"{script}: builds the model from a config (Megatron-LM 0.19): call gpt_model in a provider of yours")
    importlib.import_module("gpt_builders").gpt_builder = importlib.import_module("ckptconv_layers").gpt_builder
    sys.argv = sys.argv[1:]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
