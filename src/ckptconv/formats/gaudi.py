"""Intel Gaudi's Megatron-LM (HabanaAI): a dialect of megatron-core's `torch` format, and what its converter knows.

Names are those of the local spec whatever the implementation: its Transformer Engine has no norm inside a linear. Tools
of its own release that cut an expert's fc1 cut it otherwise than its model reads it: see `savers/megatron_gaudi.py`.

Source: HabanaAI/Megatron-LM 1.19.0 to 1.24.0, `tools/checkpoint/convert_mlm_to_hf_checkpoint.py`, `convert.py`,
`loader_llama_mistral.py`, `loader_mixtral_hf.py`, `saver_core.py` and `megatron/core/transformer/moe`. Verified
against files that its converters of 1.24.0 wrote (Llama; Mixtral with capacity bins), in both directions; dynamic names
with tensor parallelism against the source only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptconv import dtypes
from ckptconv.errors import SourceError
from ckptconv.formats import mcore
from ckptconv.formats.megatron_facts import LLAMA3
from ckptconv.formats.table import Row
from ckptconv.spec import ModelSpec, Rope

#: Args that only this fork has.
MARKS = ("moe_dynamic_hpu", "moe_capacity_bins_num", "use_fused_sdpa")
#: What its converter takes for granted where args are silent: it knows Llama and Mixtral only.
ASSUMED = {"add_bias_linear": False, "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True}

ARGS_FILE, TARGET_ARGS_FILE, BINS_FILE = "source_megatron_args.json", "target_megatron_args.json", "capacity_bins.pt"

#: Buffers of a router with capacity bins, in the order of capacity_bins.pt.
BUFFERS = ("bins_usage", "total_requested_capacity", "optimize_moe_bins_usage_last",
           "optimize_moe_total_requested_capacity_last", "capacity_bins")  # fmt: skip
BUFFER_NAME = "decoder.layers.{}.mlp.router.capacity_bins.{}"
_BUFFER = re.compile(r"decoder\.layers\.(\d+)\.mlp\.router\.capacity_bins\.(\w+)")
#: Experts of its dynamic implementation (`moe_dynamic_hpu`): counted over the model, in one module.
_DYNAMIC = re.compile(r"(.*\.mlp\.experts\.)local_expert_(\d+)_linear_fc([12])_weight")
_SPLIT = re.compile(r".*\.local_expert_\d+_linear_fc1[12]_weight")


def is_gaudi(arguments: Mapping[str, object], names: Iterable[str]) -> bool:
    """Whether rank 0's args and tensors are this fork's."""
    return any(mark in arguments for mark in MARKS) or any(_BUFFER.match(n) or _DYNAMIC.match(n) for n in names)


def buffer(name: str) -> tuple[int, str] | None:
    """(layer within its stage, name) of a router's buffer."""
    match = _BUFFER.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def plain(name: str, first: int, where: str) -> tuple[str, bool]:
    """(megatron-core's name, whether it was a dynamic expert's); `first` is the rank's first expert.

    Raises SourceError for an fc1 in two tensors.
    """
    if _SPLIT.fullmatch(name):
        raise SourceError(
            f"{where}: {name}: gate and up of an expert apart (moe_fused_weights off), which is not read. Train or "
            "save with fused weights."
        )
    match = _DYNAMIC.fullmatch(name)
    if match is None:
        return name, False
    return f"{match[1]}local_experts.{int(match[2]) - first}.linear_fc{match[3]}.weight", True


def table(dynamic: bool = False) -> tuple[Row, ...]:
    """The rows to write. `dynamic`: experts for moe_dynamic_hpu."""
    rows = mcore.table("local")
    if not dynamic:
        return rows
    return tuple(replace(row, name=_dynamic(row.name)) if row.expert else row for row in rows)


def _dynamic(name: str) -> str:
    return re.sub(r"local_experts\.\{e\}\.linear_fc(\d)\.(weight|bias)", r"local_expert_{g}_linear_fc\1_\2", name)


@dataclass(frozen=True)
class Type:
    """What a `--source-model-type` stands for. positions: the model's longest input; ids: of begin and end of a text,
    and for instruct models the ends of a turn, too; tokenizer: its kind, without and with `--instruct`.
    """

    family: str
    bos: int = 1
    eos: int = 2
    ends: tuple[int, ...] = ()
    positions: int | None = None
    scaled: bool = False
    tokenizer: tuple[str, str] = ("sentencepiece", "sentencepiece")


TYPES = {
    "llama2":   Type("llama", positions=4096),
    "llama3":   Type("llama", 128000, 128001, (128001, 128008, 128009), 8192, tokenizer=("llama3", "llama3-instruct")),
    "llama3.1": Type("llama", 128000, 128001, (128001, 128008, 128009), 131072, True,
                     ("llama3.1", "llama3.1-instruct")),
    "mixtral":  Type("mixtral"),
}  # fmt: skip
#: Llama 2 with a longer rope is Code Llama.
LONGER = 16384


def typed(spec: ModelSpec, name: str, where: str) -> ModelSpec:
    """The model as one of a type, whose longest input and scaled rope the args often do not say. Raises SourceError."""
    kind, rope = TYPES[name], spec.rope
    if (spec.moe is not None) != (kind.family == "mixtral"):
        has = f"{spec.moe.num_experts} experts" if spec.moe else "no experts"
        raise SourceError(f"{where}: --source-model-type {name}, but the model has {has}. Leave the flag out.")
    if rope is None or rope.kind not in ("default", "llama3") or (rope.kind == "llama3" and not kind.scaled):
        said = f"a {rope.kind} scaled rope" if rope else "no rotary embedding"
        raise SourceError(f"{where}: --source-model-type {name}, but the args say {said}. Leave the flag out.")
    if kind.scaled and rope.kind == "default":
        rope = Rope(rope.theta, "llama3", {"factor": 8.0, **LLAMA3}, rope.percent, rope.interleaved)
    positions = kind.positions or spec.max_position_embeddings
    if name == "llama2" and rope.theta > 10000:
        positions = LONGER
    return spec.replace(family=kind.family, rope=rope, max_position_embeddings=positions)


def config_of(spec: ModelSpec, name: str, instruct: bool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What its converter adds to config.json beside the sizes."""
    kind = TYPES[name]
    eos = list(kind.ends) if instruct and kind.ends else kind.eos
    dropout = arguments.get("attention_dropout") or 0.0
    config: dict[str, Any] = {"bos_token_id": kind.bos, "eos_token_id": eos, "attention_dropout": dropout}
    if spec.moe:
        config |= {
            "output_router_logits": False,
            "router_aux_loss_coef": arguments.get("moe_aux_loss_coeff") or 0.0,
            "router_jitter_noise": arguments.get("moe_input_jitter_eps") or 0.0,
        }
    return config


#: How an instruct model is sampled.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


def as_json(arguments: Mapping[str, object]) -> bytes:
    """All args; what JSON has no word for as `str()` would have it."""

    def text(value: Any) -> str:
        of: tuple[Any, ...] = getattr(value, "args", ())  # what stands for an enum's member keeps the call that made it
        return f"{value.name}.{of[0]}" if len(of) == 1 else str(value)

    return (json.dumps(dict(arguments), indent=2, default=text) + "\n").encode()


#: Keys of --source-margs-file that are not taken over: they are of the run, of the layout, or follow from the target.
OWN = frozenset((
    "sequence_parallel", "use_distributed_optimizer", "verify_checkpoint", "load", "use_rotary_position_embeddings",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "transformer_pipeline_model_parallel_size",
    "consumed_train_samples", "consumed_valid_samples", "tokenizer_model", "tokenizer_type", "padded_vocab_size",
    "vocab_size", "make_vocab_size_divisible_by",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "encoder_num_layers", "encoder_seq_length",
    "start_weight_decay", "end_weight_decay", "main_grads_dtype", "main_params_dtype", "exp_avg_dtype",
    "exp_avg_sq_dtype", "params_dtype", "bf16", "fp16", "iteration", "save", "rank", "local_rank", "world_size",
    "data_parallel_size", "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "transformer_impl", "ckpt_format", "moe_dynamic_hpu", "moe_permuted_weights", "moe_fused_weights",
))  # fmt: skip
_OBJECT = re.compile(r"[A-Za-z_][\w.]*\.\w+")


def taken_over(margs: Mapping[str, Any], dtype_of: Callable[[str], object]) -> dict[str, object]:
    """What of a source's args goes into a target's: all that is a plain value and not of the run or its layout.

    dtype_of: what stands for a torch dtype of that name.
    """
    found: dict[str, object] = {}
    for name, value in margs.items():
        if value is None or name in OWN:
            continue
        dtype = value.removeprefix("torch.") if isinstance(value, str) and value.startswith("torch.") else None
        if dtype in dtypes.BY_NAME:
            found[name] = dtype_of(str(dtype))
        elif not (isinstance(value, str) and _OBJECT.fullmatch(value) and value[:1].isupper()):
            found[name] = value  # else an enum's member as text
    return found
