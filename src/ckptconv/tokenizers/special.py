"""Special tokens: overrides, tokens that are appended, and the small files that say which is which.

tokenizer_config.json and special_tokens_map.json as transformers 4.45 wrote them: 5 reads them, and 4 does not read
what 5 writes (a tokenizer_class that it does not have, lists where it wants objects).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptconv.errors import UsageError, near
from ckptconv.tokenizers.draft import Draft, Json, added

ROLES = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")

#: What Megatron's SentencePieceTokenizer appends, in this order, where the model lacks it.
MEGATRON = {
    "cls": "<CLS>", "sep": "<SEP>", "eod": "<EOD>", "mask": "<MASK>", "pad": "<PAD>", "bos": "<BOS>", "eos": "<EOS>",
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A tokenizer to write. files: name -> content; ids: role -> id; stop: ids that end a generation, eos first;
    size: largest id + 1; generation: how an instruct model is sampled; overridden: stop was asked for; made: it is
    not a Hugging Face tokenizer's own files."""

    files: dict[str, bytes]
    ids: dict[str, int]
    stop: list[int]
    size: int
    generation: dict[str, Any]
    overridden: bool
    made: bool


def as_megatron(made: Draft) -> Draft:
    """With the tokens that Megatron's SentencePieceTokenizer appends."""
    roles = dict(made.roles)
    extra = [token for role, token in MEGATRON.items() if role not in roles or role in ("cls", "sep", "eod", "mask")]
    roles |= {role: token for role, token in MEGATRON.items() if token in extra and role != "eod"}
    return replace(made, roles=roles, extra=tuple(extra))


def finish(made: Draft, overrides: Mapping[str, str], extra_ids: Sequence[str], where: str) -> Built:
    """The files. Raises UsageError for a token that is not in the vocabulary."""
    vocab = dict(made.vocabulary)
    size = 1 + max(vocab.values(), default=-1)
    wanted = [token for token in dict.fromkeys((*made.extra, *extra_ids)) if token not in vocab]
    vocab |= {token: size + i for i, token in enumerate(wanted)}
    for role, token in overrides.items():
        if token not in vocab:
            raise UsageError(
                f"--override-special-tokens {role}={token}: {token} is not in the vocabulary of {where}."
                f"{near(token, vocab)} --vocab-extra-ids-list adds tokens."
            )
    roles = {**made.roles, **overrides}
    touched = dict.fromkeys((*made.extra, *extra_ids, *overrides.values()))
    stop = [vocab[overrides["eos"]]] if "eos" in overrides else [vocab[token] for token in made.stop]
    if not stop and roles.get("eos") in vocab:
        stop = [vocab[roles["eos"]]]
    ids = {role: vocab[token] for role, token in roles.items() if role in ROLES and token in vocab}
    files = dict(made.files)
    if made.built or touched:
        files |= _written(made, roles, {token: vocab[token] for token in touched}, extra_ids)
    size = 1 + max(vocab.values(), default=-1)
    return Built(files, ids, stop, size, made.generation, "eos" in overrides, made.built)


def _written(
    made: Draft, roles: Mapping[str, str], touched: Mapping[str, int], extra_ids: Sequence[str]
) -> dict[str, bytes]:
    config = {**made.config, **{f"{role}_token": token for role, token in roles.items()}}
    changes = {role: (made.roles[role], token) for role, token in roles.items() if role in made.roles}
    entries = _entries(made, touched)
    if made.built:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"], **config,
        }  # fmt: skip
        if made.chat_template:
            config["chat_template"] = made.chat_template
    decoder = dict(config.get("added_tokens_decoder") or {})
    for entry in entries:
        flags = {key: value for key, value in entry.items() if key != "id"}
        if made.built or entry["content"] in touched:
            decoder[str(entry["id"])] = flags
    config["added_tokens_decoder"] = dict(sorted(decoder.items(), key=lambda item: int(item[0])))
    listed = [*(_names(config)), *extra_ids]
    if made.extra:
        listed += [token for token in made.extra if token not in roles.values()]
    if listed:
        config.pop("extra_special_tokens", None)
        config["additional_special_tokens"] = list(dict.fromkeys(listed))
    files = {"tokenizer_config.json": _bytes(config)}
    mapped = {f"{role}_token": token for role, token in roles.items()}
    if listed:
        mapped["additional_special_tokens"] = config["additional_special_tokens"]
    if made.built or "special_tokens_map.json" in made.files:
        files["special_tokens_map.json"] = _bytes(mapped)
    if "added_tokens.json" in made.files:
        there = json.loads(made.files["added_tokens.json"])
        files["added_tokens.json"] = _bytes({**there, **touched})
    if made.json is not None:
        processor = _processor(made.json.get("post_processor"), changes, {**made.vocabulary, **touched})
        whole = {**made.json, "added_tokens": entries, "post_processor": processor}
        files["tokenizer.json"] = _bytes(whole)
    return files


def _names(config: Json) -> list[str]:
    """Additional special tokens of a config, as either version of transformers lists them."""
    found = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    values = found.values() if isinstance(found, dict) else found
    return [token.get("content", "") if isinstance(token, dict) else str(token) for token in values]


def _entries(made: Draft, touched: Mapping[str, int]) -> list[Json]:
    """`added_tokens`: those there were, and what is special now."""
    there = list((made.json or {}).get("added_tokens") or ())
    old = [{**entry, "special": True} if entry["content"] in touched else entry for entry in there]
    known = {entry["content"] for entry in there}
    return sorted([*old, *(added(t, i) for t, i in touched.items() if t not in known)], key=lambda e: int(e["id"]))


#: role -> (token it had, token it has)
_Changes = Mapping[str, tuple[str, str]]


def _changed(token: str, changes: _Changes, roles: Sequence[str]) -> str:
    """What stands where `token` stood, in the first of `roles` that it had."""
    return next((changes[role][1] for role in roles if role in changes and changes[role][0] == token), token)


def _processor(part: Any, changes: _Changes, vocab: Mapping[str, int]) -> Any:
    """A post-processor that puts the new tokens where it put the old ones."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        return {**part, "processors": [_processor(step, changes, vocab) for step in part["processors"]]}
    if part.get("type") != "TemplateProcessing":
        swapped = {}
        for key, roles in (("cls", ("cls", "bos")), ("sep", ("sep", "eos"))):  # BertProcessing, RobertaProcessing
            if isinstance(part.get(key), list):
                token = _changed(part[key][0], changes, roles)
                swapped[key] = [token, vocab[token]]
        return {**part, **swapped}
    used: set[str] = set()

    def put(steps: list[Json]) -> list[Json]:
        done: list[Json] = []
        for step in steps:
            if "SpecialToken" in step:
                # One token may be both bos and eos: it is bos before the first text, and else eos.
                behind = any("Sequence" in earlier for earlier in done)
                roles = ("eos", "sep", "bos", "cls") if behind else ("bos", "cls", "eos", "sep")
                token = _changed(step["SpecialToken"]["id"], changes, roles)
                used.add(token)
                step = {"SpecialToken": {**step["SpecialToken"], "id": token}}
            done.append(step)
        return done

    single, pair = put(part["single"]), put(part["pair"])
    tokens = {text: {"id": text, "ids": [vocab[text]], "tokens": [text]} for text in sorted(used)}
    return {**part, "single": single, "pair": pair, "special_tokens": tokens}


def _bytes(data: Json) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
