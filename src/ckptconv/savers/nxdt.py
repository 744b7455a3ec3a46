"""NxD Training (AWS Neuron) checkpoints: Hugging Face or Megatron style, with or without torch_xla's references."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from typing import Any

from ckptconv import companions, cutting, numbers, writing
from ckptconv.containers import torchzip, xser
from ckptconv.containers.plan import PlannedFile
from ckptconv.errors import LayoutError, TargetError, UsageError
from ckptconv.formats import nxdt, nxdt_files, nxdt_flags
from ckptconv.formats.nxdt import Dialect
from ckptconv.formats.nxdt_heads import Heads
from ckptconv.layout import Layout
from ckptconv.metadata import Metadata
from ckptconv.sharding import placements
from ckptconv.staging import staged
from ckptconv.writing import Build, Route

log = logging.getLogger("ckptconv.saver")

#: The loader that reads what this writes (for --verify).
LOADER = "nxdt"
XSER_LAYOUTS = ("refs", "inline")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    group = nxdt_flags.add(parser, "saver nxdt")
    flag = group.add_argument
    flag("--target-tensor-parallel-size", "--target-tp", type=numbers.positive, metavar="N",
         help="the same as --tp-size, for sources that are NxDT, too (default: the source's, else 1)")  # fmt: skip
    flag("--target-pipeline-parallel-size", "--target-pp", type=numbers.positive, metavar="N",
         help="the same as --pp-size")  # fmt: skip
    flag("--target-expert-parallel-size", "--target-ep", type=numbers.positive, metavar="N",
         help="the same as --ep-size")  # fmt: skip
    flag("--target-kv-size-multiplier", type=numbers.positive, metavar="N", help="the same as --kv-size-multiplier")
    flag("--target-hw-backend", choices=nxdt_flags.BACKENDS, help="the same as --hw-backend")
    flag("--target-model-style", choices=("hf", "megatron"), help="the same as --model-style")
    flag("--make-vocab-size-divisible-by", type=numbers.positive, metavar="N",
         help="pad the vocabulary to a multiple of N * tp (default: not padded)")  # fmt: skip
    flag("--pad-vocab", choices=writing.PADDINGS, default="zero",
         help="padding rows: zeros, copies of the last row, or the mean row (default zero)")  # fmt: skip
    flag("--nxdt-xser-layout", choices=XSER_LAYOUTS, default="refs",
         help="with --save-xser: as a trainer writes it, or as AWS's converter does (default refs)")  # fmt: skip
    flag("--nxdt-markers", action="store_true",
         help="also write the files checkpoint and done, by which a trainer finds it (and may delete it later)")


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    with staged(args) as staging:
        metadata = queue.metadata()
        target = _Target(metadata, args)
        mark = writing.fingerprint(metadata, saver="nxdt", **target.flags, pad_vocab=args.pad_vocab)
        written = writing.write(
            queue, staging, target.plans, target.routes, target.fills, metadata, args, mark, target.builds
        )
        for name, data in target.small.items():
            staging.add(name, data)
        for name in target.folders:
            staging.folder(name)
        described = {"format": "nxdt", **target.flags, "notes": target.notes}
        staging.add(companions.PROVENANCE, writing.provenance(metadata, described, written.digests))
        small = [companions.PROVENANCE]
        small += writing.carry(staging, metadata)
        markers = [nxdt_files.MARKER, nxdt_files.DONE] if args.nxdt_markers else []
        for name in markers:
            staging.add(name, b"1")
        there = [name for name in (nxdt_files.MARKER, nxdt_files.DONE) if (staging.target / name).is_file()]
        staging.publish(small, [nxdt_files.MODEL, *markers], [name for name in there if name not in markers])
    for note in target.notes:
        log.warning("saver: %s", note)
    return {"bytes": written.bytes, "digests": written.digests}


class _Target:
    """Everything that follows from the metadata and the flags, before the first byte."""

    def __init__(self, metadata: Metadata, args: Namespace) -> None:
        self._metadata, self._args, self.notes = metadata, args, list[str]()
        self.spec = metadata.spec
        self._yaml = nxdt_flags.training(args.nxdt_yaml_config)
        self._check_flags()
        self._style = nxdt.style_of(self.spec, args.target_model_style or args.model_style or self._said_style())
        if reasons := nxdt.refusals(self.spec, self._style):
            lines = "\n".join(f"  - {reason}" for reason in reasons)
            raise TargetError(
                f"NxDT's {self._style} models cannot hold this one:\n{lines}\nNothing was written. "
                "--saver hf may express it."
            )
        self.layout = self._layout()
        self._heads = self._on_ranks()
        self._dialect = Dialect(self._style, self._form(), self._rows(), multiple=args.i_tp_round_factor or 1)
        if self.spec.tied:
            self.notes.append("NxDT has no tied embeddings: the output layer is written as a copy of the embedding.")
        self._vocabulary()
        self._xser = args.convert_to_xser or (bool(args.save_xser) and not args.convert_from_xser)
        self.flags = {
            "model_style": self._style, "tp": self.layout.tp, "pp": self.layout.pp, "ep": self.layout.ep,
            "virtual_pp": self.layout.vpp, "kv_size_multiplier": self._heads.copies, "kv_order": self._heads.order,
            "padded_heads": self._heads.padded, "form": self._dialect.form, "rows": self._dialect.rows,
            "i_tp_round_factor": self._dialect.multiple, "padded_vocab_size": self._padded,
            "xser": args.nxdt_xser_layout if self._xser else None,
        }  # fmt: skip
        self._plan()

    # Flags

    def _check_flags(self) -> None:
        args = self._args
        self._resharding = self._metadata.origin.format == "nxdt"
        nxdt_flags.check_direction(args, self._resharding, True)
        nxdt_flags.check_layers(args, self.spec.num_layers)
        if self.spec.moe is None and args.i_tp_round_factor:
            raise UsageError("--i-tp-round-factor: this model has no experts. Leave it out.")

    def _number(self, name: str, target: str | None, said: str | None = None) -> int | None:
        """A size from its flags, or from the training config."""
        value = getattr(self._args, target) if target else None
        value = value or getattr(self._args, name)
        return value or (self._yaml.get(said) if self._yaml and said else None)

    def _said_style(self) -> str:
        style = self._yaml.get("model_source", str) if self._yaml else None
        return style if style in ("hf", "megatron") else "hf"

    def _layout(self) -> Layout:
        spec, strategy = self.spec, "distributed_strategy."
        tp = self._number("tp_size", "target_tensor_parallel_size", strategy + "tensor_model_parallel_size")
        pp = self._number("pp_size", "target_pipeline_parallel_size", strategy + "pipeline_model_parallel_size")
        ep = self._number("ep_size", "target_expert_parallel_size", strategy + "expert_model_parallel_size")
        vpp = self._number("virtual_pp_size", None, strategy + "virtual_pipeline_model_parallel_size") or 1
        experts = spec.moe.num_experts if spec.moe else 0
        pp = pp or self._metadata.pp or 1
        return Layout(
            spec.num_layers, tp or self._metadata.tp or 1, pp, ep or (self._metadata.ep if experts else None) or 1,
            experts, vpp, nxdt.counts(spec.num_layers, pp, vpp), apart=False,
        )  # fmt: skip

    def _on_ranks(self) -> Heads:
        args, spec, tp = self._args, self.spec, self.layout.tp
        copies = self._number("kv_size_multiplier", "target_kv_size_multiplier", "distributed_strategy.kv_replicator")
        copies = copies or 1
        if copies > 1 and self._style == "megatron":
            raise LayoutError("--kv-size-multiplier: Megatron style has no copies of kv heads; it must be 1.")
        padded = -(-spec.num_attention_heads // tp) * tp if args.pad_attn_heads else 0
        backend = args.target_hw_backend or args.hw_backend
        order = nxdt_flags.order(args.nxdt_kv_layout, backend)

        def heads(order: str) -> Heads:
            return Heads(spec.num_attention_heads, spec.num_query_groups, spec.kv_channels, tp, copies, order, padded)

        plain = heads("tiled")
        if order is None:
            if plain.copies > 1 and spec.num_query_groups > 1:
                raise UsageError(
                    "--hw-backend trn1 or trn2 is needed: it decides where the copies of kv heads lie "
                    f"(--kv-size-multiplier {copies})."
                )
            return plain
        if plain.copies == 1 and not padded:
            return plain
        wanted = heads(order)
        if order == "upstream" and wanted.placed != plain.placed:
            self.notes.append(
                "kv heads are laid out as AWS's converter does it for trn2, where queries meet other kv heads than in "
                "the source. The trn2 runtime reads copies next to each other: --nxdt-kv-layout runtime writes that."
            )
        return wanted

    def _switch(self, name: str, said: str, default: bool) -> bool:
        """A boolean from its flag, or from the training config, whose `default` is other than the converter's."""
        value: bool | None = getattr(self._args, name)
        if value is None and self._yaml:
            value = self._yaml.get(said, bool)
            return default if value is None else value
        return bool(value)

    def _form(self) -> str:
        spec, mha = self.spec, self.spec.num_query_groups == self.spec.num_attention_heads
        linear = self._switch("qkv_linear", "model.qkv_linear", False)
        if self._style == "megatron":
            return "joined" if mha else "grouped"
        if self._style == "dbrx":
            return "linear"  # its model never fuses
        if linear:
            return "fused" if self._switch("fuse_qkv", "model.fuse_qkv", True) else "linear"
        if self._heads.copies > 1:
            raise UsageError("--kv-size-multiplier above 1 needs --qkv-linear True: only that module has copies.")
        coalesced = self._args.coalesce_qkv
        if coalesced is None and self._yaml:
            coalesced = mha and self._switch("fuse_qkv", "model.fuse_qkv", True)
        if coalesced and not mha:
            raise LayoutError(
                f"--coalesce-qkv: only for as many kv heads as heads; there are {spec.num_query_groups} for "
                f"{spec.num_attention_heads}. Use --qkv-linear True --fuse-qkv True."
            )
        return "coalesced" if coalesced else "separate"

    def _rows(self) -> str:
        if self._style != "megatron":
            return nxdt.BLOCKED
        runtime = self._args.nxdt_megatron_qkv_layout == "runtime"
        if not runtime and self.spec.num_query_groups > self.layout.tp:
            self.notes.append(
                "fused qkv rows are laid out as AWS's converter does it, all heads of one kind together. NxDT's "
                "Megatron model reads them head by head: --nxdt-megatron-qkv-layout runtime writes that."
            )
        return nxdt.INTERLEAVED if runtime else nxdt.BLOCKED

    def _vocabulary(self) -> None:
        divisor = self._args.make_vocab_size_divisible_by
        multiple = (divisor or 0) * self.layout.tp
        size = self.spec.vocab_size
        self._padded = -(-size // multiple) * multiple if multiple else size
        if self._padded % self.layout.tp:
            raise LayoutError(
                f"tp {self.layout.tp} does not divide the vocabulary of {size}. --make-vocab-size-divisible-by 1 pads "
                "it; the model's vocab_size has to be the padded one then."
            )
        if self._padded != size:
            self.notes.append(f"the vocabulary of {size} is padded: train with a vocab_size of {self._padded}.")

    # Files

    def _plan(self) -> None:
        placed = list(placements(self._dialect.table(self._heads), self.spec, self.layout, self._padded))
        slots = cutting.slots(placed, self._metadata)
        ranks = list(self.layout.ranks())
        files = {rank: f"{nxdt_files.MODEL}/{nxdt_files.name(rank, self.layout.ep)}" for rank in ranks}
        self.routes, self.fills = cutting.ways(placed, self._metadata, files.__getitem__)
        self.builds = cutting.builds(placed, files.__getitem__)
        self.small: dict[str, bytes] = {}
        self.folders = [files[rank] + xser.TENSORS for rank in ranks] if self._xser else []
        self.plans: dict[str, PlannedFile] = {}
        if self._xser and self._args.nxdt_xser_layout == "refs":
            experts = {p.name for p in placed if p.ep_rank is not None} if self.layout.ep > 1 else set()
            planned = xser.Planned()
            for rank in ranks:
                planned.add(files[rank], list(slots[rank[1], rank[2]][None].values()), experts, shared=rank[2] > 0)
            self.plans, self.small = planned.plans, planned.small
            self._refer(planned.where)
            return
        plans = {place: torchzip.plan(chunks[None]) for place, chunks in slots.items()}  # the same for all tensor ranks
        self.plans = {files[rank]: plans[rank[1], rank[2]] for rank in ranks}

    def _refer(self, where: dict[tuple[str, str], tuple[str, str]]) -> None:
        """Lead everything from the slots of main files to the files of their tensors."""

        def moved(route: Route) -> Route:
            targets = [(*where[file, slot], tile) for file, slot, tile in route.targets if (file, slot) in where]
            return Route(targets, route.rows)

        self.routes = {key: moved(route) for key, route in self.routes.items()}
        self.fills = [(tensor, moved(route)) for tensor, route in self.fills]
        self.builds = {
            message: [Build(*where[b.file, b.slot], b.make) for b in builds if (b.file, b.slot) in where]
            for message, builds in self.builds.items()
        }
