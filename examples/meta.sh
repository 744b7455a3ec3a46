#!/bin/sh
# A tiny Llama from Meta's format to Hugging Face's and back, into other shards and into Megatron-Core.
# Usage: examples/meta.sh DIRECTORY   (is made, and must not exist)
set -eu
work=$1
mkdir "$work"

# What Meta publishes: params.json and consolidated.NN.pth, here of random numbers in two shards.
python - "$work/meta" <<'EOF'
import json, os, sys
import torch

out, h, f, v, layers, heads, shards = sys.argv[1], 64, 256, 128, 2, 4, 2
os.makedirs(out)
layer = {
    "attention.wq": (h // shards, h), "attention.wk": (h // shards, h), "attention.wv": (h // shards, h),
    "attention.wo": (h, h // shards), "feed_forward.w1": (f // shards, h), "feed_forward.w2": (h, f // shards),
    "feed_forward.w3": (f // shards, h),
}
for n in range(shards):
    shard = {"tok_embeddings.weight": torch.randn(v, h // shards), "output.weight": torch.randn(v // shards, h)}
    shard |= {f"layers.{i}.{name}.weight": torch.randn(shape) for i in range(layers) for name, shape in layer.items()}
    norms = ["norm", *(f"layers.{i}.{name}" for i in range(layers) for name in ("attention_norm", "ffn_norm"))]
    shard |= {f"{name}.weight": torch.ones(h) for name in norms}
    torch.save({name: tensor.bfloat16() for name, tensor in shard.items()}, f"{out}/consolidated.{n:02d}.pth")
params = {"dim": h, "n_layers": layers, "n_heads": heads, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
with open(f"{out}/params.json", "w") as file:
    json.dump(params, file)
EOF

convert="python -m ckptconv --no-progress --verify"
$convert --load-dir "$work/meta" --saver hf --save-dir "$work/hf"
$convert --load-dir "$work/hf" --saver meta --target-tp 4 --save-dir "$work/meta4"
$convert --load-dir "$work/meta4" --saver meta --target-tp 2 --save-dir "$work/meta2"
$convert --load-dir "$work/meta" --saver megatron_mcore --target-tp 2 --target-pp 2 --save-dir "$work/megatron"

# Two shards became one model, four shards and two again: the same numbers.
python - "$work" <<'EOF'
import sys
import torch

for n in (0, 1):
    first, last = (torch.load(f"{sys.argv[1]}/{d}/consolidated.{n:02d}.pth", weights_only=True) for d in ("meta", "meta2"))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
print("the shards are the same after three conversions")
EOF
