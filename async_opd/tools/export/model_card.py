"""The model card of an exported checkpoint: what the files of its run say. What they do not say is
left out."""

import inspect
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from sys import float_info
from typing import Any

import msgspec

from async_opd.config.paths import HUB_ID
from async_opd.config.schema import Config
from async_opd.core.lora import ENGINE_RANKS, LoraConfig
from async_opd.core.reading import content_of
from async_opd.core.run_dir import (
    ENVIRONMENT,
    LEARNER,
    METRICS,
    MODEL,
    SUMMARY,
    decode_row,
    read_lines,
)
from async_opd.core.wire import trained_tokens
from async_opd.driver.checkpoints import Checkpoint
from async_opd.objectives import Objective
from async_opd.roles.rollout.config import DataConfig

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


LOAD_ADAPTER = """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
SERVE_ADAPTER = """
```bash
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules student={name}
```
"""
LOCAL_BASE = """
Its `adapter_config.json` names `{base}` by where it lay on the machine of the run. Elsewhere write
there, as `base_model_name_or_path`, where it lies.
"""


def card(
    run_dir: Path, config: Config, checkpoint: Checkpoint, name: str, merged: bool = False
) -> str:
    """Write README.md of the folder `name`: the student, or its adapter where that is not
    `merged`."""
    student, sets = config.student.model, config.data.sets.values()
    lora = config.student.lora
    load = _load_adapter(lora, student, name) if lora and not merged else LOAD.format(name=name)
    front = {
        "library_name": "peft" if lora and not merged else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": student if _on_hub(student) else None,
        "datasets": [data.path for data in sets if _on_hub(data.path)],
        "tags": ["async-opd", "on-policy-distillation", config.objective.tag]
        + (["lora"] if lora else []),
    }
    teachers = [f"`{_named(teacher.model)}`" for teacher in config.named_teachers.values()]
    sections = [
        f"# {name}",
        f"`{_named(student)}`, distilled on-policy from {', '.join(teachers)} by async-opd.",
        "## Training",
        _table(_training(run_dir, config, checkpoint)),
        "## Method",
        *_method(config.objective),
        *_section("## Accuracy", _accuracies(config, checkpoint, _read(run_dir / SUMMARY))),
        "## Load it",
        load.strip(),
        *_section("## Made with", _versions(_read(run_dir / ENVIRONMENT))),
    ]
    # JSON is YAML
    matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value)
    return f"---\n{matter}\n---\n\n" + "\n\n".join(sections) + "\n"


def _training(run_dir: Path, config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    run = config.run
    rollout, learner = config.rollout, config.learner
    version = checkpoint.state.version
    facts = {
        "optimizer steps": f"{version} of {run.steps}",
        "trajectories a step": (
            f"{learner.trajectories_per_step}, {rollout.samples_per_prompt} of each prompt"
        ),
        "data": "; ".join(_sets(config.data)),
        "sampling": (
            f"temperature {rollout.temperature:g}, at most {rollout.max_new_tokens} tokens"
        ),
        "learning rate": (
            f"{learner.lr:g}, {learner.schedule}, {learner.warmup_steps} steps of warm-up"
        ),
        **_adapter(config.student.lora),
        "seed": run.seed,
        "staleness bound": (
            f"{run.max_lag_steps} steps; what is older is"
            f" {'masked' if run.stale == 'mask' else 'dropped'}"
        ),
    }
    if stops := [f"`{json.dumps(stop, ensure_ascii=False)}`" for stop in rollout.stop]:
        facts["ends besides its own"] = ", ".join(stops).replace("|", r"\|")
    # of the config that may be absent: what it means is known where the run was
    model, rank = (
        _read(checkpoint.folder / file)
        for file in (Path(MODEL, "config.json"), Path(LEARNER, "rank-0.json"))
    )
    if dtype := model.get("dtype") or rank.get("dtype"):
        facts["weights"] = dtype
    rows = _rows(run_dir / METRICS, version)
    needed = {"lag_max", "tokens"}
    if rows and len(rows) == version and all(needed <= row.keys() for row in rows):
        # else the file is not whole
        facts |= {
            "largest lag seen": f"{int(max(row['lag_max'] for row in rows))} steps",
            "trained tokens": int(sum(map(trained_tokens, rows))),
        }
    return facts


def _load_adapter(lora: LoraConfig, student: str, name: str) -> str:
    load = LOAD_ADAPTER.format(name=name)
    if lora.rank <= ENGINE_RANKS[-1]:
        load += SERVE_ADAPTER.format(name=name, base=_named(student), rank=lora.engine_rank)
    return load if _on_hub(student) else load + LOCAL_BASE.format(base=_named(student))


def _adapter(lora: LoraConfig | None) -> dict[str, Any]:
    if lora is None:
        return {}
    beside = "every linear layer but the head"
    if lora.target_modules != "all-linear":
        beside = ", ".join(f"`{layer}`" for layer in lora.target_modules)
    return {"adapter": f"LoRA of rank {lora.rank}, scaled by {lora.scaling:g}, on {beside}"}


def _sets(data: DataConfig) -> Iterator[str]:
    """Name each set; of several, with its weight."""
    weights = [source.weight for source in data.sources.values()] or [None]
    for each, weight in zip(data.sets.values(), weights, strict=True):
        named = ", ".join(
            f"`{part}`" for part in (_named(each.path), each.subset, each.split) if part
        )
        yield named if weight is None else f"{named}, weight {weight:g}"


def _method(objective: Objective) -> list[str]:
    """Say what its file says of it, with the certainty of the formula."""
    module = inspect.getdoc(sys.modules[type(objective).__module__]) or ""
    what = " ".join(module.partition("\n\n")[0].split())
    settings = msgspec.to_builtins(objective).items()
    return [
        f"`{objective.tag}`: "
        + re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", what),
        f"```text\n{inspect.getdoc(type(objective))}\n```",
        _table(
            {
                key: f"`{json.dumps(value)}`"
                for key, value in settings
                if key != "tag" and value is not None
            }
        ),
    ]


def _accuracies(config: Config, checkpoint: Checkpoint, summary: dict[str, Any]) -> dict[str, Any]:
    """List the greedy ones. That after training belongs to the last version."""
    try:
        before = msgspec.convert(checkpoint.state.counters.get("before"), tuple[int, int, int])
    except msgspec.ValidationError:
        return {}
    right, _, problems = before
    if not problems or not config.eval:
        return {}
    accuracies = {
        "held-out problems": f"{problems} of `{_named(config.eval.path)}`",
        "before": f"{right / problems:.1%}",
    }
    if summary.get("version") == checkpoint.state.version:
        shares = _shares(summary)
        if "accuracy_after" in summary:
            after = shares.get("accuracy_after")
            accuracies["after"] = "not measured" if after is None else f"{after:.1%}"
        if "eval_known" in shares:
            accuracies["verdicts known"] = f"{shares['eval_known']:.1%}"
        accuracies |= {
            key.replace("_accuracy", "").replace("_", " ", 1): f"{share:.1%}"
            for key, share in shares.items()
            if key.startswith("teacher_accuracy")
        }
    return accuracies


def _versions(environment: dict[str, Any]) -> dict[str, Any]:
    commit, versions = environment.get("commit"), environment.get("versions")
    return ({"commit": commit} if commit else {}) | (versions if isinstance(versions, dict) else {})


def _section(title: str, rows: dict[str, Any]) -> list[str]:
    return [title, _table(rows)] if rows else []


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    )


def _read(path: Path) -> dict[str, Any]:
    """Read an object; an empty one where there is none: a run that was killed has no summary."""
    try:
        return msgspec.json.decode(content_of(path), type=dict[str, Any])
    except (OSError, ValueError, RecursionError):
        return {}


def _shares(tree: dict[str, Any]) -> dict[str, float]:
    """Pick what is a finite number."""
    return {
        key: share
        for key, share in tree.items()
        if type(share) in (int, float) and abs(share) < float_info.max
    }


def _rows(path: Path, version: int) -> list[dict[str, Any]]:
    """Read those of the steps up to `version`; none where one cannot be read."""
    try:
        rows = [_shares(row) for _, row in read_lines(path, decode_row)]
    except (OSError, ValueError):
        return []
    return [row for row in rows if row.get("step", math.inf) <= version]


def _named(name: str) -> str:
    """Name what lies on this machine by the last part of its path."""
    return name if _on_hub(name) else Path(name).name


def _on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()
