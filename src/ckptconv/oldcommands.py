"""Command lines of Megatron-LLM's converters, said in our own flags: `ckptconv hf_to_megatron llama2 --out DIR ...`.

Flags that a command does not know are passed on, so that ours can be given with it.

Source: epfLLM/Megatron-LLM at 806a833, `weights_conversion/hf_to_megatron.py`, `weights_conversion/megatron_to_hf.py`,
`weights_conversion/utils/merge_llama.py` (where weights come from), `tools/checkpoint_util.py`.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptconv import companions
from ckptconv.errors import UsageError

log = logging.getLogger("ckptconv")


@dataclass(frozen=True)
class Model:
    """A model that can be named: its sizes with their layers, where the hub has it ({} is the size), and Meta's.

    folder: what Meta's download of a size is called; version: of Meta's code (--llama-version).
    """

    layers: dict[int, int]
    hub: str
    folder: str = ""
    version: str = ""


MODELS = {
    "falcon":    Model({7: 32, 40: 60}, "tiiuae/falcon-{}b"),
    "llama":     Model({7: 32, 13: 40, 30: 60, 65: 80}, "huggyllama/llama-{}b", "{}B", "1"),
    "llama2":    Model({7: 32, 13: 40, 70: 80}, "meta-llama/Llama-2-{}b-hf", "llama-2-{}b", "2"),
    "llama3":    Model({8: 32, 70: 80}, "meta-llama/Meta-Llama-3-{}B", "Meta-Llama-3-{}B", "3"),
    "codellama": Model({7: 32, 13: 40, 34: 48}, "codellama/CodeLlama-{}b-hf", "CodeLlama-{}b", "codellama"),
    "mistral":   Model({7: 32}, "mistralai/Mistral-{}B-v0.1"),
    "gemma":     Model({2: 18, 7: 28}, "google/gemma-{}b"),
}  # fmt: skip

FIRST_SHARD, PARAMS = "consolidated.00.pth", "params.json"


def translated(words: Sequence[str], parser: Callable[..., ArgumentParser]) -> list[str]:
    """A command line in our own flags; the same one where it is no older command. Raises UsageError."""
    if not words or words[0] not in COMMANDS:
        return list(words)
    add_arguments, translate = COMMANDS[words[0]]
    made = parser(prog=f"ckptconv {words[0]}", description=add_arguments.__doc__, allow_abbrev=False)
    add_arguments(made)
    known = {name.replace("_", "-"): name for name in made._option_string_actions}
    spelled = [known.get(word.replace("_", "-"), word) if word.startswith("--") else word for word in _apart(words[1:])]
    args, rest = made.parse_known_args(spelled)
    return [*translate(args), *rest]


def _apart(words: Sequence[str]) -> list[str]:
    """`--flag=value` as two words."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


def _hf_to_megatron_arguments(parser: ArgumentParser) -> None:
    """Hugging Face or Meta weights to a release of Megatron-LLM."""
    parser.add_argument("model", choices=tuple(MODELS))
    parser.add_argument("--size", type=int, metavar="N", help="billions of parameters (default: the smallest)")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: falcon7b_megatron.pt and the like)")
    parser.add_argument("--model-path", metavar="PATH", help="a directory, or a name of the hub (default: by size)")
    parser.add_argument("--cache-dir", metavar="DIR", help="Meta's weights, or where the hub's files are kept")


def _hf_to_megatron(args: Namespace) -> list[str]:
    model = MODELS[args.model]
    size = args.size or min(model.layers)
    if size not in model.layers:
        raise UsageError(f"--size {size}: {args.model} has {', '.join(map(str, model.layers))}.")
    out = args.out or f"{args.model}{size}b_megatron.pt"
    source = _source(model, size, args)
    return ["--saver", "megatron_llm", "--save-dir", out, "--model-type", args.model, *source]


def _source(model: Model, size: int, args: Namespace) -> list[str]:
    """Where the weights are: at --model-path, Meta's or Hugging Face's in --cache-dir, or on the hub."""
    cache = Path(args.cache_dir) if args.cache_dir else None
    kept = ["--cache-dir", args.cache_dir] if args.cache_dir else []
    if args.model_path:
        _check_layers(Path(args.model_path), model, size, args)
        return ["--load-dir", args.model_path, *kept]
    if cache is not None and model.version:
        for folder in (cache, cache / model.folder.format(size)):
            if (folder / FIRST_SHARD).is_file():
                _check_layers(folder, model, size, args)
                return ["--loader", "meta", "--llama-version", model.version, "--load-dir", str(folder)]
    if cache is not None and (cache / companions.CONFIG).is_file():
        _check_layers(cache, model, size, args)
        return ["--load-dir", str(cache)]
    name = model.hub.format(size)
    log.info("the weights are those of %s on the Hugging Face hub", name)
    return ["--load-dir", name, *kept]


def _check_layers(folder: Path, model: Model, size: int, args: Namespace) -> None:
    """Say it when a directory holds another size than --size: what it holds is converted."""
    for file, key in ((companions.CONFIG, "num_hidden_layers"), (PARAMS, "n_layers")):
        if args.size and (folder / file).is_file():
            found = companions.read_json(folder / file).get(key)
            if found != model.layers[size]:
                log.warning(
                    "--size %d has %d layers, but %s says %s, which counts", size, model.layers[size], folder / file,
                    found,
                )  # fmt: skip


def _megatron_to_hf_arguments(parser: ArgumentParser) -> None:
    """A checkpoint of Megatron-LLM to a Hugging Face directory with its tokenizer."""
    parser.add_argument("--input-dir", required=True, metavar="DIR", help="what has latest_checkpointed_iteration.txt")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where to write")
    parser.add_argument("--model", choices=tuple(MODELS), help="checked against what is found")
    parser.add_argument("--num-output-shards", default="1", metavar="N", help="weight files (default 1)")
    parser.add_argument("--cache-dir", metavar="DIR", help="where the hub's files are kept")
    parser.add_argument("--vocab-file", metavar="PATH", help="the tokenizer: a file, directory or name of the hub")
    parser.add_argument("--vocab-extra-ids-list", metavar="A,B", help="tokens to append to the vocabulary")
    parser.add_argument("--override-special-tokens", nargs="*", metavar="KEY=TOKEN", help="such as eos=<|im_end|>")


def _megatron_to_hf(args: Namespace) -> list[str]:
    words = ["--loader", "megatron_llm", "--load-dir", args.input_dir, "--saver", "hf", "--save-dir", args.output_dir]
    words += ["--num-output-shards", args.num_output_shards]
    for flag, value in (("--model-type", args.model), ("--cache-dir", args.cache_dir),
                        ("--tokenizer-model", args.vocab_file),
                        ("--vocab-extra-ids-list", args.vocab_extra_ids_list)):  # fmt: skip
        words += [flag, value] if value else []
    if args.override_special_tokens:
        words += ["--override-special-tokens", *args.override_special_tokens]
    return words


def _checkpoint_util_arguments(parser: ArgumentParser) -> None:
    """Another layout of a checkpoint, or plugins of others: checkpoint_util.py, later tools/checkpoint/convert.py."""
    parser.add_argument("--model-type", required=True, metavar="NAME", help="as in --model-type without a sub-command")
    parser.add_argument("--loader", default="megatron", metavar="NAME")
    parser.add_argument("--saver", default="megatron", metavar="NAME")


def _checkpoint_util(args: Namespace) -> list[str]:
    """`megatron` reads what is there. Megatron-LLM's writes its own format, with GPT and BERT as the source has it."""
    saver = "megatron_llm" if args.saver == "megatron" and args.model_type in MODELS else args.saver
    return ["--model-type", args.model_type, "--loader", args.loader, "--saver", saver]


Command = tuple[Callable[[ArgumentParser], None], Callable[[Namespace], list[str]]]

COMMANDS: dict[str, Command] = {
    "hf_to_megatron": (_hf_to_megatron_arguments, _hf_to_megatron),
    "megatron_to_hf": (_megatron_to_hf_arguments, _megatron_to_hf),
    "checkpoint_util": (_checkpoint_util_arguments, _checkpoint_util),
}
