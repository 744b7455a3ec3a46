"""Meta's own Llama checkpoints: `consolidated.NN.pth` in any number of shards, params.json, tokenizer.model."""

from __future__ import annotations

import json
import logging
import re
from argparse import ArgumentParser, Namespace
from typing import Any

from ckptconv import companions, cutting, numbers, writing
from ckptconv.containers import torchzip
from ckptconv.containers.plan import PlannedFile
from ckptconv.errors import TargetError
from ckptconv.formats import meta
from ckptconv.formats.meta import PARAMS, TOKENIZER
from ckptconv.layout import Layout
from ckptconv.metadata import Metadata
from ckptconv.sharding import placements
from ckptconv.staging import staged

log = logging.getLogger("ckptconv.saver")

#: The loader that reads what this writes (for --verify).
LOADER = "meta"
_STALE = re.compile(r"consolidated\.\d+\.pth|params\.json|tokenizer\.model|latest_checkpointed_iteration\.txt")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    group = parser.add_argument_group("saver meta")
    group.add_argument("--target-tensor-parallel-size", "--target-tp", type=numbers.positive, metavar="N",
                       help="number of shards (default: the source's tensor parallel size, else 1)")  # fmt: skip
    group.add_argument("--llama-version", choices=tuple(meta.VERSIONS),
                       help="the release whose code is to read it: before Llama 3 the embedding is cut on its columns "
                       "(default: as the model suggests)")  # fmt: skip


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    with staged(args) as staging:
        metadata = queue.metadata()
        target = _Target(metadata, args)
        mark = writing.fingerprint(metadata, saver="meta", **target.flags)
        written = writing.write(queue, staging, target.plans, target.routes, [], metadata, args, mark)
        described = {"format": "meta", **target.flags, "limits": target.limits}
        small = [companions.PROVENANCE]
        staging.add(companions.PROVENANCE, writing.provenance(metadata, described, written.digests))
        small += writing.carry(staging, metadata)
        if TOKENIZER in metadata.origin.companions:
            small.append(TOKENIZER)
            staging.add(TOKENIZER, companions.read(metadata.origin.companions[TOKENIZER]))
        staging.add(PARAMS, (json.dumps(target.params) + "\n").encode())
        new = [*target.plans, *small, PARAMS]
        stale = [name for name in staging.present() if _STALE.fullmatch(name)]
        staging.publish([*target.plans, *small], [PARAMS], [name for name in stale if name not in new])
    for sentence in target.limits:
        log.warning("saver: %s", sentence)
    return {"bytes": written.bytes, "digests": written.digests}


class _Target:
    """Everything that follows from the metadata and the flags, before the first byte."""

    def __init__(self, metadata: Metadata, args: Namespace) -> None:
        spec = metadata.spec
        version = args.llama_version or meta.version_for(spec)
        reasons = meta.refusals(spec, version)
        if reasons:
            listed = "\n".join(f"  - {reason}" for reason in reasons)
            raise TargetError(
                f"Meta's model code cannot express this model (on the left what it would make of it, with "
                f"--llama-version {version}):\n{listed}\nNothing was written. --saver hf writes it."
            )
        tp = args.target_tensor_parallel_size or metadata.tp or 1
        layout = Layout(spec.num_layers, tp)
        rows = meta.VERSIONS[version].rows
        self.params = meta.write(spec, version)
        self.flags = {"tp": tp, "llama_version": version}
        self.limits = self._limits(metadata, version)
        places = list(placements(meta.table(spec, rows), spec, layout, spec.vocab_size))
        plan: PlannedFile = torchzip.plan(cutting.slots(places, metadata)[0, 0][None])
        self.plans = {self._name(rank): plan for rank in range(tp)}  # all shards have the same shapes
        self.routes, _ = cutting.ways(places, metadata, lambda rank: self._name(rank[0]))

    @staticmethod
    def _name(shard: int) -> str:
        return f"consolidated.{shard:02d}.pth"

    @staticmethod
    def _limits(metadata: Metadata, version: str) -> list[str]:
        """What readers have to be told otherwise."""
        positions, usual = metadata.spec.max_position_embeddings, meta.VERSIONS[version].positions
        found = []
        if positions != usual:
            found.append(
                f"{PARAMS} has no longest input: readers take {usual} of Llama {version}, this model has {positions} "
                f"(kept in {companions.PROVENANCE})."
            )
        factor = metadata.spec.rope.scaling.get("factor") if metadata.spec.rope else None
        if factor not in (None, meta.VERSIONS["3.1"].factor):
            found.append(
                f"{PARAMS} says use_scaled_rope, but no factor: this model has {factor:g}, where llama-models' code "
                "has 8 as a constant. Change it there."
            )
        if TOKENIZER not in metadata.origin.companions:
            found.append(f"the source has no {TOKENIZER}, which Meta's code reads: put it beside {PARAMS}.")
        return found
