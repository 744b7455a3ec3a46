#!/bin/sh
# A tiny Llama from Hugging Face's format to Megatron's torch_dist and back, and from torch_dist to rank files.
# Usage: examples/megatron_dist.sh DIRECTORY   (is made, and must not exist)
set -eu
work=$1
mkdir "$work"

# What is on the hub: config.json and model.safetensors, here of random numbers.
python - "$work/hf" <<'EOF'
import json, os, sys
import torch
from safetensors.torch import save_file

out, h, f, v, layers, heads = sys.argv[1], 64, 128, 128, 2, 4
os.makedirs(out)
config = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_size": h,
    "intermediate_size": f, "vocab_size": v, "num_hidden_layers": layers, "num_attention_heads": heads,
    "num_key_value_heads": heads, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False,
}
shapes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (h, h), "self_attn.v_proj": (h, h), "self_attn.o_proj": (h, h),
          "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f), "input_layernorm": (h,),
          "post_attention_layernorm": (h,)}
model = {f"model.layers.{i}.{name}.weight": torch.randn(shape) for i in range(layers) for name, shape in shapes.items()}
model |= {"model.embed_tokens.weight": torch.randn(v, h), "model.norm.weight": torch.ones(h), "lm_head.weight": torch.randn(v, h)}
save_file({name: tensor.bfloat16() for name, tensor in model.items()}, f"{out}/model.safetensors", {"format": "pt"})
with open(f"{out}/config.json", "w") as file:
    json.dump(config, file)
EOF

convert="python -m ckptconv --no-progress --verify"
# Parallel sizes only go into the args: the files are loaded at any.
$convert --load-dir "$work/hf" --saver megatron_dist --target-tp 2 --target-pp 2 --save-dir "$work/dist"
$convert --load-dir "$work/dist" --saver hf --save-dir "$work/back"
$convert --load-dir "$work/dist" --saver megatron_mcore --target-tp 2 --save-dir "$work/ranks"

# Training goes on with the flags of megatron_args.txt:
#   torchrun ... pretrain_gpt.py $(grep -v '^#' "$work/dist/megatron_args.txt") --load "$work/dist" --finetune ...
python - "$work" <<'EOF'
import sys
import torch
from safetensors.torch import load_file

first, last = (load_file(f"{sys.argv[1]}/{name}/model.safetensors") for name in ("hf", "back"))
assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
print("the model is the same after two conversions")
EOF
