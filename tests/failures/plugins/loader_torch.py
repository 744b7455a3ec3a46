"""A loader as others write them: Megatron's metadata fields, and torch tensors made on the spot from a seed."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from types import SimpleNamespace
from typing import Any


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--ffn", type=int, default=176)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--say", default="", help="a word instead of the layer in the middle")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    import torch

    h, f, v, heads = args.hidden, args.ffn, args.vocabulary, 8

    def tensor(*shape: int) -> torch.Tensor:
        return torch.full(shape, 1.0 + args.seed, dtype=torch.bfloat16)

    queue.put(
        SimpleNamespace(
            model_type="GPT", num_layers=args.layers, hidden_size=h, seq_length=1024, num_attention_heads=heads,
            max_position_embeddings=1024, tokenizer_type="NullTokenizer", iteration=1, params_dtype=torch.bfloat16,
            output_layer=True, position_embedding_type="rope", linear_bias=False, qkv_bias=False, norm_has_bias=False,
            swiglu=True, true_vocab_size=v, make_vocab_size_divisible_by=8, checkpoint_args=None,
            previous_tensor_parallel_size=1, previous_pipeline_parallel_size=1,
        )
    )  # fmt: skip
    queue.put({"name": "embeddings", "word embeddings": tensor(v, h)})
    for layer in range(args.layers):
        if args.say and layer == args.layers // 2:
            queue.put(args.say)
            return
        queue.put({
            "name": f"transformer layer {layer}",
            "input norm weight": tensor(h),
            "qkv weight": tensor(3 * h, h),
            "dense weight": tensor(h, h),
            "post norm weight": tensor(h),
            "mlp l0 weight W": tensor(f, h),
            "mlp l0 weight V": tensor(f, h),
            "mlp l1 weight": tensor(h, f),
        })  # fmt: skip
    queue.put({"name": "final norm", "weight": tensor(h)})
    queue.put({"name": "output layer", "weight": tensor(v, h)})
    queue.put("done")
