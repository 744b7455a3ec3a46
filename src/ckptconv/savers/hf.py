"""Hugging Face directories that transformers 4 and 5 both read: config, safetensors shards with index, tokenizer."""

from __future__ import annotations

import json
import logging
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ckptconv import companions, dtypes, families, numbers, writing
from ckptconv.containers import safetensors
from ckptconv.containers.plan import Slot
from ckptconv.errors import TargetError, some
from ckptconv.families.family import NOT_IN_CONFIG, Family
from ckptconv.families.rope import dual
from ckptconv.messages import expected
from ckptconv.metadata import Metadata
from ckptconv.ops import Tile
from ckptconv.spec import ModelSpec, differences
from ckptconv.staging import Staging
from ckptconv.writing import Route, Routes

log = logging.getLogger("ckptconv.saver")

#: The loader that reads what this writes (for --verify).
LOADER = "hf"
INDEX = "model.safetensors.index.json"
#: What an earlier output may have left that would be taken for part of this one, or for what is in the directory.
_STALE = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|latest_checkpointed_iteration\.txt"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    group = parser.add_argument_group("saver hf")
    group.add_argument("--max-shard-size", type=numbers.size, default=numbers.size("5GB"), metavar="SIZE",
                       help="largest weight file, such as 5GB or 500MB (default 5GB)")  # fmt: skip


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    with Staging(args.save_dir, overwrite=args.overwrite, resume=args.resume) as staging:
        metadata = queue.metadata()
        family, config, notes = _config(metadata, args)
        shards, routes = _plan(metadata, family, args.max_shard_size)
        plans = {name: safetensors.plan(slots) for name, slots in shards.items()}
        mark = writing.fingerprint(metadata, saver="hf", max_shard_size=args.max_shard_size)
        written = writing.write(queue, staging, plans, routes, [], metadata, args, mark)
        for name, path in metadata.origin.companions.items():
            if name != companions.CONFIG:
                staging.add(name, Path(path).read_bytes())
        small = [name for name in metadata.origin.companions if name != companions.CONFIG]
        if "generation_config.json" not in small:
            staging.add("generation_config.json", _generation_config(config))
            small.append("generation_config.json")
        target = {"format": "hf", "family": family.name, "notes": notes}
        staging.add(companions.PROVENANCE, writing.provenance(metadata, target, written.digests))
        last = [companions.CONFIG]
        if len(shards) > 1:
            staging.add(INDEX, _index(shards))
            last.insert(0, INDEX)
        staging.add(companions.CONFIG, _config_bytes(metadata, config))
        stale = [entry.name for entry in staging.target.iterdir() if _STALE.fullmatch(entry.name)]
        staging.publish([*shards, *small, companions.PROVENANCE], last, [s for s in stale if s not in shards])
    for note in notes:
        log.warning("saver: %s", note)
    return {"bytes": written.bytes, "digests": written.digests}


def _config(metadata: Metadata, args: Namespace) -> tuple[Family, dict[str, Any], list[str]]:
    """(family, config.json to write, what to tell the user). The source's own file is kept when it says this model."""
    spec, notes = metadata.spec, []
    original = companions.read_config(metadata.origin.companions)
    if original is not None:
        where = metadata.origin.companions[companions.CONFIG]
        family = families.of_config(original, where)
        said = family.spec(original, where)
        unlike = differences(said, spec, NOT_IN_CONFIG)
        if not unlike:
            config = dual(original)
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
            "check special token ids, and add tokenizer files if there are none."
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
        return Path(path).read_bytes()
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _generation_config(config: dict[str, Any]) -> bytes:
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
    return (json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n").encode()


def _plan(metadata: Metadata, family: Family, limit: int) -> tuple[dict[str, list[Slot]], Routes]:
    """(file -> slots, where each message tensor goes). Shards are filled in message order up to `limit` bytes."""
    spec = metadata.spec
    groups: list[list[Slot]] = [[]]
    placed: list[tuple[str, str, list[Tile], list[tuple[str, int]]]] = []
    for message in expected(spec):
        for key, shape in message.shapes.items():
            row = family.row(message.template, key)
            where = []
            for name, part in zip(row.names, row.op.part_shapes(shape, spec), strict=True):
                slot = Slot(name.format(i=message.layer), metadata.dtype(message.name, key), part)
                if groups[-1] and sum(s.nbytes for s in groups[-1]) + slot.nbytes > limit:
                    groups.append([])
                groups[-1].append(slot)
                where.append((slot.name, len(groups) - 1))
            placed.append((message.name, key, row.op.tiles(shape, spec), where))
    count = len(groups)
    files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    files = files if count > 1 else ["model.safetensors"]
    routes = {
        (message, key): Route([(files[where[t.part][1]], where[t.part][0], t) for t in tiles])
        for message, key, tiles, where in placed
    }
    return dict(zip(files, groups, strict=True)), routes


def _index(shards: dict[str, list[Slot]]) -> bytes:
    names = {slot.name: file for file, slots in shards.items() for slot in slots}
    total = sum(slot.nbytes for slots in shards.values() for slot in slots)
    if not names:
        raise TargetError("no tensors to write")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
