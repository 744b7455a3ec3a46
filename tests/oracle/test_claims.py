"""What the README says of a family is what the modules beside this one run; what can be run there, is."""

from __future__ import annotations

import pytest

import test_custom_layers as custom
import test_mcore_logits as common
import test_moe_logits as moe
import test_older_logits as older
import test_tier4_logits as tier4
from ckptconv import families
from ckptconv.families import FAMILIES
from ckptconv.formats import megatron_args
from ckptconv.formats.megatron_layers import refusals
from ckptconv.spec import ModelSpec
from fixtures import FIXTURES, config

STOCK = {*common.NAMES, *older.NAMES, *(name for name, *_ in (*tier4.LAYOUTS, *moe.LAYOUTS))}
CUSTOM = set(custom.REFUSED)
CLAIM = "logits of the real megatron-core"


def spec(name: str) -> ModelSpec:
    data = config(name)
    return families.of_config(data, name).spec(data, name)


def family(name: str) -> str:
    return families.of_config(config(name), name).name


@pytest.mark.parametrize("name", FIXTURES)
def test_what_megatron_core_can_express_is_run_there(name: str) -> None:
    if not megatron_args.refusals(spec(name)):
        run = {other for other in STOCK if family(other) == family(name)}
        assert name in STOCK or run, f"{name} is written for megatron-core but its logits are not compared"
    elif not refusals(spec(name)):
        run = {other for other in CUSTOM if family(other) == family(name)}
        assert name in CUSTOM or run, f"{name} is written with --custom-layers but its logits are not compared"


@pytest.mark.parametrize("name", FAMILIES)
def test_claims_are_those_of_the_tests(name: str) -> None:
    said = FAMILIES[name].verified
    stock = any(family(other) == name for other in STOCK)
    layers = any(family(other) == name and megatron_args.refusals(spec(other)) for other in CUSTOM)
    claims = CLAIM in said or "logits of both heads of the real megatron-core" in said or "logits at TP1" in said
    assert claims == (stock or layers)
    assert ("--custom-layers" in said) == layers
