"""Checkpoints that other systems' own converters wrote compute what the models they were made of do, bit for bit.

Expected values: files of NVIDIA's Megatron-LM, Intel Gaudi's, epfLLM's and MindSpore's converters.
"""

from __future__ import annotations

import pytest
import streams

from goldens import golden
from inprocess import here

GOLDEN = golden()


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ("megatron/llama_gqa.tp2pp2", "megatron/hf/llama_gqa"),
        ("megatron/llama_mha.tp4pp1", "megatron/hf/llama_mha"),
        ("megatron/llama_pad.tp2pp2", "megatron/hf/llama_pad"),
        ("megatron/qwen2.tp2pp2", "megatron/hf/qwen2"),
        ("epfl/h2m/falcon7", "epfl/inputs/falcon7"),
        ("epfl/h2m/llama2_gqa", "epfl/inputs/llama2_gqa"),
        ("epfl/util/llama2_mha_tp2pp2", "epfl/inputs/llama2_mha"),
        ("gaudi/mlm/llama_gqa_tp2pp2ep1", "gaudi/hf/llama_gqa_tp2pp2ep1"),
        ("gaudi/mlm/mixtral_tp1pp2ep2_bins", "gaudi/hf/mixtral_tp1pp2ep2_bins"),
    ],
)
def test_the_same_bits(written: str, source: str) -> None:
    done = here("logits", GOLDEN / source, "--against", GOLDEN / written, "--atol", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "difference: 0 at most" in done.stdout
    # They say something: every token is followed by its own.
    assert float(streams.logits(GOLDEN / source, range(16)).std(0).min()) > 1e-3


def test_settings_that_a_converter_lost() -> None:
    """MindSpore's loader for Megatron-LM's converter leaves Megatron's defaults in the args, and the tool casts."""
    pair = (GOLDEN / "mindspore/mlm_mha_tp2pp2", "--true-vocab-size", 320, "--against", GOLDEN / "mindspore/mha/hf")
    done = here("logits", *pair)
    assert done.returncode == 8
    assert "models differ: rope.theta: 10000.0 != 1000000.0" in done.stdout
    assert "models differ: norm_epsilon: 1e-05 != 1e-06" in done.stdout
