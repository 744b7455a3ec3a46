"""Find a loader or saver by name and check that it is one.

Lookup of NAME, in this order: built in (`ckptconv.loaders.NAME`; `hf_FAMILY` is `hf` pinned to one family), entry
point group `ckptconv.loaders` / `ckptconv.savers`, then modules on the Python path: `loader_NAME`,
`checkpoint_loader_NAME`, `NAME` (which may be dotted). The protocol is that of Megatron-LM's convert.py: a module
with `add_arguments(parser)` and `load_checkpoint(queue, args)` or `save_checkpoint(queue, args)`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ckptconv.errors import SourceError, UsageError, near, some, why

FUNCTIONS = {"loader": "load_checkpoint", "saver": "save_checkpoint"}

#: What others' converters call plugins that are ours under another name.
OLDER_NAMES = {
    "loader": {"core": "megatron_mcore", "mcore": "megatron_mcore", "legacy": "megatron_legacy",
               "mindspore": "core_mf"},
    "saver": {"core": "megatron_mcore", "mcore": "megatron_mcore", "legacy": "megatron_legacy",
              "megatron": "megatron_legacy"},
}  # fmt: skip
#: A loader whose name meant legacy models first and megatron-core's later: what the directory holds decides.
ANY_MEGATRON = "megatron"


@dataclass(frozen=True)
class Plugin:
    """A validated plugin. `ours` plugins speak lazy tensors; those of others get and put real ones.

    `slices`: a saver that has said (`takes_expert_slices = True`) that it takes big layers in several messages.
    `files`: a loader that has said (`takes_files = True`) that --load-dir may be a file; `hub`: one that has said
    (`from_hub = True`) that it may be a model of the Hugging Face hub.
    """

    kind: str
    name: str
    module: str
    origin: str
    add_arguments: Callable[[ArgumentParser], Any]
    run: Callable[[Any, Any], Any]
    ours: bool
    summary: str
    slices: bool = False
    files: bool = False
    hub: bool = False


def builtin(kind: str) -> list[str]:
    """Names of the plugins that come with ckptconv."""
    package = importlib.import_module(f"ckptconv.{kind}s")
    names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    if kind == "loader":
        from ckptconv.families import FAMILIES

        names += [f"hf_{family}" for family in FAMILIES]
    return sorted(names)


def installed(kind: str) -> list[importlib.metadata.EntryPoint]:
    """Plugins of others that are installed with an entry point."""
    return list(importlib.metadata.entry_points(group=f"ckptconv.{kind}s"))


def find(kind: str, name: str) -> Plugin:
    """The plugin called `name`. Raises UsageError: not found, broken dependency, missing function."""
    name = OLDER_NAMES[kind].get(name, name)
    if name in builtin(kind):
        if kind == "loader" and name.startswith("hf_"):
            hf = importlib.import_module("ckptconv.loaders.hf")
            return _validated(kind, name, hf.pinned(name.removeprefix("hf_")), "built in", True)
        return _validated(kind, name, importlib.import_module(f"ckptconv.{kind}s.{name}"), "built in", True)
    for entry in installed(kind):
        if entry.name == name:
            try:
                return _validated(kind, name, entry.load(), f"entry point {entry.value}", False)
            except (ImportError, AttributeError) as error:
                raise UsageError(f"{kind} {name} (entry point {entry.value}) cannot be imported: {error}.") from error
    tried = (f"{kind}_{name}", f"checkpoint_{kind}_{name}", name)
    for module_name in tried:
        module = _import(kind, module_name)
        if module is not None:
            return _validated(kind, name, module, f"module {module_name}", False)
    known = [*builtin(kind), *(entry.name for entry in installed(kind))]
    raise UsageError(
        f"no {kind} called {name!r}: not built in, no entry point, and no module {', '.join(tried)} on the Python "
        f"path.{near(name, known)} `ckptconv plugins` lists what is there."
    )


def _import(kind: str, name: str) -> Any:
    """The module, or None when there is none of that name. A module that lacks a dependency is an error."""
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == name or name.startswith(missing + "."):
            return None
        raise UsageError(
            f"{kind} module {name} was found, but it needs {missing!r}, which is not installed. "
            f"Install {missing} or fix that import."
        ) from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{kind} module {name} was found, but importing it failed: {what}.") from error


def _validated(kind: str, name: str, module: Any, origin: str, ours: bool) -> Plugin:
    function = FUNCTIONS[kind]
    where = getattr(module, "__name__", str(module))
    found = {}
    for wanted, signature in (("add_arguments", ["parser"]), (function, ["queue", "args"])):
        value = getattr(module, wanted, None)
        if not callable(value):
            raise UsageError(
                f"{kind} module {where} has no function {wanted}({', '.join(signature)}). A {kind} needs "
                f"add_arguments(parser) and {function}(queue, args)."
            )
        try:
            inspect.signature(value).bind(*signature)
        except TypeError as error:
            raise UsageError(
                f"{kind} module {where}: {wanted}{inspect.signature(value)} cannot be called as "
                f"{wanted}({', '.join(signature)}): {error}."
            ) from error
        except ValueError:  # a builtin without a signature
            pass
        found[wanted] = value
    lines = (inspect.getdoc(module) if not isinstance(module, SimpleNamespace) else module.__doc__) or ""
    summary = lines.strip().split("\n")[0]
    slices = bool(getattr(module, "takes_expert_slices", False))
    single = bool(getattr(module, "takes_files", False))
    return Plugin(
        kind, name, where, origin, found["add_arguments"], found[function], ours, summary, slices, single,
        bool(getattr(module, "from_hub", False)),
    )  # fmt: skip


def listing() -> Iterator[tuple[str, str, str, str]]:
    """(kind, name, origin, summary or reason why it cannot be used) of everything that can be found by name."""
    for kind in FUNCTIONS:
        for name in [*builtin(kind), *(entry.name for entry in installed(kind))]:
            yield _listed(kind, name)


def on_path() -> Iterator[tuple[str, str, str, str]]:
    """The same of plugins that are modules on the Python path: `loader_NAME`, `checkpoint_saver_NAME`, ..."""
    for kind in FUNCTIONS:
        for module in pkgutil.iter_modules():
            prefix = next((p for p in (f"{kind}_", f"checkpoint_{kind}_") if module.name.startswith(p)), None)
            if prefix:
                yield _listed(kind, module.name.removeprefix(prefix))


def _listed(kind: str, name: str) -> tuple[str, str, str, str]:
    try:
        plugin = find(kind, name)
        return kind, name, plugin.origin, plugin.summary
    except Exception as error:
        return kind, name, "broken", some([str(error)])


def detect(load_dir: str, flag: str = "") -> str:
    """The loader that recognises a directory. Raises UsageError when none or several do, SourceError for no access.

    flag: the one that names the directory.
    """
    where = f"{flag} {load_dir}".lstrip()
    try:
        os.stat(load_dir)
        if os.path.isdir(load_dir):
            os.listdir(load_dir)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{where}: does not exist. Is the path right?") from None
    except OSError as error:
        raise SourceError(f"{where}: cannot be read: {why(error)}") from error
    found = {}
    for name in builtin("loader"):
        if name.startswith("hf_"):
            continue
        module = importlib.import_module(f"ckptconv.loaders.{name}")
        reason = module.recognises(load_dir)
        if reason:
            found[name] = reason
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise UsageError(
            f"{where}: no checkpoint is recognised there: no config.json or weights of Hugging Face, no "
            "latest_checkpointed_iteration.txt or mp_rank_* of Megatron, no params.json of Meta, no tp_rank_* of NxD "
            "Training, no *.ckpt of MindSpore. Is the path right? --loader names what it is."
        )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in found.items())
    raise UsageError(f"{where}: several loaders recognise it ({reasons}). Choose with --loader.")
