"""The command line. The one place that prints an error without a trace."""

import argparse
import sys
from importlib import import_module

from async_opd.errors import AsyncOpdError, CallFailed

COMMANDS = (  # files of `commands`, in the order help gives them
    "train", "demo", "plan", "submit", "status", "logs", "stop", "scale", "eval", "export",
    "report", "trace", "explain", "audit", "cluster",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a run that failed, 2 for a mistake in what was asked."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except AsyncOpdError as e:
        if isinstance(e, CallFailed) and e.__cause__:
            _complain(f"{e.__cause__}")  # with the trace of where it was raised
        notes = "".join(f" ({note})" for note in getattr(e, "__notes__", ()))
        _complain(" ".join(f"{type(e).__name__}: {e}{notes}".splitlines()))
        return e.exit_status
    except KeyboardInterrupt:
        _complain("interrupted; what was trained is in the newest checkpoint, unless it says otherwise above")
        return 130


def _complain(text: str) -> None:
    from async_opd.say import say

    say(f"async-opd: {text}", sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="async-opd", description="Asynchronous on-policy distillation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f"async_opd.commands.{name}")
        own = commands.add_parser(
            name,
            help=command.__doc__.partition("\n")[0],
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(own)
        own.set_defaults(run=command.run)
    return parser
