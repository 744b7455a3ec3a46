"""Make a small random Llama with a real tokenizer, convert it to Megatron-Core and back, and show that it is equal.

    python examples/quickstart.py [DIRECTORY]

Nothing is downloaded. The two conversions are the very commands a user types.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

TEXT = (
    "the quick brown fox jumps over the lazy dog\nconverting checkpoints between formats is fun\n"
    "numbers 0 1 2 3 4 5 6 7 8 9 and café\n"
) * 20


def make_tokenizer(directory: Path) -> int:
    """Train a byte-level BPE on a few lines and write the files a Hugging Face directory has; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=331, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return int(tokenizer.get_vocab_size())


def make_llama(directory: Path) -> None:
    """A 4-layer Llama 3 in bf16 with random weights, saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True)
    vocab_size = make_tokenizer(directory)
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32768, rope_parameters=scaling, bos_token_id=0, eos_token_id=1,
    ))  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="3MB")


def run(*words: str) -> None:
    """Show a command, then run it."""
    print("\n$ ckptconv", *words, flush=True)
    subprocess.run([sys.executable, "-m", "ckptconv", *words], check=True)


def show(directory: Path) -> None:
    """The files of a directory with their sizes."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            print(f"  {path.stat().st_size:>9,}  {path.relative_to(directory.parent)}")


def tensors(directory: Path) -> dict[str, object]:
    """All tensors of a Hugging Face directory, read with the safetensors library."""
    from safetensors.torch import load_file

    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def main() -> int:
    """Make, convert, convert back, compare."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.ERROR)
    top = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="ckptconv-"))
    llama, mcore, back = top / "llama", top / "mcore", top / "back"
    print(f"A random Llama 3 with its own tokenizer, in {llama}:")
    make_llama(llama)
    show(llama)
    run("--loader", "hf_llama", "--saver", "megatron_mcore", "--load-dir", str(llama), "--save-dir", str(mcore),
        "--target-tp", "2", "--target-pp", "2")  # fmt: skip
    show(mcore)
    run("--loader", "megatron_mcore", "--saver", "hf", "--load-dir", str(mcore), "--save-dir", str(back), "--verify")
    show(back)
    before, after = tensors(llama), tensors(back)
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)  # type: ignore[arg-type]
    print(f"\n{len(before)} tensors, equal bit for bit after the way there and back: {same}")
    ids = AutoTokenizer.from_pretrained(back)("the quick brown fox", return_tensors="pt").input_ids
    logits = [AutoModelForCausalLM.from_pretrained(d)(ids).logits for d in (llama, back)]
    agree = torch.equal(*logits)
    print(f"transformers reads the result; logits for 'the quick brown fox' equal: {agree}")
    print(f"Megatron-LM trains from {mcore} with the flags in {mcore / 'megatron_args.txt'}")
    return 0 if same and agree else 1


if __name__ == "__main__":
    sys.exit(main())
