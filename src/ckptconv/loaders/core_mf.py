"""MindSpore Transformers checkpoints: a safetensors or .ckpt file, a merged folder, or a Checkpoint 2.0 with metadata.

`core_mf` is what MindSpore's guide to Megatron-LM calls it; its command lines run as they are. Nothing of MindSpore or
Megatron is needed. Sizes are found from the tensors and a config.json, which flags have to agree with.
"""

from __future__ import annotations

import logging
import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptconv import companions, families, numbers, stream
from ckptconv.containers import msdir
from ckptconv.errors import SourceError, UsageError, refuse, some
from ckptconv.formats import mindspore
from ckptconv.formats.mindspore import CONTIGUOUS, FC1_LAYOUTS, GROUPED, QKV_LAYOUTS
from ckptconv.joining import Shards
from ckptconv.layout import Layout
from ckptconv.lazy import LazyTensor
from ckptconv.messages import Expected
from ckptconv.metadata import Metadata, Origin
from ckptconv.spec import ModelSpec, Rope

log = logging.getLogger("ckptconv.loader")

#: A file may be given where others want a directory.
takes_files = True

#: Megatron-LM's name for a rotary embedding, and its default for the longest input.
POSITIONS = ("learned_absolute", "rope")
LENGTH = 2048


def recognises(load_dir: str) -> str | None:
    """Why a directory or file looks like ours, or None."""
    return msdir.recognises(load_dir)


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    group = parser.add_argument_group("loader core_mf (mindspore)")
    add = group.add_argument
    add("--ms-fc1-layout", choices=FC1_LAYOUTS,
        help="rows of the gated fc1: gate and up in turn (use_interleaved_weight_layout_mlp, the default of "
        "mindformers from r1.7.0 on), or all gates above all ups; no file tells")  # fmt: skip
    add("--ms-qkv-layout", choices=QKV_LAYOUTS,
        help="rows of linear_qkv: by query group (the default of mindformers from r1.7.0 on), or all of q, k and v in "
        "turn (use_contiguous_weight_layout, the default of r1.6.0); no file tells")  # fmt: skip
    add("--ms-config", metavar="PATH",
        help="the model's config.json, or the directory with it and the tokenizer (default: that of --load-dir)")
    add("--true-vocab-size", type=numbers.positive, metavar="N",
        help="rows of the embedding that are tokens; the rest is padding and dropped")  # fmt: skip
    add("--vocab-file", metavar="PATH", help="a JSON vocabulary: its length is the true vocabulary size")
    sizes = {"num_layers": "", "hidden_size": "", "ffn_hidden_size": "of a dense layer, ", "num_query_groups": "",
             "padded_vocab_size": "rows of the embedding, "}  # fmt: skip
    for name, what in sizes.items():
        add(f"--{name.replace('_', '-')}", type=numbers.positive, metavar="N",
            help=f"{what}only compared with what is found")  # fmt: skip
    add("--num-attention-heads", type=numbers.positive, metavar="N",
        help="needed where neither a config.json nor norms on queries and keys nor --kv-channels tell")  # fmt: skip
    add("--kv-channels", type=numbers.positive, metavar="N", help="size of a head, as --num-attention-heads")
    add("--seq-length", type=numbers.positive, metavar="N", help=f"longest input in training (default {LENGTH})")
    add("--max-position-embeddings", type=numbers.positive, metavar="N",
        help="longest input (default: config.json's, else --seq-length)")  # fmt: skip
    add("--position-embedding-type", choices=POSITIONS, help="only compared with what is found")
    add("--rotary-base", type=float, metavar="X", help="of the rotary embedding (default: config.json's, else 10000)")
    add("--norm-epsilon", type=float, metavar="X", help="of all norms (default: config.json's, else 1e-5)")
    add("--normalization", choices=("RMSNorm", "LayerNorm"), help="only compared with what is found")
    add("--add-bias-linear", action="store_true", help="only compared with what is found: linears have biases")
    add("--swiglu", action="store_true", help="only compared with what is found: the MLP is gated")
    add("--tokenizer-type", metavar="NAME", help="goes with the model (default HuggingFaceTokenizer)")
    add("--ms2torch-ckpt-path", metavar="DIR", default="./ms2pt_checkpoint",
        help="not used: there are no intermediate weights")  # fmt: skip


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError, UsageError."""
    stream.send(queue, _Source(args))


@dataclass(frozen=True)
class _Said:
    """A flag that has to agree with what was found."""

    flag: str
    given: object
    found: object


class _Source:
    """One checkpoint: its tensors under today's names, and the model they are."""

    def __init__(self, args: Namespace) -> None:
        self.place = args.load_dir
        self._args = args
        stored, self.files = msdir.read(self.place)
        self._tensors, self.ignored = self._sorted(stored)
        self._provenance = self._read_provenance()
        self._companions = self._find_companions()
        self._embedding = self._matrix("embedding.word_embeddings.weight")
        self.spec = self._model()
        self._check_flags()
        how = mindspore.dialect(self._tensors, *self._layouts())
        tensors = {name: mindspore.reshaped(name, tensor, self.spec) for name, tensor in self._tensors.items()}
        experts = self.spec.moe.num_experts if self.spec.moe else 0
        layout = Layout(self.spec.num_layers, num_experts=experts)
        only = (0, 0, 0)
        self._shards = Shards(
            {only: tensors}, {only: Path(self.place)}, mindspore.table(self.spec, how), self.spec, layout,
            self._embedding.shape[0],
        )  # fmt: skip
        self._shards.check()

    # Files

    def _sorted(self, stored: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
        """(weights by today's names, what is left out by which rule)."""
        tensors: dict[str, LazyTensor] = {}
        ignored: dict[str, str] = {}
        for name, tensor in stored.items():
            rule = next((rule for rule in mindspore.IGNORE if re.fullmatch(rule.pattern, name)), None)
            if rule:
                ignored[rule.pattern] = rule.reason
                continue
            new = mindspore.renamed(name)
            if new in tensors:
                raise SourceError(f"{self.place}: {name} and another tensor are both {new}. Which is the model's?")
            tensors[new] = tensor
        return tensors, ignored

    @property
    def _folder(self) -> Path:
        place = Path(self.place)
        return place if place.is_dir() else place.parent

    def _read_provenance(self) -> dict[str, Any] | None:
        """What we noted when this was written by us."""
        path = self._folder / companions.PROVENANCE
        if not path.is_file():
            return None
        noted = companions.read_json(path)
        target = noted.get("target")
        ours = isinstance(target, dict) and target.get("format") == "mindspore"
        if not ours or not isinstance(noted.get("spec"), dict):
            raise SourceError(f"{path}: was not written for this checkpoint. Remove it to go on without it.")
        return noted

    def _find_companions(self) -> dict[str, str]:
        given = self._args.ms_config
        if given and not Path(given).exists():
            raise UsageError(f"--ms-config {given}: does not exist.")
        if given and Path(given).is_file():
            return {**companions.find(Path(given).parent), companions.CONFIG: given}
        places = (Path(given),) if given else (self._folder / companions.FOLDER, self._folder)
        found = next((found for place in places if (found := companions.find(place))), {})
        if given and companions.CONFIG not in found:
            raise UsageError(f"--ms-config {given}: has no {companions.CONFIG}.")
        return found

    # The model

    def _matrix(self, name: str) -> LazyTensor:
        tensor = self._tensors.get(name)
        if tensor is None or len(tensor.shape) != 2:
            raise SourceError(
                f"{self.place}: has no matrix {name}; it has {some(self._tensors)}. "
                "Is this a checkpoint of MindSpore Transformers?"
            )
        return tensor

    def _model(self) -> ModelSpec:
        if self._provenance is not None:
            spec = ModelSpec.from_json(self._provenance["spec"], str(self._folder / companions.PROVENANCE))
        elif (config := companions.read_config(self._companions)) is not None:
            where = self._companions[companions.CONFIG]
            spec = families.of_config(config, where).spec(config, where)
        else:
            spec = self._inferred()
        held = len(self._tensors)
        if max(spec.num_layers, spec.mtp_layers) > held:
            raise SourceError(f"{self.place}: {spec.num_layers} layers are said, but it holds {held} tensors.")
        rows = sum(tensor.rows for tensor in self._tensors.values())
        if spec.moe and spec.moe.num_experts > rows:
            raise SourceError(f"{self.place}: {spec.moe.num_experts} experts are said, but it holds {rows} rows.")
        changes: dict[str, Any] = {"dtype": self._embedding.dtype, "tied": "output_layer.weight" not in self._tensors}
        if not any(name.startswith("mtp.") for name in self._tensors):
            changes["mtp_layers"] = 0
        if self._args.seq_length:
            changes["seq_length"] = self._args.seq_length
        spec = spec.replace(**changes)
        return spec.replace(vocab_size=self._vocabulary(spec))

    def _vocabulary(self, spec: ModelSpec) -> int:
        """Rows that are tokens."""
        rows, told = self._embedding.shape[0], self._args.true_vocab_size
        if told is None and self._args.vocab_file:
            told = len(companions.read_json(self._args.vocab_file))
        told = spec.vocab_size if told is None else told
        if told > rows:
            raise SourceError(
                f"{self.place}: a vocabulary of {told} is said (--true-vocab-size, --vocab-file or config.json), but "
                f"the embedding has {rows} rows. Is that of this model?"
            )
        return told

    def _inferred(self) -> ModelSpec:
        """A dense model from its tensors and flags alone. Raises SourceError, UsageError."""
        args, layer = self._args, "decoder.layers.0."
        attention, mlp = layer + "self_attention.", layer + "mlp."
        if any(".experts." in name or ".linear_kv" in name for name in self._tensors):
            raise UsageError(
                f"{self.place}: is a model with experts or multi-latent attention, of which the tensors tell only "
                "the sizes. Give its config.json: --ms-config PATH, or beside the weights."
            )
        rows, hidden = self._embedding.shape
        wide, fc2 = self._matrix(attention + "linear_proj.weight"), self._matrix(mlp + "linear_fc2.weight")
        heads, groups, size = self._heads(attention, wide.shape[1])
        rope = "embedding.position_embeddings.weight" not in self._tensors
        ffn, split = fc2.shape[1], mlp + "gating.weight" in self._tensors
        gated = split or self._matrix(mlp + "linear_fc1.weight").shape[0] == 2 * ffn
        longest = args.max_position_embeddings or args.seq_length or LENGTH
        if not rope:
            longest = self._matrix("embedding.position_embeddings.weight").shape[0]
        unknown = {"--rotary-base": args.rotary_base if rope else 0, "--norm-epsilon": args.norm_epsilon,
                   "--max-position-embeddings": args.max_position_embeddings or args.seq_length or not rope}
        missing = [flag for flag, value in unknown.items() if value is None]
        if missing:
            log.warning(
                "loader: no config.json and no %s: Megatron's defaults are taken (rotary base 10000, epsilon 1e-5, "
                "%d positions). Weights do not depend on them, what they compute does.", some(missing), longest
            )  # fmt: skip

        def there(*names: str) -> bool:
            return any(name in self._tensors for name in names)

        bias = [mlp + f"{linear}.bias" for linear in ("linear_fc1", "gating")]
        return ModelSpec(
            family="", num_layers=self._count(), hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
            num_query_groups=groups, kv_channels=size, vocab_size=rows, max_position_embeddings=longest,
            seq_length=args.seq_length or longest, dtype=self._embedding.dtype,
            norm="LayerNorm" if there("decoder.final_layernorm.bias", "decoder.final_layernorm.beta") else "RMSNorm",
            norm_epsilon=args.norm_epsilon or 1e-5, qk_norm="head" if there(attention + "q_layernorm.weight") else None,
            activation="silu" if gated else "gelu", gated=gated,
            qkv_bias=there(attention + "linear_qkv.bias", attention + "linear_q.bias"),
            dense_bias=there(attention + "linear_proj.bias"), mlp_bias=there(*bias),
            rope=Rope(args.rotary_base or 10000.0) if rope else None, learned_positions=not rope,
        )  # fmt: skip

    def _count(self) -> int:
        """Layers. Those in between that lack are noticed later."""
        numbers = {int(m[1]) for name in self._tensors if (m := re.match(r"decoder\.layers\.(\d+)\.", name))}
        if numbers != set(range(len(numbers))):
            raise SourceError(f"{self.place}: holds the layers {some(map(str, sorted(numbers)))}: some are missing.")
        return len(numbers)

    def _heads(self, attention: str, wide: int) -> tuple[int, int, int]:
        """(heads, query groups, head dim) where linear_proj has `wide` columns."""
        args, norm = self._args, self._tensors.get(attention + "q_layernorm.weight")
        size = args.kv_channels or (norm.rows if norm else None)
        heads = args.num_attention_heads or (wide // size if size else None)
        if heads is None:
            raise UsageError(
                f"{self.place}: how many heads its {wide} query rows are is not to be seen. Give "
                "--num-attention-heads (or --kv-channels), or the model's config.json (--ms-config)."
            )
        size = size or wide // heads
        fused = self._tensors.get(attention + "linear_qkv.weight")
        keys = self._tensors.get(attention + "linear_k.weight")
        both = fused.rows - wide if fused else 2 * keys.rows if keys else 0  # of keys and values
        groups, rest = divmod(both, 2 * size) if size else (0, 0)
        if heads * size != wide or rest or groups < 1 or heads % groups:
            raise SourceError(
                f"{self.place}: {attention}linear_proj.weight has {wide} columns and the queries, keys and values have "
                f"{fused.rows if fused else wide} rows, which is not {heads} heads of {size} in whole query "
                "groups. Are --num-attention-heads and --kv-channels those of this model?"
            )
        return heads, groups, size

    def _check_flags(self) -> None:
        """Raise SourceError where a flag says another model than was found."""
        args, spec = self._args, self.spec
        said = [
            *(_Said(f"--{name.replace('_', '-')}", getattr(args, name), getattr(spec, name))
              for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                           "kv_channels", "max_position_embeddings", "norm_epsilon")),
            _Said("--padded-vocab-size", args.padded_vocab_size, self._embedding.shape[0]),
            _Said("--normalization", args.normalization, spec.norm),
            _Said("--rotary-base", args.rotary_base, spec.rope.theta if spec.rope else None),
            _Said("--position-embedding-type", args.position_embedding_type, POSITIONS[spec.rope is not None]),
            _Said("--add-bias-linear", args.add_bias_linear or None, spec.dense_bias and spec.mlp_bias),
            _Said("--swiglu", args.swiglu or None, spec.gated and spec.activation == "silu"),
        ]  # fmt: skip
        wrong = [f"{one.flag} {one.given}, found {one.found}" for one in said if one.given not in (None, one.found)]
        if wrong:
            raise SourceError(f"{self.place}: flags and checkpoint disagree: {'; '.join(wrong)}.")

    def _layouts(self) -> tuple[str, str]:
        """The layouts of fc1 and qkv: as noted by us, as flags say, else asked for where it matters."""
        noted = (self._provenance or {}).get("target", {})
        found = []
        gated = self.spec.gated and any(".linear_fc1." in n and ".experts." not in n for n in self._tensors)
        gated = gated and not any(".gating." in name for name in self._tensors)
        joined = self.spec.mla is None and any(".linear_qkv." in name for name in self._tensors)
        for name, matters, choices, upstream in (
            ("ms_fc1_layout", gated, FC1_LAYOUTS, CONTIGUOUS), ("ms_qkv_layout", joined, QKV_LAYOUTS, GROUPED),
        ):  # fmt: skip
            flag, given, known = f"--{name.replace('_', '-')}", getattr(self._args, name), noted.get(name)
            if known and given not in (None, known):
                raise SourceError(f"{self.place}: {flag} {given}, but {companions.PROVENANCE} says {known}.")
            if matters and not given and not known:
                if getattr(self._args, "loader", None) != "core_mf":
                    refuse(UsageError(
                        f"{self.place}: {flag} is needed: {' or '.join(choices)}. The "
                        "rows may be in either order, which no file tells but the model's settings "
                        "(use_interleaved_weight_layout_mlp, use_contiguous_weight_layout_attention of mindformers)."
                    ))  # fmt: skip
                else:
                    log.warning(
                        "loader: no %s: rows are taken as %s, as core_mf always did. If the model was trained "
                        "otherwise (mindformers from r1.7.0 on interleaves fc1 by default) the result is WRONG and "
                        "nothing notices: give the flag.", flag, upstream
                    )  # fmt: skip
            found.append(given or known or upstream)
        return found[0], found[1]

    # The stream

    def metadata(self) -> Metadata:
        """The first message."""
        notes = [f"ignored {name}: {reason}" for name, reason in sorted(self.ignored.items())]
        tokenizer = self._companions.get("tokenizer.model")
        return Metadata(
            spec=self.spec,
            origin=Origin("mindspore", self.place, stream.stamps(self.files), self._companions, notes),
            tokenizer_type=self._args.tokenizer_type or "HuggingFaceTokenizer",
            tokenizer_model=str(Path(tokenizer).parent) if tokenizer else None,
        )

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The full tensors of one message, not read."""
        return {key: self._shards.joined(message, key) for key in message.shapes}

    def holdings(self) -> stream.Holdings:
        """What lies on which rank."""
        return self._shards.holdings()
