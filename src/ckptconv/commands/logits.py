"""Logits of a checkpoint in any format, computed on a CPU block by block, and compared with those of another.

The arithmetic is fp32 and the same for every format: the same weights give the same digest on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptconv import commands, companions, measure, numbers, tokenizers
from ckptconv.errors import CkptconvError, SourceError, UsageError, VerifyError
from ckptconv.metadata import Metadata
from ckptconv.plugins import Plugin
from ckptconv.spec import differences

if TYPE_CHECKING:
    from ckptconv.forward import Result

log = logging.getLogger("ckptconv")

#: How many tokens there are when none are given.
DEFAULT = 16
#: What of a model may differ without changing what it computes.
_NO_MATTER = ("family", "dtype", "seq_length", "mtp_layers")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this command."""
    add = parser.add_argument
    add("directory", metavar="DIR", help="the checkpoint, of any format; or a model of the Hugging Face hub")
    add("--loader", default="auto", metavar="NAME", help="what reads it (default: found from the directory)")
    add("--against", metavar="DIR", help="a second checkpoint, of any format, to compare with: exit code 8 if unequal")
    add("--against-loader", default="auto", metavar="NAME", help="what reads that")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="text, for the tokenizer that lies with the checkpoint")
    what.add_argument("--token-ids", type=_ids, metavar="1,2,3",
                      help=f"token ids (default: {DEFAULT} spread over the vocabulary)")  # fmt: skip
    add("--tokenizer-model", metavar="PATH", help="another tokenizer: a file or a directory")
    add("--atol", type=_tolerance, default=1e-4, metavar="X", help="largest difference of equals (default 1e-4)")
    add("--top", type=numbers.positive, default=5, metavar="N", help="how many tokens to show (default 5)")
    add("--threads", type=numbers.positive, metavar="N", help="threads that compute (default: one per core)")
    add("--json", action="store_true", help="print JSON")


def plugins(args: Namespace) -> list[Plugin]:
    """The loaders of what is named."""
    found = [commands.source(args.directory, args.loader)[1]]
    return [*found, *([commands.source(args.against, args.against_loader)[1]] if args.against else [])]


def run(args: Namespace) -> int:
    """Print what was found. Raises VerifyError when two checkpoints differ."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    began, memory = time.monotonic(), measure.Memory()
    with ExitStack() as opened:
        one = _Run(args.directory, args.loader, args, opened)
        both = [one, *([_Run(args.against, args.against_loader, args, opened)] if args.against else [])]
        tokenizer = _tokenizer(one.metadata, args)
        ids = _chosen(min(each.metadata.spec.vocab_size for each in both), tokenizer, args)
        for each in both:
            each.check(ids)
        for each in both:
            each.compute(ids)
    shown = {name: each.shown(args.top, tokenizer) for name, each in zip(("checkpoint", "against"), both, strict=False)}
    compared = _compared(*both) if args.against else {}
    if compared:
        shown["difference"] = compared
    print(json.dumps(shown, indent=2) if args.json else "\n".join(_lines(shown)))
    log.info("logits: %.1f s, peak memory %d MiB", time.monotonic() - began, memory.stop() >> 20)
    if compared and not compared["max"] <= args.atol:
        raise VerifyError(
            f"{args.directory} and {args.against}: logits differ by up to {compared['max']:.3g}, more than --atol "
            f"{args.atol:g}, and hidden states from {compared['first'] or 'output layer'!r} on."
        )
    return 0


class _Run:
    """One checkpoint, with the tokens that go in and the logits that come out."""

    ids: list[int]
    result: Result

    def __init__(self, place: str, loader: str, args: Namespace, opened: ExitStack) -> None:
        from ckptconv import incoming

        self.place, plugin = commands.source(place, loader)
        self.loader = plugin.name
        stream = incoming.Stream(plugin, incoming.arguments(plugin, self.place, args))
        self._stream = opened.enter_context(stream)
        self.metadata = stream.metadata

    def check(self, ids: list[int]) -> None:
        """Raise UsageError for what has no logits."""
        from ckptconv import forward

        try:
            forward.check(self.metadata.spec, ids)
        except UsageError as error:
            raise UsageError(f"{self.place}: {error}") from error

    def compute(self, ids: list[int]) -> None:
        """Take the whole stream."""
        from tqdm import tqdm

        from ckptconv import forward
        from ckptconv.messages import expected

        self.ids, total = ids, sum(1 for _ in expected(self.metadata.spec))
        with tqdm(total=total, desc=f"logits of {self.loader}", unit="msg", disable=None) as bar:
            self.result = forward.run(self._stream, ids, lambda name: bar.update() and None)

    def shown(self, top: int, tokenizer: Any) -> dict[str, Any]:
        """What is printed of it."""
        from ckptconv.lazy import as_bytes, as_numpy

        logits, spec = self.result.logits, self.metadata.spec
        best = logits[-1].topk(min(top, logits.shape[1]))
        return {
            "directory": self.place,
            "loader": self.loader,
            "model": spec.family or spec.model_type,
            "layers": spec.num_layers,
            "dtype": spec.dtype,
            "token_ids": self.ids,
            "shape": list(logits.shape),
            "digest": f"sha256:{hashlib.sha256(as_bytes(as_numpy(logits))).hexdigest()}",
            "not_finite": int((~logits.isfinite()).sum()),
            "best_of_every_position": logits.argmax(-1).tolist(),
            "top": [
                {"id": token, "logit": value, **({"text": tokenizer.decode([token])} if tokenizer else {})}
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ],
        }


def _compared(one: _Run, other: _Run) -> dict[str, Any]:
    """max: largest difference (NaN where there is one); first: the message after which hidden states differ more."""
    specs = one.metadata.spec, other.metadata.spec
    common = min(spec.vocab_size for spec in specs)
    left, right = (run.result.logits[:, :common] for run in (one, other))
    apart = (left - right).abs()
    apart[left.eq(right)] = 0  # infinities, too
    most, place = float(apart.max()), int(apart.argmax())
    states = one.result.states, other.result.states
    moved = (name for name in states[0] if name in states[1] and not states[0][name].equal(states[1][name]))
    return {
        "max": most,
        "mean": float(apart.mean()),
        "position": place // common,
        "id": place % common,
        "equal": bool(left.equal(right)),
        "same_top": int((left.argmax(-1) == right.argmax(-1)).sum()),
        "first": next(moved, None),
        "vocabularies": [spec.vocab_size for spec in specs],
        "models": differences(*specs, _NO_MATTER),
    }


def _lines(shown: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = []
    for name in ("checkpoint", "against"):
        if name not in shown:
            continue
        run = shown[name]
        lines += [
            f"{run['directory']}: {run['loader']}, {run['model']}, {run['layers']} layers, {run['dtype']}",
            f"  tokens  {' '.join(map(str, run['token_ids']))}",
            f"  digest  {run['digest']} of logits {run['shape']}",
        ]
        if run["not_finite"]:
            lines.append(f"  {run['not_finite']} logits are not finite")
        lines += [
            f"  top {place}   {top['logit']:10.4f}  {top['id']}  {top['text']!r}" if "text" in top
            else f"  top {place}   {top['logit']:10.4f}  {top['id']}"
            for place, top in enumerate(run["top"], 1)
        ]  # fmt: skip
    if "difference" in shown:
        found, positions = shown["difference"], shown["checkpoint"]["shape"][0]
        v, w = found["vocabularies"]
        lines += [f"  models differ: {line}" for line in found["models"] if not line.startswith("vocab_size")]
        if v != w:
            lines.append(f"  vocabularies of {v} and {w} tokens: the first {min(v, w)} are compared")
        where = f" (token {found['id']} at position {found['position']})" if found["max"] else ""
        first = f", hidden states differ from {found['first']!r} on" if found["first"] else ""
        lines.append(f"difference: {found['max']:.3g} at most{where}, {found['mean']:.3g} on average{first}")
        lines.append(f"top tokens agree at {found['same_top']} of {positions} positions")
    return lines


# Tokens


def _ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ArgumentTypeError(f"{text!r} is no list of token ids such as 1,2,3")
    return [int(word) for word in words]


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def _chosen(vocab_size: int, tokenizer: Any, args: Namespace) -> list[int]:
    """The token ids; vocab_size: what there are to choose from. Raises UsageError."""
    if args.token_ids:
        return list(args.token_ids)
    if args.prompt is None:
        return spread(vocab_size, DEFAULT)
    if tokenizer is None:
        raise UsageError(
            "--prompt: no tokenizer lies with the checkpoint. Give --tokenizer-model PATH, or --token-ids 1,2,3."
        )
    found: Sequence[int] = tokenizer.encode(args.prompt).ids
    if not found:
        raise UsageError(f"--prompt {args.prompt!r}: the tokenizer makes no tokens of it.")
    return list(found)


def spread(vocab_size: int, count: int) -> list[int]:
    """`count` ids that lie apart and are always the same."""
    return [int(vocab_size * (n * 0.6180339887498949 % 1)) for n in range(1, count + 1)]


def _tokenizer(metadata: Metadata, args: Namespace) -> Any:
    """A `tokenizers.Tokenizer`; None where there is none. Raises CkptconvError where one is asked for."""
    asked = args.prompt is not None or args.tokenizer_model
    try:
        import tokenizers as library

        place = args.tokenizer_model or _place(metadata)
        if place is None:
            return None
        made = tokenizers.build(place, spec=metadata.spec).files
        raw = Path(place) / "tokenizer.model"
        if "tokenizer.json" not in made and raw.is_file():
            made = tokenizers.build(raw, spec=metadata.spec).files
        if "tokenizer.json" not in made:
            raise SourceError(f"{place}: a tokenizer.json is needed, or a file that one can be made of.")
        return library.Tokenizer.from_str(made["tokenizer.json"].decode())
    except ImportError as error:
        if asked:
            raise UsageError("--prompt needs the library `tokenizers`, which comes with transformers.") from error
    except CkptconvError as error:
        if asked:
            raise
        log.info("logits: no text of tokens: %s", error)
    return None


def _place(metadata: Metadata) -> str | None:
    """Where the source's tokenizer is."""
    for name, path in metadata.origin.companions.items():
        if companions.is_tokenizer(name):
            return str(Path(path).parent)
    told = metadata.tokenizer_model
    return told if told and Path(told).exists() else None
