"""A pickle of protocol 2, emitted by hand: the few opcodes that `torch.load(weights_only=True)` understands.

Source: torch 2.13 `torch/_tensor.py` (`_reduce_ex_internal`: which rebuild function, which arguments) and
`torch/_weights_only_unpickler.py` (the opcodes and names it takes); opcodes as in CPython `pickletools.py`.
"""

from __future__ import annotations

import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptconv import dtypes
from ckptconv.containers.inert import DTypeName
from ckptconv.containers.plan import Slot, by_name
from ckptconv.errors import TableError


@dataclass(frozen=True, eq=False)
class Instance:
    """An object of a class that only the reader has: the class called with nothing, then given its `state`; or, with
    `args`, what calling the class or function with them gives.
    """

    module: str
    name: str
    state: object = None
    args: tuple[object, ...] | None = None


def dumps(root: object) -> tuple[bytes, list[Slot]]:
    """The pickle of `root`, and its slots: slot number k is the storage called str(k).

    Takes dict, OrderedDict, list, tuple, str, int, float, bool, None, Namespace, Slot, DTypeName and Instance. Raises
    TableError for anything else, with its place.
    """
    emitter = _Emitter()
    emitter.emit(root, "root")
    return b"\x80\x02" + b"".join(emitter.out) + b".", emitter.slots


class _Emitter:
    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.slots: list[Slot] = []
        self.memo: dict[bytes, int] = {}

    def emit(self, value: object, where: str) -> None:
        if value is None or isinstance(value, bool):
            self.out.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self.out.append(_integer(value))
        elif isinstance(value, float):
            self.out.append(struct.pack(">cd", b"G", value))
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, DTypeName):
            self.named("torch", value.name)
        elif isinstance(value, Slot):
            self.tensor(value)
        elif isinstance(value, dict):
            if isinstance(value, OrderedDict):
                self.ordered()
            self.entries(value, where, new=not isinstance(value, OrderedDict))
        elif isinstance(value, Namespace):
            self.named("argparse", "Namespace")
            self.out.append(b")\x81")
            self.entries(vars(value), where)
            self.out.append(b"b")
        elif isinstance(value, Instance):
            self.named(value.module, value.name)
            if value.args is None:
                self.out.append(b")\x81")
            else:
                self.emit(value.args, where)
                self.out.append(b"R")
            if value.state is not None:
                self.emit(value.state, where)
                self.out.append(b"b")
        elif isinstance(value, (list, tuple)):
            self.out.append(b"(" if isinstance(value, tuple) else b"](")
            for index, item in enumerate(value):
                self.emit(item, f"{where}[{index}]")
            self.out.append(b"t" if isinstance(value, tuple) else b"e")
        else:
            raise TableError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold.")

    def entries(self, value: Mapping[Any, object], where: str, new: bool = True) -> None:
        self.out.append(b"}(" if new else b"(")
        for key, item in value.items():
            self.emit(key, f"a key of {where}")
            self.emit(item, f"{where}[{key!r}]")
        self.out.append(b"u")

    def once(self, code: bytes) -> None:
        """`code` pushes an object that never changes: the second time a reference to the first does."""
        if code in self.memo:
            index = self.memo[code]
            self.out.append(struct.pack("<cB", b"h", index) if index < 256 else struct.pack("<cI", b"j", index))
            return
        index = self.memo[code] = len(self.memo)
        self.out += [code, struct.pack("<cB", b"q", index) if index < 256 else struct.pack("<cI", b"r", index)]

    def text(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self.once(struct.pack("<cI", b"X", len(data)) + data)

    def named(self, module: str, name: str) -> None:
        self.once(f"c{module}\n{name}\n".encode())

    def ordered(self) -> None:
        self.named("collections", "OrderedDict")
        self.out.append(b")R")

    def tensor(self, slot: Slot) -> None:
        """`rebuild(storage, 0, shape, strides, False, OrderedDict()[, dtype])`, the storage by persistent id."""
        by_name([slot])
        storage = dtypes.BY_NAME[slot.dtype].storage
        self.named("torch._utils", "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3")
        self.out.append(b"((")
        self.text("storage")
        if storage:
            self.named("torch", storage)
        else:
            self.named("torch.storage", "UntypedStorage")
        self.text(str(len(self.slots)))
        self.text("cpu")
        self.slots.append(slot)
        self.out += [_integer(slot.nbytes // dtypes.size_of(slot.dtype) if storage else slot.nbytes), b"tQK\0("]
        self.out += [_integer(dim) for dim in slot.shape]
        self.out.append(b"t(")
        self.out += [_integer(step) for step in _strides(slot.shape)]
        self.out.append(b"t\x89")
        self.ordered()
        if not storage:
            self.named("torch", slot.dtype)
        self.out.append(b"tR")


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Row-major strides in elements; torch counts empty dimensions as one."""
    steps = [1]
    for dim in reversed(shape[1:]):
        steps.append(steps[-1] * max(dim, 1))
    return steps[::-1][: len(shape)]


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return struct.pack("<cB", b"K", value)
    if 0 <= value < 1 << 16:
        return struct.pack("<cH", b"M", value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) > 255:
        raise TableError(f"a number of {value.bit_length()} bits cannot be held by a checkpoint.")
    return struct.pack("<cB", b"\x8a", len(data)) + data
