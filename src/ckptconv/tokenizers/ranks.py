"""Rank files of tiktoken, as Llama 3 has them: `base64(token) rank` a line; special tokens follow the ranks.

Source: meta-llama/llama3 llama/tokenizer.py (pattern, special tokens), meta-llama/llama-models
models/llama3/tokenizer.py (those of 3.1 and later); tiktoken src/lib.rs for the merging.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

from ckptconv.errors import SourceError
from ckptconv.tokenizers.bpe import LETTERS
from ckptconv.tokenizers.draft import BYTE_LEVEL, Draft, Encode, added, bpe, document, template

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BEGIN, _END, _TURN, _STEP = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
_HEADER = ("<|start_header_id|>", "<|end_header_id|>")


def _reserved(first: int, last: int) -> list[str]:
    return [f"<|reserved_special_token_{i}|>" for i in range(first, last + 1)]


_SPECIAL_3 = (_BEGIN, _END, *_reserved(0, 3), *_HEADER, *_reserved(4, 4), _TURN, *_reserved(5, 250))
_SPECIAL_31 = (_BEGIN, _END, *_reserved(0, 1), "<|finetune_right_pad_id|>", *_reserved(2, 2), *_HEADER, _STEP, _TURN,
               "<|python_tag|>", *_reserved(3, 247))  # fmt: skip

#: kind -> special tokens, those that end a generation (the first is eos), the padding token.
LLAMA3: dict[str, tuple[tuple[str, ...], tuple[str, ...], str | None]] = {
    "llama3": (_SPECIAL_3, (_END,), None),
    "llama3-instruct": (_SPECIAL_3, (_TURN, _END), None),
    "llama3.1": (_SPECIAL_31, (_END,), "<|finetune_right_pad_id|>"),
    "llama3.1-instruct": (_SPECIAL_31, (_TURN, _END, _STEP), "<|finetune_right_pad_id|>"),
}

#: The prompt format of Llama 3's instruct models, without tools: a header and a body for each turn.
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
#: generation_config.json of meta-llama's instruct models.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


def read(data: bytes, where: str) -> dict[bytes, int]:
    """token -> rank. Raises SourceError."""
    found: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise SourceError(
                f"{where}: line {number} is {line[:40]!r}, expected base64 and a rank. "
                "Fetch or copy it again."
            ) from error
    if sorted(found.values()) != list(range(len(found))) or any(bytes([byte]) not in found for byte in range(256)):
        raise SourceError(f"{where}: its {len(found)} ranks are not 0, 1 and so on, with all 256 bytes. Is it whole?")
    return found


def build(data: bytes, kind: str, where: str) -> Draft:
    """The tokenizer of a rank file. Raises SourceError."""
    found = read(data, where)
    special, stop, pad = LLAMA3[kind]
    written = {token: "".join(LETTERS[byte] for byte in token) for token in found}
    merges: list[tuple[int, int, int, str, str]] = []
    for token, rank in found.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in found and right in found:
                merges.append((rank, found[left], found[right], written[left], written[right]))
    merges.sort()
    vocab = {written[token]: rank for token, rank in found.items()}
    ids = {token: len(found) + i for i, token in enumerate(special)}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {**BYTE_LEVEL, "use_regex": False}
    whole = document(
        # A word that is a token is taken whole, as tiktoken does.
        bpe(vocab, [(left, right) for *_, left, right in merges], ignore_merges=True),
        [added(token, number) for token, number in ids.items()],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]},
        post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, template(ids, [_BEGIN], [])]},
        decoder=BYTE_LEVEL,
    )
    instruct = kind.endswith("instruct")
    roles = {"bos": _BEGIN, "eos": stop[0], **({"pad": pad} if pad else {})}
    return Draft(whole, {}, roles, {**vocab, **ids}, stop=stop,
                 chat_template=CHAT if instruct else None, generation=SAMPLING if instruct else {},
                 library=_library(found))  # fmt: skip


def _library(found: dict[bytes, int]) -> Callable[[], Encode | None]:
    def make() -> Encode | None:
        try:
            import tiktoken
        except ImportError:
            return None
        encoding = tiktoken.Encoding("ranks", pat_str=PATTERN, mergeable_ranks=found, special_tokens={})
        return encoding.encode_ordinary

    return make
