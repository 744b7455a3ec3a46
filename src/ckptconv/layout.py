"""Which layer lives on which pipeline stage, and which ranks there are. Knows no names and no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptconv.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of one checkpoint: tp tensor ranks, pp pipeline stages, ep expert ranks, `num_layers` in all.

    Experts are cut over the tensor ranks like everything else (etp = tp), the only way the rank files allow.
    """

    num_layers: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    num_experts: int = 0

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.num_layers % self.pp:
            raise LayoutError(
                f"{self.num_layers} layers do not divide into pp {self.pp} equal stages. "
                f"Choose a pipeline parallel size that divides {self.num_layers}."
            )

        if self.ep > 1 and (not self.num_experts or self.num_experts % self.ep):
            raise LayoutError(
                f"ep {self.ep} does not divide {self.num_experts} experts. Choose an expert parallel size that does."
                if self.num_experts
                else f"ep {self.ep}: this model has no experts. Leave the expert parallel size at 1."
            )

    @property
    def layers_per_stage(self) -> int:
        return self.num_layers // self.pp

    def stage_of(self, layer: int) -> tuple[int, int]:
        """(stage, local layer) of a global layer."""
        return divmod(layer, self.layers_per_stage)

    def layers_of(self, stage: int) -> range:
        """Global layers of a stage, in order."""
        return range(stage * self.layers_per_stage, (stage + 1) * self.layers_per_stage)

    def expert_of(self, expert: int) -> tuple[int, int]:
        """(expert rank, local number) of a global expert."""
        return divmod(expert, self.num_experts // self.ep)

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """(tp rank, stage, ep rank) of every rank file, stage by stage."""
        for stage in range(self.pp):
            for rank in range(self.tp):
                for expert_rank in range(self.ep):
                    yield rank, stage, expert_rank
