"""torch_dist: megatron-core loads what was written at every layout, and what it saves becomes the source again.

One directory serves all layouts. In the other direction the model is filled from rank files, not from torch_dist ones,
and saved by the library with an optimizer's state; the weights that come out have to be the source's, bit for bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inprocess
from commands import convert, same, weights_of
from fixtures import config, mtp_logits
from layouts import IDS, Fixture, case_of, difference
from mcore import Case, Outcome, run

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

TOLERANCE = 1e-4
#: Tied; untied with biases; norms of queries and keys; experts stacked, shared, in some layers; latent with MTP;
#: learned positions; BERT; layers of one's own.
NAMES = (
    "llama32", "llama_both_bias", "qwen3", "mixtral", "qwen2_moe", "qwen2_moe_step", "deepseek_v3_mtp", "gpt2",
    "megatron_bert", "gemma2",
)  # fmt: skip
FLAGS: dict[str, tuple[str, ...]] = {"gemma2": ("--custom-layers",)}
#: tp, pp, ep, vpp, and how strictly it is loaded: raise_all knows no key too many, the other is the trainer's default.
LAYOUTS = (
    (1, 1, 1, 1, "raise_all"), (2, 1, 1, 1, "assume_ok_unexpected"), (1, 2, 1, 1, "assume_ok_unexpected"),
)  # fmt: skip
MORE = (("llama32", 1, 2, 1, 2, "assume_ok_unexpected"), ("mixtral", 2, 1, 2, 1, "assume_ok_unexpected"))
LOADED = [*((name, *layout) for name in NAMES for layout in LAYOUTS), *MORE]
#: What no model of these takes: the other key style, the other implementation's norm, a key that none asks for.
REFUSED: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "keys": ("llama32", ("--layer-keys", "apart"), "assume_ok_unexpected",
             "decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
    "norms": ("mixtral", ("--saver-transformer-impl", "transformer_engine"), "assume_ok_unexpected",
              "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
    "states": ("llama32", ("--extra-state", "self_attention.core_attention"), "raise_all",
               "decoder.layers.self_attention.core_attention._extra_state"),
}  # fmt: skip
#: What the trainer's metadata says; with singleton_local_shards every layer, expert and half has a key of its own.
PLAIN = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
SAVED: dict[str, tuple[str, int, int, int, dict[str, Any], str]] = {
    "stacked": ("llama32", 2, 1, 1, PLAIN, "common.pt"),
    "stacked stages": ("llama_both_bias", 1, 2, 1, PLAIN, "inside"),
    "told apart": ("qwen3", 2, 1, 1, {**PLAIN, "non_homogeneous_layers": True}, "common.pt"),
    "experts": ("mixtral", 2, 1, 2, PLAIN, "common.pt"),
    "apart": ("deepseek_v3_mtp", 1, 2, 2, PLAIN, "inside"),
    "singletons": ("qwen2_moe", 2, 1, 2, {**PLAIN, "singleton_local_shards": True}, "common.pt"),
}


def _key(name: str, tp: int, pp: int, ep: int, vpp: int) -> str:
    return f"{name} tp{tp}pp{pp}ep{ep}vpp{vpp}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="module")
def outcomes(hf: Fixture, root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What megatron-core makes of every directory, and of every model that it saves."""
    cases = {}
    ids = {"short": IDS.tolist()}
    common = ("--saver-transformer-impl", "local", "--make-vocab-size-divisible-by", 1)
    for name in NAMES:
        convert(hf(name), root / name, "megatron_dist", *common, *FLAGS.get(name, ()))
    for name, tp, pp, ep, vpp, strict in LOADED:
        cases[_key(name, tp, pp, ep, vpp)] = Case(
            str(hf(name)), str(root / name), tp, pp, ids, 1, ep=ep, vpp=vpp, dist={"strict": strict}
        )
    for key, (name, flags, strict, _) in REFUSED.items():
        out = convert(hf(name), root / f"refused {key}", "megatron_dist", *common, *flags)
        cases[out.name] = Case(str(hf(name)), str(out), 1, 1, ids, 1, dist={"strict": strict})
    for key, (name, tp, pp, ep, metadata, objects) in SAVED.items():
        _, case = case_of(hf, root, (name, tp, pp, ep))
        dist = {"top": str(root / key), "metadata": metadata, "objects": objects}
        cases[key] = Case(case.hf, case.checkpoint, tp, pp, {}, 1, ep=ep, dist=dist)
    return run(cases, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def expected(hf: Fixture) -> Callable[[str], dict[str, torch.Tensor]]:
    """Logits of transformers for a fixture by the oracle's names, computed once."""
    import transformers

    made: dict[str, dict[str, torch.Tensor]] = {}

    def get(name: str) -> dict[str, torch.Tensor]:
        if name not in made:
            kind: Any = getattr(transformers, config(name)["architectures"][0])
            model = kind.from_pretrained(hf(name), dtype=torch.float32, attn_implementation="eager").eval()
            with torch.no_grad():
                made[name] = {"short": model(input_ids=IDS)[0]}
            if config(name).get("num_nextn_predict_layers"):
                made[name]["short mtp 0"] = mtp_logits(hf(name), IDS)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "tp", "pp", "ep", "vpp", "strict"), LOADED)
def test_logits_are_those_of_transformers(
    name: str, tp: int, pp: int, ep: int, vpp: int, strict: str, outcomes: dict[str, Outcome],
    expected: Callable[[str], dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    outcome = outcomes[_key(name, tp, pp, ep, vpp)]
    assert not outcome.error, outcome.error
    for key, want in expected(name).items():
        assert difference(outcome, key, want) < TOLERANCE, key


@pytest.mark.parametrize("key", REFUSED)
def test_what_does_not_fit_is_refused(key: str, outcomes: dict[str, Outcome]) -> None:
    assert REFUSED[key][-1] in outcomes[f"refused {key}"].error


@pytest.mark.parametrize("key", SAVED)
def test_what_megatron_saves_is_the_source(key: str, hf: Fixture, root: Path, outcomes: dict[str, Outcome]) -> None:
    assert not outcomes[key].error, outcomes[key].error
    name = SAVED[key][0]
    flags = ("--true-vocab-size", config(name)["vocab_size"])
    done = inprocess.here("--load-dir", root / key, "--save-dir", root / f"{key} back", "--saver", "hf", *flags)
    assert done.returncode == 0, done.stderr
    source = weights_of(hf(name))
    same(weights_of(root / f"{key} back"), source)
