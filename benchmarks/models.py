"""Source checkpoints for the benchmarks: Llama-shaped, random bytes (or holes), written straight to safetensors."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ckptconv.containers import safetensors
from ckptconv.containers.plan import Slot
from ckptconv.families.llama import LLAMA
from ckptconv.messages import expected
from ckptconv.spec import ModelSpec, Rope

#: name -> (hidden, ffn, heads, groups, layers, vocabulary); bf16 sizes in the names.
SIZES = {
    "0.5GB": (1024, 4096, 16, 8, 12, 32000),
    "2GB": (2048, 8192, 32, 8, 16, 32000),
    "8GB": (4096, 14336, 32, 8, 16, 64128),
    "70B": (8192, 28672, 64, 8, 80, 128256),
}
BLOCK = 64 << 20


def spec(name: str) -> ModelSpec:
    """The model called `name`."""
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
    for message in expected(model):
        for key, shape in message.shapes.items():
            row = LLAMA.row(message.template, key)
            for name, part in zip(row.names, row.op.part_shapes(shape, model), strict=True):
                slot = Slot(name.format(i=message.layer), model.dtype, part)
                if sum(s.nbytes for s in groups[-1]) + slot.nbytes > shard and groups[-1]:
                    groups.append([])
                groups[-1].append(slot)
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
    (directory / "config.json").write_text(json.dumps(LLAMA.config(model), indent=2))
    return total


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("size", choices=SIZES)
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("--sparse", action="store_true")
    given = arguments.parse_args()
    print(write(spec(given.size), given.directory, sparse=given.sparse))
