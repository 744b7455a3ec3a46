"""Legacy Megatron-LM models (before megatron-core): GPT and BERT of any checkpoint version, tp, pp and virtual pp.

Args that say what the legacy models never did (another rope theta) are refused until a flag says what was meant, and
files without args, as NVIDIA's first releases are, need the number of attention heads.
"""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptconv import companions, numbers, stream
from ckptconv.containers import rankdir, torchzip
from ckptconv.errors import SourceError
from ckptconv.formats import mcore, megatron_legacy
from ckptconv.formats.table import Row
from ckptconv.lazy import LazyTensor
from ckptconv.loaders import _megatron, _rankfiles
from ckptconv.loaders._megatron import Found
from ckptconv.sharding import slot_name
from ckptconv.spec import ModelSpec


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    return _megatron.recognised(load_dir, "megatron_legacy")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    _megatron.add_arguments(parser, "megatron_legacy")
    group = parser.add_argument_group("loader megatron_legacy, where its files do not tell")
    group.add_argument("--num-attention-heads", type=numbers.positive, metavar="N",
                       help="of a model whose files have no args")  # fmt: skip
    group.add_argument("--rotary-base", type=numbers.positive, metavar="N",
                       help="what the code that trained it took, where its args have another than 10000")  # fmt: skip


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError."""
    top = Path(args.load_dir)
    directory, iteration = rankdir.find_iteration(top, args.iteration)
    paths, said = rankdir.rank_files(directory, needs_args=False)
    first = str(paths[0, 0, 0])
    found = _rankfiles.read(directory, paths, megatron_legacy.core_arguments(said), _tensors)
    names = [name.rpartition("/")[2] for there in found.tensors.values() for name in there]
    bert = megatron_legacy.is_bert(names)
    if not said:
        # Transformers' converter of the same files takes the exact GELU for BERT, Megatron-LM's default for GPT.
        found.arguments |= _arguments(args, found, first) | ({"bias_gelu_fusion": False} if bert else {})
    found.arguments.setdefault("padded_vocab_size", _rows(found, "language_model.embedding.word_embeddings.weight"))
    # What we wrote says more than legacy code can be told where the user allowed it.
    ours = (directory / companions.PROVENANCE).is_file()
    found.arguments |= _rotary(args, directory, found.arguments, ours)
    reasons = megatron_legacy.unsupported(said)
    if reasons and not ours:
        raise SourceError(f"{first}: its args describe a model that is not supported: {'; '.join(reasons)}.")
    found.called = functools.partial(megatron_legacy.called, block="encoder." if bert else "decoder.")
    found.head_activation = "gelu_tanh" if said.get("openai_gelu") else "gelu"
    found.table = functools.partial(_table, first)
    stream.send(queue, _megatron.Source(args, "megatron_legacy", top, directory, iteration, found))


def _tensors(path: Path, model: dict[Any, Any], found: Found, chunk: int | None) -> dict[str, LazyTensor]:
    """The tensors of a virtual stage by slot, under the newest names."""
    tensors: dict[str, LazyTensor] = {}
    for name, value in megatron_legacy.flat(model):
        foreign = next((what for mark, what in megatron_legacy.FOREIGN.items() if mark in name), None)
        rule = next((rule for rule in mcore.IGNORE if name.endswith(rule.suffix)), None)
        if foreign:
            raise SourceError(f"{path}: holds {name}: {foreign}, which this loader does not read.")
        if rule:
            found.ignored["*" + rule.suffix] = rule.reason
        elif not isinstance(value, LazyTensor):
            raise SourceError(f"{path}: {name} is a {type(value).__name__}, expected a tensor.")
        elif slot_name(chunk, name) in tensors:
            raise SourceError(f"{path}: holds {name} twice, in an older and a newer spelling.")
        else:
            tensors[slot_name(chunk, name)] = value
    return tensors


def _table(path: str, spec: ModelSpec) -> tuple[Row, ...]:
    """The rows for the file's checkpoint version. Raises SourceError."""
    root = torchzip.read(path)
    said = root.get("checkpoint_version", 0) if isinstance(root, dict) else 0
    if not isinstance(said, (int, float)) or (said < 2 and said not in (0, 1)):
        raise SourceError(f"{path}: its checkpoint_version is {said!r}, expected 0, 1 or from 2 on.")
    if said < 2 and spec.num_query_groups != spec.num_attention_heads:
        raise SourceError(
            f"{path}: its checkpoint_version is {said}, but {spec.num_attention_heads} heads share "
            f"{spec.num_query_groups} query groups, which came after version 3. Args of another checkpoint?"
        )
    return megatron_legacy.table(int(said), spec.kv_channels)


def _rows(found: Found, name: str) -> int:
    """Rows of an embedding on all ranks; 0 where there is none."""
    tensor = found.tensors[0, 0, 0].get(slot_name(0 if found.vpp > 1 else None, name))
    return tensor.shape[0] * found.sizes[0] if tensor else 0


def _arguments(args: Namespace, found: Found, path: str) -> dict[str, Any]:
    """The args of a model whose files have none: Megatron-LM's defaults, and the tensors' sizes. Raises SourceError."""
    heads = getattr(args, "num_attention_heads", None)
    if heads is None:
        raise SourceError(
            f"{path}: has no args. Give --num-attention-heads (16 for NVIDIA's gpt2_345m and bert_345m, which have "
            "none); the rest is taken from the tensors and Megatron-LM's defaults. --loader megatron_legacy has the "
            "flag."
        )
    shapes: Mapping[str, tuple[int, ...]] = {
        name.rpartition("/")[2]: tensor.shape for there in found.tensors.values() for name, tensor in there.items()
    }
    fc2 = shapes.get("language_model.encoder.layers.0.mlp.dense_4h_to_h.weight", (0, 0))
    positions = shapes.get("language_model.embedding.position_embeddings.weight", (0,))
    layers = {
        (rank[1], name.split(".layers.")[0], name.split(".layers.")[1].split(".")[0])
        for rank, there in found.tensors.items() for name in there if ".layers." in name
    }  # fmt: skip
    return {
        "num_layers": len(layers),
        "hidden_size": fc2[0],
        "ffn_hidden_size": fc2[-1] * found.sizes[0],
        "num_attention_heads": heads,
        "max_position_embeddings": positions[0],
    }


def _rotary(args: Namespace, directory: Path, said: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    """The rope theta, where the args have one that the legacy models did not read. Raises SourceError."""
    base, told = said.get("rotary_base"), getattr(args, "rotary_base", None)
    rotary = said.get("position_embedding_type") == "rope" or said.get("use_rotary_position_embeddings")
    if told is not None:
        return {"rotary_base": told}
    if not rotary or base in (None, megatron_legacy.ROPE_THETA) or ours:
        return {}
    raise SourceError(
        f"{directory}: its args say rotary_base {base}, but Megatron-LM's legacy models have 10000 whatever the args "
        f"say. Give --rotary-base {base} if it was trained by code that knew it, or --rotary-base 10000."
    )
