#!/bin/sh
# From a Hugging Face model to MindSpore Transformers, and from there to Megatron-Core and back.
# Usage: examples/mindspore.sh HF_MODEL DIRECTORY   (DIRECTORY is made, and must not exist)
set -eu
model=$1 work=$2
mkdir "$work"

convert="ckptconv --no-progress --verify"
# For mindformers from r1.7.0 on (use_interleaved_weight_layout_mlp: True); contiguous for r1.6.0.
$convert --load-dir "$model" --saver mindspore --bf16 --ms-fc1-layout interleaved --save-dir "$work/ms"

# What is written here says how it is laid out. A checkpoint that was trained does not: then give
#   --loader core_mf --ms-fc1-layout interleaved --ms-qkv-layout grouped --ms-config DIR_WITH_CONFIG_JSON
$convert --load-dir "$work/ms" --saver megatron_mcore --target-tensor-parallel-size 1 --save-dir "$work/megatron"
$convert --load-dir "$work/ms" --saver hf --save-dir "$work/hf"

# Into the other layout.
$convert --load-dir "$work/ms" --saver mindspore --target-ms-fc1-layout contiguous --save-dir "$work/ms_contiguous"
