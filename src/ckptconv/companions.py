"""The small files of a Hugging Face directory: config, generation config, tokenizer. Carried byte for byte."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ckptconv.errors import SourceError, why

CONFIG = "config.json"
#: The folder beside the weights of another format in which they are kept.
FOLDER = "hf"
PROVENANCE = "ckptconv.json"

PATTERNS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "tokenizer.model.*", "tekken.json", "vocab.json", "merges.txt", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tiktoken.model", "chat_template.json",
    "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip

_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece", "tekken")


def find(directory: str | os.PathLike[str]) -> dict[str, str]:
    """name -> path of the small files in a directory."""
    folder = Path(directory)
    if not folder.is_dir():
        return {}
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    return {name: str(folder / name) for name in names if any(fnmatch(name, pattern) for pattern in PATTERNS)}


def is_tokenizer(name: str) -> bool:
    """Whether a small file belongs to the tokenizer."""
    return name.startswith(_TOKENIZER) or name.endswith(".tiktoken") or name == "tiktoken.model"


def read(path: str | os.PathLike[str]) -> bytes:
    """What a small file holds. Raises SourceError naming it."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {why(error)}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file. Raises SourceError naming it."""
    try:
        data = json.loads(read(path).decode())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not JSON ({error}). Fetch or copy it again.") from error
    if not isinstance(data, dict):
        raise SourceError(f"{path}: holds a JSON {type(data).__name__}, expected an object. Is it the right file?")
    return data


def read_config(companions: dict[str, str]) -> dict[str, Any] | None:
    """config.json among the small files, or None."""
    return read_json(companions[CONFIG]) if CONFIG in companions else None
