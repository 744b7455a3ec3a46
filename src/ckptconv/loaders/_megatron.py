"""A model of Megatron's as its args and tensors say it: what the loaders of Megatron's formats share.

A loader reads files into `Found`: the tensors of each rank under the names of megatron-core, with the args. `Source`
makes the model of it, checks that args, tensors, ranks and what is kept beside them agree, and joins the ranks.
"""

from __future__ import annotations

import logging
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ckptconv import companions, families, lazy, numbers, stream
from ckptconv.containers import dcp, msdir, rankdir, torchzip
from ckptconv.errors import CkptconvError, SourceError, some
from ckptconv.formats import gaudi, mcore, mcore_bert, megatron_args, megatron_layers, megatron_legacy
from ckptconv.formats.table import Row
from ckptconv.joining import Shards
from ckptconv.layout import Layout
from ckptconv.lazy import LazyTensor
from ckptconv.messages import Expected
from ckptconv.metadata import Metadata, Origin
from ckptconv.sharding import slot_name
from ckptconv.spec import ModelSpec, differences

log = logging.getLogger("ckptconv.loader")

#: Keys of a rank file that are not the model, and why they are left behind.
NOT_WEIGHTS = {
    "args": "read for the sizes",
    "checkpoint_version": "read",
    "iteration": "read",
    "num_floating_point_operations_so_far": "a counter",
    "optimizer": "optimizer state is not converted",
    "opt_param_scheduler": "optimizer state is not converted",
    "lr_scheduler": "optimizer state is not converted",
    "rng_state": "random number generator state is not converted",
    "random_rng_state": "random number generator state is not converted",
    "np_rng_state": "random number generator state is not converted",
    "torch_rng_state": "random number generator state is not converted",
    "cuda_rng_state": "random number generator state is not converted",
    "rng_tracker_states": "random number generator state is not converted",
    "rerun_state_machine": "trainer state",
    "modelopt_state": "state of an optimizer toolkit",
    "tokens": "a counter",
    "total_iters": "a counter",
    "content_metadata": "describes the optimizer state",
}


_NORM = re.compile(r"(?:decoder|encoder)\.final_layernorm\.weight")
_LAYER = re.compile(r"(?:decoder|encoder)\.layers\.(\d+)\.")


def add_arguments(parser: ArgumentParser, title: str) -> None:
    """Flags that every loader of Megatron's formats has."""
    group = parser.add_argument_group(f"loader {title}")
    group.add_argument("--iteration", metavar="N|release", type=rankdir.iteration,
                       help="which checkpoint of the directory (default: what the tracker file says)")  # fmt: skip
    group.add_argument("--release", dest="iteration", action="store_const", const="release",
                       help="the same as --iteration release")  # fmt: skip
    group.add_argument("--true-vocab-size", type=numbers.positive, metavar="N",
                       help="rows of the embedding that are tokens; the rest is padding and dropped")  # fmt: skip
    group.add_argument("--vocab-file", metavar="PATH", help="a JSON vocabulary: its length is the true vocabulary size")
    group.add_argument("--position-embedding-type", choices=("learned_absolute", "rope"),
                       help="compared with what is found")  # fmt: skip


#: Files of another format, beside which iterations are what an earlier output has left.
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")


def kind(top: Path, iteration: int | str | None = None) -> str | None:
    """The loader that a directory of Megatron's is for, of rank files by what the first holds; None for another.

    A file that cannot be read is megatron_mcore's, which says what is wrong with it.
    """
    names = [entry.name for entry in top.iterdir()] if top.is_dir() else []
    if rankdir.TRACKER not in names and not dcp.is_one(top) and not any(map(rankdir.parse_name, names)):
        iterations = rankdir.iterations(top)
        if not iterations or any(name.endswith(_WEIGHTS) for name in names):
            return None
        iteration = iterations[-1] if iteration is None else iteration  # all are of one run
    if msdir.recognises(str(top)) or (dcp.is_one(top) and (top / "params.json").is_file()):
        return None  # MindSpore's have a tracker of the same name; with Meta's params.json it is torchtitan's
    try:
        directory, _ = rankdir.find_iteration(top, iteration)
        if dcp.is_one(directory):
            return "megatron_dist"
        ranks = sorted(entry for entry in directory.iterdir() if rankdir.parse_name(entry.name))
        root: Any = torchzip.read(next(file for entry in ranks if (file := rankdir.model_file(entry))))
    except (CkptconvError, OSError, StopIteration):
        return "megatron_mcore"
    model = root.get("model", root.get("model0")) if isinstance(root, dict) else None
    said = getattr(root.get("args"), "__dict__", {}) if isinstance(root, dict) else {}
    while isinstance(model, dict) and list(model) == ["module"]:
        model = model["module"]
    if isinstance(model, dict) and gaudi.is_gaudi(said, map(str, model)):
        return "megatron_gaudi"
    if not isinstance(model, dict) or not megatron_legacy.is_legacy(map(str, model)):
        return "megatron_mcore"
    return "megatron_llm" if megatron_legacy.is_epfl(said) else "megatron_legacy"


def recognised(load_dir: str, loader: str) -> str | None:
    """Why a directory is for this one of the loaders of rank files, or None."""
    top = Path(load_dir)
    if kind(top) != loader:
        return None
    if (top / rankdir.TRACKER).is_file():
        return f"it has {rankdir.TRACKER}"
    if rankdir.iterations(top):
        return "it has iterations"
    return f"it has {dcp.METADATA}" if loader == "megatron_dist" else "it has mp_rank directories"


@dataclass
class Found:
    """What the files of one iteration hold. tensors: rank -> slot -> tensor; vpp: virtual stages of each stage.

    Of formats with other names than megatron-core's: `called` says what megatron-core calls a tensor (as far as the
    model as a whole is known by it), `table` the rows, `head_activation` what the transform in BERT's head has.
    `files`: what is read beside `paths`.
    """

    paths: dict[rankdir.Rank, Path]
    arguments: dict[str, Any]
    tensors: dict[rankdir.Rank, dict[str, LazyTensor]]
    ignored: dict[str, str] = field(default_factory=dict)
    vpp: int = 1
    called: Callable[[str], str] = str
    table: Callable[[ModelSpec], Sequence[Row]] | None = None
    head_activation: str = "gelu"
    files: list[Path] = field(default_factory=list)
    #: what the args say of the model (fields of ModelSpec), where they are not Megatron-LM's
    fields: Callable[[str], dict[str, Any]] | None = None
    #: the model with the linear biases that the format stores
    target: Callable[[ModelSpec], ModelSpec] = mcore.target_spec
    #: args that a saver of the same format takes over
    carried: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """tp, pp, ep."""
        tp, pp, ep = (1 + max(rank[axis] for rank in self.paths) for axis in range(3))
        return tp, pp, ep

    def chunk(self, stage: int, chunk: int) -> dict[str, LazyTensor]:
        """Tensors of a virtual stage on the first rank that holds it, by megatron-core's names."""
        prefix = slot_name(chunk if self.vpp > 1 else None, "")
        there = self.tensors.get((0, stage, 0), {})
        return {self.called(name.removeprefix(prefix)): t for name, t in there.items() if name.startswith(prefix)}


class Source:
    """One iteration: the model it holds, and which of its tensors have been used."""

    def __init__(
        self, args: Namespace, format: str, top: Path, directory: Path, iteration: int, found: Found
    ) -> None:
        self._format, self.top, self.directory, self.iteration = format, top, directory, iteration
        self._found, self.ignored = found, found.ignored
        self._paths, self._arguments, self._tensors = found.paths, found.arguments, found.tensors
        self._vocab_as_is = False
        self._provenance = self._read_provenance()
        self._companions = self._find_companions()
        self.spec, self.padded = self._model(args)
        self._compare(args)
        self.layout = self._layout()
        self._stored = found.target(self.spec)
        self._shards = Shards(self._tensors, self._paths, self.table(), self._stored, self.layout, self.padded)
        self._shards.check()
        self._settle_filled()

    def table(self) -> Sequence[Row]:
        """The format's rows, in the dialect of the names that were found."""
        if self._found.table is not None:
            return self._found.table(self.spec)
        return mcore.dialect(self._names()).table

    def _names(self) -> list[str]:
        return [name.rpartition("/")[2] for there in self._tensors.values() for name in there]

    def _read_provenance(self) -> dict[str, Any] | None:
        """What we noted when this iteration was written by us; None for a checkpoint of the trainer's."""
        path = self.directory / companions.PROVENANCE
        if not path.is_file():
            return None
        noted = companions.read_json(path)
        if not isinstance(noted.get("spec"), dict):
            raise SourceError(f"{path}: is not a provenance file of ckptconv. Remove it to go on without it.")
        return noted

    def _find_companions(self) -> dict[str, str]:
        for folder in (self.directory / companions.FOLDER, self.top / companions.FOLDER,
                       self.directory.parent / companions.FOLDER):  # fmt: skip
            found = companions.find(folder)
            if found:
                return found
        return {}

    # The model

    def _model(self, args: Namespace) -> tuple[ModelSpec, int]:
        where = str(self._paths[0, 0, 0])
        layers = self._layers(where)
        arguments = self._arguments if layers is None else megatron_layers.without(self._arguments)
        called = self._found.called
        everything = {called(n.rpartition("/")[2]): t for there in self._tensors.values() for n, t in there.items()}
        kind = "BERT" if mcore_bert.is_bert(everything) else "GPT"
        reasons = [] if self._found.fields else megatron_args.unsupported(arguments, kind)
        if reasons:
            raise SourceError(f"{where}: its args describe a model that is not supported yet: {'; '.join(reasons)}.")
        self._check_counts(where)
        say = self._found.fields or partial(megatron_args.spec_of, arguments, model_type=kind)
        values = say(where) | (layers or {})
        first = self._found.chunk(0, 0)
        embedding = first.get("embedding.word_embeddings.weight")
        if embedding is None:
            raise SourceError(
                f"{where}: has no embedding.word_embeddings.weight; it has {some(first)}. "
                "Is this a GPT model of megatron-core?"
            )
        padded = embedding.shape[0] * len({t for t, _, _ in self._paths})
        if kind == "BERT":
            values |= mcore_bert.fields(everything, values["activation"], self._found.head_activation)
        values |= {"dtype": embedding.dtype, "vocab_size": self._vocabulary(args, padded), "family": ""}
        try:
            spec = ModelSpec(**values)
        except SourceError as error:
            raise SourceError(f"{where}: its args: {error}") from error
        return self._named(spec), padded

    def _check_counts(self, where: str) -> None:
        """Raise SourceError for more layers or experts than tensors, before they are counted out."""
        held = sum(len(tensors) for (t, _, _), tensors in self._tensors.items() if t == 0)
        counts = {"num_layers": "layers", "encoder_num_layers": "layers", "mtp_num_layers": "MTP layers",
                  "num_experts": "experts"}  # fmt: skip
        for name, what in counts.items():
            value = self._arguments.get(name)
            if isinstance(value, int) and value > held:
                raise SourceError(f"{where}: its args say {value} {what}, but the stages hold {held} tensors.")

    def _layers(self, where: str) -> dict[str, Any] | None:
        """What a model with layers of its own (--spec) is; None for one of GPTModel's.

        The args hold the settings of our layers; of others, whose post_layernorm shows that they have norms behind
        attention and the MLP, the config.json kept with the checkpoint has to tell. Raises SourceError.
        """
        ours = megatron_layers.stands_for(self._arguments.get("spec"))
        if not ours and not any(".post_layernorm." in name for name in self._tensors[0, 0, 0]):
            return None
        told = self._arguments.get(megatron_layers.ATTRIBUTE)
        if ours and told is not None:
            return megatron_layers.fields(told, where)
        for path in (self.directory / megatron_layers.FILE, self.top / megatron_layers.FILE):
            if path.is_file():
                return megatron_layers.fields(companions.read_json(path), str(path))
        known = self._known()
        if known is None:
            raise SourceError(
                f"{where}: its layers are not GPTModel's (--spec), and nothing says their soft caps, scales and "
                f"multipliers. Put the {megatron_layers.FILE} they were built with, or the model's config.json as "
                f"{companions.FOLDER}/{companions.CONFIG}, into {self.top}."
            )
        return megatron_layers.of(known)

    def _vocabulary(self, args: Namespace, padded: int) -> int:
        """Rows that are tokens. Told by a flag, noted by us, said by the args or config.json; else all rows."""
        noted = (self._provenance or {}).get("spec", {}).get("vocab_size")
        config = companions.read_config(self._companions) or {}
        told = args.true_vocab_size
        if told is None and args.vocab_file:
            told = len(companions.read_json(args.vocab_file))
        if told is not None and not 0 < told <= padded:
            raise SourceError(
                f"{self.directory}: --true-vocab-size (or --vocab-file) says {told}, expected 1 to {padded}, the "
                "rows of the embedding."
            )
        for value in (told, noted, config.get("vocab_size"), self._arguments.get("vocab_size")):
            if isinstance(value, int) and 0 < value <= padded:
                return value
        log.warning(
            "loader: nothing says how many of the %d embedding rows are tokens: all are kept. "
            "--true-vocab-size drops padding.", padded
        )  # fmt: skip
        self._vocab_as_is = True
        return padded

    def _known(self) -> ModelSpec | None:
        """The model as we noted it, or as the config.json kept with the checkpoint says."""
        noted = (self._provenance or {}).get("spec")
        if noted:
            return ModelSpec.from_json(noted, str(self.directory / companions.PROVENANCE))
        config = companions.read_config(self._companions)
        if config is None:
            return None
        where = self._companions[companions.CONFIG]
        try:
            return families.of_config(config, where).spec(config, where)
        except CkptconvError as error:
            log.warning("loader: the config.json kept with the checkpoint is of no use: %s", error)
            return None

    def _named(self, spec: ModelSpec) -> ModelSpec:
        """The family, and the biases that were only written because Megatron's linears have all or none."""
        known = self._known()
        if known is None:
            return spec
        ignore = ("family", "dtype", "seq_length", "qkv_bias", "dense_bias", "mlp_bias", "vocab_size")
        same, target = not differences(known, spec, (*ignore, "rope", "max_position_embeddings")), self._found.target
        if not same or target(known) != target(known.replace(
            qkv_bias=spec.qkv_bias, dense_bias=spec.dense_bias, mlp_bias=spec.mlp_bias)):  # fmt: skip
            return spec
        changes: dict[str, Any] = {
            name: getattr(known, name) for name in ("family", "qkv_bias", "dense_bias", "mlp_bias")
        }
        if self._provenance is not None:
            # The args cannot carry every rope setting; what we noted for these very weights can.
            changes |= {name: getattr(known, name) for name in ("rope", "max_position_embeddings", "seq_length")}
        return spec.replace(**changes)

    def _compare(self, args: Namespace) -> None:
        """Warn when a flag says something else than the checkpoint, which is right."""
        told = getattr(args, "position_embedding_type", None)
        found = "learned_absolute" if self.spec.learned_positions else "rope" if self.spec.rope else "none"
        if told not in (None, found):
            log.warning("loader: --position-embedding-type %s is not used: the checkpoint says %s", told, found)

    def _layout(self) -> Layout:
        """Which layers lie where, as the files hold them. Raises SourceError."""
        tp, pp, ep = self._found.sizes
        counts, mtp, norm = [], None, None
        for number in range(pp * self._found.vpp):
            chunk, stage = divmod(number, pp)
            names = self._found.chunk(stage, chunk)
            counts.append(len({match[1] for name in names if (match := _LAYER.match(name))}))
            if any(name.startswith("mtp.") for name in names):
                mtp = stage, chunk
            if any(_NORM.match(name) for name in names):
                norm = stage, chunk
        if sum(counts) != self.spec.num_layers:
            raise SourceError(
                f"{self.directory}: its args say {self.spec.num_layers} layers, but the stages hold "
                f"{' + '.join(map(str, counts))}. Files of another checkpoint, or args that were edited?"
            )
        experts = self.spec.moe.num_experts if self.spec.moe else 0
        return Layout(
            self.spec.num_layers, tp, pp, ep, experts, self._found.vpp, tuple(counts), mtp=mtp, final_norm=norm
        )

    # Biases written as zeros

    def _settle_filled(self) -> None:
        """Biases that the source lacked are dropped if they still are zero; trained ones become part of the model."""
        if self._stored == self.spec:
            return
        groups = {"qkv_bias": ("qkv bias",), "dense_bias": ("dense bias",),
                  "mlp_bias": ("mlp l0 bias", "mlp l0 bias W", "mlp l0 bias V", "mlp l1 bias")}  # fmt: skip
        for name, keys in groups.items():
            if getattr(self.spec, name) or not getattr(self._stored, name):
                continue
            for message in self._shards.messages.values():
                trained = [
                    key for key in keys
                    if key in message.shapes and not lazy.all_zero(self._shards.joined(message, key))
                ]  # fmt: skip
                if trained:
                    log.warning("loader: %r of %r is not zero: the model has %s now", trained[0], message.name, name)
                    self.spec = self.spec.replace(**dict.fromkeys(self._together(name), True))
                    break
            else:
                self.ignored[name] = "zeros that Megatron's all-or-none linear biases needed"

    def _together(self, name: str) -> list[str]:
        """The spec fields that the family's config.json says with the same key (attention_bias: qkv and dense)."""
        fields = families.get(self.spec.family).fields if self.spec.family else ()
        key = next((field.key for field in fields if field.spec == name), None)
        return [field.spec for field in fields if key and field.key == key] or [name]

    # The stream

    def metadata(self) -> Metadata:
        """The first message."""
        divisor = self._arguments.get("make_vocab_size_divisible_by")
        kind, model = (self._arguments.get(name) for name in ("tokenizer_type", "tokenizer_model"))
        return Metadata(
            spec=self.spec,
            origin=Origin(self._format, str(self.directory), stream.stamps([*self._paths.values(), *self._found.files]),
                          self._companions,
                          [f"ignored {name}: {reason}" for name, reason in sorted(self.ignored.items())]),
            iteration=self.iteration,
            tp=self.layout.tp,
            pp=self.layout.pp,
            ep=self.layout.ep,
            make_vocab_size_divisible_by=divisor if isinstance(divisor, int) else None,
            tokenizer_type=kind if isinstance(kind, str) else None,
            tokenizer_model=model if isinstance(model, str) else None,
            vocab_as_is=self._vocab_as_is,
            arguments=self._found.carried,
        )  # fmt: skip

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The full tensors of one message, not read."""
        return {key: self._shards.joined(self._shards.messages[message.name], key) for key in message.shapes}

    def holdings(self) -> stream.Holdings:
        """What lies on which rank."""
        return self._shards.holdings()
