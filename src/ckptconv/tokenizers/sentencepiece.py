"""tokenizer.model files of sentencepiece, BPE and Unigram, read without protobuf and made into a tokenizer.json.

The ids are those of sentencepiece for every text without control symbols; a control symbol (`<s>`) in a text, which
sentencepiece takes for letters, becomes its id, and what is between two of them is encoded by itself, as Megatron
does. Known to differ: a text that is nothing but one user-defined symbol gets no dummy prefix; `<0x41>` written out is
a byte in a Unigram model with byte fallback that lacks one of its letters.

Source: sentencepiece src/sentencepiece_model.proto, normalizer.cc, bpe_model.cc, unigram_model.cc at v0.2.0.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptconv.errors import SourceError
from ckptconv.spec import ModelSpec
from ckptconv.tokenizers.draft import Draft, Encode, Json, added, bpe, document, sequence, template

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a file says, with the defaults of the format."""

    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    suffix: bool
    names: dict[str, str]  # bos, eos, unk, pad -> piece
    charsmap: bytes
    prefix: bool
    collapse: bool
    escape: bool


def recognises(data: bytes) -> bool:
    """Whether a file begins as such models do: with a piece."""
    try:
        number, value = next(_fields(data[:4096], cut=True))
        return number == 1 and isinstance(value, bytes) and any(n == 1 for n, _ in _fields(value))
    except (StopIteration, ValueError):
        return False


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"byte {at}: a number does not end")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes, cut: bool = False) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a message. Raises ValueError when it ends too early, unless it was `cut`."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"byte {at}: wire type {kind}")
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(data, at)
        if at + size > len(data) and not cut:
            raise ValueError(f"byte {at}: {size} bytes are wanted, {len(data) - at} are left")
        yield key >> 3, data[at : at + size]
        at += size


def read(data: bytes, where: str) -> Model:
    """The model in a file. Raises SourceError."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number in (2, 3) and isinstance(value, bytes):
                (trainer if number == 2 else normalizer).update(_fields(value))
        if not pieces:
            raise ValueError("it has no pieces")
        names = {role: _text(trainer.get(45 + i), default) for i, (role, default) in enumerate(_NAMED)}
        return Model(
            pieces,
            kind=_flag(trainer.get(3), UNIGRAM),
            byte_fallback=bool(trainer.get(35)),
            suffix=bool(trainer.get(24)),
            names=names,
            charsmap=_bytes(normalizer.get(2)),
            prefix=bool(normalizer.get(3, True)),
            collapse=bool(normalizer.get(4, True)),
            escape=bool(normalizer.get(5, True)),
        )
    except (ValueError, struct.error) as error:
        raise SourceError(f"{where}: is not a sentencepiece model ({error}). Fetch or copy it again.") from error


_NAMED = (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))


def _piece(data: bytes) -> Piece:
    found = dict(_fields(data))
    score = found.get(2, b"\0\0\0\0")
    if not isinstance(score, bytes):
        raise ValueError("a score is not a float")
    return Piece(_text(found.get(1), ""), struct.unpack("<f", score)[0], _flag(found.get(3), NORMAL))


def _text(value: int | bytes | None, default: str) -> str:
    return value.decode() if isinstance(value, bytes) else default


def _bytes(value: int | bytes | None) -> bytes:
    return value if isinstance(value, bytes) else b""


def _flag(value: int | bytes | None, default: int) -> int:
    return value if isinstance(value, int) else default


def build(data: bytes, where: str, spec: ModelSpec | None) -> Draft:
    """The tokenizer of a model. Raises SourceError for what a tokenizer.json cannot say."""
    model = read(data, where)
    _refuse(model, where)
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise SourceError(f"{where}: has a piece twice, so ids are not clear. Fetch or copy it again.")
    of_kind: dict[int, list[int]] = {}
    for i, piece in enumerate(model.pieces):
        of_kind.setdefault(piece.kind, []).append(i)
    unknown = model.pieces[of_kind[UNKNOWN][0]].text
    # A name stands for a role only if the model has it as a control symbol, as sentencepiece's bos_id() has it.
    roles = {"unk": unknown} | {
        role: model.names[role] for role in ("bos", "eos", "pad")
        if model.names[role] in vocab and model.pieces[vocab[model.names[role]]].kind == CONTROL
    }  # fmt: skip
    user = [model.pieces[i].text for i in of_kind.get(USER_DEFINED, [])]
    entries = [added(model.pieces[i].text, i) for i in sorted(of_kind[UNKNOWN] + of_kind.get(CONTROL, []))]
    # After normalising, for the dummy prefix belongs to the text and not to what is between symbols.
    entries += [added(text, vocab[text], special=False, normalized=True) for text in user]
    made = _unigram(model, vocab) if model.kind == UNIGRAM else _bpe(model, vocab, unknown)
    ends = spec is not None and spec.family == "t5" and "eos" in roles
    before = [roles["bos"]] if "bos" in roles and not ends else []
    whole = document(
        made,
        sorted(entries, key=lambda entry: int(entry["id"])),
        normalizer=sequence("normalizers", _normalizers(model, user)),
        post_processor=template(vocab, before, [roles["eos"]] if ends else []) if before or ends else None,
        decoder=sequence("decoders", _decoders(model)),
    )
    config = {"add_bos_token": bool(before), "add_eos_token": ends, "spaces_between_special_tokens": False}
    return Draft(whole, config, roles, vocab, {"tokenizer.model": data}, stop=(roles["eos"],) if "eos" in roles else (),
                 library=_library(data), samples=tuple(user[:3]))  # fmt: skip


def _refuse(model: Model, where: str) -> None:
    kinds = {piece.kind for piece in model.pieces}
    reasons = [
        (model.kind not in (UNIGRAM, BPE), "it is of the word or char kind, expected BPE or Unigram"),
        (model.suffix, "it marks spaces behind words (treat_whitespace_as_suffix)"),
        (UNUSED in kinds, "it has pieces of the kind UNUSED"),
        (UNKNOWN not in kinds, "it has no piece for what is unknown"),
    ]
    found = [text for wrong, text in reasons if wrong]
    if found:
        raise SourceError(
            f"{where}: cannot be written as a tokenizer.json: {'; '.join(found)}. Give the directory of a Hugging Face "
            "tokenizer that was made of it."
        )


def _bpe(model: Model, vocab: dict[str, int], unknown: str) -> Json:
    """Every way to make a piece of two others is a merge; its rank is that of the piece."""
    can = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece in model.pieces:
        text = piece.text
        if piece.kind == NORMAL:
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in can and right in can:
                    merges.append((-piece.score, vocab[left], vocab[right], left, right))
    merges.sort()
    return bpe(vocab, [(left, right) for *_, left, right in merges], unk_token=unknown, fuse_unk=True,
               byte_fallback=model.byte_fallback)  # fmt: skip


def _unigram(model: Model, vocab: dict[str, int]) -> Json:
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN)
    # Here bytes are pieces as all others, so `<0x41>` written out must cost more than its letters.
    never = min(piece.score for piece in model.pieces) - 1000
    words = [[piece.text, never if piece.kind == BYTE else piece.score] for piece in model.pieces]
    return {"type": "Unigram", "unk_id": unknown, "vocab": words, "byte_fallback": model.byte_fallback}


def _normalizers(model: Model, user: list[str]) -> list[Json]:
    steps: list[Json] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    mark = SPACE if model.escape else " "
    if model.collapse:
        steps.append(_replace({"Regex": r"\A +| +\z"}, ""))
        steps.append(_replace({"Regex": " {2,}"}, " "))
    if model.prefix and user:
        # Added tokens go through this, too, to be found in normalised text: they must stay what they are.
        whole = "|".join(re.escape(text) for text in user)
        steps.append(_replace({"Regex": rf"\A(?!(?:{whole})\z)(?!\z)"}, mark))
    elif model.prefix:
        steps.append({"type": "Prepend", "prepend": mark})
    if model.escape:
        steps.append(_replace({"String": " "}, SPACE))
    return steps


def _replace(pattern: Json, by: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": by}


def _decoders(model: Model) -> list[Json]:
    steps: list[Json] = [_replace({"String": SPACE}, " ")] if model.escape else []
    steps += [{"type": "ByteFallback"}] if model.byte_fallback else []
    steps.append({"type": "Fuse"})
    if model.prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _library(data: bytes) -> Callable[[], Encode | None]:
    def make() -> Encode | None:
        try:
            import sentencepiece
        except ImportError:
            return None
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        return lambda text: list(processor.encode(text))

    return make
