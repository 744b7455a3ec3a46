"""A tokenizer that was built has to agree with the library it was made for, where that and `tokenizers` are there."""

from __future__ import annotations

from ckptconv.errors import SourceError
from ckptconv.tokenizers.draft import Draft
from ckptconv.tokenizers.special import Built

#: Words, digits, spaces in front, inside and behind, lines, accents, scripts, emoji, control characters, and no text.
SAMPLES = (
    "Hello world", "  two  spaces  ", "a\nb\n\n\tc\r\n", "I'll say: 'it's 12345.678'!", "caf\u00e9 na\u00efve",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\U0001f642\U0001f469\u200d\U0001f680 ok", "\u0645\u0631\u062d\u0628\u0627", "x\u0000y\u200b\ufeff",
    "def f(x):\n    return x ** 2  # \u03bb", " ", "",
)  # fmt: skip


def check(made: Draft, built: Built, where: str) -> None:
    """Raise SourceError when ids differ."""
    if "tokenizer.json" not in built.files or (not made.built and built.files == made.files):
        return
    try:
        import tokenizers
    except ImportError:
        return
    whole = tokenizers.Tokenizer.from_str(built.files["tokenizer.json"].decode())
    for entry in whole.get_added_tokens_decoder():
        token = whole.get_added_tokens_decoder()[entry].content
        if whole.token_to_id(token) != entry:
            raise SourceError(
                f"{where}: {token} would get id {whole.token_to_id(token)}, expected {entry}. "
                "Was it edited?"
            )
    encode = made.library() if made.library else None
    special = [entry["content"] for entry in (made.json or {}).get("added_tokens", ()) if entry["special"]]
    for text in (*SAMPLES, *(f"a {token}b {token}" for token in made.samples)):
        if encode is None or any(token in text for token in special):
            continue
        want, found = encode(text), whole.encode(text, add_special_tokens=False).ids
        if want != found:
            raise SourceError(
                f"{where}: a tokenizer.json made of it gives {found} for {text!r}, its own library {want}. Give the "
                "directory of a Hugging Face tokenizer that was made of it."
            )
