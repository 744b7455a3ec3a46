"""The pickle machine: what it rebuilds (against `pickle.loads`), what it stands in for, what it refuses."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import signal
import struct
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from ckptconv.containers.inert import DTypeName, Global, Inert
from ckptconv.containers.unpickle import loads
from ckptconv.errors import SourceError

PLAIN = {
    "numbers": [0, 1, 255, 256, 65536, -1, 2**31, -(2**40), 10**400, 1.5, float("inf"), 2 + 3j, True, None],
    "text": ["", "é", "\ud800", "\n\\", "x" * 300, b"", b"\x00\xff", b"y" * 300, bytearray(b"z"), bytearray()],
    "nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {(1, "a"): {2: []}}),
    "sets": [set(), {1, 2}, frozenset(), frozenset({"a"})],
    "slice": slice(1, None, 2),
    "namespace": Namespace(a=1, b=[2]),
    "ordered": collections.OrderedDict(a=1, b=2),
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data(protocol: int) -> None:
    assert loads(pickle.dumps(PLAIN, protocol), "f") == PLAIN


def test_shared_and_recursive() -> None:
    shared: list[Any] = [1]
    shared.append(shared)
    result: Any = loads(pickle.dumps([shared, shared], 4), "f")
    assert result[0] is result[1] is result[0][1]


def test_simple_namespace_and_defaultdict_become_plain() -> None:
    values = [types.SimpleNamespace(a=1), collections.defaultdict(list, {"a": [1]})]
    for protocol in range(6):
        assert loads(pickle.dumps(values, protocol), "f") == [Namespace(a=1), {"a": [1]}]


def test_python_2_text() -> None:
    # pickle.dumps({'a': 'b\xff', u'c': set([1])}, 2) of Python 2.7
    data = b"\x80\x02}q\x00(U\x01aq\x01U\x02b\xffq\x02X\x01\x00\x00\x00cq\x03"
    data += b"c__builtin__\nset\nq\x04]q\x05K\x01a\x85q\x06Rq\x07u."
    assert loads(data, "f") == {"a": b"b\xff", "c": {1}}
    assert loads(b"(dp0\nS'a\\x41'\np1\nI01\nsS\"b\"\nL5L\ns.", "f") == {"aA": True, "b": 5}


def test_torch_names() -> None:
    data = b"\x80\x02(ctorch\nbfloat16\nctorch\nSize\n(K\x02K\x03t\x85Rctorch.nn.functional\ngelu\nt."
    result: Any = loads(data, "f")
    assert result == (DTypeName("bfloat16"), (2, 3), Global("torch.nn.functional", "gelu"))
    assert [str(part) for part in result] == ["torch.bfloat16", "(2, 3)", "torch.nn.functional.gelu"]


def module_class(name: str, **members: Any) -> Any:
    """A class that pickles as `megatron.core.<name>`, in a module that exists only while pickling."""
    return type(name, members.pop("bases", ()), {"__module__": "megatron.core", **members})


def dumped(value: Any, protocol: int, *classes: Any) -> bytes:
    parent, module = types.ModuleType("megatron"), types.ModuleType("megatron.core")
    for cls in classes:
        setattr(module, cls.__name__, cls)
    sys.modules.update({"megatron": parent, "megatron.core": module})
    try:
        return pickle.dumps(value, protocol)
    finally:
        del sys.modules["megatron"], sys.modules["megatron.core"]


@pytest.mark.parametrize("protocol", range(6))
def test_unknown_classes_keep_their_fields(protocol: int) -> None:
    plain = module_class("Plain")
    value = plain()
    value.tid, value.name = 3, "x"
    inert: Any = loads(dumped(value, protocol, plain), "f")
    assert isinstance(inert, Inert)
    assert (inert.module, inert.name) == ("megatron.core", "Plain")
    assert inert.fields == {"tid": 3, "name": "x"}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_slots_enums_lists_dicts_and_keyword_arguments(protocol: int) -> None:
    slotted = module_class("Slotted", __slots__=("a",))
    listed, mapped = module_class("Listed", bases=(list,)), module_class("Mapped", bases=(dict,))
    keyed = module_class(
        "Keyed", __new__=lambda cls, **k: object.__new__(cls), __getnewargs_ex__=lambda s: ((), {"k": 1})
    )
    Color = enum.Enum("Color", ["RED", "BLUE"], module="megatron.core")
    one = slotted()
    one.a = 5
    value = [one, listed([1, 2]), mapped(x=1), Color.BLUE] + [keyed()] * (protocol > 3)
    result: Any = loads(dumped(value, protocol, slotted, listed, mapped, Color, keyed), "f")
    assert result[0].fields == {"a": 5}
    assert result[1].elements == [1, 2]
    assert result[2].entries == {"x": 1}
    assert result[3].args == (2,)
    assert str(result[3]) == "megatron.core.Color(2)"
    if protocol > 3:
        assert result[4].kwargs == {"k": 1}
        assert str(result[4]) == "megatron.core.Keyed(k=1)"


@pytest.mark.parametrize("protocol", range(2, 6))
def test_harmless_names_of_the_standard_library(protocol: int) -> None:
    value = [
        signal.SIGTERM, datetime.datetime(2024, 1, 2), pathlib.PurePosixPath("/a/b"), decimal.Decimal("1.5"),
        functools.partial(int, base=2), collections.deque([1, 2], 5), collections.Counter("aab"), range(3), int,
    ]  # fmt: skip
    result: Any = loads(pickle.dumps(value, protocol), "f")
    assert all(isinstance(item, (Inert, Global)) for item in result)
    assert str(result[0]) == "signal.Signals(15)"
    assert result[5].elements == [1, 2]
    assert str(result[8]) == "builtins.int"


def test_numpy_becomes_a_stand_in() -> None:
    numpy = pytest.importorskip("numpy")
    result: Any = loads(pickle.dumps({"a": numpy.arange(3), "b": numpy.float32(1.5)}), "f")
    assert isinstance(result["b"], Inert)
    assert str(result["a"]).startswith("numpy.")
    assert result["a"].state[1] == (3,)


class Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.recipe = function, args

    def __reduce__(self) -> Any:
        return self.recipe


def attacks(mark: str) -> dict[str, bytes]:
    """Pickles that would write the file `mark` if anything in them ran."""
    import operator
    import os
    import runpy
    import shutil

    touch, code = f"touch {mark}", f"open({mark!r}, 'w').close()"
    calls: dict[str, Any] = {
        "system": Calls(os.system, touch),
        "popen": Calls(subprocess.Popen, ["touch", mark]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, mark, "w"),
        "import": Calls(__import__, "os"),
        "runpy": Calls(runpy._run_code, code, {}),  # type: ignore[attr-defined]
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "getattr chain": Calls(getattr, Calls(getattr, collections.OrderedDict, "fromkeys"), "__globals__"),
        "attrgetter": Calls(operator.attrgetter("system"), Calls(__import__, "os")),
        "map": Calls(list, Calls(map, eval, [code])),
        "nested": {"a": [Calls(collections.OrderedDict, [["x", Calls(os.system, touch)]])]},
        "copy": Calls(shutil.copy, "/etc/hostname", mark),
    }
    pickles = {
        f"{name} {protocol}": pickle.dumps(call, protocol) for protocol in (0, 2, 4) for name, call in calls.items()
    }
    shell = touch.encode()
    return pickles | {
        "inst": b"(S'" + shell + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + shell + b"'\no.",
        "posix": b"cposix\nsystem\n(S'" + shell + b"'\ntR.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(shell)]) + shell + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x02os\x8c\x0cpath.os.open\x93.",
        "newobj": b"\x80\x02cos\nsystem\nU" + bytes([len(shell)]) + shell + b"\x85\x81.",
        "newobj_ex": b"\x80\x04cos\nsystem\nU" + bytes([len(shell)]) + shell + b"\x85}\x92.",
        "python 2": b"c__builtin__\neval\n(S'1'\ntR.",
        "reconstructor": b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
        "class patch": b"\x80\x02cargparse\nNamespace\nN}U\x08__init__cbuiltins\neval\ns\x86b.",
        "windows": b"cnt\nsystem\n.",
        "ctypes": b"cctypes\nCDLL\n(S'libc.so.6'\ntR.",
        "pickle": b"cpickle\nloads\n(S'.'\ntR.",
        "importlib": b"cimportlib\nimport_module\n(S'os'\ntR.",
        "pty": b"cpty\nspawn\n(S'sh'\ntR.",
    }


def test_nothing_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pickles = attacks(str(mark))
    pickle.loads(pickles["system 2"])
    assert mark.exists(), "the attacks are real ones"
    mark.unlink()
    for name, data in pickles.items():
        with pytest.raises(SourceError) as caught:
            loads(data, "weights.pt")
        assert str(caught.value).startswith("weights.pt: refusing to unpickle "), name
    assert not mark.exists()


def test_calls_of_unknown_functions_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    mark.parent.joinpath("evil.py").write_text(f"open({str(mark)!r}, 'w')")
    sys.path.insert(0, str(tmp_path))
    try:
        result = loads(b"cevil\nrun\n(S'x'\ntR.", "f")
    finally:
        sys.path.remove(str(tmp_path))
    assert str(result) == "evil.run('x')"
    assert not mark.exists()
    assert "evil" not in sys.modules


DAMAGED = {
    "empty": b"",
    "no stop": b"\x80\x02}",
    "stop at once": b".",
    "unknown opcode": b"\xfe.",
    "no mark": b"t.",
    "short tuple": b"N\x86.",
    "no memo": b"h\x05.",
    "odd items": b"}(Nu.",
    "append to int": b"K\x01Na.",
    "set on list": b"]NNs.",
    "call of a dict": b"})R.",
    "call of an instance": b"cx\ny\n)R)R.",
    "no arguments": b"cx\ny\nNR.",
    "list as a key": b"}]Ns.",
    "state of an int": b"K\x01}b.",
    "state of a class": b"cargparse\nNamespace\n}b.",
    "namespace state": b"cargparse\nNamespace\n)\x81K\x01b.",
    "namespace key": b"cargparse\nNamespace\n)\x81}K\x01Nsb.",
    "extension": b"\x82\x01.",
    "buffer": b"\x97.",
    "persistent": b"NQ.",
    "persistent text": b"Px\n.",
    "utf-8": b"X\x01\x00\x00\x00\xff.",
    "not a number": b"Ix\n.",
    "long number": b"I" + b"9" * 5000 + b"\n.",
    "name": b"c\xff\nx\n.",
    "control in name": b"cx\x1b\ny\n.",
    "size": b"ctorch\nSize\n(S'a'\ntR.",
    "tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89}tR.",
    "too many arguments": b"cbuiltins\nset\n(]]tR.",
    "encode": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
    "bytes of a number": b"cbuiltins\nbytes\n(J\xff\xff\xff\x7ftR.",
    "bytearray of a number": b"cbuiltins\nbytearray\n(\x8a\x06\x00\x00\x00\x00\x00\x01tR.",
    "announced text": b"X\xff\xff\xff\xff.",
    "announced bytes": b"\x8e" + struct.pack("<Q", 2**62) + b".",
    "announced bytearray": b"\x96" + struct.pack("<Q", 2**40) + b".",
    "long tuple as a key": b"}N" + b"\x85" * 500_000 + b"Ns.",
    "doubling tuple as a key": b"}(N" + b"2\x86" * 60 + b"Ns.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(name: str) -> None:
    with pytest.raises(SourceError, match=r"^weights\.pt: the pickle is damaged near its byte"):
        loads(DAMAGED[name], "weights.pt")


def test_a_small_pickle_cannot_take_much_memory() -> None:
    """Neither a huge memo index nor a thousand copies of one list; in a child with 500 MB to take."""
    megabyte = b"X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x01"
    bombs = {
        "memo": b"Nr\x00\x00\x00\x10.",
        "copies": b"\x80\x02](" + megabyte + b"cbuiltins\nbytes\nh\x01U\x05ascii\x86R" * 2000 + b"e.",
        "deep": b"]" * 300_000 + b"a" * 299_999 + b".",
    }  # fmt: skip
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (500 << 20, 500 << 20))\n"
        "from ckptconv.containers.unpickle import loads\n"
        "from ckptconv.errors import SourceError\n"
        "try: loads(sys.stdin.buffer.read(), 'f')\n"
        "except SourceError as error: print(error)\n"
        "print('alive')"
    )
    outputs = {}
    for name, data in bombs.items():
        done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
        outputs[name] = done.stdout.decode()
        assert outputs[name].endswith("alive\n")
    assert outputs["memo"] == outputs["deep"] == "alive\n"
    assert "far more data than the pickle holds" in outputs["copies"]


def test_stand_ins_print_and_pickle() -> None:
    inert = Inert("a.b", "C", (1, "x" * 100, [1, 2], 10**5000), {"k": Inert("d", "E")})
    text = str(inert)
    assert text.startswith("a.b.C(1, 'xxx")
    assert "<list of 2>" in text
    assert "<int of" in text
    assert text.endswith("k=d.E)")
    inert.append(1)
    inert.extend([2])
    inert["x"] = 3
    copy = pickle.loads(pickle.dumps(inert))
    assert (copy.elements, copy.entries, copy.args[0]) == ([1, 2], {"x": 3}, 1)
