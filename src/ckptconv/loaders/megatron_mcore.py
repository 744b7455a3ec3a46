"""Megatron-Core checkpoints in the `torch` format, of any tensor and pipeline parallel size.

Sizes are found from the directory names and the pickled args, which are read without Megatron and without running
anything. Tensors are joined over ranks; those every rank has must be equal.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptconv import companions, families, lazy, numbers, stream
from ckptconv.containers import rankdir, torchzip
from ckptconv.errors import CkptconvError, SourceError, near, some
from ckptconv.formats import mcore, mcore_bert, megatron_args, megatron_layers
from ckptconv.layout import Layout
from ckptconv.lazy import LazyTensor
from ckptconv.messages import Expected, expected
from ckptconv.metadata import Metadata, Origin
from ckptconv.ops import Tile, assemble
from ckptconv.sharding import Placement, place
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


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    folder = Path(load_dir)
    if (folder / rankdir.TRACKER).is_file():
        return f"it has {rankdir.TRACKER}"
    if folder.is_dir() and any(rankdir.parse_name(entry.name) for entry in folder.iterdir()):
        return "it has mp_rank directories"
    return None


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    group = parser.add_argument_group("loader megatron_mcore")
    group.add_argument("--iteration", metavar="N|release", type=rankdir.iteration,
                       help="which checkpoint of the directory (default: what the tracker file says)")  # fmt: skip
    group.add_argument("--true-vocab-size", type=numbers.positive, metavar="N",
                       help="rows of the embedding that are tokens; the rest is padding and dropped")  # fmt: skip
    group.add_argument("--vocab-file", metavar="PATH", help="a JSON vocabulary: its length is the true vocabulary size")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError."""
    stream.send(queue, _Source(args))


class _Source:
    """One iteration: its rank files, the model they hold, and which of their tensors have been used."""

    def __init__(self, args: Namespace) -> None:
        self.top = Path(args.load_dir)
        self.directory, self.iteration = rankdir.find_iteration(self.top, args.iteration)
        self._paths, self._arguments = rankdir.rank_files(self.directory)
        tp, pp, ep = (1 + max(rank[axis] for rank in self._paths) for axis in range(3))
        self._read(tp, pp, ep)
        self._provenance = self._read_provenance()
        self._companions = self._find_companions()
        self.spec, self.padded = self._model(args)
        self.layout = Layout(self.spec.num_layers, tp, pp, ep, self.spec.moe.num_experts if self.spec.moe else 0)
        self._stored = mcore.target_spec(self.spec) if self._filled() else self.spec
        self._messages = {message.name: message for message in expected(self._stored)}
        names = [name for stage in self._tensors.values() for name in stage]
        self._places: dict[str, list[Placement]] = {}
        self._table = mcore.dialect(names).table
        self._check_names()
        self._settle_filled()
        self._check_replicas()

    # Files

    def _read(self, tp: int, pp: int, ep: int) -> None:
        self._tensors: dict[rankdir.Rank, dict[str, LazyTensor]] = {}
        self.ignored: dict[str, str] = {}
        for rank, path in self._paths.items():
            root = torchzip.read(str(path))
            model = self._model_part(path, root)
            self._tensors[rank] = {}
            for name, value in model.items():
                name = name.removeprefix("module.")
                rule = next((rule for rule in mcore.IGNORE if name.endswith(rule.suffix)), None)
                if rule:
                    self.ignored["*" + rule.suffix] = rule.reason
                elif isinstance(value, LazyTensor):
                    self._tensors[rank] |= mcore.unpacked(name, value, self._local_experts(ep))
                else:
                    raise SourceError(f"{path}: {name} is a {type(value).__name__}, expected a tensor.")
        for name, said in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp),
                           ("expert_model_parallel_size", ep)):  # fmt: skip
            value = self._arguments.get(name)
            if isinstance(value, int) and value != said:
                raise SourceError(
                    f"{self.directory}: the args say {name} {value}, but there are {said} such ranks "
                    f"({some(str(p.parent.name) for p in self._paths.values())}). Are rank directories missing?"
                )

        etp = self._arguments.get("expert_tensor_parallel_size")
        if self._arguments.get("num_experts") and etp not in (None, tp):
            raise SourceError(
                f"{self.directory}: the args say expert_tensor_parallel_size {etp} and tensor_model_parallel_size "
                f"{tp}: in the torch format ranks of the one overwrite files of the other, so experts are lost. Save "
                "again in the torch_dist format."
            )

    def _local_experts(self, ep: int) -> int:
        """Experts of one rank; 0 where the args do not say."""
        experts = self._arguments.get("num_experts")
        return experts // ep if isinstance(experts, int) and experts % ep == 0 else 0

    def _model_part(self, path: Path, root: Any) -> dict[str, Any]:
        if not isinstance(root, dict):
            raise SourceError(f"{path}: holds a {type(root).__name__}, expected a dict with a 'model'.")
        if "model0" in root:
            raise SourceError(f"{path}: has virtual pipeline stages (model0, ...), which are not supported yet.")
        model = root.get("model")
        if not isinstance(model, dict):
            raise SourceError(f"{path}: has no 'model'; it has {some(str(key) for key in root)}.")
        unknown = [str(key) for key in root if key != "model" and key not in NOT_WEIGHTS]
        if unknown:
            raise SourceError(f"{path}: has {some(unknown)} beside the model, which no rule knows. They would be lost.")
        self.ignored |= {key: NOT_WEIGHTS[key] for key in root if key != "model"}
        names = [str(name) for name in model]
        for mark, what in mcore.FOREIGN.items():
            found = next((name for name in names if mark in name), None)
            if found:
                raise SourceError(f"{path}: holds {found}: {what}, which this loader does not read.")
        return model

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
        everything = {name: tensor for stage in self._tensors.values() for name, tensor in stage.items()}
        kind = "BERT" if mcore_bert.is_bert(everything) else "GPT"
        reasons = megatron_args.unsupported(arguments, kind)
        if reasons:
            raise SourceError(f"{where}: its args describe a model that is not supported yet: {'; '.join(reasons)}.")
        self._check_counts(where)
        values = megatron_args.spec_of(arguments, where, kind) | (layers or {})
        embedding = self._tensors[0, 0, 0].get("embedding.word_embeddings.weight")
        if embedding is None:
            raise SourceError(
                f"{where}: has no embedding.word_embeddings.weight; it has {some(self._tensors[0, 0, 0])}. "
                "Is this a GPT model of megatron-core?"
            )
        padded = embedding.shape[0] * len({t for t, _, _ in self._paths})
        if kind == "BERT":
            values |= mcore_bert.fields(everything, values["activation"])
        values |= {"dtype": embedding.dtype, "vocab_size": self._vocabulary(args, padded), "family": ""}
        try:
            spec = ModelSpec(**values)  # type: ignore[arg-type]
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
                f"{self.directory}: the true vocabulary was said to be {told}, but the embedding has {padded} rows."
            )
        for value in (told, noted, config.get("vocab_size"), self._arguments.get("vocab_size")):
            if isinstance(value, int) and 0 < value <= padded:
                return value
        log.warning(
            "loader: nothing says how many of the %d embedding rows are tokens: all are kept. "
            "--true-vocab-size drops padding.", padded
        )  # fmt: skip
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
        same = not differences(known, spec, (*ignore, "rope", "max_position_embeddings"))
        if not same or mcore.target_spec(known) != mcore.target_spec(known.replace(
            qkv_bias=spec.qkv_bias, dense_bias=spec.dense_bias, mlp_bias=spec.mlp_bias)):  # fmt: skip
            return spec
        changes: dict[str, Any] = {
            name: getattr(known, name) for name in ("family", "qkv_bias", "dense_bias", "mlp_bias")
        }
        if self._provenance is not None:
            # The args cannot carry every rope setting; what we noted for these very weights can.
            changes |= {name: getattr(known, name) for name in ("rope", "max_position_embeddings", "seq_length")}
        return spec.replace(**changes)

    # Biases written as zeros

    def _filled(self) -> bool:
        return mcore.target_spec(self.spec) != self.spec

    def _settle_filled(self) -> None:
        """Biases that the source lacked are dropped if they still are zero; trained ones become part of the model."""
        if self._stored == self.spec:
            return
        groups = {"qkv_bias": ("qkv bias",), "dense_bias": ("dense bias",),
                  "mlp_bias": ("mlp l0 bias", "mlp l0 bias W", "mlp l0 bias V", "mlp l1 bias")}  # fmt: skip
        for name, keys in groups.items():
            if getattr(self.spec, name) or not getattr(self._stored, name):
                continue
            for message in self._messages.values():
                trained = [
                    key for key in keys
                    if key in message.shapes and not lazy.all_zero(self._joined(message, key))
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

    # Names: every tensor is used or ignored by a rule

    def _placed(self, message: Expected) -> list[Placement]:
        if message.name not in self._places:
            placed = place(self._table, message, self._stored, self.layout, self.padded)
            self._places[message.name] = placed
        return self._places[message.name]

    def _check_names(self) -> None:
        placed = [p for m in self._messages.values() for p in self._placed(m)]
        for rank, path in self._paths.items():
            wanted = {p.name: p for p in placed if p.stage == rank[1] and rank[2] in p.ep_ranks}
            there = self._tensors[rank]
            missing = [name for name in wanted if name not in there]
            extra = [name for name in there if name not in wanted]
            if missing:
                raise SourceError(
                    f"{path}: lacks {some(missing)}; the args say a model of {self.spec.num_layers} layers on "
                    f"{self.layout.pp} stages.{near(missing[0], extra)}"
                )
            if extra:
                raise SourceError(f"{path}: holds {some(extra)}, which no rule knows. They would be lost.")
            for name, placement in wanted.items():
                placement.row.cut.check(name, placement.shapes, self.layout.tp, self.spec)
                if there[name].shape != placement.part_shape:
                    raise SourceError(
                        f"{path}: {name} is {list(there[name].shape)}, expected {list(placement.part_shape)} "
                        f"from the args (tp {self.layout.tp})."
                    )
                first = self._tensors[0, rank[1], placement.ep_ranks[0]][name]
                if there[name].dtype != first.dtype:
                    raise SourceError(f"{path}: {name} is {there[name].dtype}, on rank 0 it is {first.dtype}.")

    def _check_replicas(self) -> None:
        """Tensors that every rank has must be the same on all: a free check of the checkpoint's integrity."""
        for message in self._messages.values():
            for placement in self._placed(message):
                for t in range(1 if placement.row.cut.replicated else self.layout.tp):
                    self._check_equal(placement, t)
                if placement.row.copy:
                    self._check_copy(message, placement)

    def _check_equal(self, placement: Placement, t: int) -> None:
        """The part of tensor rank `t` on all expert ranks, or on every rank what none of them cuts."""
        first, *others = (
            (rank, self._tensors[rank][placement.name])
            for rank in self._paths
            if rank[1] == placement.stage and rank[2] in placement.ep_ranks
            and (rank[0] == t or placement.row.cut.replicated)
        )  # fmt: skip
        for rank, tensor in others:
            if not lazy.equal(first[1], tensor):
                raise SourceError(
                    f"{self._paths[rank]}: {placement.name} differs from that in {self._paths[first[0]].parent.name}, "
                    "but both ranks must hold the same. The ranks have drifted apart or are of different checkpoints."
                )

    def _check_copy(self, message: Expected, placement: Placement) -> None:
        """A tensor that repeats another of the same model."""
        key = placement.keys[0]
        first = next(p for p in self._placed(message) if key in p.keys and not p.row.copy)
        for t in range(self.layout.tp):
            rank = (t, placement.stage, 0)
            one, other = self._tensors[t, first.stage, 0][first.name], self._tensors[rank][placement.name]
            if not lazy.equal(one, other):
                raise SourceError(
                    f"{self._paths[rank]}: {placement.name} differs from {first.name} on stage {first.stage}, but the "
                    "args of the checkpoint make them one (untie_embeddings_and_output_weights, mtp_num_layers, or the "
                    "shared norm of custom layers)."
                )

    # The stream

    def metadata(self) -> Metadata:
        """The first message."""
        divisor = self._arguments.get("make_vocab_size_divisible_by")
        kind, model = (self._arguments.get(name) for name in ("tokenizer_type", "tokenizer_model"))
        return Metadata(
            spec=self.spec,
            origin=Origin("megatron_mcore", str(self.directory), stream.stamps(self._paths.values()), self._companions,
                          [f"ignored {name}: {reason}" for name, reason in sorted(self.ignored.items())]),
            iteration=self.iteration,
            tp=self.layout.tp,
            pp=self.layout.pp,
            ep=self.layout.ep,
            make_vocab_size_divisible_by=divisor if isinstance(divisor, int) else None,
            tokenizer_type=kind if isinstance(kind, str) else None,
            tokenizer_model=model if isinstance(model, str) else None,
        )  # fmt: skip

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The full tensors of one message, not read."""
        return {key: self._joined(self._messages[message.name], key) for key in message.shapes}

    def _joined(self, message: Expected, key: str) -> LazyTensor:
        tiles: list[Tile] = []
        parts: list[LazyTensor] = []
        shape = message.shapes[key]
        for placement in self._placed(message):
            if key not in placement.keys or placement.row.copy:
                continue
            ranks = 1 if placement.row.cut.replicated else self.layout.tp
            tiles += [
                replace(tile, part=tile.part + len(parts)) for tile in placement.tiles(key) if tile.part < ranks
            ]
            parts += [self._part((t, placement.stage, placement.ep_ranks[0]), placement) for t in range(ranks)]
            if placement.expert is None:
                shape = placement.shapes[placement.keys.index(key)]
        whole = assemble(tiles, parts, shape)
        rows = message.shapes[key][0]
        return whole if whole.shape[0] == rows else whole.narrow_rows(0, rows)

    def _part(self, rank: rankdir.Rank, placement: Placement) -> LazyTensor:
        tensor = self._tensors[rank][placement.name]
        return tensor.seen(placement.seen_shape) if placement.row.vector else tensor
