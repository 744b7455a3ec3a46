"""Source checkpoints for the benchmarks: Llama or DeepSeek, random bytes (or holes), straight to safetensors."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ckptconv import families
from ckptconv.containers import safetensors
from ckptconv.containers.plan import Slot
from ckptconv.messages import expected
from ckptconv.spec import MLA, ModelSpec, MoE, Rope

#: name -> (hidden, ffn, heads, groups, layers, vocabulary); bf16 sizes in the names.
SIZES = {
    "0.5GB": (1024, 4096, 16, 8, 12, 32000),
    "2GB": (2048, 8192, 32, 8, 16, 32000),
    "8GB": (4096, 14336, 32, 8, 16, 64128),
    "70B": (8192, 28672, 64, 8, 80, 128256),
}
BLOCK = 64 << 20

#: DeepSeek-V3 with its MTP layer: 1.37 TB in bf16.
DEEPSEEK_V3 = ModelSpec(
    family="deepseek_v3", num_layers=61, hidden_size=7168, ffn_hidden_size=18432, num_attention_heads=128,
    num_query_groups=128, kv_channels=128, vocab_size=129280, max_position_embeddings=163840, seq_length=163840,
    dtype="bfloat16", norm_epsilon=1e-6, mtp_layers=1, mla=MLA(1536, 512, 128, 64, 128),
    moe=MoE(
        num_experts=256, topk=8, ffn_hidden_size=2048, layers=(0,) * 3 + (1,) * 58, score="sigmoid", scaling_factor=2.5,
        score_bias=True, num_groups=8, topk_groups=4, group_score="top2", router_fp32=True, shared_ffn_hidden_size=2048,
    ),
    rope=Rope(10000.0, "yarn", {
        "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }, interleaved=True),
)  # fmt: skip


def spec(name: str) -> ModelSpec:
    """The model called `name`."""
    if name == "DeepSeek-V3":
        return DEEPSEEK_V3
    h, f, a, g, layers, v = SIZES[name]
    return ModelSpec(
        family="llama", num_layers=layers, hidden_size=h, ffn_hidden_size=f, num_attention_heads=a, num_query_groups=g,
        kv_channels=h // a, vocab_size=v, max_position_embeddings=8192, seq_length=8192, dtype="bfloat16",
        rope=Rope(theta=500000.0),
    )  # fmt: skip


def write(model: ModelSpec, directory: Path, shard: int = 5 * 10**9, sparse: bool = False) -> int:
    """Write an HF directory; returns bytes. `sparse` leaves the tensors as holes of a file with real headers."""
    directory.mkdir(parents=True, exist_ok=True)
    groups: list[list[Slot]] = [[]]
    family, filled = families.get(model.family), 0
    for message in expected(model):
        for row in family.rows_of(message, model):
            shapes = row.op.part_shapes(row.shapes(message), model)
            for name, part in zip(row.stored(message.layer, model), shapes, strict=True):
                slot = Slot(name, model.dtype, row.view.shape(part))
                if filled + slot.nbytes > shard and groups[-1]:
                    groups.append([])
                    filled = 0
                groups[-1].append(slot)
                filled += slot.nbytes
    weight_map, total = {}, 0
    noise = os.urandom(BLOCK)
    for number, slots in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        plan = safetensors.plan(slots)
        with open(directory / file, "wb") as out:
            if not sparse:
                for start in range(0, plan.size, BLOCK):
                    out.write(noise[: min(BLOCK, plan.size - start)])
            out.truncate(plan.size)
            plan.finish(lambda offset, data, out=out: (out.seek(offset), out.write(data))[1] and None, {})
        weight_map |= {slot.name: file for slot in slots}
        total += plan.size
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(family.config(model), indent=2))
    return total


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("size", choices=[*SIZES, "DeepSeek-V3"])
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("--sparse", action="store_true")
    given = arguments.parse_args()
    print(write(spec(given.size), given.directory, sparse=given.sparse))
