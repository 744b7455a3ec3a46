#!/bin/sh
# A Hugging Face model to Megatron-Core for training, to other ranks and virtual stages, and back.
# Usage: examples/megatron_mcore.sh MODEL WORK   (MODEL: a directory or the name of a model on the Hugging Face hub;
# WORK: is made, and must not exist; TP and PP from the environment, 2 and 2 without)
set -eu
model=$1 work=$2 tp=${TP:-2} pp=${PP:-2}
mkdir "$work"
convert="python -m ckptconv --no-progress --verify"

$convert --load-dir "$model" --saver megatron_mcore --save-dir "$work/start" --target-tp "$tp" --target-pp "$pp"
echo "train with: --load $work/start --finetune and these flags:"
grep -v '^#' "$work/start/megatron_args.txt"

# Two virtual pipeline stages on each stage, in the default format of Megatron-LM, and as one rank.
$convert --load-dir "$work/start" --saver megatron_mcore --save-dir "$work/virtual" --target-tp "$tp" --target-pp "$pp" \
    --num-virtual-stages-per-pipeline-rank 2
$convert --load-dir "$work/virtual" --saver megatron_dist --save-dir "$work/dist"
$convert --load-dir "$work/dist" --saver hf --save-dir "$work/hf"
