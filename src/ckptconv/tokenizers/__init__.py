"""Tokenizers for Hugging Face directories: carried, or built from what a trainer had; imported only when needed.

What is built is a tokenizer.json with a tokenizer_config.json in the style of transformers 4, which 5 reads too; no
library is needed for that, and a library that is there has to agree with the result (check.py). `build` takes a path,
`of_files` what lies in a directory; both give the same `Built`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ckptconv import companions
from ckptconv.errors import UsageError, some
from ckptconv.spec import ModelSpec
from ckptconv.tokenizers import bpe, check, draft, kinds, ranks, sentencepiece, special, wordpiece
from ckptconv.tokenizers.draft import Draft
from ckptconv.tokenizers.kinds import KINDS
from ckptconv.tokenizers.special import ROLES, Built

__all__ = ["KINDS", "ROLES", "Built", "build", "ids", "is_whole", "listed", "of_files", "overridden"]

#: Files that are a tokenizer only together with a rule for its use; any other is one that transformers loads.
_RAW = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")


def build(
    path: str | os.PathLike[str], kind: str | None = None, overrides: Mapping[str, str] | None = None,
    extra_ids: Sequence[str] = (), spec: ModelSpec | None = None,
) -> Built:  # fmt: skip
    """The tokenizer at `path`: a file of any kind, or a directory that holds one.

    kind: one of KINDS or Megatron's name for it, None as far as it can be seen; overrides: role (one of ROLES) ->
    token; extra_ids: tokens that are appended; spec: the model, where it tells one kind from another. Raises
    SourceError (unreadable, not supported, not what its own library makes of it), UsageError (kind, overrides).
    """
    place = Path(path)
    if place.is_dir():
        found = companions.find(place)
        files = {name: companions.read(file) for name, file in found.items() if companions.is_tokenizer(name)}
        if not files:
            raise UsageError(f"{place}: holds no tokenizer: neither tokenizer.json, tokenizer.model, vocab.* nor such.")
        files |= {name: companions.read(found[name]) for name in found if name.startswith("chat_template")}
        return of_files(files, kind, overrides, extra_ids, spec, str(place))
    if not place.is_file():
        raise UsageError(f"{place}: there is no such tokenizer. Give a file (tokenizer.model, ...) or a directory.")
    if place.name in ("tokenizer.json", "tokenizer_config.json"):
        return build(place.parent, kind, overrides, extra_ids, spec)
    files = {place.name: companions.read(place)}
    if place.suffix == ".json" or place.name == "merges.txt":
        beside = place.with_name("merges.txt" if place.suffix == ".json" else "vocab.json")
        if not beside.is_file():
            raise UsageError(
                f"{place}: a vocabulary in {place.suffix[1:]} needs {beside.name} beside it, which is not "
                "there."
            )
        files = {"vocab.json" if place.suffix == ".json" else "merges.txt": companions.read(place),
                 beside.name: companions.read(beside)}  # fmt: skip
    return of_files(files, kind, overrides, extra_ids, spec, str(place))


def is_whole(names: Sequence[str]) -> bool:
    """Whether files are a tokenizer that transformers loads as it is."""
    return any(companions.is_tokenizer(name) and name not in _RAW for name in names)


def of_files(
    files: Mapping[str, bytes], kind: str | None = None, overrides: Mapping[str, str] | None = None,
    extra_ids: Sequence[str] = (), spec: ModelSpec | None = None, where: str = "tokenizer", carry: bool = False,
) -> Built:  # fmt: skip
    """The tokenizer that `files` (name -> content) are, as `build`. A Hugging Face tokenizer is carried byte for byte.

    carry: it comes from a Hugging Face directory, where a vocabulary alone is a tokenizer, too.
    """
    chosen = kinds.of(kind)
    if carry or (chosen in (None, "huggingface") and is_whole(list(files))):
        return _finish(draft.carried(files, where), overrides, extra_ids, where)
    if chosen == "huggingface":
        raise UsageError(f"{where}: is no Hugging Face tokenizer, it holds {some(files)}. --tokenizer-type says which.")
    raw = {name: data for name, data in files.items() if name in _RAW} or dict(files)
    made = _built(raw, chosen, spec, where)
    if spec is not None:
        made = replace(made, config={**made.config, "model_max_length": spec.max_position_embeddings})
    return _finish(made, overrides, extra_ids, where)


def _built(files: Mapping[str, bytes], kind: str | None, spec: ModelSpec | None, where: str) -> Draft:
    kind = kind or kinds.seen(files, spec, where)
    data = next(iter(files.values()))
    if kind in ("sentencepiece", "megatron"):
        made = sentencepiece.build(data, where, spec)
        return special.as_megatron(made) if kind == "megatron" else made
    if kind in ranks.LLAMA3:
        return ranks.build(data, kind, where)
    if kind == "gpt2":
        if not {"vocab.json", "merges.txt"} <= set(files):
            raise UsageError(f"{where}: gpt2 needs vocab.json and merges.txt, found {some(files)}.")
        return bpe.build(files["vocab.json"], files["merges.txt"], where)
    if kind in ("bert", "bert-cased", "bert-uncased"):
        return wordpiece.build(data, kind, where)
    raise UsageError(f"{where}: is no tokenizer of kind {kind}. --tokenizer-type is one of {', '.join(KINDS)}.")


def _finish(made: Draft, overrides: Mapping[str, str] | None, extra_ids: Sequence[str], where: str) -> Built:
    built = special.finish(made, overrides or {}, extra_ids, where)
    check.check(made, built, where)
    return built


def overridden(words: Sequence[str]) -> dict[str, str]:
    """`key=token` words as a dict. Raises UsageError."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, token = word.partition("=")
        if not equals or not token or key not in ROLES:
            raise UsageError(
                f"--override-special-tokens {word}: expected key=token with a key of {', '.join(ROLES)}, such as "
                "eos=<|im_end|>."
            )
        if found.setdefault(key, token) != token:
            raise UsageError(f"--override-special-tokens: {key} is given twice, {found[key]} and {token}.")
    return found


def ids(data: bytes, where: str) -> dict[str, int]:
    """token -> id of a tokenizer.json. Raises SourceError."""
    return draft.vocabulary(draft.load({where: data}, where, where))


def listed(text: str) -> tuple[str, ...]:
    """`a,b` as its tokens. Raises UsageError for an empty one."""
    tokens = tuple(text.split(",")) if text else ()
    if "" in tokens:
        raise UsageError(f"--vocab-extra-ids-list {text}: has an empty token; tokens are separated by single commas.")
    return tokens
