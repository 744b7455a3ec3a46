"""GPT-2's vocab.json and merges.txt: BPE over bytes that are written as letters.

Source: openai/gpt-2 src/encoder.py.
"""

from __future__ import annotations

import json

from ckptconv.errors import SourceError
from ckptconv.tokenizers.draft import BYTE_LEVEL, Draft, added, bpe, document

END = "<|endoftext|>"


def _letters() -> list[str]:
    """byte -> the letter it is written as: itself where it can be seen, else one from 256 up, in order."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


LETTERS = _letters()


def build(vocabulary: bytes, merges: bytes, where: str) -> Draft:
    """The tokenizer of the two files. Raises SourceError."""
    try:
        vocab = json.loads(vocabulary)
        lines = merges.decode().split("\n")
    except ValueError as error:
        raise SourceError(f"{where}: vocab.json or merges.txt cannot be read ({error}).") from error
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    wrong = next((pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocab), None)
    if wrong is not None:
        raise SourceError(f"{where}: merges.txt has {' '.join(wrong)!r}, which vocab.json does not. Are they a pair?")
    roles = {role: END for role in ("bos", "eos", "unk") if END in vocab}
    whole = document(
        bpe(vocab, [(left, right) for left, right in pairs]),
        [added(END, vocab[END])] if END in vocab else [],
        pre_tokenizer=BYTE_LEVEL,
        post_processor={**BYTE_LEVEL, "trim_offsets": False},
        decoder=BYTE_LEVEL,
    )
    files = {"vocab.json": vocabulary, "merges.txt": merges}
    return Draft(whole, {"add_prefix_space": False}, roles, vocab, files, stop=(END,) if END in vocab else ())
