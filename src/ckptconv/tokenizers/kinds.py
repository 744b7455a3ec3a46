"""What kinds of tokenizers there are, by our names and Megatron's, and how to see which a file is.

Megatron's names: Megatron-LM `megatron/training/tokenizer/tokenizer.py` at core_v0.16.1; Megatron-LLM
`megatron/tokenizer/tokenizer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckptconv.errors import UsageError, near, some
from ckptconv.spec import ModelSpec
from ckptconv.tokenizers import ranks, sentencepiece

KINDS = (
    "huggingface", "sentencepiece", "megatron", *ranks.LLAMA3, "gpt2", "bert", "bert-cased", "bert-uncased",
)  # fmt: skip

#: Megatron's name -> ours. Its SentencePieceTokenizer adds tokens of its own to the model.
MEGATRON = {
    "HuggingFaceTokenizer": "huggingface",
    "FalconTokenizer": "huggingface",
    "SentencePieceTokenizer": "megatron",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "GPT2BPETokenizer": "gpt2",
    "BertWordPieceLowerCase": "bert-uncased",
    "BertWordPieceCase": "bert-cased",
}

_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
#: Ranks of Llama 3's tokenizer.model: with it no other tokenizer has come.
_LLAMA3_RANKS = 128000


def of(name: str | None) -> str | None:
    """Our kind for a name of ours or Megatron's. Raises UsageError."""
    if name is None or name in KINDS:
        return name
    if name in MEGATRON:
        return MEGATRON[name]
    known = (*KINDS, *MEGATRON)
    raise UsageError(f"tokenizer type {name} is not known.{near(name, known)} Known are {some(known, 30)}.")


def seen(files: Mapping[str, bytes], spec: ModelSpec | None, where: str) -> str:
    """The kind of files as far as they tell. Raises UsageError when they do not."""
    if {"vocab.json", "merges.txt"} <= set(files):
        return "gpt2"
    data = next(iter(files.values()))
    if sentencepiece.recognises(data):
        return "sentencepiece"
    if _RANK.match(data):
        if data.rstrip().count(b"\n") + 1 != _LLAMA3_RANKS:
            raise UsageError(
                f"{where}: holds tiktoken ranks, which do not say how text is cut nor what the special tokens are. "
                f"--tokenizer-type says it: {', '.join(ranks.LLAMA3)}."
            )
        newer = spec is not None and (spec.rope is not None and spec.rope.kind == "llama3")
        return "llama3.1" if newer else "llama3"
    if b"[UNK]" in data.split():
        return "bert"
    raise UsageError(f"{where}: is no tokenizer that is known by its content. --tokenizer-type says which it is.")
