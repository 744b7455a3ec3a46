"""The bounded queue between loader and saver, with a checked endpoint on each side.

A plugin sees an object with `put` (loader) or `get` (saver) and nothing else. What crosses the queue is small: names
and lazy tensors, which say where bytes lie. Real tensors, which loaders of others send, are first copied into shared
memory that has no name (memfd): it is not limited by the size of /dev/shm, is reused from message to message, and is
gone when both processes are. Both ends check names, order, keys, shapes and counts.

The queue class is that of `torch.multiprocessing`, which is the standard library's; torch itself is loaded only when
a plugin that handles torch tensors takes part.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue as queues
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ckptconv import dialect, dtypes, families, files, lazy, metadata
from ckptconv.errors import ProtocolError, UsageError
from ckptconv.lazy import Cast, FileTensor, LazyTensor
from ckptconv.measure import resident
from ckptconv.messages import IN_FP32, KEY_ALIASES, MESSAGE_ALIASES, Course, Expected, canonical, check, expected
from ckptconv.metadata import Metadata

log = logging.getLogger("ckptconv")

#: Shared memory that may be in flight before a loader waits. One message may always be, whatever its size.
MEMORY = 256 << 20
_POLL = 0.2


@dataclass
class Wire:
    """One message on the queue: its tensors, the shared memory that goes back when it has been used, and how much
    memory its sender holds.
    """

    name: str
    tensors: dict[str, LazyTensor]
    buffer: int | None = None
    held: int = 0


@dataclass
class Budget:
    """What --max-memory leaves for tensors in memory. most: of the whole run, None without a limit; other: what the
    process at the other end holds for itself; copied: it makes its own copy of each message.
    """

    most: int | None = None
    other: int = 0
    copied: bool = False

    @staticmethod
    def check(want: Expected, nbytes: int, room: int) -> None:
        """Raise UsageError when a message does not fit."""
        if nbytes <= room:
            return
        hint = " or send a layer's experts in messages of their own" if want.sliced else ""
        raise UsageError(
            f"--max-memory: message {want.name!r} takes {nbytes / 1e6:.0f} MB, but beside what the processes hold "
            f"themselves there is room for {max(0, room) / 1e6:.0f} MB. Give at least "
            f"{-(-(nbytes - room) // 10**6)} MB more{hint}."
        )


class _Shared:
    """Unnamed shared memory, reused. Buffers are closed when the run is over: readers keep them open by path."""

    def __init__(self, memory: Budget, returned: Any, alive: Callable[[], None]) -> None:
        self._memory, self._returned, self._alive = memory, returned, alive
        self._descriptors: list[int] = []
        self._free: list[int] = []
        self._sizes: list[int] = []
        self._used: dict[int, int] = {}
        self.peak = 0

    def held(self) -> int:
        """Bytes this process holds, these buffers included."""
        return resident() + sum(self._sizes)

    def take(self, nbytes: int, want: Expected) -> int:
        """A buffer of at least `nbytes`; waits while more than may be is in flight. Raises UsageError."""
        limit = MEMORY
        if self._memory.most is not None:
            limit = self._memory.most - self._memory.other - resident()
            if self._memory.copied:
                limit -= nbytes  # the other end holds it again
            self._memory.check(want, nbytes, limit)
        while self._used and sum(self._used.values()) + nbytes > limit:
            self._alive()
            try:
                self._back(self._returned.get(timeout=_POLL))
            except queues.Empty:
                continue
        while not self._returned.empty():
            self._back(self._returned.get())
        if self._free:
            number = max(self._free, key=lambda n: self._sizes[n])
            self._free.remove(number)
        else:
            number = len(self._descriptors)
            self._descriptors.append(os.memfd_create(f"ckptconv-{number}"))
            self._sizes.append(0)
        # Free buffers keep their memory, for the next message, as long as there is room for it.
        for unused in (number, *self._free):
            if sum(self._sizes) - self._sizes[number] + nbytes > limit:
                self._resize(unused, 0)
        if self._sizes[number] < nbytes:
            self._resize(number, nbytes)
        self._used[number] = nbytes
        self.peak = max(self.peak, sum(self._sizes))
        return number

    def _resize(self, number: int, nbytes: int) -> None:
        os.ftruncate(self._descriptors[number], nbytes)
        self._sizes[number] = nbytes

    def _back(self, number: int) -> None:
        del self._used[number]
        self._free.append(number)

    def write(self, number: int, offset: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._descriptors[number], data, offset)
            data, offset = data[count:], offset + count

    def close(self) -> None:
        """Give all memory back: nobody reads it any more."""
        for number, descriptor in enumerate(self._descriptors):
            files.forget(self.path(number))  # its number will be another file's
            os.close(descriptor)
        self._descriptors.clear()

    def path(self, number: int) -> str:
        return f"/proc/{os.getpid()}/fd/{self._descriptors[number]}"


class Sender:
    """What a loader puts into. Accepts our lazy tensors and torch tensors, today's names and the older ones."""

    def __init__(self, queue: Any, returned: Any, *, checking: bool, dtype: str | None, loader: str,
                 memory: Budget, alive: Callable[[], None], model_type: str | None = None,
                 spoken: str = "auto", kv_channels: int | None = None) -> None:  # fmt: skip
        self._queue, self._checking, self._dtype, self._loader, self._alive = queue, checking, dtype, loader, alive
        self._shared = _Shared(memory, returned, alive)
        self._model_type, self._kv_channels, self._spoken = model_type, kv_channels, spoken
        self._translated = False  # it speaks the dialect of Megatron-LLM
        self._metadata: Metadata | None = None
        self._namespace: Any = None
        self._held: list[dict[str, Any]] = []  # messages that came before the sizes were known
        self._course: Course | None = None
        self._cast: set[str] = set()
        self.finished = False
        self.gave_up = False

    def close(self) -> None:
        """Give shared memory back, when the other end is gone or has all."""
        self._shared.close()

    @property
    def shared_bytes(self) -> int:
        """Most shared memory this side has held at once."""
        return self._shared.peak

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Send metadata, a message, or `done`. Raises ProtocolError on anything out of order or shape."""
        if self.finished:
            return  # loaders in the wild say "done" twice
        if isinstance(item, str):
            self._word(item)
        elif self._namespace is None:
            self._begin(item)
        elif isinstance(item, dict) and "name" in item:
            self._message(canonical(item))
        else:
            raise ProtocolError(f"loader {self._loader}: put a {type(item).__name__}, expected a dict with a 'name'.")

    put_nowait = put

    def _word(self, word: str) -> None:
        if word == "exit":
            # Loaders in the wild say so and then raise what went wrong: that is the error to show.
            self.finished = self.gave_up = True
            return
        if word != "done":
            raise ProtocolError(f"loader {self._loader}: put the string {word!r}, expected 'done' or 'exit'.")
        awaited = self._course.awaited if self._course else None
        if self._course is None or awaited is not None:
            lacking = repr(awaited) if awaited else "the metadata or the first layer"
            raise ProtocolError(
                f"loader {self._loader}: ended before sending {lacking}. Every message of the model must be sent once."
            )
        self.finished = True
        self._send("done")

    def _begin(self, namespace: Any) -> None:
        if isinstance(namespace, dict) or not hasattr(namespace, "__dict__"):
            raise ProtocolError(
                f"loader {self._loader}: began with a {type(namespace).__name__}, expected a Namespace of metadata."
            )
        self._namespace = namespace
        known = metadata.read(namespace)
        if known:
            self._open(known)
        else:
            self._translated = self._spoken == "megatron_llm" or (self._spoken == "auto" and dialect.speaks(namespace))

    def _open(self, known: Metadata) -> None:
        if self._dtype:
            known = _cast_metadata(known, self._dtype)
        if self._model_type:
            families.check_model_type(self._model_type, known.spec)
            known = replace(known, model_type=self._model_type)
        if self._kv_channels not in (None, known.spec.kv_channels):
            raise UsageError(
                f"--kv-channels {self._kv_channels}: the source has heads of {known.spec.kv_channels}. Leave the flag "
                "out, or give another source."
            )
        self._metadata = known
        self._course = Course(known.spec, known.head_first)
        ours = metadata.build(known)
        theirs = {k: v for k, v in vars(self._namespace).items() if _plain(v) and not hasattr(ours, k)}
        self._send(type(ours)(**{**theirs, **vars(ours)}))

    def _message(self, message: dict[str, Any]) -> None:
        if self._metadata is None:
            # A loader that knows only Megatron's fields: sizes are complete once the first layer is here.
            self._held.append(message)
            early = self._translated and message["name"] == "lm_head"
            if len(self._held) < 2 or early:
                return
            first, layer = self._held[0], self._held[-1]
            if "word embeddings" not in first or "qkv weight" not in layer:
                raise ProtocolError(
                    f"loader {self._loader}: began with messages {first['name']!r} and {layer['name']!r}, expected "
                    "'embeddings' with 'word embeddings' and 'transformer layer 0' with 'qkv weight'."
                )
            complete = dialect.complete if self._translated else metadata.complete
            self._open(complete(self._namespace, first, layer, self._loader))
            for held in self._held:
                self._check_and_send(held)
            self._held.clear()
        else:
            self._check_and_send(message)

    def _check_and_send(self, message: dict[str, Any]) -> None:
        assert self._course is not None and self._metadata is not None
        if self._translated:
            message = dialect.to_ours(message, self._metadata.spec, self._metadata.tp)
        want = self._course.next(message["name"], message)
        if want is None:
            if not self._checking:
                return
            raise ProtocolError(f"loader {self._loader}: sent {message['name']!r} after the last message of the model.")
        for key in want.shapes.keys() & message.keys():
            if not isinstance(message[key], LazyTensor) and not hasattr(message[key], "detach"):
                what = type(message[key]).__name__
                raise ProtocolError(
                    f"loader {self._loader}: message {want.name!r}: {key!r} is a {what}, expected a torch.Tensor. "
                    "Leave out keys that the model does not have; torch.from_numpy takes arrays."
                )
        _trim_vocabulary(message, want)
        tensors = check(message, want, self._checking)
        self._send(self._wire(want, tensors))
        self._course.passed(want)

    def _wire(self, want: Expected, tensors: dict[str, Any]) -> Wire:
        assert self._metadata is not None
        known: dict[str, LazyTensor] = {}
        real = {key: value for key, value in tensors.items() if not isinstance(value, LazyTensor)}
        for key, value in tensors.items():
            dtype = self._metadata.dtype(want.part_of, key)
            if key not in real:
                known[key] = value if value.dtype == dtype else Cast(value, dtype)
        if not real:
            return Wire(want.name, {key: known[key] for key in tensors}, None, self._shared.held())
        size = sum(_aligned(t.numel() * dtypes.size_of(self._metadata.dtype(want.part_of, key)))
                   for key, t in real.items())  # fmt: skip
        number, offset = self._shared.take(size, want), 0
        for key, value in real.items():
            dtype = self._metadata.dtype(want.part_of, key)
            if not self._dtype and str(value.dtype) != f"torch.{dtype}" and key not in self._cast:
                self._cast.add(key)
                log.warning("loader %s: %r is %s, sent as %s (params_dtype)", self._loader, key, value.dtype, dtype)
            tensor = value.detach().cpu().to(dtypes.of_torch(dtype)).contiguous()
            self._shared.write(number, offset, lazy.as_bytes(lazy.as_numpy(tensor.reshape(-1))))
            known[key] = FileTensor(self._shared.path(number), offset, dtype, tuple(tensor.shape))
            offset += _aligned(tensor.nbytes)
        return Wire(want.name, {key: known[key] for key in tensors}, number, self._shared.held())

    def _send(self, item: Any) -> None:
        while True:
            self._alive()
            try:
                self._queue.put(item, timeout=_POLL)
            except queues.Full:
                continue
            return


class Receiver:
    """What a saver gets from. Ours iterate over `messages`; those of others call `get`."""

    def __init__(self, queue: Any, returned: Any, *, checking: bool, alive: Callable[[], None],
                 slices: bool = False, most: int | None = None, spoken: str = "auto") -> None:  # fmt: skip
        self._queue, self._returned, self._checking, self._alive = queue, returned, checking, alive
        self._slices, self._most, self._spoken = slices, most, spoken
        self._metadata: Metadata | None = None
        self._course: Course | None = None
        self._fields: dialect.Fields | None = None  # the first message of a plugin of others
        self._ready: Iterator[dict[str, Any]] | None = None
        self.finished = False

    def rest(self) -> None:
        """After a saver of others has returned: only the last word may be left. Raises ProtocolError."""
        if self._metadata is None:
            raise ProtocolError("it returned before it had taken the metadata.")
        if self._ready is not None:
            left = next(self._ready, None)
            name = left and str(left["name"])
        else:
            item = None if self.finished else self._checked()
            name = item and item[0].name
        if name:
            raise ProtocolError(f"it returned before it had taken {name!r}.")

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next item for a plugin of others: Namespace, dict of real tensors in private memory, or `done`."""
        if self._metadata is None:
            fields = metadata.for_plugin(self._open())
            if self._spoken == "megatron":
                return fields
            assert self._metadata is not None
            self._fields = dialect.Fields(vars(fields), self._metadata)
            if self._spoken == "megatron_llm":
                self._fields.speak()
            return self._fields
        if self._ready is None:
            translated = self._fields is not None and self._fields.spoken
            self._ready = self._translated() if translated else self._in_order()
        return next(self._ready, "done")

    get_nowait = get

    def _in_order(self) -> Iterator[dict[str, Any]]:
        """Real messages in the order of Megatron-LM: an output layer that came early waits for its place."""
        assert self._metadata is not None
        early: list[dict[str, Any]] = []
        for want, wire in self.messages():
            hold = self._metadata.head_first and want.template == "output layer"
            for message in self._messages(want, wire):
                if hold:
                    early.append(message)
                else:
                    yield message
            if want.template == "final norm":
                yield from early

    def _translated(self) -> Iterator[dict[str, Any]]:
        """Real messages in the dialect of Megatron-LLM, whose output layer comes early."""
        assert self._metadata is not None
        spec, late = self._metadata.spec, not (self._metadata.head_first or self._metadata.spec.tied)
        held: list[tuple[Expected, Wire]] = []
        for item in self.messages():
            if late and item[1].buffer is not None:
                raise ProtocolError(
                    "the saver wants the output layer right after the embeddings, where this loader sends it last. "
                    "Convert to a directory first (--saver megatron_llm), and from there."
                )
            held.append(item)
            if late and item[0].template == "output layer":
                held.sort(key=lambda one: one[0].template not in ("embeddings", "output layer"))
                late = False
            while held and not late:
                for message in self._messages(*held.pop(0)):
                    translated = dialect.to_theirs(message, spec)
                    yield Message({**translated, "name": MessageName(translated["name"])})

    def _messages(self, want: Expected, wire: Wire) -> Iterator[dict[str, Any]]:
        """A message as a saver of others takes it: whole, or in slices that fit into memory."""
        size = sum(tensor.nbytes for tensor in wire.tensors.values())
        room = None if self._most is None else self._most - wire.held - resident()
        if want.experts is not None and not self._slices:
            yield self._gathered(want, wire)
            return
        few = min(MEMORY, room) if room is not None else MEMORY
        if want.experts is None and want.sliced and self._slices and size > few:
            rest = want.without_experts()
            yield self._real(rest, {key: wire.tensors[key] for key in rest.shapes}, room)
            each = sum(wire.tensors[key].nbytes for key in want.sliced) // want.num_experts
            count = max(1, few // max(1, each))
            for start in range(0, want.num_experts, count):
                part = want.slice_of(range(start, min(start + count, want.num_experts)))
                tensors = {key: wire.tensors[key].narrow_rows(start, part.shapes[key][0]) for key in part.shapes}
                yield self._real(part, tensors, room)
        else:
            yield self._real(want, wire.tensors, room)
        self.release(wire)

    def _real(self, want: Expected, tensors: dict[str, LazyTensor], room: int | None) -> dict[str, Any]:
        """Tensors in private memory, under their names."""
        if room is not None:
            Budget.check(want, sum(tensor.nbytes for tensor in tensors.values()), room)
        message = Message({key: lazy.to_torch(value) for key, value in tensors.items()})
        message["name"] = MessageName(want.name)
        return message

    def _gathered(self, want: Expected, wire: Wire) -> dict[str, Any]:
        """A layer that came in slices, whole."""
        import torch

        whole = want.whole or want
        tensors: dict[str, Any] = {}
        while True:
            for key, value in wire.tensors.items():
                if key not in whole.sliced:
                    tensors[key] = lazy.to_torch(value)
                    continue
                if key not in tensors:
                    tensors[key] = torch.empty(whole.shapes[key], dtype=dtypes.of_torch(value.dtype))
                tensors[key][want.experts.start : want.experts.stop] = lazy.to_torch(value)  # type: ignore[union-attr]
            self.release(wire)
            if want.experts and want.experts.stop == whole.num_experts:
                break
            item = self._checked()
            if item is None:
                raise ProtocolError(f"the stream ended within {whole.name!r}.")
            want, wire = item
        message = Message({key: tensors[key] for key in whole.shapes})
        message["name"] = MessageName(whole.name)
        return message

    def metadata(self) -> Metadata:
        """The first message. Call once, before `messages`."""
        self._open()
        assert self._metadata is not None
        return self._metadata

    def messages(self) -> Iterator[tuple[Expected, Wire]]:
        """Every message in order, checked, a layer whole or in slices as it was sent.

        `release` each when its tensors are no longer needed.
        """
        while (item := self._checked()) is not None:
            yield item

    def release(self, wire: Wire) -> None:
        """Give a message's shared memory back to the loader."""
        if wire.buffer is not None:
            self._returned.put(wire.buffer)

    def _open(self) -> Any:
        namespace = self._take()
        self._metadata = metadata.read(namespace)
        if self._metadata is None:
            raise ProtocolError("the stream did not begin with metadata.")
        self._course = Course(self._metadata.spec, self._metadata.head_first)
        return namespace

    def _checked(self) -> tuple[Expected, Wire] | None:
        item = self._take()
        assert self._course is not None
        if item == "done":
            if self._course.awaited is not None:
                raise ProtocolError(f"the stream ended before {self._course.awaited!r}.")
            self.finished = True
            return None
        want = self._course.next(item.name, item.tensors)
        if want is None:
            raise ProtocolError(f"message {item.name!r} came after the last one of the model.")
        check({"name": item.name, **item.tensors}, want, self._checking)
        self._course.passed(want)
        return want, item

    def _take(self) -> Any:
        while True:
            try:
                return self._queue.get(timeout=_POLL)
            except queues.Empty:
                self._alive()


class MessageName(str):
    """A message's name that equals its older spellings too, so that older savers find what they compare with."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, MESSAGE_ALIASES.get(other, other) if isinstance(other, str) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class Message(dict[str, Any]):
    """A message whose keys can be had by their older names too."""

    def __missing__(self, key: str) -> Any:
        if key in KEY_ALIASES and KEY_ALIASES[key] in self:
            return self[KEY_ALIASES[key]]
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or (isinstance(key, str) and dict.__contains__(self, KEY_ALIASES.get(key)))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key if dict.__contains__(self, key) else KEY_ALIASES.get(key, key), default)

    def pop(self, key: str, *default: Any) -> Any:
        if not dict.__contains__(self, key):
            key = KEY_ALIASES.get(key, key)
        return dict.pop(self, key, *default)


def context() -> Any:
    """Processes are spawned, never forked: a fork of a process with threads and torch in it can hang."""
    # The tracker that outlives a killed run removes its semaphores; that it warns of them helps nobody.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    if quiet not in sys.warnoptions:
        sys.warnoptions.append(quiet)
    return multiprocessing.get_context("spawn")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _plain(value: object) -> bool:
    """Whether a metadata field of a plugin can cross to a process that lacks its classes."""
    return value is None or isinstance(value, bool | int | float | str)


def _trim_vocabulary(message: dict[str, Any], want: Expected) -> None:
    """Drop padding rows that a Megatron loader left on: messages carry the true vocabulary."""
    for key in ("word embeddings", "weight"):
        rows = want.shapes.get(key, (0,))[0]
        if want.name not in ("embeddings", "output layer") or key not in message:
            continue
        tensor = message[key]
        if not isinstance(tensor, LazyTensor) and len(tensor.shape) == 2 and tensor.shape[0] > rows > 0:
            message[key] = tensor[:rows]


def _cast_metadata(known: Metadata, dtype: str) -> Metadata:
    """The same model stored as `dtype`: `--dtype` asks for every tensor to be converted, but for `IN_FP32`."""
    kept = {
        message.name: {key: "float32" for key in IN_FP32 if key in message.shapes}
        for message in expected(known.spec)
        if any(key in message.shapes and known.dtype(message.name, key) == "float32" for key in IN_FP32)
    }
    return replace(known, spec=known.spec.replace(dtype=dtype), dtypes=kept)
