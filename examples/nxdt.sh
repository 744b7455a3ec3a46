#!/usr/bin/env bash
# Hugging Face -> NxD Training (AWS Neuron) -> Hugging Face. Adapt the settings; sizes must suit the training config.
set -euo pipefail

source=${1:?usage: nxdt.sh HF_DIRECTORY OUTPUT_DIRECTORY}
out=${2:?usage: nxdt.sh HF_DIRECTORY OUTPUT_DIRECTORY}
tp=8 pp=1 backend=trn1
copies=1          # kv_replicator: tp divides the kv heads, or tp = kv heads x copies
style=hf          # or megatron
# Or leave all of the above to the training config: --nxdt_yaml_config hf_llama3_8B_config.yaml

ckptconv --loader hf --saver nxdt --load-dir "$source" --save-dir "$out" --model_style "$style" --hw_backend "$backend" \
  --tp_size "$tp" --pp_size "$pp" --kv_size_multiplier "$copies" --qkv_linear True --fuse_qkv True --save_xser True \
  --verify
# Train with resume_from_checkpoint: $out and weight_init_only: True. The way back, from the trainer's folder STEP.ckpt
# (its config.json has to be named, here it lies in $out/hf):
ckptconv --loader nxdt --saver hf --load-dir "$out" --save-dir "$out-hf" --hw_backend "$backend" \
  --config "$out/hf/config.json"
