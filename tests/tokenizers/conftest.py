"""Small tokenizers of every kind, trained here, and transformers to load what is built."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizer_samples import LINES, TRAINED, merged


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`trained(name)`: a tokenizer.model of TRAINED, in a folder of its own."""
    folder = tmp_path_factory.mktemp("spm")

    def get(name: str) -> Path:
        path = folder / name / "tokenizer.model"
        if not path.exists():
            path.parent.mkdir()
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(LINES * 20), model_writer=model, hard_vocab_limit=False, minloglevel=2,
                **TRAINED[name],
            )  # fmt: skip
            path.write_bytes(model.getvalue())
        return path

    return get


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank file of tiktoken: tokenizer.model with base64 and a rank on each line."""
    path = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(merged(90))))
    return path


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of a byte-level BPE."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("gpt2")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=350, show_progress=False, special_tokens=["<|endoftext|>"],
                                   initial_alphabet=alphabet))  # fmt: skip
    made.model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`loaded(built, model_type)`: what AutoTokenizer makes of the files, beside a config.json."""

    def load(built: Any, model_type: str = "llama") -> Any:
        from transformers import AutoTokenizer

        folder = tmp_path_factory.mktemp("built")
        for name, content in built.files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        return AutoTokenizer.from_pretrained(str(folder))

    return load
