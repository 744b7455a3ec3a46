"""A saver of a third party: the model as one .npy file per tensor and a sizes.json. Nothing of ckptconv is imported.

    PYTHONPATH=examples/plugins ckptconv --saver numpy --load-dir llama --save-dir out
"""

import json
import os

import numpy as np
import torch

#: What sizes.json can tell of; a model with any other tensor is refused instead of saved in part.
KEYS = {"word embeddings", "input norm weight", "qkv weight", "qkv bias", "dense weight", "dense bias",
        "post norm weight", "mlp l0 weight W", "mlp l0 weight V", "mlp l0 bias W", "mlp l0 bias V", "mlp l1 weight",
        "mlp l1 bias", "weight"}  # fmt: skip


def add_arguments(parser):
    group = parser.add_argument_group("saver numpy")
    group.add_argument("--numpy-dtype", choices=("float32", "float16"), default="float32", help="type of the files")


def save_checkpoint(queue, args):
    metadata = queue.get()  # an argparse.Namespace
    os.makedirs(args.save_dir, exist_ok=True)
    sizes = {k: getattr(metadata, k) for k in (
        "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "seq_length",
        "max_position_embeddings", "output_layer", "qkv_bias", "linear_bias", "norm_has_bias", "swiglu",
    )}  # fmt: skip
    sizes["params_dtype"] = str(metadata.params_dtype)  # numpy has no bfloat16: the files are wider
    sizes["norm_epsilon"] = metadata.checkpoint_args.norm_epsilon
    sizes["rotary_base"] = metadata.checkpoint_args.rotary_base
    while True:
        message = queue.get()
        if message == "done":
            break
        if message == "exit":
            raise SystemExit(1)
        name = message.pop("name")
        if set(message) - KEYS:
            raise ValueError(f"{name} has {sorted(set(message) - KEYS)}, which sizes.json says nothing about")
        for key, tensor in message.items():  # full, unsharded CPU tensors
            file = f"{name}.{key}.npy".replace(" ", "_")
            np.save(os.path.join(args.save_dir, file), tensor.to(getattr(torch, args.numpy_dtype)).numpy())
    with open(os.path.join(args.save_dir, "sizes.json"), "w") as file:  # last: without it nothing is read back
        json.dump(sizes, file)
