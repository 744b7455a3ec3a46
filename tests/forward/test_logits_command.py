"""`ckptconv logits`: what it prints, which tokens go in, and what it says of checkpoints that differ."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import streams
import torch
from safetensors.torch import load_file, save_file

from ckptconv.commands.logits import spread
from commands import convert
from fixtures import logits as theirs
from inprocess import here, main

Hf = Callable[..., Path]
Cli = Callable[..., Any]


def printed(*words: object) -> dict[str, Any]:
    """What --json prints."""
    done = here("logits", *words, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def changed(source: Path, out: Path, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint in which one tensor is another."""
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    weights[name] = value(weights[name]).contiguous()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def test_the_command(cli: Cli, hf: Hf, tmp_path: Path) -> None:
    """As a process, with a prompt, against another format."""
    mcore = convert(hf("llama2"), tmp_path / "mcore", "megatron_mcore", "--target-tp", 2, "--target-pp", 2)
    done = cli("logits", hf("llama2"), "--prompt", "hello world", "--against", mcore)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{hf('llama2')}: hf, llama, 4 layers, float32"
    assert lines[-1].startswith("top tokens agree at")
    assert "difference: 0 at most, 0 on average" in lines
    digests = re.findall(r"digest  (sha256:[0-9a-f]{64}) of logits \[\d+, 131\]", done.stdout)
    assert len(digests) == 2
    assert digests[0] == digests[1]
    assert len(re.findall(r"^  top \d +-?\d+\.\d{4}  \d+  '.*'$", done.stdout, re.MULTILINE)) == 10
    assert re.search(r"logits: \d+\.\d s, peak memory \d+ MiB", done.stderr)


def test_the_tokens_that_come_next(hf: Hf) -> None:
    ids = [5, 80, 17, 33]
    found = printed(hf("qwen2"), "--token-ids", "5,80,17,33", "--top", 3)["checkpoint"]
    wanted = theirs(hf("qwen2"), torch.tensor([ids]))[0]
    assert found["token_ids"] == ids
    assert found["shape"] == [4, 131]
    assert [one["id"] for one in found["top"]] == wanted[-1].topk(3).indices.tolist()
    assert [one["logit"] for one in found["top"]] == pytest.approx(wanted[-1].topk(3).values.tolist(), abs=1e-4)
    assert found["best_of_every_position"] == wanted.argmax(-1).tolist()
    assert found["not_finite"] == 0


def test_a_prompt_is_what_the_tokenizer_makes_of_it(hf: Hf, tmp_path: Path) -> None:
    """Of tokenizer.json, of a tokenizer.model alone, and of one that lies elsewhere."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(hf("llama2") / "tokenizer.json"))
    wanted = library.encode("the quick brown fox").ids
    assert wanted[0] == 1  # beginning of text
    raw = tmp_path / "raw"
    shutil.copytree(hf("llama2"), raw)
    (raw / "tokenizer.json").unlink()
    bare = hf("llama2", tokenizer=False)
    for words in ((hf("llama2"),), (raw,), (bare, "--tokenizer-model", hf("llama2") / "tokenizer.model")):
        found = printed(*words, "--prompt", "the quick brown fox")["checkpoint"]
        assert found["token_ids"] == wanted
        assert found["top"][0]["text"] == library.decode([found["top"][0]["id"]])


def test_tokens_when_none_are_given(hf: Hf) -> None:
    found = printed(hf("llama2", tokenizer=False))["checkpoint"]
    assert found["token_ids"] == spread(131, 16)
    assert len(set(spread(131, 16))) == 16
    assert all(0 <= token < 2 for token in spread(2, 16))
    assert "text" not in found["top"][0]


def test_two_that_differ(hf: Hf, tmp_path: Path) -> None:
    """Where, by how much, and from which layer on."""
    name = "model.layers.2.mlp.up_proj.weight"
    other = changed(hf("llama2"), tmp_path / "other", name, lambda w: w + 0.05 * torch.randn(w.shape))
    done = here("logits", hf("llama2"), "--against", other, "--json")
    assert done.returncode == 8
    assert re.search(r"up to \S+, more than --atol 0.0001, and hidden .* 'transformer layer 2' on\.", done.stderr)
    found = json.loads(done.stdout)["difference"]
    ids = spread(131, 16)
    apart = (streams.logits(hf("llama2"), ids) - streams.logits(other, ids)).abs()
    assert found["max"] == pytest.approx(float(apart.max()))
    assert float(apart[found["position"], found["id"]]) == float(apart.max())
    assert found["first"] == "transformer layer 2"
    assert here("logits", hf("llama2"), "--against", other, "--atol", found["max"]).returncode == 0


def test_a_head_that_differs(hf: Hf, tmp_path: Path) -> None:
    other = changed(hf("llama2"), tmp_path / "other", "lm_head.weight", lambda w: w.flip(0))
    done = here("logits", hf("llama2"), "--against", other)
    assert done.returncode == 8
    assert "from 'output layer' on" in done.stderr


def test_numbers_that_are_none(hf: Hf, tmp_path: Path) -> None:
    """What cannot be compared is not equal."""
    other = changed(hf("llama2"), tmp_path / "other", "model.norm.weight", lambda w: w * float("nan"))
    done = here("logits", hf("llama2"), "--against", other)
    assert done.returncode == 8
    assert f"{16 * 131} logits are not finite" in done.stdout
    assert here("logits", other, "--against", other).returncode == 8


def test_another_model_is_told_apart(hf: Hf) -> None:
    done = here("logits", hf("llama2"), "--against", hf("codellama"))
    assert done.returncode == 8
    assert "models differ: rope.theta: 10000.0 != 1000000.0" in done.stdout
    assert "vocabularies of 131 and 137 tokens: the first 131 are compared" in done.stdout


def test_a_cast_is_told_from_an_error(hf: Hf, tmp_path: Path) -> None:
    """bf16 of an fp32 model: not within the usual tolerance, within that of bf16, the same model."""
    cast = convert(hf("llama2"), tmp_path / "cast", "hf", "--dtype", "bf16")
    assert here("logits", hf("llama2"), "--against", cast).returncode == 8
    done = here("logits", hf("llama2"), "--against", cast, "--atol", "0.2")
    assert done.returncode == 0
    assert "models differ" not in done.stdout


def test_a_loader_of_others(hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows only Megatron's fields, and nothing of lazy tensors."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "plugins"))
    out = convert(hf("llama2"), tmp_path / "out", "numpy")
    done = here("logits", hf("llama2"), "--against", out, "--against-loader", "numpy")
    assert done.returncode == 0, done.stderr
    assert "difference: 0 at most" in done.stdout


def test_flags_of_the_loader(hf: Hf, tmp_path: Path) -> None:
    mcore = convert(hf("llama2"), tmp_path / "mcore", "megatron_mcore")
    assert printed(mcore, "--iteration", 1)["checkpoint"]["loader"] == "megatron_mcore"
    done = here("logits", mcore, "--iteration", 7)
    assert done.returncode == 3
    assert "iter_0000007" in done.stderr
    done = here("logits", hf("llama2"), "--iteration", 7)
    assert (done.returncode, "unknown --iteration" in done.stderr) == (2, True)
    assert "--true-vocab-size" in helped(mcore)
    assert "--true-vocab-size" not in helped(hf("llama2"))


def helped(place: Path) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["logits", place, "--help"])
    return out.getvalue()


def test_what_is_no_decoder(hf: Hf) -> None:
    done = here("logits", hf("bert"))
    assert done.returncode == 2
    assert f"{hf('bert')}: bert is no decoder" in done.stderr


def test_tokens_that_the_second_does_not_have(hf: Hf) -> None:
    done = here("logits", hf("codellama"), "--against", hf("llama2"), "--token-ids", "1,136")
    assert done.returncode == 2
    assert f"{hf('llama2')}: token ids [136]: expected one or more of 0 to 130" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "required: DIR"),
        (("{}/none",), 2, "does not exist"),
        (("{}", "--token-ids", "131"), 2, "token ids [131]: expected one or more of 0 to 130"),
        (("{}", "--token-ids", "1,x"), 2, "'1,x' is no list of token ids"),
        (("{}", "--token-ids", "1", "--prompt", "a"), 2, "not allowed with"),
        (("{}", "--prompt", "a"), 2, "no tokenizer lies with the checkpoint"),
        (("{}", "--atol", "-1"), 2, "is not a number of 0 or more"),
        (("{}", "--loader", "nobody"), 2, "no loader called 'nobody'"),
        (("{}", "--token-idz", "1"), 2, "unknown --token-idz. Did you mean '--token-ids'?"),
    ],
)
def test_what_is_wrong_is_said(hf: Hf, words: tuple[str, ...], code: int, said: str) -> None:
    done = here("logits", *(word.format(hf("llama2", tokenizer=False)) for word in words))
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_source(hf: Hf, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf("llama2"), other)
    data = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(data | {"num_hidden_layers": 5}))
    done = here("logits", other)
    assert done.returncode == 3
    assert "lacks model.layers.4." in done.stderr


LARGE = {"vocab_size": 64, "hidden_size": 4096, "intermediate_size": 28672, "num_hidden_layers": 1,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": True}  # fmt: skip


def test_memory_is_that_of_a_block(cli: Cli, tmp_path: Path) -> None:
    """A model of one layer of 0.8 GB, which is 1.6 GB in fp32: holes of a file, all zeros."""
    from fixtures import shapes

    config = {"model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16", **LARGE}
    header, end = {}, 0
    for name, shape in shapes(config):
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert end > 750 << 20
    done = cli("logits", tmp_path)
    assert done.returncode == 0, done.stderr
    peak = re.search(r"peak memory (\d+) MiB", done.stderr)
    assert peak
    assert int(peak[1]) < 450
