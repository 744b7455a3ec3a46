#!/bin/sh
# A tiny Llama 2 into EPFL's Megatron-LLM, over ranks and back, with the command lines of its own tools.
# Usage: examples/megatron_llm.sh DIRECTORY   (is made, and must not exist)
set -eu
work=$1
mkdir "$work"

# What a hub has: config.json and weights, here random ones.
python - "$work/llama" <<'EOF'
import json, os, sys
import torch
from safetensors.torch import save_file

out, h, f, v, layers, heads, groups = sys.argv[1], 64, 160, 200, 4, 8, 4
os.makedirs(out)
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h, "intermediate_size": f,
    "vocab_size": v, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
with open(f"{out}/config.json", "w") as file:
    json.dump(config, file)
kv = h // heads * groups
layer = {
    "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
    "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
    "input_layernorm": (h,), "post_attention_layernorm": (h,),
}
names = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
names |= {"model.embed_tokens": (v, h), "model.norm": (h,), "lm_head": (v, h)}
save_file({f"{n}.weight": torch.randn(s).bfloat16() for n, s in names.items()}, f"{out}/model.safetensors")
EOF

ckptconv="python -m ckptconv"
$ckptconv hf_to_megatron codellama --model-path "$work/llama" --out "$work/release" --no-progress
$ckptconv checkpoint_util --model_type codellama --load_dir "$work/release" --save_dir "$work/tp2pp2" \
    --target_tensor_parallel_size 2 --target_pipeline_parallel_size 2 --no-progress --verify
$ckptconv megatron_to_hf --model codellama --input_dir "$work/tp2pp2" --output_dir "$work/back" --num_output_shards 3 \
    --no-progress

# Theta, epsilon and kv heads have come through, and every weight.
python - "$work" <<'EOF'
import json, pathlib, sys
import torch
from safetensors.torch import load_file

first, last = (pathlib.Path(sys.argv[1], name) for name in ("llama", "back"))
one, other = (json.loads((folder / "config.json").read_text()) for folder in (first, last))
assert all(other[key] == value for key, value in one.items())
weights = [{n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()} for folder in (first, last)]
assert weights[0].keys() == weights[1].keys() and all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())
assert len(list(last.glob("*.safetensors"))) == 3
print("every weight is the same after three conversions")
EOF
