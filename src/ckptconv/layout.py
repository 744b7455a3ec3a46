"""Which layer lives on which pipeline stage, and which ranks there are. Knows no names and no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from ckptconv.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of one checkpoint: tp tensor ranks, pp pipeline stages, ep expert ranks, `num_layers` in all.

    Each stage holds vpp chunks (virtual pipeline stages). `counts`: layers of each chunk in the order of the layers,
    that is chunk 0 of all stages before chunk 1 of all; empty where all hold as many. `mtp`, `final_norm`: (stage,
    chunk) of the MTP layers and of the final norm where it is not the last. `apart`: rank files keep the chunks of a
    stage apart, and count layers within them. Experts are cut over the tensor ranks like everything else (etp = tp),
    the only way the rank files allow.
    """

    num_layers: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    num_experts: int = 0
    vpp: int = 1
    counts: tuple[int, ...] = ()
    apart: bool = True
    mtp: tuple[int, int] | None = None
    final_norm: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep", "vpp"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}, expected at least 1.")
        self._check_chunks()
        if self.ep > 1 and (not self.num_experts or self.num_experts % self.ep):
            raise LayoutError(
                f"ep {self.ep} does not divide {self.num_experts} experts. Choose an expert parallel size that does."
                if self.num_experts
                else f"ep {self.ep}: this model has no experts. Leave the expert parallel size at 1."
            )

    def _check_chunks(self) -> None:
        chunks = self.pp * self.vpp
        if not self.counts:
            if self.num_layers % chunks:
                sizes = f"pp {self.pp}" + (f" x vpp {self.vpp}" if self.vpp > 1 else "")
                raise LayoutError(
                    f"{self.num_layers} layers do not divide into {sizes} equal stages. "
                    f"Choose sizes that divide {self.num_layers}, or say how many layers each stage holds."
                )
            object.__setattr__(self, "counts", (self.num_layers // chunks,) * chunks)
        if len(self.counts) != chunks or min(self.counts) < 0 or sum(self.counts) != self.num_layers:
            raise LayoutError(
                f"stages of {', '.join(map(str, self.counts))} layers: expected {chunks} (pp {self.pp}, vpp {self.vpp})"
                f" that hold {self.num_layers} layers together."
            )

    @property
    def last(self) -> tuple[int, int]:
        """(stage, chunk) of the output layer."""
        return self.pp - 1, self.vpp - 1

    def _firsts(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    def home_of(self, layer: int) -> tuple[int, int, int]:
        """(stage, chunk, local layer) of a global layer."""
        for number, first in enumerate(self._firsts()[:-1]):
            if first <= layer < first + self.counts[number]:
                chunk, stage = divmod(number, self.pp)
                return stage, chunk, layer - first
        raise LayoutError(f"layer {layer} is asked for, but the model has layers 0 to {self.num_layers - 1}.")

    def layers_of(self, stage: int, chunk: int = 0) -> range:
        """Global layers of a chunk of a stage, in order."""
        number = chunk * self.pp + stage
        first = self._firsts()[number]
        return range(first, first + self.counts[number])

    def expert_of(self, expert: int) -> tuple[int, int]:
        """(expert rank, local number) of a global expert."""
        return divmod(expert, self.num_experts // self.ep)

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """(tp rank, stage, ep rank) of every rank file, stage by stage."""
        for stage in range(self.pp):
            for rank in range(self.tp):
                for expert_rank in range(self.ep):
                    yield rank, stage, expert_rank
