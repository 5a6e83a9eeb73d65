import asyncio
import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from async_opd.cli.main import main
from async_opd.core.errors import RunMissing
from async_opd.core.ports import Generator
from async_opd.core.run_dir import EARLIER_SPANS, SPANS
from async_opd.driver.replica import Replica
from async_opd.telemetry.metrics import ROLES, Jsonl, Meter
from async_opd.telemetry.spans import STATES, Window, encode
from async_opd.tools.trace.events import _in_order, trace
from async_opd.tools.trace.read import calls, recorded, states
from tests.simulated.roles import PER_STEP, Pace, Prompts, SimulatedGenerator
from tests.simulated.runs import measure
from tests.simulated.virtual_time import virtual

PACE = replace(Pace.of(1, 1, heavy_tail=True), sync_s=0.05)
LANES = {
    "generators": "generator 0",
    "teachers": "teacher 0",
    "verifier": "verifier 0",
    "learner": "learner",
}


def ran(run_dir: Path, steps: int, keep: int = 50) -> dict:
    """Summary of a run over simulated roles, in virtual time, whose spans lie in `run_dir`."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.json").write_text("{}")
    spans = Window(run_dir, keep, Jsonl(run_dir / SPANS, encode))
    return virtual(measure(PACE, bound=4, steps=steps, spans=spans))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, ran(run_dir, 20)


@pytest.fixture(scope="module")
def events(run) -> list[dict]:
    return trace(recorded(run[0]), "run")["traceEvents"]


def of(events: list[dict], phase: str) -> list[dict]:
    return [event for event in events if event["ph"] == phase]


def threads(events: list[dict]) -> dict[int, str]:
    return {e["tid"]: e["args"]["name"] for e in of(events, "M") if e["name"] == "thread_name"}


def test_slices_of_one_thread_never_overlap(events):
    by_thread = defaultdict(list)
    for event in of(events, "X"):
        by_thread[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(by_thread) > len(LANES)
    for slices in by_thread.values():
        assert all(end <= start for (_, end), (start, _) in pairwise(sorted(slices)))


def test_the_states_of_every_actor_add_up_to_the_time_accounting_of_the_summary(run, events):
    run_dir, summary = run
    lines = recorded(run_dir).lines
    origin = lines[0].since
    start = next(line.since for line in lines if line.step == 1) - origin
    end = next(line.until for line in lines if line.step == 20) - origin
    assert summary["wall_s"] == end - start
    names = threads(events)
    for role, state in ((role, state) for role in ROLES for state in STATES):
        inside = 0.0
        for event in of(events, "X"):
            if names[event["tid"]] == LANES[role] and event["name"] == state:
                until = (event["ts"] + event["dur"]) / 1e6
                inside += max(min(until, end) - max(event["ts"] / 1e6, start), 0)
        assert inside / summary["wall_s"] == pytest.approx(summary[f"{role}_{state}"], abs=1e-4)


def test_every_trained_group_is_followed_from_its_generator_into_its_step(run, events):
    names, on_thread = threads(events), defaultdict(list)
    for event in of(events, "X"):
        on_thread[event["tid"]].append(event)

    def slice_at(point: dict) -> dict:
        (only,) = (
            e for e in on_thread[point["tid"]] if e["ts"] <= point["ts"] < e["ts"] + e["dur"]
        )
        return only

    paths = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            paths[event["id"]].append(event)
    groups = {}
    for points in paths.values():
        assert [p["ts"] for p in points] == sorted(p["ts"] for p in points)
        assert [p["ph"] for p in points] == ["s", *"t" * (len(points) - 2), "f"]
        *through, step = map(slice_at, points)
        assert [e["name"] for e in through if e["name"] != "wait"] in (
            ["generate", "score", "check"],
            ["generate", "check", "score"],
        )
        (id,) = {e["args"]["group"] for e in through}
        assert step["name"] == "step" and id in step["args"]["groups"]
        assert names[step["tid"]] == "learner, call 1"
        groups[id] = step["args"]["step"]
    assert groups.keys() == {str(number) for number in range(20 * PER_STEP)}
    assert sorted(groups.values()) == [step for step in range(1, 21) for _ in range(PER_STEP)]


def test_weight_updates_carry_their_version_and_the_queue_its_depth(events):
    updates = [e["args"]["version"] for e in of(events, "X") if e["name"] == "update"]
    assert updates[-20:] == list(range(1, 21))
    counted = [e["args"] for e in of(events, "C") if e["name"] == "queue"]
    assert len(counted) == 20
    assert max(row["outstanding"] for row in counted) == 5 * PER_STEP
    assert len([e for e in of(events, "C") if e["name"] == "tokens/s"]) == 20


FIELDS = {  # of the trace event format, beside name, ph, pid and tid
    "X": {"cat", "ts", "dur", "args"},
    "M": {"args"},
    "C": {"ts", "args"},
    "i": {"cat", "ts", "s", "args"},
    "s": {"cat", "ts", "id"},
    "t": {"cat", "ts", "id"},
    "f": {"cat", "ts", "id", "bp"},
}


def test_the_file_is_of_the_trace_event_format(run, capsys):
    run_dir, _ = run
    third = recorded(run_dir).lines[3].until + recorded(run_dir).lines[3].epoch
    happened = [(1.0, "lost", "generator 0", "killed"), (third, "lost", "generator 0", "killed")]
    happened += [(third, "saved", "checkpoint", "step 3")]
    rows = [dict(zip(("time", "what", "who", "why"), event, strict=True)) for event in happened]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["trace", str(run_dir), "-o", str(run_dir / "out.json")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((run_dir / "out.json").read_text())
    events = written["traceEvents"]
    assert printed.startswith(
        f"{run_dir / 'out.json'}: {len(events)} events, steps 1 to 20; open it at "
    )
    for event in events:
        assert event.keys() == {"name", "ph", "pid", "tid"} | FIELDS[event["ph"]]
        assert all(
            type(event[key]) is int for key in ("pid", "tid", "ts", "dur", "id") if key in event
        )
        assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert event["args"] and all(
                isinstance(value, int | float) for value in event["args"].values()
            )
    lost, saved = of(events, "i")  # the other loss is not of these steps
    # of the event; the calls of a save are save and save_state
    assert (saved["name"], saved["args"]) == ("checkpoint: saved", {"why": "step 3"})
    assert (lost["name"], lost["s"], lost["args"]) == ("generator 0: lost", "g", {"why": "killed"})
    names = threads(events)
    assert set(LANES.values()) <= set(names.values())
    assert {e["tid"] for e in of(events, "X")} <= names.keys()
    place = {e["tid"]: e["pid"] for e in events if e["tid"]}
    assert all(place[e["tid"]] == e["pid"] for e in events if e["tid"])
    assert not set(place) & set(place.values())
    processes = {
        e["pid"]: e["args"]["name"] for e in of(events, "M") if e["name"] == "process_name"
    }
    assert set(processes.values()) == {
        "driver",
        "learner",
        "queue",
        "generator",
        "teacher",
        "verifier",
    }
    assert processes.keys() == {e["pid"] for e in events}


def test_a_long_run_keeps_its_last_steps_and_no_more_than_twice_as_many_as_it_is_to(tmp_path):
    ran(tmp_path, 75, keep=10)
    lines = {name: (tmp_path / name).read_bytes().count(b"\n") for name in (EARLIER_SPANS, SPANS)}
    assert lines[EARLIER_SPANS] == 10 and 0 < lines[SPANS] <= 10
    *steps, end = [line.step for line in recorded(tmp_path).lines]
    assert end is None
    assert steps == list(range(76 - len(steps), 76)) and len(steps) >= 10
    assert len(of(trace(recorded(tmp_path), "run")["traceEvents"], "X")) > 10


def test_a_run_that_goes_on_goes_on_with_its_file(tmp_path):
    ran(tmp_path, 12, keep=20)
    before = len(recorded(tmp_path).lines)
    ran(tmp_path, 12, keep=20)
    held = [len((tmp_path / name).read_bytes().splitlines()) for name in (EARLIER_SPANS, SPANS)]
    assert held == [20, 2 * before - 20] and before < 20


def test_what_an_actor_was_in_when_training_ended_is_not_stretched_to_where_it_starts_anew(
    tmp_path,
):
    lines = []

    async def twice():
        clock = asyncio.get_running_loop().time
        for _ in range(2):
            meter = Meter([], clock, lines.extend)
            meter.actor("learner").enter("busy")
            await asyncio.sleep(2)
            meter.flush()
            await asyncio.sleep(5)

    virtual(twice())
    durations = [(state.state, round(state.end - state.start, 3)) for state in states(lines)]
    assert durations == [("busy", 2), ("busy", 2)]


def test_a_call_that_ends_without_an_answer_says_so_and_its_actor_is_down():
    lines = []

    class Stuck(SimulatedGenerator):
        async def generate(self, prompt):
            await asyncio.sleep(10)

    async def killed():
        meter = Meter([], asyncio.get_running_loop().time, lines.extend)
        actor_time = meter.actor("generators", "generator 3")
        generator = Replica("generator 3", 3, Stuck(), actor_time)
        asking = asyncio.ensure_future(
            generator.call(Generator.generate, next(iter(Prompts())), of="0")
        )
        await asyncio.sleep(1)
        generator.leave("it is gone")
        await asyncio.wait([asking])
        await asyncio.sleep(2)
        meter.flush()

    virtual(killed())
    assert [(s.lane, s.state, round(s.end - s.start)) for s in states(lines)] == [
        ("generator 3", "busy", 1),
        ("generator 3", "down", 2),
    ]
    assert [(c.lane, c.name, c.of) for c in calls(lines)] == [
        ("generator 3", "generate, cut off", "0")
    ]


def test_what_asks_servers_has_lanes_by_their_addresses():
    threads = [("teacher http://b:1", 1), ("teacher http://a:1", 0), ("teacher http://b:1", 0)]
    in_order = sorted(threads, key=_in_order)
    assert in_order == [("teacher http://a:1", 0), ("teacher http://b:1", 0), threads[0]]


def test_damaged_lines_are_named_and_the_rest_is_shown(run, tmp_path, capsys):
    lines = (run[0] / SPANS).read_bytes().splitlines(keepends=True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SPANS).write_bytes(
        b"".join([*lines[:4], b'{"step":4\n', *lines[5:20], lines[20][:50]])
    )
    assert main(["trace", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert (
        printed.err.startswith(f"{tmp_path / SPANS}, line 5: left out: ")
        and printed.err.count("\n") == 1
    )
    assert "steps 1 to 19;" in printed.out  # the last was torn
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    test_slices_of_one_thread_never_overlap(events)
    learner = [s for s in states(recorded(tmp_path).lines) if s.lane == "learner"]
    gaps = [(a.end, b.start) for a, b in pairwise(learner) if a.end != b.start]
    assert len(gaps) == 1  # the step that was lost


def test_a_file_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    assert main(["trace", str(run[0]), "-o", str(tmp_path / "no" / "trace.json")]) == 2
    refusal = (
        f"async-opd: ConfigError: {tmp_path}/no/trace.json: cannot be written: No such file or"
        " directory\n"
    )
    assert capsys.readouterr() == ("", refusal)


def test_a_run_without_spans_is_told_which_setting_records_them(tmp_path, capsys):
    with pytest.raises(RunMissing, match=r"rum: no config\.json in it"):
        recorded(tmp_path / "rum")
    (tmp_path / "config.json").write_text("{}")
    assert main(["trace", str(tmp_path)]) == 2
    refusal = (
        f"{tmp_path / SPANS}: no spans: a run keeps those of its last run.trace_steps steps, where"
        " that is not 0"
    )
    assert capsys.readouterr() == ("", f"async-opd: RunMissing: {refusal}\n")
