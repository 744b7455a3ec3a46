"""Tokenizers that are built give the ids of the library they were made for, loaded by transformers' AutoTokenizer."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tokenizer_samples import TEXTS, TRAINED

from ckptconv import tokenizers
from ckptconv.errors import SourceError, UsageError
from ckptconv.spec import ModelSpec
from ckptconv.tokenizers import check, ranks, special
from ckptconv.tokenizers import sentencepiece as pieces

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "epfl"
Trained = Callable[[str], Path]


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", TRAINED)
def test_ids_are_those_of_sentencepiece(name: str, trained: Trained, loaded: Callable[..., Any]) -> None:
    built = tokenizers.build(trained(name))
    tokenizer, library = loaded(built), sentencepiece.SentencePieceProcessor(str(trained(name)))
    symbols = TRAINED[name].get("user_defined_symbols", [])
    texts = [*TEXTS, *(f"{a}{symbol}{b}" for symbol in symbols for a in ("a", " ", "") for b in ("b", " c", symbol))]
    for text in texts:
        assert plain(tokenizer, text) == library.encode(text), text
        if TRAINED[name].get("byte_fallback"):
            assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text)), text
    assert len(tokenizer) == library.get_piece_size() == built.size
    for role in ("bos", "eos", "pad", "unk"):
        want = getattr(library, f"{role}_id")()
        assert built.ids.get(role, -1) == want, role
        assert getattr(tokenizer, f"{role}_token_id") == (None if want < 0 else want), role


def test_specials_in_a_text_are_ids_and_what_is_between_is_encoded_by_itself(
    trained: Trained, loaded: Callable[..., Any]
) -> None:
    tokenizer = loaded(tokenizers.build(trained("llama")))
    library = sentencepiece.SentencePieceProcessor(str(trained("llama")))
    assert tokenizer.encode("hello</s>world") == [1, *library.encode("hello"), 2, *library.encode("world")]
    assert tokenizer.encode("a", "b") == [1, *library.encode("a"), 1, *library.encode("b")]
    assert tokenizer.decode(tokenizer.encode("hello world"), skip_special_tokens=True) == "hello world"


def test_a_tokenizer_of_t5_ends_texts(trained: Trained, loaded: Callable[..., Any]) -> None:
    spec = ModelSpec(**SPEC, family="t5")  # type: ignore[arg-type]
    library = sentencepiece.SentencePieceProcessor(str(trained("t5")))
    tokenizer = loaded(tokenizers.build(trained("t5"), spec=spec), "t5")
    assert tokenizer.encode("hello world") == [*library.encode("hello world"), 1]
    assert plain(loaded(tokenizers.build(trained("t5"))), "hello") == library.encode("hello")


SPEC = {
    "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "num_query_groups": 1,
    "kv_channels": 8, "vocab_size": 500, "max_position_embeddings": 64, "seq_length": 64,
    "dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_read_without_protobuf_is_what_sentencepiece_reads(name: str, trained: Trained) -> None:
    library = sentencepiece.SentencePieceProcessor(str(trained(name)))
    model = pieces.read(trained(name).read_bytes(), "here")
    assert len(model.pieces) == library.get_piece_size()
    kinds = {
        pieces.UNKNOWN: "is_unknown",
        pieces.CONTROL: "is_control",
        pieces.UNUSED: "is_unused",
        pieces.BYTE: "is_byte",
    }
    for i, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (library.id_to_piece(i), library.get_score(i))
        said = [kind for kind, asks in kinds.items() if getattr(library, asks)(i)]
        assert said == ([piece.kind] if piece.kind in kinds else [])
    assert model.byte_fallback == bool(TRAINED[name].get("byte_fallback"))
    assert model.prefix == TRAINED[name].get("add_dummy_prefix", True)
    assert model.collapse == TRAINED[name].get("remove_extra_whitespaces", True)
    assert bool(model.charsmap) == ("normalization_rule_name" not in TRAINED[name])


@pytest.mark.parametrize("kind", ranks.LLAMA3)
def test_ids_are_those_of_tiktoken(kind: str, ranks: Path, loaded: Callable[..., Any]) -> None:
    built = tokenizers.build(ranks, kind)
    tokenizer = loaded(built)
    lines = [line.split() for line in ranks.read_bytes().splitlines()]
    known = {base64.b64decode(token): int(rank) for token, rank in lines}
    listed = LLAMA3_FIRST["llama3.1" if kind.startswith("llama3.1") else "llama3"]
    library = tiktoken.Encoding(
        "x", pat_str=_PATTERN, mergeable_ranks=known, special_tokens={t: len(known) + i for i, t in enumerate(listed)}
    )
    for text in [*TEXTS, *(f"a{token}\n{token} b" for token in listed)]:
        want = library.encode(text, allowed_special="all")
        assert plain(tokenizer, text) == want, text
        assert tokenizer.decode(want) == library.decode(want), text
    assert tokenizer.encode("a") == [len(known), *library.encode("a")]
    assert len(tokenizer) == built.size == len(known) + 256
    # The last one is told by the count: 256 special tokens.
    last = "<|reserved_special_token_250|>" if listed == LLAMA3_FIRST["llama3"] else "<|reserved_special_token_247|>"
    assert tokenizer.convert_tokens_to_ids(last) == len(known) + 255
    assert tokenizer.eos_token == ("<|eot_id|>" if kind.endswith("instruct") else "<|end_of_text|>")
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


# As meta-llama/llama3 (tokenizer.py) and meta-llama/llama-models (models/llama3/tokenizer.py) have them, written out.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_FIRST = {
    "llama3": [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>",
    ],
    "llama3.1": [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>",
    ],
}  # fmt: skip


def test_an_instruct_tokenizer_has_prompts_and_ends(ranks: Path, loaded: Callable[..., Any]) -> None:
    built = tokenizers.build(ranks, "llama3.1-instruct")
    tokenizer = loaded(built)
    base = built.ids["bos"]
    assert built.stop == [base + 9, base + 1, base + 8]
    talk = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yo"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyo<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert loaded(tokenizers.build(ranks, "llama3.1")).chat_template is None
    assert tokenizers.build(ranks, "llama3").stop == [base + 1]


def test_ids_are_those_of_gpt2(gpt2: Path, loaded: Callable[..., Any]) -> None:
    from transformers import GPT2TokenizerFast

    built = tokenizers.build(gpt2 / "vocab.json")
    tokenizer, library = loaded(built, "gpt2"), GPT2TokenizerFast.from_pretrained(str(gpt2))
    for text in [*TEXTS, "a<|endoftext|> b"]:
        assert tokenizer.encode(text) == library.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert built.ids == {"bos": 0, "eos": 0, "unk": 0}
    assert {name: built.files[name] for name in ("vocab.json", "merges.txt")} == {
        name: (gpt2 / name).read_bytes() for name in ("vocab.json", "merges.txt")
    }


@pytest.mark.parametrize("cased", [False, True])
def test_ids_are_those_of_bert(cased: bool, tmp_path: Path, loaded: Callable[..., Any]) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz!.'", "hello", "##llo", "he",
             "fox", "##x", "\u4f60", "cafe", *(["Hello", "caf\u00e9"] if cased else [])]  # fmt: skip
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    built = tokenizers.build(tmp_path / "vocab.txt")
    tokenizer = loaded(built, "bert")
    library = BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=not cased)
    for text in [*TEXTS, "Hello caf\u00e9 fox! [MASK]"]:
        assert tokenizer.encode(text) == library.encode(text), text
    assert tokenizer.encode("hello", "fox") == library.encode("hello", "fox")
    pair = tokenizer("hello", "fox")
    assert pair["token_type_ids"] == library("hello", "fox")["token_type_ids"]
    assert built.ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def test_megatrons_own_tokens_are_where_megatron_llm_put_them() -> None:
    """Megatron-LLM's converter wrote these ids for this very tokenizer.model (golden/epfl)."""
    if not GOLDEN.is_dir():
        pytest.skip(f"{GOLDEN} is not there")
    from tokenizers import Tokenizer

    built = tokenizers.build(GOLDEN / "inputs" / "tok" / "tokenizer.model", "SentencePieceTokenizer")
    ours = Tokenizer.from_str(built.files["tokenizer.json"].decode())
    want = json.loads((GOLDEN / "m2h" / "llama2_gqa" / "added_tokens.json").read_text())
    assert {token: ours.token_to_id(token) for token in want} == want
    told = json.loads((GOLDEN / "m2h" / "llama2_gqa" / "special_tokens_map.json").read_text())
    config = json.loads(built.files["tokenizer_config.json"])
    for key, token in told.items():
        assert config[key] == (token if isinstance(token, str) else token["content"])
    theirs = sentencepiece.SentencePieceProcessor(str(GOLDEN / "inputs" / "tok" / "tokenizer.model"))
    for text in (GOLDEN / "inputs" / "tok" / "corpus.txt").read_text().splitlines()[:300]:
        assert ours.encode(text).ids == [1, *theirs.encode(text)], text


@pytest.mark.parametrize("kind", ["llama", "gemma", "t5"])
def test_files_are_in_the_style_of_transformers_4(kind: str, trained: Trained) -> None:
    """What 4.57.6 stumbles over in files of 5 is not there: formats/huggingface-meta.md, section 6."""
    built = tokenizers.build(trained(kind), None, {"pad": "<x>"}, ["<x>"])
    config = json.loads(built.files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & set(config)
    assert config["additional_special_tokens"] == ["<x>"]
    whole = json.loads(built.files["tokenizer.json"])
    assert all(isinstance(merge, str) for merge in whole["model"].get("merges", []))
    assert set(built.files) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"}


# Overrides and tokens that are appended


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_overrides_and_extra_ids_persist(
    name: str, trained: Trained, loaded: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    library = sentencepiece.SentencePieceProcessor(str(trained(name)))
    size = library.get_piece_size()
    overrides = {"eos": "<|im_end|>", "pad": "<|im_end|>", "bos": "<|im_start|>", "cls": "</s>"}
    built = tokenizers.build(trained(name), None, overrides, ["<|im_start|>", "<|im_end|>"])
    assert {role: built.ids[role] for role in overrides} == {
        "eos": size + 1,
        "pad": size + 1,
        "bos": size,
        "cls": library.eos_id(),
    }
    assert (built.stop, built.size) == ([size + 1], size + 2)
    tokenizer = loaded(built)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(str(tmp_path))):
        assert (each.eos_token, each.pad_token, each.bos_token_id, each.cls_token) == (
            "<|im_end|>",
            "<|im_end|>",
            size,
            "</s>",
        )
        begins = [size] if name == "llama" else []
        assert each.encode("hello<|im_end|>") == [*begins, *library.encode("hello"), size + 1]
        assert each.decode([size, *library.encode("hello")], skip_special_tokens=True) == "hello"


def test_a_hugging_face_tokenizer_is_carried_or_changed_in_place(
    hf: Callable[..., Path], loaded: Callable[..., Any]
) -> None:
    folder = hf("llama2", vocab_size=400)
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    source = {name: (folder / name).read_bytes() for name in names}
    plainly = tokenizers.build(folder)
    assert plainly.files == source
    assert plainly.ids == {"unk": 0, "bos": 1, "eos": 2}
    built = tokenizers.build(folder, None, {"bos": "<new>", "pad": "<unk>"}, ["<new>"])
    before, after = (json.loads(files["tokenizer_config.json"]) for files in (source, built.files))
    assert {key for key in after if after[key] != before.get(key)} == {
        "bos_token", "pad_token", "added_tokens_decoder", "additional_special_tokens",
    }  # fmt: skip
    assert built.files["tokenizer.model"] == source["tokenizer.model"]
    mapped = json.loads(built.files["special_tokens_map.json"])
    assert (mapped["bos_token"], mapped["eos_token"]) == ("<new>", "</s>")
    old, new = loaded(plainly), loaded(built)
    assert new.encode("hello") == [plainly.size, *old.encode("hello")[1:]]
    assert (new.bos_token, new.pad_token_id) == ("<new>", 0)


def test_one_token_of_two_roles_is_changed_where_the_role_is() -> None:
    """`</s>` before and after a text, as OPT and others have it, with only eos changed."""
    steps = [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
             {"SpecialToken": {"id": "</s>", "type_id": 0}}]  # fmt: skip
    part = {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": {}}
    made = special._processor(part, {"bos": ("</s>", "</s>"), "eos": ("</s>", "<e>")}, {"</s>": 2, "<e>": 9})
    assert [step["SpecialToken"]["id"] for step in made["single"] if "SpecialToken" in step] == ["</s>", "<e>"]
    assert made["special_tokens"]["<e>"] == {"id": "<e>", "ids": [9], "tokens": ["<e>"]}
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True}
    made = special._processor(roberta, {"sep": ("</s>", "<e>")}, {"<s>": 0, "<e>": 9})
    assert (made["sep"], made["cls"]) == (["<e>", 9], ["<s>", 0])


# What cannot be built is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [(["eos"], "expected key=token"), (["eos="], "expected key=token"), (["foo=a"], "a key of bos"),
     (["eos=a", "eos=b"], "given twice")],
)  # fmt: skip
def test_overrides_that_make_no_sense_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tokenizers.overridden(words)


def test_a_token_with_an_equals_sign_is_one() -> None:
    assert tokenizers.overridden(["eos=<a=b>"]) == {"eos": "<a=b>"}
    assert tokenizers.listed("") == () and tokenizers.listed("a,b") == ("a", "b")
    with pytest.raises(UsageError, match="empty token"):
        tokenizers.listed("a,,b")


def test_an_unknown_token_is_refused_with_the_nearest(trained: Trained) -> None:
    with pytest.raises(UsageError, match=r"<S> is not in the vocabulary.*Did you mean '<s>'"):
        tokenizers.build(trained("llama"), None, {"eos": "<S>"})


@pytest.mark.parametrize("at", [0.3, 0.9])
def test_a_truncated_model_is_refused(at: float, trained: Trained, tmp_path: Path) -> None:
    data = trained("llama").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[: int(len(data) * at)])
    with pytest.raises(SourceError, match="is not a sentencepiece model"):
        tokenizers.build(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda lines: lines[:-1], None),
        (lambda lines: [*lines[:5], *lines[6:]], "are not 0, 1"),
        (lambda lines: [*lines, b"%%% 12"], "expected base64 and a rank"),
        (lambda lines: lines[:200], "are not 0, 1 and so on, with all 256 bytes"),
    ],
)
def test_damaged_ranks_are_refused(edit: Any, said: str | None, ranks: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(edit(ranks.read_bytes().splitlines())))
    if said is None:
        assert tokenizers.build(tmp_path, "llama3").size == len(ranks.read_bytes().splitlines()) - 1 + 256
        return
    with pytest.raises(SourceError, match=said):
        tokenizers.build(tmp_path / "tokenizer.model", "llama3")


def test_what_a_file_does_not_say_is_asked_for(ranks: Path, gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tokenizer-type says it: llama3, llama3-instruct"):
        tokenizers.build(ranks)
    with pytest.raises(UsageError, match=r"sentencpiece is not known. Did you mean 'sentencepiece'"):
        tokenizers.build(ranks, "sentencpiece")
    (tmp_path / "vocab.json").write_bytes((gpt2 / "vocab.json").read_bytes())
    with pytest.raises(UsageError, match=r"needs merges\.txt beside it"):
        tokenizers.build(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nqq zz\n")
    with pytest.raises(SourceError, match=r"has 'qq zz', which vocab\.json does not"):
        tokenizers.build(tmp_path / "vocab.json")
    with pytest.raises(UsageError, match="there is no such tokenizer"):
        tokenizers.build(tmp_path / "nothing")


def test_a_tokenizer_that_its_library_contradicts_is_refused(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SAMPLES", ("hello world",))
    assert tokenizers.build(trained("llama")).size
    monkeypatch.setattr(pieces, "_normalizers", lambda model, user: [])
    with pytest.raises(SourceError, match=r"gives \[.*\] for 'hello world', its own library \["):
        tokenizers.build(trained("llama"))


def test_models_that_a_tokenizer_json_cannot_say_are_refused(trained: Trained) -> None:
    data = trained("llama").read_bytes()
    # TrainerSpec.treat_whitespace_as_suffix = true, appended: a message is merged with a later one of its number.
    with pytest.raises(SourceError, match="treat_whitespace_as_suffix"):
        pieces.build(data + bytes([0x12, 3, 0xC0, 0x01, 1]), "here", None)
    # TrainerSpec.model_type = WORD
    with pytest.raises(SourceError, match="word or char kind"):
        pieces.build(data + bytes([0x12, 2, 0x18, 3]), "here", None)
