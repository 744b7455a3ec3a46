"""Mixtral, Qwen MoE, DeepSeek, Kimi-K2 and GLM-4.5: layouts, names, settings and rotary orders of their own.

Expected values: transformers' reading and formulas, released config.json files, layouts put together by hand.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptconv import families, lazy, ops
from ckptconv.errors import SourceError
from ckptconv.families import FAMILIES, moe
from ckptconv.lazy import Literal
from ckptconv.messages import expected
from ckptconv.spec import MoE
from commands import Weights, convert, run, same, weights_of
from fixtures import config, logits
from fixtures_moe import FIXTURES
from samples import SPECS, held

Hf = Callable[..., Path]

IDS = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
WITH_EXPERTS = tuple(name for name, data in FIXTURES.items() if data["model_type"] != "qwen3")


def changed(source: Path, out: Path, weights: Weights | None = None, **said: Any) -> Path:
    """A copy of a checkpoint with other weights or other settings; a setting that is ... is left out."""
    out.mkdir()
    save_file(weights_of(source) if weights is None else weights, out / "model.safetensors", {"format": "pt"})
    data = json.loads((source / "config.json").read_text()) | said
    (out / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return out


# There and back


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "flags"),
    [
        (1, 2, 2, ("--saver-transformer-impl", "local", "--mtp-module", "transformer_layer")),
        (2, 1, 2, ("--saver-transformer-impl", "transformer_engine")),
        (2, 1, 2, ("--saver-transformer-impl", "transformer_engine", "--moe-grouped-gemm")),
        (4, 1, 1, ("--saver-transformer-impl", "transformer_engine", "--moe-grouped-gemm")),
    ],
)
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_through_megatron(
    hf: Hf, tmp_path: Path, name: str, tp: int, pp: int, ep: int, flags: tuple[str, ...]
) -> None:
    """In bfloat16, in which the correction of scores stays fp32."""
    source = hf(name, dtype="bfloat16")
    layout = ("--target-tp", tp, "--target-pp", pp, "--target-ep", ep)
    there = convert(source, tmp_path / "there", "megatron_mcore", *layout, *flags)
    same(weights_of(convert(there, tmp_path / "back")), weights_of(source))


#: Megatron needs biases in the MLP beside those of this model's attention; that they are filling only our note says.
FILLED = ("qwen3_tied",)


@pytest.mark.parametrize("name", [name for name in FIXTURES if name not in FILLED])
def test_megatron_args_alone_say_the_model(hf: Hf, tmp_path: Path, name: str) -> None:
    """A checkpoint without anything of ours beside the rank files, as the trainer writes it, is the same model."""
    there = convert(hf(name, tokenizer=False), tmp_path / "there", "megatron_mcore", "--target-tp", 2)
    shutil.rmtree(there / "hf")
    (there / "iter_0000001" / "ckptconv.json").unlink()
    back = convert(there, tmp_path / "back", "hf")
    assert torch.allclose(logits(back, IDS), logits(hf(name), IDS), atol=2e-5)


@pytest.mark.parametrize("saver", ["hf", "megatron_mcore"])
def test_dtype_leaves_the_correction_of_scores_in_fp32(hf: Hf, tmp_path: Path, saver: str) -> None:
    """In bfloat16 it would choose other experts; Megatron and transformers both hold it in fp32."""
    source = hf("deepseek_v3_mtp")
    out = convert(source, tmp_path / "out", saver, "--dtype", "bf16")
    if saver == "megatron_mcore":
        out = convert(out, tmp_path / "back")
    same(weights_of(out), {
        name: tensor if name.endswith("correction_bias") else tensor.bfloat16()
        for name, tensor in weights_of(source).items()
    })  # fmt: skip


# Names


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_fused_as_transformers_5_holds_them(hf: Hf, tmp_path: Path, name: str) -> None:
    """What it saves with save_original_format=False is read like the usual names, which are written."""
    from fixtures import load

    source = hf(name)
    load(source).save_pretrained(tmp_path / "fused", save_original_format=False)
    (tmp_path / "fused" / "config.json").write_bytes((source / "config.json").read_bytes())
    fused = weights_of(tmp_path / "fused")
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in fused)
    layers = f"model.layers.{config(name)['num_hidden_layers']}."
    plain = {key: value for key, value in weights_of(source).items() if not key.startswith(layers)}
    same(weights_of(convert(tmp_path / "fused", tmp_path / "out")), plain)


def test_qwen3_moe_of_transformers_5_is_read_by_4(hf: Hf, tmp_path: Path) -> None:
    """Version 4 knows `num_experts` only."""
    back = convert(hf("qwen3_moe_v5"), tmp_path / "out")
    assert json.loads((back / "config.json").read_text())["num_experts"] == 6


def test_kimi_has_its_own_loader(hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(hf("kimi_k2"), tmp_path / "out", "hf", "--loader", "hf_deepseek_v3") == 3
    assert "hf_kimi_k2" in capsys.readouterr().err
    assert run(hf("kimi_k2"), tmp_path / "out", "hf", "--loader", "hf_kimi_k2") == 0


# Rotary rows


def paired(rows: torch.Tensor, plain: int, p: int) -> torch.Tensor:
    """Rows [blocks * (plain + p), h] with the last p of every block from halves to pairs."""
    order = torch.arange(p).view(2, p // 2).T.reshape(-1)
    blocks = rows.view(-1, plain + p, rows.shape[-1])
    return torch.cat([blocks[:, :plain], blocks[:, plain:][:, order]], 1).reshape(rows.shape)


@pytest.mark.parametrize("lora", [22, None])
def test_halves_are_pairs_in_megatron(hf: Hf, tmp_path: Path, lora: int | None) -> None:
    """`rope_interleave` false is undone on the way to Megatron, which only knows pairs, and done again on the way back.

    The logits of both are compared by tests/oracle; here every row by hand.
    """
    source = hf("deepseek_v3_halves", q_lora_rank=lora)
    there = convert(source, tmp_path / "there", "megatron_mcore", "--saver-transformer-impl", "local")
    found = torch.load(there / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    stored, c = weights_of(source), config("deepseek_v3_halves")
    n, p, latent = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"]
    ours, theirs = ("q_b_proj", "linear_q_up_proj") if lora else ("q_proj", "linear_q_proj")
    for i in range(c["num_hidden_layers"]):
        a, b = f"model.layers.{i}.self_attn.", f"decoder.layers.{i}.self_attention."
        assert torch.equal(found[f"{b}{theirs}.weight"], paired(stored[f"{a}{ours}.weight"], n, p))
        down = stored[f"{a}kv_a_proj_with_mqa.weight"]
        assert torch.equal(found[f"{b}linear_kv_down_proj.weight"], paired(down, latent, p))
    same(weights_of(convert(there, tmp_path / "back")), stored)


def test_the_same_halves_written_as_pairs_are_the_same_model(hf: Hf, tmp_path: Path) -> None:
    """Without our note Megatron's pairs stay pairs, and config.json says so."""
    there = convert(hf("deepseek_v3_halves", tokenizer=False), tmp_path / "there", "megatron_mcore")
    shutil.rmtree(there / "hf")
    (there / "iter_0000001" / "ckptconv.json").unlink()
    back = convert(there, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["rope_interleave"] is True
    assert torch.allclose(logits(back, IDS), logits(hf("deepseek_v3_halves"), IDS), atol=1e-5)


def test_rows_of_a_half_by_hand() -> None:
    spec = SPECS["deepseek_v3_halves"]
    assert spec.mla is not None
    n, p = spec.mla.qk_head_dim, spec.mla.qk_rope_head_dim
    rows = torch.arange(spec.num_attention_heads * (n + p), dtype=torch.float32)[:, None]
    (whole,) = ops.fuse(ops.LatentHalves(), [held(rows)], [tuple(rows.shape)], spec)
    first = lazy.to_torch(whole)[: n + p, 0].tolist()
    assert first == [*range(n), n, n + 3, n + 1, n + 4, n + 2, n + 5]  # p is 6


# Multi-token prediction


def test_mtp_layers_in_the_config_only(hf: Hf, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers leaves them out when it saves a model, and their number in config.json."""
    source = hf("deepseek_v3_mtp")
    kept = {key: value for key, value in weights_of(source).items() if not key.startswith("model.layers.4.")}
    back = convert(changed(source, tmp_path / "in", kept), tmp_path / "out")
    same(weights_of(back), kept)
    assert json.loads((back / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_in_an_mtp_layer_that_differs_is_not_lost(
    hf: Hf, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of(hf("glm4_moe_mtp"))
    weights[f"model.layers.4.{name}"] = weights[f"model.layers.4.{name}"] + 1
    source = changed(hf("glm4_moe_mtp"), tmp_path / "in", weights)
    assert run(source, tmp_path / "out", "megatron_mcore") == 3
    assert f"model.layers.4.{name} differs" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["mtp_model_layer", "transformer_layer"])
def test_both_names_of_the_layer_in_an_mtp_layer(hf: Hf, tmp_path: Path, module: str) -> None:
    flags = ("--mtp-module", module, "--saver-transformer-impl", "local")
    there = convert(hf("deepseek_v3_mtp"), tmp_path / "there", "megatron_mcore", *flags)
    found = torch.load(there / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    inner = {name.split(".")[3] for name in found if name.startswith("mtp.layers.0.")}
    assert inner == {"enorm", "hnorm", "eh_proj", "final_layernorm", module}


# Which layers have experts


@pytest.mark.parametrize(
    "layers", [(1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 0, 0)]
)
def test_dense_layers_in_the_words_of_deepseek(layers: tuple[int, ...]) -> None:
    spec = SPECS["deepseek_v3"]
    said = moe.dense_first_config(spec.replace(moe=MoE(6, 2, 20, layers))) | {"num_hidden_layers": 4}
    found = moe.dense_first(said, "", 3)
    # One dense stretch in front, or every nth layer: (0, 1, 0, 1) would have to begin at a multiple of its step.
    assert found == layers or layers == (0, 1, 0, 1)


@pytest.mark.parametrize("layers", [(1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 0, 0)])
def test_dense_layers_in_the_words_of_qwen(layers: tuple[int, ...]) -> None:
    spec = SPECS["qwen2_moe"]
    said = moe.sparse_config(spec.replace(moe=MoE(6, 2, 20, layers))) | {"num_hidden_layers": 4}
    assert moe.sparse(said, "") == layers


def test_a_pattern_that_a_family_cannot_say_is_refused() -> None:
    spec = SPECS["deepseek_v3"]
    assert spec.moe is not None
    odd = spec.replace(moe=MoE(**{**vars(spec.moe), "layers": (1, 0, 1, 1)}))
    assert any("moe" in reason for reason in FAMILIES["deepseek_v3"].refusals(odd))
    assert FAMILIES["glm4_moe_lite"].refusals(odd.replace(family="glm4_moe_lite")) == []


# Settings


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"topk_method": "group_limited_greedy"}, "topk_method"),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("deepseek_v3", {"first_k_dense_replace": "one"}, "first_k_dense_replace"),
        ("deepseek_v3", {"num_experts_per_tok": 99}, "top 99 of 12 experts"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "dnese", "sparse", "sparse"]}, "mlp_layer_types"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "one for each of 4 layers"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen2_moe", {"mlp_only_layers": 3}, "mlp_only_layers"),
        ("mixtral", {"num_local_experts": 0}, "num_experts"),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], message: str) -> None:
    data = config(name) | changes
    with pytest.raises(SourceError, match=message):
        families.of_config(data, "config.json").spec(data, "config.json")


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"topk_method": "greedy"}, (None, None, "max")),
        ({"topk_method": ...}, (None, None, "max")),
        ({"topk_method": "group_limited_greedy"}, (3, 2, "max")),
        ({"topk_method": "group_limited_greedy", "n_group": 1}, (None, None, "max")),
    ],
)
def test_groups_of_deepseek_v2(changes: dict[str, Any], groups: tuple[Any, ...]) -> None:
    data = {key: value for key, value in (config("deepseek_v2") | changes).items() if value is not ...}
    found = FAMILIES["deepseek_v2"].spec(data, "").moe
    assert found is not None
    assert (found.num_groups, found.topk_groups, found.group_score) == groups


def test_shared_experts_are_absent_or_as_the_class_has_them() -> None:
    data = config("deepseek_v3")
    read = FAMILIES["deepseek_v3"].spec
    assert read(data | {"n_shared_experts": None}, "").moe.shared_ffn_hidden_size is None  # type: ignore[union-attr]
    del data["n_shared_experts"]
    assert read(data, "").moe.shared_ffn_hidden_size == 20  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("mixtral", {"num_experts": 8, "topk": 2, "normalize": True, "score": "softmax", "layers": (1,) * 8}),
        ("qwen2_moe", {"num_experts": 60, "topk": 4, "ffn_hidden_size": 1408, "shared_ffn_hidden_size": 5632,
                       "shared_gate": True, "normalize": False}),
        ("qwen3_moe", {"num_experts": 128, "topk": 8, "ffn_hidden_size": 768, "shared_ffn_hidden_size": None,
                       "normalize": False}),
        ("deepseek_v3", {"num_experts": 256, "topk": 8, "ffn_hidden_size": 2048, "shared_ffn_hidden_size": 2048,
                         "layers": (0, 0, 0, 1, 1, 1, 1, 1), "score": "sigmoid", "score_bias": True,
                         "num_groups": 8, "topk_groups": 4, "group_score": "top2", "scaling_factor": 2.5}),
        ("glm4_moe", {"num_experts": 128, "topk": 8, "layers": (0, 1, 1, 1, 1, 1, 1, 1), "num_groups": None,
                      "scaling_factor": 1.0, "shared_ffn_hidden_size": 1408, "score": "sigmoid"}),
        ("glm4_moe_lite", {"num_experts": 64, "topk": 4, "layers": (0, 1, 1, 1, 1, 1, 1, 1),
                           "scaling_factor": 1.8, "shared_ffn_hidden_size": 1536}),
    ],
)  # fmt: skip
def test_class_defaults_by_hand(kind: str, wanted: dict[str, Any]) -> None:
    data = {"model_type": kind, "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 96,
            "num_attention_heads": 16, "vocab_size": 131}  # fmt: skip
    found = FAMILIES[kind].spec(data, "").moe
    assert {key: getattr(found, key) for key in wanted} == wanted


# Legacy GroupedMLP


def test_grouped_weights_by_hand() -> None:
    """What `GroupedMLP.forward` multiplies by expert e is [h, c] from element e * h * c on. See also tests/oracle."""
    from ckptconv.formats import mcore

    h, c, experts = 3, 4, 2
    first = torch.arange(h * c * experts, dtype=torch.float32)
    weight1, weight2 = first.view(h, experts * c), first.view(experts * c, h)

    def unpacked(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        stored = FileLike(lazy.as_numpy(tensor).tobytes(), "float32", tuple(tensor.shape))
        return {key: lazy.to_torch(value) for key, value in mcore.unpacked(name, stored, experts, "f").items()}

    ones = unpacked("decoder.layers.0.mlp.experts.weight1", weight1)
    twos = unpacked("mtp.layers.0.transformer_layer.mlp.experts.weight2", weight2)
    prefix = "mlp.experts.local_experts."
    for e in range(experts):
        block = first[e * h * c : (e + 1) * h * c]
        assert torch.equal(ones[f"decoder.layers.0.{prefix}{e}.linear_fc1.weight"], block.view(h, c).T)
        name = f"mtp.layers.0.transformer_layer.{prefix}{e}.linear_fc2.weight"
        assert torch.equal(twos[name], block.view(c, h).T)
    with pytest.raises(SourceError, match="expected two axes that divide into 3 experts"):
        mcore.unpacked("a.mlp.experts.weight1", Literal(b"", "float32", (3, 8)), 3, "f")


class FileLike(Literal):
    """A tensor that can be seen in another shape, as those in files can."""

    def seen(self, shape: lazy.Shape) -> Literal:
        return Literal(self.data, self.dtype, shape)


def test_every_message_of_an_mtp_layer_has_rows() -> None:
    for name in ("deepseek_v3_mtp", "glm4_moe_mtp"):
        spec = SPECS[name]
        further = [message for message in expected(spec) if message.template.startswith("mtp")]
        assert len(further) == 1
        stored = [n for row in FAMILIES[spec.family].rows_of(further[0], spec) for n in row.stored(4, spec)]
        assert all(n.startswith("model.layers.4.") for n in stored)
