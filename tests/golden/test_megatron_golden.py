"""Against checkpoints that other systems' own converters wrote, tensor by tensor, in both directions.

Expected values: NVIDIA Megatron-LM core 0.16.1 (`megatron/`), Intel Gaudi's Megatron-LM (`gaudi/mcore`), and
Megatron-LM core 0.12 with MindSpore's `core_mf` loader (`mindspore/`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures import logits
from goldens import GOLDEN, golden, read
from inprocess import here

golden()


@dataclass(frozen=True)
class Golden:
    """A Megatron checkpoint, the Hugging Face directory it stands for, and how it was made."""

    checkpoint: str
    source: str
    tp: int
    pp: int
    dtype: torch.dtype = torch.float32
    flags: tuple[object, ...] = ()  # what its args do not tell


#: ckptconv has to write the same files from the same source.
MEGATRON = {
    "llama_gqa": Golden("megatron/llama_gqa.tp2pp2", "megatron/hf/llama_gqa", 2, 2),
    "llama_mha": Golden("megatron/llama_mha.tp4pp1", "megatron/hf/llama_mha", 4, 1),
    "llama_pad": Golden("megatron/llama_pad.tp2pp2", "megatron/hf/llama_pad", 2, 2),
    "qwen2": Golden("megatron/qwen2.tp2pp2", "megatron/hf/qwen2", 2, 2),
}
#: Only read: what was written was cast to bf16 on the way.
OTHERS = {
    # args have vocab_size None and 512 padded rows.
    "mindspore_mha": Golden(
        "mindspore/mlm_mha_tp2pp2", "mindspore/mha/hf", 2, 2, torch.bfloat16, ("--true-vocab-size", 320)
    ),
    "gaudi_llama_gqa": Golden("gaudi/mcore/llama_gqa_tp2pp2_te", "gaudi/inputs/llama_gqa", 2, 2, torch.bfloat16),
}
# The saver's args must agree with Megatron's own. Not listed: rotary_base, which upstream leaves at 10000, and
# group_query_attention, which upstream sets for MHA too, where either value means a group per head.
ARGUMENTS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "max_position_embeddings", "normalization", "layernorm_epsilon", "swiglu", "add_bias_linear",
    "add_qkv_bias", "position_embedding_type", "rotary_percent", "untie_embeddings_and_output_weights", "vocab_size",
    "padded_vocab_size", "make_vocab_size_divisible_by", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "params_dtype",
)  # fmt: skip


def ranks(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Path relative to the checkpoint -> content of every rank file of its latest iteration."""
    iteration = int((checkpoint / "latest_checkpointed_iteration.txt").read_text())
    files = sorted((checkpoint / f"iter_{iteration:07d}").rglob("*.pt"))
    return {str(file.relative_to(checkpoint)): read(file) for file in files}


def state(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in content["model"].items() if not key.endswith("_extra_state")}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= load_file(file)
    return out


def check_equal(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor], where: str) -> None:
    """Same keys, and for each the same dtype, shape and bits."""
    assert sorted(have) == sorted(want), where
    for key, tensor in want.items():
        assert (have[key].dtype, have[key].shape) == (tensor.dtype, tensor.shape), f"{where}: {key}"
        assert torch.equal(have[key], tensor), f"{where}: {key}"


def without_padding(content: dict[str, torch.Tensor], rank: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """The rows of a rank that are rows of the source; how the others are filled is the converter's choice."""
    out = dict(content)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if key in content:
            rows = content[key].shape[0]
            out[key] = content[key][: max(0, vocab_size - rank * rows)]
    return out


def convert(*flags: object) -> None:
    result = here(*flags)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-4000:]}"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`ours(name)`: the same conversion by ckptconv, once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            case, out = MEGATRON[name], tmp_path_factory.mktemp("golden") / name
            args = next(iter(ranks(GOLDEN / case.checkpoint).values()))["args"]
            flags = ("--loader", "hf", "--saver", "megatron_mcore", "--saver-transformer-impl", "local")
            paths = ("--load-dir", GOLDEN / case.source, "--save-dir", out)
            layout = ("--target-tp", case.tp, "--target-pp", case.pp)
            padding = ("--make-vocab-size-divisible-by", args.make_vocab_size_divisible_by)
            convert(*flags, *paths, *layout, *padding)
            made[name] = out
        return made[name]

    return get


@pytest.mark.parametrize("name", MEGATRON)
def test_same_tensors_as_megatron(name: str, ours: Callable[[str], Path]) -> None:
    case = MEGATRON[name]
    have, want = ranks(ours(name)), ranks(GOLDEN / case.checkpoint)
    assert list(have) == list(want)
    vocab_size = json.loads((GOLDEN / case.source / "config.json").read_text())["vocab_size"]
    for file, content in want.items():
        mine, theirs = state(have[file]), state(content)
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}, file
        rank = int(Path(file).parent.name.split("_")[2])
        check_equal(without_padding(mine, rank, vocab_size), without_padding(theirs, rank, vocab_size), file)


@pytest.mark.parametrize("name", MEGATRON)
def test_same_arguments_as_megatron(name: str, ours: Callable[[str], Path]) -> None:
    have, want = ranks(ours(name)), ranks(GOLDEN / MEGATRON[name].checkpoint)
    for file, content in want.items():
        assert {k: have[file][k] for k in ("checkpoint_version", "iteration")} == {
            k: content[k] for k in ("checkpoint_version", "iteration")
        }
        mine, theirs = vars(have[file]["args"]), vars(content["args"])
        wrong = {key: (mine.get(key), theirs[key]) for key in ARGUMENTS if mine.get(key) != theirs[key]}
        assert not wrong, f"{file}: (ours, Megatron's) by argument: {wrong}"


@pytest.mark.parametrize("name", [*MEGATRON, *OTHERS])
def test_back_to_hugging_face(name: str, tmp_path: Path) -> None:
    case = (MEGATRON | OTHERS)[name]
    paths = ("--load-dir", GOLDEN / case.checkpoint, "--save-dir", tmp_path)
    convert("--loader", "megatron_mcore", "--saver", "hf", *paths, *case.flags)
    want = {key: tensor.to(case.dtype) for key, tensor in weights(GOLDEN / case.source).items()}
    check_equal(weights(tmp_path), want, name)
    if name in MEGATRON:  # the others' args lost the theta and the epsilon of their source
        ids = torch.arange(3, 51).reshape(2, 24)
        assert torch.equal(logits(tmp_path, ids), logits(GOLDEN / case.source, ids))
