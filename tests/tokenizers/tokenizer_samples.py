"""What small tokenizers are trained on and how, and texts that tell them apart."""

from __future__ import annotations

import itertools
import random
from typing import Any

LINES = [
    "the quick brown fox jumps over the lazy dog", "hello world, this is a tiny corpus", "I'll say it's caf\u00e9 time",
    "converting checkpoints between formats is fun", "numbers 0 1 2 3 4 5 6 7 8 9 and 12345.678",
    "def f(x): return x",
    "\u4f60\u597d\u4e16\u754c \u4f60\u597d", "\u3053\u3093\u306b\u3061\u306f \u4e16\u754c",
    "an \U0001f642 emoji \U0001f680",
    "na\u00efve r\u00e9sum\u00e9",
    "a <b> is xAx",
]  # fmt: skip

#: Parts that are put together at random: spaces, lines, accents, ligatures, scripts, emoji, control characters.
PARTS = [
    "a", "b", "the ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "hello", "wor", "ld", "\u00e9", "e\u0301", "\u4f60\u597d",
    "\U0001f642", "\U0001f469\u200d\U0001f680", "1", "2345", "'s", "I'LL", "!", "\ufb01", "\u2163", "\u3000", "\u00a0",
    "xxxxx", "quick ", "\u2581", "\x00", "\u200b", "\u0645\u0631\u062d\u0628\u0627", "def f(x):", "<0x41>x", "<", "|>",
]  # fmt: skip

_PLAIN: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
_LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True, **_PLAIN}
#: name -> how sentencepiece is told to train it.
TRAINED: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, **_LLAMA},
    "bpe-nfkc": {"model_type": "bpe", "vocab_size": 200, **_PLAIN},
    "gemma": {
        "model_type": "bpe", "vocab_size": 500, "byte_fallback": True, **_LLAMA, "add_dummy_prefix": False,
        "user_defined_symbols": ["<start_of_turn>", "\n", "\n\n", "\u2581\u2581"],
        "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
    },
    "bpe-symbols": {
        "model_type": "bpe", "vocab_size": 500, "byte_fallback": True, **_LLAMA,
        "user_defined_symbols": ["<|im_start|>", "<|im_end|>"],
    },
    "t5": {"model_type": "unigram", "vocab_size": 150, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "unigram-bytes": {"model_type": "unigram", "vocab_size": 420, "byte_fallback": True, **_LLAMA},
}  # fmt: skip


def random_texts(seed: int, count: int) -> list[str]:
    """Texts that are put together of PARTS."""
    choose = random.Random(seed)
    return ["".join(choose.choices(PARTS, k=choose.randint(0, 10))) for _ in range(count)]


TEXTS = [*LINES, *PARTS, "", "  lead and trail  ", "a\n\n\n  b\t\tc", *random_texts(7, 400)]


def merged(count: int) -> list[bytes]:
    """The 256 bytes and what the most frequent pairs of LINES make, in order."""
    ranks = [bytes([byte]) for byte in range(256)]
    words = [[bytes([byte]) for byte in (" " + word).encode()] for line in LINES * 5 for word in line.split()]
    for _ in range(count):
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(left + right)
        for word in words:
            at = 0
            while at + 1 < len(word):
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [left + right]
                at += 1
    return ranks
