"""How Megatron divides layers over pipeline stages: its flags, and the layers of each stage and virtual stage.

Source: Megatron-LM core_v0.16.1 `megatron/core/transformer/transformer_block.py` (get_num_layers_to_build,
has_final_layernorm_in_this_stage), `pipeline_parallel_layer_layout.py`, `megatron/training/arguments.py`
(validate_args).
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ckptconv import numbers
from ckptconv.errors import LayoutError, UsageError
from ckptconv.layout import Layout
from ckptconv.spec import ModelSpec


@dataclass(frozen=True)
class Split:
    """What a trainer is told; every field is a flag of Megatron's and an attribute of its args by the same name.

    virtual stages: chunks of layers on each stage. first, last: layers of the first and the last stage, where they
    differ from the others'. account_for_*: the embedding or the loss counts as a layer. The layout is a string of
    stages (E embedding, t decoder layer, m MTP layer, L loss) that says everything by itself.
    """

    num_virtual_stages_per_pipeline_rank: int | None = field(
        default=None, metadata={"help": "virtual pipeline stages of each stage (vpp)", "also": "--target-vpp"}
    )
    num_layers_per_virtual_pipeline_stage: int | None = field(
        default=None, metadata={"help": "layers of each virtual pipeline stage, instead of their number"}
    )
    decoder_first_pipeline_num_layers: int | None = field(
        default=None, metadata={"help": "layers of the first pipeline stage, where it differs from the others"}
    )
    decoder_last_pipeline_num_layers: int | None = field(
        default=None, metadata={"help": "layers of the last pipeline stage, where it differs from the others"}
    )
    account_for_embedding_in_pipeline_split: bool = field(
        default=False, metadata={"help": "count the embedding as a layer of the first stage"}
    )
    account_for_loss_in_pipeline_split: bool = field(
        default=False, metadata={"help": "count the loss as a layer of the last stage"}
    )
    pipeline_model_parallel_layout: str | None = field(
        default=None, metadata={"help": "what each stage holds, as Megatron writes it: 'Ettt|(tt|)*5,m|L'"}
    )

    def layout(self, spec: ModelSpec, tp: int, pp: int, ep: int) -> Layout:
        """Where the layers of a model lie. Raises LayoutError where Megatron would not start."""
        experts = spec.moe.num_experts if spec.moe else 0
        if self.pipeline_model_parallel_layout is not None:
            return self._of_string(spec, tp, pp, ep, experts)
        counted = spec.num_layers + self.account_for_embedding_in_pipeline_split
        counted += self.account_for_loss_in_pipeline_split
        vpp = self._vpp(counted, pp)
        counts = [number // vpp for number in self._stages(spec.num_layers, counted, pp, vpp)] * vpp
        counts[0] -= self.account_for_embedding_in_pipeline_split
        counts[-1] -= self.account_for_loss_in_pipeline_split
        layout = Layout(spec.num_layers, tp, pp, ep, experts, vpp, tuple(counts))
        return _with_norm(layout, spec)

    def _vpp(self, counted: int, pp: int) -> int:
        vpp, each = self.num_virtual_stages_per_pipeline_rank, self.num_layers_per_virtual_pipeline_stage
        if vpp is not None and each is not None:
            raise LayoutError(
                "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage say the same in "
                "two ways. Give one of them."
            )
        if each is not None:
            if self._uneven:
                raise LayoutError(
                    "--num-layers-per-virtual-pipeline-stage cannot be given with sizes of the first or last stage. "
                    "Give --num-virtual-stages-per-pipeline-rank instead."
                )
            if counted % (pp * each):
                raise LayoutError(
                    f"{counted} layers do not divide into virtual stages of {each} on {pp} pipeline stages. Choose a "
                    f"number of layers that divides {counted}/{pp}."
                )
            vpp = counted // pp // each
        if vpp is not None and vpp > 1 and pp == 1:
            raise LayoutError("virtual pipeline stages need several pipeline stages. Give --target-pp, or one virtual.")
        return vpp or 1

    @property
    def _uneven(self) -> bool:
        return (
            self.decoder_first_pipeline_num_layers is not None or self.decoder_last_pipeline_num_layers is not None
        )

    def _stages(self, num_layers: int, counted: int, pp: int, vpp: int) -> list[int]:
        """Layers of each stage, embedding and loss counted."""
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        if self._uneven and counted != num_layers:
            raise LayoutError("sizes of the first or last stage and --account-for-* cannot be given together.")
        said = [size for size in (first, last) if size is not None]
        if len(said) > pp:
            raise LayoutError("the one pipeline stage is both the first and the last: give --target-pp.")
        left, stages = counted - sum(said), pp - len(said)
        if left < 0 or (left % stages or not left if stages else left):
            beside = f" beside the {' and '.join(map(str, said))} of the first or last stage" if said else ""
            raise LayoutError(
                f"{left} layers do not divide into {stages if said else f'pp {pp}'} equal stages{beside}. "
                "Choose a pipeline parallel size that "
                "divides them, or say the stages' sizes: --decoder-first-pipeline-num-layers, "
                "--decoder-last-pipeline-num-layers, --account-for-embedding-in-pipeline-split, "
                "--account-for-loss-in-pipeline-split, --pipeline-model-parallel-layout."
            )
        sizes = [left // stages] * stages if stages else []
        sizes = ([first] if first is not None else []) + sizes + ([last] if last is not None else [])
        odd = next((size for size in sizes if size % vpp), None)
        if odd is not None:
            raise LayoutError(
                f"{odd} layers of a stage do not divide into vpp {vpp} virtual stages. Choose a number that divides "
                "every stage's."
            )
        return sizes

    def _of_string(self, spec: ModelSpec, tp: int, pp: int, ep: int, experts: int) -> Layout:
        others = [f.name for f in fields(self)[:-1] if getattr(self, f.name) not in (None, False)]
        if others:
            other = others[0].replace("_", "-")
            raise LayoutError(f"--pipeline-model-parallel-layout says everything by itself: leave out --{other}.")
        text = self.pipeline_model_parallel_layout or ""
        stages = stages_of(text)
        if len(stages) % pp:
            raise LayoutError(
                f"--pipeline-model-parallel-layout {text!r}: has {len(stages)} stages, expected a multiple of pp {pp}."
            )
        counts = {letter: [stage.count(letter) for stage in stages] for letter in "EtmL"}
        flat = "".join(stages)
        if sum(counts["t"]) != spec.num_layers or sum(counts["m"]) != spec.mtp_layers:
            raise LayoutError(
                f"--pipeline-model-parallel-layout {text!r}: has {sum(counts['t'])} decoder and {sum(counts['m'])} MTP "
                f"layers, the model has {spec.num_layers} and {spec.mtp_layers}."
            )
        mtp = [number for number, count in enumerate(counts["m"]) if count]
        wrong = (
            "must begin with the one E and end with the one L" if not re.fullmatch("E[^EL]*L", flat)
            else "must have the MTP layers behind all decoder layers" if re.search("m.*t", flat)
            else "must have all MTP layers in one stage, in its last virtual stage"
            if len(mtp) > 1 or any(number < len(stages) - pp for number in mtp) else ""
        )  # fmt: skip
        if wrong:
            raise LayoutError(f"--pipeline-model-parallel-layout {text!r}: {wrong}.")
        layout = Layout(spec.num_layers, tp, pp, ep, experts, len(stages) // pp, tuple(counts["t"]))
        return _with_norm(layout, spec, (mtp[0] % pp, mtp[0] // pp) if mtp else None)

    def arguments(self, layout: Layout) -> dict[str, object]:
        """The attributes of a trainer's args."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**said, "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None}

    def flags(self) -> list[str]:
        """The training flags, one an item."""
        found = []
        for f in fields(self):
            value, flag = getattr(self, f.name), f"--{f.name.replace('_', '-')}"
            if value is True:
                found.append(flag)
            elif value not in (None, False):
                found.append(f"{flag} '{value}'" if isinstance(value, str) else f"{flag} {value}")
        return found

    def limits(self) -> list[str]:
        """What not every release can do with it."""
        if self.pipeline_model_parallel_layout is None:
            return []
        return ["--pipeline-model-parallel-layout is known to Megatron-LM from 0.13 on, MTP layers in it from 0.14 on, "
                "and a final norm apart from the loss from 0.16 on."]  # fmt: skip


def _with_norm(layout: Layout, spec: ModelSpec, mtp: tuple[int, int] | None = None) -> Layout:
    """With MTP layers the final norm is behind the last decoder layer, wherever that is (from core_v0.16.0 on)."""
    stage, chunk, _ = layout.home_of(spec.num_layers - 1)
    return replace(layout, mtp=mtp, final_norm=(stage, chunk) if spec.mtp_layers else None)


def stages_of(text: str) -> list[str]:
    """The stages of a layout string, one letter per layer. Raises LayoutError."""
    flat = text.replace(",", "")
    # A group holds no group, and repetitions of single letters are within or without groups.
    for pattern in (r"\(([^)]+)\)\*(\d{1,4})", r"(.)\*(\d{1,4})"):
        flat = re.sub(pattern, lambda match: match[1] * int(match[2]), flat)
        if len(flat) > 10**5:
            break
    strange = set(flat) - set("EtmL|")
    if strange or len(flat) > 10**5:
        raise LayoutError(
            f"--pipeline-model-parallel-layout {text!r}: {min(strange, default='its length')!r} has no meaning there. "
            "Stages are made of E, t, m and L, divided by |, repeated by *n: 'Ettt|(tt|)*5,m|L'."
        )
    return flat.split("|")


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of a saver, as Megatron spells them."""
    group = parser.add_argument_group("layers of pipeline stages, as Megatron's flags say them")
    for f in fields(Split):
        names = [f"--{f.name.replace('_', '-')}", *([f.metadata["also"]] if "also" in f.metadata else [])]
        if isinstance(f.default, bool):
            group.add_argument(*names, action="store_true", help=f.metadata["help"])
        elif f.name == "pipeline_model_parallel_layout":
            group.add_argument(*names, metavar="STRING", help=f.metadata["help"])
        else:
            group.add_argument(*names, type=numbers.positive, metavar="N", help=f.metadata["help"])


def of_args(args: Namespace) -> Split:
    """What the flags say; loaders and savers of others may have declared them with other types. Raises UsageError."""
    values: dict[str, Any] = {f.name: getattr(args, f.name, f.default) for f in fields(Split)}
    for name, value in values.items():
        if isinstance(value, str) and name != "pipeline_model_parallel_layout":
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected a number.")
    return Split(**values)
