"""BERT's vocab.txt: the longest piece first, in lower case or not.

Source: google-research/bert tokenization.py.
"""

from __future__ import annotations

import re

from ckptconv.errors import SourceError
from ckptconv.tokenizers.draft import Draft, added, document, template

SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}


def build(data: bytes, kind: str, where: str) -> Draft:
    """The tokenizer of a vocabulary. kind: bert-cased, bert-uncased, or bert to see it. Raises SourceError."""
    try:
        words = [word.rstrip("\r") for word in data.decode().removesuffix("\n").split("\n")]
    except ValueError as error:
        raise SourceError(f"{where}: is not text ({error}). Fetch or copy it again.") from error
    vocab = {word: i for i, word in enumerate(words)}
    missing = [token for role, token in SPECIAL.items() if token not in vocab and role != "mask"]
    if missing or len(vocab) != len(words):
        what = f"lacks {', '.join(missing)}" if missing else "has a word twice"
        raise SourceError(f"{where}: {what}, so it is no vocabulary of BERT. --tokenizer-type says what it is.")
    capital = any(re.search("[A-Z]", word) for word in vocab if word not in SPECIAL.values())
    lower = kind == "bert-uncased" or (kind == "bert" and not capital)
    roles = {role: token for role, token in SPECIAL.items() if token in vocab}
    whole = document(
        {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
         "vocab": vocab},
        sorted((added(token, vocab[token]) for token in roles.values()), key=lambda entry: int(entry["id"])),
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                    "lowercase": lower},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=_template(vocab),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )  # fmt: skip
    names = ["input_ids", "token_type_ids", "attention_mask"]
    config = {"do_lower_case": lower, "model_input_names": names}
    return Draft(whole, config, roles, vocab, {"vocab.txt": data})


def _template(vocab: dict[str, int]) -> dict[str, object]:
    made = template(vocab, [SPECIAL["cls"]], [SPECIAL["sep"]])
    # [CLS] A [SEP] B [SEP]: the second text has nothing before it.
    return {**made, "pair": [part for i, part in enumerate(made["pair"]) if i != 3]}
