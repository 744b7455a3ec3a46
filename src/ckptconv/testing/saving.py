"""A saver of others is given small models: it takes every tensor, or refuses the model, and stops at `exit`."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ckptconv import cli, dtypes, incoming, lazy, messages, metadata, plugins, transport
from ckptconv.errors import CkptconvError, ProtocolError, some
from ckptconv.lazy import LazyTensor, Literal
from ckptconv.messages import Expected, expected
from ckptconv.metadata import Metadata, Origin
from ckptconv.plugins import Plugin
from ckptconv.spec import ModelSpec, differences
from ckptconv.testing.models import MODELS
from ckptconv.testing.report import Report, Sink, of_others, said

#: Seconds after which a saver of a model of some kilobytes is taken to hang.
PATIENCE = 60.0
#: What a plugin that refuses a model raises. Anything else is taken for a mistake in its code.
REFUSALS = (CkptconvError, SystemExit, NotImplementedError, ValueError, RuntimeError)


def check_saver(name: str, loader: str | None = None, flags: Sequence[str] = ()) -> Report:
    """Give a saver of others small models of several kinds. Raises UsageError when there is no such saver or loader.

    loader: what reads back what it wrote.
    """
    plugin = of_others("saver", name)
    reader = plugins.find("loader", loader) if loader else None
    report = Report(fine=[f"{plugin.origin}: add_arguments(parser) and save_checkpoint(queue, args)"])
    saved = [kind for kind, spec in MODELS.items() if _saved(plugin, reader, kind, spec, flags, report)]
    if saved:
        report.fine.append(f"saved: {', '.join(saved)}")
        _stops(plugin, flags, report)
    elif not report.wrong:
        report.wrong.append(f"every model was refused, also {next(iter(MODELS))!r}.")
    return report


class _Model:
    """A model with random weights: the source of a stream."""

    def __init__(self, spec: ModelSpec) -> None:
        import torch

        self.spec, self._made = spec, torch.Generator().manual_seed(1)

    def items(self, sliced: bool) -> Iterator[Any]:
        """What crosses the queue; layers with experts in several messages where a saver takes those."""
        yield metadata.build(Metadata(spec=self.spec, origin=Origin("test", "")))
        for want in expected(self.spec):
            tensors = {key: self._tensor(shape) for key, shape in want.shapes.items()}
            if not (sliced and want.sliced):
                yield transport.Wire(want.name, tensors)
                continue
            yield self._part(want.without_experts(), tensors)
            for start in range(0, want.num_experts, 3):
                yield self._part(want.slice_of(range(start, min(start + 3, want.num_experts))), tensors)
        yield "done"

    @staticmethod
    def _part(want: Expected, tensors: dict[str, LazyTensor]) -> transport.Wire:
        cut = {key: tensors[key].narrow_rows(want.experts.start, shape[0]) if want.experts else tensors[key]
               for key, shape in want.shapes.items()}  # fmt: skip
        return transport.Wire(want.name, cut)

    def _tensor(self, shape: tuple[int, ...]) -> LazyTensor:
        import torch

        tensor = torch.randn(shape, generator=self._made).to(dtypes.of_torch(self.spec.dtype))
        return Literal(bytes(lazy.as_bytes(lazy.as_numpy(tensor))), self.spec.dtype, shape)


class _Watched(transport.Message):
    """A message that knows which of its tensors were taken."""

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__(message)
        self.left = set(message) - {"name"}

    def _taken(self, key: Any) -> None:
        self.left.discard(messages.KEY_ALIASES.get(key, key) if key not in self.left else key)

    def __getitem__(self, key: str) -> Any:
        self._taken(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:  # so that dict(message) and **message ask for every key
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        self._taken(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self._taken(key)
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        key, value = super().popitem()
        self._taken(key)
        return key, value

    def items(self) -> Any:
        self.left.clear()
        return super().items()

    def values(self) -> Any:
        self.left.clear()
        return super().values()


class _WentOn(Exception):
    """A saver asked for more after `exit`."""


class _Queue:
    """The queue of a saver. until: after so many items comes `exit`."""

    def __init__(self, plugin: Plugin, spec: ModelSpec, until: int | None = None) -> None:
        self._items, self._until, self._given = _Model(spec).items(plugin.slices), until, 0
        self._receiver = transport.Receiver(
            self, None, checking=True, alive=lambda: None, slices=plugin.slices
        )
        self._receiver_asks = False
        self.messages: list[_Watched] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """What a saver asks for, and what its checked endpoint does."""
        if self._receiver_asks:
            return next(self._items)
        if self._until is not None and self._given >= self._until:
            if self._given > self._until:
                raise _WentOn
            self._given += 1
            return "exit"
        self._given += 1
        self._receiver_asks = True
        try:
            item = self._receiver.get()
        finally:
            self._receiver_asks = False
        if isinstance(item, transport.Message):
            item = _Watched(item)
            self.messages.append(item)
        return item

    get_nowait = get

    def rest(self) -> None:
        """Raise ProtocolError when not everything was taken."""
        self._receiver_asks = True
        self._receiver.rest()


def _run(plugin: Plugin, queue: _Queue, save_dir: str, flags: Sequence[str]) -> BaseException | None:
    """What a saver raises, None when it returns, TimeoutError when it does not."""
    made = cli.parser()
    plugin.add_arguments(made)
    args = made.parse_args(["--saver", plugin.name, "--load-dir", ".", "--save-dir", save_dir, *flags])
    args.dtype_name, args.hub_model = None, None
    raised: list[BaseException | None] = []

    def work() -> None:
        try:
            plugin.run(queue, args)
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return raised[0] if raised else TimeoutError(f"it did not end within {PATIENCE:.0f} s")


def _saved(
    plugin: Plugin, reader: Plugin | None, kind: str, spec: ModelSpec, flags: Sequence[str], report: Report
) -> bool:  # fmt: skip
    """Whether a saver took a model; what is wrong goes to the report."""
    queue = _Queue(plugin, spec)
    with tempfile.TemporaryDirectory(prefix="ckptconv-testing-") as top:
        place = Path(top) / "out"
        error = _run(plugin, queue, str(place), flags)
        if error is not None:
            if isinstance(error, REFUSALS):
                report.notes.append(f"{kind}: refused: {said(plugin, error)}")
                if left := sorted(path.name for path in place.glob("*")):
                    report.notes.append(f"{kind}: files were left after that: {some(left)}.")
            else:
                report.wrong.append(f"{kind}: {said(plugin, error)}")
            return False
        wrong = []
        try:
            queue.rest()
        except ProtocolError as error:
            wrong.append(str(error))
        lost = [f"{message['name']}/{key}" for message in queue.messages for key in sorted(message.left)]
        if lost:
            wrong.append(f"never looked at, and not refused: {some(lost)}. They are lost without a word.")
        if not place.exists() or not any(place.iterdir()):
            wrong.append("nothing was written into args.save_dir.")
        elif reader and not wrong:
            wrong += _read_back(reader, str(place), plugin, spec)
        report.wrong += [f"{kind}: {text}" for text in wrong]
        return not wrong


def _read_back(reader: Plugin, place: str, plugin: Plugin, spec: ModelSpec) -> list[str]:
    """How what a loader reads differs from what the saver was sent."""
    sent = Sink(sums=True)
    for item in _Model(spec).items(False):
        sent.put(item)
    back = Sink(sums=True)
    args = incoming.arguments(reader, place)
    sender = transport.Sender(
        back, back.returned, checking=True, dtype=None, loader=reader.name, memory=transport.Budget(),
        alive=lambda: None,
    )  # fmt: skip
    try:
        reader.run(sender, args)
    except (Exception, SystemExit) as error:
        return [f"read back: {said(reader, error)}"]
    if back.metadata is None:
        return [f"read back: loader {reader.name} sent nothing."]
    unlike = differences(spec, back.metadata.spec, ("family", "seq_length"))
    tensors = [f"{name}/{key}" for name, keys in sent.sums.items() for key, value in keys.items()
               if back.sums.get(name, {}).get(key) != value]  # fmt: skip
    found = [f"read back by loader {reader.name}, settings differ: {'; '.join(unlike)}."] * bool(unlike)
    return found + [f"read back by loader {reader.name}, tensors differ: {some(tensors)}."] * bool(tensors)


def _stops(plugin: Plugin, flags: Sequence[str], report: Report) -> None:
    """Whether a saver stops when its loader has failed, as convert.py of Megatron-LM tells it."""
    with tempfile.TemporaryDirectory(prefix="ckptconv-testing-") as top:
        error = _run(plugin, _Queue(plugin, MODELS["dense"], until=3), str(Path(top) / "out"), flags)
    if error is None:
        report.wrong.append("at the word 'exit' it returned as if everything had been saved. Call exit(1) or raise.")
    elif isinstance(error, _WentOn):
        report.wrong.append("after the word 'exit' it asked for more. Call exit(1) or raise: the loader has failed.")
    elif isinstance(error, TimeoutError):
        report.wrong.append(f"at the word 'exit' {error}.")
    else:
        report.fine.append("stops at the word 'exit'")
