"""Logits of checkpoints in any format. Expected values: transformers' own models, in fp32."""

from __future__ import annotations

import dataclasses
import functools
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import streams
import torch
from streams import IDS, logits

import fixtures
from ckptconv import forward, lazy
from ckptconv.errors import CkptconvError, ProtocolError, TableError, UsageError
from ckptconv.forward import mlp, weights
from ckptconv.forward.attention import alibi_slopes
from ckptconv.incoming import Stream, arguments
from ckptconv.lazy import LazyTensor, Literal
from ckptconv.plugins import Plugin
from ckptconv.spec import MLA, ModelSpec, MoE, Rope
from commands import convert

Hf = Callable[..., Path]
Config = dict[str, Any]

#: Beside other kernels, sums in another order. (What is promised is 1e-4.)
TOLERANCE = 2e-5
#: What no decoder is, and what is said of it.
REFUSED = {"bert": "no decoder", "megatron-bert": "no decoder", "t5": "has an encoder"}
DECODERS = [name for name, c in fixtures.FIXTURES.items() if c["model_type"] not in REFUSED]


@functools.cache
def theirs(place: Path) -> torch.Tensor:
    """transformers' logits [s, v] of a directory."""
    model = fixtures.load(place)
    if model.config.model_type == "falcon":
        # With its other attention ALiBi is added to the scores, and again with the mask.
        model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    return found


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_the_logits_of_transformers(hf: Hf, name: str) -> None:
    close(logits(hf(name)), theirs(hf(name)))


@pytest.mark.parametrize("name", [name for name in fixtures.FIXTURES if name not in DECODERS])
def test_what_is_no_decoder_is_refused_by_name(hf: Hf, name: str) -> None:
    model = fixtures.FIXTURES[name]["model_type"]
    with pytest.raises(UsageError, match=f"{model.replace('-', '_')}.*{REFUSED[model]}"):
        logits(hf(name))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + n / 10 for n in range(6)],
        "long_factor": [2.0 + n for n in range(6)]}  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64},
        {"rope_scaling": fixtures.LLAMA3_ROPE | {"original_max_position_embeddings": 16}},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}},
        {"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0}},
        {"rope_scaling": YARN | {"attention_factor": 0.7}},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
        {"rope_scaling": LONG | {"original_max_position_embeddings": 16, "factor": 4.0}},
        {"rope_scaling": LONG | {"original_max_position_embeddings": 64, "factor": 4.0}},
        {"rope_scaling": LONG | {"original_max_position_embeddings": 16, "attention_factor": 1.2, "factor": 4.0}},
    ],
)
def test_rope_of_every_kind(hf: Hf, said: Config) -> None:
    """Positions are few enough for the scaling to count: the logits are not those without it."""
    place = hf("llama2", tokenizer=False, **said)
    close(logits(place), theirs(place))
    if said.get("max_position_embeddings") != 64:  # dynamic scaling begins behind them
        assert float((theirs(place) - theirs(hf("llama2"))).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama2", {"norm_epsilon": 1e-2}),
        ("llama2", {"rope": Rope(20000.0)}),
        ("llama2", {"activation": "gelu"}),
        ("gemma", {"embedding_multiplier": 1.0}),
        ("gemma", {"norm_offset": False}),
        ("gemma2", {"softmax_scale": None}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"window_layers": None}),
        ("gemma2", {"sliding_window": 7}),
        ("gemma3_text", {"local_rope": None}),
        ("glm4", {"rope": Rope(percent=0.5)}),
        ("phi3_partial", {"rope": Rope()}),
        ("gpt_oss", {"activation_clamp": None}),
        ("gpt_oss", {"gate_offset": 0.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logit_multiplier": 1.0}),
        ("smollm3", {"rope_layers": None}),
        ("nemotron", {"activation": "relu"}),
        ("pythia", {"parallel_residual": False}),
        ("dbrx", {"qkv_clip": None}),
        ("falcon_rw", {"alibi": False}),
        ("falcon_rw", {"alibi_scaled": False}),
        ("qwen2_moe", {"moe.normalize": True}),
        ("deepseek_v2", {"moe.group_score": "top2"}),
        ("deepseek_v2", {"moe.scaling_factor": 1.0}),
        ("deepseek_v3", {"moe.score": "softmax"}),
        ("deepseek_v3", {"moe.num_groups": None}),
        ("deepseek_v3", {"moe.group_score": "max"}),
        ("deepseek_v3", {"rope": Rope()}),
        ("qwen2_moe", {"moe.topk": 2}),
    ],
)
def test_every_setting_counts(hf: Hf, name: str, changes: Config) -> None:
    """Otherwise the tests above would prove nothing about it."""

    def change(spec: ModelSpec) -> ModelSpec:
        of_moe = {key[4:]: value for key, value in changes.items() if key.startswith("moe.")}
        rest = {key: value for key, value in changes.items() if not key.startswith("moe.")}
        if of_moe:
            assert spec.moe is not None
            rest["moe"] = dataclasses.replace(spec.moe, **of_moe)
        return spec.replace(**rest)

    found = streams.result(hf(name), IDS, change).logits
    assert float((found - theirs(hf(name))).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_the_norms_inside_latent_attention_have_an_epsilon_of_their_own(hf: Hf, name: str) -> None:
    place = hf(name, tokenizer=False, rms_norm_eps=1e-2)
    close(logits(place), theirs(place))


def test_groups_scored_by_their_best_expert(hf: Hf) -> None:
    """With more experts than groups are chosen: fewer are always of the best groups."""
    place = hf("deepseek_v2", tokenizer=False, num_experts_per_tok=3)
    close(logits(place), theirs(place))


@pytest.mark.parametrize(
    ("name", "changes", "left"),
    [
        ("gpt_oss", {"sinks": False}, "attention sinks"),
        ("gemma3_text", {"qk_norm": None}, "q norm weight, k norm weight"),
        ("gemma2", {"norms": "pre"}, "attention output norm weight, mlp output norm weight"),
        ("gpt2", {"learned_positions": False}, "position embeddings"),
    ],
)
def test_a_tensor_without_a_part_in_it_is_an_error(hf: Hf, name: str, changes: Config, left: str) -> None:
    """A key that a later version of the messages has, and this does not know, must not be passed over."""
    with pytest.raises(TableError, match=f"{left}, for which `logits` has no rule"):
        streams.result(hf(name), IDS, lambda spec: spec.replace(**changes))


#: Fields that have no part in the computation of a decoder.
NO_PART = {"dtype", "hidden_size", "ffn_hidden_size", "seq_length", "norm_bias", "qkv_bias", "dense_bias", "mlp_bias",
           "position_offset", "mtp_layers", "head_activation", "binary_head", "pooler", "relative_buckets",
           "relative_distance", "layers", "router_bias", "router_fp32", "num_layers"}  # fmt: skip


def test_every_field_of_a_spec_is_used_or_known_to_have_no_part() -> None:
    """Whoever adds a property of models is led here: logits that pass over it would be another model's."""
    folder = Path(forward.__file__).parent
    used = set(re.findall(r"\.(\w+)", "".join(path.read_text() for path in folder.glob("*.py"))))
    fields = {field.name for kind in (ModelSpec, MoE, MLA, Rope) for field in dataclasses.fields(kind)}
    assert fields - used - NO_PART == set()
    assert fields >= NO_PART


# Other formats: the same bits


@pytest.mark.parametrize(
    ("name", "saver", "flags"),
    [
        ("llama2", "megatron_mcore", ("--target-tp", 2, "--target-pp", 2)),
        ("llama2", "megatron_dist", ()),
        ("llama2", "megatron_legacy", ("--target-tp", 2)),
        ("llama2", "megatron_llm", ("--target-tp", 2)),
        ("llama2", "megatron_gaudi", ("--target-tp", 2)),
        ("llama2", "nxdt", ()),
        ("llama2", "mindspore", ()),
        ("llama2", "meta", ()),
        ("llama32", "megatron_mcore", ("--target-tp", 4)),
        ("gpt2", "megatron_mcore", ("--target-tp", 2, "--target-pp", 2)),
        ("qwen2_moe", "megatron_mcore", ("--target-tp", 2, "--target-ep", 2)),
        ("deepseek_v3_mtp", "megatron_mcore", ("--target-ep", 3, "--target-pp", 2)),
        ("gpt_oss", "megatron_mcore", ("--target-ep", 2)),
    ],
)
def test_the_same_bits_from_every_format(hf: Hf, tmp_path: Path, name: str, saver: str, flags: Any) -> None:
    source = hf(name, dtype="bfloat16")
    there = convert(source, tmp_path / "there", saver, *flags)
    assert torch.equal(logits(there), logits(source))


def test_quantised_sources(hf: Hf, tmp_path: Path) -> None:
    """Those of fp8, dequantised as they are read, are those of what transformers would load."""
    source = hf("deepseek_v3", dtype="bfloat16", tokenizer=False)
    coded = convert(source, tmp_path / "fp8", "hf", "--quantize", "fp8")
    plain = convert(coded, tmp_path / "plain", "hf", "--dtype", "bf16")
    assert torch.equal(logits(coded), logits(plain))
    assert not torch.equal(logits(coded), logits(source))
    close(logits(plain), theirs(plain))


# Loaders of others: real tensors, in memory that they take back


@pytest.mark.parametrize("name", ["llama2", "llama32", "gemma2", "gpt2", "deepseek_v3_mtp"])
def test_a_loader_of_others(hf: Hf, name: str) -> None:
    assert torch.equal(streams.of_others(*streams.messages(hf(name))), logits(hf(name)))


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v3_mtp", "mixtral"])
def test_experts_in_messages_of_their_own(hf: Hf, name: str) -> None:
    spec, items = streams.messages(hf(name))
    close(streams.of_others(spec, list(streams.sliced(items, 4))), logits(hf(name)))


def test_norms_behind_experts_that_come_in_slices() -> None:
    """What lies in the memory of the layer's first message is still read when that has gone back."""
    moe = MoE(num_experts=4, topk=2, ffn_hidden_size=8, layers=(1, 1))
    spec = ModelSpec("", 2, 16, 8, 2, 1, 8, 131, 64, 64, "float32", norms="sandwich", moe=moe)
    items = random(spec)
    whole, slices = (streams.of_others(spec, sent) for sent in (items, list(streams.sliced(items, 1))))
    close(slices, whole)


def test_an_output_layer_that_comes_early(hf: Hf) -> None:
    spec, items = streams.messages(hf("llama2"))
    early = [items[0], items[-1], *items[1:-1]]
    assert early[1]["name"] == "output layer"
    assert torch.equal(streams.of_others(spec, early, head_first=True), logits(hf("llama2")))


def random(spec: ModelSpec) -> list[streams.Item]:
    from ckptconv.messages import expected

    generator = torch.Generator().manual_seed(2)
    return [
        {"name": want.name, **{key: torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5
                               for key, shape in want.shapes.items()}}
        for want in expected(spec)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [
        (lambda queue: queue.put("exit"), ProtocolError, "gave up"),
        (lambda queue: queue.put("done"), ProtocolError, "ended before sending"),
        (lambda queue: [][0], IndexError, "list index"),
        (lambda queue: exit(3), CkptconvError, r"called exit\(3\)"),
    ],
)
def test_a_loader_that_fails(hf: Hf, end: Callable[[Any], Any], kind: type[Exception], said: str) -> None:
    spec, items = streams.messages(hf("llama2"))

    def load(queue: Any, args: Namespace) -> None:
        from ckptconv.metadata import Metadata, Origin, build

        queue.put(build(Metadata(spec, Origin("", ""))))
        for item in items[:3]:
            queue.put(item)
        end(queue)

    plugin = Plugin("loader", "mine", "mine", "a test", lambda parser: None, load, False, "")
    with pytest.raises(kind, match=said), Stream(plugin, arguments(plugin, "")) as stream:
        forward.run(stream, IDS)


# Models that no family here has


def test_norms_behind_the_sums() -> None:
    """BERT's layers as a decoder: `norms` "post", where the input norm of the first layer is that of the embeddings."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    told = BertConfig(
        vocab_size=131, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=88,
        max_position_embeddings=64, is_decoder=True, attn_implementation="eager",
    )  # fmt: skip
    model = BertModel(told, add_pooling_layer=False).eval()
    for name, weight in model.named_parameters():
        weight.data = torch.randn_like(weight) * (0.2 if "LayerNorm" in name else 0.15) + ("Norm.weight" in name)
    spec = ModelSpec(
        family="", num_layers=3, hidden_size=48, ffn_hidden_size=88, num_attention_heads=4, num_query_groups=4,
        kv_channels=12, vocab_size=131, max_position_embeddings=64, seq_length=64, dtype="float32", norm="LayerNorm",
        norm_epsilon=1e-12, norms="post", activation="gelu", gated=False, qkv_bias=True, dense_bias=True, mlp_bias=True,
        rope=None, learned_positions=True,
    )  # fmt: skip
    w = dict(model.named_parameters())
    head = torch.randn(131, 48)
    tables = "embeddings.{}_embeddings.weight".format
    items: list[streams.Item] = [{
        "name": "embeddings", "word embeddings": w[tables("word")] + w[tables("token_type")][0],
        "position embeddings": w[tables("position")],
    }]  # fmt: skip
    norms = ["embeddings.LayerNorm", *(f"encoder.layer.{i}.output.LayerNorm" for i in range(3))]
    for i in range(3):
        layer = f"encoder.layer.{i}."
        qkv = [[w[f"{layer}attention.self.{x}.{kind}"].view(4, 12, -1) for x in ("query", "key", "value")]
               for kind in ("weight", "bias")]  # fmt: skip
        item = {"qkv weight": torch.cat(qkv[0], 1).reshape(-1, 48), "qkv bias": torch.cat(qkv[1], 1).reshape(-1)}
        linears = {"dense": "attention.output.dense", "mlp l0": "intermediate.dense", "mlp l1": "output.dense",
                   "post norm": "attention.output.LayerNorm"}  # fmt: skip
        item |= {f"{key} {x}": w[f"{layer}{name}.{x}"] for key, name in linears.items() for x in ("weight", "bias")}
        item |= {f"input norm {x}": w[f"{norms[i]}.{x}"] for x in ("weight", "bias")}
        items.append({"name": f"transformer layer {i}", **item})
    items.append({"name": "final norm", **{x: w[f"{norms[3]}.{x}"] for x in ("weight", "bias")}})
    items.append({"name": "output layer", "weight": head})
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).last_hidden_state[0] @ head.T
    close(streams.of_others(spec, items), wanted)


def test_alibi_as_mpt_has_it() -> None:
    """Slopes that are not scaled, for a number of heads that is no power of 2."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    told = MptConfig(d_model=48, n_heads=6, n_layers=2, max_seq_len=64, vocab_size=131)
    model = MptForCausalLM(told).eval()
    for name, weight in model.named_parameters():
        weight.data = torch.randn_like(weight) * 0.2 + ("norm" in name)
    spec = ModelSpec(
        family="", num_layers=2, hidden_size=48, ffn_hidden_size=192, num_attention_heads=6, num_query_groups=6,
        kv_channels=8, vocab_size=131, max_position_embeddings=64, seq_length=64, dtype="float32", norm="LayerNorm",
        norm_bias=False, activation="gelu", gated=False, rope=None, alibi=True, tied=True,
    )  # fmt: skip
    w = {name.removeprefix("transformer."): weight for name, weight in model.named_parameters()}
    items: list[streams.Item] = [{"name": "embeddings", "word embeddings": w["wte.weight"]}]
    for i in range(2):
        block = f"blocks.{i}."
        names = {"input norm": "norm_1", "dense": "attn.out_proj", "post norm": "norm_2", "mlp l0": "ffn.up_proj",
                 "mlp l1": "ffn.down_proj"}  # fmt: skip
        item = {f"{key} weight": w[f"{block}{name}.weight"] for key, name in names.items()}
        qkv = w[f"{block}attn.Wqkv.weight"].view(3, 6, 8, 48).transpose(0, 1).reshape(-1, 48)
        items.append({"name": f"transformer layer {i}", "qkv weight": qkv, **item})
    items.append({"name": "final norm", "weight": w["norm_f.weight"]})
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0]
    close(streams.of_others(spec, items), wanted)
    assert alibi_slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


# What is read


class Counted(LazyTensor):
    """A tensor of which is noted what is read."""

    def __init__(self, base: LazyTensor) -> None:
        self.base, self.dtype, self.shape = base, base.dtype, base.shape
        self.read_rows: list[tuple[int, int]] = []

    def read(self, out: Any, row: int, col: int) -> None:
        assert col == 0
        self.read_rows.append((row, len(out)))
        self.base.read(out, row, col)


def counted(tensor: torch.Tensor) -> Counted:
    return Counted(Literal(bytes(lazy.as_bytes(lazy.as_numpy(tensor))), "float32", tuple(tensor.shape)))


def test_a_product_holds_a_block_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK", 20)
    weight, x = torch.randn(11, 8), torch.randn(3, 8)
    seen = counted(weight)
    torch.testing.assert_close(weights.product(x, seen), x @ weight.T)
    assert seen.read_rows == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 1)]


def test_only_chosen_experts_are_read() -> None:
    moe = MoE(num_experts=5, topk=1, ffn_hidden_size=3, layers=(1,))
    spec = ModelSpec("", 1, 4, 3, 1, 1, 4, 7, 8, 8, "float32", moe=moe)
    experts = {"mlp l0 weight W": (5, 3, 4), "mlp l0 weight V": (5, 3, 4), "mlp l1 weight": (5, 4, 3)}
    tensors = {key: counted(torch.randn(shape)) for key, shape in experts.items()}
    router = counted(torch.tensor([[0.0] * 4, [9.0] * 4, [0.0] * 4, [-9.0] * 4, [0.0] * 4]))
    m = weights.Weights("layer", {**tensors, "router weight": router})
    x = torch.tensor([[1.0] * 4, [-1.0] * 4, [2.0] * 4])
    choice = mlp.choose(spec, moe, m, x)
    assert choice.which.flatten().tolist() == [1, 3, 1]
    mlp.add_experts(spec, m, x, choice, range(5))
    assert tensors["mlp l0 weight W"].read_rows == [(3, 3), (9, 3)]
    assert tensors["mlp l1 weight"].read_rows == [(4, 4), (12, 4)]


def test_more_tokens_than_positions(hf: Hf) -> None:
    with pytest.raises(UsageError, match="65 tokens: the model has positions for 64"):
        logits(hf("gpt2"), [3] * 65)
