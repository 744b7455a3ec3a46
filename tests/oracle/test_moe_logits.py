"""Experts, latent attention and MTP give the logits of transformers in NVIDIA's own model, at every kind of layout.

transformers does not load MTP layers: their logits are composed here of its modules, as DeepSeek's report says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures import config, logits
from mcore import Case, Outcome, run

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Fixture = Callable[..., Path]

#: HF builds two norms of latent attention with 1e-6 whatever the config says, which costs Moonlight (1e-5) that much.
TOLERANCE = 2e-4
IDS = torch.randint(3, 130, (2, 24), generator=torch.Generator().manual_seed(1))
#: Whole matrix of layouts for one of each kind; the others at one rank and over all axes at once.
EVERY = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")
OTHERS = (
    "qwen3", "qwen3_tied", "mixtral_window", "qwen2_moe_step", "qwen3_moe_v5", "deepseek_v2_lite", "deepseek_v3_mtp",
    "deepseek_v3_halves", "moonlight", "kimi_k2", "glm4_moe_mtp", "glm4_moe_lite",
)  # fmt: skip
LAYOUTS = [
    *((name, tp, pp, ep) for name in EVERY
      for tp, pp, ep in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2))),
    *((name, *layout) for name in OTHERS for layout in ((1, 1, 1), (2, 2, 1))),
]  # fmt: skip
#: What the oracle is told wrongly; then it has to notice.
WRONG: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"norm_topk_prob": True},
    "deepseek_v2": {"routed_scaling_factor": 3.0},
    "deepseek_v3": {"routed_scaling_factor": 1.0},
    "deepseek_v3 rope": {"rope_theta": 50000.0},
    "glm4_moe": {"partial_rotary_factor": 1.0},
}


@pytest.fixture(scope="module")
def outcomes(hf: Fixture, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What megatron-core makes of every conversion, by "fixture tpTppPepE" or "wrong NAME"."""
    root = tmp_path_factory.mktemp("moe")
    sources = {name: hf(name) for name, *_ in LAYOUTS}

    def convert(job: tuple[str, int, int, int]) -> tuple[str, Case]:
        name, tp, pp, ep = job
        out = root / f"{name} tp{tp}pp{pp}ep{ep}"
        done = cli(
            "--loader", f"hf_{config(name)['model_type']}", "--saver", "megatron_mcore",
            "--load-dir", sources[name], "--save-dir", out, "--target-tp", tp, "--target-pp", pp, "--target-ep", ep,
            "--saver-transformer-impl", "local", "--make-vocab-size-divisible-by", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return out.name, Case(str(sources[name]), str(out), tp, pp, {"short": IDS.tolist()}, 1, ep=ep)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cases = dict(pool.map(convert, LAYOUTS))
    for key, changes in WRONG.items():
        name = key.split()[0]
        told = root / f"wrong {key}"
        told.mkdir()
        (told / "config.json").write_text(json.dumps(config(name) | changes))
        good = cases[f"{name} tp1pp1ep1"]
        cases[told.name] = Case(str(told), good.checkpoint, 1, 1, good.ids, 1)
    return run(cases, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def expected(hf: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.Tensor]:
    """Logits of transformers for a fixture, computed once."""
    made: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        if name not in made:
            made[name] = logits(without_mtp(hf(name), tmp_path_factory.mktemp("plain")), IDS)
        return made[name]

    return get


def without_mtp(source: Path, out: Path) -> Path:
    """The same weights as transformers takes them: without MTP layers, and Kimi-K2 as the DeepSeek-V3 it is."""
    from safetensors.torch import save_file

    c = json.loads((source / "config.json").read_text())
    layers = c["num_hidden_layers"]
    shutil.copytree(source, out, dirs_exist_ok=True)
    if c["model_type"] == "kimi_k2":
        c |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
        (out / "config.json").write_text(json.dumps(c))
    weights = load_file(source / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith(f"model.layers.{layers}.")}
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    return out


def difference(outcome: Outcome, key: str, want: torch.Tensor) -> float:
    assert not outcome.error, outcome.error
    return float((outcome.logits[key][..., : want.shape[-1]] - want).abs().max())


@pytest.mark.parametrize(("name", "tp", "pp", "ep"), LAYOUTS)
def test_logits_are_those_of_transformers(
    outcomes: dict[str, Outcome], expected: Callable[[str], torch.Tensor], name: str, tp: int, pp: int, ep: int
) -> None:
    assert difference(outcomes[f"{name} tp{tp}pp{pp}ep{ep}"], "short", expected(name)) < TOLERANCE


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_setting_is_noticed(
    outcomes: dict[str, Outcome], expected: Callable[[str], torch.Tensor], key: str
) -> None:
    assert difference(outcomes[f"wrong {key}"], "short", expected(key.split()[0])) > 100 * TOLERANCE


def mtp_logits(source: Path, out: Path) -> torch.Tensor:
    """Logits of the first MTP layer [b, s, v] by transformers' modules: its decoder layer with DeepSeek's inputs."""
    from transformers import AutoModelForCausalLM

    c = json.loads((source / "config.json").read_text())
    layers = c["num_hidden_layers"]
    base = logits_model(without_mtp(source, out / "base"))
    # The same files read as a model of one layer more: its last layer is the MTP layer's transformer layer.
    longer = out / "longer"
    shutil.copytree(source, longer)
    (longer / "config.json").write_text(json.dumps(c | {"num_hidden_layers": layers + 1}))
    further: Any = AutoModelForCausalLM.from_pretrained(longer, dtype=torch.float32, attn_implementation="eager")
    weights = load_file(source / "model.safetensors")
    own = {key: weights[f"model.layers.{layers}.{key}.weight"] for key in ("enorm", "hnorm", "eh_proj",
                                                                          "shared_head.norm")}  # fmt: skip
    eps = c["rms_norm_eps"]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    with torch.no_grad():
        hidden = base.model(input_ids=IDS, use_cache=False).last_hidden_state  # after the final norm
        following = torch.cat([IDS[:, 1:], torch.zeros_like(IDS[:, :1])], 1)
        embedded = base.model.embed_tokens(following)
        joined = torch.cat([norm(embedded, own["enorm"]), norm(hidden, own["hnorm"])], -1) @ own["eh_proj"].T
        s = IDS.shape[1]
        mask = torch.full((s, s), torch.finfo(torch.float32).min).triu(1)[None, None]
        positions = torch.arange(s)[None]
        rotary = further.model.rotary_emb(joined, positions)
        layer = further.model.layers[layers].eval()
        found = layer(joined, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        found = found[0] if isinstance(found, tuple) else found
        out_: torch.Tensor = base.lm_head(norm(found, own["shared_head.norm"]))
    return out_


def logits_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["deepseek_v3_mtp", "glm4_moe_mtp"])
def test_mtp_layers(name: str, tp: int, pp: int, hf: Fixture, outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    want = mtp_logits(hf(name), tmp_path)
    assert difference(outcomes[f"{name} tp{tp}pp{pp}ep1"], "short mtp 0", want) < TOLERANCE
