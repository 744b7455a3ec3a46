"""Tiny Hugging Face checkpoints: config tables, random weights under the names on disk, a trained tokenizer.

Not for expected values: what a conversion has to give is said by the tests, by transformers (`logits`) or by the
system the checkpoint is for. Everything is written here without transformers, so that a checkpoint costs milliseconds;
that the names and shapes below are the right ones is proved by `logits`, which loads them strictly.

Facts: config.json and tokenizer_config.json as transformers 4.45 wrote them (flat `rope_theta` and `rope_scaling`);
names as in modeling_llama.py, modeling_mistral.py and modeling_qwen2.py of the same release.

Shape legend: h hidden, f ffn, a query heads, g kv heads, d head dim, v vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# Sizes differ from each other, so that a tensor of the wrong kind has the wrong shape; only h = a * d, where the config
# does not say head_dim. Whatever tensor parallelism cuts divides by 4, except the vocabulary, which is prime.
BASE: dict[str, Any] = {
    "hidden_act": "silu",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "transformers_version": "4.45.2",
}
LLAMA = BASE | {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
}
LLAMA3 = LLAMA | {"rope_theta": 500000.0, "max_position_embeddings": 8192}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN2 = BASE | {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_dropout": 0.0,
    # As on the hub: a window that is not used.
    "sliding_window": 8,
    "use_sliding_window": False,
    "max_window_layers": 4,
    "tie_word_embeddings": False,
}

#: Name -> config.json, less `architectures` and `torch_dtype`.
FIXTURES: dict[str, dict[str, Any]] = {
    # The first Llama said neither kv heads nor theta nor biases: MHA, 10000, none.
    "llama1": BASE
    | {"model_type": "llama", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "llama2": LLAMA,
    "llama_mqa": LLAMA | {"num_key_value_heads": 1},
    "llama3": LLAMA3,
    "llama31": LLAMA3 | {"max_position_embeddings": 131072, "rope_scaling": LLAMA3_ROPE, "eos_token_id": [2, 3, 4]},
    "llama32": LLAMA3
    | {
        "max_position_embeddings": 131072,
        "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "codellama": LLAMA | {"rope_theta": 1000000.0, "vocab_size": 137, "max_position_embeddings": 16384},
    "llama_attention_bias": LLAMA | {"attention_bias": True},
    "llama_mlp_bias": LLAMA | {"mlp_bias": True},
    "llama_both_bias": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama_linear_rope": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": BASE
    | {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 8,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    },
    "qwen2": QWEN2,
    "qwen2_tied": QWEN2 | {"tie_word_embeddings": True},
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
#: model_type -> names and shapes on disk, for models that `shapes` below does not know. Modules fixtures_*.py add
#: theirs: each has FIXTURES, ARCHITECTURES and SHAPES of its own, with the same meaning.
SHAPES: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, Shape]]]] = {}
#: model_type -> what norm weights lie around, where that is not 1; modules may have their own, too.
CENTRES: dict[str, float] = {}
#: End of a name -> the tensor it repeats (layers of multi-token prediction have copies of both).
COPIES = {".embed_tokens.weight": "model.embed_tokens.weight", ".shared_head.head.weight": "lm_head.weight"}
for _name in sorted(path.stem for path in Path(__file__).parent.glob("fixtures_*.py")):
    _module = importlib.import_module(_name)
    FIXTURES |= _module.FIXTURES
    ARCHITECTURES |= _module.ARCHITECTURES
    SHAPES |= _module.SHAPES
    CENTRES |= getattr(_module, "CENTRES", {})


def config(name: str, dtype: str = "float32", **overrides: Any) -> dict[str, Any]:
    """The config.json of a fixture."""
    data = FIXTURES[name] | overrides
    return {"architectures": [ARCHITECTURES[data["model_type"]]], **data, "torch_dtype": dtype}


def shapes(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor on disk. A tied model has no `lm_head.weight` there."""
    if c["model_type"] in SHAPES:
        yield from SHAPES[c["model_type"]](c)
        return
    h, f, v, a = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_attention_heads"]
    g, d = c.get("num_key_value_heads") or a, c.get("head_dim") or h // a
    qkv_bias = c["model_type"] == "qwen2" or bool(c.get("attention_bias"))
    linears = (
        ("self_attn.q_proj", (a * d, h), qkv_bias),
        ("self_attn.k_proj", (g * d, h), qkv_bias),
        ("self_attn.v_proj", (g * d, h), qkv_bias),
        ("self_attn.o_proj", (h, a * d), bool(c.get("attention_bias"))),
        ("mlp.gate_proj", (f, h), bool(c.get("mlp_bias"))),
        ("mlp.up_proj", (f, h), bool(c.get("mlp_bias"))),
        ("mlp.down_proj", (h, f), bool(c.get("mlp_bias"))),
    )
    yield "model.embed_tokens.weight", (v, h)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for linear, shape, bias in linears:
            yield f"{layer}{linear}.weight", shape
            if bias:
                yield f"{layer}{linear}.bias", shape[:1]
        yield f"{layer}input_layernorm.weight", (h,)
        yield f"{layer}post_attention_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


def tensors(name: str, c: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights that leave nothing at its neutral value: norms around 1, biases around 0, logits of order 1.

    Each tensor has a seed of its own (fixture and key), so a change of one config field leaves the others as they were.
    """
    import torch

    out = {}
    for key, shape in shapes(c):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {key}".encode())))
        if len(shape) == 2:
            value = noise / shape[1] ** 0.5
        elif key.endswith(".weight"):  # of a norm
            value = CENTRES.get(c["model_type"], 1.0) + 0.2 * noise
        else:
            value = 0.2 * noise
        # The correction of expert scores is in fp32 whatever the model is in.
        out[key] = value.to(torch.float32 if key.endswith("correction_bias") else getattr(torch, c["torch_dtype"]))
    for key in out:
        repeated = next((name for ending, name in COPIES.items() if key.endswith(ending) and key != name), None)
        if repeated in out:
            out[key] = out[repeated].clone()
    return out


def build(
    name: str,
    directory: str | Path,
    dtype: str = "float32",
    tokenizer: bool = True,
    max_shard_size: int | None = None,
    **overrides: Any,
) -> Path:
    """Write fixture `name` to `directory` and return it. `max_shard_size` is in bytes; overrides are config fields."""
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    c = config(name, dtype, **overrides)
    _write(out / "config.json", c)
    _write(out / "generation_config.json", {k: c[k] for k in ("bos_token_id", "eos_token_id", "transformers_version")})
    _weights(out, tensors(name, c), max_shard_size)
    if tokenizer:
        for file, data in tokenizer_files(c["vocab_size"]).items():
            (out / file).write_bytes(data)
    return out


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _weights(out: Path, weights: dict[str, torch.Tensor], max_shard_size: int | None) -> None:
    """One model.safetensors, or with `max_shard_size` numbered files of at most so many bytes and their index."""
    from safetensors.torch import save_file

    size = {key: t.numel() * t.element_size() for key, t in weights.items()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for key, tensor in weights.items():
        full = max_shard_size is not None and sum(size[k] for k in shards[-1]) + size[key] > max_shard_size
        if full and shards[-1]:
            shards.append({})
        shards[-1][key] = tensor
    if max_shard_size is None:
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        return
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, {"format": "pt"})
        place |= dict.fromkeys(shard, file)
    _write(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": sum(size.values())}, "weight_map": dict(sorted(place.items()))},
    )


SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "hello world, this is a tiny corpus about checkpoints and the shards they are cut into",
    "converting weights between formats should be exact, quick and dull",
    "numbers such as 0 1 2 3 4 5 6 7 8 9 stand alone",
    "query, key and value heads are grouped; rows go where the ranks want them",
)


@functools.cache
def tokenizer_files(vocab_size: int) -> dict[str, bytes]:
    """File name -> content of a Llama 2 style tokenizer of at most `vocab_size` pieces (byte fallback from 300 up)."""
    import sentencepiece

    model = io.BytesIO()
    byte_fallback = vocab_size >= 300  # 256 pieces are bytes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=byte_fallback,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {"content": content, **flags, "special": True} for i, content in enumerate(special.values())
        },
        **special,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    special_tokens_map = {key: {"content": content, **flags} for key, content in special.items()}
    return {
        "tokenizer.model": model.getvalue(),
        "tokenizer.json": _fast(model.getvalue(), byte_fallback).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
        "special_tokens_map.json": json.dumps(special_tokens_map, indent=2).encode(),
    }


def _fast(model: bytes, byte_fallback: bool) -> str:
    """tokenizer.json with the ids of a sentencepiece BPE model.

    A sentencepiece BPE model lists pieces by score, not merges. Every way to make a piece from two others is a merge,
    and its rank is that of the piece it makes.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    ordinary = [p for p, i in ids.items() if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(ordinary, key=lambda p: -pieces.get_score(ids[p]))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    fast = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    fast.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return fast.to_str(pretty=True)


def load(directory: str | Path) -> Any:
    """transformers' model of a directory, in fp32, of the class in config.json.

    Raises AssertionError if a tensor is missing, left over or of another shape: transformers would only warn.
    """
    import torch
    import transformers

    c = json.loads((Path(directory) / "config.json").read_text())
    kind: Any = getattr(transformers, c["architectures"][0])
    # Kimi-K2 is a DeepSeek-V3 under another name, which transformers does not know.
    known = kind.config_class.model_type
    own = {} if c["model_type"] != "kimi_k2" else {"config": kind.config_class.from_dict(c | {"model_type": known})}
    loaded: Any = kind.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **own
    )
    model, report = loaded
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    # transformers leaves multi-token prediction out, but says so for the sizes of the released models only.
    further = tuple(
        f"model.layers.{model.config.num_hidden_layers + n}."
        for n in range(getattr(model.config, "num_nextn_predict_layers", None) or 0)
    )
    left = [key for key in problems.pop("unexpected_keys", []) if not key.startswith(further or ("\0",))]
    problems |= {"unexpected_keys": left} if left else {}
    assert not problems, f"{directory}: {problems}"
    for parameter in model.parameters():  # mapped from a file, where alignment decides how products are summed
        parameter.data = parameter.data.clone()
    return model.eval()


def logits(directory: str | Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes for a directory in fp32: [b, s] token ids -> [b, s, v].

    The class is that in config.json; a decoder behind an encoder is given the tokens backwards, and what a model
    without a head computes is its hidden state. Raises AssertionError as `load` does.
    """
    import torch

    model = load(directory)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})}
    model.config.use_cache = False
    with torch.no_grad():
        found = model(**inputs)
    names = ("logits", "prediction_logits", "last_hidden_state")
    out: torch.Tensor = next(found[name] for name in names if name in found)
    return out


def mtp_logits(directory: str | Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers' own MTP layer, which it loads for speculative decoding, computes from [b, s]: [b, s, v].

    Its input at a position is the hidden state there and the next token, which after the last is token 0.
    """
    import torch
    from transformers.modeling_layers import MtpModel

    model = load(directory)
    # Which names are MTP's is only known for the sizes of the released models.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\."]
    further: Any = MtpModel.from_pretrained(model)
    following = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
    positions = torch.arange(1, ids.shape[1] + 1)[None]
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        out: torch.Tensor = model.lm_head(further.eval().forward_layer(0, hidden, positions, None, input_ids=following))
    return out
