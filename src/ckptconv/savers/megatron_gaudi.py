"""Intel Gaudi's Megatron-LM (HabanaAI) checkpoints: megatron-core's, in the fork's dialect and with its args.

An expert's fc1 is cut over tensor ranks as the fork's model reads it, gate and up each on its own: rank t holds
[W_t; V_t]. The fork's own saver cuts the rows of [W; V] as they are, so that with two ranks one gets all gates and the
other all ups, and its converter to Hugging Face puts them together in the same wrong way. For experts and tensor
parallelism together the files of the two savers therefore differ, on purpose.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckptconv import companions
from ckptconv.containers import rankdir, torchzip
from ckptconv.containers.inert import DTypeName
from ckptconv.containers.plan import Slot
from ckptconv.errors import LayoutError, SourceError, UsageError
from ckptconv.formats import gaudi, megatron_args
from ckptconv.formats.table import Row
from ckptconv.lazy import LazyTensor
from ckptconv.metadata import Metadata
from ckptconv.savers import _megatron
from ckptconv.spec import differences

log = logging.getLogger("ckptconv.saver")

#: The loader that reads what this writes (for --verify).
LOADER = "megatron_gaudi"
#: In what a source's args may differ from the model that is written: what was trained with, not what it is.
_FREE = ("family", "dtype", "vocab_size", "max_position_embeddings", "seq_length")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    _megatron.add_arguments(parser, "megatron_gaudi")
    add = parser.add_argument_group("saver megatron_gaudi").add_argument
    add("--source-margs-file", metavar="PATH",
        help=f"{gaudi.ARGS_FILE} of the model this one was made of: its args are taken over, but for those of the run "
        "and its layout")  # fmt: skip
    add("--load-capacity-bins", action="store_true", help=f"put {gaudi.BINS_FILE} of --load-dir back into the routers")
    add("--moe-dynamic-hpu", action="store_true", help="write experts for moe_dynamic_hpu (train with the same flag)")


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    if args.moe_grouped_gemm or args.custom_layers:
        raise UsageError("--moe-grouped-gemm and --custom-layers: Gaudi's Megatron-LM has no such layers.")
    return _megatron.save(queue, args, _Target, "megatron_gaudi")


class _Target(_megatron.Target):
    """In what the fork differs."""

    SYSTEM = "Gaudi's Megatron-LM"
    version = 3.1

    def __init__(self, metadata: Metadata, args: Namespace) -> None:
        self._args = args
        self._dynamic = bool(args.moe_dynamic_hpu)
        super().__init__(metadata, args)
        self.flags |= {"moe_dynamic_hpu": self._dynamic, "load_capacity_bins": bool(args.load_capacity_bins)}

    def rows(self, args: Namespace) -> tuple[Row, ...]:
        """The format's table."""
        return gaudi.table(self._dynamic)

    def arguments(self) -> dict[str, object]:
        """The args of a checkpoint, with those of its source."""
        sizes = {slot.shape[0] for _, slot, _ in self._more if slot.name.endswith(".capacity_bins.bins_usage")}
        own: dict[str, object] = {
            **super().arguments(),
            "moe_dynamic_hpu": self._dynamic,
            "moe_extended_tp": False,
            "moe_capacity_bins_num": max(sizes, default=0),
            **({"moe_permuted_weights": True, "moe_fused_weights": True} if self._dynamic else {}),
        }
        if not self._args.source_margs_file:
            return own
        path = self._args.source_margs_file
        told = gaudi.taken_over(companions.read_json(path), DTypeName)
        told.pop("moe_capacity_bins_num", None) if sizes else None
        merged = {**own, **told}
        kind = {"padded_vocab_size": self.padded}
        spec, said = (self.spec.replace(**megatron_args.spec_of(values | kind, path)) for values in (own, merged))
        unlike = differences(said, spec, _FREE)
        if unlike:
            raise SourceError(
                f"--source-margs-file {path}: says another model (on the left) than is converted: "
                f"{'; '.join(unlike[:4])}. Is it that of this model?"
            )
        log.info("saver: %d args are taken over from %s", len(told), path)
        return merged

    def more_tensors(self) -> Iterable[tuple[rankdir.Rank, Slot, LazyTensor]]:
        """The routers' capacity bins, which are each rank's own."""
        if not self._args.load_capacity_bins:
            return []
        path = Path(self._args.load_dir) / gaudi.BINS_FILE
        data: Any = torchzip.read(path)
        found = []
        for rank in self.layout.ranks():
            tp, stage, ep_rank = rank
            for local, layer in enumerate(self.layout.layers_of(stage)):
                for name in gaudi.BUFFERS if self.spec.has_experts(layer) else ():
                    try:
                        tensor = data[name][layer][stage][ep_rank][tp]
                    except (KeyError, TypeError):
                        tensor = None
                    if not isinstance(tensor, LazyTensor):
                        raise LayoutError(
                            f"{path}: has no {name} of layer {layer} for tensor rank {tp}, stage {stage}, expert rank "
                            f"{ep_rank}: bins are each rank's own, so --target-tensor-parallel-size, "
                            "--target-pipeline-parallel-size and --target-expert-parallel-size have to be those of "
                            "the model they were trained in. Or leave --load-capacity-bins out."
                        )
                    slot = Slot(gaudi.BUFFER_NAME.format(local, name), tensor.dtype, tensor.shape)
                    found.append((rank, slot, tensor))
        return found

    def more_files(self) -> dict[str, bytes]:
        """The args as the fork's own saver leaves them."""
        return {gaudi.TARGET_ARGS_FILE: gaudi.as_json(self.args)}

