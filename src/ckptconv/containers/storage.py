"""torch storages and the tensors that are views of them, as places in a file.

Source: torch 2.13 `torch/_utils.py` (`_rebuild_tensor*`), `torch/storage.py` (class names). Offsets and strides of
tensors are in elements, those of storages in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from ckptconv import dtypes
from ckptconv.containers.inert import DTypeName, Global, Inert, short
from ckptconv.errors import SourceError
from ckptconv.lazy import FileTensor, LazyTensor, Transposed

_UNTYPED = frozenset(("UntypedStorage", "_UntypedStorage"))
#: Dimensions of a tensor at most: torch's limit.
_MAX_RANK = 64


@dataclass(frozen=True)
class Storage:
    """`nbytes` bytes of `path` from `offset` on; `dtype` None is a run of bytes without a type.

    `unreadable` is shared by the storages of a file: tensors that exist but cannot be expressed, each with why, to
    be reported by name when the whole tree is known.
    """

    path: str
    key: str
    dtype: str | None
    offset: int
    nbytes: int
    unreadable: list[tuple[Inert, str]] = field(default_factory=list, compare=False, repr=False)


def storage_dtype(kind: object) -> str | Inert | None:
    """The element type of a storage class such as `torch.BFloat16Storage`, None for the untyped one.

    A stand-in for storage classes of types that cannot be converted (complex, quantized). Raises TypeError for
    anything that is no storage class.
    """
    if not isinstance(kind, Global) or kind.module.partition(".")[0] != "torch" or not kind.name.endswith("Storage"):
        raise TypeError(f"{short(kind)} is no storage class")
    if kind.name in _UNTYPED:
        return None
    row = dtypes.BY_STORAGE.get(kind.name)
    return row.name if row else Inert(kind.module, kind.name)


def is_rebuilt(value: object) -> bool:
    return isinstance(value, LazyTensor)


def dtype_view(storage: object, dtype: object) -> object:
    """`storage` with elements of another type; a stand-in for types that cannot be converted."""
    if not isinstance(dtype, DTypeName):
        raise TypeError(f"{short(dtype)} is no dtype")
    if not isinstance(storage, Storage):
        return storage
    return replace(storage, dtype=dtype.name) if dtype.name in dtypes.BY_NAME else Inert("torch", dtype.name)


def rebuild(storage: object, offset: object, size: object, stride: object, flags: object = None) -> LazyTensor | Inert:
    """The view of `storage` that starts at element `offset`, of shape `size` and with `stride` per dimension.

    A stand-in where the type or the strides cannot be expressed. Raises TypeError for arguments that are no tensor's,
    SourceError for a view that leaves its storage.
    """
    shape, steps = _ints(size), _ints(stride)
    if len(shape) != len(steps) or len(shape) > _MAX_RANK or type(offset) is not int or offset < 0:
        raise TypeError(f"a tensor of shape {short(size)}, strides {short(stride)} at {short(offset)}")
    stand_in = Inert("torch._utils", "_rebuild_tensor_v2", (storage, offset, shape, steps))
    if isinstance(storage, Inert):
        return stand_in
    if not isinstance(storage, Storage):
        raise TypeError(f"a tensor in a {type(storage).__name__}")
    name = storage.dtype or "uint8"
    _check_inside(storage, name, offset, shape, steps)
    place = storage.offset + offset * dtypes.size_of(name)
    if isinstance(flags, dict) and any(flags.values()):
        storage.unreadable.append((stand_in, "is a conjugate or negative view, which no other format can hold"))
        return stand_in
    if _contiguous(shape, steps):
        return FileTensor(storage.path, place, name, shape)
    if len(shape) == 2 and _contiguous(shape[::-1], steps[::-1]):
        return Transposed(FileTensor(storage.path, place, name, shape[::-1]))
    text = f"has shape {list(shape)} and strides {list(steps)}, expected a contiguous tensor or a transposed matrix"
    storage.unreadable.append((stand_in, text))
    return stand_in


def _ints(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(v) is int and 0 <= v < 1 << 63 for v in value):
        raise TypeError(f"{short(value)} is no shape")
    return tuple(value)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements lie row-major without gaps; the strides of dimensions of one element say nothing."""
    if not prod(shape):
        return True
    expected = 1
    for dim, step in zip(reversed(shape), reversed(stride), strict=True):
        if dim != 1 and step != expected:
            return False
        expected *= dim
    return True


def _check_inside(storage: Storage, dtype: str, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    if not prod(shape):
        return
    last = offset + sum((dim - 1) * step for dim, step in zip(shape, stride, strict=True))
    needed = (last + 1) * dtypes.size_of(dtype)
    if needed > storage.nbytes:
        raise SourceError(
            f"{storage.path}: a {dtype} tensor {list(shape)} needs {needed} bytes of storage {storage.key!r}, which "
            f"has {storage.nbytes}. The file is damaged: fetch or copy it again."
        )
