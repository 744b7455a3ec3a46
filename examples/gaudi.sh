#!/bin/sh
# From a Hugging Face model to Intel Gaudi's Megatron-LM, and back after training.
# Usage: examples/gaudi.sh HF_MODEL TYPE DIRECTORY   TYPE: llama2, llama3, llama3.1 or mixtral
#        (DIRECTORY is made, and must not exist)
set -eu
model=$1 type=$2 work=$3
mkdir "$work"

ckptconv --no-progress --verify --bf16 --load-dir "$model" --saver megatron_gaudi \
  --target-tensor-parallel-size 2 --target-pipeline-parallel-size 1 --save-dir "$work/megatron"

# What the fork's convert_mlm_to_hf_checkpoint.py does; for Mixtral with capacity bins add --save-capacity-bins.
ckptconv --no-progress --verify --loader megatron_gaudi --saver hf --ckpt-dir-name iter_0000001 \
  --target-params-dtype bf16 --source-model-type "$type" --load-path "$work/megatron" --save-path "$work/hf"

# The way back once more, with the args of the training it came from.
ckptconv --no-progress --bf16 --load-dir "$work/hf" --saver megatron_gaudi \
  --source-margs-file "$work/hf/source_megatron_args.json" --target-tensor-parallel-size 1 --save-dir "$work/again"
