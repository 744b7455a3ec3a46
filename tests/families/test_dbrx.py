"""DBRX: what its messages mean, there and back, what config.json says, what is refused.

Expected values: transformers (logits), through reference_forward, which knows none of ckptconv's tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_forward
import torch

from ckptconv import families
from ckptconv.errors import SourceError
from ckptconv.families.family import NOT_IN_CONFIG
from ckptconv.loaders import hf as hf_loader
from ckptconv.loaders import nxdt as nxdt_loader
from ckptconv.spec import differences
from commands import convert, same, weights_of
from fixtures import config, logits
from inprocess import here

Hf = Callable[..., Path]
IDS = torch.randint(3, 130, (2, 24), generator=torch.Generator().manual_seed(1))


def test_logits(hf: Hf, tmp_path: Path) -> None:
    """Of transformers, from the messages of HF files and from those of NxDT files."""
    source = hf("dbrx", vocab_size=132)
    want = logits(source, IDS)
    found = reference_forward.logits(*reference_forward.messages(hf_loader, source), IDS)
    assert (found - want).abs().max() < 2e-5
    unclipped = hf("dbrx", vocab_size=132, attn_config=config("dbrx")["attn_config"] | {"clip_qkv": 100.0})
    assert (logits(unclipped, IDS) - want).abs().max() > 1e-2
    convert(source, tmp_path / "out", "nxdt", "--tp-size", 2, "--pp-size", 2, "--qkv-linear")
    found = reference_forward.logits(*reference_forward.messages(nxdt_loader, tmp_path / "out"), IDS)
    assert (found - want).abs().max() < 2e-5
    convert(tmp_path / "out", tmp_path / "back", "hf")
    same(weights_of(tmp_path / "back"), weights_of(source))
    assert torch.equal(logits(tmp_path / "back", IDS), want)


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"attn_config": {"kv_n_heads": 4, "rope_theta": 1e6}},
    {"attn_config": {"kv_n_heads": 1, "clip_qkv": 8}, "rope_theta": 20000.0},
])  # fmt: skip
def test_config_there_and_back(changes: dict[str, Any]) -> None:
    family = families.get("dbrx")
    spec = family.spec(config("dbrx") | changes, "config.json")
    assert not differences(family.spec(family.config(spec), "config.json"), spec, NOT_IN_CONFIG)
    assert families.for_spec(spec).name == "dbrx"
    attention = (config("dbrx") | changes)["attn_config"]
    assert spec.rope is not None
    assert spec.rope.theta == attention.get("rope_theta", changes.get("rope_theta"))
    assert spec.qkv_clip == attention.get("clip_qkv")


@pytest.mark.parametrize(("changes", "said"), [
    ({"attn_config": {"kv_n_heads": 2, "clip_qkv": -1}}, "clip_qkv is -1"), ({"attn_config": 3}, "attn_config is 3"),
    ({"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_act_fn"),
    ({"ffn_config": {"moe_normalize_expert_weights": 2}}, "moe_normalize_expert_weights 2"),
])  # fmt: skip
def test_what_config_may_not_say(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        families.get("dbrx").spec(config("dbrx") | changes, "config.json")


def test_megatron_refuses_it(hf: Hf, tmp_path: Path) -> None:
    done = here("--load-dir", hf("dbrx"), "--save-dir", tmp_path / "out", "--saver", "megatron_mcore")
    assert done.returncode == 7
    assert "clipped at 0.5" in done.stderr
    assert "LayerNorm without biases" in done.stderr


def test_nxdt_tensors_of_the_runtime(hf: Hf, tmp_path: Path) -> None:
    """Names and shapes of NxDT's DBRX, experts padded to a multiple; its model never fuses q, k and v."""
    source = hf("dbrx", vocab_size=132)
    convert(source, tmp_path / "out", "nxdt", "--tp-size", 4, "--kv-size-multiplier", 2, "--qkv-linear", "--fuse-qkv",
            "--hw-backend", "trn1", "--i-tp-round-factor", 8)  # fmt: skip
    tensors = torch.load(tmp_path / "out" / "model" / "dp_rank_00_tp_rank_03_pp_rank_00.pt", weights_only=True)
    prefix = "transformer.blocks.2."
    assert {name.removeprefix(prefix): tuple(t.shape) for name, t in tensors.items() if name.startswith(prefix)} == {
        "norm_attn_norm.attn.qkv_proj.weight_q": (12, 48), "norm_attn_norm.attn.qkv_proj.weight_k": (12, 48),
        "norm_attn_norm.attn.qkv_proj.weight_v": (12, 48), "norm_attn_norm.attn.o_proj.weight": (48, 12),
        "norm_attn_norm.norm_1.weight": (48,), "norm_attn_norm.norm_2.weight": (48,),
        "ffn.router.linear_router.weight": (4, 48), "ffn.expert_mlps.mlp_op.gate_up_proj.weight": (4, 48, 32),
        "ffn.expert_mlps.mlp_op.down_proj.weight": (4, 16, 48),
    }  # fmt: skip
    w = {name: weights_of(source)[prefix + f"ffn.experts.mlp.{name}"].view(4, 40, 48) for name in ("w1", "v1", "w2")}
    up, down = (tensors[prefix + f"ffn.expert_mlps.mlp_op.{name}_proj.weight"] for name in ("gate_up", "down"))
    for part, name in ((up[..., :10], "w1"), (up[..., 16:26], "v1")):
        assert torch.equal(part, w[name][:, 30:].transpose(1, 2))
    assert torch.equal(down[:, :10], w["w2"][:, 30:])
    assert not up[..., 10:16].any() and not up[..., 26:].any() and not down[:, 10:].any()
    convert(tmp_path / "out", tmp_path / "back", "hf")
    same(weights_of(tmp_path / "back"), weights_of(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["attn_config"] == config("dbrx")["attn_config"]
