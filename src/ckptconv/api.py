"""What the command line does, for programs: `convert` a checkpoint, or `open` one and look at its tensors.

Flags are those of the command line, with underscores: `target_tp=2`, `overwrite=True`. Where the command line ends with
an exit code, these raise a CkptconvError that has it as `exit_code`. What is said on the way goes to the logger
`ckptconv`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckptconv.errors import CkptconvError, UsageError, near

if TYPE_CHECKING:
    import torch

    from ckptconv import incoming
    from ckptconv.conversion import Report
    from ckptconv.lazy import LazyTensor
    from ckptconv.metadata import Metadata
    from ckptconv.plugins import Plugin
    from ckptconv.spec import ModelSpec

__all__ = ["Checkpoint", "CkptconvError", "Message", "convert", "open"]

Place = str | os.PathLike[str]


def convert(load_dir: Place, save_dir: Place, *, saver: str, loader: str = "auto", **flags: Any) -> Report:
    """Convert a checkpoint, as `ckptconv --load-dir ... --save-dir ... --saver ...` does.

    flags: those of the program, the loader and the saver; True is a flag without a value, None and False leave it
    out, `checking=False` and `progress=False` are --no-checking and --no-progress. Returns seconds, bytes written, peak
    memory in bytes and what the saver said. Raises CkptconvError, and KeyboardInterrupt; the target is then as it was.
    """
    from ckptconv import cli

    fixed = {"load_dir": os.fspath(load_dir), "save_dir": os.fspath(save_dir), "saver": saver, "loader": loader}
    return cli.converted(_words({**fixed, **flags}))


def open(path: Place, loader: str = "auto", **flags: Any) -> Checkpoint:
    """A checkpoint of any format, or a model of the Hugging Face hub. Its tensors are read when they are asked for.

    flags: those of the loader. Raises CkptconvError for what cannot be read.
    """
    from ckptconv import cli, commands

    place, plugin = commands.source(os.fspath(path), loader)
    return Checkpoint(place, plugin, cli.loader_flags(plugin, _words(flags)))


class Checkpoint:
    """An open checkpoint: iterate over its messages, or ask for one by name.

    Loaders of others send each message once: such a checkpoint is iterated over once, a message of it is read before
    the next one, and none is asked for by name. Closing it, or leaving a `with` block, ends its loader.
    """

    def __init__(self, place: str, loader: Plugin, flags: Any) -> None:
        from ckptconv import incoming

        self.path, self.loader = place, loader.name
        self._stream = incoming.Stream(loader, incoming.arguments(loader, place, flags)).__enter__()
        self._messages: dict[str, Message] | None = None
        self._taken = False
        if loader.ours:
            try:
                self._messages = {message.name: message for message in map(Message, self._stream)}
            finally:
                self.close()

    @property
    def metadata(self) -> Metadata:
        """All that is known beside the tensors: iteration, parallel sizes of the source, tokenizer, ..."""
        return self._stream.metadata

    @property
    def spec(self) -> ModelSpec:
        """The model: sizes and switches."""
        return self._stream.metadata.spec

    def __iter__(self) -> Iterator[Message]:
        if self._messages is not None:
            yield from self._messages.values()
            return
        if self._taken:
            raise UsageError(f"{self.path}: loader {self.loader} sends its messages once: open the checkpoint again.")
        self._taken = True
        for sent in self._stream:
            message = Message(sent)
            yield message
            message.over = not sent.lasting

    def __getitem__(self, name: str) -> Message:
        """The message of that name. Raises KeyError, and UsageError with a loader of others."""
        if self._messages is None:
            raise UsageError(f"{self.path}: loader {self.loader} sends its messages one after the other: iterate.")
        if name not in self._messages:
            raise KeyError(f"{self.path} has no message {name!r}.{near(name, self._messages)}")
        return self._messages[name]

    def close(self) -> None:
        """End the loader."""
        self._stream.__exit__()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Message(Mapping[str, "torch.Tensor"]):
    """A message: its name, and full CPU tensors by key, read anew each time they are asked for.

    `docs/plugins.md` lists names, keys, shapes and layouts. Raises SourceError when a tensor cannot be read.
    """

    def __init__(self, message: incoming.Message) -> None:
        self.name = message.want.name
        self.layer = message.want.layer  # None outside the layers
        #: where the tensors lie: `shape` and `dtype` of each without reading it
        self.lazy: dict[str, LazyTensor] = message.tensors
        self.over = False  # its loader has taken its tensors back

    def __getitem__(self, key: str) -> torch.Tensor:
        from ckptconv import lazy

        if key not in self.lazy:
            raise KeyError(f"message {self.name!r} has no {key!r}.{near(key, self.lazy)}")
        if self.over:
            raise UsageError(f"message {self.name!r}: its loader sends tensors once; read them in time.")
        return lazy.to_torch(self.lazy[key])

    def __contains__(self, key: object) -> bool:
        return key in self.lazy  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.lazy)

    def __len__(self) -> int:
        return len(self.lazy)

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(f'{key} {list(tensor.shape)}' for key, tensor in self.lazy.items())}>"


def _words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as on a command line."""
    from ckptconv import cli

    words, common = [], cli.parser()._option_string_actions
    for name, value in flags.items():
        flag, off = (f"--{prefix}{name.replace('_', '-')}" for prefix in ("", "no-"))
        if isinstance(value, bool):
            # `checking=False` is --no-checking, and `checking=True` what is so without a flag.
            words += [off] * (not value) if off in common else [flag] * value
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        elif value is not None:
            words.append(f"{flag}={value}")
    return words
