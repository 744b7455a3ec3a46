"""A loader of a third party: reads what saver_numpy.py writes. Nothing of ckptconv is imported.

    PYTHONPATH=examples/plugins ckptconv --loader numpy --saver megatron_mcore --load-dir out --save-dir mcore
"""

import argparse
import json
import os

import numpy as np
import torch

LAYER = ["input norm weight", "qkv weight", "qkv bias", "dense weight", "dense bias", "post norm weight",
         "mlp l0 weight W", "mlp l0 weight V", "mlp l0 bias W", "mlp l0 bias V", "mlp l1 weight", "mlp l1 bias"]


def add_arguments(parser):
    parser.add_argument_group("loader numpy")


def load_checkpoint(queue, args):
    with open(os.path.join(args.load_dir, "sizes.json")) as file:
        sizes = json.load(file)
    dtype = getattr(torch, sizes.pop("params_dtype").removeprefix("torch."))
    arguments = argparse.Namespace(norm_epsilon=sizes.pop("norm_epsilon"), rotary_base=sizes.pop("rotary_base"),
                                   kv_channels=sizes["kv_channels"])
    queue.put(argparse.Namespace(
        **sizes, model_type="GPT", iteration=1, params_dtype=dtype, tokenizer_type="HuggingFaceTokenizer",
        bert_binary_head=False, position_embedding_type="rope", true_vocab_size=None, checkpoint_args=arguments,
        make_vocab_size_divisible_by=None, consumed_train_samples=0, consumed_valid_samples=0,
        previous_tensor_parallel_size=1, previous_pipeline_parallel_size=1,
    ))  # fmt: skip

    def send(name, keys):
        message = {"name": name}
        for key in keys:
            path = os.path.join(args.load_dir, f"{name}.{key}.npy".replace(" ", "_"))
            if os.path.exists(path):
                message[key] = torch.from_numpy(np.load(path)).to(dtype)
        queue.put(message)

    send("embeddings", ["word embeddings"])
    for layer in range(sizes["num_layers"]):
        send(f"transformer layer {layer}", LAYER)
    send("final norm", ["weight"])
    if sizes["output_layer"]:
        send("output layer", ["weight"])
    queue.put("done")
