"""Models for layers of one's own (--custom-layers): examples/megatron_layers in megatron-core gives their logits.

The layers are those that are shipped, with the settings that the conversion wrote (settings_custom.py); Transformer
Engine's names are compared with a list written by hand. With a Megatron-LM checkout in CKPTCONV_MEGATRON_LM (see
test_megatron_trainer_args.py) the same goes through the trainer's own argument parser and builder.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import same, weights_of
from fixtures import FIXTURES, logits
from inprocess import here
from mcore import Case, Outcome, run
from settings_older import PAD, SEPARATOR, masks
from test_megatron_trainer_args import CHECKOUTS, RUN, version
from test_megatron_trainer_args import run as run_trainer

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

Fixture = Callable[..., Path]

#: Fixture -> words of what is refused without the flag; None: not refused, but the trainer needs changes or flags.
REFUSED = {
    "gemma": "embeddings multiplied",
    "gemma2": "soft cap on logits",
    "gemma3_text": "a rope of their own",
    "glm4": "(sandwich)",
    "olmo2": "norms over all query heads",
    "granite": "residuals multiplied",
    "pythia": "side by side",
    "neox_no_attention_bias": "side by side",
    "falcon_7b": "side by side",
    "falcon_40b": "side by side",
    "falcon_11b": "side by side",
    "stablelm_parallel": "side by side",
    "bert": "(post)",
    "llama32": None,
    "llama_linear_rope": None,
    "mistral": None,
}
LAYOUTS = ((1, 1), (2, 1), (1, 2))
TOLERANCE = 1e-5
#: Fixture, setting, its value in another model: each has to be seen.
CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("gemma", "norm_offset", False),
    ("gemma", "activation", "silu"),
    ("gemma2", "attention_softcap", None),
    ("gemma2", "logit_softcap", None),
    ("gemma2", "embedding_multiplier", 1.0),
    ("gemma2", "softmax_scale", None),
    ("gemma2", "window_layers", None),
    ("gemma3_text", "local_rope", None),
    ("gemma3_text", "sliding_window", None),
    ("granite", "residual_multiplier", 1.0),
    ("granite", "logit_multiplier", 1.0),
    ("falcon_40b", "parallel_residual", False),
)
#: The same where the layers see that the trainer was not told, or cannot be: the words of their error.
CHECKED: tuple[tuple[str, str, Any, str], ...] = (
    ("pythia", "norm_epsilon", 1e-2, "--norm-epsilon"),
    ("olmo2", "qk_norm", None, "--qk-layernorm"),
    ("glm4", "logit_softcap", 1.0, "ckptconv_layers.py"),
)


def ids(name: str) -> list[list[int]]:
    """[b, s] tokens; 24 are three windows of the fixtures that have one."""
    size = (1, 2048) if name in ("llama32", "llama_linear_rope") else (2, 24)
    vocab = FIXTURES[name]["vocab_size"]
    found = torch.randint(3, vocab, size, generator=torch.Generator().manual_seed(1))
    if name == "bert":
        found[:, 11] = SEPARATOR
        found[1, 17:] = PAD
    return found.tolist()


def convert(source: Path, out: Path, *flags: object, check: bool = True) -> str:
    """HF -> megatron_mcore in local names; what was said. The vocabulary is padded as little as possible."""
    base = ("--loader", "hf", "--saver", "megatron_mcore", "--load-dir", source, "--save-dir", out)
    done = here(*base, "--saver-transformer-impl", "local", "--make-vocab-size-divisible-by", 1, *flags)
    assert not check or done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def converted(hf: Fixture, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], Path]:
    """Every model at every layout."""
    root = tmp_path_factory.mktemp("layers")
    jobs = {(name, tp, pp): root / f"{name}.tp{tp}pp{pp}" for name in REFUSED for tp, pp in LAYOUTS}
    for (name, tp, pp), out in jobs.items():
        # One that fails has no outcome; the others have.
        convert(hf(name), out, "--custom-layers", "--target-tp", tp, "--target-pp", pp, check=False)
    return jobs


@pytest.fixture(scope="module")
def outcomes(
    hf: Fixture, converted: dict[tuple[str, int, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """What megatron-core makes of them, by "fixture tpTppP" or "fixture setting"."""
    cases = {
        f"{name} tp{tp}pp{pp}": Case(str(hf(name)), str(path), tp, pp, {"": ids(name)}, 1)
        for (name, tp, pp), path in converted.items()
        if path.exists()
    }
    for name, setting, value in (*CHANGES, *(case[:3] for case in CHECKED)):
        path = tmp_path_factory.mktemp("changed") / "model"
        if not converted[name, 1, 1].exists():
            continue
        shutil.copytree(converted[name, 1, 1], path)
        file = path / "ckptconv_layers.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
        cases[f"{name} {setting}"] = Case(str(hf(name)), str(path), 1, 1, {"": ids(name)}, 1)
    return run(cases, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def expected(hf: Fixture) -> Callable[[str], torch.Tensor]:
    """`expected(fixture)`: logits by transformers, computed once."""
    known: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        if name not in known:
            tokens = torch.tensor(ids(name))
            known[name] = bert_logits(hf(name))[0] if name == "bert" else logits(hf(name), tokens)
        return known[name]

    return get


def bert_logits(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What BertForPreTraining computes: [b, s, v], not a number for padding, and [b, 2]."""
    from transformers import BertForPreTraining

    model: Any = BertForPreTraining.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.tensor(ids("bert"))
    mask, types = masks(tokens)
    with torch.no_grad():
        out = model.eval()(tokens, mask, types)
    return out.prediction_logits.masked_fill(mask[..., None] == 0, torch.nan), out.seq_relationship_logits


def difference(outcome: Outcome, want: torch.Tensor) -> float:
    """Largest difference over the true vocabulary, where something is expected."""
    assert not outcome.error, outcome.error
    return float((outcome.logits[""][..., : want.shape[-1]] - want)[~want.isnan()].abs().max())


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS, ids=lambda n: str(n))
@pytest.mark.parametrize("name", REFUSED)
def test_logits(
    name: str, tp: int, pp: int, outcomes: dict[str, Outcome], expected: Callable[[str], torch.Tensor]
) -> None:
    found = difference(outcomes[f"{name} tp{tp}pp{pp}"], expected(name))
    assert found < TOLERANCE * (5 if len(ids(name)[0]) > 24 else 1), f"logits differ by {found:.1e}"


def test_binary_head_of_bert(outcomes: dict[str, Outcome], hf: Fixture) -> None:
    for tp, pp in LAYOUTS:
        found = outcomes[f"bert tp{tp}pp{pp}"].logits
        assert float((found[" binary"] - bert_logits(hf("bert"))[1]).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("name", "setting"), [change[:2] for change in CHANGES])
def test_every_setting_counts(
    name: str, setting: str, outcomes: dict[str, Outcome], expected: Callable[[str], torch.Tensor]
) -> None:
    """The comparison above can fail, and the layers read the file: one value of another model moves the logits."""
    assert difference(outcomes[f"{name} {setting}"], expected(name)) > 1e-3


@pytest.mark.parametrize(("name", "setting", "words"), [(case[0], case[1], case[3]) for case in CHECKED])
def test_what_lies_outside_of_layers_is_checked(
    name: str, setting: str, words: str, outcomes: dict[str, Outcome]
) -> None:
    assert words in outcomes[f"{name} {setting}"].error


@pytest.mark.parametrize("name", [name for name, words in REFUSED.items() if words])
def test_refused_without_the_flag(name: str, hf: Fixture, tmp_path: Path) -> None:
    said = convert(hf(name), tmp_path / "out", check=False)
    assert str(REFUSED[name]) in said
    assert "--custom-layers" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "words"), [("falcon_rw", "alibi"), ("phi3_longrope", "longrope")])
def test_what_layers_cannot_do_stays_refused(name: str, words: str, hf: Fixture, tmp_path: Path) -> None:
    for flags in ((), ("--custom-layers",)):
        said = convert(hf(name), tmp_path / "out", *flags, check=False)
        assert words in said
        assert "--custom-layers writes" not in said


#: Fixture, whose names, what is left of what the converter noted: everything, the args, the config.json, nothing.
BACK = (
    *((name, "transformer_engine", "all") for name in REFUSED),
    # The args do not say which biases were only filled in with zeros.
    *((name, "local", "args") for name in REFUSED if name != "neox_no_attention_bias"),
    *((name, "local", traces) for name in ("gemma2", "glm4", "falcon_7b") for traces in ("config", "none")),
)


@pytest.mark.parametrize(("name", "impl", "traces"), BACK)
def test_back_to_hugging_face(
    name: str, impl: str, traces: str, hf: Fixture, expected: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    """HF -> megatron_mcore -> HF, bit for bit, also from what the trainer keeps; when nothing tells, a refusal."""
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    flags = ("--custom-layers", "--target-tp", 2, "--target-pp", 2, "--saver-transformer-impl", impl)
    convert(hf(name), mcore, *flags)
    if traces != "all":
        strip(mcore, args=traces in ("config", "none"), config=traces != "config")
    base = ("--loader", "megatron_mcore", "--saver", "hf", "--load-dir", mcore, "--save-dir", back)
    done = here(*base)
    if traces == "none":
        assert done.returncode != 0
        assert "ckptconv_layers.json" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    same(weights_of(back), weights_of(hf(name)))
    if name != "bert":
        assert torch.equal(logits(back, torch.tensor(ids(name))), expected(name))


def strip(directory: Path, args: bool, config: bool) -> None:
    """Take away what the converter noted beside the weights, and what of it is in the args and config.json."""
    for path in [*directory.glob("*/ckptconv.json"), directory / "ckptconv_layers.json"]:
        path.unlink()
    if config:
        shutil.rmtree(directory / "hf")
    for path in directory.glob("*/*/model_optim_rng.pt") if args else ():
        state = torch.load(path, weights_only=False)
        kept = {name: value for name, value in vars(state["args"]).items() if name != "ckptconv_layers"}
        torch.save(state | {"args": Namespace(**kept)}, path)


def layer_names(directory: Path) -> set[str]:
    """Names of the second layer of a checkpoint without pipeline stages."""
    (file,) = directory.glob("iter_0000001/mp_rank_00/model_optim_rng.pt")
    return {
        name.partition(".layers.1.")[2]
        for name in torch.load(file, weights_only=False)["model"]
        if ".layers.1." in name
    }


LINEARS = {
    "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight", "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}  # fmt: skip
BEHIND = {"self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight"}
LOCAL_NORMS = {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
TE_NORMS = {"self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"}


def _with_biases(names: set[str]) -> set[str]:
    return names | {name.replace("weight", "bias") for name in names}


#: Fixture -> names of a layer, local and Transformer Engine's: Megatron-Bridge's for norms behind, else the specs' own.
NAMES: dict[str, tuple[set[str], set[str]]] = {
    "gemma2": (LINEARS | LOCAL_NORMS | BEHIND, LINEARS | TE_NORMS | BEHIND),
    "falcon_7b": (LINEARS | _with_biases(LOCAL_NORMS), LINEARS | _with_biases(TE_NORMS)),
    "falcon_40b": (LINEARS | _with_biases(LOCAL_NORMS), LINEARS | _with_biases(TE_NORMS)),
    "olmo2": (
        LINEARS | BEHIND | {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"},
        LINEARS | BEHIND | {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"},
    ),
    # A norm in a linear would not be what the residual gets.
    "bert": (_with_biases(LINEARS | LOCAL_NORMS), _with_biases(LINEARS | LOCAL_NORMS)),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str, hf: Fixture, tmp_path: Path) -> None:
    for impl, want in zip(("local", "transformer_engine"), NAMES[name], strict=True):
        convert(hf(name), tmp_path / impl, "--custom-layers", "--saver-transformer-impl", impl)
        assert layer_names(tmp_path / impl) == want


def test_one_norm_under_two_names_has_to_stay_one(hf: Fixture, tmp_path: Path) -> None:
    convert(hf("falcon_7b"), tmp_path / "mcore", "--custom-layers")
    (file,) = (tmp_path / "mcore").glob("*/*/model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    state["model"]["decoder.layers.2.pre_mlp_layernorm.weight"][0] += 1
    torch.save(state, file)
    base = ("--loader", "megatron_mcore", "--saver", "hf", "--load-dir", tmp_path / "mcore")
    done = here(*base, "--save-dir", tmp_path / "back")
    assert done.returncode != 0
    assert "pre_mlp_layernorm.weight differs" in done.stderr


def test_settings_are_written_beside_and_named_in_the_flags(converted: dict[tuple[str, int, int], Path]) -> None:
    path = converted["gemma2", 1, 1]
    told = json.loads((path / "ckptconv_layers.json").read_text())
    assert (told["attention_softcap"], told["logit_softcap"], told["softmax_scale"]) == (2.0, 3.0, 20**-0.5)
    assert told["window_layers"] == [1, 0, 1, 0]
    flags = (path / "megatron_args.txt").read_text()
    assert "--spec ckptconv_layers local" in flags
    assert "ckptconv_layers.py pretrain_gpt.py" in flags
    (file,) = path.glob("*/*/model_optim_rng.pt")
    args = torch.load(file, weights_only=False)["args"]
    assert args.spec == ["ckptconv_layers", "local"]
    assert args.ckptconv_layers == told


#: Fixture -> whether the builder of the layers' module has to take the place of the trainer's.
TRAINED = {"glm4": False, "pythia": False, "falcon_7b": False, "olmo2": False, "gemma2": True, "gemma3_text": True}


@pytest.mark.skipif(not CHECKOUTS, reason="CKPTCONV_MEGATRON_LM names no Megatron-LM checkout")
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: Path(path).name)
@pytest.mark.parametrize("name", TRAINED)
def test_trainer_builds_the_model(
    checkout: str, name: str, hf: Fixture, expected: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    """--use-checkpoint-args and the flags of megatron_args.txt, the trainer's parser and builder, a strict load."""
    if not (0, 15) <= version(checkout) < (0, 19):
        pytest.skip("this release has no gpt_builder that pretrain_gpt.py uses")
    convert(hf(name), tmp_path / "mcore", "--custom-layers", "--iteration", "release")
    lines = (tmp_path / "mcore/megatron_args.txt").read_text().splitlines()
    words = [word for line in lines if not line.startswith("#") for word in line.split(" ")]
    job = {
        "name": "x",
        "argv": ["--use-checkpoint-args", "--load", str(tmp_path / "mcore"), *words, *RUN, "--no-rope-fusion"],
        "lenient": False,
        "world": 1,
        "ids": ids(name),
        "logits": str(tmp_path / "out.pt"),
        "layers": str(Path(__file__).parents[2] / "examples/megatron_layers"),
        "builder": TRAINED[name],
    }
    found = run_trainer(checkout, tmp_path, [job])["x"]
    assert "error" not in found, found["error"]
    want = expected(name)
    have = torch.load(tmp_path / "out.pt")[..., : want.shape[-1]]
    assert float((have - want).abs().max()) < TOLERANCE


def test_script_takes_the_place_of_the_builder(tmp_path: Path) -> None:
    """`ckptconv_layers.py pretrain_gpt.py`: the script sees another builder, its own arguments, and is the main one."""
    (tmp_path / "gpt_builders.py").write_text("def gpt_builder(*args): ...")
    (tmp_path / "pretrain_gpt.py").write_text(
        "import sys\nfrom gpt_builders import gpt_builder\nprint(__name__, gpt_builder.__module__, sys.argv[1:])"
    )
    layers = Path(__file__).parents[2] / "examples/megatron_layers/ckptconv_layers.py"
    command = [sys.executable, "-W", "ignore", str(layers), str(tmp_path / "pretrain_gpt.py"), "--bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("__main__ ckptconv_layers ['--bf16']"), done.stderr
