"""Flags that both NxDT plugins take, in the words of AWS's converter, and what an NxDT training config says of them.

Source: neuronx-distributed 0.18 `scripts/checkpoint_converter.py` (names and defaults);
neuronx-distributed-training 1.6 `examples/conf/*.yaml`.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _ArgumentGroup
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptconv import numbers
from ckptconv.errors import SourceError, UsageError, why

#: Direction of AWS's converter -> (source is NxDT, target is NxDT).
DIRECTIONS = {
    "convert_from_full_state": (False, True),
    "convert_to_full_state": (True, False),
    "convert_from_xser": (True, True),
    "convert_to_xser": (True, True),
}
BACKENDS = ("trn1", "trn2")
#: Where converter and runtime disagree, whose layout; or the order of heads by name.
KV_LAYOUTS = ("upstream", "runtime", "tiled", "adjacent")
ROW_LAYOUTS = ("upstream", "runtime")


def switch(text: str) -> bool:
    """`True`, `false`, `1`, `no`, ... as people mean them."""
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def add(parser: ArgumentParser, title: str) -> _ArgumentGroup:
    """The flags that loader and saver share. In a conversion from NxDT they describe the source."""
    group = parser.add_argument_group(title)
    flag = group.add_argument

    def boolean(name: str, text: str) -> None:
        flag(name, type=switch, nargs="?", const=True, metavar="BOOL", help=text)

    flag("--model-style", choices=("hf", "megatron"), help="whose names and modules (default: hf, or as in the files)")
    flag("--hw-backend", choices=BACKENDS, help="the hardware, which decides where copies of kv heads lie")
    flag("--tp-size", type=numbers.positive, metavar="N", help="tensor parallel size")
    flag("--pp-size", type=numbers.positive, metavar="N", help="pipeline parallel size")
    flag("--ep-size", type=numbers.positive, metavar="N", help="expert parallel size")
    flag("--virtual-pp-size", type=numbers.positive, metavar="N", help="chunks of layers on each pipeline stage")
    flag("--kv-size-multiplier", type=numbers.positive, metavar="N", help="copies of each kv head (kv_replicator)")
    boolean("--qkv-linear", "the qkv module of models with fewer kv heads than heads")
    boolean("--fuse-qkv", "with --qkv-linear: q, k and v in one tensor")
    boolean("--coalesce-qkv", "q, k and v in one tensor where every head has its own kv head")
    boolean("--pad-attn-heads", "add query heads of zeros until tp divides them")
    flag("--i-tp-round-factor", type=numbers.natural, metavar="N", help="pad a rank's expert rows to a multiple of N")
    boolean("--save-xser", "write tensors in files of their own, as torch_xla does")
    boolean("--load-xser", "the source is written so (found from the files)")
    flag("--model-key", default="model", metavar="KEY", help="the dict with the weights in files that hold more")
    flag("--n-layers", type=numbers.natural, metavar="N", help="checked against the model")
    flag("--config", metavar="PATH", help="the model's config.json, where it does not lie with the weights")
    flag("--nxdt-yaml-config", metavar="PATH", help="the training config: sizes and forms not said by flags")
    flag("--nxdt-kv-layout", choices=KV_LAYOUTS, help="with a kv size multiplier: whose order of kv heads")
    flag("--nxdt-megatron-qkv-layout", choices=ROW_LAYOUTS, help="Megatron style: whose order of rows of fused qkv")
    for name in DIRECTIONS:
        flag("--" + name.replace("_", "-"), action="store_true", help="accepted and checked: the plugins say it")
    return group


def check_direction(args: Namespace, source: bool, target: bool) -> None:
    """Raise UsageError unless the flags for the direction say what the plugins do. source, target: is it NxDT."""
    said = [name for name in DIRECTIONS if getattr(args, name)]
    flags = " and ".join("--" + name.replace("_", "-") for name in said)
    if len(said) > 1:
        raise UsageError(f"{flags} contradict one another: give one of them, or none.")
    if said and DIRECTIONS[said[0]] != (source, target):
        wanted = " to ".join("NxDT" if nxdt else "another format" for nxdt in DIRECTIONS[said[0]])
        raise UsageError(f"{flags} is from {wanted}, but the loader and the saver do otherwise. Change the plugins.")


def check_layers(args: Namespace, found: int) -> None:
    """Raise UsageError when --n-layers (0: not said) is not what the model has."""
    if args.n_layers and args.n_layers != found:
        raise UsageError(f"--n-layers {args.n_layers}: the model has {found}. Is it the model you mean?")


def order(layout: str | None, backend: str | None) -> str | None:
    """The order of kv heads that flags ask for, by its name in nxdt_heads; None where they do not tell."""
    if layout in ("tiled", "adjacent"):
        return layout
    if backend is None:
        return None
    return {"trn1": "tiled", "trn2": "adjacent" if layout == "runtime" else "upstream"}[backend]


@dataclass(frozen=True)
class Training:
    """What an NxDT training config says. Values are None where it does not."""

    path: str
    values: Mapping[str, Any]

    def get(self, name: str, kind: type = int) -> Any:
        """The value at `a.b`, interpolated. Raises SourceError when it is of another type."""
        value = _at(self.values, name)
        for _ in range(8):
            match = re.fullmatch(r"\$\{(\.?)([\w.]+)\}", value) if isinstance(value, str) else None
            if not match:
                break
            above = name.rpartition(".")[0] + "." if match[1] else ""
            value = _at(self.values, above + match[2])
        if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            value = _number(value)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise SourceError(f"{self.path}: {name} is {value!r}, expected {kind.__name__}.")
        return value


def _number(value: int | str) -> float | str:
    try:
        return float(value)  # yaml takes 1e-5 for text
    except ValueError:
        return str(value)


def _at(values: object, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def training(path: str | None) -> Training | None:
    """The config that --nxdt-yaml-config names. Raises SourceError."""
    if path is None:
        return None
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {why(error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SourceError(f"{path}: is not YAML ({str(error).splitlines()[0]}). Is it the right file?") from error
    if not isinstance(values, dict):
        raise SourceError(
            f"{path}: holds a YAML {type(values).__name__}, expected a training config. "
            "Is it the right file?"
        )
    return Training(path, values)
