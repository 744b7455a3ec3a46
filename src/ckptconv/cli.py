"""The command line: flags, plugins, exit codes.

Flags are spelled as in Megatron-LM's convert.py; `--load_dir` means `--load-dir` for every flag. Loader and saver
add their own, as their modules declare them. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ckptconv import commands, dtypes, files, hub, numbers, oldcommands, team
from ckptconv.commands import plan
from ckptconv.errors import CkptconvError, UsageError, near, notes, why

if TYPE_CHECKING:
    from ckptconv.conversion import Report

log = logging.getLogger("ckptconv")

EPILOG = """\
sub-commands:
  ckptconv inspect    what a checkpoint of any format is: model, layout, tensors, what is wrong with it
  ckptconv plan       what a conversion would do, given its flags; nothing is written
  ckptconv doctor     whether this machine can convert, and plugins that cannot be used
  ckptconv plugins    what loaders and savers there are, built in and third party
  ckptconv diff       whether two checkpoints of any formats are equal, and what differs how far
  ckptconv logits     what a checkpoint of any format computes, alone or compared with another
  ckptconv hf_to_megatron, megatron_to_hf, checkpoint_util
                      the command lines of Megatron-LLM's tools; --help after one of them lists its flags

Flags of a loader or saver are listed when it is named: ckptconv --loader megatron_mcore --saver hf --help
Exit codes: 0 done, 1 anything else, 2 usage, 3 source, 4 protocol, 5 table, 6 layout, 7 target, 8 verification,
130 interrupted; docs/errors.md explains them.
"""

#: Flags of others' converters that say nothing here, and why.
UNUSED = {
    "--megatron-path": "Megatron is not needed",
    "--loader-transformer-impl": "no model is built, names tell which it was",
}


class _Parser(argparse.ArgumentParser):
    """Errors are UsageErrors, so that they look and exit like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. {self.prog} --help lists all flags.")


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
    add("--load-dir", "--input-dir", "--load-path", metavar="DIR", help="the checkpoint to read")
    hub.add_arguments(made)
    add("--save-dir", "--output-dir", "--save-path", metavar="DIR", help="where to write; must not exist or be empty")
    add("--overwrite", action="store_true", help="replace what is in --save-dir once the new output is complete")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add("--verify", action="store_true", help="read the written checkpoint back and compare digests")
    add("--model-type", metavar="NAME", help="GPT, BERT or a family; checked against what is found")
    add("--dtype", "--target-params-dtype", choices=("keep", *dtypes.SHORT), default="keep",
        help="element type to convert to (default keep)")  # fmt: skip
    add("--bf16", action="store_true", help="the same as --dtype bf16")
    add("--fp16", action="store_true", help="the same as --dtype fp16")
    add("--max-queue-size", type=numbers.positive, default=50, metavar="N", help="messages in the queue (default 50)")
    add("--max-memory", type=numbers.size, metavar="SIZE", help="most memory of all processes (default: as needed)")
    add("--threads", type=numbers.positive, metavar="N", help="threads that copy (default: one per core, at most 8)")
    add("--queue-dialect", choices=("auto", "megatron", "megatron_llm"), default="auto",
        help="what plugins of others say on the queue: Megatron-LM's messages or those of Megatron-LLM (default: seen)")
    add("--kv-channels", type=numbers.positive, metavar="N", help="numbers of a head; checked against what is found")
    add("--iterations", metavar="all|N,N,...", help="convert many iterations of a run, each complete or absent; those "
        "that are there already are skipped")
    add("--load-iters", type=numbers.natural, metavar="N", help="the older spelling of --iteration; 0 is the release")
    plan.add_arguments(made)
    for flag, reason in UNUSED.items():
        add(flag, metavar="VALUE", help=f"accepted and not used: {reason}")
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
    loader: Any = None
    saver: Any = None
    model: str | None = None
    helping = len(first) != len(argv)
    try:
        files.refuse_remote(known.load_dir, "--load-dir")
        files.refuse_remote(known.save_dir, "--save-dir")
        model = hub.named(known)
        known.load_dir = _source(known.load_dir or model)
        for name in ("saver", "load_dir", "save_dir"):
            if getattr(known, name) is None:
                raise UsageError(f"--{name.replace('_', '-')} is needed. ckptconv --help lists the flags.")
        unnamed = known.loader in ("auto", plugins.ANY_MEGATRON)
        found = unnamed and ("hf" if model else plugins.detect(known.load_dir, "--load-dir"))
        loader_name = found or known.loader
        if loader_name == "megatron_llm" and known.saver == plugins.ANY_MEGATRON:
            known.saver = loader_name  # that is what its own tools call it
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
    args.load_dir, args.hub_model = known.load_dir, model if loader.hub else None
    if model and not loader.hub and args.hf_model_name:
        raise UsageError(f"--hf-model-name {model}: loader {loader.name} reads no models of the hub. Use --loader hf.")
    _settle(args)
    if loader.ours and saver.ours:
        for flag, reason in UNUSED.items():
            if getattr(args, flag[2:].replace("-", "_")):
                log.info("%s is accepted and not used: %s", flag, reason)
    return args, loader, saver


def _source(path: str | None) -> str | None:
    """What --load-dir stands for: for a missing checkpoint.pt its folder is read."""
    from ckptconv.containers import hfdir

    if path is None:
        return None
    folder = os.path.dirname(path)
    if os.path.basename(path) == hfdir.FULL and not os.path.exists(path) and os.path.exists(f"{folder}/config.json"):
        log.warning("%s does not exist; the model in %s is read.", path, folder)
        return folder
    return path


def _settle(args: argparse.Namespace) -> None:
    """What follows from flags: one element type, log level."""
    asked = {name for name in ("bf16", "fp16") if getattr(args, name)} | ({args.dtype} - {"keep"})
    if len(asked) > 1:
        raise UsageError("--dtype, --bf16 and --fp16 contradict one another: give one of them.")
    args.dtype_name = dtypes.SHORT[asked.pop()] if asked else None
    if args.model_type:
        from ckptconv import families

        families.model_type(args.model_type)
    if args.load_iters is not None and getattr(args, "iteration", None) is None:
        args.iteration = args.load_iters or "release"
    args.log_level = _level(args.verbose)
    seat = team.seat()
    if seat and args.threads is None:
        from ckptconv import engine

        args.threads = max(1, engine.default_threads() // seat.here)


def _level(verbose: bool) -> int:
    """Of the processes of a job all but the first speak of errors only: they would say the same."""
    seat = team.seat()
    return logging.DEBUG if verbose else logging.ERROR if seat and seat.rank else logging.INFO


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = any(word in ("-v", "--verbose") for word in words)
    logging.basicConfig(level=_level(verbose), format="%(message)s", stream=sys.stderr)
    try:
        if words[:1] == ["plugins"]:
            return _plugins(words[1:])
        if words[:1] == ["plan"]:
            return _convert([*oldcommands.translated(words[1:], _Parser), "--dry-run"])
        if words and words[0] in commands.names():
            return _command(words[0], words[1:])
        words = oldcommands.translated(words, _Parser)
        if words and words[0] != "convert" and not words[0].startswith("-"):
            hint = near(words[0], ["convert", "plugins", "plan", *oldcommands.COMMANDS, *commands.names()])
            raise UsageError(f"no command {words[0]!r}.{hint} ckptconv --help lists all.")
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
        _say(error, f"{error.filename or 'system'}: {why(error)}")
        return CkptconvError.exit_code


def _say(error: BaseException, text: str | None = None) -> None:
    print("\n".join([f"ckptconv: error: {text or error}", *notes(error)]), file=sys.stderr)


def _convert(words: Sequence[str]) -> int:
    if not words:
        parser().print_help()
        return UsageError.exit_code
    converted(words)
    return 0


def converted(words: Sequence[str]) -> Report:
    """Do what a command line of flags says, and tell what was done. Raises CkptconvError.

    Each of the processes that torchrun has started calls it, with the same words.
    """
    with team.joined() as members:
        return _converted(words, members)


def _converted(words: Sequence[str], members: team.Team | None) -> Report:
    made = parser()
    known, _ = made.parse_known_args(_spelled([word for word in words if word not in ("-h", "--help")], made))
    if known.iterations is None:
        return _one(words, members)
    from ckptconv import iterations

    files.refuse_remote(known.save_dir, "--save-dir")
    for name in ("saver", "load_dir", "save_dir"):
        if getattr(known, name) is None:
            raise UsageError(f"--iterations: --{name.replace('_', '-')} is needed.")
    if known.dry_run:
        raise UsageError("--iterations: a plan is of one of them; give --iteration N, or --load-dir of one.")

    def convert(load_dir: str, number: int, work: str) -> Report:
        return _one([*words, "--load-dir", load_dir], None, number, work)

    return iterations.run(known, words, convert, members)


def _one(
    words: Sequence[str], members: team.Team | None, iteration: int | None = None, work: str | None = None
) -> Report:
    """One conversion. iteration, work: the one to convert of many, and where it is collected."""
    args, loader, saver = parse(words)
    from ckptconv import conversion

    if work is not None:
        if not saver.ours:
            raise UsageError(f"--iterations: saver {saver.name} is of others and writes where it wants to. Convert one "
                             "iteration at a time, each to a directory of its own.")  # fmt: skip
        if getattr(args, "iteration", None) is not None:
            raise UsageError("--iterations and --iteration contradict one another; give one of them.")
        args.work_dir, args.iteration, args.overwrite = work, iteration, not args.resume
    if args.dry_run and members:
        if members.rank:
            return conversion.Report()
        args.ranks = args.ranks or members.ranks
    if args.dry_run:
        if args.hub_model:
            args.load_dir = hub.cached(args.hub_model, args.hf_revision, args.cache_dir)
        conversion.check_usage(args, loader)
        return plan.run(args, loader, saver)
    if args.mapping or args.json or args.ranks:
        raise UsageError("--mapping, --json and --ranks show a plan: give --dry-run with them.")
    if loader.ours and saver.ours:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would only spin: nothing is computed
    if members:
        _check_team(loader, saver, members)
    if args.hub_model and (members is None or members.rank == 0):
        conversion.check_target(args)
        args.load_dir = hub.fetch(
            args.hub_model, args.hf_revision, args.cache_dir, progress=args.progress
        )
        if members:
            members.say("fetched")
    elif args.hub_model and members:
        members.hear("fetched")
        args.load_dir = hub.cached(args.hub_model, args.hf_revision, args.cache_dir)
    conversion.check_usage(args, loader)
    reader = _reader(saver) if args.verify else ""
    report = conversion.run(loader, saver, args, members)
    line = f"{report.seconds:.2f} s, peak memory {report.peak_memory / 2**20:.0f} MiB"
    if report.bytes:
        line = f"{report.bytes / 1e9:.3f} GB in {line}, {report.bytes / 1e6 / max(report.seconds, 1e-9):.0f} MB/s"
    if members:
        line += f" in rank 0 of {members.ranks}"
    log.info("%s -> %s: %s", loader.name, saver.name, line)
    if reader:
        from ckptconv import verify

        digests = report.saver["digests"]
        if members and members.rank == 0:
            members.say("digests", json.dumps(digests))
        elif members:
            digests = json.loads(members.hear("digests"))
        count = verify.verify(work or args.save_dir, reader, digests, args.threads, members)
        log.info("verified: %d tensors read back from %s have the digests of what was sent", count, args.save_dir)
    return report


def _check_team(loader: Any, saver: Any, members: team.Team) -> None:
    """Raise UsageError for plugins that know nothing of several processes."""
    for plugin in (loader, saver):
        if not plugin.ours:
            sends = "sends whole tensors, each of its processes all" if plugin is loader else "writes what it wants"
            raise UsageError(
                f"{plugin.kind} {plugin.name} on {members.ranks} ranks: it is of others and {sends}: the work cannot "
                "be shared. Run it in one process, without torchrun."
            )


def _reader(saver: Any) -> str:
    """The loader that reads what a saver writes. A saver of others names none. Raises UsageError."""
    import importlib

    loader = getattr(importlib.import_module(saver.module), "LOADER", None) if saver.ours else None
    if loader is None:
        raise UsageError(f"--verify: saver {saver.name} names no loader that could read back what it writes.")
    return str(loader)


def _command(name: str, words: Sequence[str]) -> int:
    """A module of commands/: its flags, and those of the loaders it reads with."""
    import importlib

    module = importlib.import_module(f"ckptconv.commands.{name}")
    made = _Parser(
        prog=f"ckptconv {name}", description=module.__doc__, allow_abbrev=False, conflict_handler="resolve",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    module.add_arguments(made)
    made.add_argument("-v", "--verbose", action="store_true", help="say more, with tracebacks")
    first = [word for word in words if word not in ("-h", "--help")]
    if hasattr(module, "plugins"):
        try:
            known, _ = made.parse_known_args(_spelled(first, made))
            for plugin in module.plugins(known):
                plugin.add_arguments(made)
        except UsageError:
            if len(first) == len(words):
                raise
    args, unknown = made.parse_known_args(_spelled(words, made))
    if unknown:
        hint = near(unknown[0], made._option_string_actions)
        raise UsageError(f"{name}: unknown {unknown[0]}.{hint} ckptconv {name} --help lists all flags.")
    return int(module.run(args))


def loader_flags(loader: Any, words: Sequence[str]) -> argparse.Namespace:
    """What flags of a loader say, and those on how messages are checked. Raises UsageError."""
    made = _Parser(
        prog=f"ckptconv --loader {loader.name}", add_help=False, allow_abbrev=False, conflict_handler="resolve"
    )
    common = {action.dest: action for action in parser()._actions}
    for name in ("checking", "queue_dialect"):
        made._add_action(common[name])
    loader.add_arguments(made)
    args, unknown = made.parse_known_args(_spelled(words, made))
    if unknown:
        hint = near(unknown[0], made._option_string_actions)
        raise UsageError(f"loader {loader.name}: unknown flag {unknown[0].partition('=')[0]}.{hint}")
    return args


def _plugins(words: Sequence[str]) -> int:
    from ckptconv import plugins

    if words:
        raise UsageError(f"`ckptconv plugins` takes no flags, found {words[0]}.")
    for kind, name, origin, summary in plugins.listing():
        print(f"{kind:<7} {name:<18} {origin:<10} {summary}")
    return 0
