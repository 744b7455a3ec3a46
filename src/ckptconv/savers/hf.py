"""Hugging Face directories that transformers 4 and 5 both read: config, safetensors shards with index, tokenizer."""

from __future__ import annotations

import json
import logging
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from ckptconv import companions, dtypes, families, lazy, numbers, ops, writing
from ckptconv.containers import hfdir, safetensors, torchzip
from ckptconv.containers.plan import PlannedFile, Slot
from ckptconv.errors import TableError, TargetError, UsageError, some
from ckptconv.families import quantised
from ckptconv.families.family import NOT_IN_CONFIG, Family, Row
from ckptconv.families.rope import dual
from ckptconv.lazy import LazyTensor, matrix
from ckptconv.messages import Expected, expected
from ckptconv.metadata import Metadata
from ckptconv.ops import PLAIN, Tile
from ckptconv.quantised import Fp8Codes, Fp8Scales, rounded
from ckptconv.spec import ModelSpec, differences
from ckptconv.staging import staged
from ckptconv.tokenizers import choice
from ckptconv.writing import Build, Route, Routes

log = logging.getLogger("ckptconv.saver")

#: The loader that reads what this writes (for --verify).
LOADER = "hf"
INDEX = "model.safetensors.index.json"
#: What an earlier output may have left that would be taken for part of this one, or for what is in the directory.
_STALE = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|latest_checkpointed_iteration\.txt|checkpoint\.pt"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    group = parser.add_argument_group("saver hf")
    group.add_argument("--max-shard-size", type=numbers.size, default=numbers.size("5GB"), metavar="SIZE",
                       help="largest weight file, such as 5GB or 500MB (default 5GB)")  # fmt: skip
    group.add_argument("--num-output-shards", type=numbers.positive, metavar="N",
                       help="exactly so many weight files, of about the same size, instead of --max-shard-size"
                       )  # fmt: skip
    group.add_argument("--quantize", choices=("fp8",),
                       help="write linears as DeepSeek-V3 does: E4M3 with a scale per block of 128x128")  # fmt: skip
    group.add_argument("--full-state-file", action="store_true",
                       help=f"write all weights into one torch file, {hfdir.FULL}, instead of safetensors")  # fmt: skip
    choice.add_arguments(parser)


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    with staged(args) as staging:
        metadata = queue.metadata()
        family, config, notes = _config(metadata, args)
        tokenizer = choice.choose(metadata, args)
        if tokenizer is not None:
            unsettled, config = config, choice.settled(config, tokenizer)
            if config != unsettled:
                notes.append(f"config.json has the tokenizer's ids now: {some(choice.changes(unsettled, config))}.")
        coded = getattr(args, "quantize", None) is not None
        if coded:
            config = {**config, **_quantization(metadata.spec, family)}
            notes.append("linears are quantised to fp8 in blocks of 128x128: digests are of what is read back.")
        single = getattr(args, "full_state_file", False)
        number = getattr(args, "num_output_shards", None)
        if single and number:
            raise UsageError("--num-output-shards: with --full-state-file there is one file.")
        limit = 0 if single else args.max_shard_size
        shards, routes, builds, reread = _plan(metadata, family, limit, coded, number)
        plans: dict[str, PlannedFile] = {name: _file(name, slots) for name, slots in shards.items()}
        limits = {"max_shard_size": args.max_shard_size, "fp8": coded, "single": single, "shards": number}
        mark = writing.fingerprint(metadata, saver="hf", **limits)
        written = writing.write(queue, staging, plans, routes, [], metadata, args, mark, builds, reread)
        small = choice.small_files(metadata, args, config, tokenizer)
        for name, content in small.items():
            staging.add(name, content if isinstance(content, bytes) else companions.read(content))
        target = {"format": "hf", "family": family.name, "notes": notes}
        staging.add(companions.PROVENANCE, writing.provenance(metadata, target, written.digests))
        last = [companions.CONFIG]
        if len(shards) > 1:
            staging.add(INDEX, _index(shards))
            last.insert(0, INDEX)
        staging.add(companions.CONFIG, _config_bytes(metadata, config))
        there = [name for name in staging.present() if name not in (*shards, *small)]
        of_tokenizer = any(map(companions.is_tokenizer, small))
        stale = [n for n in there if _STALE.fullmatch(n) or (of_tokenizer and companions.is_tokenizer(n))]
        staging.publish([*shards, *small, companions.PROVENANCE], last, stale)
    for note in notes:
        log.warning("saver: %s", note)
    return {"bytes": written.bytes, "digests": written.digests}


def _config(metadata: Metadata, args: Namespace) -> tuple[Family, dict[str, Any], list[str]]:
    """(family, config.json to write, what to tell the user). The source's own file is kept when it says this model."""
    spec, notes = metadata.spec, []
    original = companions.read_config(metadata.origin.companions)
    if original is not None and quantised.KEY in original:
        original = quantised.without(original, spec.dtype)
        notes.append(f"config.json says {spec.dtype}, where the source's says {quantised.KEY}.")
    if original is not None:
        where = metadata.origin.companions[companions.CONFIG]
        family = families.of_config(original, where)
        said = family.spec(original, where)
        unlike = differences(said, spec, NOT_IN_CONFIG)
        if not unlike:
            config = family.spelled(dual(original, family.rope, family.tied_by_default))
            stored = original.get("torch_dtype") or original.get("dtype")
            # An HF source whose config asks for a conversion at load time keeps asking for it.
            ours = bool(args.dtype_name) or metadata.origin.format != "hf"
            if stored and ours and dtypes.parse(stored, where) != spec.dtype:
                config = {**config, "torch_dtype": spec.dtype, "dtype": spec.dtype}
            if config is not original:
                added = [key for key in config if config.get(key) != original.get(key)]
                notes.append(f"config.json is the source's, with {some(added)} added so that every reader agrees.")
            return family, config, notes
        notes.append(f"config.json was rebuilt: the source's says another model than its weights ({some(unlike, 3)}).")
        if not family.refusals(spec):
            return family, {**_harmless(original, family), **family.config(spec)}, notes
    family = _choose(spec)
    if original is None:
        notes.append(
            f"config.json was rebuilt from the source's own arguments as a {family.name} model, as none came with it; "
            "check special token ids, and give --tokenizer-model if there are no tokenizer files."
        )
    return family, family.config(spec), notes


def _harmless(original: dict[str, Any], family: Family) -> dict[str, Any]:
    """Keys of the source's config that say nothing about sizes: token ids, names."""
    known = {field.key for field in family.fields} | {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}
    return {key: value for key, value in original.items() if key not in known}


def _choose(spec: ModelSpec) -> Family:
    family = families.get(spec.family) if spec.family else families.for_spec(spec)
    reasons = family.refusals(spec)
    if reasons:
        other = families.for_spec(spec)
        log.warning("saver: written as %s, as %s cannot say: %s", other.name, family.name, some(reasons, 3))
        return other
    return family


def _config_bytes(metadata: Metadata, config: dict[str, Any]) -> bytes:
    """The source's bytes when nothing changed, else JSON in transformers' style."""
    path = metadata.origin.companions.get(companions.CONFIG)
    if path and companions.read_json(path) == config:
        return companions.read(path)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _quantization(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """What config.json says of quantised weights. Raises TargetError for what fp8 blocks cannot store."""
    placed = [(message, row) for message in expected(spec) for row in family.rows_of(message, spec)]
    reasons = quantised.refusals(family, spec, [row for _, row in placed])
    if reasons:
        raise TargetError(f"--quantize fp8: {some(reasons)}. Nothing was written. Leave the flag out.")
    skipped = []
    for message, row in placed:
        if message.layer is not None and not quantised.is_linear(row):
            shapes = row.op.part_shapes(row.shapes(message), spec)
            names = [family.written(name, spec) for name in row.stored(message.layer, spec)]
            skipped += [n.removesuffix(".weight") for n, shape in zip(names, shapes, strict=True) if len(shape) > 1]
    dtype = {"torch_dtype": spec.dtype, "dtype": spec.dtype}
    return {**dtype, quantised.KEY: quantised.config_of(family, skipped)}


class _Split:
    """Stored tensors made of those of a message. The last message's are kept, as each is asked for one by one."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._tensors: dict[str, LazyTensor] = {}
        self._made: dict[int, list[LazyTensor]] = {}

    def row(self, tensors: dict[str, LazyTensor], row: Row) -> list[LazyTensor]:
        """What a row stores, as its op has it."""
        if tensors is not self._tensors:
            self._tensors, self._made = tensors, {}
        if id(row) not in self._made:
            self._made[id(row)] = ops.split(row.op, [tensors[key] for key in row.keys], self._spec)
        return self._made[id(row)]

    def stored(self, tensors: dict[str, LazyTensor], row: Row, part: int) -> LazyTensor:
        """A stored tensor that is not made of rectangles of message tensors."""
        return row.view.stored(self.row(tensors, row)[part])

    def codes(self, tensors: dict[str, LazyTensor], row: Row, part: int, name: str) -> LazyTensor:
        """The codes of a quantised weight."""
        return Fp8Codes(self.row(tensors, row)[part], quantised.BLOCK, name)

    def scales(self, tensors: dict[str, LazyTensor], row: Row, part: int, name: str) -> LazyTensor:
        """The scales of a quantised weight."""
        return Fp8Scales(self.row(tensors, row)[part], quantised.BLOCK, name)

    def reread(self, tensors: dict[str, LazyTensor], rows: list[tuple[Row, list[str]]]) -> dict[str, LazyTensor]:
        """Message tensors that are quantised, as they are read back, or not stored. Raises TargetError."""
        made: dict[str, LazyTensor] = {}
        for row, names in rows:
            if isinstance(row.op, ops.Constant):
                self.check(tensors, row, row.op)
                continue
            stored = zip(self.row(tensors, row), names, strict=True)
            parts = [rounded(part, quantised.BLOCK, self._spec.dtype, name) for part, name in stored]
            wholes = ops.fuse(row.op, parts, [tensors[key].shape for key in row.keys], self._spec)
            made |= zip(row.keys, wholes, strict=True)
        return made

    def check(self, tensors: dict[str, LazyTensor], row: Row, op: ops.Constant) -> None:
        """Raise TargetError unless keys that are not stored are what a reader takes them for."""
        for key in row.keys:
            if not lazy.equal(tensors[key], op.whole(tensors[key].shape, tensors[key].dtype)):
                raise TargetError(
                    f"{key!r} is not {int(op.ones)} everywhere, but a model of this family has no such tensor to store "
                    "it in: it was trained, and would be lost."
                )


Reread = dict[str, Callable[[dict[str, LazyTensor]], dict[str, LazyTensor]]]


def _plan(
    metadata: Metadata, family: Family, limit: int, coded: bool, number: int | None = None
) -> tuple[dict[str, list[Slot]], Routes, dict[str, list[Build]], Reread]:
    """(file -> slots, where each message tensor goes, what is made of those of a message, what is read back).

    Shards are filled in message order up to `limit` bytes (0: all goes into one torch file), or there are `number` of
    them. `coded`: linears are quantised. Raises TargetError.
    """
    spec = metadata.spec
    stored: list[Slot] = []
    placed: list[tuple[Expected, Row, list[str]]] = []
    copies: list[tuple[str, str, str]] = []

    for message in expected(spec):
        for row in family.rows_of(message, spec):
            keys = row.shapes(message)
            names = [family.written(name, spec) for name in row.stored(message.layer, spec)]
            dtype = _dtype(metadata, message, row)
            for name, part in zip(names, row.op.part_shapes(keys, spec), strict=True):
                if coded and quantised.is_linear(row):
                    stored += quantised.slots(name, part)
                else:
                    stored.append(Slot(name, dtype, row.view.shape(part)))
            placed.append((message, row, names))
        for duplicate in family.duplicates:
            if duplicate.written and duplicate.message == message.name and duplicate.when(spec):
                for name in duplicate.stored(spec):
                    dtype = metadata.dtype(message.name, duplicate.key)
                    stored.append(Slot(name, dtype, message.shapes[duplicate.key]))
                    copies.append((message.name, duplicate.key, name))
    groups = _shards(stored, limit, number)
    where = {slot.name: n for n, group in enumerate(groups) for slot in group}
    count = len(groups)
    files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    files = files if count > 1 else ["model.safetensors" if limit else hfdir.FULL]
    routes: Routes = {}
    builds: dict[str, list[Build]] = {}
    changed: dict[str, list[tuple[Row, list[str]]]] = {}
    split = _Split(spec)
    for message, row, names in placed:
        quantise = coded and quantised.is_linear(row)
        for index, key in enumerate(row.keys):
            tiles = row.op.tiles(row.shapes(message), index, spec) if row.view == PLAIN and not quantise else []
            routes[message.name, key] = Route([(files[where[names[t.part]]], names[t.part], t) for t in tiles])
        own = builds.setdefault(message.name, []) if row.view != PLAIN or quantise else []
        for number, name in enumerate(names if quantise else ()):
            codes, scales = (partial(make, row=row, part=number, name=name) for make in (split.codes, split.scales))
            own.append(Build(files[where[name]], name, codes))
            own.append(Build(files[where[name + quantised.SUFFIX]], name + quantised.SUFFIX, scales))
        for number, name in enumerate(names if row.view != PLAIN else ()):
            own.append(Build(files[where[name]], name, partial(split.stored, row=row, part=number)))
        if quantise or isinstance(row.op, ops.Constant):
            changed.setdefault(message.name, []).append((row, names))
    for message_name, key, name in copies:
        rows, cols = matrix(groups[where[name]][[s.name for s in groups[where[name]]].index(name)].shape)
        routes[message_name, key].targets.append((files[where[name]], name, Tile(0, 0, 0, 0, 0, rows, cols)))
    reread: Reread = {name: partial(split.reread, rows=rows) for name, rows in changed.items()}
    return dict(zip(files, groups, strict=True)), routes, builds, reread


def _shards(slots: list[Slot], limit: int, number: int | None) -> list[list[Slot]]:
    """Runs of slots: of up to `limit` bytes (0: one run), or `number` of about the same size. Raises TargetError."""
    if number and number > len(slots):
        raise TargetError(f"--num-output-shards {number}: the model has {len(slots)} tensors, a file needs one.")
    groups: list[list[Slot]] = [[]]
    filled, left = 0, sum(slot.nbytes for slot in slots)
    for index, slot in enumerate(slots):
        full = limit and filled + slot.nbytes > limit
        if number:
            runs, rest = number - len(groups), len(slots) - index  # both still to come
            share = (filled + left) / (runs + 1)
            full = runs and (filled + slot.nbytes / 2 > share or rest == runs)
        if groups[-1] and full:
            groups.append([])
            filled = 0
        groups[-1].append(slot)
        filled, left = filled + slot.nbytes, left - slot.nbytes
    return groups


def _dtype(metadata: Metadata, message: Expected, row: Row) -> str:
    kinds = {metadata.dtype(message.name, key) for key in row.keys}
    if len(kinds) > 1 and len(row.keys) > len(row.names):
        raise TargetError(
            f"{row.names[0]}: its parts {' and '.join(row.keys)} are {' and '.join(sorted(kinds))}, but it is one "
            "tensor there. Give --dtype to convert all weights."
        )
    return metadata.dtype(message.name, row.keys[0])


def _file(name: str, slots: list[Slot]) -> PlannedFile:
    return torchzip.plan({slot.name: slot for slot in slots}) if name == hfdir.FULL else safetensors.plan(slots)


def _index(shards: dict[str, list[Slot]]) -> bytes:
    names = {slot.name: file for file, slots in shards.items() for slot in slots}
    total = sum(slot.nbytes for slots in shards.values() for slot in slots)
    if not names:
        raise TableError(f"{hfdir.INDEX}: no tensors are planned, expected those of the model.")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
