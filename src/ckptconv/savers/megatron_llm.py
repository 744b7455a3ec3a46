"""EPFL's Megatron-LLM checkpoints: a release (or an iteration) with its args, for training on and for its own tools."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ckptconv import companions, numbers, writing
from ckptconv.containers import rankdir
from ckptconv.containers.inert import DTypeName
from ckptconv.containers.plan import Slot
from ckptconv.formats import mcore, megatron_llm, megatron_llm_args
from ckptconv.formats.megatron_llm import TOKENIZER
from ckptconv.formats.table import Row
from ckptconv.savers import _megatron
from ckptconv.spec import ModelSpec

#: The loader that reads what this writes (for --verify).
LOADER = "megatron_llm"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    group = parser.add_argument_group("saver megatron_llm")
    group.add_argument("--target-tensor-parallel-size", "--target-tp", type=numbers.positive, metavar="N",
                       help="tensor parallel size (default: the source's, else 1)")  # fmt: skip
    group.add_argument("--target-pipeline-parallel-size", "--target-pp", type=numbers.positive, metavar="N",
                       help="pipeline parallel size (default: the source's, else 1)")  # fmt: skip
    group.add_argument("--make-vocab-size-divisible-by", type=numbers.positive, metavar="N",
                       help="pad the vocabulary to a multiple of N * tp (default: the source's, else 128; where "
                       "nothing tells which rows are padding, all stay as they are if tp divides them)")  # fmt: skip
    group.add_argument("--pad-vocab", choices=writing.PADDINGS, default="zero",
                       help="padding rows: zeros, copies of the last row, or the mean row (default zero)")  # fmt: skip
    group.add_argument("--iteration", metavar="N|release", type=rankdir.iteration,
                       help="which iteration to write, and to read (default: release)")  # fmt: skip
    group.add_argument("--dialect", choices=tuple(megatron_llm.DIALECTS),
                       help="names as hf_to_megatron.py writes them, or as the trainer does (default: release for one "
                       "rank, encoder for several; the trainer loads both)")  # fmt: skip
    group.add_argument("--allow-inexact", action="store_true",
                       help="write even if Megatron-LLM computes something else from it; what differs is said"
                       )  # fmt: skip
    group.add_argument("--tokenizer-type", metavar="NAME", help="written into the checkpoint's args")
    group.add_argument("--tokenizer-model", metavar="PATH", help="the --vocab_file in the training flags")
    # What megatron_mcore has and this format has not.
    parser.set_defaults(
        target_expert_parallel_size=None, target_expert_tensor_parallel_size=None, moe_grouped_gemm=False,
        saver_transformer_impl="local", custom_layers=False,
    )  # fmt: skip


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    # Weights without an optimizer are a release: from an iteration the trainer wants to load the optimizer, too.
    args.iteration = "release" if args.iteration is None else args.iteration
    return _megatron.save(queue, args, Target, "megatron_llm")


class Target(_megatron.Target):
    """A checkpoint of Megatron-LLM."""

    SYSTEM = TRAINER = "Megatron-LLM"

    def built(self, spec: ModelSpec) -> ModelSpec:
        return megatron_llm.target_spec(spec)

    def rows(self, args: Namespace) -> tuple[Row, ...]:
        self._dialect = args.dialect or ("release" if self.layout.tp == self.layout.pp == 1 else "encoder")
        return megatron_llm.table(self._metadata.spec)

    def rows_of_vocabulary(self, args: Namespace, tp: int) -> int:
        rows = self.spec.vocab_size
        if self._metadata.vocab_as_is and not args.make_vocab_size_divisible_by and rows % tp == 0:
            return rows
        return mcore.padded_vocab(rows, self._divisor, tp)

    def tokenizer_of(self, args: Namespace) -> tuple[str | None, str | None]:
        metadata, carried = self._metadata, self._metadata.origin.companions
        kind = args.tokenizer_type or megatron_llm_args.tokenizer_type(
            metadata.spec, metadata.tokenizer_type, carried
        )
        here = str(Path(args.save_dir).absolute() / TOKENIZER) if TOKENIZER in carried else None
        return kind, args.tokenizer_model or here

    def counted(self, iteration: int | str) -> int | str:
        return iteration

    def arguments(self) -> dict[str, object]:
        same = self._metadata.origin.format == "megatron_llm"
        return megatron_llm_args.namespace(
            self._metadata.spec, tp=self.layout.tp, pp=self.layout.pp, padded_vocab_size=self.padded,
            make_vocab_size_divisible_by=self._divisor, iteration=self.iteration, tokenizer_type=self.tokenizer[0],
            params_dtype=DTypeName(self.spec.dtype), carried=self._metadata.arguments if same else {},
        )  # fmt: skip

    def refusals(self, spec: ModelSpec) -> list[str]:
        return megatron_llm_args.refusals(spec)

    def told(self, spec: ModelSpec) -> list[str]:
        return megatron_llm_args.limits(spec)

    def helpful(self, spec: ModelSpec) -> str:
        return "On the left is what it would make of it. "

    def nested(self, slots: dict[str, Slot]) -> dict[str, Any]:
        return megatron_llm.nested(slots, self._dialect)

    def training_flags(self) -> list[str]:
        return megatron_llm_args.flags(
            self._metadata.spec, tp=self.layout.tp, pp=self.layout.pp, make_vocab_size_divisible_by=self._divisor,
            tokenizer_type=self.tokenizer[0], vocab_file=self.tokenizer[1],
        )  # fmt: skip

    def more_files(self) -> dict[str, bytes]:
        path = self._metadata.origin.companions.get(TOKENIZER)
        return {TOKENIZER: companions.read(path)} if path else {}
