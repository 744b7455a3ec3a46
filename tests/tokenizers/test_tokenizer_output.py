"""Tokenizers of written Hugging Face directories: carried, built, changed, and config.json that agrees with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from commands import convert, run

Trained = Callable[[str], Path]
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "epfl"
NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def test_a_tokenizer_is_carried_byte_for_byte_through_another_format(hf: Callable[..., Path], tmp_path: Path) -> None:
    source = hf("llama2", vocab_size=400)
    out = convert(convert(source, tmp_path / "mg", "megatron_mcore"), tmp_path / "hf")
    for name in (*NAMES, "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_a_tokenizer_model_is_built_into_what_transformers_loads(
    hf: Callable[..., Path], trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The flags of Megatron-LLM's megatron_to_hf.py, with a checkpoint that has no tokenizer."""
    source = convert(hf("llama2", tokenizer=False, vocab_size=512), tmp_path / "mg", "megatron_mcore")
    out = convert(
        source, tmp_path / "hf", "hf", "--tokenizer-model", trained("llama"), "--vocab_extra_ids_list",
        "<|im_start|>,<|im_end|>", "--override_special_tokens", "eos=<|im_end|>", "pad=<|im_end|>",
    )  # fmt: skip
    library = sentencepiece.SentencePieceProcessor(str(trained("llama")))
    end = library.get_piece_size() + 1
    tokenizer = load(out)
    assert tokenizer.encode("hello \U0001f642 world\n<|im_end|>") == [
        1,
        *library.encode("hello \U0001f642 world\n"),
        end,
    ]
    assert (out / "tokenizer.model").read_bytes() == trained("llama").read_bytes()
    for name in ("config.json", "generation_config.json"):
        told = read(out / name)
        assert (told["bos_token_id"], told["eos_token_id"], told["pad_token_id"]) == (1, end, end), name
    assert f"config.json has the tokenizer's ids now: eos_token_id {end} (was 2)" in caplog.text
    assert tokenizer.model_max_length == read(out / "config.json")["max_position_embeddings"]


def test_an_instruct_tokenizer_says_what_ends_a_generation(
    hf: Callable[..., Path], ranks: Path, tmp_path: Path
) -> None:
    source = hf("llama2", tokenizer=False, vocab_size=640)
    out = convert(source, tmp_path / "hf", "hf", "--tokenizer-model", ranks, "--tokenizer-type", "llama3-instruct")
    base = len(ranks.read_bytes().splitlines())
    told = read(out / "generation_config.json")
    assert read(out / "config.json")["eos_token_id"] == told["eos_token_id"] == [base + 9, base + 1]
    assert (told["bos_token_id"], told["do_sample"], told["temperature"], told["top_p"]) == (base, True, 0.6, 0.9)


def test_a_carried_tokenizer_can_be_changed(hf: Callable[..., Path], tmp_path: Path) -> None:
    source = hf("llama2", vocab_size=2000)
    size = load(source).vocab_size
    assert size < 2000
    out = convert(
        source, tmp_path / "hf", "hf", "--override-special-tokens", "pad=<p>", "--vocab-extra-ids-list", "<p>"
    )
    assert load(out).pad_token_id == read(out / "config.json")["pad_token_id"] == size
    assert (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_a_lone_tokenizer_model_beside_a_checkpoint_is_built(
    hf: Callable[..., Path], trained: Trained, tmp_path: Path
) -> None:
    source = convert(hf("llama2", tokenizer=False, vocab_size=512), tmp_path / "mg", "megatron_mcore")
    folder = source / "hf"
    for path in folder.iterdir():
        path.unlink()
    (folder / "tokenizer.model").write_bytes(trained("llama").read_bytes())
    out = convert(source, tmp_path / "hf")
    library = sentencepiece.SentencePieceProcessor(str(trained("llama")))
    assert load(out).encode("hello world") == [1, *library.encode("hello world")]


def test_the_tokenizer_that_the_args_of_a_checkpoint_name_is_taken(
    hf: Callable[..., Path], trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, rows = hf("llama2", tokenizer=False, vocab_size=512), "--tokenizer-model"
    told = convert(
        plain, tmp_path / "mg", "megatron_mcore", rows, trained("llama"), "--tokenizer-type", "Llama2Tokenizer"
    )
    assert load(convert(told, tmp_path / "hf")).encode("hello")[0] == 1
    own = convert(plain, tmp_path / "own", "megatron_mcore", rows, trained("llama"), "--tokenizer-type",
                  "SentencePieceTokenizer")  # fmt: skip
    tokenizer = load(convert(own, tmp_path / "hf2"))
    assert tokenizer.convert_tokens_to_ids(["<CLS>", "<EOD>"]) == [
        tokenizer.sep_token_id - 1,
        tokenizer.sep_token_id + 1,
    ]
    gone = convert(plain, tmp_path / "gone", "megatron_mcore", rows, "/not/here/tokenizer.model")
    assert not list(convert(gone, tmp_path / "hf3").glob("tokenizer*"))
    # One that does not fit is left out, as nobody asked for it.
    small = convert(hf("llama2", tokenizer=False), tmp_path / "small", "megatron_mcore", rows, trained("llama"))
    assert not list(convert(small, tmp_path / "hf4").glob("tokenizer*"))
    assert "no tokenizer is written" in caplog.text


@pytest.mark.parametrize("flags", [["--tokenizer-model", "llama"], ["--vocab-extra-ids-list", "<a>,<b>"]])
def test_a_tokenizer_larger_than_the_vocabulary_is_an_error(
    flags: list[str], hf: Callable[..., Path], trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(trained(word)) if word == "llama" else word for word in flags]
    assert run(hf("llama2"), tmp_path / "hf", "hf", *flags) == 7
    assert "but the model has embeddings for 131 tokens" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_so_is_a_carried_one(hf: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    source = shutil.copytree(hf("llama2"), tmp_path / "source")
    whole = read(source / "tokenizer.json")
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 131, "content": "<late>"})
    (source / "tokenizer.json").write_text(json.dumps(whole))
    assert run(source, tmp_path / "hf", "hf") == 7
    assert "the tokenizer has ids up to 131, but the model has embeddings for 131 tokens" in capsys.readouterr().err


def test_what_is_asked_of_no_tokenizer_is_refused(
    hf: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hf("llama2", tokenizer=False), tmp_path / "hf", "hf", "--override-special-tokens", "eos=</s>") == 2
    assert "the source has none. --tokenizer-model PATH names one" in capsys.readouterr().err


def test_an_older_tokenizer_does_not_stay(hf: Callable[..., Path], trained: Trained, tmp_path: Path) -> None:
    source = hf("llama2", vocab_size=512)
    out = convert(source, tmp_path / "hf")
    (out / "added_tokens.json").write_text('{"<old>": 3}')
    convert(source, out, "hf", "--overwrite", "--tokenizer-model", trained("t5"))
    assert not (out / "added_tokens.json").exists()
    assert (out / "tokenizer.model").read_bytes() == trained("t5").read_bytes()


def test_a_model_of_qwen2_with_a_tokenizer_that_is_not_its_own(
    hf: Callable[..., Path], trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """AutoTokenizer of transformers 5 takes its own class there, so the warning says what to load it with."""
    from transformers import PreTrainedTokenizerFast

    out = convert(
        hf("qwen2", tokenizer=False, vocab_size=512), tmp_path / "hf", "hf", "--tokenizer-model", trained("llama")
    )
    assert "takes Qwen2Tokenizer for every model of type qwen2" in caplog.text
    library = sentencepiece.SentencePieceProcessor(str(trained("llama")))
    loaded = PreTrainedTokenizerFast.from_pretrained(str(out))
    assert loaded.encode("a  b\n", add_special_tokens=False) == library.encode("a  b\n")
