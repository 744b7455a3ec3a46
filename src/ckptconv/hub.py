"""Models of the Hugging Face hub: fetched into its cache with huggingface_hub, only the files a conversion reads.

A token comes from the environment or the saved login, which that library looks up, or is asked for when the server
wants one and there is a terminal; it is given to the library for this run and kept nowhere.
"""

from __future__ import annotations

import getpass
import logging
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from ckptconv import companions
from ckptconv.containers import hfdir
from ckptconv.errors import CkptconvError, SourceError, some

log = logging.getLogger("ckptconv.loader")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of what can be fetched."""
    add = parser.add_argument
    add("--hf-model-name", metavar="ORG/NAME", help="a model of the Hugging Face hub, where there is no --load-dir")
    add("--hf-revision", metavar="NAME", help="branch, tag or commit of a model of the hub (default main)")
    add("--cache-dir", metavar="DIR", help="where the hub's files are kept (default: as its own tools have it)")


def is_name(text: str) -> bool:
    """Whether something that was given as a path can only be a model of the hub."""
    return bool(_NAME.fullmatch(text)) and not Path(text).exists()


def named(args: Namespace) -> str | None:
    """The model of the hub that --load-dir or --hf-model-name says, if any: a directory that is there is one."""
    path: str | None = args.load_dir
    if path is None or not args.hf_model_name:
        return args.hf_model_name if path is None else path if is_name(path) else None
    log.warning("--hf-model-name %s is ignored, as --load-dir is given.", args.hf_model_name)
    return None


def fetch(
    name: str, revision: str | None = None, cache_dir: str | None = None, *, tokenizer: bool = False,
    progress: bool = True,
) -> str:  # fmt: skip
    """The directory in the cache that holds a model, or only its `tokenizer`. Raises SourceError."""
    try:
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise SourceError(
            f"{name}: there is no such directory, and huggingface_hub, which fetches models, is not installed. Is the "
            "path right?"
        ) from error
    if not progress:
        disable_progress_bars()
    for client in ("httpx", "httpx2"):  # a line for every request
        logging.getLogger(client).setLevel(logging.WARNING)
    return _allowed(name, lambda token: _fetch(name, revision, cache_dir, token, tokenizer))


def cached(name: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """The directory in the cache that holds a model, without asking the hub. Raises SourceError."""
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(name, companions.CONFIG, cache_dir=cache_dir, revision=revision)
    if not isinstance(path, str):
        raise SourceError(f"{name}: is not in the cache, and a plan fetches nothing. Fetch it first, or give a path.")
    return str(Path(path).parent)


def _allowed(name: str, get: Callable[[str | None], str]) -> str:
    """What `get` gives with a token, asking for one where the server wants it. Raises SourceError."""
    try:
        return get(None)
    except Exception as error:
        if _status(error) not in (401, 403) or not sys.stdin.isatty():
            _raise(name, error)
    token = getpass.getpass(f"{name} needs a token of Hugging Face (not shown, not stored): ").strip()
    try:
        return get(token or None)
    except Exception as error:
        _raise(name, error)


def _raise(name: str, error: Exception) -> NoReturn:
    explained = _explained(name, error)
    if explained is error:
        raise error
    raise explained from error


def _fetch(name: str, revision: str | None, cache_dir: str | None, token: str | None, tokenizer: bool) -> str:
    import huggingface_hub

    def download(files: Sequence[str], commit: str | None = None) -> Path:
        return Path(huggingface_hub.snapshot_download(
            name, revision=commit or revision, cache_dir=cache_dir, token=token, allow_patterns=list(files),
        ))  # fmt: skip

    try:
        info = huggingface_hub.HfApi(token=token).model_info(name, revision=revision)
    except Exception as error:
        if _status(error) is not None or not _unreached(error):
            raise
        marks = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model") if tokenizer else (companions.CONFIG,)
        for mark in marks:  # not the whole snapshot: the library asks for files that nobody wanted
            path = huggingface_hub.try_to_load_from_cache(name, mark, cache_dir=cache_dir, revision=revision)
            if isinstance(path, str):
                log.warning("loader: the hub was not reached (%s); %s is read as the cache has it", _first(error), name)
                return str(Path(path).parent)
        raise
    names = [str(entry.rfilename) for entry in info.siblings or () if "/" not in entry.rfilename]
    small = [each for each in names if any(fnmatch(each, pattern) for pattern in companions.PATTERNS)]
    if tokenizer:
        return str(download([each for each in small if each != companions.CONFIG]))
    if companions.CONFIG not in names:
        raise SourceError(f"{name}: has no {companions.CONFIG}; it has {some(names)}. Is it a model's repository?")
    folder = download(small)  # by its revision's name, so that the cache knows what that was
    weights, _ = hfdir.wanted(names, lambda index: download([index], folder.name) / index)
    if not weights:
        raise SourceError(f"{name}: holds no safetensors or .bin weights; it has {some(names)}.")
    log.info("loader: %s: %d weight files, into %s", name, len(weights), folder)
    download(weights, folder.name)
    return str(folder)


def _status(error: BaseException) -> int | None:
    """The status of a server's answer; None for no answer."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and status < 500:
        return status
    return None


def _unreached(error: BaseException) -> bool:
    """Whether an error is one of the way to the server, and none of a name or of ours."""
    ways = ("httpx", "httpcore", "requests", "urllib3")
    known = isinstance(error, OSError) or type(error).__module__.startswith(ways)
    return known or type(error).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "HfHubHTTPError")


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _explained(name: str, error: Exception) -> Exception:
    """What went wrong and what to do about it; nothing of a token is in it."""
    if isinstance(error, CkptconvError):
        return error
    kind, status = type(error).__name__, _status(error)
    where = f"{name}: there is no such directory, and the Hugging Face hub"
    if kind == "GatedRepoError" or status == 403:
        text = "lets in only those who were granted access: ask for it on the model's page, then set HF_TOKEN or log in"
    elif kind == "RevisionNotFoundError":
        text = "has no such revision of it. --hf-revision names a branch, tag or commit"
    elif status in (401, 404):
        text = "has no such model, or shows it only to those who log in. Is the name right? HF_TOKEN holds a token"
    elif kind == "HFValidationError":
        text = "knows no such names: expected ORG/NAME"
    elif not _unreached(error):
        return error
    else:
        text = f"was not reached ({_first(error)}), nor is it in the cache. Is there a network?"
        return SourceError(f"{where} {text}")
    return SourceError(f"{where} {text}.")
