"""Every key of a row and what it means, in ASCII, as Ray wants it: what is written here, and what
objectives say of their own. METRICS.md is made of it:

python -m async_opd.telemetry.metric_names
"""

import re
from pathlib import Path
from typing import NamedTuple

from async_opd.objectives import all_objectives
from async_opd.objectives.base import COMPOSED

PREFIX = "async_opd_"  # in Ray's metrics, which put ray_ before it
PLACES = {  # in names, what may stand there
    "ROLE": "generators|teachers|verifier|learner|reference|teacher_generators",
    "N": "[0-9]+",
    "SOURCE": "[A-Za-z0-9_]+",
}


class Metric(NamedTuple):
    """What a key of a row means."""

    name: str
    unit: str
    meaning: str


def _of_objectives() -> dict[str, tuple[Metric, ...]]:
    """Collect what objectives say of themselves, under the tags of those that say the same."""
    tables = {
        f"`{tag}`": tuple(Metric(name, *meaning) for name, meaning in objective.metrics.items())
        for tag, objective in sorted(all_objectives().items())
        if objective.metrics
    }
    return {
        f"the learner, for {' and '.join(tag for tag in tables if tables[tag] == table)}": table
        for table in tables.values()
    }


TABLE = {  # by who makes them
    "the driver's clock": (
        Metric("step", "steps", "the optimizer step that the row is of"),
        Metric("elapsed_s", "s", "since training started, or went on"),
        Metric("left_s", "s", "until the last step, at the mean pace so far"),
        Metric("generators_tokens_per_s", "tokens/s", "sampled since the last row"),
        Metric("teachers_tokens_per_s", "tokens/s", "scored since the last row"),
        Metric(
            "trained_tokens_per_s",
            "tokens/s",
            "trained since the last row, the teacher's own answers among them",
        ),
        Metric(
            "ROLE_busy",
            "share",
            "of the time since the last row, mean over the role's actors: at work",
        ),
        Metric("ROLE_starved", "share", "of the same time: without input"),
        Metric("ROLE_blocked", "share", "of the same time: held back by what comes behind it"),
        Metric("ROLE_syncing", "share", "of the same time: sending or taking weights"),
        Metric("ROLE_down", "share", "of the same time: lost, and not yet replaced"),
    ),
    "the driver": (
        Metric(
            "accuracy",
            "share",
            "mean reward of the step's rollouts, 1 where right, 0 where unknown; no rollout: null",
        ),
        Metric("verdicts_unknown", "rollouts", "of the step, whose verdict timed out or crashed"),
        Metric("verdicts_known", "share", "of the step's rollouts, whose verdict is known"),
        Metric(
            "parity_gap",
            "nats",
            "between the log-probs of generators and learner, largest of the probe; else null",
        ),
        Metric("parity_mean", "nats", "the same, mean over the probe's tokens"),
        Metric("parity_p99", "nats", "the same, 99th percentile"),
        Metric(
            "sync_bytes",
            "bytes",
            "that the update behind the step carried to each GPU of a generator; no update: null",
        ),
        Metric("queue_ready", "groups", "scored and waiting, after the step"),
        Metric(
            "queue_outstanding", "groups", "that hold a slot: sampled, scored, waiting or trained"
        ),
        Metric("queue_slots", "groups", "that may be outstanding"),
        Metric("dropped", "trajectories", "scored and never trained, in all"),
        Metric(
            "rollouts_failed",
            "trajectories",
            "that nobody could sample or score, without which their groups went on, in all",
        ),
        Metric(
            "steps_without_tokens",
            "steps",
            "that kept no token and moved nothing, in all",
        ),
    ),
    "the driver, under [data.sources.NAME]; a `SOURCE` is a name": (
        Metric("share_SOURCE", "share", "of the step's groups, whose prompts are of that source"),
        Metric("accuracy_SOURCE", "share", "as `accuracy`, of the rollouts of that source"),
    ),
    "the driver, under [data.filter]": (
        Metric(
            "prompts_always_right",
            "prompts",
            "not handed out, for the last tries at them were all right, in all",
        ),
        Metric(
            "prompts_always_wrong",
            "prompts",
            "not handed out, for the last tries at them were all wrong, in all",
        ),
    ),
    "the driver, under [teacher_sampling]": (
        Metric("taught", "groups", "of the step, that the teacher answered"),
        Metric("taught_weight", "factor", "of the cross-entropy on them"),
        Metric("taught_requested", "groups", "given to the teacher, in all"),
        Metric("taught_trained", "groups", "of those trained, in all"),
        Metric(
            "dropped_teacher_wrong", "trajectories", "of the teacher's, dropped as wrong, in all"
        ),
        Metric(
            "dropped_teacher_unknown",
            "trajectories",
            "of the teacher's, dropped without a verdict, in all",
        ),
        Metric(
            "dropped_teacher_truncated", "trajectories", "of the teacher's, dropped as cut, in all"
        ),
        Metric(
            "dropped_teacher_late",
            "trajectories",
            "of the teacher's, dropped as they would weigh nothing, in all",
        ),
    ),
    "the driver, with `eval.every_steps`; null where no evaluation ended since the last row": (
        Metric(
            "eval_accuracy",
            "share",
            "mean reward of the held-out problems, 0 of those of unknown verdict, greedy",
        ),
        Metric("eval_unknown", "problems", "whose verdict timed out or crashed"),
        Metric("eval_known", "share", "of the problems, whose verdict is known"),
        Metric("eval_version", "steps", "the version that was live when the evaluation began"),
        Metric("eval_version_min", "steps", "the oldest version that sampled a token of it"),
        Metric("eval_version_max", "steps", "the newest version that sampled a token of it"),
        Metric("eval_tokens", "tokens", "mean length of a response"),
        Metric("eval_truncated", "share", "of the responses, cut by the length limit"),
        Metric("eval_s", "s", "that the evaluation took"),
        Metric(
            "eval_skipped",
            "evaluations",
            "in all: due while another ran, failed, or cut off by the end",
        ),
    ),
    "the learner": (
        Metric("tokens", "tokens", "of the student's rollouts that were trained"),
        Metric(
            "tokens_excluded", "tokens", "left out of the loss: over age, or of a truncated rollout"
        ),
        Metric("tokens_taught", "tokens", "of the teacher's own answers that were trained"),
        Metric(
            "tokens_lag_N", "tokens", "trained, whose weights were N steps behind the live ones"
        ),
        Metric(
            "lag_mean", "steps", "that a trained token's weights were behind the live ones, mean"
        ),
        Metric("lag_max", "steps", "the same, largest"),
        Metric(
            "kv_lag_mean",
            "steps",
            "that the KV which a trained token attended to was behind the weights that sampled the"
            " token: mean over its context, then over the tokens; 0 unless `sync.kv` is `keep`. By"
            " the spans: a context that the engine dropped for want of room and computed anew is"
            " fresher than that",
        ),
        Metric(
            "scoring_s",
            "s",
            "of the step, while the ranks scored it by the student's frozen base: where that"
            " is a teacher, or the reference",
        ),
        Metric("loss", "", "what is minimized"),
        Metric("loss_taught", "nats/token", "mean cross-entropy of the teacher's own answers"),
        Metric(
            "kl", "nats/token", "mean of log p(student) - log p(teacher) over the sampled tokens"
        ),
        Metric(
            "entropy", "nats/token", "of the policy that sampled, as its own tokens estimate it"
        ),
        Metric("length_mean", "tokens", "of a response of the student's, mean"),
        Metric("lr", "", "learning rate of the step"),
        Metric("grad_norm", "", "of the gradient, before clipping"),
        Metric("selected", "share", "of the trained tokens that the method selects"),
        Metric(
            "log_ratio_stale",
            "nats",
            "mean |log p(student) - log p(behaviour)| of tokens with a lag",
        ),
        Metric(
            "log_ratio_fresh_max",
            "nats",
            "largest of the same at lag 0: what the two engines differ by",
        ),
        Metric(
            "weight_mean",
            "factor",
            "W * ratio * |A|, the importance weight of the selected tokens, mean",
        ),
        Metric("weight_max", "factor", "the same, largest"),
        Metric("weight_ess", "share", "the same, effective sample size over their number"),
        Metric("ratio_mean", "factor", "the importance ratio of the selected tokens, mean"),
        Metric("ratio_max", "factor", "the same, largest"),
        Metric("ratio_ess", "share", "the same, effective sample size over their number"),
        Metric(
            "weight_by_method",
            "share",
            "of the variance of log(W * ratio * |A|) that comes from W, the method",
        ),
        Metric("weight_by_ratio", "share", "that comes from the ratio"),
        Metric("weight_by_advantage", "share", "that comes from |A|, the advantage"),
    ),
    **{
        f"the learner, with `objective.{key}`": tuple(
            Metric(name, *meaning) for name, meaning in metrics.items()
        )
        for key, metrics in COMPOSED.items()
    },
    **_of_objectives(),
}
NAMES = tuple(metric for metrics in TABLE.values() for metric in metrics)


def pattern(name: str) -> str:
    """Write a regular expression for the keys that `name` stands for."""
    for place, what in PLACES.items():
        name = re.sub(rf"(?<![A-Z]){place}(?![A-Z])", f"({what})", name)
    return name


def of(key: str) -> Metric:
    """Find what `key` means. Raises KeyError for one that the table has not."""
    for metric in NAMES:
        if re.fullmatch(pattern(metric.name), key):
            return metric
    raise KeyError(f"{key}: not in async_opd/telemetry/metric_names.py")


def markdown() -> str:
    """Write the table as METRICS.md has it."""
    lines = [
        "# Metrics",
        "",
        "Every key of a row of `metrics.jsonl`, one row a step, and under the same name in wandb"
        " and TensorBoard;",
        f"Prometheus has it as `ray_{PREFIX}<key>`. Made by"
        " `python -m async_opd.telemetry.metric_names`; a test keeps it true.",
        "`N` stands for a number, `ROLE` for "
        + ", ".join(f"`{r}`" for r in PLACES["ROLE"].split("|"))
        + ".",
    ]
    for source, metrics in TABLE.items():
        lines += ["", f"## Made by {source}", "", "| key | unit | what |", "|---|---|---|"]
        cells = ((f"`{m.name}`", m.unit, m.meaning.replace("|", "\\|")) for m in metrics)
        lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("METRICS.md").write_text(markdown(), encoding="utf-8")
