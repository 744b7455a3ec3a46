"""A loader of others is run on a checkpoint, and all that it sends is checked."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ckptconv import cli, incoming, messages, transport
from ckptconv.errors import CkptconvError, ProtocolError, collapse, some
from ckptconv.messages import expected
from ckptconv.plugins import Plugin
from ckptconv.spec import ModelSpec
from ckptconv.testing.models import LLAMA
from ckptconv.testing.report import Report, Sink, of_others, said, warnings

#: What every model needs of the metadata.
NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "seq_length", "params_dtype")


def check_loader(name: str, load_dir: str, flags: Sequence[str] = ()) -> Report:
    """Run a loader of others on a checkpoint. Raises UsageError when there is no such loader."""
    plugin = of_others("loader", name)
    report = Report(fine=[f"{plugin.origin}: add_arguments(parser) and load_checkpoint(queue, args)"])
    recorder = _Recorder(plugin, incoming.arguments(plugin, load_dir, cli.loader_flags(plugin, flags)))
    with warnings(report):
        recorder.run(report)
    recorder.judge(report)
    return report


class _Recorder:
    """The queue of a loader: hands everything to the real endpoint, and notes what comes after its first refusal."""

    def __init__(self, plugin: Plugin, args: Namespace) -> None:
        self._plugin, self._args = plugin, args
        self._sink = Sink()
        self._sender = transport.Sender(
            self._sink, self._sink.returned, checking=args.checking, dtype=None, loader=plugin.name,
            memory=transport.Budget(), alive=lambda: None, spoken=args.queue_dialect,
        )  # fmt: skip
        self._refused: CkptconvError | None = None
        self._first: Any = None
        self._sent: dict[str, dict[str, Any]] = {}  # message -> key -> tensor without content
        self._words: list[str] = []
        self._odd: list[str] = []

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Take what a loader sends."""
        if self._refused is None:
            try:
                self._sender.put(item)
            except CkptconvError as error:
                self._refused = error
        if isinstance(item, str):
            self._words.append(item)
        elif self._first is None:
            self._first = item
        elif isinstance(item, dict) and "name" in item:
            self._note(item)

    put_nowait = put

    def _note(self, message: dict[str, Any]) -> None:
        import torch

        ours = messages.canonical(message)
        name = str(ours.pop("name"))
        if name in self._sent:
            self._odd.append(f"message {name!r} was sent more than once.")
        older = sorted(set(map(str, message)) & set(messages.KEY_ALIASES))
        if older:
            self._sink.notes.append(f"older names are used, and understood: {some(older)}.")
        self._sent[name] = {}
        for key, value in ours.items():
            if not isinstance(value, torch.Tensor):
                self._odd.append(f"message {name!r}: {key!r} is a {type(value).__name__}, expected a torch.Tensor.")
                continue
            if value.is_floating_point() and not bool(value.isfinite().all()):
                self._odd.append(f"message {name!r}: {key!r} has elements that are infinite or no numbers.")
            self._sent[name][key] = torch.empty(value.shape, device="meta")

    def run(self, report: Report) -> None:
        """Let the loader send. What it raises is a mistake."""
        try:
            self._plugin.run(self, self._args)
            if not (self._sender.finished or self._refused):
                self._sender.put("done")
        except CkptconvError as error:
            self._refused = error
        except (Exception, SystemExit) as error:
            report.wrong.append(said(self._plugin, error))

    def judge(self, report: Report) -> None:
        """All that is wrong with what was sent."""
        known, found = self._sink.metadata, list(self._odd)
        if self._first is None:
            report.wrong.append("nothing was sent. The first item has to be a Namespace of metadata.")
            return
        if self._refused:
            found.append(str(self._refused))
        elif "exit" in self._words:
            found.append("it gave up (it sent 'exit'); see what it printed above.")
        if known is None:
            lacking = [name for name in NEEDED if getattr(self._first, name, None) is None]
            found += [f"the metadata has no {name!r}, which every model needs." for name in lacking]
        else:
            found += self._compared(known.spec)
        report.wrong += collapse(dict.fromkeys(found))
        report.notes += dict.fromkeys(self._sink.notes)
        if self._words.count("done") != 1 and not report.wrong:
            count = self._words.count("done")
            report.notes.append(f"'done' was said {count} times; Megatron-LM's savers wait for it, once, at the end.")
        if known and not report.wrong:
            tensors = sum(map(len, self._sent.values()))
            report.fine.append(f"{len(self._sent)} messages with {tensors} tensors, named, ordered and shaped as said")
        if known:
            report.notes.append(f"understood as: {_summary(known.spec)}. Is that the model?")

    def _compared(self, spec: ModelSpec) -> list[str]:
        """What is wrong message by message, whatever came first."""
        found, wanted = [], {want.name: want for want in expected(spec)}
        missing = [name for name in wanted if name not in self._sent]
        if missing:
            found.append(f"never sent: {some(missing)}.")
        unknown = [name for name in self._sent if name.partition(" experts ")[0] not in wanted]
        if unknown:
            found.append(f"sent, but not of this model: {some(unknown)}.")
        for name, want in wanted.items():
            keys = self._sent.get(name)
            if keys is None:
                continue
            part = want if not want.sliced or set(want.sliced) & set(keys) else want.without_experts()
            if want.name in ("embeddings", "output layer"):
                keys = {key: _unpadded(tensor, want.shapes.get(key)) for key, tensor in keys.items()}
            try:
                messages.check({"name": name, **keys}, part)
            except ProtocolError as error:
                found.append(str(error))
        return found


def _unpadded(tensor: Any, shape: tuple[int, ...] | None) -> Any:
    """Padding rows of a vocabulary are dropped by the queue."""
    return tensor[: shape[0]] if shape and len(tensor.shape) == len(shape) == 2 else tensor


def _summary(spec: ModelSpec) -> str:
    """What a model is, less what is as in most."""
    always = ("norm", "norm_epsilon", "activation", "tied", "rope")
    told = {name: getattr(spec, name) for name in spec.to_json()}
    shown = (name for name, value in told.items() if name in always or value != getattr(LLAMA, name))
    return ", ".join(f"{name} {told[name]}" for name in shown if told[name] != "")
