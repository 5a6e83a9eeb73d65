"""The command from its first moment on: Ctrl-C while it is imported, or while it ends, shows no
trace either."""

import signal
import sys


def main() -> int:
    """Run the command line; returns the exit status."""
    try:
        from async_opd.cli.main import main as run

        return run()
    except KeyboardInterrupt:  # before `run` takes it, or a second one while it ends
        print("async-opd: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is the interpreter's end


if __name__ == "__main__":
    sys.exit(main())
