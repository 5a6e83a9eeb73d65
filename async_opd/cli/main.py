"""The command line. The one place that prints an error without a trace.

It stands on argparse: typer takes two to three times as long to print a help, puts frames around
the commands' own paragraphs and examples, and leaves to be written what is written here: settings
that stand among options, and mistakes as one line of a ConfigError.
"""

import argparse
import os
import signal
import sys
from asyncio import CancelledError
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise

from async_opd.cli.streams import complain, drop_output, one_line, repair_streams
from async_opd.core.errors import AsyncOpdError, CallFailed, ConfigError
from async_opd.core.reading import in_words
from async_opd.launch.signals import ended_by_signal, last_signal

COMMANDS = (  # files of this folder, in the order help gives them
    "train",
    "demo",
    "plan",
    "submit",
    "status",
    "logs",
    "stop",
    "scale",
    "eval",
    "export",
    "report",
    "trace",
    "explain",
    "audit",
    "cluster",
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a run that failed, 2 for a mistake in what
    was asked, 128 more than the number of a signal that ended it."""
    repair_streams()
    with ended_by_signal():
        try:
            return _printed(sys.argv[1:] if argv is None else argv)
        except AsyncOpdError as e:
            if isinstance(e, CallFailed) and e.__cause__:
                complain(f"{e.__cause__}")  # with the trace of where it was raised
            notes = "".join(f" ({note})" for note in getattr(e, "__notes__", ()))
            _show_logs(f"{e}{notes}")
            complain(one_line(f"{type(e).__name__}: {e}{notes}"))
            return e.exit_status
        except OSError as e:  # what the system refuses and no command has a name for
            complain(one_line(f"{type(e).__name__}: {in_words(e)}"))
            return 1
        except MemoryError:
            complain("MemoryError: this machine has not enough memory")
            return 1
        except (KeyboardInterrupt, CancelledError) as e:
            by = "" if last_signal() == signal.SIGINT else f" by {last_signal().name}"
            complain("; ".join([f"interrupted{by}", *getattr(e, "__notes__", ())]))
            return 128 + last_signal()


def _show_logs(text: str) -> None:
    """Print the last lines of the actors' logs that an error's `text` names."""
    from async_opd.runtime.actor_log import printed_in

    for path, lines in printed_in(text):
        complain("\n  ".join([f"the last lines of {path}:", *map(one_line, lines)]))


def _printed(words: list[str]) -> int:
    """Run one command, and have what it prints leave; return the exit status."""
    try:
        try:
            args = parsed(words)
            refuse_no_folder()
            status = args.run(args)
            if status == 130:  # of one that says itself how it was left, by whichever signal
                status = 128 + last_signal()
        except SystemExit as e:  # of a help that is printed; or of Ray, which starts, by SIGTERM
            if e.code == signal.SIGTERM:
                return 128 + signal.SIGTERM
            print(end="", flush=True)
            raise
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        drop_output()
        return 141
    except OSError:
        if why := drop_output():
            complain(f"standard output cannot be written: {why}")
            return 1
        raise


def refuse_no_folder() -> None:
    """Refuse a working directory that is gone, to which every relative path would lead."""
    try:
        os.getcwd()
    except OSError as e:
        raise ConfigError(f"the working directory: {e.strerror}: it may be deleted") from e


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; {' '.join(self.format_usage().split())}")


def parsed(words: list[str]) -> argparse.Namespace:
    """Parse the words of the command line; behind the command, options may stand anywhere. Raises
    ConfigError."""
    parser, commands = _parsers(words[:1] if words and words[0] in COMMANDS else COMMANDS)
    if words and words[0] not in (*COMMANDS, "-h", "--help"):
        from async_opd.core.suggest import wrong

        raise ConfigError(wrong("COMMAND", words[0], COMMANDS))
    if not words or words[0] not in COMMANDS:
        parser.parse_args(words)  # prints the help and ends, or says what is missing
    command, behind = commands[words[0]], words[1:]
    flags = {
        name for option in command._actions if option.nargs == 0 for name in option.option_strings
    }
    for flag, _, value in (word.partition("=") for word in behind):
        if flag in flags and value:
            _refuse_value(command, flag, value)
    args, unknown = command.parse_known_intermixed_args(behind)
    one_too_many = len(_names(command, args)) + len(unknown) > 1  # a command with flags wants one
    for flag, word in pairwise(behind):
        if flag in flags and one_too_many and not word.startswith("-") and "=" not in word:
            _refuse_value(command, flag, word)
    for word in unknown:
        command.error(
            f"{word}: {'no such option' if word.startswith('-') else 'one word too many'}"
        )
    return args


def _refuse_value(command: argparse.ArgumentParser, flag: str, value: str) -> None:
    instead = f"; it prints: for a file, end the command with > {value}" if flag == "--json" else ""
    command.error(f"{flag} {value}: {flag} takes no value{instead}")


def _names(command: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """List the words that are neither an option's nor a setting: of a config, a run, a file."""
    values = [
        getattr(args, option.dest) for option in command._actions if not option.option_strings
    ]
    words = [word for value in values for word in (value if isinstance(value, list) else [value])]
    return [f"{word}" for word in words if "=" not in f"{word}"]


def _parsers(
    names: Sequence[str],
) -> tuple[argparse.ArgumentParser, dict[str, _Parser]]:
    """Make the parser of the whole command line, which knows the help of the commands `names`, and
    that of each of them."""
    parser = _Parser(prog="async-opd", description="Asynchronous on-policy distillation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in names:
        command = import_module(f"async_opd.cli.{name}")
        text = command.__doc__ or ""
        behind = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(behind)
        behind.set_defaults(run=command.run)
    return parser, commands.choices
