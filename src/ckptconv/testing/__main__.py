"""`python -m ckptconv.testing`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from ckptconv import cli, plugins
from ckptconv.errors import CkptconvError, ProtocolError, UsageError
from ckptconv.testing import check_loader, check_saver


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ckptconv.testing`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    what = "Whether a loader or a saver of yours keeps to the protocol."
    made = cli._Parser(prog="python -m ckptconv.testing", description=what, allow_abbrev=False)
    made.add_argument("name", metavar="NAME", help="the plugin, as --loader or --saver would name it")
    made.add_argument("--kind", choices=("loader", "saver"), help="what it is, where its name does not begin with that")
    made.add_argument("--load-dir", metavar="DIR", help="a checkpoint, for a loader")
    made.add_argument("--loader", metavar="NAME", help="what reads back what a saver wrote")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        args, flags = made.parse_known_args(words)
        last = args.name.rpartition(".")[2]
        kind = args.kind or next((kind for kind in plugins.FUNCTIONS if f"{kind}_" in f"{last}_"), None)
        if kind is None:
            raise UsageError(f"{args.name}: is it a loader or a saver? Say it with --kind.")
        if kind == "loader":
            if args.load_dir is None:
                raise UsageError("--load-dir is needed: a small checkpoint that the loader reads.")
            report = check_loader(args.name, args.load_dir, flags)
        else:
            report = check_saver(args.name, args.loader, flags)
    except CkptconvError as error:
        print(f"WRONG  {error}")
        return error.exit_code
    print(report)
    return ProtocolError.exit_code if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
