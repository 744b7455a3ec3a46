"""Legacy Megatron-LM models (before megatron-core), GPT and BERT, for --use-legacy-models (Megatron-LM up to 0.15)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ckptconv.containers.plan import Slot
from ckptconv.errors import LayoutError, UsageError
from ckptconv.formats import megatron_legacy
from ckptconv.formats.table import Row
from ckptconv.savers import _megatron
from ckptconv.spec import ModelSpec

#: The loader that reads what this writes (for --verify).
LOADER = "megatron_legacy"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver: those of megatron_mcore that say something here."""
    _megatron.add_arguments(parser, "megatron_legacy")
    parser.set_defaults(saver_transformer_impl="local")


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    if args.saver_transformer_impl != "local":
        raise UsageError(
            "--saver-transformer-impl transformer_engine: the legacy models are written with local layers only. Leave "
            "the flag out."
        )
    if args.custom_layers:
        raise UsageError("--custom-layers: the legacy models know no --spec. --saver megatron_mcore has them.")
    return _megatron.save(queue, args, Target, "megatron_legacy")


class Target(_megatron.Target):
    """A checkpoint of legacy models."""

    SYSTEM = "Megatron-LM's legacy models"

    def rows(self, args: Namespace) -> tuple[Row, ...]:
        if len(set(self.layout.counts)) > 1:
            stages = " + ".join(map(str, self.layout.counts))
            raise LayoutError(
                f"stages of {stages} layers: all stages of the legacy models have as many. Choose pipeline sizes that "
                f"divide {self.spec.num_layers} layers, without sizes of the first or last stage."
            )
        return megatron_legacy.table()

    def arguments(self) -> dict[str, object]:
        return super().arguments() | megatron_legacy.arguments(self._metadata.spec)

    def refusals(self, spec: ModelSpec) -> list[str]:
        return megatron_legacy.refusals(spec, self.layout.tp)

    def told(self, spec: ModelSpec) -> list[str]:
        return megatron_legacy.limits(spec, self.layout.tp, self.layout.vpp)

    def helpful(self, spec: ModelSpec) -> str:
        return "--saver megatron_mcore writes it. " if not super().refusals(spec) else ""

    def nested(self, slots: dict[str, Slot]) -> dict[str, Any]:
        return megatron_legacy.nested(slots)

    def training_flags(self) -> list[str]:
        return megatron_legacy.flags(self._metadata.spec, super().training_flags())
