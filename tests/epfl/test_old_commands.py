"""Command lines of Megatron-LLM's tools: what they become, and flags that came with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ckptconv import cli, hub
from ckptconv.errors import UsageError
from ckptconv.oldcommands import MODELS, translated
from commands import convert, run, same, weights_of
from inprocess import here, main

Hf = Callable[..., Path]


def said(*words: object) -> str:
    return " ".join(translated([str(word) for word in words], cli._Parser))


@pytest.mark.parametrize(("words", "name"), [
    ("falcon --size 7", "tiiuae/falcon-7b"),
    ("falcon --size 40", "tiiuae/falcon-40b"),
    ("llama", "huggyllama/llama-7b"),
    ("llama2 --size 70", "meta-llama/Llama-2-70b-hf"),
    ("codellama --size 34", "codellama/CodeLlama-34b-hf"),
    ("mistral", "mistralai/Mistral-7B-v0.1"),
    ("llama3", "meta-llama/Meta-Llama-3-8B"),
    ("gemma --size 2", "google/gemma-2b"),
])  # fmt: skip
def test_what_is_fetched(words: str, name: str) -> None:
    """Without --model-path and Meta's shards the weights come from the hub, whose cache is --cache-dir."""
    model = words.split()[0]
    line = said("hf_to_megatron", *words.split(), "--out", "DIR", "--cache-dir", "/nowhere")
    assert line == f"--saver megatron_llm --save-dir DIR --model-type {model} --load-dir {name} --cache-dir /nowhere"
    assert hub.is_name(name)


def test_defaults_and_further_flags() -> None:
    assert "--save-dir falcon7b_megatron.pt" in said("hf_to_megatron", "falcon")
    words = ["--out=DIR", "--model_path", "HERE", "--target-tp", 4, "--bf16", "--size=13"]
    line = said("hf_to_megatron", "llama2", *words)
    assert line.endswith("--load-dir HERE --target-tp 4 --bf16") and "--save-dir DIR" in line
    assert said("--load-dir", "hf_to_megatron") == "--load-dir hf_to_megatron"  # not a sub-command there


@pytest.mark.parametrize("words", ["hf_to_megatron llama2 --size 40", "hf_to_megatron gpt2", "hf_to_megatron",
                                   "megatron_to_hf --input_dir X", "checkpoint_util --load_dir X"])  # fmt: skip
def test_wrong_command_lines(words: str) -> None:
    with pytest.raises(UsageError):
        said(*words.split())
    assert here(*words.split()).returncode == 2


def test_help() -> None:
    for name in ("hf_to_megatron", "megatron_to_hf", "checkpoint_util"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0


def test_meta_releases(tmp_path: Path) -> None:
    """The model's name says whose code Meta's shards are for; falcon and mistral have none."""
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    for name, model in MODELS.items():
        line = said("hf_to_megatron", name, "--cache-dir", tmp_path)
        if model.version:
            assert f"--loader meta --llama-version {model.version} --load-dir {tmp_path}" in line
        else:
            assert "--loader" not in line and model.hub.format(min(model.layers)) in line


def test_size_is_compared(hf: Hf, tmp_path: Path) -> None:
    result = here("hf_to_megatron", "llama2", "--size", 7, "--model-path", hf("llama2"), "--out", tmp_path / "out",
                  "--no-progress")  # fmt: skip
    assert result.returncode == 0 and "--size 7 has 32 layers" in result.stderr
    wrong = here("hf_to_megatron", "falcon", "--model-path", hf("llama2"), "--out", tmp_path / "no", "--no-progress")
    assert wrong.returncode == 2 and not (tmp_path / "no").exists()


def test_older_convert_py(hf: Hf, tmp_path: Path) -> None:
    """The command line of the older convert.py: every flag of its document, and its default loader and saver."""
    first = convert(hf("llama3"), tmp_path / "one", "megatron_llm")
    command = ["--model_type", "llama3", "--load_dir", first, "--max_queue_size", 20, "--no_checking", "--bf16",
               "--kv_channels", 12, "--target_tensor_parallel_size", 2, "--true_vocab_size", 131,
               "--no-progress"]  # fmt: skip
    assert main(["checkpoint_util", *command, "--save_dir", tmp_path / "two"]) == 0
    assert main([*command, "--loader", "megatron", "--saver", "megatron", "--save_dir", tmp_path / "three"]) == 0
    for rank in ("mp_rank_00", "mp_rank_01"):
        two, three = (torch.load(tmp_path / n / "release" / rank / "model_optim_rng.pt", weights_only=False)
                      for n in ("two", "three"))  # fmt: skip
        assert two["args"].bf16 and vars(two["args"]) == vars(three["args"])
        left, right = (x["model"]["language_model"]["encoder"] for x in (two, three))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    back = weights_of(convert(tmp_path / "two", tmp_path / "back"))
    same(back, {name: tensor.bfloat16() for name, tensor in weights_of(hf("llama3")).items()})


@pytest.mark.parametrize("model", ["GPT", "falcon", "llama", "llama2", "llama3", "codellama", "mistral", "gemma"])
def test_model_types(hf: Hf, tmp_path: Path, model: str) -> None:
    """Every --model_type of the older convert.py is taken; BERT is none of this format."""
    fixture = {"GPT": "gpt2", "falcon": "falcon_7b", "llama": "llama1"}.get(model, model)
    first = convert(hf(fixture), tmp_path / "one", "megatron_llm")
    command = ["checkpoint_util", "--model_type", model, "--load_dir", first, "--save_dir", tmp_path / "two"]
    assert main([*command, "--target_pipeline_parallel_size", 2, "--no-progress"]) == 0
    same(weights_of(convert(tmp_path / "two", tmp_path / "back")), weights_of(hf(fixture)))
    other = ["checkpoint_util", "--model_type", "BERT", "--load_dir", first, "--save_dir", tmp_path / "no"]
    assert main([*other, "--no-progress"]) == 2


def test_load_iters(hf: Hf, tmp_path: Path) -> None:
    """checkpoint_util.py's choice of an iteration; 0 is the release."""
    made = convert(hf("llama2"), tmp_path / "llm", "megatron_llm", "--iteration", 5)
    convert(hf("llama1"), made, "megatron_llm", "--overwrite")
    assert sorted(path.name for path in made.iterdir() if path.is_dir()) == ["hf", "iter_0000005", "release"]
    same(weights_of(convert(made, tmp_path / "five", "hf", "--load_iters", 5)), weights_of(hf("llama2")))
    same(weights_of(convert(made, tmp_path / "zero", "hf", "--load_iters", 0)), weights_of(hf("llama1")))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 38, 39])
def test_num_output_shards(hf: Hf, tmp_path: Path, count: int) -> None:
    """Exactly as many files as are asked for, none without a tensor, and none far larger than its share."""
    out = convert(hf("llama2"), tmp_path / "out", "hf", "--num-output-shards", count, "--verify")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == count and (out / "model.safetensors.index.json").exists() == (count > 1)
    sizes = []
    for path in files:
        with safe_open(path, "pt") as file:
            sizes.append(sum(file.get_tensor(name).nbytes for name in file.keys()))  # noqa: SIM118
    tensors = weights_of(hf("llama2"))
    whole, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    assert min(sizes) > 0 and max(sizes) <= whole / count + largest
    same(weights_of(out), tensors)


def test_more_files_than_tensors(hf: Hf, tmp_path: Path) -> None:
    assert run(hf("llama2"), tmp_path / "out", "hf", "--num-output-shards", 40) == 7
    assert not (tmp_path / "out").exists()
    both = run(hf("llama2"), tmp_path / "out", "hf", "--num-output-shards", 2, "--full-state-file")
    assert both == 2 and not (tmp_path / "out").exists()
