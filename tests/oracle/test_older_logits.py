"""GPT-2, StarCoder 1 and 2, serial GPT-NeoX and MegatronBert give transformers' logits in NVIDIA's own models.

MegatronBert in the real BertModel, with padding and two sentences: of the language model head and of the binary one.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import convert
from fixtures import config
from mcore import Case, Outcome, run
from settings_older import PAD, SEPARATOR, masks

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

Fixture = Callable[..., Path]

TOLERANCE = 1e-5
# 24 tokens are three windows of StarCoder2's fixture.
IDS = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
PADDED = IDS.clone()
PADDED[:, 10], PADDED[1, 17:] = SEPARATOR, PAD
BERTS = ("megatron_bert", "megatron_bert_mlm")
NAMES = (
    "gpt2", "gpt2_untied", "gpt_bigcode", "gpt_bigcode_mha", "starcoder2", "starcoder2_no_bias", "neox_serial", *BERTS,
)  # fmt: skip
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
#: What the oracle is told wrongly, and how much it shows: the wrong GELU, the wrong positions.
WRONG: dict[str, tuple[dict[str, Any], float]] = {
    "gpt2": ({"activation_function": "gelu"}, 1e-4),
    "gpt_bigcode": ({"activation_function": "gelu"}, 1e-4),
    "starcoder2": ({"sliding_window": None}, 1e-2),
    "neox_serial": ({"rotary_pct": 0.5}, 1e-2),
    "neox_serial gelu": ({"hidden_act": "gelu_new"}, 1e-4),
    "megatron_bert": ({"hidden_act": "gelu_new"}, 1e-4),
}


@pytest.fixture(scope="module")
def outcomes(hf: Fixture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What megatron-core makes of every conversion, by "fixture tpTppP" or "wrong NAME"."""
    root = tmp_path_factory.mktemp("older")

    def case_of(name: str, tp: int, pp: int) -> tuple[str, Case]:
        out = convert(
            hf(name), root / f"{name} tp{tp}pp{pp}", "megatron_mcore", "--target-tp", tp, "--target-pp", pp,
            "--saver-transformer-impl", "local", "--make-vocab-size-divisible-by", 1,
        )  # fmt: skip
        ids = {"short": IDS.tolist()} | ({"padded": PADDED.tolist()} if name in BERTS else {})
        return out.name, Case(str(hf(name)), str(out), tp, pp, ids, 1)

    cases = dict(case_of(name, *layout) for name in NAMES for layout in LAYOUTS)
    for key, (changes, _) in WRONG.items():
        told = root / f"wrong {key}"
        told.mkdir()
        (told / "config.json").write_text(json.dumps(config(key.split()[0]) | changes))
        good = cases[f"{key.split()[0]} tp1pp1"]
        cases[told.name] = Case(str(told), good.checkpoint, 1, 1, good.ids, 1)
    return run(cases, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def expected(hf: Fixture) -> Callable[[str], dict[str, torch.Tensor]]:
    """What transformers computes for a fixture, by the names of the oracle's outcomes."""
    import transformers

    made: dict[str, dict[str, torch.Tensor]] = {}

    def compute(name: str) -> dict[str, torch.Tensor]:
        kind: Any = getattr(transformers, config(name)["architectures"][0])
        model = kind.from_pretrained(hf(name), dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            out = {"short": model(input_ids=IDS)[0]}
            if name in BERTS:
                mask, types = masks(PADDED)
                both = model(input_ids=PADDED, attention_mask=mask, token_type_ids=types)
                out["padded"] = both[0]
                if name == "megatron_bert":
                    out["padded binary"] = both[1]
        return out

    def get(name: str) -> dict[str, torch.Tensor]:
        if name not in made:
            made[name] = compute(name)
        return made[name]

    return get


def difference(outcome: Outcome, key: str, want: torch.Tensor) -> float:
    """Largest absolute difference over the real vocabulary, where tokens are."""
    assert not outcome.error, outcome.error
    found = (outcome.logits[key][..., : want.shape[-1]] - want).abs()
    return float((found[PADDED != PAD] if key == "padded" else found).max())


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(
    outcomes: dict[str, Outcome], expected: Callable[[str], dict[str, torch.Tensor]], name: str, tp: int, pp: int
) -> None:
    for key, want in expected(name).items():
        assert difference(outcomes[f"{name} tp{tp}pp{pp}"], key, want) < TOLERANCE, key


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_setting_is_noticed(
    outcomes: dict[str, Outcome], expected: Callable[[str], dict[str, torch.Tensor]], key: str
) -> None:
    want = expected(key.split()[0])["short"]
    assert difference(outcomes[f"wrong {key}"], "short", want) > WRONG[key][1]
