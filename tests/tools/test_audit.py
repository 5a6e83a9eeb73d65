import asyncio
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from random import Random

import msgspec
import pytest

from async_opd.config.load import load
from async_opd.core.errors import LedgerError, RunMissing
from async_opd.driver.ledger import Ledger
from async_opd.tools.audit.books import Books, audit

PER_STEP, SLOTS = 2, 6


def make(run_dir: Path, steps: int = 5) -> Path:
    run_dir.mkdir()
    overrides = [
        "learner.trajectories_per_step=4",
        "rollout.samples_per_prompt=2",
        "learner.warmup_steps=0",
    ]
    config = load("configs/demo.toml", [*overrides, f"run.steps={steps}"])
    (run_dir / "config.json").write_bytes(msgspec.json.encode(config))
    return run_dir


def write(run_dir: Path, *lines: list, numbered: bool = True) -> Path:
    """A ledger of these records; they are given their numbers where `numbered`."""
    records = [[kind, n, *rest] for n, (kind, *rest) in enumerate(lines, 1)] if numbered else lines
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir


def out(ids: str) -> list[list]:
    return [["out", id] for id in ids]


WHOLE = [  # 3 steps of 2; f replaces d
    *out("abcd"),
    ["reissued", "a", 1, "stale"],
    ["returned", "b", "generator 1 died"],
    ["failed", "b", 3, "teacher"],
    ["trained", 1, ["a", "b"]],
    *out("ef"),
    ["dropped", "d", "stale"],
    ["trained", 2, ["c", "e"]],
    *out("g"),
    ["trained", 3, ["f", "g"]],
    ["finished"],
]
BALANCED = dict(
    steps=3,
    steps_asked=3,
    finished=True,
    handed_out=7,
    trained=6,
    dropped={"stale": 1},
    outstanding=[],
    failed_rollouts={"teacher": 1},
    reissued={"stale": 1},
    returned={"generator 1 died": 1},
    resumed_at=[],
    void=0,
    discrepancies=[],
)


@pytest.fixture
def discrepancies_of(tmp_path):
    """What an audit finds wrong with these records of a run of `steps` steps."""

    def of(lines: list[list], steps: int = 3) -> list[str]:
        return audit(write(make(tmp_path / "run", steps), *lines)).discrepancies

    return of


def but(line: list, *instead: list) -> list[list]:
    """WHOLE with others instead of one line."""
    place = WHOLE.index(line)
    return [*WHOLE[:place], *instead, *WHOLE[place + 1 :]]


def test_the_books_of_a_whole_run(tmp_path):
    assert audit(write(make(tmp_path / "run", 3), *WHOLE)) == Books(**BALANCED)


def test_the_books_in_words(tmp_path):
    assert list(audit(write(make(tmp_path / "run", 3), *WHOLE)).lines()) == [
        "steps                 3  of 3, finished",
        "handed out            7",
        "  trained             6",
        "  dropped             1  stale 1",
        "  outstanding         0",
        "lost rollouts         1  teacher 1",
        "re-issued             1  stale 1",
        "handed back           1  generator 1 died 1",
        "resumes               0",
        "void records          0",
        "the books balance",
    ]


def test_of_a_run_that_has_not_finished_some_are_outstanding(tmp_path):
    books = audit(write(make(tmp_path / "run", 3), *WHOLE[:-2]))
    assert (books.finished, books.steps, books.outstanding, books.discrepancies) == (
        False,
        2,
        ["f", "g"],
        [],
    )


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        pytest.param(
            but(["trained", 2, ["c", "e"]]),
            [
                "step 3 follows step 1",
                "c: lost: handed out, neither trained nor dropped",
                "e: lost: handed out, neither trained nor dropped",
            ],
            id="a trained line removed",
        ),
        pytest.param(
            but(["trained", 2, ["c", "e"]], ["trained", 2, ["c", "e"]], ["trained", 2, ["c", "e"]]),
            [
                "step 2 follows step 2",
                "c: trained at step 2, but it had ended before",
                "e: trained at step 2, but it had ended before",
            ],
            id="a trained line doubled",
        ),
        pytest.param(
            but(["trained", 2, ["c", "e"]], ["trained", 2, ["x", "e"]]),
            [
                "c: lost: handed out, neither trained nor dropped",
                "x: trained at step 2, but it was never handed out",
            ],
            id="an id trained that was never handed out",
        ),
        pytest.param(
            but(["trained", 3, ["f", "g"]], ["trained", 2, ["f", "g"]]),
            ["step 2 follows step 2", "the run finished after step 2 of 3"],
            id="a step twice",
        ),
        pytest.param(
            but(["dropped", "d", "stale"]),
            ["d: lost: handed out, neither trained nor dropped"],
            id="a prompt lost",
        ),
        pytest.param(
            but(["trained", 3, ["f", "g"]], ["trained", 3, ["f"]], ["dropped", "g", "stale"]),
            ["step 3 has 1 groups, config.json says 2"],
            id="a step too small",
        ),
        pytest.param(
            but(["trained", 3, ["f", "g"]], ["trained", 3, ["f", "a"]], ["dropped", "g", "stale"]),
            ["a: trained at step 3, but it had ended before"],
            id="trained at two steps",
        ),
        pytest.param(
            [
                *but(["out", "g"], *out("ga"))[:-2],
                ["trained", 3, ["a", "g"]],
                ["dropped", "f", "stale"],
                ["finished"],
            ],
            ["a: handed out anew after it had ended"],
            id="handed out and trained a second time",
        ),
        pytest.param(
            but(["out", "e"], *out("eb"))[:-1],
            ["b: handed out anew after it had ended"],
            id="handed out a second time",
        ),
        pytest.param(
            but(["out", "c"], *out("cc")),
            ["c: handed out while it was outstanding"],
            id="out while out",
        ),
        pytest.param(
            but(["reissued", "a", 1, "stale"], ["reissued", "a", 2, "stale"]),
            ["a: attempt 2 follows attempt 0"],
            id="an attempt unaccounted for",
        ),
        pytest.param(
            but(
                ["returned", "b", "generator 1 died"],
                ["returned", "e", "left"],
                ["failed", "e", 2, "teacher"],
                ["reissued", "x", 1, "stale"],
            ),
            [
                "e: handed back (left), but it was never handed out",
                "e: rollout 2 failed (teacher), but it was never handed out",
                "x: re-issued (stale), but it was never handed out",
            ],
            id="given back by nobody",
        ),
        pytest.param(
            [*WHOLE, ["out", "h"]],
            [
                "record 16 stands behind the end of the run",
                "h: lost: handed out, neither trained nor dropped",
            ],
            id="a record behind the end",
        ),
        pytest.param(
            but(["trained", 1, ["a", "b"]], ["trained", 1, ["a", "b"]], ["checkpoint", 2]),
            ["a checkpoint of step 2 stands behind step 1"],
            id="a checkpoint of another step",
        ),
    ],
)
def test_each_corruption_is_named(discrepancies_of, lines, says):
    assert sorted(discrepancies_of(lines)) == sorted(says)


def test_missing_doubled_and_reordered_records_are_seen_by_their_numbers(tmp_path):
    numbered = [[kind, n, *rest] for n, (kind, *rest) in enumerate(WHOLE, 1)]
    run_dir = make(tmp_path / "run", 3)
    write(run_dir, *numbered[:4], *numbered[6:], numbered=False)
    assert audit(run_dir).discrepancies == ["line 5: records 5 to 6 are missing before it"]
    write(run_dir, *numbered[:6], numbered[5], *numbered[6:], numbered=False)
    assert audit(run_dir).discrepancies == ["line 7: record 6 stands behind record 6"]


RESUMED = [  # a, b trained and checkpointed; c, d outstanding; step 2 is lost with the kill
    *out("abc"),
    ["trained", 1, ["a", "b"]],
    *out("d"),
    ["checkpoint", 1],
    ["reissued", "c", 1, "stale"],
    ["trained", 2, ["c", "d"]],
    *out("ef"),
    ["dropped", "e", "stale"],
    ["resumed", 1, ["c", "d"]],
    *out("cdef"),
    ["trained", 2, ["d", "c"]],
    ["trained", 3, ["e", "f"]],
    ["finished"],
]


def test_records_behind_a_checkpoint_that_was_resumed_are_void(tmp_path):
    books = audit(write(make(tmp_path / "run", 3), *RESUMED))
    expected = dict(
        handed_out=6,
        trained=6,
        dropped={},
        reissued={},
        returned={},
        resumed_at=[1],
        void=5,
        failed_rollouts={},
    )
    assert books == Books(**BALANCED | expected)


def test_what_void_steps_had_trained_is_outstanding_again(tmp_path):
    books = audit(write(make(tmp_path / "run", 3), *RESUMED[:12]))
    assert (books.steps, books.outstanding, books.discrepancies) == (1, ["c", "d"], [])


def test_a_run_without_a_checkpoint_resumes_from_its_start(tmp_path):
    once = [*out("ab"), ["trained", 1, ["a", "b"]], ["resumed", 0, []]]
    books = audit(
        write(
            make(tmp_path / "run", 2),
            *once,
            *once,
            *once[:3],
            *out("cd"),
            ["trained", 2, ["c", "d"]],
        )
    )
    assert (books.steps, books.handed_out, books.void, books.resumed_at, books.discrepancies) == (
        2,
        4,
        7,
        [0, 0],
        [],
    )


def test_a_later_resume_may_go_back_behind_an_earlier_one(tmp_path):
    lines = [
        *out("ab"),
        ["trained", 1, ["a", "b"]],
        ["checkpoint", 1],
        *out("cd"),
        ["trained", 2, ["c", "d"]],
        ["checkpoint", 2],
        *out("ef"),
        ["resumed", 2, []],
        *out("ef"),
        ["resumed", 1, []],
        *out("cd"),
        ["trained", 2, ["c", "d"]],
        ["finished"],
    ]
    books = audit(write(make(tmp_path / "run", 2), *lines))
    assert (books.void, books.resumed_at, books.trained, books.discrepancies) == (9, [2, 1], 4, [])


@pytest.mark.parametrize(
    ("resumed", "says"),
    [
        (
            [["resumed", 1, ["c"]], *out("cef")],
            "d: outstanding, but the resume at step 1 does not know it",
        ),
        (
            [["resumed", 1, ["c", "d", "a"]], *out("cda")],
            "a: not outstanding, but the resume at step 1 says so",
        ),
        (
            [["resumed", 1, ["d", "c"]], *out("dc")],
            "the resume at step 1 has what is outstanding in another order",
        ),
        (
            [["resumed", 1, ["c", "d"]], *out("ecd")],
            "c: outstanding at the resume, but e was handed out before it",
        ),
        (
            [["resumed", 1, ["c", "d"]], *out("dc")],
            "c: outstanding at the resume, but d was handed out before it",
        ),
        (
            [["resumed", 1, ["c", "d"]], *out("c"), ["trained", 2, ["c", "d"]]],
            "d: trained at step 2 before it was handed out again",
        ),
        ([["resumed", 2, []]], "line 12: resumed at step 2, of which the ledger has no checkpoint"),
    ],
)
def test_a_resume_that_forgets_or_repeats_a_prompt_is_named(discrepancies_of, resumed, says):
    assert says in discrepancies_of([*RESUMED[:11], *resumed])


@pytest.fixture
def attested(tmp_path):
    """A run of 3 steps, resumed at 1, with its metrics and the checkpoints of step 1 and 3."""
    lines = [*RESUMED[:-1], ["checkpoint", 3], ["finished"]]
    run_dir = write(make(tmp_path / "run", 3), *lines)
    rows(run_dir, 1, 2, 3)
    checkpoint(run_dir, 1, ["c", "d"])
    checkpoint(run_dir, 3, [])
    return run_dir


def rows(run_dir: Path, *steps: int) -> None:
    (run_dir / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "loss": 1.5}}\n' for step in steps)
    )


def checkpoint(
    run_dir: Path, step: int, outstanding: list[str], *, of: int | None = None, drawn: int = 0
) -> Path:
    folder = run_dir / "checkpoints" / f"{step:06}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "version": step if of is None else of,
        "outstanding": outstanding,
        "position": {"drawn": drawn},
        "score": 0.5,
    }
    (folder / "run.json").write_text(json.dumps(state))
    (folder / "manifest.json").write_text("{}")
    return folder


def test_checkpoints_and_metrics_bear_the_ledger_out(attested):
    assert audit(attested).discrepancies == []


def test_a_checkpoint_that_disagrees_about_what_is_outstanding_is_named(attested):
    checkpoint(attested, 3, ["f"])
    assert audit(attested).discrepancies == [
        "f: not outstanding, but the checkpoint of step 3 says so"
    ]
    # It is not complete: the one before it counts.
    (attested / "checkpoints" / "000003" / "manifest.json").unlink()
    assert audit(attested).discrepancies == []
    checkpoint(attested, 1, ["c"])
    assert audit(attested).discrepancies == [
        "d: outstanding, but the checkpoint of step 1 does not know it"
    ]


def test_a_checkpoint_of_another_step_or_without_a_state_is_named(attested):
    folder = checkpoint(attested, 3, [], of=2)
    assert audit(attested).discrepancies == [f"{folder}: its run.json is of step 2"]
    (folder / "run.json").write_text("{")
    (discrepancy,) = audit(attested).discrepancies
    assert discrepancy.startswith(f"{folder}: its run.json cannot be read: ")


def test_a_checkpoint_that_the_ledger_does_not_know_is_named(attested):
    folder = checkpoint(attested, 4, [])
    assert audit(attested).discrepancies == [
        f"{folder}: complete, but the ledger has no checkpoint of step 4"
    ]


def test_a_checkpoint_behind_the_one_that_was_resumed_is_void(tmp_path):
    lines = [*RESUMED[:8], ["checkpoint", 2], *RESUMED[8:]]
    run_dir = write(make(tmp_path / "run", 3), *lines)
    checkpoint(run_dir, 2, ["nonsense"])  # damaged, say: the run went back to step 1
    checkpoint(run_dir, 1, ["c", "d"])
    assert audit(run_dir).discrepancies == []


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ((1, 3), ["step 2 was trained, but metrics.jsonl has no row of it"]),
        ((1, 2), ["step 3 was trained, but metrics.jsonl has no row of it"]),
        (
            (),
            [f"step {step} was trained, but metrics.jsonl has no row of it" for step in (1, 2, 3)],
        ),
        ((1, 2, 3, 4), ["metrics.jsonl has a row of step 4, the ledger ends with step 3"]),
        ((1, 1, 2, 3), ["metrics.jsonl has several rows of step 1: two runs wrote into it"]),
        (
            (1, 2, 1, 3, 2, 3),
            ["metrics.jsonl has several rows of 3 steps, 1 to 3: two runs wrote into it"],
        ),
        ((2, 1, 3), ["metrics.jsonl: the row of step 1 stands behind that of step 2"]),
    ],
)
def test_rows_and_steps_agree(attested, steps, says):
    rows(attested, *steps)
    assert audit(attested).discrepancies == says


def samples(run_dir: Path, name: str, *of: tuple[int, str]) -> None:
    lines = (json.dumps({"step": step, "id": id, "tokens": ["a"]}) + "\n" for step, id in of)
    (run_dir / name).write_text("".join(lines))


def test_samples_that_two_runs_recorded_are_named(attested):
    samples(attested, "samples.earlier.jsonl", (1, "a/0"), (1, "b/0"))
    samples(attested, "samples.jsonl", (2, "a/0"), (3, "f/1"))
    assert audit(attested).discrepancies == []
    samples(attested, "samples.jsonl", (2, "a/0"), (1, "b/0"), (3, "f/1"))
    assert audit(attested).discrepancies == ["samples.jsonl has a sample twice of step 1"]
    samples(attested, "samples.jsonl", (1, "a/0"), (3, "f/1"), (3, "f/1"))
    assert audit(attested).discrepancies == ["samples.jsonl has a sample twice of 2 steps, 1 to 3"]
    (attested / "samples.jsonl").write_text('{"step": 1}\n{"step": 2, "id"')
    (discrepancy,) = audit(attested).discrepancies
    assert discrepancy.startswith(f"{attested}/samples.jsonl, line 1: not a row: ")


def test_a_kill_may_leave_the_last_step_without_its_row_and_torn_ends(tmp_path):
    run_dir = write(make(tmp_path / "run", 5), *WHOLE[:-1])
    rows(run_dir, 1, 2)
    for name in ("ledger.jsonl", "metrics.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write('["out",1')
    assert audit(run_dir).discrepancies == []
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("\n")
    (discrepancy,) = audit(run_dir).discrepancies
    assert discrepancy.startswith(f"{run_dir}/metrics.jsonl, line 3: not a row: ")


def test_what_is_no_record_is_refused_by_its_line(tmp_path):
    run_dir = write(make(tmp_path / "run"), *out("abc"))
    text = (run_dir / "ledger.jsonl").read_text()
    (run_dir / "ledger.jsonl").write_text(text.replace('"b"', "b"))
    with pytest.raises(LedgerError, match=r"ledger.jsonl, line 2: not a record"):
        audit(run_dir)


@pytest.mark.parametrize("gone", ["config.json", "ledger.jsonl"])
def test_what_is_no_run_is_named(tmp_path, gone):
    run_dir = write(make(tmp_path / "run"), *WHOLE)
    (run_dir / gone).unlink()
    with pytest.raises(RunMissing, match=f"^{run_dir}: no {gone} in it"):
        audit(run_dir)


def test_a_config_of_something_else_is_named(tmp_path):
    run_dir = write(make(tmp_path / "run"), *WHOLE)
    (run_dir / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(RunMissing, match=rf"^{run_dir}: its config.json is damaged: .*model_type"):
        audit(run_dir)


def test_memory_is_bounded_by_what_is_outstanding_and_a_few_bytes_a_prompt(tmp_path):
    steps = 4_000
    lines = (
        [*out((f"{step}.0@0", f"{step}.1@0")), ["trained", step, [f"{step}.0@0", f"{step}.1@0"]]]
        for step in range(1, steps + 1)
    )
    run_dir = write(
        make(tmp_path / "run", steps), *(line for step in lines for line in step), ["finished"]
    )
    tracemalloc.start()
    try:
        assert audit(run_dir).discrepancies == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 2 * steps  # bytes; a set of the ids would hold 120 for each


class Killed(Exception):
    """What kill -9 is to the run below."""


async def live(run_dir: Path, random: Random, steps: int, dies: float) -> None:
    """One life of a run with random drops, re-issues, hand-backs and checkpoints, which continues
    an earlier one from the newest checkpoint, or from the one before. It is killed with probability
    `dies` at every point."""

    def alive() -> None:
        if random.random() < dies:
            raise Killed

    def fill() -> None:
        nonlocal drawn
        while len(handed_out) < min(SLOTS, (steps - version) * PER_STEP):
            if not again:
                again.append(f"{drawn}@0")
                drawn += 1
            handed_out[again.pop(0)] = 0
            ledger.handed_out(list(handed_out)[-1])
            alive()

    def happens(id: str) -> None:
        kind = random.choice(["reissued", "returned", "dropped"])
        handed_out[id] += kind == "reissued"
        getattr(ledger, kind)(
            id, *([handed_out[id]] if kind == "reissued" else []), random.choice(["stale", "died"])
        )
        if kind == "dropped":
            del handed_out[id]

    path, complete = (
        run_dir / "ledger.jsonl",
        sorted((run_dir / "checkpoints").glob("*/manifest.json")),
    )
    if complete and random.random() < 0.3:
        shutil.rmtree(complete.pop().parent)  # damaged
    resumes, ledger = path.exists(), Ledger(path)
    version, drawn, again, handed_out = 0, 0, [], {}
    if complete:
        state = json.loads((complete[-1].parent / "run.json").read_text())
        version, drawn, again = state["version"], state["position"]["drawn"], state["outstanding"]
    if resumes:
        ledger.resumed(version, again)
    try:
        if resumes:
            alive()
            await ledger.sync()
            alive()
            rows(run_dir, *range(1, version + 1))  # those of later steps are void
        while version < steps:
            fill()
            for _ in range(random.randrange(3)):
                happens(random.choice(list(handed_out)))
                fill()
            version, ids = version + 1, random.sample(list(handed_out), PER_STEP)
            ledger.trained(version, ids)
            for id in ids:
                del handed_out[id]
            alive()
            await ledger.sync()
            alive()
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(f'{{"step": {version}}}\n')
            fill()
            if random.random() < 0.4:
                outstanding, position = ledger.checkpoint(version), drawn
                fill()
                await ledger.sync()
                alive()
                checkpoint(run_dir, version, outstanding, drawn=position)
        ledger.finished()
    except Killed:
        synced = path.stat().st_size
        ledger.close()
        # As much of the next batch as came through.
        os.truncate(path, random.randint(synced, path.stat().st_size))
        raise
    ledger.close()


def lives(run_dir: Path, seed: int, steps: int = 6) -> int:
    """A run by its seed from its start to its end through up to 6 kills, audited after each; how
    many there were."""
    random = Random(seed)
    make(run_dir, steps)
    for kills in range(7):
        try:
            asyncio.run(live(run_dir, random, steps, dies=0.07 if kills < 6 else 0))
            return kills
        except Killed:
            assert audit(run_dir).discrepancies == []
    raise AssertionError("unreachable")


@pytest.fixture
def no_fsync(monkeypatch):
    """A disk that is never waited for: a kill, unlike a power cut, loses nothing written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("seed", range(30))
def test_the_books_of_any_run_balance_and_do_not_without_any_one_line(tmp_path, no_fsync, seed):
    run_dir = tmp_path / "run"
    kills = lives(run_dir, seed)
    books = audit(run_dir)
    assert (books.discrepancies, books.finished, books.steps, books.trained) == ([], True, 6, 12)
    # A kill before anything was synced may leave nothing to resume.
    assert len(books.resumed_at) <= kills
    assert books.handed_out == 12 + sum(books.dropped.values())
    ledger = run_dir / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    for place in range(len(lines)):
        ledger.write_text("".join(lines[:place] + lines[place + 1 :]))
        books = audit(run_dir)
        if place < len(lines) - 1:
            assert books.discrepancies
        else:
            # Without its last line the ledger is that of a run which was killed before it: nothing
            # is lost by that.
            assert (books.discrepancies, books.finished) == ([], False)


@pytest.mark.parametrize("seed", range(10))
def test_a_hand_out_or_an_end_that_is_missing_is_seen_though_the_lines_are_numbered_anew(
    tmp_path, no_fsync, seed
):
    run_dir = make(tmp_path / "run", 6)
    asyncio.run(live(run_dir, Random(seed), 6, dies=0))
    lines = [
        [kind, *rest]
        for kind, _, *rest in map(json.loads, (run_dir / "ledger.jsonl").read_text().splitlines())
    ]
    for place, (kind, *_) in enumerate(lines):
        if kind in ("out", "trained", "dropped"):
            write(run_dir, *lines[:place], *lines[place + 1 :])
            assert audit(run_dir).discrepancies
    write(run_dir, *lines)
    assert audit(run_dir).discrepancies == []


def test_a_run_that_was_killed_at_once_has_empty_books(tmp_path):
    books = audit(write(make(tmp_path / "run")))
    assert (books.handed_out, books.steps, books.discrepancies) == (0, 0, [])


def recorded(run_dir: Path, **changes) -> None:
    """A response to a prompt of two tokens, of version 0 and then 1, that step 2 has trained."""
    line = {
        "step": 2,
        "id": "c@0#0",
        "prompt_tokens": 2,
        "tokens": ["a"] * 4,
        "version": [0, 0, 1, 1],
        "kept": 1,
        "kept_kv": True,
        "kv_lag": [0, 0, 0.75, 0.6],
    }
    (run_dir / "samples.jsonl").write_text(json.dumps(line | changes) + "\n")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"kept_kv": False, "kv_lag": 0}, ""),
        ({"version": 1, "kv_lag": 0}, ""),
        ({"prompt_tokens": None, "version": [3, 1]}, ""),  # of an earlier version of the program
        ({"kv_lag": [0, 0, 0.75, 0.75]}, "token 3: kv_lag = 0.75, by its versions 0.6"),
        ({"kv_lag": 0}, "token 2: kv_lag = 0, by its versions 0.75"),
        ({"kept_kv": False}, "token 2: kv_lag = 0.75, by its versions 0"),
        ({"version": [0, 0, 1, 2]}, "sampled by version 2, which came after it was trained"),
        ({"version": [0, 1, 0, 1]}, "its tokens are in another order than the weights that"),
        ({"version": [0, 1]}, "not a version and a lag for each token"),
        ({"version": [0, None, 1, 1]}, "not a version and a lag for each token"),
        ({"kv_lag": [0, None, 0.75, 0.6]}, "not a version and a lag for each token"),
    ],
)
def test_a_recorded_token_has_the_lag_of_its_versions(attested, changes, says):
    recorded(attested, **changes)
    discrepancies = audit(attested).discrepancies
    if says:
        assert len(discrepancies) == 1
        assert discrepancies[0].startswith(f"samples.jsonl: c@0#0 of step 2: {says}")
    else:
        assert discrepancies == []


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"lag_max": 1, "kv_lag_mean": 0.3}, []),
        ({"lag_max": 0, "kv_lag_mean": 0.3}, ["lag_max = 0, but a recorded token that was"]),
        ({"lag_max": 1, "kv_lag_mean": 0}, ["kv_lag_mean = 0, but a recorded token that was"]),
        ({"lag_max": 5, "kv_lag_mean": 0.3}, ["lag_max = 5, run.max_lag_steps = 4"]),
    ],
)
def test_a_row_has_the_lags_of_its_tokens_within_the_bound(tmp_path, row, says):
    run_dir = write(make(tmp_path / "run", 3), *WHOLE)
    config = json.loads((run_dir / "config.json").read_text())
    config["sync"]["kv"] = "keep"
    (run_dir / "config.json").write_text(json.dumps(config))
    recorded(run_dir)
    rows = [{"step": 1, "lag_max": 0}, {"step": 2} | row, {"step": 3}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = audit(run_dir).discrepancies
    assert len(found) == len(says)
    for discrepancy, start in zip(found, says, strict=True):
        assert discrepancy.startswith(f"metrics.jsonl: step 2: {start}")


def test_kv_that_is_computed_anew_has_no_lag(tmp_path):
    run_dir = write(make(tmp_path / "run", 3), *WHOLE)
    lines = [json.dumps({"step": step, "kv_lag_mean": 0.5 * (step == 2)}) for step in (1, 2, 3)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert audit(run_dir).discrepancies == [
        "metrics.jsonl: step 2: kv_lag_mean = 0.5, sync.kv = 'recompute'"
    ]
