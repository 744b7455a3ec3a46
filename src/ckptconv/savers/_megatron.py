"""What the savers of Megatron's formats share: one model_optim_rng.pt per rank, the args, the training flags.

As it stands this is the `torch` format of megatron-core; `Target` has a method for everything that others do otherwise.
"""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckptconv import companions, cutting, numbers, writing
from ckptconv.containers import rankdir, torchzip
from ckptconv.containers.inert import DTypeName
from ckptconv.containers.plan import PlannedFile, Slot
from ckptconv.errors import LayoutError, TableError, TargetError, UsageError
from ckptconv.formats import mcore, megatron_args, megatron_layers, megatron_split
from ckptconv.formats.table import Row, rows_of
from ckptconv.lazy import LazyTensor
from ckptconv.messages import expected
from ckptconv.metadata import Metadata
from ckptconv.ops import Tile
from ckptconv.sharding import Placement, placements
from ckptconv.spec import ModelSpec
from ckptconv.staging import staged
from ckptconv.writing import Route

log = logging.getLogger("ckptconv.saver")

ARGS_FILE = "megatron_args.txt"


def add_arguments(parser: ArgumentParser, title: str) -> None:
    """Flags of the saver `title`."""
    group = parser.add_argument_group(f"saver {title}")
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
    group.add_argument("--release", dest="iteration", action="store_const", const="release",
                       help="the same as --iteration release")  # fmt: skip
    group.add_argument("--custom-layers", action="store_true",
                       help="write for the layers of examples/megatron_layers (--spec), which express more models"
                       )  # fmt: skip
    group.add_argument("--allow-inexact", action="store_true",
                       help="write even if Megatron computes something else from it; what differs is said")  # fmt: skip
    group.add_argument("--tokenizer-type", metavar="NAME", help="written into the checkpoint's args")
    group.add_argument("--tokenizer-model", metavar="PATH", help="written into the checkpoint's args")
    megatron_split.add_arguments(parser)


def save(queue: Any, args: Namespace, kind: type[Target], saver: str) -> dict[str, Any]:
    """Write args.save_dir as a `kind` of target. Returns bytes and digests. Raises CkptconvError of any kind."""
    with staged(args) as staging:
        metadata = queue.metadata()
        target = kind(metadata, args)
        mark = writing.fingerprint(
            metadata, saver=saver, **target.flags, pad_vocab=args.pad_vocab, tokenizer=target.tokenizer
        )
        written = writing.write(
            queue, staging, target.plans, target.routes, target.fills, metadata, args, mark, target.builds
        )
        described = {"format": saver, **target.flags, "limits": target.limits}
        staging.add(
            f"{target.directory}/{companions.PROVENANCE}", writing.provenance(metadata, described, written.digests)
        )
        small = [ARGS_FILE]
        staging.add(ARGS_FILE, target.args_file())
        if target.layers:
            small.append(megatron_layers.FILE)
            staging.add(megatron_layers.FILE, (json.dumps(target.layers, indent=2) + "\n").encode())
        for name, data in target.more_files().items():
            small += [] if name.startswith(f"{target.directory}/") else [name]
            staging.add(name, data)
        small += writing.carry(staging, metadata)
        staging.add(rankdir.TRACKER, str(target.iteration).encode())
        staging.publish([target.directory, *small], [rankdir.TRACKER])
    for sentence in target.limits:
        log.warning("saver: %s", sentence)
    return {"bytes": written.bytes, "digests": written.digests}


class Target:
    """Everything that follows from the metadata and the flags, before the first byte."""

    #: What cannot express a model that is refused.
    SYSTEM = "megatron-core"
    #: What reads the training flags.
    TRAINER = "Megatron-LM"

    #: what a file says of itself
    version = 3.0

    def __init__(self, metadata: Metadata, args: Namespace) -> None:
        self._metadata = metadata
        self.spec: ModelSpec = self.built(metadata.spec)
        tp = args.target_tensor_parallel_size or metadata.tp or 1
        pp = args.target_pipeline_parallel_size or metadata.pp or 1
        moe = self.spec.moe
        ep = args.target_expert_parallel_size or (metadata.ep if moe else None) or 1
        self.split = megatron_split.of_args(args)
        self.layout = self.split.layout(self.spec, tp, pp, ep)
        self.check_expert_ranks(args.target_expert_tensor_parallel_size or tp, tp)
        self._divisor = args.make_vocab_size_divisible_by or metadata.make_vocab_size_divisible_by or 128
        self.padded = self.rows_of_vocabulary(args, tp)
        self._impl, self._grouped = args.saver_transformer_impl, bool(moe) and args.moe_grouped_gemm
        self.tokenizer = self.tokenizer_of(args)
        self.iteration: int | str = metadata.iteration if args.iteration is None else args.iteration
        if self.iteration == 0:
            raise UsageError("--iteration 0: Megatron takes no iteration 0; give another number, or release.")
        self._number: Any = self.counted(self.iteration)
        self.layers = megatron_layers.settings(metadata.spec) if args.custom_layers else None
        self._module = (megatron_layers.MODULE, megatron_layers.OBJECTS[self._impl]) if self.layers else None
        self.directory = rankdir.iteration_name(self.iteration)
        self._table = self.rows(args)
        self.limits = self._expressible(args.allow_inexact)
        self.flags = {
            "tp": tp, "pp": pp, "ep": ep, "moe_grouped_gemm": self._grouped, "transformer_impl": self._impl,
            "padded_vocab_size": self.padded, "make_vocab_size_divisible_by": self._divisor,
            "iteration": self.iteration,
            **({"split": " ".join(self.split.flags())} if self.split.flags() else {}),
            **({"custom_layers": list(self._module)} if self._module else {}),
            **({"mtp_module": args.mtp_module} if self.spec.mtp_layers else {}),
        }  # fmt: skip
        self._placements = self.placed()
        self._more = list(self.more_tensors())
        self.plans = self._files()
        self.routes, self.fills = cutting.ways(self._placements, metadata, self._name)
        self.builds = cutting.builds(self._placements, self._name)
        for rank, slot, tensor in self._more:
            whole = Tile(0, 0, 0, 0, 0, tensor.rows, tensor.cols)
            self.fills.append((tensor, Route([(self._name(rank), slot.name, whole)])))

    # What targets of forks do otherwise

    def built(self, spec: ModelSpec) -> ModelSpec:
        """The model with the biases that the system builds it with."""
        return mcore.target_spec(spec)

    def rows_of_vocabulary(self, args: Namespace, tp: int) -> int:
        """Rows of the embedding, padding included."""
        return mcore.padded_vocab(self.spec.vocab_size, self._divisor, tp)

    def tokenizer_of(self, args: Namespace) -> tuple[str | None, str | None]:
        """Kind and place of the tokenizer."""
        kind = args.tokenizer_type or self._metadata.tokenizer_type
        return kind, args.tokenizer_model or _tokenizer_place(kind, self._metadata, args.save_dir)

    def counted(self, iteration: int | str) -> int | str:
        """The iteration as files have it: Megatron counts a release as 0."""
        return 0 if isinstance(iteration, str) else iteration

    def rows(self, args: Namespace) -> tuple[Row, ...]:
        """The format's table."""
        return mcore.table(self._impl, self._grouped, args.mtp_module, self.spec.model_type == "BERT")

    def placed(self) -> list[Placement]:
        """Where the tensors lie."""
        return list(placements(self._table, self.spec, self.layout, self.padded))

    def check_expert_ranks(self, etp: int, tp: int) -> None:
        """Raise LayoutError for a tensor parallel size of experts that files cannot have."""
        if etp != tp:
            raise LayoutError(
                f"--target-expert-tensor-parallel-size {etp} with tensor parallel size {tp}: in the torch format every "
                "tensor rank has its own file, so experts are cut over as many ranks as all else. Leave the flag out, "
                "or make both equal."
            )

    def arguments(self) -> dict[str, object]:
        """The args of a checkpoint."""
        return {
            **megatron_args.namespace(
                self._described, tp=self.layout.tp, pp=self.layout.pp, ep=self.layout.ep,
                padded_vocab_size=self.padded, make_vocab_size_divisible_by=self._divisor, transformer_impl=self._impl,
                iteration=self._number, tokenizer_type=self.tokenizer[0],
                tokenizer_model=self.tokenizer[1], params_dtype=DTypeName(self.spec.dtype),
                grouped_gemm=self._grouped, inexact=True, spec_module=self._module,
            ),
            **self.split.arguments(self.layout),
            **({megatron_layers.ATTRIBUTE: self.layers} if self.layers else {}),
        }  # fmt: skip

    def refusals(self, spec: ModelSpec) -> list[str]:
        """What the system cannot express, one sentence each."""
        return megatron_layers.refusals(spec) if self.layers else megatron_args.refusals(spec, tp=self.layout.tp)

    def told(self, spec: ModelSpec) -> list[str]:
        """What the system does not do with a checkpoint that is right, one sentence each."""
        rules = megatron_layers if self.layers else megatron_args
        found = [*rules.limits(spec), *self.split.limits()]
        if self.layout.tp > self.spec.num_query_groups:
            # transformer_config.py asserts num_query_groups % tp == 0 up to core_v0.15.0.
            found.append(
                f"tp {self.layout.tp} is larger than the {self.spec.num_query_groups} query groups, which "
                "megatron-core takes from 0.16 on: with an older one choose a tp that divides them."
            )
        return found

    def helpful(self, spec: ModelSpec) -> str:
        """What can be done about refusals, beside --allow-inexact."""
        if self.layers or megatron_layers.refusals(spec):
            return ""
        return "--custom-layers writes it for layers that can (examples/megatron_layers). "

    def nested(self, slots: dict[str, Slot]) -> dict[str, Any]:
        """The `model` of a file, with the slots of a stage by name."""
        return dict(slots)

    def training_flags(self) -> list[str]:
        """The flags that rebuild this model."""
        flags = megatron_args.flags(
            self._described, tp=self.layout.tp, pp=self.layout.pp, ep=self.layout.ep,
            make_vocab_size_divisible_by=self._divisor, transformer_impl=self._impl,
            tokenizer_type=self.tokenizer[0], tokenizer_model=self.tokenizer[1],
            padded_vocab_size=self.padded, grouped_gemm=self._grouped, inexact=True, spec_module=self._module,
        )  # fmt: skip
        return [*flags, *self.split.flags()]

    def more_tensors(self) -> Iterable[tuple[rankdir.Rank, Slot, LazyTensor]]:
        """Tensors that no message has; all tensor ranks of a stage have the same slots."""
        return ()

    def more_files(self) -> dict[str, bytes]:
        """Small files by name, some in the directory of the iteration."""
        return {}

    @property
    def _described(self) -> ModelSpec:
        """The model as the trainer's flags say it: they know norms on queries and keys of one kind only."""
        spec = self._metadata.spec
        return spec.replace(qk_norm="head") if self.layers and spec.qk_norm else spec

    def _expressible(self, allowed: bool) -> list[str]:
        spec = self._metadata.spec
        refusals = self.refusals(spec)
        if refusals and not (allowed and self._has_names()):
            reasons = "\n".join(f"  - {reason}" for reason in refusals)
            raise TargetError(
                f"{self.SYSTEM} cannot express this model:\n{reasons}\nNothing was written. "
                f"{self.helpful(spec)}{self._offer()}"
            )
        return [*refusals, *self.told(spec)]

    def _offer(self) -> str:
        inexact = "--allow-inexact writes the weights all the same."
        return inexact if self._has_names() else "Its tensors have no names there."

    def _has_names(self) -> bool:
        try:
            for message in expected(self.spec):
                rows_of(self._table, message, self.spec)
        except TableError:
            return False
        return True

    def _name(self, rank: rankdir.Rank) -> str:
        return f"{self.directory}/{rankdir.directory_name(rank, self.layout.pp, self.layout.ep)}/{rankdir.FILE}"

    def _files(self) -> dict[str, PlannedFile]:
        self.args = self.arguments()
        slots = cutting.slots(self._placements, self._metadata)
        for (_, stage, ep_rank), slot, _ in self._more:
            slots[stage, ep_rank][None][slot.name] = slot
        names: dict[int | None, str] = {chunk: f"model{chunk}" for chunk in range(self.layout.vpp)}
        if self.layout.vpp == 1:
            names = {None: "model"}
        # All tensor ranks have the same shapes, so one plan serves them.
        plans = {
            place: torchzip.plan({
                "args": Namespace(**self.args),
                "checkpoint_version": self.version,
                "iteration": self._number,
                **{name: self.nested(slots.get(place, {}).get(chunk, {})) for chunk, name in names.items()},
                "num_floating_point_operations_so_far": 0,
            })
            for place in {(stage, ep_rank) for _, stage, ep_rank in self.layout.ranks()}
        }  # fmt: skip
        return {self._name(rank): plans[rank[1], rank[2]] for rank in self.layout.ranks()}

    def args_file(self) -> bytes:
        """The training flags, one a line, behind comments that say what flags cannot."""
        lines = [
            f"# Flags for {self.TRAINER} that rebuild this model. "
            "Paste between the parentheses of MODEL_ARGS=( ), or use",
            f"# $(grep -v '^#' {ARGS_FILE}). Loading also needs --load DIR --finetune: there is no optimizer state.",
        ]
        lines += [f"# Beyond these flags: {sentence}" for sentence in self.limits]
        lines += self.training_flags()
        return ("\n".join(lines) + "\n").encode()


def _tokenizer_place(kind: str | None, metadata: Metadata, save_dir: str) -> str | None:
    """The carried tokenizer files: a Hugging Face tokenizer is loaded from a folder, Llama 2's from its file."""
    carried, folder = metadata.origin.companions, Path(save_dir).absolute() / companions.FOLDER
    if kind == "Llama2Tokenizer" and "tokenizer.model" in carried:
        return str(folder / "tokenizer.model")
    if any(companions.is_tokenizer(name) for name in carried):
        return str(folder)
    return metadata.tokenizer_model
