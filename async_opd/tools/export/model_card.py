"""The model card of an exported checkpoint: what the files of its run say. What they do not say is
left out."""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from async_opd.config.paths import HUB_ID
from async_opd.config.schema import Config
from async_opd.core.run_dir import ENVIRONMENT, METRICS, SUMMARY, decode_row, read_lines
from async_opd.core.wire import trained_tokens
from async_opd.driver.checkpoints import Checkpoint
from async_opd.objectives import Objective

LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

```bash
vllm serve {name}
```
"""


def card(run_dir: Path, config: Config, checkpoint: Checkpoint, name: str) -> str:
    """Write README.md of the folder `name`."""
    tag, student = config.objective.tag, config.student.model
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"base_model": student} if _on_hub(student) else {}
    front |= {"datasets": [config.data.path]} if _on_hub(config.data.path) else {}
    front["tags"] = ["async-opd", "on-policy-distillation", tag]
    summary = _read(run_dir / SUMMARY)
    teachers = [f"`{_named(teacher.model)}`" for teacher in config.named_teachers.values()]
    sections = [
        f"# {name}",
        f"`{_named(student)}`, distilled on-policy from {', '.join(teachers)} by async-opd.",
        "## Training",
        _table(_training(run_dir, config, checkpoint)),
        "## Method",
        *_method(config.objective),
        *_section("## Accuracy", _accuracies(config, checkpoint, summary)),
        "## Load it",
        LOAD.format(name=name).strip(),
        *_section("## Made with", _versions(_read(run_dir / ENVIRONMENT))),
    ]
    # JSON is YAML
    matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"---\n{matter}\n---\n\n" + "\n\n".join(sections) + "\n"


def _training(run_dir: Path, config: Config, checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    run = config.run
    data = config.data
    rollout = config.rollout
    learner = config.learner
    yield "optimizer steps", f"{checkpoint.state.version} of {run.steps}"
    yield (
        "trajectories a step",
        f"{learner.trajectories_per_step}, {rollout.samples_per_prompt} of each prompt",
    )
    yield (
        "data",
        ", ".join(f"`{part}`" for part in (_named(data.path), data.subset, data.split) if part),
    )
    yield (
        "sampling",
        f"temperature {rollout.temperature:g}, at most {rollout.max_new_tokens} tokens",
    )
    yield (
        "learning rate",
        f"{learner.lr:g}, {learner.schedule}, {learner.warmup_steps} steps of warm-up",
    )
    yield "weights", learner.dtype
    yield "seed", run.seed
    older = "masked" if run.stale == "mask" else "dropped"
    yield "staleness bound", f"{run.max_lag_steps} steps; what is older is {older}"
    rows = _rows(run_dir / METRICS, checkpoint.state.version)
    if len(rows) == checkpoint.state.version:  # else the file is not whole
        yield "largest lag seen", f"{int(max(row['lag_max'] for row in rows))} steps"
        yield (
            "trained tokens",
            f"{int(sum(map(trained_tokens, rows)))}",
        )


def _method(objective: Objective) -> Iterator[str]:
    """Say what its file says of it, with the certainty of the formula."""
    module = sys.modules[type(objective).__module__]
    what = " ".join((inspect.getdoc(module) or "").partition("\n\n")[0].split())
    yield f"`{objective.tag}`: " + re.sub(
        r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", what
    )
    yield f"```text\n{inspect.getdoc(type(objective))}\n```"
    yield _table(
        (key, f"`{json.dumps(value)}`")
        for key, value in msgspec.to_builtins(objective).items()
        if key != "tag" and value is not None
    )


def _accuracies(
    config: Config, checkpoint: Checkpoint, summary: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """List the greedy ones. That after training belongs to the last version."""
    right, unknown, problems = checkpoint.state.counters.get("before", (0, 0, 0))
    if not problems or not config.eval:
        return
    yield "held-out problems", f"{problems} of `{_named(config.eval.path)}`"
    yield "before", f"{right / max(problems - unknown, 1):.1%}"
    if summary.get("version") == checkpoint.state.version:
        yield "after", f"{summary['accuracy_after']:.1%}"
        for key in (
            key
            for key in summary
            if key.startswith("teacher_accuracy") and summary[key] is not None
        ):
            yield key.replace("_accuracy", "").replace("_", " ", 1), f"{summary[key]:.1%}"


def _versions(environment: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if commit := environment.get("commit"):
        yield "commit", commit
    yield from environment.get("versions", {}).items()


def _section(title: str, rows: Iterator[tuple[str, Any]]) -> list[str]:
    listed = list(rows)
    return [title, _table(listed)] if listed else []


def _table(rows: Any) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _read(path: Path) -> dict[str, Any]:
    """Read an object; an empty one where there is none: a run that was killed has no summary."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return {}


def _rows(path: Path, version: int) -> list[dict[str, Any]]:
    """Read those of the steps up to `version`; none where one cannot be read."""
    try:
        return [row for _, row in read_lines(path, decode_row) if row["step"] <= version]
    except (OSError, ValueError):
        return []


def _named(name: str) -> str:
    """Name what lies on this machine by the last part of its path."""
    return name if _on_hub(name) else Path(name).name


def _on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()
