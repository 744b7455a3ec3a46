"""Which names a pickle may refer to, and what becomes of them.

Four kinds: names with a builder here (plain containers and torch's tensor rebuilders, all of them ours), torch dtypes
(`DTypeName`), names that are refused because no checkpoint needs them (the rest of the standard library, where the
dangerous functions live), and everything else, which becomes an inert stand-in. No name is ever looked up in a
module, so nothing a file says can run; the refusal tells the user that a file is not what it claims to be.

Sources: torch 2.13 `torch/_utils.py`, `torch/_tensor.py` (the rebuild functions), `torch/_weights_only_unpickler.py`
(the allow-list of `torch.load(weights_only=True)`), `copyreg.py` and `argparse.py` of CPython.
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ckptconv import dtypes
from ckptconv.containers.inert import DTypeName, Global, Inert
from ckptconv.containers.storage import dtype_view, is_rebuilt, rebuild
from ckptconv.errors import SourceError

#: torch dtypes that exist but have no row in `dtypes`: they are named, never converted.
_OTHER_DTYPES = frozenset((
    "half", "float", "double", "short", "int", "long", "uint1", "uint2", "uint3", "uint4", "uint5", "uint6",
    "uint7", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "complex32", "complex64", "complex128",
    "chalf", "cfloat", "cdouble", "quint8", "qint8", "qint32", "quint4x2", "quint2x4", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2",
))  # fmt: skip
#: Names of the standard library that real checkpoints hold and that become stand-ins like any other name.
_INERT_MODULES = frozenset((
    "array", "datetime", "decimal", "_decimal", "enum", "fractions", "pathlib", "typing", "uuid", "zoneinfo",
))  # fmt: skip
_INERT_NAMES = frozenset((
    "signal.Signals", "signal.Handlers", "io.BytesIO", "_io.BytesIO", "io.StringIO", "_io.StringIO",
    "functools.partial", "collections.deque", "collections.Counter", "collections.ChainMap", "dataclasses.MISSING",
    "http.HTTPStatus", "types.NoneType", "builtins.object", "builtins.list", "builtins.dict", "builtins.tuple",
    "builtins.int", "builtins.float", "builtins.bool", "builtins.str", "builtins.range", "builtins.NoneType",
    "builtins.Ellipsis", "builtins.NotImplemented",
))  # fmt: skip


def resolve(module: str, name: str, path: str, protocol: int = 4) -> Global | DTypeName:
    """What `module.name` stands for. Raises SourceError naming `path` for a name no checkpoint needs."""
    if protocol < 3:  # these speak of Python 2's names: `__builtin__ long` is builtins.int
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    if module == "torch" and (name in dtypes.BY_NAME or name in _OTHER_DTYPES):
        return DTypeName(name)
    top = module.partition(".")[0]
    known = f"{module}.{name}" in BUILDERS or f"{module}.{name}" in _INERT_NAMES or top in _INERT_MODULES
    if not known and top in sys.stdlib_module_names:
        raise SourceError(
            f"{path}: refusing to unpickle {module}.{name}: a checkpoint needs no such thing. "
            "Nothing was run; do not open this file with other programs unless you know who made it."
        )
    return Global(module, name)


def construct(of: Global, args: tuple[Any, ...], kwargs: Mapping[str, object] | None = None) -> object:
    """The result of calling `of`: what its builder makes, else a stand-in. Raises TypeError or ValueError."""
    builder = BUILDERS.get(f"{of.module}.{of.name}")
    if builder is None:
        return Inert(of.module, of.name, args, kwargs)
    if kwargs:
        raise TypeError(f"{of} takes no keyword arguments")
    return builder(*args)


def hashable(key: object, limit: int = 1000) -> object:
    """`key` itself when hashing it is safe and cheap; raises TypeError otherwise.

    A tuple nested a million deep overflows the C stack when it is hashed, and one built of two references to the
    same smaller tuple, forty times over, never ends: both fit into a few bytes of pickle.
    """
    waiting = [(key, 0)]
    while waiting:
        item, depth = waiting.pop()
        limit -= 1
        if isinstance(item, (tuple, frozenset)) and depth < 16 and len(item) <= limit:
            waiting += [(part, depth + 1) for part in item]
        elif limit < 0 or not isinstance(item, (str, int, float, bytes, complex, Inert, Global, DTypeName, type(None))):
            raise TypeError(f"a {type(item).__name__} cannot be (part of) a key")
    return key


def _items(values: tuple[Any, ...]) -> list[Any]:
    """The elements of the only argument of a container's constructor, which may be left out."""
    if not values:
        return []
    (items,) = values
    if not isinstance(items, (list, tuple)):
        raise TypeError(f"expected a list, found {type(items).__name__}")
    return list(items)


def _set(*args: Any) -> set[object]:
    return {hashable(item) for item in _items(args)}


def _frozenset(*args: Any) -> frozenset[object]:
    return frozenset(_set(*args))


def _ordered(*args: Any) -> OrderedDict[object, object]:
    return OrderedDict((hashable(key), value) for key, value in _items(args))


def _default(*args: Any) -> dict[object, object]:
    """A defaultdict, as a plain dict: its factory is of no use to us."""
    if len(args) > 1:
        raise TypeError("a defaultdict with contents")
    return {}


def _namespace() -> Namespace:
    return Namespace()


def _size(*args: Any) -> tuple[int, ...]:
    dims = tuple(_items(args))
    if not all(type(dim) is int for dim in dims):
        raise TypeError(f"torch.Size of {dims}")
    return dims


def _encode(text: Any, encoding: Any = "utf-8", errors: Any = "strict") -> bytes:
    """How protocols below 3 spell bytes: `_codecs.encode(text, "latin1")`."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise TypeError(f"_codecs.encode of a {type(text).__name__}")
    return text.encode(encoding)


def _bytes(*args: Any) -> bytes:
    # Not bytes(*args): bytes(10**12) is a terabyte from a dozen bytes of pickle.
    if args and isinstance(args[0], str):
        return _encode(*args)
    if len(args) == 1 and isinstance(args[0], (bytes, bytearray)):
        return bytes(args[0])
    return bytes(_items(args))


def _bytearray(*args: Any) -> bytearray:
    return bytearray(_bytes(*args))


def _number(*args: Any) -> complex:
    if not all(isinstance(arg, (int, float)) for arg in args):
        raise TypeError("complex of something that is no number")
    return complex(*args)


def _slice(*args: Any) -> slice:
    return slice(*args)


def _reconstructor(cls: Any, base: Any, state: Any) -> object:
    """`copyreg._reconstructor`, which protocols 0 and 1 use for plain objects."""
    return construct(_global(cls), () if state is None else (state,))


def _newobj(cls: Any, *args: Any) -> object:
    return construct(_global(cls), args)


def _newobj_ex(cls: Any, args: Any, kwargs: Any) -> object:
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise TypeError("copyreg.__newobj_ex__ without arguments")
    return construct(_global(cls), args, kwargs)


def _global(value: object) -> Global:
    if not isinstance(value, Global):
        raise TypeError(f"a {type(value).__name__} is no class")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> object:
    """`_rebuild_tensor` and `_rebuild_tensor_v2`: rest is requires_grad, hooks and, seldom, a dict of flags."""
    return rebuild(storage, offset, size, stride, flags=rest[2] if len(rest) > 2 else None)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> object:
    """The form for element types that have no storage class: bytes, and the type apart."""
    return rebuild(dtype_view(storage, dtype), offset, size, stride, flags=rest[0] if rest else None)


def _parameter(data: Any = None, *rest: Any) -> object:
    """A Parameter is its tensor: gradients, hooks and attributes are of no use to a conversion."""
    return data


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> object:
    """A tensor with attributes, or of a subclass: the plain tensor where the class is torch's own."""
    value = construct(_global(function), tuple(args))
    if is_rebuilt(value) and str(kind) in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        return value
    return Inert("torch._tensor", "_rebuild_from_type_v2", (function, kind, args, state))


BUILDERS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict":                   _ordered,
    "collections.defaultdict":                   _default,
    "argparse.Namespace":                        _namespace,
    "types.SimpleNamespace":                     _namespace,
    "builtins.set":                              _set,
    "builtins.frozenset":                        _frozenset,
    "builtins.bytes":                            _bytes,
    "builtins.bytearray":                        _bytearray,
    "builtins.complex":                          _number,
    "builtins.slice":                            _slice,
    "_codecs.encode":                            _encode,
    "copyreg._reconstructor":                    _reconstructor,
    "copyreg.__newobj__":                        _newobj,
    "copyreg.__newobj_ex__":                     _newobj_ex,
    "torch.Size":                                _size,
    "torch._utils._rebuild_tensor":              _tensor,
    "torch._utils._rebuild_tensor_v2":           _tensor,
    "torch._utils._rebuild_tensor_v3":           _tensor_v3,
    "torch._utils._rebuild_parameter":           _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter":              _parameter,
    "torch._tensor._rebuild_from_type_v2":       _from_type,
}  # fmt: skip
