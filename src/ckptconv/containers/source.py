"""Opening a container: is it a regular file, how long is it, and what is it when it is not what was expected.

Signatures are those of `file(1)`; the git-lfs pointer is the most frequent surprise by far.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from ckptconv.errors import SourceError
from ckptconv.files import forget, read_bytes

_SIGNATURES = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself (run `git lfs pull`)"),
    (b"PK\x05\x06",              "an empty zip archive"),
    (b"PK",                      "a zip archive (a torch.save file?)"),
    (b"\x89HDF",                 "an HDF5 file"),
    (b"\x1f\x8b",                "gzip-compressed"),
    (b"\xfd7zXZ",                "xz-compressed"),
    (b"\x28\xb5\x2f\xfd",        "zstd-compressed"),
    (b"BZh",                     "bzip2-compressed"),
    (b"\x93NUMPY",               "a numpy array file"),
    (b"GGUF",                    "a GGUF file"),
    (b"<",                       "an HTML or XML page (a failed download?)"),
    (b"\x80",                    "a pickle"),
    (b"{",                       "JSON text"),
)  # fmt: skip
_TAR_AT, _TAR = 257, b"ustar"


@dataclass(frozen=True)
class Source:
    """A regular file: its path, its size in bytes and its first bytes (at most 512)."""

    path: str
    size: int
    head: bytes

    @property
    def kind(self) -> str:
        """What the first bytes look like, in words."""
        if not self.size:
            return "empty"
        if self.head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
            return "a tar archive (torch.save before torch 0.2, or a packed directory)"
        for signature, name in _SIGNATURES:
            if self.head.startswith(signature):
                return name
        if self.head[8:9] == b"{" and int.from_bytes(self.head[:8], "little") <= self.size:
            return "a safetensors file"
        return f"of no known kind (it starts with {self.head[:8].hex(' ')})"


def opened(path: str | os.PathLike[str]) -> Source:
    """The file at `path`, with descriptors from earlier reads of that path closed.

    Raises SourceError when there is no such file, it is no regular file or cannot be read.
    """
    name = os.fspath(path)
    try:
        status = os.stat(name)
    except FileNotFoundError:
        raise SourceError(f"{name}: there is no such file. Is the path right?") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{name!r}: cannot be read: {error}.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise SourceError(f"{name}: is {kind}, expected a checkpoint file.")
    forget(name)
    return Source(name, status.st_size, read_bytes(name, 0, min(512, status.st_size)))
