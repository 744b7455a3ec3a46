"""Keys of Megatron's torch_dist checkpoints, and what the same tensors are called in a rank file at tp = pp = ep = 1.

A key names a tensor of the whole model. Layers of one kind are stacked on a leading axis, where the model has only
one; experts always are, behind the layers. Gated projections are [gate; up] whatever the layout was. Norms have the
names of Transformer Engine's fused linears; the local spec is renamed to them when it is stored.

Source: Megatron-LM `core/transformer/transformer_block.py` (sharded_state_dict: when layers have keys of their own),
`core/models/gpt/gpt_layer_specs.py` and `core/models/bert/bert_layer_specs.py` (sharded_state_dict_keys_map),
`core/transformer/moe/experts.py`, `core/transformer/mlp.py` (apply_swiglu_sharded_factory),
`core/transformer/multi_token_prediction.py`, `core/transformer/utils.py` (make_sharded_object_for_checkpoint),
`training/checkpointing.py`, read at core_v0.12.0 to 0.19.0, which agree; `core/transformer/fsdp_dtensor_checkpoint.py`
at core_v0.19.0 for the keys of fsdp_dtensor.

Verified with real megatron-core 0.16.1 and the local spec, both ways (tests/oracle/test_dist_mcore.py). The names of
Transformer Engine's spec are read from the source, and which of its modules have an extra state from reports of
loads that failed for the lack of one (Megatron-LM pull request 6270, NVIDIA/cosmos issue 69, NeMo Speech issue 10386).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ckptconv.errors import SourceError
from ckptconv.formats import mcore
from ckptconv.formats.table import Row
from ckptconv.lazy import Shape
from ckptconv.spec import ModelSpec

#: A layer's own norms, and what the local spec stores them as, in layers with experts, too.
_FUSED = {
    ".input_layernorm.":   ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}  # fmt: skip
_MODULE = mcore.MTP_MODULES[1]  # whatever the release calls it in memory
_STACKED = re.compile(r"((?:decoder|encoder)\.layers)\.(?!\d+\.)(.+)")
_LAYER = re.compile(r"((?:decoder|encoder)\.layers)\.(\d+)\.(.+)")
_LINEAR = r"linear_fc[12]\.(?:weight|bias)"
_EXPERTS = re.compile(rf"(.+\.mlp\.experts)\.experts\.(?:(\d+)\.)?({_LINEAR})")
_GROUPED = re.compile(rf"(.+\.mlp\.experts)\.({_LINEAR})(\d+)")
_EXPERT = re.compile(rf"(.+\.mlp\.experts)\.local_experts\.(\d+)\.({_LINEAR})")
_HALF = re.compile(r"(.+\.linear_fc1\.(?:weight|bias)\d*)_([wv])")

#: First words of keys that are not the model's, and why they are left behind.
NOT_WEIGHTS = {
    "rerun_state_machine_state": "trainer state",
    "optim": "optimizer state is not converted",
    "lr_scheduler": "optimizer state is not converted",
    "dataloader": "trainer state",
    "train_state": "trainer state",
}
_CHAINED = re.compile(r"chained_\d+")

_EMBEDDING = "embedding.word_embeddings.weight"
#: What frameworks put in front of all keys of the model.
PREFIXES = ("", "model.", "module.", "model.module.", "model.module.module.")

#: Keys by which checkpoints of others are known, and what they are.
FOREIGN = {
    "tok_embeddings.weight": "a Llama model of torchtitan's, which --loader meta reads when a params.json (Meta's, of "
    "the same sizes) lies beside it",
    "model.embed_tokens.weight": "a model of Hugging Face's. Save it as safetensors and read it with --loader hf",
    "transformer.wte.weight": "a model of Hugging Face's. Save it as safetensors and read it with --loader hf",
}  # fmt: skip

#: Modules with an extra state, by the last word of their names: linears always; norms, and the attention itself, where
#: they are Transformer Engine's.
_LINEARS = re.compile(r"linear_\w+|eh_proj")
_NORMS = re.compile(r"\w*norm")
_ATTENTION = "self_attention.core_attention"
_ONE_LAYER = re.compile(rf"(?:(?:decoder|encoder)\.layers\.\d+|mtp\.layers\.\d+\.{_MODULE})\.")
_ROOTS = ("embedding", "decoder", "encoder", "mtp", "output_layer", "lm_head", "binary_head", "pooler")


def head(key: str) -> str:
    """The first word of a key: `optimizer` of `optimizer.state.exp_avg...` and of `optimizer/shard_0_1`."""
    word = re.split(r"[./]", key, maxsplit=1)[0]
    return "optimizer" if _CHAINED.fullmatch(word) else word


def prefix_of(keys: Collection[str], where: str) -> str:
    """What stands in front of all keys of the model. Raises SourceError when there is no model of megatron-core."""
    for prefix in PREFIXES:
        if prefix + _EMBEDDING in keys:
            return prefix
    for mark, what in FOREIGN.items():
        found = next((key for key in keys if key == mark or key.endswith("." + mark)), None)
        if found and not found.startswith("optim"):
            raise SourceError(f"{where}: is a plain distributed checkpoint that holds {found}: {what}.")
    raise SourceError(f"{where}: has no {_EMBEDDING}. Is this a GPT or BERT model of megatron-core?")


@dataclass(frozen=True)
class Part:
    """A tensor of a rank file inside a stored one: at these leading indices; half 0 or 1 of [gate; up], or all."""

    name: str
    index: Shape
    half: int | None = None


def parts(key: str, shape: Shape, where: str) -> Iterator[Part]:
    """What a stored tensor holds. Raises SourceError when it lacks an axis that its key speaks of."""
    half = None
    if match := _HALF.fullmatch(key):
        key, half = match[1], "wv".index(match[2])
    stacked = _STACKED.fullmatch(key)
    for layer in range(_axis(key, shape, 0, where)) if stacked else (None,):
        index: Shape = () if layer is None else (layer,)
        name = key if stacked is None else f"{stacked[1]}.{layer}.{stacked[2]}"
        if match := _GROUPED.fullmatch(name):
            yield Part(f"{match[1]}.local_experts.{match[3]}.{match[2]}", index, half)
        elif (match := _EXPERTS.fullmatch(name)) is None or match[2]:
            yield Part(f"{match[1]}.local_experts.{match[2]}.{match[3]}" if match else name, index, half)
        else:
            for expert in range(_axis(key, shape, len(index), where)):
                yield Part(f"{match[1]}.local_experts.{expert}.{match[3]}", (*index, expert), half)


def _axis(key: str, shape: Shape, axis: int, where: str) -> int:
    if len(shape) <= axis + 1:
        raise SourceError(
            f"{where}: {key} is {list(shape)}, expected an axis of all layers or experts in front of its own. Was it "
            "saved by megatron-core?"
        )
    return shape[axis]


def unfused(names: Iterable[str]) -> dict[str, str]:
    """New names of norms that are called after a linear which their layer, one with experts, does not have."""
    there = set(names)
    renamed = {}
    for name in there:
        before, mark, kind = name.partition(_FUSED[".pre_mlp_layernorm."])
        if mark and f"{before}.mlp.linear_fc1.weight" not in there:
            renamed[name] = f"{before}.pre_mlp_layernorm.{kind}"
    return renamed


def table(implementation: str, spec: ModelSpec) -> tuple[Row, ...]:
    """The rows whose names are stored for one implementation of the layers, layer by layer."""
    rows = mcore.table(implementation, mtp_module=_MODULE, bert=spec.model_type == "BERT")
    if implementation != "local" or spec.mla:  # the local spec of latent attention has no renamings
        return rows
    return tuple(replace(row, name=_fused(row.name)) for row in rows)


def _fused(name: str) -> str:
    for alone, fused in _FUSED.items():
        name = name.replace(alone, fused)
    return name


def own_keys(spec: ModelSpec) -> bool:
    """Whether layers have keys of their own, as `moe_layer_freq` is a list (all of ones: written as 1, not a list)."""
    return spec.moe is not None and not all(spec.moe.layers)


@dataclass(frozen=True)
class Keys:
    """How the tensors of a model are stored: `apart`: layers have keys of their own; layers, experts: how many."""

    apart: bool
    layers: int
    experts: int

    def stored(self, name: str) -> tuple[str, Shape, Shape]:
        """(key, leading sizes, leading offsets) of a tensor called `name` in the table."""
        leading: list[tuple[int, int]] = []
        if not self.apart and (match := _LAYER.fullmatch(name)):
            name = f"{match[1]}.{match[3]}"
            leading.append((self.layers, int(match[2])))
        if match := _EXPERT.fullmatch(name):
            name = f"{match[1]}.experts.{match[3]}"
            leading.append((self.experts, int(match[2])))
        return name, tuple(size for size, _ in leading), tuple(at for _, at in leading)

    def extra_states(
        self, names: Iterable[str], implementation: str, bert: bool, further: Collection[str] = ()
    ) -> Iterator[str]:
        """Keys of the empty extra states that a model asks for when it loads: `..._extra_state/shard_{i}_{L}`.

        names: all of the table's. further: modules beside the known ones, by whole names or as in a layer, of each.
        """
        engine = implementation != "local"
        alone = [one for one in further if one.split(".")[0] in _ROOTS]
        inside = [one for one in further if one not in alone] + [_ATTENTION] * engine
        modules: dict[str, None] = {}
        for name in names:
            module, _, kind = name.rpartition(".")
            last = module.rpartition(".")[2]
            known = _LINEARS.fullmatch(last) or (engine and _NORMS.fullmatch(last))
            if (known and kind == "weight") or (bert and module == "output_layer"):  # GPTModel leaves its own out
                modules[module] = None
            if layer := _ONE_LAYER.match(name):
                modules |= dict.fromkeys(layer[0] + one for one in inside)
        for module in (*modules, *alone):
            key, sizes, at = self.stored(module + ".weight")
            where = f"{_dotted(at)}_{_dotted(sizes)}" if sizes else "0_1"
            yield f"{key.removesuffix('.weight')}._extra_state/shard_{where}"


def _dotted(numbers: Shape) -> str:
    return ".".join(map(str, numbers))


def ignored(key: str, known: Mapping[str, str]) -> str | None:
    """Why a key is left behind on purpose, None for one of the model. known: reasons by first words."""
    return {**known, **NOT_WEIGHTS}.get(head(key))
