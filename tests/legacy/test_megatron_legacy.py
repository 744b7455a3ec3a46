"""Legacy models against files, a reader and a forward pass written by hand (legacy_models.py), and transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import legacy_models as hand
import pytest
import torch
from legacy_models import BERT, GPT, LLAMA, NEMOTRON, Model

import fixtures
from ckptconv import companions, plugins
from ckptconv.loaders import _megatron
from commands import convert, same, weights_of
from inprocess import here

IDS = torch.tensor([[1, 5, 9, 100, 30, 7, 2, 64], [3, 3, 8, 120, 77, 11, 19, 4]])
TYPES = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 0]])
TOKENS = ("--true-vocab-size", 131)
NAMES = "language_model.encoder.layers."


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    tokens = min(one.shape[-1], other.shape[-1])  # without the padded vocabulary
    one, other = one[..., :tokens], other[..., :tokens]
    assert other.abs().max() > 0.1
    assert (one - other).abs().max() < 2e-5 * max(1.0, float(other.abs().max()))


def computed(folder: Path, m: Model) -> dict[str, torch.Tensor]:
    """What transformers makes of a Hugging Face directory."""
    if not m.bert:
        return {"logits": fixtures.logits(folder, IDS)}
    with torch.no_grad():
        out = fixtures.load(folder)(IDS, token_type_ids=TYPES)
    return {"logits": out.prediction_logits, "binary": out.seq_relationship_logits}


def agrees(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name in want:
        close(found[name], want[name])


def _wrapped(t: int, p: int, root: dict[str, Any]) -> None:
    root["model"] = {"module": root["model"]}


def _dotted(t: int, p: int, root: dict[str, Any]) -> None:
    """As named_parameters of a wrapped model gives it."""
    root["model"] = {f"module.module.{name}": value for name, value in hand.flat(root["model"]).items()}


def _half_dotted(t: int, p: int, root: dict[str, Any]) -> None:
    """Embeddings and layers beside each other, as the first code had them."""
    language = root["model"]["language_model"]
    flat = hand.flat(language.pop("embedding", {})) | hand.flat({"transformer": language.pop("encoder")})
    language |= flat


SOURCES: dict[str, tuple[Model, dict[str, Any]]] = {
    "gpt": (GPT, {}),
    "gpt tp2 pp2": (GPT, {"tp": 2, "pp": 2}),
    "gpt vpp": (GPT, {"pp": 2, "vpp": 2}),
    "gpt uneven": (GPT, {"pp": 2, "counts": (1, 3)}),
    "gpt uneven vpp": (GPT, {"pp": 2, "vpp": 2, "counts": (0, 1, 2, 1)}),
    "gpt exact": (replace(GPT, activation="gelu", said={"bias_gelu_fusion": False}), {}),
    "gpt onnx": (replace(GPT, activation="gelu", said={"onnx_safe": True}), {}),
    "gpt openai": (replace(GPT, said={"openai_gelu": True, "bias_gelu_fusion": False}), {}),
    "gpt version 0": (GPT, {"version": 0, "older": True}),
    "gpt version 0 tp2": (GPT, {"version": 0, "older": True, "tp": 2}),
    "gpt version 1 tp4": (GPT, {"version": 1, "older": True, "tp": 4}),
    "gpt version 2": (GPT, {"version": 2, "tp": 2}),
    "gpt wrapped": (GPT, {"pp": 2, "change": _wrapped}),
    "gpt dotted": (GPT, {"pp": 2, "change": _dotted}),
    "gpt half dotted": (GPT, {"pp": 2, "change": _half_dotted}),
    "gpt release": (GPT, {"iteration": "release"}),
    "gpt of 2022": (GPT, {"pp": 2, "file": "model_rng.pt"}),
    "llama": (LLAMA, {}),
    "llama tp2 pp4": (LLAMA, {"tp": 2, "pp": 4}),
    "nemotron": (NEMOTRON, {"tp": 4}),
    "bert": (BERT, {}),
    "bert tp2 pp2": (BERT, {"tp": 2, "pp": 2}),
    "bert version 0": (BERT, {"version": 0, "older": True, "tp": 2}),
    "bert openai": (replace(BERT, activation="tanh", said={"openai_gelu": True}), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    m, layout = SOURCES[name]
    w = hand.weights(m)
    source = hand.write(tmp_path / "legacy", m, w, **layout)
    back = convert(source, tmp_path / "hf", "hf", *TOKENS)
    agrees(computed(back, m), hand.forward(w, m, IDS, TYPES if m.bert else None))


@pytest.mark.parametrize(
    ("fixture", "m", "tp", "pp", "vpp"),
    [
        ("gpt2", replace(GPT, f=4 * 48), 2, 2, 2),
        ("gpt2_untied", replace(GPT, activation="gelu", tied=False), 1, 1, 1),
        ("llama2", LLAMA, 2, 2, 1),
        ("llama2", LLAMA, 1, 4, 1),
        ("llama_attention_bias", replace(LLAMA, bias=True), 2, 2, 1),
        ("megatron_bert", BERT, 2, 2, 1),
        ("megatron_bert", BERT, 1, 1, 1),
        ("megatron_bert_tanh", replace(BERT, activation="tanh", said={"openai_gelu": True}), 1, 2, 2),
    ],
)
def test_the_hand_reads_what_is_written(fixture: str, m: Model, tp: int, pp: int, vpp: int, tmp_path: Path) -> None:
    hf = fixtures.build(fixture, tmp_path / "hf")
    flags = ["--make-vocab-size-divisible-by", 8 // tp, "--target-tp", tp, "--target-pp", pp]
    out = convert(hf, tmp_path / "out", "megatron_legacy", *flags, *(["--target-vpp", vpp] if vpp > 1 else []))
    c = fixtures.config(fixture)
    m = replace(m, f=c.get("intermediate_size") or c.get("n_inner") or 4 * m.h,
                s=c.get("n_positions") or c.get("max_position_embeddings"), eps=next(
                    c[name] for name in ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps") if name in c
                ))  # fmt: skip
    w = hand.read(out, m, tp, pp, vpp)
    assert {name: tuple(tensor.shape) for name, tensor in w.items()} == hand.shapes(m)
    agrees(hand.forward(w, m, IDS, TYPES if m.bert else None), computed(hf, m))
    back = convert(out, tmp_path / "back", "hf")
    same(weights_of(back), weights_of(hf))


def test_old_orders_are_noticed(tmp_path: Path) -> None:
    """Without the version the same file is another model."""
    w = hand.weights(GPT)
    for version in (0, 1):
        source = hand.write(tmp_path / str(version), GPT, w, version=version, change=_of_today)
        back = convert(source, tmp_path / f"hf {version}", "hf", *TOKENS)
        assert (computed(back, GPT)["logits"] - hand.forward(w, GPT, IDS)["logits"][..., :131]).abs().max() > 0.01


def _of_today(t: int, p: int, root: dict[str, Any]) -> None:
    root["checkpoint_version"] = 3.0


def test_layouts_and_iterations_bit_for_bit(tmp_path: Path) -> None:
    """The names on a stage, and the weights of a source in another layout: files of both are the same."""
    w = hand.weights(BERT)
    source = hand.write(tmp_path / "legacy", BERT, w, tp=4, pp=4)
    out = convert(source, tmp_path / "out", "megatron_legacy", "--target-tp", 2, "--target-pp", 2, "--true-vocab-size",
                  136, "--make-vocab-size-divisible-by", 4)  # fmt: skip
    found = hand.read(out, BERT, 2, 2, 1)
    same(found, w)
    root = torch.load(out / "iter_0000007/mp_rank_01_001/model_optim_rng.pt", weights_only=False)
    assert root["checkpoint_version"] == 3.0
    assert root["args"].use_legacy_models is True
    assert root["args"].use_mcore_models is False
    model = root["model"]
    assert sorted(model) == ["binary_head", "language_model", "lm_head", "word_embeddings_for_head"]
    assert sorted(model["language_model"]) == ["encoder", "pooler"]
    assert model["lm_head"]["bias"].shape == (68,)
    assert sorted(model["language_model"]["pooler"]) == ["dense.bias", "dense.weight"]
    assert "layers.1.post_attention_norm.bias" in model["language_model"]["encoder"]


def test_all_loaders_of_rank_files_find_it(tmp_path: Path) -> None:
    source = hand.write(tmp_path / "legacy", GPT, hand.weights(GPT))
    one = convert(source, tmp_path / "1", "hf", "--loader", "megatron_legacy", *TOKENS)
    for number, flags in enumerate((["--loader", "megatron_mcore"], ["--loader", "legacy"], ["--loader", "auto"]), 2):
        same(weights_of(convert(source, tmp_path / str(number), "hf", *flags, *TOKENS)), weights_of(one))


def test_mcore_is_not_taken_for_legacy(tmp_path: Path) -> None:
    hf = fixtures.build("llama2", tmp_path / "hf")
    core = convert(hf, tmp_path / "core", "megatron_mcore")
    same(weights_of(convert(core, tmp_path / "back")), weights_of(hf))
    assert plugins.detect(str(core)) == "megatron_mcore"
    assert plugins.detect(str(hand.write(tmp_path / "legacy", GPT, hand.weights(GPT)))) == "megatron_legacy"


def test_optimizer_directories_of_2022(tmp_path: Path) -> None:
    w = hand.weights(GPT)
    source = hand.write(tmp_path / "legacy", GPT, w, tp=2, pp=2, file="model_rng.pt", iteration="release")
    for rank in ("00_000_000", "00_000_001", "01_001_000"):
        (source / f"release/mp_rank_{rank}").mkdir()
        (source / f"release/mp_rank_{rank}/optim.pt").write_bytes(b"not opened")
    (source / "latest_checkpointed_iteration.txt").write_text("12")  # --release does not ask
    back = convert(source, tmp_path / "hf", "hf", "--release", "--loader", "megatron_legacy", *TOKENS)
    agrees(computed(back, GPT), hand.forward(w, GPT, IDS))


def test_files_beside_the_models_are_named(tmp_path: Path) -> None:
    source = hand.write(tmp_path / "legacy", GPT, hand.weights(GPT))
    (source / "iter_0000007/mp_rank_00/distrib_optim.pt").write_bytes(b"not opened")
    back = convert(source, tmp_path / "hf", "hf", *TOKENS)
    assert "ignored distrib_optim.pt: optimizer state is not converted" in (back / companions.PROVENANCE).read_text()


def test_files_without_args(tmp_path: Path) -> None:
    """NVIDIA's first releases have neither args nor a checkpoint_version."""
    w = hand.weights(GPT)
    source = hand.write(tmp_path / "gpt", GPT, w, version=0, older=True, said={})
    done = here("--load-dir", source, "--save-dir", tmp_path / "no", "--saver", "hf")
    assert done.returncode == 3
    assert "--num-attention-heads" in done.stderr
    heads = ("--loader", "megatron_legacy", "--num-attention-heads", 4)
    back = convert(source, tmp_path / "hf", "hf", *heads, *TOKENS)
    agrees(computed(back, GPT), hand.forward(w, GPT, IDS))
    w = hand.weights(BERT)
    source = hand.write(tmp_path / "bert", BERT, w, version=0, older=True, said={}, tp=2)
    back = convert(source, tmp_path / "hf bert", "hf", *heads, *TOKENS)
    agrees(computed(back, BERT), hand.forward(w, BERT, IDS, TYPES))


def refused(source: Path, tmp_path: Path, *flags: object) -> str:
    out = tmp_path / "refused"
    done = here("--load-dir", source, "--save-dir", out, "--saver", "hf", *TOKENS, *flags)
    assert done.returncode == 3, done.stderr
    assert not out.exists()
    return done.stderr


def test_a_rope_theta_that_legacy_models_do_not_read(tmp_path: Path) -> None:
    m = replace(LLAMA, said=LLAMA.said | {"rotary_base": 500000})
    w = hand.weights(m)
    source = hand.write(tmp_path / "legacy", m, w)
    said = refused(source, tmp_path)
    assert "rotary_base 500000" in said
    assert "--rotary-base 10000" in said
    told = ("--loader", "megatron_legacy", "--rotary-base")
    back = convert(source, tmp_path / "hf", "hf", *TOKENS, *told, 10000)
    agrees(computed(back, m), hand.forward(w, m, IDS))
    other = convert(source, tmp_path / "other", "hf", *TOKENS, *told, 500000)
    assert (computed(other, m)["logits"] - computed(back, m)["logits"]).abs().max() > 1e-3


def _rename(old: str, new: str) -> Any:
    def change(t: int, p: int, root: dict[str, Any]) -> None:
        encoder = root["model"]["language_model"]["encoder"]
        for name in [n for n in encoder if old in n]:
            encoder[name.replace(old, new)] = encoder.pop(name)

    return change


def _drift(t: int, p: int, root: dict[str, Any]) -> None:
    if "word_embeddings_for_head" in root["model"]:
        root["model"]["word_embeddings_for_head"]["weight"][0, 0] += 1


def _twice(t: int, p: int, root: dict[str, Any]) -> None:
    language = root["model"]["language_model"]
    language["transformer"] = dict(language["encoder"])


def _lost(t: int, p: int, root: dict[str, Any]) -> None:
    del root["model"]["language_model"]["encoder"]["layers.1.input_norm.bias"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename("mlp.dense_h_to_4h", "mlp.local_experts.0.dense_h_to_4h"), ("switch MLP",)),
        (_rename("self_attention.query_key_value", "self_attention.layernorm_qkv"), ("Transformer Engine",)),
        (_rename("input_norm", "inter_attention.dense"), ("T5",)),
        (_drift, ("word_embeddings_for_head.weight", "differs", "word_embeddings")),
        (_twice, ("twice", "spelling")),
        (_lost, ("lacks", NAMES + "1.input_norm.bias")),
    ],
)
def test_other_models_and_damage_are_named(change: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    m = replace(GPT, layers=2)
    source = hand.write(tmp_path / "legacy", m, hand.weights(m), pp=1 if change is not _drift else 2, change=change)
    said = refused(source, tmp_path)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("m", "layout", "said", "words"),
    [
        (
            LLAMA,
            {"change": lambda t, p, root: root.update(checkpoint_version=1.0)},
            {},
            ("checkpoint_version is 1", "query groups"),
        ),
        (GPT, {}, {"num_experts": 4}, ("num_experts=4", "switch MLP")),
        (GPT, {}, {"apply_residual_connection_post_layernorm": True}, ("residuals after the norm",)),
        (GPT, {}, {"retro_add_retriever": True}, ("Retro",)),
        (LLAMA, {}, {"use_rope_scaling": True}, ("scaled rope",)),
        (GPT, {}, {"tensor_model_parallel_size": 2}, ("tensor_model_parallel_size 2", "1 such ranks")),
    ],
)
def test_args_that_are_not_read(
    m: Model, layout: dict[str, Any], said: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    source = hand.write(tmp_path / "legacy", m, hand.weights(m), said=hand.arguments(m) | said, **layout)
    said_ = refused(source, tmp_path)
    assert all(word in said_ for word in words), said_


@pytest.mark.parametrize(
    ("fixture", "flags", "words"),
    [
        ("llama3", (), ("rope theta 500000.0",)),
        ("llama31", (), ("rope kind llama3",)),
        ("mistral", (), ("window of 8",)),
        ("mixtral", (), ("experts",)),
        ("qwen3", (), ("norms on queries and keys",)),
        ("llama2", ("--target-tp", 4), ("4 with 2 query groups",)),
        ("llama2", ("--decoder-first-pipeline-num-layers", 1, "--target-pp", 2), ("stages of 1 + 3 layers",)),
        ("llama2", ("--saver-transformer-impl", "transformer_engine"), ("local layers only",)),
    ],
)
def test_what_legacy_models_cannot_be_told(fixture: str, flags: tuple[object, ...], words: tuple[str, ...],
                                           tmp_path: Path) -> None:  # fmt: skip
    hf = fixtures.build(fixture, tmp_path / "hf")
    done = here("--load-dir", hf, "--save-dir", tmp_path / "out", "--saver", "megatron_legacy", *flags)
    assert done.returncode != 0
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "out").exists()


def test_inexact_models_come_back_as_they_were(tmp_path: Path) -> None:
    """Rope that the legacy models do not read is lost to them, but not to us."""
    hf = fixtures.build("llama31", tmp_path / "hf")
    out = convert(hf, tmp_path / "out", "megatron_legacy", "--allow-inexact", "--target-pp", 2)
    assert "rope theta 500000.0" in (out / "megatron_args.txt").read_text()
    back = convert(out, tmp_path / "back", "hf")
    same(weights_of(back), weights_of(hf))
    close(fixtures.logits(back, IDS), fixtures.logits(hf, IDS))


OLD_COMMAND = (
    "--model-type {kind} --loader {name} --saver {name} --load-dir {source} --save-dir {out} --max-queue-size 50"
    " --target-tensor-parallel-size 2 --target-pipeline-parallel-size 1 --megatron-path /none"
    " --loader-transformer-impl local --saver-transformer-impl local --true-vocab-size 131"
    " --position-embedding-type learned_absolute"
)


@pytest.mark.parametrize(("name", "m"), [("legacy", GPT), ("megatron_legacy", BERT)])
def test_an_old_command_line(name: str, m: Model, tmp_path: Path) -> None:
    """tools/checkpoint/convert.py of 0.12 with the legacy plugins: only the program's name changes."""
    w = hand.weights(m)
    source, out = hand.write(tmp_path / "legacy", m, w, pp=2), tmp_path / "out"
    words = OLD_COMMAND.format(kind="BERT" if m.bert else "GPT", name=name, source=source, out=out).split()
    done = here(*words)
    assert done.returncode == 0, done.stderr
    found = hand.read(out, replace(m, v=144), 2, 1, 1)
    for key, full in w.items():
        rows = 131 if key.endswith(hand.ROWS) else full.shape[0]
        assert torch.equal(found[key][:rows], full[:rows]), key


def test_flags_and_what_they_do_not_say(tmp_path: Path) -> None:
    hf = fixtures.build("megatron_bert_tanh", tmp_path / "hf")
    out = convert(hf, tmp_path / "out", "megatron_legacy", "--target-pp", 2, "--target-vpp", 2)
    told = (out / "megatron_args.txt").read_text()
    flags = [line for line in told.splitlines() if not line.startswith("#")]
    for flag in ("--use-legacy-models", "--openai-gelu", "--no-bias-gelu-fusion", "--transformer-impl local"):
        assert flags.count(flag) == 1, flag
    assert "virtual pipeline stages start in Megatron-LM up to 0.12 only" in told
    llama = convert(fixtures.build("llama2", tmp_path / "llama"), tmp_path / "l", "megatron_legacy")
    assert "tensor parallel size 2" in (llama / "megatron_args.txt").read_text()


@pytest.mark.skipif(not Path(__file__).parents[2].joinpath("../shared/golden/epfl").is_dir(), reason="no golden files")
def test_megatron_llm_is_not_taken_for_legacy() -> None:
    golden = Path(__file__).parents[2] / "../shared/golden/epfl"
    found = {path.parents[2] for path in golden.glob("**/mp_rank_00*/model_optim_rng.pt")}
    assert found
    assert {_megatron.kind(folder) for folder in found if "m2h" not in folder.parts} == {"megatron_llm"}
