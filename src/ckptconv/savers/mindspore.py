"""MindSpore Transformers checkpoints: a merged folder of safetensors files with `param_name_map.json`."""

from __future__ import annotations

import json
import logging
import re
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import Any

from ckptconv import companions, cutting, numbers, writing
from ckptconv.containers import msdir, safetensors
from ckptconv.containers.plan import PlannedFile, Slot
from ckptconv.errors import TableError, TargetError
from ckptconv.formats import mindspore
from ckptconv.formats.mindspore import FC1_LAYOUTS, QKV_LAYOUTS, Dialect
from ckptconv.layout import Layout
from ckptconv.metadata import Metadata
from ckptconv.sharding import placements
from ckptconv.staging import staged
from ckptconv.writing import Build, Routes

log = logging.getLogger("ckptconv.saver")

#: The loader that reads what this writes (for --verify).
LOADER = "core_mf"
_STALE = re.compile(r"part\d+\.safetensors|hyper_param\.safetensors|param_name_map\.json|"
                    r"latest_checkpointed_iteration\.txt")  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    group = parser.add_argument_group("saver mindspore")
    add = group.add_argument
    add("--ms-fc1-layout", choices=FC1_LAYOUTS, help="rows of the gated fc1 (see --target-ms-fc1-layout)")
    add("--ms-qkv-layout", choices=QKV_LAYOUTS, help="rows of linear_qkv (see --target-ms-qkv-layout)")
    add("--target-ms-fc1-layout", choices=FC1_LAYOUTS,
        help="rows of the gated fc1 to write, for a model with use_interleaved_weight_layout_mlp or without (default: "
        "--ms-fc1-layout, else interleaved)")  # fmt: skip
    add("--target-ms-qkv-layout", choices=QKV_LAYOUTS,
        help="rows of linear_qkv to write, for a model without use_contiguous_weight_layout_attention or with it "
        "(default: --ms-qkv-layout, else grouped)")  # fmt: skip
    add("--max-shard-size", type=numbers.size, default=numbers.size("5GB"), metavar="SIZE",
        help="largest weight file, such as 5GB or 500MB (default 5GB)")  # fmt: skip


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    with staged(args) as staging:
        metadata = queue.metadata()
        target = _Target(metadata, args)
        mark = writing.fingerprint(metadata, saver="mindspore", **target.flags)
        written = writing.write(
            queue, staging, target.plans, target.routes, [], metadata, args, mark, target.builds
        )
        described = {"format": "mindspore", **target.flags}
        small = [companions.PROVENANCE]
        staging.add(companions.PROVENANCE, writing.provenance(metadata, described, written.digests))
        small += writing.carry(staging, metadata)
        staging.add(msdir.MAP, target.map())
        stale = [name for name in staging.present() if _STALE.fullmatch(name)]
        new = [*target.plans, *small, msdir.MAP]
        staging.publish([*target.plans, *small], [msdir.MAP], [name for name in stale if name not in new])
    log.info(
        "saver: train with use_interleaved_weight_layout_mlp: %s and use_contiguous_weight_layout_attention: %s",
        target.how.fc1 == mindspore.INTERLEAVED, target.how.qkv == mindspore.CONTIGUOUS,
    )  # fmt: skip
    return {"bytes": written.bytes, "digests": written.digests}


class _Target:
    """Everything that follows from the metadata and the flags, before the first byte."""

    def __init__(self, metadata: Metadata, args: Namespace) -> None:
        spec = metadata.spec
        self.how = Dialect(
            args.target_ms_fc1_layout or args.ms_fc1_layout or mindspore.INTERLEAVED,
            args.target_ms_qkv_layout or args.ms_qkv_layout or mindspore.GROUPED,
            gamma=spec.norm == "LayerNorm",
        )
        layout = Layout(spec.num_layers, num_experts=spec.moe.num_experts if spec.moe else 0)
        try:
            reasons = mindspore.refusals(spec)
            places = list(placements(mindspore.table(spec, self.how), spec, layout, spec.vocab_size))
        except TableError as error:
            reasons = [*reasons, str(error)]
        if reasons:
            listed = "\n".join(f"  - {reason}" for reason in reasons)
            raise TargetError(
                f"MindSpore Transformers cannot express this model:\n{listed}\nNothing was written. "
                "--saver hf may express it."
            )
        self.flags = {
            "ms_fc1_layout": self.how.fc1, "ms_qkv_layout": self.how.qkv, "max_shard_size": args.max_shard_size,
        }  # fmt: skip
        self._files = _shards(list(cutting.slots(places, metadata)[0, 0][None].values()), args.max_shard_size)
        self.plans: dict[str, PlannedFile] = {
            name: safetensors.plan(slots, {"format": "ms"}) for name, slots in self._files.items()
        }
        where = {slot.name: name for name, slots in self._files.items() for slot in slots}
        self.routes: Routes
        self.routes, _ = cutting.ways(places, metadata, lambda rank: "")
        for route in self.routes.values():
            route.targets = [(where[slot], slot, tile) for _, slot, tile in route.targets]
        self.builds: dict[str, list[Build]] = {
            message: [replace(build, file=where[build.slot]) for build in builds]
            for message, builds in cutting.builds(places, lambda rank: "").items()
        }

    def map(self) -> bytes:
        """Which file holds which tensor."""
        entries = {slot.name: name for name, slots in self._files.items() for slot in slots}
        total = sum(slot.nbytes for slots in self._files.values() for slot in slots)
        data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(entries.items()))}
        return (json.dumps(data, indent=1) + "\n").encode()


def _shards(slots: list[Slot], limit: int) -> dict[str, list[Slot]]:
    """File -> its tensors, in order, up to `limit` bytes."""
    groups: list[list[Slot]] = [[]]
    for slot in slots:
        if groups[-1] and sum(one.nbytes for one in groups[-1]) + slot.nbytes > limit:
            groups.append([])
        groups[-1].append(slot)
    return {f"part{number}.safetensors": group for number, group in enumerate(groups)}
