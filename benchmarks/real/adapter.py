"""A real student by an adapter beside the same by all its weights: memory of the learner's ranks,
trained tokens/s, bytes of an update, and how far either is from the teacher after equal steps.

Heals the layer-pruned SmolLM2 (configs/smollm2_heal.toml) in as many steps with all weights, with
an adapter that is sent merged, and with one that travels alone; measures each by
`benchmarks.real.divergence`. A learner that is not nearer to the teacher than the student was ends
it with 1.

    make real-inputs && python -m benchmarks.real.adapter --steps 12 --out runs/adapter.json
"""

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil

from async_opd.launch.new_run import environment
from benchmarks.real.run import FLOAT32, HEAL, INPUTS, Stages, command, multiplies_bfloat16, read

LEARNER = "ray::Learner"  # titles of its ranks' processes begin so
WAYS = {  # name: what it changes in the config
    "all weights": (),
    "adapter, merged": ("student.lora.rank=16", "learner.lr=1e-3"),
    "adapter, alone": ("student.lora.rank=16", "learner.lr=1e-3", "sync.lora=adapter"),
}
ALIKE = ("teacher.evaluate=false", "eval.problems=16", "learner.warmup_steps=2")
GIB = 2**30


class Watch:
    """The most memory that the learner's ranks held together while inside, in bytes: what is theirs
    alone, and their part of what they share."""

    def __enter__(self) -> "Watch":
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(1.0):
            held = 0
            for process in psutil.process_iter():
                try:
                    if process.cmdline()[:1] and process.cmdline()[0].startswith(LEARNER):
                        held += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
                    continue  # it has ended meanwhile
            self.most = max(self.most, held)


def heal(stages: Stages, name: str, steps: int, folder: Path) -> dict:
    """Train one way and export the whole model; its figures."""
    dtype = () if multiplies_bfloat16() else FLOAT32
    changes = (*dtype, *ALIKE, *WAYS[name], f"run.steps={steps}", f"run.dir={folder}")
    with Watch() as watch:
        stages.run(name, command("train", HEAL, *changes))
    whole = ("--merged",) if "student.lora.rank=16" in WAYS[name] else ()
    stages.run(f"{name}: export", command("export", f"{folder}", *whole))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = read(folder / "summary.json")
    return {
        "memory_gib": watch.most / GIB,
        "trained_tokens_per_s": summary["trained_tokens_per_s"],
        "sync_mib": max(row["sync_bytes"] or 0 for row in rows) / 2**20,
        "max_lag_seen": summary["max_lag_seen"],
        "model": f"{folder / 'export'}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/adapter"), help="made new")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    stages = Stages()
    figures = {
        name: heal(stages, name, args.steps, args.folder / f"{number}")
        for number, name in enumerate(WAYS)
    }
    measured, before = args.folder / "divergence.json", f"{INPUTS / 'student'}"
    models = [before, *(each["model"] for each in figures.values())]
    words = [f"{INPUTS / 'teacher'}", f"{INPUTS / 'chat_heldout.jsonl'}", *models]
    divergence = [sys.executable, "-m", "benchmarks.real.divergence", *words]
    stages.run("divergence", [*divergence, "--out", f"{measured}"])
    kl = read(measured)
    for each in figures.values():
        each["kl"] = kl[each["model"]]["kl"]
    processor = subprocess.run(["uname", "-m"], capture_output=True, text=True).stdout.strip()
    args.out.write_text(
        json.dumps(
            {
                "ways": figures,
                "kl_before": kl[before]["kl"],
                "settings": WAYS,
                "seconds": stages.seconds,
                "processor": processor,
                **environment(),
            },
            indent=2,
        )
    )
    print(f"\nKL before: {kl[before]['kl']:.2f} nats a token; after {args.steps} steps:")
    for name, each in figures.items():
        print(
            f"  {name:16} KL {each['kl']:.2f}, {each['trained_tokens_per_s']:.0f} trained tokens/s,"
            f" learner {each['memory_gib']:.2f} GiB, an update {each['sync_mib']:.1f} MiB"
        )
    if not all(each["kl"] < kl[before]["kl"] for each in figures.values()):
        sys.exit("one is not nearer to its teacher")


if __name__ == "__main__":
    main()
