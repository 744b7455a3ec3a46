"""Meta's format, both ways: bits of an independent writer, logits of an independent forward, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import meta_reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fixtures
from ckptconv import plugins
from ckptconv.cuts import HeadsOfQKV
from ckptconv.formats import meta
from ckptconv.spec import ModelSpec
from commands import convert, run, same, weights_of

IDS = torch.randint(3, 130, (2, 24), generator=torch.Generator().manual_seed(5))
#: Divides by the shards below; of the fixtures' own 131 or 137 none does.
VOCAB = {"vocab_size": 132}
FFN = {"multiple_of": 8, "ffn_dim_multiplier": 0.6875}  # 88
LLAMA3 = {"rope_theta": 500000.0, "vocab_size": 132}

#: fixture -> (config overrides, params.json as Meta wrote them less sizes, embedding on dim 0, factor, positions)
RELEASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool, float, int]] = {
    # Of Llama 1 the code knows no multiplier.
    "llama1": (
        {"intermediate_size": 128}, {"vocab_size": -1, "norm_eps": 1e-6, "ffn_dim_multiplier": None}, False, 8.0, 2048
    ),
    "llama2": ({}, {"vocab_size": -1, "n_kv_heads": 2}, False, 8.0, 4096),
    "codellama": ({}, {"rope_theta": 1000000.0, "n_kv_heads": 2}, False, 8.0, 16384),
    "llama3": ({}, LLAMA3 | {"n_kv_heads": 2}, True, 8.0, 8192),
    "llama31": ({}, LLAMA3 | {"n_kv_heads": 2, "use_scaled_rope": True}, True, 8.0, 131072),
    "llama32": ({"head_dim": 12}, LLAMA3 | {"n_kv_heads": 2, "use_scaled_rope": True}, True, 32.0, 131072),
}


def params_of(name: str) -> dict[str, Any]:
    """params.json of a release in the sizes of its fixture."""
    params = {"dim": 48, "n_layers": 4, "n_heads": 4, "norm_eps": 1e-5, **FFN, **RELEASES[name][1]}
    return {key: value for key, value in params.items() if value is not None}


def source(name: str, folder: Path, shards: int, **changes: Any) -> tuple[Path, Path]:
    """(Meta's files, Hugging Face's) of one model; changes are of params.json."""
    overrides, _, rows, _, positions = RELEASES[name]
    theirs = fixtures.build(name, folder / "hf", tokenizer=False, **VOCAB, **overrides,
                            max_position_embeddings=positions)  # fmt: skip
    config = json.loads((theirs / "config.json").read_text())
    params = {key: value for key, value in (params_of(name) | changes).items() if value is not None}
    return meta_reference.build(folder / "meta", weights_of(theirs), config, params, shards, rows), theirs


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize(("name", "shards"), [*zip(RELEASES, (4, 2, 1, 2, 1, 2), strict=True)])
def test_read(name: str, shards: int, tmp_path: Path) -> None:
    """Meta's files become what transformers reads, and compute the same there."""
    theirs, hf = source(name, tmp_path, shards)
    found = convert(theirs, tmp_path / "out", "hf", "--verify")
    same(weights_of(found), weights_of(hf))
    config, want = (json.loads((folder / "config.json").read_text()) for folder in (found, hf))
    for key in ("intermediate_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "rope_theta"):
        assert config[key] == want.get(key, 10000.0), key
    assert (config["rope_scaling"] or {}).get("factor") == (want.get("rope_scaling") or {}).get("factor")
    expected = meta_reference.logits(theirs, IDS, RELEASES[name][3])
    assert difference(fixtures.logits(found, IDS), expected) < 1e-4


@pytest.mark.parametrize(("name", "shards"), [*zip(RELEASES, (2, 1, 2, 1, 2, 2), strict=True)])
def test_written(name: str, shards: int, tmp_path: Path, hf: Callable[..., Path]) -> None:
    """What we write computes in Meta's code what the source computes in transformers, and has Meta's own bits."""
    overrides, _, rows, factor, _ = RELEASES[name]
    theirs = hf(name, **VOCAB, **overrides)
    found = convert(theirs, tmp_path / "out", "meta", "--target-tp", shards, "--verify")
    want = fixtures.logits(theirs, IDS)
    assert difference(meta_reference.logits(found, IDS, factor), want) < 1e-4
    params = json.loads((found / "params.json").read_text())
    config = json.loads((theirs / "config.json").read_text())
    by_meta = meta_reference.build(tmp_path / "meta", weights_of(theirs), config, params_of(name), shards, rows)
    assert sorted(path.name for path in found.glob("*.pth")) == sorted(path.name for path in by_meta.glob("*.pth"))
    for file in by_meta.glob("*.pth"):
        expected = torch.load(file, weights_only=True)
        expected.pop("rope.freqs", None)
        same(torch.load(found / file.name, weights_only=True), expected)
    limits = " ".join(json.loads((found / "ckptconv.json").read_text())["target"]["limits"])
    assert ("this model has 32" in limits) == (factor == 32.0)
    assert ("no longest input" in limits) == (config["max_position_embeddings"] != RELEASES[name][4])
    said = {key: value for key, value in params_of(name).items() if key not in (*FFN, "vocab_size")}
    assert {key: params.get(key) for key in said} == said
    # Readers that are dataclasses refuse what they do not know.
    assert set(params) <= {*params_of(name), "vocab_size"}
    again = convert(found, tmp_path / "again", "hf")  # the small files came along
    assert json.loads((again / "config.json").read_text()).items() >= config.items()
    for file in ("tokenizer.model", "tokenizer.json", "generation_config.json"):
        assert (again / file).read_bytes() == (theirs / file).read_bytes(), file
    assert (found / "tokenizer.model").read_bytes() == (theirs / "tokenizer.model").read_bytes()


def test_the_forward_notices_a_wrong_rotary_order(tmp_path: Path) -> None:
    theirs, hf = source("llama2", tmp_path, 1)
    right = meta_reference.logits(theirs, IDS)
    file = theirs / "consolidated.00.pth"
    shard = torch.load(file)
    shard["layers.1.attention.wk.weight"] = weights_of(hf)["model.layers.1.self_attn.k_proj.weight"]
    torch.save(shard, file)
    assert difference(meta_reference.logits(theirs, IDS), right) > 0.05


def test_any_number_of_shards(tmp_path: Path) -> None:
    """4 -> 1 -> 2 shards; the embedding is cut on its columns, so its last element tells."""
    theirs, hf = source("llama1", tmp_path, 4)
    one = convert(theirs, tmp_path / "one", "meta", "--target-tp", 1)
    two = convert(one, tmp_path / "two", "meta", "--target-tp", 2, "--dtype", "bf16")
    want = fixtures.logits(hf, IDS)
    assert difference(meta_reference.logits(one, IDS), want) < 1e-4
    shards = [torch.load(two / f"consolidated.{n:02d}.pth", weights_only=True) for n in (0, 1)]
    table = torch.cat([shard["tok_embeddings.weight"] for shard in shards], 1)
    assert torch.equal(table, weights_of(hf)["model.embed_tokens.weight"].bfloat16())
    assert {tensor.dtype for tensor in shards[0].values()} == {torch.bfloat16}


def test_params_nested_and_of_the_run(tmp_path: Path) -> None:
    theirs, hf = source("llama2", tmp_path, 2)
    params = params_of("llama2") | {"max_batch_size": 32, "quantization_args": None, "vision_chunk_size": -1}
    (theirs / "params.json").write_text(json.dumps({"model": params}))
    same(weights_of(convert(theirs, tmp_path / "out")), weights_of(hf))


def test_mistral_s_own_files(tmp_path: Path) -> None:
    """The same names, with head_dim, hidden_dim and sliding_window in params.json."""
    hf = fixtures.build("mistral", tmp_path / "hf", tokenizer=False, **VOCAB)
    config = json.loads((hf / "config.json").read_text())
    params = params_of("llama2") | {"head_dim": 16, "hidden_dim": 88, "sliding_window": 8, "rope_theta": 1e4}
    theirs = meta_reference.build(tmp_path / "meta", weights_of(hf), config, params, 1, rows=True)
    found = convert(theirs, tmp_path / "out")
    same(weights_of(found), weights_of(hf))
    assert json.loads((found / "config.json").read_text())["model_type"] == "mistral"
    assert difference(fixtures.logits(found, IDS), meta_reference.logits(theirs, IDS)) < 1e-4


def test_the_factor_by_version(tmp_path: Path) -> None:
    """An untied model is taken as 3.1, factor 8; --llama-version says 3.2, factor 32."""
    theirs, _ = source("llama31", tmp_path, 1)
    for flags, factor in ((), 8.0), (("--llama-version", "3.2"), 32.0):
        found = convert(theirs, tmp_path / f"out{factor}", "hf", *flags)
        assert json.loads((found / "config.json").read_text())["rope_scaling"]["factor"] == factor
        assert difference(fixtures.logits(found, IDS), meta_reference.logits(theirs, IDS, factor)) < 1e-4


def test_a_told_version_stays_with_what_is_written(tmp_path: Path) -> None:
    """Untied with factor 32 needs --llama-version, which is noted, so that reading back needs it no more."""
    scaling = fixtures.LLAMA3_ROPE | {"factor": 32.0}
    hf = fixtures.build("llama31", tmp_path / "hf", **VOCAB, rope_scaling=scaling)
    assert run(hf, tmp_path / "no", "meta") == 7
    found = convert(hf, tmp_path / "meta", "meta", "--llama-version", "3.2", "--verify")
    again = convert(found, tmp_path / "out")
    assert json.loads((again / "config.json").read_text())["rope_scaling"] == scaling
    same(weights_of(again), weights_of(hf))


def test_the_tokenizer_above(tmp_path: Path) -> None:
    """Llama 1 and 2 came with one tokenizer for several sizes, in the directory above."""
    theirs, _ = source("llama2", tmp_path, 1)
    (tmp_path / "tokenizer.model").write_bytes(fixtures.tokenizer_files(132)["tokenizer.model"])
    found = convert(theirs, tmp_path / "out")
    assert (found / "tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    megatron = convert(theirs, tmp_path / "megatron", "megatron_mcore")
    flags = (megatron / "megatron_args.txt").read_text()
    assert "--tokenizer-type Llama2Tokenizer" in flags and f"--tokenizer-model {megatron}/hf/tokenizer.model" in flags
    assert (megatron / "hf" / "tokenizer.model").is_file()


# What is refused


def refused(capsys: pytest.CaptureFixture[str], code: int, words: str, source: Path, *flags: object) -> None:
    saver = "hf" if (source / "params.json").exists() else "meta"
    loader = ("--loader", "meta") if saver == "hf" else ()
    assert run(source, source.parent / "refused", saver, *loader, *flags) == code
    assert words in capsys.readouterr().err
    assert not (source.parent / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": {"num_experts": 8}}, "a mixture of experts"),
        ({"quantization_args": {"group_size": 32}}, "quantised"),
        ({"vision_num_cross_attention_layers": 8}, "a vision model"),
        ({"rope_scale": 4}, "rope_scale 4, which no rule knows. Did you mean"),
        ({"vocab_size": 128}, "vocab_size is 128, but the embedding has 132 rows"),
        ({"n_layers": 3}, "n_layers is 3, but the shards hold 4"),
        ({"norm_eps": None}, "norm_eps is missing"),
        ({"n_heads": "4"}, "n_heads is '4', expected a number"),
        ({"use_scaled_rope": True}, "use_scaled_rope without rope_theta"),
        ({"n_kv_heads": 4}, "layers.0.attention.wk.weight"),
        ({"dim": 64}, "query rows"),
        ({"dim": 36}, "heads of 9 numbers"),
    ],
)
def test_params_that_contradict(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, _ = source("llama2", tmp_path, 2, **changes)
    refused(capsys, 3, words, theirs)


def _lose_last(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()


def _lose_first(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def _number_twice(folder: Path) -> None:
    shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.001.pth")


def _lose_tensor(folder: Path) -> None:
    _edit(folder, lambda shard: shard.pop("layers.3.ffn_norm.weight"))


def _add_tensor(folder: Path) -> None:
    _edit(folder, lambda shard: shard.update({"layers.0.attention.wq.bias": torch.zeros(24)}))


def _drift(folder: Path) -> None:
    _edit(folder, lambda shard: shard["norm.weight"].add_(1))


def _mix(folder: Path) -> None:
    name = "layers.0.attention.wk.weight"
    for number in (0, 1):
        _edit(folder, lambda shard: shard.update({name: shard[name].half()}), number)


def _edit(folder: Path, change: Callable[[Any], Any], number: int = 1) -> None:
    file = folder / f"consolidated.{number:02d}.pth"
    shard = torch.load(file)
    change(shard)
    torch.save(shard, file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_lose_last, "that is 2 shards. Are consolidated.*.pth files missing?"),
        (_lose_first, "lacks consolidated.00.pth of 2 shards"),
        (_number_twice, "have the same number"),
        (_lose_tensor, "lacks layers.3.ffn_norm.weight"),
        (_add_tensor, "holds layers.0.attention.wq.bias, which no rule knows"),
        (_drift, "norm.weight differs"),
        (_mix, "they become one tensor"),
    ],
)
def test_damaged_shards(
    damage: Callable[[Path], None], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, _ = source("llama2", tmp_path, 2)
    damage(theirs)
    refused(capsys, 3, words, theirs)


def test_contradicting_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, _ = source("llama2", tmp_path, 1)
    refused(capsys, 3, "Is --llama-version right?", theirs, "--llama-version", "3.1")


@pytest.mark.parametrize(
    ("name", "overrides", "flags", "code", "words"),
    [
        ("llama32", {}, (), 7, "kv_channels: 12 != 16"),
        ("mistral", {"head_dim": 12}, (), 7, "sliding_window"),
        ("llama_attention_bias", {}, (), 7, "qkv_bias"),
        ("llama_linear_rope", {}, (), 7, "rope"),
        ("llama31", {"rope_scaling": fixtures.LLAMA3_ROPE | {"factor": 4.0}}, (), 7, "'factor': 4.0"),
        ("qwen2", {}, (), 7, "qkv_bias"),
        ("mixtral", {}, (), 7, "moe"),
        ("gpt2", {}, (), 7, "norm: RMSNorm != LayerNorm"),
        ("llama2", {}, ("--target-tp", 4), 6, "does not divide 2 query groups"),
        ("llama2", {"vocab_size": 131}, ("--target-tp", 2), 6, "131 rows do not divide by tp 2"),
        ("llama2", {}, ("--llama-version", "3.1"), 7, "use_scaled_rope is false"),
    ],
)
def test_models_meta_cannot_express(
    name: str, overrides: dict[str, Any], flags: tuple[object, ...], code: int, words: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    theirs = fixtures.build(name, tmp_path / "hf", tokenizer=False, **{**VOCAB, **overrides})
    refused(capsys, code, words, theirs, *flags)


def test_only_its_own_is_recognised(tmp_path: Path) -> None:
    theirs, hf = source("llama2", tmp_path, 1)
    assert plugins.detect(str(theirs)) == "meta"
    assert plugins.detect(str(hf)) == "hf"
    (theirs / "params.json").unlink()
    shutil.copy(theirs / "consolidated.00.pth", hf)
    assert plugins.detect(str(hf)) == "hf"


# Laws


@given(st.integers(1, 20000), st.integers(1, 70000))
def test_any_ffn_can_be_said(dim: int, ffn: int) -> None:
    assert meta.ffn_size(dim, *meta.ffn_recipe(dim, ffn)) == ffn


#: dim, n_heads, what params.json of the releases say of the ffn, and what it is
RELEASED = [
    (4096, 256, None, 11008), (5120, 256, None, 13824), (6656, 256, None, 17920), (8192, 256, None, 22016),
    (8192, 4096, 1.3, 28672), (8192, 256, 1.0, 22016), (4096, 1024, 1.3, 14336), (16384, 4096, 1.2, 53248),
    (2048, 256, 1.5, 8192), (3072, 256, 1.0, 8192),
]  # fmt: skip


@pytest.mark.parametrize(("dim", "multiple_of", "multiplier", "ffn"), RELEASED)
def test_ffn_of_the_releases(dim: int, multiple_of: int, multiplier: float | None, ffn: int) -> None:
    assert meta.ffn_size(dim, multiple_of, multiplier) == ffn
    assert meta.ffn_recipe(dim, ffn)[0] >= 256  # a release's own numbers, or others as plain


@pytest.mark.parametrize(
    ("params", "tied", "version"),
    [
        ({"dim": 4096, "norm_eps": 1e-6}, False, "1"),
        ({"dim": 6656, "norm_eps": 1e-6}, False, "1"),
        ({"dim": 8192, "norm_eps": 1e-5}, False, "1"),
        ({"dim": 4096, "norm_eps": 1e-5}, False, "2"),
        ({"dim": 8192, "norm_eps": 1e-5, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3}, False, "2"),
        ({"dim": 8192, "norm_eps": 1e-5, "n_kv_heads": 8, "rope_theta": 1e6}, False, "codellama"),
        ({"dim": 4096, "norm_eps": 1e-5, "n_kv_heads": 8, "rope_theta": 5e5}, False, "3"),
        ({"dim": 4096, "norm_eps": 1e-5, "n_kv_heads": 8, "rope_theta": 5e5, "use_scaled_rope": True}, False, "3.1"),
        ({"dim": 2048, "norm_eps": 1e-5, "n_kv_heads": 8, "rope_theta": 5e5, "use_scaled_rope": True}, True, "3.2"),
    ],
)
def test_releases_are_told_apart(params: dict[str, Any], tied: bool, version: str) -> None:
    assert meta.guess(params, tied, 32000) == version


@pytest.mark.parametrize(("a", "g", "tp"), [(4, 4, 2), (4, 2, 2), (6, 3, 3), (8, 2, 1), (4, 1, 1)])
def test_heads_of_qkv(a: int, g: int, tp: int) -> None:
    """Every row of qkv lies where Meta's order has it, and nowhere twice."""
    d, h, r = 6, 5, a // g
    spec = ModelSpec("llama", 1, h, 8, a, g, d, 12, 4, 4, "float32")
    qkv = torch.arange(spec.qkv_rows * h).reshape(-1, h)
    groups = qkv.reshape(g, r + 2, d, h)
    whole = {
        "wq": groups[:, :r].reshape(a * d, h), "wk": groups[:, r].reshape(g * d, h),
        "wv": groups[:, r + 1].reshape(g * d, h),
    }  # fmt: skip
    covered = torch.zeros(spec.qkv_rows, h, dtype=torch.int64)
    cuts = {row.name.split(".")[3]: row.cut for row in meta.table(spec, True) if row.keys == ("qkv weight",)}
    for name, cut in cuts.items():
        assert isinstance(cut, HeadsOfQKV)
        want = meta_reference.pairs(whole[name], d) if cut.pairs else whole[name]
        parts = [torch.zeros(cut.shape([tuple(qkv.shape)], tp), dtype=qkv.dtype) for _ in range(tp)]
        for t in cut.tiles([tuple(qkv.shape)], 0, tp):
            block = (slice(t.row, t.row + t.rows), slice(t.col, t.col + t.cols))
            covered[block] += 1
            parts[t.part][t.part_row : t.part_row + t.rows, t.part_col : t.part_col + t.cols] = qkv[block]
        stored = cut.stored([tuple(qkv.shape)], tp)
        found = torch.cat([part.reshape(stored) for part in parts])
        assert torch.equal(found, want), name
    assert bool((covered == 1).all())


def test_all_positions_of_two_heads_differ() -> None:
    """The reference's own permutation: a bijection that leaves no row but the ends where it was."""
    rows = meta_reference.pairs(torch.arange(12.0)[:, None], 6).flatten().tolist()
    assert sorted(rows) == list(range(12))
    assert [row for row, value in enumerate(rows) if row == value] == [0, 5, 6, 11]
    assert [b - a for a, b in itertools.pairwise(rows[:6])] == [3, -2, 3, -2, 3]
