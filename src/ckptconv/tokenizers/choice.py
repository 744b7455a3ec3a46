"""Which tokenizer goes with a model: the one that is asked for, else the source's, carried or built.

Savers of Hugging Face directories use this; the flags are theirs.
"""

from __future__ import annotations

import json
import logging
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ckptconv import companions, tokenizers
from ckptconv.errors import CkptconvError, TargetError, UsageError
from ckptconv.metadata import Metadata
from ckptconv.tokenizers import kinds, sentencepiece
from ckptconv.tokenizers.special import Built

log = logging.getLogger("ckptconv.saver")

GENERATION = "generation_config.json"
#: Its keys, and config.json's, that name a token -> role.
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad"}


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of savers that write a tokenizer."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-model", metavar="PATH",
                       help="tokenizer.model, vocab.json, vocab.txt or a directory (default: the source's)"
                       )  # fmt: skip
    group.add_argument("--tokenizer-type", metavar="NAME",
                       help=f"what --tokenizer-model is, where it cannot be seen: {', '.join(kinds.KINDS)}"
                       )  # fmt: skip
    group.add_argument("--override-special-tokens", nargs="*", metavar="KEY=TOKEN",
                       help=f"other special tokens, such as eos=<|im_end|>; keys: {', '.join(tokenizers.ROLES)}"
                       )  # fmt: skip
    group.add_argument("--vocab-extra-ids-list", metavar="A,B", help="tokens to append to the vocabulary")


def choose(metadata: Metadata, args: Namespace) -> Built | None:
    """The tokenizer to write; None when the source's files, or none, are to be carried as they are.

    Raises UsageError, SourceError; TargetError for one that is larger than the vocabulary.
    """
    overrides = tokenizers.overridden(getattr(args, "override_special_tokens", None) or ())
    extra = tokenizers.listed(getattr(args, "vocab_extra_ids_list", None) or "")
    asked, kind = getattr(args, "tokenizer_model", None), getattr(args, "tokenizer_type", None)
    kinds.of(kind)
    paths = {n: Path(p) for n, p in metadata.origin.companions.items() if companions.is_tokenizer(n)}
    spec = metadata.spec
    if asked:
        if kind is None and metadata.tokenizer_type in kinds.KINDS and Path(asked).is_file():
            kind = _known(metadata.tokenizer_type)  # a loader that was told which model it is
        place = _place(asked)
        made = partial(tokenizers.build, place, overrides=overrides, extra_ids=extra, spec=spec)
        appends = kind is None and _known(metadata.tokenizer_type) == "megatron" and _is_sentencepiece(place)
        return _roomy(made, metadata, asked) if appends else _fitting(made(kind), metadata, asked)
    if paths:
        carry = tokenizers.is_whole(list(paths)) or companions.CONFIG in metadata.origin.companions
        where = str(next(iter(paths.values())).parent)
        if carry and not (overrides or extra) and companions.CONFIG in metadata.origin.companions:
            _check_size(_largest(paths) + 1, metadata, where)
            return None
        files = {name: companions.read(path) for name, path in paths.items()}
        told = kind or _known(metadata.tokenizer_type)

        def of_files(as_kind: str | None) -> Built:
            return tokenizers.of_files(files, as_kind, overrides, extra, spec, where, carry)

        appends = kind is None and told == "megatron"
        return _roomy(of_files, metadata, where) if appends else _fitting(of_files(told), metadata, where)
    if metadata.tokenizer_model and Path(metadata.tokenizer_model).exists():
        return _told(metadata, kind, overrides, extra)
    if overrides or extra:
        raise UsageError(
            "--override-special-tokens and --vocab-extra-ids-list change a tokenizer, but the source has none. "
            "--tokenizer-model PATH names one."
        )
    return None


def _told(metadata: Metadata, kind: str | None, overrides: dict[str, str], extra: tuple[str, ...]) -> Built | None:
    """The tokenizer that the source's args name; one that cannot be had is an error if something is asked of it."""
    path = str(metadata.tokenizer_model)
    try:
        told = kind or _known(metadata.tokenizer_type)
        built = _fitting(tokenizers.build(path, told, overrides, extra, metadata.spec), metadata, path)
    except CkptconvError as error:
        if overrides or extra or kind:
            raise
        log.warning("saver: no tokenizer is written, as the one of the source's args cannot be: %s", error)
        return None
    log.info("saver: the tokenizer is %s, as the source's args say", path)
    return built


def _place(name: str) -> str:
    """A path as it is, a model of the hub as the directory of its tokenizer."""
    from ckptconv import hub

    return hub.fetch(name, tokenizer=True) if hub.is_name(name) else name


def _known(kind: str | None) -> str | None:
    """The kind that the source names, if it is one of a file."""
    found = kinds.MEGATRON.get(kind or "", kind)
    return found if found in kinds.KINDS and found != "huggingface" else None


def _is_sentencepiece(path: str) -> bool:
    return Path(path).is_file() and sentencepiece.recognises(companions.read(path))


def _roomy(made: Callable[[str | None], Built], metadata: Metadata, where: str) -> Built:
    """A sentencepiece tokenizer with what Megatron's appends, where the model has rows for that. Raises TargetError."""
    built = made("megatron")
    if built.size > metadata.spec.vocab_size:
        log.info("saver: the model has no rows for the tokens that Megatron's SentencePieceTokenizer appends: left out")
        built = made("sentencepiece")
    return _fitting(built, metadata, where)


def _fitting(built: Built, metadata: Metadata, where: str) -> Built:
    _check_size(built.size, metadata, where)
    if built.made and metadata.spec.family == "qwen2":
        # transformers 5: MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS of models/auto/tokenization_auto.py
        log.warning(
            "saver: AutoTokenizer of transformers 5 takes Qwen2Tokenizer for every model of type qwen2, which cuts "
            "text its own way: load the tokenizer that was made of %s with PreTrainedTokenizerFast.from_pretrained",
            where,
        )  # fmt: skip
    return built


def _check_size(size: int, metadata: Metadata, where: str) -> None:
    rows = metadata.spec.vocab_size
    if size > rows:
        raise TargetError(
            f"{where}: the tokenizer has ids up to {size - 1}, but the model has embeddings for {rows} tokens. Is it "
            "this model's? Where the source has more rows than tokens, --true-vocab-size keeps them. "
            "Nothing was written."
        )


def _largest(paths: dict[str, Path]) -> int:
    """The largest id of a tokenizer.json, found without its vocabulary in memory; -1 where it cannot be seen so."""
    if "tokenizer.json" not in paths:
        return -1
    data = companions.read(paths["tokenizer.json"])
    vocab = re.search(rb'"vocab":\s*\{', data)
    if vocab is None:  # Unigram: a list, whose places are the ids
        return max(tokenizers.ids(data, str(paths["tokenizer.json"])).values(), default=-1)
    found = [re.finditer(rb'"id":\s*(\d+)', data[: vocab.start()])]
    found.append(re.finditer(rb'(?<!\\)":\s*(\d+)', data[vocab.end() :]))
    return max((int(match[1]) for matches in found for match in matches), default=-1)


def settled(config: dict[str, Any], built: Built) -> dict[str, Any]:
    """config.json, or generation_config.json, with the ids of a tokenizer."""
    changed = dict(config)
    for key, role in _IDS.items():
        want: Any = built.ids.get(role)
        if role == "eos" and len(built.stop) > 1:
            want = built.stop
        there = config.get(key)
        # A list of ids that end a generation may have more than the tokenizer knows to.
        told = isinstance(there, list) and set(built.stop) <= set(there) and not built.overridden
        if want is not None and not told:
            changed[key] = want
    return changed


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The ids that differ, for a note."""
    return [f"{key} {after[key]} (was {before.get(key)})" for key in _IDS if after.get(key) != before.get(key)]


def small_files(
    metadata: Metadata, args: Namespace, config: dict[str, Any], built: Built | None
) -> dict[str, bytes | str]:
    """Name -> content, or path of the source's own, of the files beside weights and config.json."""
    files: dict[str, bytes | str] = {n: p for n, p in metadata.origin.companions.items() if n != companions.CONFIG}
    if built is not None:
        # Prompts belong to the tokenizer they were written for.
        other = "chat_template" if getattr(args, "tokenizer_model", None) else "\0"
        files = {n: p for n, p in files.items() if not companions.is_tokenizer(n) and not n.startswith(other)}
        files |= built.files
    original = metadata.origin.companions.get(GENERATION)
    if original is None:
        told = {key: config[key] for key in _IDS if config.get(key) is not None}
        files[GENERATION] = _json({"_from_model_config": True, **told, **(built.generation if built else {})})
    elif built is not None:
        files[GENERATION] = _json({**settled(companions.read_json(original), built), **built.generation})
    return files


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
