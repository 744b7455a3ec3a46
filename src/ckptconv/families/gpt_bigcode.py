"""StarCoder 1, SantaCoder: GPT-2 with one key and value head, in ordinary linears.

Source: transformers `models/gpt_bigcode`. `c_attn` is [all queries, key, value] with multi_query and per head [query,
key, value] without: the grouped order for one group, or for as many as heads. Class defaults of absent keys:
multi_query true, activation gelu_pytorch_tanh.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptconv.families.family import ACTIVATIONS, Config, Field, derive
from ckptconv.families.gpt2 import GPT2, NEUTRAL
from ckptconv.ops import COPY, PLAIN
from ckptconv.spec import ModelSpec


def _groups(config: Config, where: str) -> dict[str, Any]:
    return {"num_query_groups": config["n_head"] if config.get("multi_query") is False else 1}


def _multi_query(spec: ModelSpec) -> Config:
    return {"multi_query": spec.num_query_groups == 1}


GPT_BIGCODE = replace(
    derive(
        GPT2,
        name="gpt_bigcode",
        model_type="gpt_bigcode",
        architecture="GPTBigCodeForCausalLM",
        fields=(
            Field("num_query_groups", None, 1),
            Field("activation", "activation_function", "gelu_tanh", words=ACTIVATIONS),
        ),
        neutral=NEUTRAL,
        extra=_groups,
        extra_config=_multi_query,
        models="StarCoder 1, StarCoderBase, SantaCoder; multi-query and not",
    ),
    rows=tuple(replace(row, op=COPY, view=PLAIN) for row in GPT2.rows),
)
