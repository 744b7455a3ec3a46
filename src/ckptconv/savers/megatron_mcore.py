"""Megatron-Core checkpoints in the `torch` format: one model_optim_rng.pt per tensor and pipeline rank."""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ckptconv import companions, numbers, writing
from ckptconv.containers import rankdir, torchzip
from ckptconv.containers.inert import DTypeName
from ckptconv.containers.plan import PlannedFile, Slot
from ckptconv.errors import LayoutError, TableError, TargetError, UsageError
from ckptconv.formats import mcore, megatron_args, megatron_layers
from ckptconv.formats.table import rows_of
from ckptconv.layout import Layout
from ckptconv.lazy import LazyTensor, Zeros
from ckptconv.messages import expected
from ckptconv.metadata import Metadata
from ckptconv.sharding import Placement, placements
from ckptconv.spec import ModelSpec
from ckptconv.staging import Staging
from ckptconv.writing import Route, Routes

log = logging.getLogger("ckptconv.saver")

#: The loader that reads what this writes (for --verify).
LOADER = "megatron_mcore"
ARGS_FILE = "megatron_args.txt"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    group = parser.add_argument_group("saver megatron_mcore")
    group.add_argument("--target-tensor-parallel-size", "--target-tp", type=numbers.positive, metavar="N",
                       help="tensor parallel size (default: the source's, else 1)")  # fmt: skip
    group.add_argument("--target-pipeline-parallel-size", "--target-pp", type=numbers.positive, metavar="N",
                       help="pipeline parallel size (default: the source's, else 1)")  # fmt: skip
    group.add_argument("--target-expert-parallel-size", "--target-ep", type=numbers.positive, metavar="N",
                       help="expert parallel size (default: the source's, else 1)")  # fmt: skip
    group.add_argument("--target-expert-tensor-parallel-size", "--target-etp", type=numbers.positive,
                       metavar="N", help="the same for experts; the torch format has it equal to tp")  # fmt: skip
    group.add_argument("--moe-grouped-gemm", action="store_true",
                       help="write experts as TEGroupedMLP names them (train with the same flag)")  # fmt: skip
    group.add_argument("--mtp-module", choices=mcore.MTP_MODULES, default=mcore.MTP_MODULES[0],
                       help="what MTP layers call the layer inside: mtp_model_layer (default, from 0.17 on) "
                       "or transformer_layer (before)")  # fmt: skip
    group.add_argument("--saver-transformer-impl", choices=mcore.IMPLEMENTATIONS, default="transformer_engine",
                       help="whose tensor names to write (default transformer_engine)")  # fmt: skip
    group.add_argument("--make-vocab-size-divisible-by", type=numbers.positive, metavar="N",
                       help="pad the vocabulary to a multiple of N * tp (default: the source's, else 128)")  # fmt: skip
    group.add_argument("--pad-vocab", choices=writing.PADDINGS, default="zero",
                       help="padding rows: zeros, copies of the last row, or the mean row (default zero)")  # fmt: skip
    group.add_argument("--iteration", metavar="N|release", type=rankdir.iteration,
                       help="which iteration to write, and to read (default: the source's, else 1)")  # fmt: skip
    group.add_argument("--custom-layers", action="store_true",
                       help="write for the layers of examples/megatron_layers (--spec), which express more models"
                       )  # fmt: skip
    group.add_argument("--allow-inexact", action="store_true",
                       help="write even if Megatron computes something else from it; what differs is said")  # fmt: skip
    group.add_argument("--tokenizer-type", metavar="NAME", help="written into the checkpoint's args")
    group.add_argument("--tokenizer-model", metavar="PATH", help="written into the checkpoint's args")


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    with Staging(args.save_dir, overwrite=args.overwrite, resume=args.resume) as staging:
        metadata = queue.metadata()
        target = _Target(metadata, args)
        mark = writing.fingerprint(
            metadata, saver="megatron_mcore", **target.flags, pad_vocab=args.pad_vocab, tokenizer=target.tokenizer
        )
        written = writing.write(
            queue, staging, target.plans, target.routes, target.fills, metadata, args, mark
        )
        described = {"format": "megatron_mcore", **target.flags, "limits": target.limits}
        staging.add(
            f"{target.directory}/{companions.PROVENANCE}", writing.provenance(metadata, described, written.digests)
        )
        small = [ARGS_FILE]
        staging.add(ARGS_FILE, target.args_file())
        if target.layers:
            small.append(megatron_layers.FILE)
            staging.add(megatron_layers.FILE, (json.dumps(target.layers, indent=2) + "\n").encode())
        for name, path in metadata.origin.companions.items():
            staging.add(f"{companions.FOLDER}/{name}", Path(path).read_bytes())
        if metadata.origin.companions:
            small.append(companions.FOLDER)
        staging.add(rankdir.TRACKER, str(target.iteration).encode())
        staging.publish([target.directory, *small], [rankdir.TRACKER])
    for sentence in target.limits:
        log.warning("saver: %s", sentence)
    return {"bytes": written.bytes, "digests": written.digests}


class _Target:
    """Everything that follows from the metadata and the flags, before the first byte."""

    def __init__(self, metadata: Metadata, args: Namespace) -> None:
        self._metadata = metadata
        self.spec: ModelSpec = mcore.target_spec(metadata.spec)
        tp = args.target_tensor_parallel_size or metadata.tp or 1
        pp = args.target_pipeline_parallel_size or metadata.pp or 1
        moe = self.spec.moe
        ep = args.target_expert_parallel_size or (metadata.ep if moe else None) or 1
        self.layout = Layout(self.spec.num_layers, tp, pp, ep, moe.num_experts if moe else 0)
        etp = args.target_expert_tensor_parallel_size or tp
        if etp != tp:
            raise LayoutError(
                f"--target-expert-tensor-parallel-size {etp} with tensor parallel size {tp}: in the torch format every "
                "tensor rank has its own file, so experts are cut over as many ranks as all else. Leave the flag out, "
                "or make both equal."
            )
        self._divisor = args.make_vocab_size_divisible_by or metadata.make_vocab_size_divisible_by or 128
        self.padded = mcore.padded_vocab(self.spec.vocab_size, self._divisor, tp)
        self._impl, self._grouped = args.saver_transformer_impl, bool(moe) and args.moe_grouped_gemm
        self.tokenizer = (
            args.tokenizer_type or metadata.tokenizer_type,
            args.tokenizer_model or _tokenizer_folder(metadata, args.save_dir),
        )
        self.iteration: int | str = metadata.iteration if args.iteration is None else args.iteration
        if self.iteration == 0:
            raise UsageError("--iteration 0: Megatron takes no iteration 0; give another number, or release.")
        self._number = 0 if isinstance(self.iteration, str) else self.iteration  # as Megatron counts a release
        self.layers = megatron_layers.settings(metadata.spec) if args.custom_layers else None
        self._module = (megatron_layers.MODULE, megatron_layers.OBJECTS[self._impl]) if self.layers else None
        self.directory = rankdir.iteration_name(self.iteration)
        self._table = mcore.table(self._impl, self._grouped, args.mtp_module, self.spec.model_type == "BERT")
        self.limits = self._expressible(args.allow_inexact)
        self.flags = {
            "tp": tp, "pp": pp, "ep": ep, "moe_grouped_gemm": self._grouped, "transformer_impl": self._impl,
            "padded_vocab_size": self.padded, "make_vocab_size_divisible_by": self._divisor,
            "iteration": self.iteration,
            **({"custom_layers": list(self._module)} if self._module else {}),
            **({"mtp_module": args.mtp_module} if self.spec.mtp_layers else {}),
        }  # fmt: skip
        self._placements = list(placements(self._table, self.spec, self.layout, self.padded))
        self.plans = self._files()
        self.routes, self.fills = self._ways()

    @property
    def _described(self) -> ModelSpec:
        """The model as the trainer's flags say it: they know norms on queries and keys of one kind only."""
        spec = self._metadata.spec
        return spec.replace(qk_norm="head") if self.layers and spec.qk_norm else spec

    def _expressible(self, allowed: bool) -> list[str]:
        spec = self._metadata.spec
        rules = megatron_layers if self.layers else megatron_args
        refusals = (
            megatron_layers.refusals(spec) if self.layers else megatron_args.refusals(spec, tp=self.layout.tp)
        )
        if refusals and not (allowed and self._has_names()):
            reasons = "\n".join(f"  - {reason}" for reason in refusals)
            helps = not self.layers and not megatron_layers.refusals(self._metadata.spec)
            raise TargetError(
                f"megatron-core cannot express this model:\n{reasons}\nNothing was written. "
                + ("--custom-layers writes it for layers that can (examples/megatron_layers). " if helps else "")
                + self._offer()
            )
        limits = [*refusals, *rules.limits(self._metadata.spec)]
        if self.layout.tp > self.spec.num_query_groups:
            # transformer_config.py asserts num_query_groups % tp == 0 up to core_v0.15.0.
            limits.append(
                f"tp {self.layout.tp} is larger than the {self.spec.num_query_groups} query groups, which "
                "megatron-core takes from 0.16 on: with an older one choose a tp that divides them."
            )
        return limits

    def _offer(self) -> str:
        inexact = "--allow-inexact writes the weights all the same."
        return inexact if self._has_names() else "It has no names for its tensors."

    def _has_names(self) -> bool:
        try:
            for message in expected(self.spec):
                rows_of(self._table, message, self.spec)
        except TableError:
            return False
        return True

    def _dtype(self, placement: Placement) -> str:
        kinds = {self._metadata.dtype(placement.message, key) for key in placement.keys}
        if len(kinds) > 1:
            raise TargetError(
                f"{placement.name}: its parts {' and '.join(placement.keys)} are {' and '.join(sorted(kinds))}, but "
                "it is one tensor in Megatron. Give --dtype to convert all weights."
            )
        return kinds.pop()

    def _name(self, rank: rankdir.Rank) -> str:
        return f"{self.directory}/{rankdir.directory_name(rank, self.layout.pp, self.layout.ep)}/{rankdir.FILE}"

    def _files(self) -> dict[str, PlannedFile]:
        arguments = Namespace(
            **megatron_args.namespace(
                self._described, tp=self.layout.tp, pp=self.layout.pp, ep=self.layout.ep,
                padded_vocab_size=self.padded, make_vocab_size_divisible_by=self._divisor, transformer_impl=self._impl,
                iteration=self._number, tokenizer_type=self.tokenizer[0],
                tokenizer_model=self.tokenizer[1], params_dtype=DTypeName(self.spec.dtype),
                grouped_gemm=self._grouped, inexact=True, spec_module=self._module,
            ),
            **({megatron_layers.ATTRIBUTE: self.layers} if self.layers else {}),
        )  # fmt: skip
        slots: dict[tuple[int, int], dict[str, Slot]] = {
            (stage, rank): {} for _, stage, rank in self.layout.ranks()
        }
        for placement in self._placements:
            seen = placement.seen_shape if placement.row.vector else None
            slot = Slot(placement.name, self._dtype(placement), placement.part_shape, seen)
            for ep_rank in placement.ep_ranks:
                there = slots[placement.stage, ep_rank]
                if placement.name in there:
                    raise TargetError(f"stage {placement.stage}: {placement.name} is planned twice")
                there[placement.name] = slot
        # All tensor ranks have the same shapes, so one plan serves them.
        plans = {
            place: torchzip.plan({
                "args": arguments,
                "checkpoint_version": 3.0,
                "iteration": self._number,
                "model": model,
                "num_floating_point_operations_so_far": 0,
            })
            for place, model in slots.items()
        }  # fmt: skip
        return {self._name(rank): plans[rank[1], rank[2]] for rank in self.layout.ranks()}

    def _ways(self) -> tuple[Routes, list[tuple[LazyTensor, Route]]]:
        sent = {m.name: m.shapes for m in expected(self._metadata.spec)}
        names = {rank: self._name(rank) for rank in self.layout.ranks()}
        routes: Routes = {}
        fills: list[tuple[LazyTensor, Route]] = []
        for placement in self._placements:
            for key, shape in zip(placement.keys, placement.shapes, strict=True):
                targets = [
                    (names[tile.part, placement.stage, ep_rank], placement.name, tile)
                    for tile in placement.tiles(key)
                    for ep_rank in placement.ep_ranks
                ]
                if key not in sent[placement.message]:
                    # A bias the model lacks, where Megatron's linears have all or none.
                    fills.append((Zeros(self._dtype(placement), shape), Route(targets)))
                    continue
                route = routes.setdefault((placement.message, key), Route())
                route.targets += targets
                route.rows = shape[0] if placement.row.vocab else None
        return routes, fills

    def args_file(self) -> bytes:
        """The training flags, one a line, behind comments that say what flags cannot."""
        lines = [
            "# Flags for Megatron-LM that rebuild this model. Paste between the parentheses of MODEL_ARGS=( ), or use",
            f"# $(grep -v '^#' {ARGS_FILE}). Loading also needs --load DIR --finetune: there is no optimizer state.",
        ]
        lines += [f"# Beyond these flags: {sentence}" for sentence in self.limits]
        lines += megatron_args.flags(
            self._described, tp=self.layout.tp, pp=self.layout.pp, ep=self.layout.ep,
            make_vocab_size_divisible_by=self._divisor, transformer_impl=self._impl,
            tokenizer_type=self.tokenizer[0], tokenizer_model=self.tokenizer[1],
            padded_vocab_size=self.padded, grouped_gemm=self._grouped, inexact=True, spec_module=self._module,
        )  # fmt: skip
        return ("\n".join(lines) + "\n").encode()


def _tokenizer_folder(metadata: Metadata, save_dir: str) -> str | None:
    """The carried tokenizer files, which a Hugging Face tokenizer is loaded from."""
    if any(companions.is_tokenizer(name) for name in metadata.origin.companions):
        return str(Path(save_dir).absolute() / companions.FOLDER)
    return metadata.tokenizer_model
