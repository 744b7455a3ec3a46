"""A pickle machine that builds plain data, lazy tensors and inert stand-ins, and cannot run anything.

Not `pickle.Unpickler` with an own `find_class`: its C code takes gigabytes for a 13 byte pickle (a huge memo index),
overflows the C stack on a deeply nested dict key (the process dies), and sets attributes on classes it was handed.
Here every opcode is ours, every object it may touch is of a type we chose, and a call can only reach a builder of
`allowed.BUILDERS`.

Source: the opcodes of `pickletools.py` and their meaning in `pickle.py` of CPython 3.13, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import io
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

from ckptconv.containers.allowed import construct, hashable, resolve
from ckptconv.containers.inert import DTypeName, Global, Inert, short
from ckptconv.errors import SourceError
from ckptconv.lazy import LazyTensor

Persistent = Callable[[object], object]

_DAMAGE = (
    EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    OSError, struct.error,
)  # fmt: skip


def loads(data: bytes, path: str, persistent: Persistent | None = None) -> object:
    """The object in `data`; `path` is named in errors, `persistent` maps persistent ids (storages) to objects.

    Known plain types are rebuilt, everything else becomes `Inert`, `Global` or `DTypeName`. Raises SourceError for a
    damaged pickle and for one that refers to what no checkpoint needs.
    """
    return load(io.BytesIO(data), len(data), path, persistent)


def load(file: BinaryIO, size: int, path: str, persistent: Persistent | None = None) -> object:
    """The next object of an open file of `size` bytes, which is left just behind it; otherwise as `loads`."""
    machine = _Machine(file, size, path, persistent)
    try:
        return machine.run()
    except _DAMAGE as error:
        text = f"{type(error).__name__}: {error}"[:200]
        raise SourceError(
            f"{path}: the pickle is damaged near its byte {machine.position()} ({text}). "
            "The file is incomplete or was changed: fetch or copy it again."
        ) from error


def _no_persistent(key: object) -> object:
    raise ValueError(f"unexpected persistent id {short(key)}")


class _Machine:
    """The stack, the memo and the opcodes."""

    def __init__(self, file: BinaryIO, size: int, path: str, persistent: Persistent | None) -> None:
        self.file, self.size, self.path = file, size, path
        self.begin = file.tell()
        self.persistent = persistent or _no_persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        # A dict, because a memo index is any number the file says.
        self.memo: dict[int, Any] = {}
        self.copied, self.protocol = 0, 0

    def position(self) -> int:
        return self.file.tell() - self.begin

    def run(self) -> object:
        read = self.file.read
        while True:
            code = read(1)
            if code == b".":
                return self.stack.pop()
            if code not in _OPCODES:
                raise EOFError("it ends without a STOP") if not code else ValueError(f"unknown opcode {code!r}")
            _OPCODES[code](self)

    def take(self, count: int) -> bytes:
        if count > 4096 and count > self.size - self.file.tell():
            raise EOFError(f"{count} bytes announced")
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError("it ends early")
        return data

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> bytes:
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("it ends early")
        return line[:-1]

    def push(self, value: object) -> None:
        self.stack.append(value)

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def call(self, of: object, args: object, kwargs: object = None) -> None:
        """Push the result of a call of a name (never of an object a call returned)."""
        if not isinstance(of, Global):
            raise TypeError(f"a call of {short(of)}")
        if not isinstance(args, tuple) or not (kwargs is None or isinstance(kwargs, dict)):
            raise TypeError(f"arguments {short(args)} for {of}")
        # A builder copies its arguments; a file that asks for the same copy again and again is a memory bomb.
        self.copied += sum(len(arg) for arg in args if isinstance(arg, (str, bytes, bytearray, list, tuple)))
        if self.copied > (1 << 24) + 4 * self.position():
            raise MemoryError("far more data than the pickle holds")
        self.push(construct(of, args, kwargs))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
            return
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            raise TypeError(f"a state {short(state)}")
        fields = {key: value for part in parts if part for key, value in part.items()}
        if isinstance(target, Namespace):
            if not all(isinstance(key, str) for key in fields):
                raise TypeError("an attribute whose name is no text")
            vars(target).update(fields)
        elif isinstance(target, OrderedDict):
            # The only attribute torch sets; others could hide the methods of the dict.
            if "_metadata" in fields:
                vars(target)["_metadata"] = fields["_metadata"]
        elif not isinstance(target, (LazyTensor, dict, set)):
            raise TypeError(f"a state for {short(target)}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (dict, Inert)):
            raise TypeError(f"entries for {short(target)}")
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else hashable(key)] = value

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, Inert)):
            raise TypeError(f"elements for {short(target)}")
        target.extend(items)

    def add_items(self) -> None:
        items, target = self.above_mark(), self.stack[-1]
        if isinstance(target, Inert):
            target.extend(items)
        elif isinstance(target, set):
            target.update(hashable(item) for item in items)
        else:
            raise TypeError(f"elements for {short(target)}")

    def reduce(self) -> None:
        args, of = self.stack.pop(), self.stack.pop()
        self.call(of, args)

    def new_object_ex(self) -> None:
        kwargs, args, of = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call(of, args, kwargs)

    def instance(self) -> None:
        of = self.named(self.line(), self.line())
        self.call(of, tuple(self.above_mark()))

    def object(self) -> None:
        of, *args = self.above_mark()
        self.call(of, tuple(args))

    def named(self, module: bytes | str, name: bytes | str) -> Global | DTypeName:
        texts = [part.decode("utf-8") if isinstance(part, bytes) else part for part in (module, name)]
        if not all(isinstance(text, str) and text.isprintable() and len(text) < 1000 for text in texts):
            raise ValueError("a name that is no text")
        return resolve(texts[0], texts[1], self.path, self.protocol)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(self.named(module, name))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def dict_of(self) -> None:
        items = self.above_mark()
        self.push({})
        self.set_items(items)

    def frozen_set(self) -> None:
        items = self.above_mark()
        self.push(frozenset(hashable(item) for item in items))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def append_item(self) -> None:
        item = self.stack.pop()
        self.append_items([item])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            del self.stack[-1]
        else:
            self.above_mark()

    def integer(self) -> None:
        line = self.line()
        self.push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def text_2(self, data: bytes) -> None:
        """A str of Python 2: text where it is text, else the bytes."""
        try:
            self.push(data.decode("utf-8"))
        except UnicodeDecodeError:
            self.push(data)

    def quoted(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[0] != line[-1] or line[0] not in b"\"'":
            raise ValueError("a string without quotes")
        self.text_2(codecs.escape_decode(line[1:-1])[0])


def _text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


_OPCODES: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: setattr(m, "protocol", m.number(1)),          # PROTO
    b"\x95": lambda m: m.take(8),                                    # FRAME: only a hint for buffering
    b"(":    _Machine.mark,
    b"0":    _Machine.pop,
    b"1":    lambda m: m.above_mark() and None,                      # POP_MARK
    b"2":    lambda m: m.push(m.stack[-1]),                          # DUP
    b"N":    lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I":    _Machine.integer,
    b"J":    lambda m: m.push(_signed(m.take(4))),                   # BININT
    b"K":    lambda m: m.push(m.number(1)),                          # BININT1
    b"M":    lambda m: m.push(m.number(2)),                          # BININT2
    b"L":    lambda m: m.push(int(m.line().rstrip(b"L"))),           # LONG
    b"\x8a": lambda m: m.push(_signed(m.take(m.number(1)))),         # LONG1
    b"\x8b": lambda m: m.push(_signed(m.take(m.number(4)))),         # LONG4
    b"F":    lambda m: m.push(float(m.line())),
    b"G":    lambda m: m.push(struct.unpack(">d", m.take(8))[0]),    # BINFLOAT
    b"S":    _Machine.quoted,
    b"T":    lambda m: m.text_2(m.take(m.number(4))),                # BINSTRING
    b"U":    lambda m: m.text_2(m.take(m.number(1))),                # SHORT_BINSTRING
    b"V":    lambda m: m.push(str(m.line(), "raw-unicode-escape")),  # UNICODE
    b"X":    lambda m: m.push(_text(m.take(m.number(4)))),           # BINUNICODE
    b"\x8c": lambda m: m.push(_text(m.take(m.number(1)))),           # SHORT_BINUNICODE
    b"\x8d": lambda m: m.push(_text(m.take(m.number(8)))),           # BINUNICODE8
    b"B":    lambda m: m.push(m.take(m.number(4))),                  # BINBYTES
    b"C":    lambda m: m.push(m.take(m.number(1))),                  # SHORT_BINBYTES
    b"\x8e": lambda m: m.push(m.take(m.number(8))),                  # BINBYTES8
    b"\x96": lambda m: m.push(bytearray(m.take(m.number(8)))),       # BYTEARRAY8
    b")":    lambda m: m.push(()),
    b"t":    lambda m: m.push(tuple(m.above_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"]":    lambda m: m.push([]),
    b"l":    lambda m: m.push(m.above_mark()),                       # LIST
    b"a":    _Machine.append_item,
    b"e":    lambda m: m.append_items(m.above_mark()),               # APPENDS
    b"}":    lambda m: m.push({}),
    b"d":    _Machine.dict_of,
    b"s":    _Machine.set_item,
    b"u":    lambda m: m.set_items(m.above_mark()),                  # SETITEMS
    b"\x8f": lambda m: m.push(set()),
    b"\x90": _Machine.add_items,
    b"\x91": _Machine.frozen_set,
    b"g":    lambda m: m.push(m.memo[int(m.line())]),                # GET
    b"h":    lambda m: m.push(m.memo[m.number(1)]),                  # BINGET
    b"j":    lambda m: m.push(m.memo[m.number(4)]),                  # LONG_BINGET
    b"p":    lambda m: m.put(int(m.line())),
    b"q":    lambda m: m.put(m.number(1)),
    b"r":    lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),                           # MEMOIZE
    b"c":    lambda m: m.push(m.named(m.line(), m.line())),          # GLOBAL
    b"\x93": _Machine.stack_global,
    b"R":    _Machine.reduce,
    b"\x81": _Machine.reduce,                                        # NEWOBJ: a call of the class
    b"\x92": _Machine.new_object_ex,
    b"b":    _Machine.build,
    b"i":    _Machine.instance,
    b"o":    _Machine.object,
    b"P":    lambda m: m.push(m.persistent(str(m.line(), "ascii"))),
    b"Q":    lambda m: m.push(m.persistent(m.stack.pop())),
}  # fmt: skip
