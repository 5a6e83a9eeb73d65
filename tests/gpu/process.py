"""A check in a process of its own, which may be killed: a card that hangs answers nobody, and one
that failed is no good to what comes after it."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tests.gpu.checks import CHECKS, Check
from tests.gpu.place import LIMIT_S, Place, Unfit

FOLDER = Path(__file__).parent
GRACE_S = 15.0  # to end what it has started
Status = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class Outcome:
    """What became of a check: its figures, also of one that broke off, and why it did."""

    name: str
    status: Status
    reason: str = ""
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def cards() -> int:
    """Count the cards that torch sees."""
    return torch.cuda.device_count()


def run(
    check: Check,
    folder: Path,
    *,
    rehearsal: bool,
    model: str | None = None,
    limit_s: float = LIMIT_S,
) -> Outcome:
    """Run `check`; what it prints goes to a file of its name in `folder`."""
    if lacking := check.lacking(cards(), rehearsal=rehearsal):
        return Outcome(check.name, "skip", lacking)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    name = check.name.replace(", ", "-").replace(" ", "_")
    results, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.process", check.name, f"{results}"]
    command += ["--tiny"] if rehearsal else []
    command += ["--model", model] if model else []
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if rehearsal else {}
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=FOLDER.parents[1],
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | hidden,
        )
        try:
            code = child.wait(limit_s)
            ended = f"ended with status {code}, see {log}"
        except subprocess.TimeoutExpired:
            ended = f"more than {limit_s:g} s, see {log}"
        finally:
            end(child)
    return outcome(check.name, results, ended)


def outcome(name: str, results: Path, ended: str) -> Outcome:
    """Read what a check has left in `results`; `ended` is the reason of one that broke off."""
    lines = [json.loads(x) for x in results.read_text().splitlines()] if results.exists() else []
    rows = [(line["what"], line["figures"]) for line in lines if "what" in line]
    last = next((line for line in lines if "status" in line), None)
    if last is None:
        return Outcome(name, "fail", ended, rows)
    return Outcome(name, last["status"], last["reason"], rows)


def end(child: subprocess.Popen) -> None:
    """End a check that may still run, and whatever is left of its process group."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def attempt(check: Check, results: Path, place: Place) -> None:
    """Run `check` here, and write its figures as they come and then how it ended."""

    def write(row: dict[str, Any]) -> None:
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def record(what: str, **figures: Any) -> None:
        plain = {
            key: value if isinstance(value, int) else float(value) for key, value in figures.items()
        }
        write({"what": what, "figures": plain})

    try:
        check.run(place, record)
        write({"status": "pass", "reason": ""})
    except Unfit as e:
        write({"status": "skip", "reason": f"{e}"})
    except Exception as e:
        traceback.print_exc()
        last = f"{e}".strip().splitlines()[-1:]  # of a job's log, or of what NCCL says
        write({"status": "fail", "reason": ": ".join([type(e).__name__, *last])[:300]})


def main() -> None:
    """Run the check of that name in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[check.name for check in CHECKS])
    parser.add_argument("results", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    (check,) = (check for check in CHECKS if check.name == args.name)
    device = "cpu" if args.tiny else "cuda"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        attempt(check, args.results, Place(device, args.tiny, Path(folder), args.model))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what libraries leave of threads and communicators is nothing to wait for


if __name__ == "__main__":
    main()
