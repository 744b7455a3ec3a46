"""Megatron-Core checkpoints in the `torch_dist` format, which a trainer loads at any layout.

Data files are filled in the order of the model, so they are complete one after the other; every layer of a stacked
tensor, and every expert, is a chunk of its own.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ckptconv import cutting, dtypes
from ckptconv.containers import dcp, torchzip
from ckptconv.containers.plan import PlannedFile
from ckptconv.containers.rankdir import Rank
from ckptconv.errors import LayoutError, UsageError
from ckptconv.formats import mcore_dist
from ckptconv.formats.table import Row
from ckptconv.layout import Layout
from ckptconv.metadata import Metadata
from ckptconv.savers import _megatron
from ckptconv.sharding import Placement, placements

#: The loader that reads what this writes (for --verify).
LOADER = "megatron_dist"
#: Bytes of tensors in one data file: what a reader opens at least, and what is done again after an interruption.
FILE_BYTES = 4 << 30
#: What megatron-core stores for a module that has nothing beside its weights.
EMPTY = [None]
FINISHED = b"""\
{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    _megatron.add_arguments(parser, "megatron_dist")
    group = parser.add_argument_group("torch_dist keys")
    group.add_argument("--layer-keys", choices=("auto", "stacked", "apart"), default="auto",
                       help="layers stacked in one tensor, or with keys of their own (default: as Megatron wants them, "
                       "apart where some layers have experts and some have not)")  # fmt: skip
    group.add_argument("--extra-state", action="append", default=[], metavar="MODULE",
                       help="a module whose empty extra state is written beside the known ones, by its whole name or "
                       "as in a layer (self_attention.core_attention); may be given again")  # fmt: skip


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    return _megatron.save(queue, args, Target, "megatron_dist")


class Target(_megatron.Target):
    """The layout only goes into the args, for a trainer that takes its flags from there; files know none."""

    def __init__(self, metadata: Metadata, args: Namespace) -> None:
        self._given = args
        super().__init__(metadata, args)
        self.flags |= {"etp": self._etp, "layer_keys": "apart" if self._keys.apart else "stacked",
                       "extra_state": args.extra_state}  # fmt: skip

    def rows(self, args: Namespace) -> tuple[Row, ...]:
        """The names that are stored."""
        experts = self.spec.moe.num_experts if self.spec.moe else 0
        apart = mcore_dist.own_keys(self.spec) if args.layer_keys == "auto" else args.layer_keys == "apart"
        if not apart and mcore_dist.own_keys(self.spec):
            raise UsageError("--layer-keys stacked: layers with and without experts have no tensors in common.")
        self._keys = mcore_dist.Keys(apart, self.spec.num_layers, experts)
        return mcore_dist.table(self._impl, self.spec)

    def placed(self) -> list[Placement]:
        """Chunks in the order of the model; of a placement here the stage is the number of the data file."""
        super().placed()  # the layout has to divide the model, though nothing is cut along it
        self._names: list[str] = []
        self._chunks: list[list[dcp.Chunk]] = [[]]
        found, left = [], FILE_BYTES
        for placement in placements(
            self._table, self.spec, Layout(self.spec.num_layers, num_experts=self._keys.experts), self.padded
        ):
            chunk = self._chunk(placement)
            nbytes = prod(chunk.sizes) * dtypes.size_of(chunk.dtype)
            if nbytes > left and self._chunks[-1]:
                self._chunks.append([])
                left = FILE_BYTES
            left -= nbytes
            self._names.append(placement.name)
            self._chunks[-1].append(chunk)
            found.append(replace(placement, name=chunk.slot.name, stage=len(self._chunks) - 1))
        return found

    def _chunk(self, placement: Placement) -> dcp.Chunk:
        key, sizes, at = self._keys.stored(placement.name)
        shape = placement.part_shape
        return dcp.Chunk(
            key, cutting.dtype_of(self._metadata, placement), (*sizes, *shape), (*at, *(0 for _ in shape)),
            (*(1 for _ in sizes), *shape), placement.seen_shape,
        )  # fmt: skip

    def _name(self, rank: Rank) -> str:
        return f"{self.directory}/{_data_file(rank[1])}"

    def _files(self) -> dict[str, PlannedFile]:
        states = self._keys.extra_states(
            self._names, self._impl, self.spec.model_type == "BERT", self._given.extra_state
        )
        last = len(self._chunks) - 1
        self._objects: dict[int, Mapping[str, object]] = {last: dict.fromkeys(states, EMPTY)}
        self._data = {n: dcp.plan(chunks, self._objects.get(n, {})) for n, chunks in enumerate(self._chunks)}
        return {self._name((0, n, 0)): plan for n, plan in self._data.items()}

    def check_expert_ranks(self, etp: int, tp: int) -> None:
        """Any size that divides experts: nothing is cut."""
        moe = self.spec.moe
        if moe and moe.ffn_hidden_size % etp:
            raise LayoutError(
                f"--target-expert-tensor-parallel-size {etp} does not divide the {moe.ffn_hidden_size} rows of an "
                "expert. Choose one that does."
            )
        self._etp = etp

    def arguments(self) -> dict[str, object]:
        """The args of the checkpoint."""
        return {**super().arguments(), "ckpt_format": "torch_dist", "use_dist_ckpt": True,
                "expert_tensor_parallel_size": self._etp}  # fmt: skip

    def args_file(self) -> bytes:
        """The training flags."""
        lines = super().args_file().decode().splitlines()
        said = {"--ckpt-format": "torch_dist", "--expert-tensor-parallel-size": str(self._etp)}
        flags = [f"{name} {said[name]}" if (name := line.split(" ")[0]) in said else line for line in lines]
        note = "# Where a module asks for an extra state that is not there, --dist-ckpt-strictness log_all goes on."
        return "\n".join([*flags[:2], note, *flags[2:], ""]).encode()

    def more_files(self) -> dict[str, bytes]:
        """What makes a directory of data files a checkpoint, metadata.json last."""
        common = torchzip.plan({
            "args": Namespace(**self.arguments()),
            "checkpoint_version": 3.0,
            "iteration": self._number,
            "num_floating_point_operations_so_far": 0,
            "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        })  # fmt: skip
        index = dcp.index(
            {_data_file(n): (plan, self._chunks[n], list(self._objects.get(n, ()))) for n, plan in self._data.items()}
        )
        files = {"common.pt": _content(common), dcp.METADATA: index, dcp.FINISHED: FINISHED}
        return {f"{self.directory}/{name}": data for name, data in files.items()}


def _data_file(number: int) -> str:
    """As the only file of a rank of that number."""
    return f"__{number}_0.distcp"


def _content(plan: PlannedFile) -> bytes:
    data = bytearray(plan.size)

    def write(offset: int, part: bytes) -> None:
        data[offset : offset + len(part)] = part

    plan.finish(write, {})
    return bytes(data)
