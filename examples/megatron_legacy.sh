#!/bin/sh
# A tiny GPT of 2019, as NVIDIA's first releases are, to Hugging Face's format, to today's legacy models and to
# Megatron-Core.
# Usage: examples/megatron_legacy.sh DIRECTORY   (is made, and must not exist)
set -eu
work=$1
mkdir "$work"

# No args, no checkpoint_version, old names, and in the qkv of each rank all queries, then all keys, then all values.
python - "$work/gpt2" <<'EOF'
import os, sys
import torch

out, h, f, v, s, layers, tp = sys.argv[1], 64, 256, 128, 32, 4, 2
position = torch.randn(s, h)
norms = {f"layers.{i}.{name}": torch.ones(h) for i in range(layers) for name in ("input_layernorm", "post_attention_layernorm")}
norms["final_layernorm"] = torch.ones(h)
wide = {f"layers.{i}.{name}": torch.randn(h) for i in range(layers) for name in ("attention.dense", "mlp.dense_4h_to_h")}
for t in range(tp):
    linears = {}
    for i in range(layers):
        linears[f"layers.{i}.attention.query_key_value"] = torch.randn(3 * h // tp, h), torch.randn(3 * h // tp)
        linears[f"layers.{i}.mlp.dense_h_to_4h"] = torch.randn(f // tp, h), torch.randn(f // tp)
        linears[f"layers.{i}.attention.dense"] = torch.randn(h, h // tp), wide[f"layers.{i}.attention.dense"]
        linears[f"layers.{i}.mlp.dense_4h_to_h"] = torch.randn(h, f // tp), wide[f"layers.{i}.mlp.dense_4h_to_h"]
    block = {f"{name}.{kind}": norm * (kind == "weight") for name, norm in norms.items() for kind in ("weight", "bias")}
    block |= {f"{name}.{kind}": one for name, pair in linears.items() for kind, one in zip(("weight", "bias"), pair)}
    embedding = {"word_embeddings": {"weight": torch.randn(v // tp, h)}, "position_embeddings": {"weight": position}}
    os.makedirs(f"{out}/release/mp_rank_{t:02d}")
    model = {"language_model": {"embedding": embedding, "transformer": block}}
    torch.save({"iteration": 0, "model": model}, f"{out}/release/mp_rank_{t:02d}/model_optim_rng.pt")
with open(f"{out}/latest_checkpointed_iteration.txt", "w") as file:
    file.write("release")
EOF

convert="python -m ckptconv --no-progress --verify"
$convert --loader megatron_legacy --load-dir "$work/gpt2" --num-attention-heads 4 --true-vocab-size 100 --saver hf \
  --save-dir "$work/hf"
$convert --load-dir "$work/hf" --saver megatron_legacy --target-tp 2 --target-pp 2 --save-dir "$work/legacy"
$convert --load-dir "$work/legacy" --saver megatron_mcore --target-tp 4 --save-dir "$work/core"
$convert --load-dir "$work/core" --saver hf --save-dir "$work/again"
cat "$work/legacy/megatron_args.txt"

python - "$work" <<'EOF'
import glob, sys
from safetensors.torch import load_file

one, two = ({k: v for f in glob.glob(f"{sys.argv[1]}/{d}/*.safetensors") for k, v in load_file(f).items()} for d in ("hf", "again"))
assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
print("the weights are the same after three conversions")
EOF
