"""Legacy checkpoints against Megatron-LM's own legacy classes: it loads and runs ours, and we read what it saves.

Needs a Megatron-LM checkout of 0.12 to 0.15 in CKPTCONV_MEGATRON_LM (run with core_v0.12.0, 0.13.0 and 0.15.0). What
transformers computes is expected on both ways, so neither of our tables can excuse the other. One process of
Megatron-LM for all jobs (legacy.py). Of later releases 0.16 and 0.17 still have the classes, which ask for an argument
that their parser no longer has; from 0.13 on virtual stages of legacy models fail an assertion of megatron-core.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

import fixtures
import legacy
from commands import convert
from legacy import Job


def version(checkout: str) -> tuple[int, int]:
    text = Path(checkout, "megatron/core/package_info.py").read_text()
    major, minor = (re.search(rf"^{part} = (\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR"))
    assert major
    assert minor
    return int(major[1]), int(minor[1])


CHECKOUTS = [path for path in os.environ.get("CKPTCONV_MEGATRON_LM", "").split(":") if path and version(path) < (0, 16)]
pytestmark = pytest.mark.skipif(
    not CHECKOUTS, reason="CKPTCONV_MEGATRON_LM names no Megatron-LM checkout with legacy models that run (up to 0.15)"
)
checkouts = pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: Path(path).name)

IDS = [[1, 5, 9, 100, 30, 7, 2, 64], [3, 3, 8, 120, 77, 11, 19, 4]]
TYPES = [[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 0]]
#: name -> fixture, tp, pp, vpp, whether all settings but the layout come from the checkpoint's args
WRITTEN = {
    "gpt2": ("gpt2", 1, 1, 1, False),
    "gpt2 restarted": ("gpt2", 2, 2, 1, True),
    "gpt2 vpp": ("gpt2", 1, 2, 2, False),
    "gpt2 untied exact": ("gpt2_untied", 1, 2, 1, True),
    "llama": ("llama2", 2, 2, 1, False),
    "llama restarted": ("llama2", 2, 1, 1, True),
    "llama biases": ("llama_both_bias", 2, 1, 1, False),
    "qwen2 bias": ("qwen2_tied", 2, 2, 1, True),
    "bert": ("megatron_bert", 1, 1, 1, False),
    "bert restarted": ("megatron_bert", 2, 2, 1, True),
    "bert vpp": ("megatron_bert", 1, 2, 2, True),
    "bert tanh": ("megatron_bert_tanh", 1, 1, 1, False),
}  # fmt: skip
SMALL = [
    "--num-layers", "4", "--hidden-size", "48", "--num-attention-heads", "4", "--seq-length", "8",
    "--max-position-embeddings", "16", "--vocab-size", "131", "--make-vocab-size-divisible-by", "8",
    "--tokenizer-type", "NullTokenizer", "--ckpt-format", "torch", "--use-legacy-models", "--transformer-impl", "local",
    "--no-persist-layer-norm", "--attention-dropout", "0", "--hidden-dropout", "0",
]  # fmt: skip
LLAMA = ["--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "rope", "--disable-bias-linear",
         "--untie-embeddings-and-output-weights", "--ffn-hidden-size", "88"]  # fmt: skip
GQA = ["--group-query-attention", "--num-query-groups", "2"]
#: name -> flags, tp, pp, vpp, checkpoint version, whether it is BERT
SAVED = {
    "gpt": ([], 1, 1, 1, 3, False),
    "gpt pp": ([], 1, 2, 1, 3, False),
    "gpt vpp": (["--squared-relu", "--no-bias-gelu-fusion"], 2, 2, 2, 3, False),
    "gpt exact": (["--no-bias-gelu-fusion", "--rotary-percent", "0.5", "--position-embedding-type", "rope"], 1, 1, 1, 3,
                  False),
    "gpt openai": (["--openai-gelu"], 1, 1, 1, 3, False),
    "nemotron": (["--apply-layernorm-1p", "--squared-relu", "--position-embedding-type", "rope", "--rotary-percent",
                  "0.5", "--disable-bias-linear", "--untie-embeddings-and-output-weights"], 2, 1, 1, 3, False),
    "gpt version 0": ([], 2, 1, 1, 0, False),
    "gpt version 1": ([], 2, 1, 1, 1, False),
    "gpt version 2": ([], 2, 1, 1, 2, False),
    "llama": (LLAMA, 1, 2, 1, 3, False),
    "llama gqa": ([*LLAMA, *GQA], 2, 2, 1, 3, False),
    "bert": (["--no-bias-gelu-fusion"], 1, 1, 1, 3, True),
    "bert pp": (["--no-bias-gelu-fusion"], 2, 2, 1, 3, True),
    "bert openai": (["--openai-gelu", "--no-bias-gelu-fusion"], 1, 1, 1, 3, True),
    "bert version 0": (["--no-bias-gelu-fusion"], 2, 1, 1, 0, True),
    "bert vpp": (["--no-bias-gelu-fusion"], 1, 2, 2, 3, True),
}  # fmt: skip


@cache
def work(checkout: str = "") -> Path:
    folder = mkdtemp(prefix="legacy-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def source(fixture: str) -> Path:
    # The legacy models know no other base of the rotary embedding.
    return fixtures.build(fixture, work() / fixture, **({"rope_theta": 10000.0} if "qwen" in fixture else {}))


@cache
def written(name: str) -> Path:
    fixture, tp, pp, vpp, _ = WRITTEN[name]
    flags = ["--target-tp", tp, "--target-pp", pp, "--tokenizer-type", "NullTokenizer"]
    flags += ["--target-vpp", vpp] if vpp > 1 else []
    return convert(source(fixture), work() / f"written {name}", "megatron_legacy", *flags)


def words(checkpoint: Path) -> list[str]:
    lines = (checkpoint / "megatron_args.txt").read_text().splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


def job_of(checkout: str, name: str) -> Job:
    """A restart: with all flags that we tell, or with --use-checkpoint-args and no others but the layout's."""
    fixture, tp, pp, vpp, restarted = WRITTEN[name]
    bert, folder = "bert" in fixture, written(name)
    argv = words(folder)
    if restarted:
        argv = ["--use-checkpoint-args", "--use-mp-args-from-checkpoint-args", "--use-legacy-models", "--ckpt-format",
                "torch", "--transformer-impl", "local", "--tokenizer-type", "NullTokenizer",
                "--no-persist-layer-norm"]  # fmt: skip
        # What --use-checkpoint-args does not restore.
        told = words(folder)
        for flag in ("--norm-epsilon", "--vocab-size", "--num-virtual-stages-per-pipeline-rank"):
            argv += told[told.index(flag) : told.index(flag) + 2] if flag in told else []
        argv += [flag for flag in ("--no-bias-gelu-fusion",) if flag in told]
    out = str(work(checkout) / f"written {name}.pt")
    return Job(
        f"written {name}",
        [*argv, *legacy.RUN, "--seq-length", "8", "--load", str(folder)],
        IDS,
        out,
        bert,
        TYPES if bert else [],
        tp,
        pp,
        vpp,
    )


def saved_job(checkout: str, name: str) -> Job:
    flags, tp, pp, vpp, version, bert = SAVED[name]
    layout = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    layout += ["--num-layers-per-virtual-pipeline-stage", str(4 // pp // vpp)] if vpp > 1 else []
    folder = work(checkout) / f"saved {name}"
    return Job(f"saved {name}", [*SMALL, *layout, *flags, *legacy.RUN], IDS, str(work(checkout) / f"{name}.pt"), bert,
               TYPES if bert else [], tp, pp, vpp, str(folder), version)  # fmt: skip


def loaded_job(checkout: str, name: str) -> Job:
    """The same model loaded again by Megatron-LM from what `saved_job` saved, with its own fix of old orders."""
    one = saved_job(checkout, name)
    return Job(
        f"loaded {name}",
        [*one.argv, "--load", one.save],
        IDS,
        one.out + " again",
        one.bert,
        one.types,
        one.tp,
        one.pp,
        one.vpp,
    )


OLD = [name for name, case in SAVED.items() if case[4] < 3]


@cache
def results(checkout: str) -> dict[str, dict[str, torch.Tensor] | str]:
    jobs = [job_of(checkout, name) for name in WRITTEN]
    jobs += [saved_job(checkout, name) for name in SAVED] + [loaded_job(checkout, name) for name in OLD]
    return legacy.run(checkout, [job for job in jobs if runs(checkout, job.vpp)], work(checkout))


def runs(checkout: str, vpp: int) -> bool:
    return vpp == 1 or version(checkout) < (0, 13)


def result(checkout: str, name: str) -> dict[str, torch.Tensor]:
    if name not in results(checkout):
        pytest.skip("this release runs no virtual stages of legacy models")
    found = results(checkout)[name]
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return found


def transformers(folder: Path, bert: bool, types: list[list[int]]) -> dict[str, torch.Tensor]:
    if not bert:
        return {"logits": fixtures.logits(folder, torch.tensor(IDS))}
    model = fixtures.load(folder)
    with torch.no_grad():
        out = model(torch.tensor(IDS), token_type_ids=torch.tensor(types) if types else None)
    if "prediction_logits" not in out:
        return {"logits": out.logits}
    return {"logits": out.prediction_logits, "binary": out.seq_relationship_logits}


def close(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        got = found[name][..., : tensor.shape[-1]]
        assert tensor.abs().max() > 0.1, name
        assert (got - tensor).abs().max() < 2e-5 * max(1, tensor.abs().max()), name


@checkouts
@pytest.mark.parametrize("name", WRITTEN)
def test_megatron_restarts_from_what_is_written(checkout: str, name: str) -> None:
    fixture = WRITTEN[name][0]
    close(result(checkout, f"written {name}"), transformers(source(fixture), "bert" in fixture, TYPES))


@checkouts
@pytest.mark.parametrize("name", SAVED)
def test_what_megatron_saves_is_read(checkout: str, name: str) -> None:
    found = result(checkout, f"saved {name}")
    job = saved_job(checkout, name)
    back = work(checkout) / f"back {name}"
    convert(Path(job.save), back, "hf", "--true-vocab-size", 131)
    close(found, transformers(back, job.bert, job.types))


@checkouts
@pytest.mark.parametrize("name", OLD)
def test_older_versions_are_what_megatron_reads(checkout: str, name: str) -> None:
    """The fixture is right: Megatron-LM's own fix of old qkv orders gives the model that was saved."""
    found, again = result(checkout, f"saved {name}"), result(checkout, f"loaded {name}")
    close(again, found)
