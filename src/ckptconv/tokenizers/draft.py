"""A tokenizer before its special tokens are settled, and the parts that tokenizer.json files are made of.

Source: the serialised forms of `tokenizers` 0.20 to 0.23 (huggingface/tokenizers, tokenizers/src).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptconv.errors import SourceError

Json = dict[str, Any]
#: What makes ids of text by other means: text -> ids without special tokens.
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Draft:
    """roles: bos, eos, ... -> token; stop: tokens that end a generation; files: carried beside; `library`: makes an
    encoder that the result is compared with, on `samples`, too; built: not a Hugging Face tokenizer's own files."""

    json: Json | None
    config: Json
    roles: dict[str, str]
    vocabulary: dict[str, int]
    files: dict[str, bytes] = field(default_factory=dict)
    extra: tuple[str, ...] = ()  # tokens that the kind itself appends
    stop: tuple[str, ...] = ()
    chat_template: str | None = None
    generation: Json = field(default_factory=dict)
    built: bool = True
    library: Callable[[], Encode | None] | None = None
    samples: tuple[str, ...] = ()


def carried(files: Mapping[str, bytes], where: str) -> Draft:
    """A tokenizer as it lies in a Hugging Face directory. Raises SourceError for files that are not JSON."""
    config = load(files, "tokenizer_config.json", where)
    told = {**load(files, "special_tokens_map.json", where), **config}
    roles = {key.removesuffix("_token"): content(value) for key, value in told.items() if key.endswith("_token")}
    whole = load(files, "tokenizer.json", where) or None
    roles = {role: token for role, token in roles.items() if token}
    return Draft(whole, config, roles, _vocabulary(files, whole, config, where), dict(files), built=False)


def content(value: Any) -> str:
    """The text of a token that may be written as an object; nothing for what is no token (null, add_bos_token)."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def load(files: Mapping[str, bytes], name: str, where: str) -> Json:
    """A JSON object among files, or an empty one. Raises SourceError."""
    try:
        data = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: {name} is not JSON ({error}). Fetch or copy it again.") from error
    if not isinstance(data, dict):
        raise SourceError(f"{where}: {name} holds a JSON {type(data).__name__}, expected an object.")
    return data


def _vocabulary(files: Mapping[str, bytes], whole: Json | None, config: Json, where: str) -> dict[str, int]:
    """token -> id, from whichever file says it."""
    from ckptconv.tokenizers import sentencepiece

    found: dict[str, int] = {}
    if whole is not None:
        return vocabulary(whole)
    if "vocab.json" in files:
        found |= load(files, "vocab.json", where)
    elif "vocab.txt" in files:
        words = files["vocab.txt"].decode("utf-8", "replace").split("\n")
        found |= {word.rstrip("\r"): i for i, word in enumerate(words) if word}
    else:
        for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
            if sentencepiece.recognises(files.get(name, b"")):
                found |= {piece.text: i for i, piece in enumerate(sentencepiece.read(files[name], where).pieces)}
    found |= {token: i for token, i in load(files, "added_tokens.json", where).items() if isinstance(i, int)}
    decoder = config.get("added_tokens_decoder")
    return found | {content(token): int(i) for i, token in (decoder or {}).items()}


def vocabulary(whole: Json) -> dict[str, int]:
    """token -> id of a tokenizer.json."""
    words = (whole.get("model") or {}).get("vocab") or {}
    found = dict(words) if isinstance(words, dict) else {word[0]: i for i, word in enumerate(words)}
    return found | {token["content"]: token["id"] for token in whole.get("added_tokens") or ()}


def added(token: str, number: int, *, special: bool = True, normalized: bool = False, **flags: bool) -> Json:
    """An entry of `added_tokens`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"id": number, "content": token, **plain, **flags}


def document(model: Json, added_tokens: Sequence[Json], **parts: Json | None) -> Json:
    """A tokenizer.json."""
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added_tokens),
        **{name: parts.get(name) for name in names}, "model": model,
    }  # fmt: skip


def bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **settings: Any) -> Json:
    """A BPE model. Merges are written as every version of `tokenizers` reads them, if no token has a space."""
    spaced = any(" " in left or " " in right for left, right in merges)
    written = [list(pair) if spaced else " ".join(pair) for pair in merges]
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    return {"type": "BPE", **plain, **settings, "vocab": dict(vocab), "merges": written}


def sequence(kind: str, parts: Sequence[Json]) -> Json | None:
    """Several steps as one; kind: what the list of them is called."""
    return {"type": "Sequence", kind: list(parts)} if parts else None


def template(ids: Mapping[str, int], before: Sequence[str], after: Sequence[str]) -> Json:
    """Special tokens around each text; a second text has the same around it, with type 1."""

    def around(name: str, kind: int) -> list[Json]:
        def token(text: str) -> Json:
            return {"SpecialToken": {"id": text, "type_id": kind}}

        return [*map(token, before), {"Sequence": {"id": name, "type_id": kind}}, *map(token, after)]

    tokens = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (*before, *after)}
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": [*around("A", 0), *around("B", 1)],
            "special_tokens": tokens}  # fmt: skip


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
