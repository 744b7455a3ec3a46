"""The command line: flags, plugins, exit codes.

Flags are spelled as in Megatron-LM's convert.py; `--load_dir` means `--load-dir` for every flag. Loader and saver
add their own, as their modules declare them. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ckptconv import dtypes, numbers
from ckptconv.errors import CkptconvError, UsageError, near, notes

log = logging.getLogger("ckptconv")

EPILOG = """\
sub-commands:
  ckptconv plugins    what loaders and savers there are, built in and third party

Flags of a loader or saver are listed when it is named: ckptconv --loader megatron_mcore --saver hf --help
Exit codes: 0 done, 2 usage, 3 source, 4 protocol, 5 table, 6 layout, 7 target, 8 verification, 130 interrupted.
"""

class _Parser(argparse.ArgumentParser):
    """Errors are UsageErrors, so that they look and exit like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> _Parser:
    """The flags that every conversion has."""
    made = _Parser(
        prog="ckptconv", description=__doc__.split("\n")[0] if __doc__ else None, epilog=EPILOG, allow_abbrev=False,
        conflict_handler="resolve", formatter_class=argparse.RawDescriptionHelpFormatter, usage=
        "ckptconv --saver NAME --load-dir DIR --save-dir DIR [--loader NAME] [flags]",
    )  # fmt: skip
    add = made.add_argument
    add("--loader", default="auto", metavar="NAME", help="what reads the source (default: found from the directory)")
    add("--saver", metavar="NAME", help="what writes the target")
    add("--load-dir", metavar="DIR", help="the checkpoint to read")
    add("--save-dir", metavar="DIR", help="where to write; must not exist or be empty")
    add("--overwrite", action="store_true", help="replace what is in --save-dir once the new output is complete")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add("--verify", action="store_true", help="read the written checkpoint back and compare digests")
    add("--model-type", metavar="NAME", help="GPT, BERT or a family; checked against what is found")
    add("--dtype", choices=("keep", *dtypes.SHORT), default="keep", help="element type to convert to (default keep)")
    add("--bf16", action="store_true", help="the same as --dtype bf16")
    add("--fp16", action="store_true", help="the same as --dtype fp16")
    add("--max-queue-size", type=numbers.positive, default=50, metavar="N", help="messages in the queue (default 50)")
    add("--max-memory", type=numbers.size, metavar="SIZE", help="most memory of all processes (default: as needed)")
    add("--threads", type=numbers.positive, metavar="N", help="threads that copy (default: one per core, at most 8)")
    add("--no-checking", action="store_false", dest="checking", help="do not check message names and unknown keys")
    add("--no-progress", action="store_false", dest="progress", help="no progress bar")
    add("-v", "--verbose", action="store_true", help="say more, with tracebacks")
    return made


def _spelled(argv: Sequence[str], made: argparse.ArgumentParser) -> list[str]:
    """Flags in the spelling the parser knows: `--load_dir` and `--load-dir` are the same."""
    known = {name.replace("_", "-"): name for name in made._option_string_actions if name.startswith("--")}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in made._option_string_actions:
            name = known.get(name.replace("_", "-"), name)
        words.append(name + equals + value)
    return words


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Any, Any]:
    """(args, loader, saver). Raises UsageError; exits for --help."""
    from ckptconv import plugins

    made = parser()
    first = [word for word in argv if word not in ("-h", "--help")]
    known, _ = made.parse_known_args(_spelled(first, made))
    loader = saver = None
    helping = len(first) != len(argv)
    try:
        for name in ("saver", "load_dir", "save_dir"):
            if getattr(known, name) is None:
                raise UsageError(f"--{name.replace('_', '-')} is needed. ckptconv --help lists the flags.")
        loader_name = plugins.detect(known.load_dir) if known.loader == "auto" else known.loader
        loader, saver = plugins.find("loader", loader_name), plugins.find("saver", known.saver)
    except UsageError:
        if not helping:
            raise
        loader = None if known.loader == "auto" else plugins.find("loader", known.loader)
        saver = plugins.find("saver", known.saver) if known.saver else None
    for plugin in (loader, saver):
        if plugin:
            plugin.add_arguments(made)
    words = _spelled(argv, made)
    args, unknown = made.parse_known_args(words)
    if unknown:
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        which = flags[0] if flags else unknown[0]
        raise UsageError(f"unknown flag {which}.{near(which, made._option_string_actions)} ckptconv --help lists all.")
    _settle(args)
    return args, loader, saver


def _settle(args: argparse.Namespace) -> None:
    """What follows from flags: one element type, log level."""
    asked = {name for name in ("bf16", "fp16") if getattr(args, name)} | ({args.dtype} - {"keep"})
    if len(asked) > 1:
        raise UsageError(f"--dtype {args.dtype}, --bf16 and --fp16 contradict one another; give one of them.")
    args.dtype_name = dtypes.SHORT[asked.pop()] if asked else None
    if args.model_type:
        from ckptconv import families

        families.model_type(args.model_type)
    args.log_level = logging.DEBUG if args.verbose else logging.INFO


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = any(word in ("-v", "--verbose") for word in words)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if words[:1] == ["plugins"]:
            return _plugins(words[1:])
        return _convert(words[1:] if words[:1] == ["convert"] else words)
    except CkptconvError as error:
        log.debug("traceback:", exc_info=True)
        _say(error)
        return error.exit_code
    except KeyboardInterrupt as error:
        _say(error, str(error) or "interrupted")
        return 130
    except OSError as error:
        log.debug("traceback:", exc_info=True)
        _say(error, f"{error.filename or 'system'}: {error.strerror or error}.")
        return CkptconvError.exit_code


def _say(error: BaseException, text: str | None = None) -> None:
    print("\n".join([f"ckptconv: error: {text or error}", *notes(error)]), file=sys.stderr)


def _convert(words: Sequence[str]) -> int:
    if not words:
        parser().print_help()
        return UsageError.exit_code
    args, loader, saver = parse(words)
    from ckptconv import convert

    if loader.ours and saver.ours:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would only spin: nothing is computed
    convert.check_usage(args)
    reader = _reader(saver) if args.verify else ""
    report = convert.run(loader, saver, args)
    line = f"{report.seconds:.2f} s, peak memory {report.peak_memory / 2**20:.0f} MiB"
    if report.bytes:
        line = f"{report.bytes / 1e9:.3f} GB in {line}, {report.bytes / 1e6 / max(report.seconds, 1e-9):.0f} MB/s"
    log.info("%s -> %s: %s", loader.name, saver.name, line)
    if reader:
        from ckptconv import verify

        count = verify.verify(args.save_dir, reader, report.saver["digests"], args.threads)
        log.info("verified: %d tensors read back from %s have the digests of what was sent", count, args.save_dir)
    return 0


def _reader(saver: Any) -> str:
    """The loader that reads what a saver writes. A saver of others names none. Raises UsageError."""
    import importlib

    loader = getattr(importlib.import_module(saver.module), "LOADER", None) if saver.ours else None
    if loader is None:
        raise UsageError(f"--verify: saver {saver.name} names no loader that could read back what it writes.")
    return str(loader)


def _plugins(words: Sequence[str]) -> int:
    from ckptconv import plugins

    if words:
        raise UsageError(f"`ckptconv plugins` takes no flags, found {words[0]}.")
    for kind, name, origin, summary in plugins.listing():
        print(f"{kind:<7} {name:<18} {origin:<10} {summary}")
    return 0
