"""The command line. The one place that prints an error without a trace."""

import argparse
import os
import sys
from asyncio import CancelledError
from importlib import import_module

from async_opd.errors import AsyncOpdError, CallFailed, ConfigError

COMMANDS = (  # files of `commands`, in the order help gives them
    "train", "demo", "plan", "submit", "status", "logs", "stop", "scale", "eval", "export",
    "report", "trace", "explain", "audit", "cluster",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a run that failed, 2 for a mistake in what was asked."""
    try:
        args = parsed(sys.argv[1:] if argv is None else argv)
        status = args.run(args)
        print(end="", flush=True)
        return status
    except AsyncOpdError as e:
        if isinstance(e, CallFailed) and e.__cause__:
            _complain(f"{e.__cause__}")  # with the trace of where it was raised
        notes = "".join(f" ({note})" for note in getattr(e, "__notes__", ()))
        _complain(" ".join(f"{type(e).__name__}: {e}{notes}".splitlines()))
        return e.exit_status
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what would be written at exit
        return 141
    except (KeyboardInterrupt, CancelledError) as e:
        _complain("; ".join(["interrupted", *getattr(e, "__notes__", ())]))
        return 130


def _complain(text: str) -> None:
    from async_opd.say import say

    say(f"async-opd: {text}", sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; {' '.join(self.format_usage().split())}")


def parsed(words: list[str]) -> argparse.Namespace:
    """The words of the command line. Raises ConfigError."""
    parser = _parser()
    if words and words[0] not in (*COMMANDS, "-h", "--help"):
        from async_opd.mistakes import wrong

        raise ConfigError(wrong("COMMAND", words[0], COMMANDS))
    args, unknown = parser.parse_known_args(words)
    if unknown:
        args.command.error(f"{unknown[0]}: no such option")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="async-opd", description="Asynchronous on-policy distillation.")
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
        own.set_defaults(run=command.run, command=own)
    return parser
