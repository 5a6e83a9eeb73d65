"""What keeps up with the learner, from rates that are given and from rows of a run."""

import json
from pathlib import Path

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.config.load import load
from async_opd.core.errors import ConfigError, RunMissing
from async_opd.tools.plan.balance import balance, measured, parse_rates

STATES = ("busy", "starved", "blocked", "syncing", "down")


def row(elapsed_s: float, rate: float, **shares: tuple[float, ...]) -> dict:
    rates = dict.fromkeys(
        ("generators_tokens_per_s", "teachers_tokens_per_s", "trained_tokens_per_s"), rate
    )
    states = {
        f"{role}_{s}": share
        for role, each in shares.items()
        for s, share in zip(STATES, each, strict=True)
    }
    return {"elapsed_s": elapsed_s} | rates | states


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of two generators, one teacher and two ranks: three slow steps, then a second of 100
    tokens/s and three of 200."""
    config = load(DEMO, ["rollout.generators=2", "learner.ranks=2", "rollout.concurrency=64"])
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    slow = dict(generators=(1, 0, 0, 0, 0), teachers=(1, 0, 0, 0, 0), learner=(1, 0, 0, 0, 0))
    shares = dict(
        generators=(0.5, 0, 0.25, 0.25, 0),  # at work 3/4 of the time, each of two
        teachers=(0.5, 0.5, 0, 0, 0),
        learner=(0.2, 0.5, 0.1, 0.2, 0),  # blocked: its own checkpoint
    )
    rows = [row(step, 1.0, **slow) for step in (10, 20, 30)] + [
        row(31, 100.0, **shares),
        row(34, 200.0, **shares),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def test_rates_are_tokens_by_the_seconds_a_member_was_at_work(run_dir):
    rates = measured(run_dir, load(DEMO)).rates
    tokens, seconds = 100 + 3 * 200, 4
    assert rates["generator"] == pytest.approx(tokens / (2 * 0.75 * seconds))
    assert rates["teacher"] == pytest.approx(tokens / (0.5 * seconds))
    assert rates["learner"] == pytest.approx(tokens / (2 * 0.5 * seconds))


def test_a_run_that_was_gone_on_with_has_the_rates_of_its_steps(run_dir):
    rates = measured(run_dir, load(DEMO)).rates
    metrics = run_dir / "metrics.jsonl"
    *_, last = metrics.read_text().splitlines()
    for elapsed_s in (1, 4):  # from anew, and the same step once more
        with metrics.open("a") as file:
            file.write(json.dumps(json.loads(last) | {"elapsed_s": elapsed_s}) + "\n")
    again = measured(run_dir, load(DEMO)).rates
    tokens, seconds = 100 + 6 * 200, 7
    assert again["teacher"] == pytest.approx(tokens / (0.5 * seconds))
    assert again["generator"] == pytest.approx(tokens / (2 * 0.75 * seconds))
    assert rates != again


def test_settings_that_rates_hang_on_and_that_differ_are_named(run_dir):
    differs = measured(run_dir, load(DEMO, ["learner.gradient_checkpointing=true"])).differs
    assert differs == [
        "rollout.concurrency: 64 then, 256 now",
        "learner.gradient_checkpointing: False then, True now",
    ]
    config = load(DEMO, ["rollout.concurrency=64"])
    # neither the number of members nor where a model lies matters
    assert measured(run_dir, config).differs == []


def test_the_slowest_of_all_members_is_the_bottleneck_and_the_learner_sets_the_balance():
    config = load(DEMO, ["rollout.generators=3", "teacher.replicas=2", "learner.ranks=2"])
    balanced = balance(
        config,
        parse_rates("generator=1000,teacher=4000,learner=2500", config),
        "rates as given",
        [],
    )
    assert balanced.capacity == {"generator": 3000, "teacher": 8000, "learner": 5000}
    assert (balanced.bottleneck, balanced.generators, balanced.teachers) == ("generator", 5, 2)


def test_servers_are_counted_by_their_addresses():
    servers = ["teacher.backend=server", 'teacher.urls=["http://a:1", "http://b:1", "http://c:1"]']
    config = load(DEMO, servers)
    rates = parse_rates("generator=1000,teacher=4000,learner=2500", config)
    assert balance(config, rates, "rates as given", []).capacity["teacher"] == 12000


def test_the_plan_says_what_a_short_run_tells(run_dir, capsys):
    assert main(["plan", str(DEMO), "--offline", "--like", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert (
        "bottleneck       generator (tokens/s of all: generator 117, teacher 350, learner 175;"
        " rates of " in printed
    )
    assert "in balance       2 generator(s) and 1 teacher(s) keep up with the learner\n" in printed
    assert "  measured otherwise: rollout.concurrency: 64 then, 256 now\n" in printed


def test_a_run_without_enough_rows_is_refused_by_name(run_dir):
    rows = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(rows[:3]))
    with pytest.raises(
        RunMissing, match="--like needs more than 3 steps, the first are slow; it has 3"
    ):
        measured(run_dir, load(DEMO))
    (run_dir / "metrics.jsonl").write_text("{\n")
    with pytest.raises(RunMissing, match="--like needs a run's directory"):
        measured(run_dir, load(DEMO))


def test_the_typical_response_is_the_mean_of_the_run_where_its_rows_say(run_dir):
    assert measured(run_dir, load(DEMO)).response is None
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    lengths = [10, 20, 30, 40, 50]
    metrics.write_text(
        "".join(
            json.dumps(row | {"length_mean": length}) + "\n"
            for row, length in zip(rows, lengths, strict=True)
        )
    )
    assert measured(run_dir, load(DEMO)).response == 30


def test_a_teacher_in_the_learner_is_nobody_to_be_balanced(run_dir):
    """Nor did it slow a run down that had one: its rows have no such role."""
    inside = ["student.lora.rank=2", "teacher.model=toy:student", "teacher.backend=learner"]
    config = load(DEMO, [*inside, "teacher.evaluate=false", "learner.ranks=2"])
    rates = parse_rates("generator=1000,learner=2500", config)
    balanced = balance(config, rates, "rates as given", [])
    assert balanced.capacity == {"generator": 1000, "learner": 5000}
    assert (balanced.bottleneck, balanced.generators, balanced.teachers) == ("generator", 5, 0)
    with pytest.raises(ConfigError, match="must be generator=TOKENS_PER_S,learner=TOKENS_PER_S,"):
        parse_rates("generator=1000,teacher=4000,learner=2500", config)
    assert set(measured(run_dir, config).rates) == {"generator", "learner"}
    tree = json.loads((run_dir / "config.json").read_text())
    tree["teacher"]["backend"] = "learner"
    (run_dir / "config.json").write_text(json.dumps(tree))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in [key for key in row if key.startswith("teachers_") and "tokens" not in key]:
            del row[key]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(measured(run_dir, config).rates) == {"generator", "learner"}
    with pytest.raises(RunMissing, match="its rows have no work of teacher"):
        measured(run_dir, load(DEMO))
