"""Models with experts, multi-latent attention and multi-token prediction: there and back, by hand, and damaged.

The sources are written here, with every name and shape spelt out: 6 experts, so that 2 and 3 expert ranks divide them.
Expected values: the names of megatron.md 3.2 to 3.5, and slices of the source's tensors put together by hand.
"""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptconv import families
from ckptconv.families.family import NOT_IN_CONFIG
from ckptconv.messages import expected
from ckptconv.spec import differences
from inprocess import main

Weights = dict[str, torch.Tensor]
Made = Callable[..., Path]

ITERATION, FILE, PROVENANCE = "iter_0000001", "model_optim_rng.pt", "ckptconv.json"
V, H, F, M, E, A, G, D = 131, 48, 88, 24, 6, 4, 2, 12

BASE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": F, "num_hidden_layers": 4, "num_attention_heads": A,
    "hidden_act": "silu", "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": BASE
    | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_key_value_heads": G,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": E, "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    # Layer 0 is dense; one shared expert; experts are chosen from the 2 best of 3 groups; one MTP layer.
    "deepseek_v3": BASE
    | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": A,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 12, "n_routed_experts": E, "num_experts_per_tok": 4,
        "moe_intermediate_size": M, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "n_group": 3, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "attention_bias": False,
    },
}  # fmt: skip


def mixtral() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H)}
    for i in range(4):
        layer = f"model.layers.{i}."
        found |= {
            layer + "input_layernorm.weight": (H,), layer + "post_attention_layernorm.weight": (H,),
            layer + "self_attn.q_proj.weight": (A * D, H), layer + "self_attn.k_proj.weight": (G * D, H),
            layer + "self_attn.v_proj.weight": (G * D, H), layer + "self_attn.o_proj.weight": (H, A * D),
            layer + "block_sparse_moe.gate.weight": (E, H),
        }  # fmt: skip
        for e in range(E):
            expert = layer + f"block_sparse_moe.experts.{e}."
            found |= {expert + "w1.weight": (F, H), expert + "w3.weight": (F, H), expert + "w2.weight": (H, F)}
    return found | {"model.norm.weight": (H,), "lm_head.weight": (V, H)}


def deepseek() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H)}
    for i in range(5):
        layer = f"model.layers.{i}."
        found |= {
            layer + "input_layernorm.weight": (H,), layer + "post_attention_layernorm.weight": (H,),
            layer + "self_attn.q_a_proj.weight": (24, H), layer + "self_attn.q_a_layernorm.weight": (24,),
            layer + "self_attn.q_b_proj.weight": (A * 12, 24), layer + "self_attn.kv_a_proj_with_mqa.weight": (20, H),
            layer + "self_attn.kv_a_layernorm.weight": (16,), layer + "self_attn.kv_b_proj.weight": (A * 20, 16),
            layer + "self_attn.o_proj.weight": (H, A * 12),
        }  # fmt: skip
        wide = {"": F} if i == 0 else {"shared_experts.": M} | {f"experts.{e}.": M for e in range(E)}
        for part, width in wide.items():
            mlp = layer + "mlp." + part
            found |= {mlp + "gate_proj.weight": (width, H), mlp + "up_proj.weight": (width, H),
                      mlp + "down_proj.weight": (H, width)}  # fmt: skip
        if i:
            found |= {layer + "mlp.gate.weight": (E, H), layer + "mlp.gate.e_score_correction_bias": (E,)}
    mtp = "model.layers.4."
    found |= {
        mtp + "enorm.weight": (H,), mtp + "hnorm.weight": (H,), mtp + "eh_proj.weight": (H, 2 * H),
        mtp + "shared_head.norm.weight": (H,), mtp + "embed_tokens.weight": (V, H),
        mtp + "shared_head.head.weight": (V, H),
    }  # fmt: skip
    return found | {"model.norm.weight": (H,), "lm_head.weight": (V, H)}


def weights(name: str) -> Weights:
    shapes = mixtral() if name == "mixtral" else deepseek()
    found = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {key}".encode()))
        found[key] = torch.randn(shape, generator=generator)
    if name == "deepseek_v3":
        found["model.layers.4.embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
        found["model.layers.4.shared_head.head.weight"] = found["lm_head.weight"].clone()
    return found


def write(folder: Path, tensors: Weights, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`hf(name)`: a Hugging Face directory, written once. Do not change it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write(tmp_path_factory.mktemp("hf") / name, weights(name), CONFIGS[name])
        return made[name]

    return get


def convert(source: Path, out: Path, saver: str, *flags: object) -> int:
    return main(["--saver", saver, "--load-dir", str(source), "--save-dir", str(out), *map(str, flags)])


def layout(tp: int, pp: int, ep: int, impl: str, grouped: bool = False) -> tuple[object, ...]:
    flags = ("--target-tp", tp, "--target-pp", pp, "--target-ep", ep, "--saver-transformer-impl", impl)
    return (*flags, "--moe-grouped-gemm") if grouped else flags


@pytest.fixture(scope="module")
def direct(hf: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`direct(name, tp, pp, ep, impl, grouped)`: converted in one step, once. Do not change it."""
    made: dict[Any, Path] = {}

    def get(name: str, tp: int, pp: int, ep: int, impl: str = "local", grouped: bool = False) -> Path:
        key = (name, tp, pp, ep, impl, grouped)
        if key not in made:
            out = tmp_path_factory.mktemp("direct") / "out"
            assert convert(hf(name), out, "megatron_mcore", *layout(tp, pp, ep, impl, grouped), "--verify") == 0
            made[key] = out
        return made[key]

    return get


@pytest.fixture
def damaged(direct: Made, tmp_path: Path) -> Made:
    """`damaged(name, ...)`: a copy to change, without our notes."""

    def get(*args: Any) -> Path:
        shutil.copytree(direct(*args), tmp_path / "in")
        (tmp_path / "in" / ITERATION / PROVENANCE).unlink()
        return tmp_path / "in"

    return get


def ranks(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: torch.load(path, weights_only=False) for path in sorted(folder.rglob(FILE))}


def stored(folder: Path) -> Weights:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(found: Weights, wanted: Weights) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    root = torch.load(path, weights_only=False)
    change(root)
    torch.save(root, path)


def arguments(folder: Path, **changes: Any) -> None:
    for path in folder.rglob(FILE):
        edit(path, lambda root: vars(root["args"]).update(changes))


# There and back

NAMES = list(CONFIGS)
DIALECTS = [("local", False), ("transformer_engine", False), ("transformer_engine", True), ("local", True)]


@pytest.mark.parametrize(("impl", "grouped"), DIALECTS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(
    hf: Made, direct: Made, tmp_path: Path, name: str, sizes: tuple[int, int, int], impl: str, grouped: bool
) -> None:
    tp, pp, ep = sizes
    there = direct(name, *sizes, impl, grouped)
    assert len(ranks(there)) == tp * pp * ep
    assert convert(there, tmp_path / "back", "hf", "--verify") == 0
    same(stored(tmp_path / "back"), weights(name))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (hf(name), tmp_path / "back"))
    assert {key: after[key] for key in before} == before
    family = families.of_config(before, "")
    assert family.spec(after, "") == family.spec(before, "")


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_without_our_notes_and_without_the_config(damaged: Made, tmp_path: Path, name: str) -> None:
    """Everything follows from Megatron's own args and tensors; the family is one that can say this model."""
    source = damaged(name, 2, 2, 2)
    shutil.rmtree(source / "hf")
    assert convert(source, tmp_path / "back", "hf") == 0
    same(stored(tmp_path / "back"), weights(name))
    spec = families.of_config(CONFIGS[name], "").spec(CONFIGS[name], "")
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert differences(families.of_config(after, "").spec(after, ""), spec, NOT_IN_CONFIG) == []


@pytest.mark.parametrize("name", NAMES)
def test_from_hugging_face_to_hugging_face(hf: Made, tmp_path: Path, name: str) -> None:
    assert convert(hf(name), tmp_path / "out", "hf", "--verify", "--max-shard-size", "60KB") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    same(stored(tmp_path / "out"), weights(name))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((2, 2, 2, "local"), (1, 1, 3, "transformer_engine", True)),
        ((1, 1, 3, "transformer_engine", True), (2, 2, 2, "local")),
        ((1, 1, 1, "local"), (4, 1, 6, "local")),
        ((1, 4, 2, "local"), (1, 4, 1, "local")),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_layout_equals_the_direct_conversion(
    direct: Made, tmp_path: Path, name: str, source: tuple[Any, ...], target: tuple[Any, ...]
) -> None:
    assert convert(direct(name, *source), tmp_path / "out", "megatron_mcore", *layout(*target)) == 0
    found, wanted = ranks(tmp_path / "out"), ranks(direct(name, *target))
    assert sorted(found) == sorted(wanted)
    for rank, root in wanted.items():
        same(found[rank]["model"], root["model"])
        assert found[rank]["args"] == root["args"] or vars(found[rank]["args"]) | {"tokenizer_model": None} == vars(
            root["args"]
        ) | {"tokenizer_model": None}


def test_the_target_has_the_sizes_of_the_source_by_default(direct: Made, tmp_path: Path) -> None:
    assert convert(direct("mixtral", 2, 2, 2), tmp_path / "out", "megatron_mcore") == 0
    assert sorted(ranks(tmp_path / "out")) == sorted(ranks(direct("mixtral", 2, 2, 2)))


# By hand


def test_what_each_rank_of_mixtral_holds(direct: Made) -> None:
    """Tensor rank t, stage p, expert rank r: experts 3r to 3r + 2, numbered from 0; [W_t; V_t]; columns of w2."""
    source = weights("mixtral")
    found = ranks(direct("mixtral", 2, 2, 2))
    grid = list(itertools.product(range(2), repeat=3))
    assert sorted(found) == [f"mp_rank_{t:02d}_{p:03d}_{r:03d}" for t, p, r in grid]
    for t, p, r in grid:
        model = found[f"mp_rank_{t:02d}_{p:03d}_{r:03d}"]["model"]
        for local in range(2):
            theirs = f"model.layers.{2 * p + local}.block_sparse_moe."
            ours = f"decoder.layers.{local}.mlp."
            assert torch.equal(model[ours + "router.weight"], source[theirs + "gate.weight"])
            for e in range(3):
                w1, w2, w3 = (source[f"{theirs}experts.{3 * r + e}.w{n}.weight"] for n in (1, 2, 3))
                rows = slice(44 * t, 44 * (t + 1))
                fc1, fc2 = (model[f"{ours}experts.local_experts.{e}.linear_fc{n}.weight"] for n in (1, 2))
                assert torch.equal(fc1, torch.cat([w1[rows], w3[rows]]))
                assert torch.equal(fc2, w2[:, rows])
            assert not any(name.startswith(ours + "linear") or "local_experts.3" in name for name in model)


@pytest.mark.parametrize(
    ("impl", "fc1", "norm"),
    [("transformer_engine", "experts.linear_fc1.weight{e}", "pre_mlp_layernorm.weight"),
     ("local", "experts.linear_fc1.weight{e}", "pre_mlp_layernorm.weight")],
)  # fmt: skip
def test_grouped_experts_are_named_as_one_module(direct: Made, impl: str, fc1: str, norm: str) -> None:
    source = weights("mixtral")
    for r in range(3):
        model = ranks(direct("mixtral", 1, 1, 3, impl, True))[f"mp_rank_00_{r:03d}"]["model"]
        for e in range(2):
            w1, w3 = (source[f"model.layers.1.block_sparse_moe.experts.{2 * r + e}.w{n}.weight"] for n in (1, 3))
            assert torch.equal(model["decoder.layers.1.mlp." + fc1.format(e=e)], torch.cat([w1, w3]))
        # In a layer with experts the norm before the MLP stands alone in both implementations.
        assert torch.equal(model["decoder.layers.1." + norm], source["model.layers.1.post_attention_layernorm.weight"])


def test_what_the_last_stage_of_deepseek_holds(direct: Made) -> None:
    source = weights("deepseek_v3")
    model = ranks(direct("deepseek_v3", 2, 2, 2))["mp_rank_01_001_001"]["model"]
    layer, theirs = "mtp.layers.0.mtp_model_layer.", "model.layers.4."
    down = source[theirs + "mlp.experts.5.down_proj.weight"]
    embedding = torch.cat([source["model.embed_tokens.weight"], torch.zeros(256 - V, H)])
    rank_1 = {
        "mtp.layers.0.enorm.weight": source[theirs + "enorm.weight"],
        "mtp.layers.0.hnorm.weight": source[theirs + "hnorm.weight"],
        "mtp.layers.0.eh_proj.weight": source[theirs + "eh_proj.weight"][24:],
        "mtp.layers.0.final_layernorm.weight": source[theirs + "shared_head.norm.weight"],
        layer + "self_attention.linear_q_down_proj.weight": source[theirs + "self_attn.q_a_proj.weight"][12:],
        layer + "self_attention.linear_q_up_proj.weight": source[theirs + "self_attn.q_b_proj.weight"][24:],
        layer + "self_attention.linear_kv_up_proj.weight": source[theirs + "self_attn.kv_b_proj.weight"][40:],
        layer + "self_attention.linear_proj.weight": source[theirs + "self_attn.o_proj.weight"][:, 24:],
        layer + "mlp.router.expert_bias": source[theirs + "mlp.gate.e_score_correction_bias"],
        layer + "mlp.experts.local_experts.2.linear_fc2.weight": down[:, 12:],
        layer + "mlp.shared_experts.linear_fc1.weight": torch.cat(
            [source[theirs + f"mlp.shared_experts.{x}_proj.weight"][12:] for x in ("gate", "up")]
        ),
        "embedding.word_embeddings.weight": embedding[128:],
        "decoder.final_layernorm.weight": source["model.norm.weight"],
    }
    for name, tensor in rank_1.items():
        assert torch.equal(model[name], tensor), name
    first = ranks(direct("deepseek_v3", 2, 2, 2))["mp_rank_00_000_000"]["model"]
    assert not any(name.startswith("mtp.") for name in first)
    assert "decoder.layers.0.mlp.linear_fc1.weight" in first
    assert "decoder.layers.0.mlp.router.weight" not in first
    assert "decoder.layers.1.mlp.router.weight" in first


def test_the_args_say_experts_latents_and_predictions(direct: Made) -> None:
    args = ranks(direct("deepseek_v3", 2, 2, 2))["mp_rank_00_000_000"]["args"]
    wanted = {
        "num_experts": 6, "moe_router_topk": 4, "moe_ffn_hidden_size": M, "moe_layer_freq": [0, 1, 1, 1],
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5, "moe_router_num_groups": 3, "moe_router_group_topk": 2,
        "moe_shared_expert_intermediate_size": M, "multi_latent_attention": True, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 12, "mtp_num_layers": 1,
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2, "moe_grouped_gemm": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted


# Names of ranks


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((1, 1, 3), [f"mp_rank_00_{r:03d}" for r in range(3)]),
        ((2, 1, 2), [f"mp_rank_{t:02d}_{r:03d}" for t in range(2) for r in range(2)]),
        ((1, 2, 2), [f"mp_rank_00_{p:03d}_{r:03d}" for p in range(2) for r in range(2)]),
        ((1, 4, 1), [f"mp_rank_00_{p:03d}" for p in range(4)]),
    ],
    ids=str,
)
def test_rank_directories(direct: Made, tmp_path: Path, sizes: tuple[int, int, int], names: list[str]) -> None:
    """get_checkpoint_name: a number for stages and one for expert ranks, where there are several."""
    assert sorted(ranks(direct("mixtral", *sizes))) == names
    assert convert(direct("mixtral", *sizes), tmp_path / "back", "hf") == 0
    same(stored(tmp_path / "back"), weights("mixtral"))


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / ITERATION / name)

    return change


def said(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: arguments(folder, **changes)


def lone(folder: Path) -> None:
    """Expert ranks whose directories have one number, as if there were no stages."""
    for r in range(2):
        shutil.rmtree(folder / ITERATION / f"mp_rank_00_001_{r:03d}")
        (folder / ITERATION / f"mp_rank_00_000_{r:03d}").rename(folder / ITERATION / f"mp_rank_00_{r:03d}")


@pytest.mark.parametrize(
    ("sizes", "damage", "code", "messages"),
    [
        ((1, 2, 2), without("mp_rank_00_001_001"), 3, ("lacks mp_rank_00_001_001 of 1 x 2 x 2 ranks",)),
        ((1, 2, 2), without("mp_rank_00_000_001", "mp_rank_00_001_001"), 3, ("lacks mp_rank_00_00", "of 1 x 2 x 2")),
        ((1, 2, 2), without("mp_rank_00_001_000", "mp_rank_00_001_001"), 3, ("lacks mp_rank_00_001", "of 1 x 2 x 2")),
        ((1, 2, 2), lone, 3, ("2 pipeline stages and expert parallel size 2", "one number for both")),
        ((1, 1, 3), without("mp_rank_00_002"), 3, ("lacks mp_rank_00_002 of 1 x 1 x 3 ranks",)),
        ((1, 2, 2), said(expert_model_parallel_size=1), 3, ("expert parallel size 1, but there are directories of 2",)),
        ((1, 2, 2), said(expert_model_parallel_size=3), 3, ("lacks mp_rank_00_000_002", "of 1 x 2 x 3")),
        ((1, 2, 2), said(pipeline_model_parallel_size=1), 3, ("1 pipeline stages, but there are directories of 2",)),
        ((1, 1, 3), said(expert_model_parallel_size=1, pipeline_model_parallel_size=3), 3, ("4 layers", "4 + 4 + 4")),
        ((1, 1, 3), said(num_experts=7), 6, ("ep 3 does not divide 7 experts",)),
        ((1, 1, 3), said(num_experts=9), 3, ("lacks decoder.layers.{0..3}.mlp.experts.local_experts.2",)),
        ((1, 1, 3), said(num_experts=3), 3, ("which no rule knows", "local_experts.1")),
        ((1, 1, 3), said(num_experts=None), 6, ("no experts",)),
        ((1, 2, 2), said(expert_tensor_parallel_size=2), 3, ("expert_tensor_parallel_size 2", "tensor_model_parallel")),
    ],
)
def test_ranks_that_are_missing_or_not_what_the_args_say(
    damaged: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: tuple[int, int, int],
    damage: Callable[[Path], None], code: int, messages: tuple[str, ...],
) -> None:  # fmt: skip
    source = damaged("mixtral", *sizes)
    damage(source)
    assert convert(source, tmp_path / "out", "hf") == code
    found = capsys.readouterr().err
    assert all(message in found for message in messages), found
    assert not (tmp_path / "out").exists()


# Replicas


ROUTER, QKV = "decoder.layers.1.mlp.router.weight", "decoder.layers.1.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "rank", "other"),
    [
        # Held by every rank.
        ("mixtral", ROUTER, "mp_rank_01_001_001", "mp_rank_00_001_000"),
        ("mixtral", "decoder.layers.0.input_layernorm.weight", "mp_rank_00_000_001", "mp_rank_00_000_000"),
        # Cut over tensor ranks, but the same on all expert ranks.
        ("mixtral", QKV, "mp_rank_01_001_001", "mp_rank_01_001_000"),
        ("mixtral", "embedding.word_embeddings.weight", "mp_rank_01_000_001", "mp_rank_01_000_000"),
        ("deepseek_v3", "mtp.layers.0.eh_proj.weight", "mp_rank_00_001_001", "mp_rank_00_001_000"),
        ("deepseek_v3", "decoder.layers.1.mlp.shared_experts.linear_fc2.weight", "mp_rank_01_000_001",
         "mp_rank_01_000_000"),
    ],
)  # fmt: skip
def test_a_replica_that_differs_is_named(
    damaged: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, tensor: str, rank: str, other: str
) -> None:
    source = damaged(name, 2, 2, 2)
    edit(source / ITERATION / rank / FILE, lambda root: root["model"][tensor].view(-1)[3:4].fill_(9))
    assert convert(source, tmp_path / "out", "hf") == 3
    found = capsys.readouterr().err
    assert f"{rank}/{FILE}: {tensor} differs from that in {other}" in found
    assert "both ranks must hold the same" in found
    assert not (tmp_path / "out").exists()


def test_experts_differ_from_rank_to_rank(damaged: Made, tmp_path: Path) -> None:
    """The same name on two expert ranks is two experts: a change is seen in the right one."""
    source = damaged("mixtral", 2, 2, 2)
    edit(source / ITERATION / "mp_rank_01_001_001" / FILE, lambda root: root["model"][FC1][5].fill_(9))
    assert convert(source, tmp_path / "out", "hf") == 0
    wanted = weights("mixtral")
    wanted["model.layers.3.block_sparse_moe.experts.4.w1.weight"][44 + 5] = 9
    same(stored(tmp_path / "out"), wanted)


def test_the_embedding_of_the_last_stage_must_be_that_of_the_first(
    damaged: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = damaged("deepseek_v3", 2, 2, 2)
    name = "embedding.word_embeddings.weight"
    for r in range(2):
        edit(source / ITERATION / f"mp_rank_01_001_{r:03d}" / FILE, lambda root: root["model"][name][3].fill_(9))
    assert convert(source, tmp_path / "out", "hf") == 3
    found = capsys.readouterr().err
    assert f"mp_rank_01_001_000/{FILE}: {name} differs from {name} on stage 0" in found
    assert "mtp_num_layers" in found


# What cannot be


@pytest.mark.parametrize(
    ("name", "flags", "messages"),
    [
        ("mixtral", ("--target-ep", 4), ("ep 4 does not divide 6 experts",)),
        ("mixtral", ("--target-tp", 2, "--target-etp", 1), ("--target-expert-tensor-parallel-size 1", "size 2")),
        ("mixtral", ("--target-tp", 1, "--target-etp", 2), ("--target-expert-tensor-parallel-size 2", "size 1")),
        ("deepseek_v3", ("--target-tp", 8), ("tp 8 does not divide 4 attention heads",)),
        ("deepseek_v3", ("--target-pp", 3), ("4 layers do not divide into pp 3",)),
    ],
)
def test_layouts_that_are_refused(
    hf: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, flags: tuple[object, ...],
    messages: tuple[str, ...],
) -> None:  # fmt: skip
    assert convert(hf(name), tmp_path / "out", "megatron_mcore", *flags) == 6
    found = capsys.readouterr().err
    assert all(message in found for message in messages), found
    assert not (tmp_path / "out").exists()


def test_expert_tensor_parallel_size_may_be_said_when_it_is_the_same(hf: Made, tmp_path: Path) -> None:
    assert convert(hf("mixtral"), tmp_path / "out", "megatron_mcore", "--target-tp", 2, "--target-etp", 2) == 0
    assert ranks(tmp_path / "out")["mp_rank_01"]["args"].expert_tensor_parallel_size == 2


# Variants and duplicates in Hugging Face files


def fused(name: str) -> Weights:
    """As transformers 5 writes with save_original_format=False: experts in one tensor, [gates; ups]; no MTP there."""
    found = weights(name)
    old = "block_sparse_moe." if name == "mixtral" else "mlp."
    words = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for i in range(5 if name == "deepseek_v3" else 4):
        layer = f"model.layers.{i}."
        if f"{layer}{old}experts.0.{words[0]}.weight" not in found:
            continue
        gate, up, down = (
            torch.stack([found.pop(f"{layer}{old}experts.{e}.{word}.weight") for e in range(E)]) for word in words
        )
        found[f"{layer}mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{layer}mlp.experts.down_proj"] = down
        if name == "mixtral":
            found[f"{layer}mlp.gate.weight"] = found.pop(f"{layer}block_sparse_moe.gate.weight")
    return found


def without_mtp(tensors: Weights) -> Weights:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("model.layers.4.")}


@pytest.mark.parametrize("name", NAMES)
def test_experts_in_one_tensor_are_read_as_well(direct: Made, tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "in", without_mtp(fused(name)), CONFIGS[name])
    assert convert(source, tmp_path / "hf", "hf") == 0
    same(stored(tmp_path / "hf"), without_mtp(weights(name)))
    assert convert(source, tmp_path / "there", "megatron_mcore", *layout(2, 2, 2, "local"), "--verify") == 0
    found, wanted = ranks(tmp_path / "there"), ranks(direct(name, 2, 2, 2))
    for rank, root in wanted.items():
        known = {n: t for n, t in root["model"].items() if not n.startswith("mtp.")}
        if name == "deepseek_v3" and rank.split("_")[3] == "001":
            del known["embedding.word_embeddings.weight"]  # the copy that MTP needed
        same(found[rank]["model"], known)


def test_transformers_reads_what_comes_back_from_fused_experts(tmp_path: Path) -> None:
    """transformers' own writing of that format, and its logits before and after."""
    from transformers import AutoModelForCausalLM

    source = write(tmp_path / "in", weights("mixtral"), CONFIGS["mixtral"])
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored(tmp_path / "fused")
    assert convert(tmp_path / "fused", tmp_path / "out", "hf") == 0
    same(stored(tmp_path / "out"), weights("mixtral"))


@pytest.mark.parametrize("saver", ["hf", "megatron_mcore"])
def test_prediction_layers_that_are_not_in_the_files_are_left_out_and_this_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, saver: str
) -> None:
    """As transformers saves the model: it drops them, and leaves their number in config.json."""
    source = write(tmp_path / "in", without_mtp(weights("deepseek_v3")), CONFIGS["deepseek_v3"])
    with caplog.at_level("WARNING", "ckptconv"):
        assert convert(source, tmp_path / "out", saver) == 0
    assert "config.json says 1 MTP layers, but the files hold none: left out" in caplog.text
    if saver == "hf":
        same(stored(tmp_path / "out"), without_mtp(weights("deepseek_v3")))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    else:
        root = ranks(tmp_path / "out")["mp_rank_00"]
        assert not any(name.startswith("mtp.") for name in root["model"])
        assert not root["args"].mtp_num_layers


def test_prediction_layers_that_are_there_in_part_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = weights("deepseek_v3")
    del tensors["model.layers.4.eh_proj.weight"]
    source = write(tmp_path / "in", tensors, CONFIGS["deepseek_v3"])
    assert convert(source, tmp_path / "out", "hf") == 3
    assert "lacks model.layers.4.eh_proj.weight" in capsys.readouterr().err


DUPLICATES = {
    "model.layers.4.embed_tokens.weight": "'word embeddings' of 'embeddings'",
    "model.layers.4.shared_head.head.weight": "'weight' of 'output layer'",
}


@pytest.mark.parametrize("name", DUPLICATES)
def test_a_duplicate_that_differs_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tensors = weights("deepseek_v3")
    tensors[name][7, 3] += 1
    source = write(tmp_path / "in", tensors, CONFIGS["deepseek_v3"])
    assert convert(source, tmp_path / "out", "hf") == 3
    found = capsys.readouterr().err
    assert f"{name} differs from {DUPLICATES[name]}" in found
    assert "lose one of the two" in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", DUPLICATES)
def test_a_duplicate_may_be_absent_and_is_written(tmp_path: Path, name: str) -> None:
    tensors = weights("deepseek_v3")
    del tensors[name]
    source = write(tmp_path / "in", tensors, CONFIGS["deepseek_v3"])
    assert convert(source, tmp_path / "out", "hf") == 0
    same(stored(tmp_path / "out"), weights("deepseek_v3"))


def test_an_expert_that_is_missing_or_too_much_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = weights("mixtral")
    expert = "model.layers.2.block_sparse_moe.experts."
    rest = {key: tensor for key, tensor in tensors.items() if key != expert + "4.w3.weight"}
    gone = write(tmp_path / "gone", rest, CONFIGS["mixtral"])
    assert convert(gone, tmp_path / "out", "hf") == 3
    assert f"lacks {expert}4.w3.weight" in capsys.readouterr().err
    more = write(tmp_path / "more", tensors | {expert + "6.w1.weight": torch.ones(F, H)}, CONFIGS["mixtral"])
    assert convert(more, tmp_path / "out", "hf") == 3
    assert f"holds {expert}6.w1.weight" in capsys.readouterr().err


# Digests


def crc(tensor: torch.Tensor) -> str:
    return f"crc32:{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes()):08x}"


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 3)], ids=str)
def test_digests_are_of_all_experts_together_whatever_the_layout(
    direct: Made, tmp_path: Path, sizes: tuple[int, int, int]
) -> None:
    source = weights("mixtral")
    notes = json.loads((direct("mixtral", *sizes) / ITERATION / PROVENANCE).read_text())
    experts = "model.layers.3.block_sparse_moe.experts."
    wanted = {
        "mlp l0 weight W": torch.stack([source[f"{experts}{e}.w1.weight"] for e in range(E)]),
        "mlp l0 weight V": torch.stack([source[f"{experts}{e}.w3.weight"] for e in range(E)]),
        "mlp l1 weight": torch.stack([source[f"{experts}{e}.w2.weight"] for e in range(E)]),
        "router weight": source["model.layers.3.block_sparse_moe.gate.weight"],
    }
    found = notes["digests"]["transformer layer 3"]
    assert {key: found[key] for key in wanted} == {key: crc(tensor) for key, tensor in wanted.items()}
    assert convert(direct("mixtral", *sizes), tmp_path / "back", "hf") == 0
    assert json.loads((tmp_path / "back" / PROVENANCE).read_text())["digests"] == notes["digests"]


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_byte_of_an_expert_is_found(hf: Made, direct: Made, tmp_path: Path, name: str) -> None:
    from ckptconv import verify
    from ckptconv.errors import VerifyError

    folder = shutil.copytree(direct(name, 2, 2, 2), tmp_path / "in")
    digests = json.loads((folder / ITERATION / PROVENANCE).read_text())["digests"]
    spec = families.of_config(CONFIGS[name], "").spec(CONFIGS[name], "")
    assert verify.verify(str(folder), "megatron_mcore", digests, None) == sum(len(m.shapes) for m in expected(spec))
    path = folder / ITERATION / "mp_rank_01_001_001" / FILE
    root = torch.load(path, weights_only=False)
    row = root["model"][FC1][3].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(row) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerifyError, match="1 tensors differ from what was sent: transformer layer 3/mlp l0 weight W"):
        verify.verify(str(folder), "megatron_mcore", digests, None)


def test_old_names_of_prediction_layers(damaged: Made, tmp_path: Path) -> None:
    """megatron-core before 0.17: `transformer_layer` where newer releases have `mtp_model_layer`."""
    source = damaged("deepseek_v3", 2, 2, 2)
    for path in source.rglob(FILE):
        edit(path, lambda root: root.update(
            model={n.replace("mtp_model_layer", "transformer_layer"): t for n, t in root["model"].items()}
        ))  # fmt: skip
    assert convert(source, tmp_path / "back", "hf") == 0
    same(stored(tmp_path / "back"), weights("deepseek_v3"))


def test_a_trainer_of_the_old_days_has_no_expert_tensor_parallel_size(damaged: Made, tmp_path: Path) -> None:
    source = damaged("mixtral", 2, 2, 2)

    def old(root: dict[str, Any]) -> None:
        root["args"] = Namespace(**{k: v for k, v in vars(root["args"]).items() if "expert_tensor" not in k})

    for path in source.rglob(FILE):
        edit(path, old)
    assert convert(source, tmp_path / "back", "hf") == 0
    same(stored(tmp_path / "back"), weights("mixtral"))
