"""Meta's format against files that another system's converter read and wrote: epfLLM/Megatron-LLM's `hf_to_megatron`.

Expected values: the same model as Hugging Face's files, and what that converter made of Meta's (`epfl/h2m/meta_x2`),
whose qkv is grouped but keeps Meta's rotary order, and whose first MLP matrix is up above gate.
"""

from __future__ import annotations

from pathlib import Path

import meta_reference
import torch

from commands import convert, same, weights_of
from goldens import golden

GOLDEN = golden("epfl")


def test_equal_to_the_hugging_face_files(tmp_path: Path) -> None:
    found = weights_of(convert(GOLDEN / "inputs" / "meta_gqa_x2", tmp_path / "hf", "hf", "--verify"))
    same(found, {name: w.bfloat16() for name, w in weights_of(GOLDEN / "inputs" / "llama2_gqa").items()})


def test_equal_to_what_another_converter_makes_of_it(tmp_path: Path) -> None:
    """Both ways in: our one shard, made of the two, put together by the formula of that system."""
    found = convert(GOLDEN / "inputs" / "meta_gqa_x2", tmp_path / "one", "meta", "--target-tp", 1)
    ours = torch.load(found / "consolidated.00.pth", weights_only=True)
    file = GOLDEN / "h2m" / "meta_x2" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    theirs = torch.load(file, weights_only=False)["model"]["language_model"]  # its args are a plain Namespace
    want = {
        "tok_embeddings.weight": theirs["embedding"]["word_embeddings.weight"],
        "output.weight": theirs["lm_head"],
        "norm.weight": theirs["transformer"]["final_layernorm.weight"],
    }
    for i in range(2):
        at, to = f"layers.{i}.", f"layers.{i}.attention."
        groups = theirs["transformer"][f"{to}query_key_value.weight"].reshape(8, 4, 8, 128)  # g, r + 2, d, h
        up, gate = theirs["transformer"][f"{at}mlp.dense_h_to_4h.weight"].chunk(2)
        want |= {
            f"{to}wq.weight": groups[:, :2].reshape(128, 128),
            f"{to}wk.weight": groups[:, 2].reshape(64, 128),
            f"{to}wv.weight": groups[:, 3].reshape(64, 128),
            f"{to}wo.weight": theirs["transformer"][f"{to}dense.weight"],
            f"{at}feed_forward.w1.weight": gate,
            f"{at}feed_forward.w3.weight": up,
            f"{at}feed_forward.w2.weight": theirs["transformer"][f"{at}mlp.dense_4h_to_h.weight"],
            f"{at}attention_norm.weight": theirs["transformer"][f"{at}input_layernorm.weight"],
            f"{at}ffn_norm.weight": theirs["transformer"][f"{at}post_attention_layernorm.weight"],
        }
    assert all(torch.equal(tensor.bfloat16().float(), tensor.float()) for tensor in want.values())  # widened, no more
    same(ours, {name: tensor.bfloat16() for name, tensor in want.items()})


def test_the_shards_given_back(tmp_path: Path) -> None:
    """Hugging Face's files of the model become the very shards, less the frequencies."""
    source = GOLDEN / "inputs" / "meta_gqa_x2"
    found = convert(GOLDEN / "inputs" / "llama2_gqa", tmp_path / "two", "meta", "--target-tp", 2, "--bf16")
    for file in source.glob("consolidated.*"):
        want = torch.load(file, weights_only=True)
        del want["rope.freqs"]
        same(torch.load(found / file.name, weights_only=True), want)
    ids = torch.arange(3, 27)[None]
    assert torch.equal(meta_reference.logits(found, ids), meta_reference.logits(source, ids))
