"""A newcomer who only copies commands: every command of README, in order, in a fresh clone and an
empty environment.

    python tests/e2e/newcomer.py --out transcript.md

clones the commit that is checked out, runs the bash blocks of README one after another in one
shell, and writes them with shortened output. Ends with 1 at the first command that fails. `--clone
FOLDER` keeps the clone; `--from "A day with it"` starts at that heading, in one that was kept.
`--skip "make test"` leaves a command out, here the longest.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = 12  # lines of one command's output: half of them from its beginning, half from its end


def commands(readme: str, heading: str, skipped: list[str]) -> list[str]:
    """The lines of its bash blocks but the `skipped`, behind `heading` where it is not empty."""
    behind = readme[readme.index(f"## {heading}") :] if heading else readme
    blocks = re.findall(r"^```bash\n(.*?)^```$", behind, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line not in ("", *skipped)]


def shortened(output: str) -> str:
    lines = output.rstrip().splitlines()
    if len(lines) <= SHOWN:
        return "\n".join(lines)
    left_out = f"… {len(lines) - SHOWN} lines"
    return "\n".join([*lines[: SHOWN // 2], left_out, *lines[-SHOWN // 2 :]])


class Shell:
    """One bash that remembers variables and the environment from a command to the next."""

    def __init__(self, folder: Path):
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("VIRTUAL_ENV", "PYTHON", "RAY_"))
        }
        self._bash = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=kept,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, command: str) -> tuple[int, str]:
        """Exit status and output."""
        end = f"newcomer-{time.monotonic_ns()}"
        self._bash.stdin.write(f"{{ {command}\n}} </dev/null; printf '\\n{end} %d\\n' $?\n")
        self._bash.stdin.flush()
        output = []
        for line in self._bash.stdout:
            if line.startswith(end):
                return int(line.split()[1]), "".join(output)
            output.append(line)
        return self._bash.wait(), "".join(output)

    def close(self) -> None:
        self._bash.stdin.close()
        self._bash.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    parser.add_argument(
        "--clone",
        type=Path,
        metavar="FOLDER",
        help="made, or gone on with; absent: a temporary one",
    )
    parser.add_argument(
        "--from", dest="heading", default="", metavar="HEADING", help="of README, to start at"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="COMMAND", help="a command to leave out"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.clone or Path(scratch, "async-opd")
        if not folder.exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        readme = (folder / "README.md").read_text(encoding="utf-8")
        with closing(Shell(folder)) as shell, args.out.open("w", encoding="utf-8") as transcript:
            for command in commands(readme, args.heading, args.skip):
                started = time.monotonic()
                status, output = shell.run(command)
                shown = (
                    f"$ {command}\n{shortened(output)}\n[{status}, {time.monotonic() - started:.0f}"
                    " s]\n\n"
                )
                transcript.write(shown)
                transcript.flush()
                print(shown, end="", flush=True)
                if status:
                    sys.exit(f"{command!r} failed")


if __name__ == "__main__":
    main()
