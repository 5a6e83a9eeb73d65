"""Prompts that are not handed out again, over simulated roles whose verdicts are written down."""

import json
import shutil
import sys
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from async_opd.config.load import load
from async_opd.core.errors import DataError
from async_opd.core.roles import Roles
from async_opd.core.wire import Prompt, Verdict
from async_opd.driver.checkpoints import find
from async_opd.driver.filter import Filter
from async_opd.driver.ledger import Dropped, records
from async_opd.driver.read_ahead import ReadAhead
from async_opd.driver.train import train
from async_opd.roles.rollout.config import FilterConfig, SourceConfig
from async_opd.telemetry.metrics import Jsonl, Meter
from async_opd.tools.audit.books import audit
from tests.simulated.roles import (
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.runs import books
from tests.simulated.virtual_time import virtual

# Of six rows, what each epoch's try comes to: right, wrong or unknown; the last letter goes on.
SCRIPT = ("r", "w", "rwrwrwrwrw", "?", "rww", "?rr")
SETTINGS = (
    "learner.trajectories_per_step=2",
    "learner.warmup_steps=0",
    "rollout.samples_per_prompt=1",
    "run.checkpoint_every_steps=1",
    "run.keep_checkpoints=99",
    "run.max_failed_share=0",
)


class Rows:
    """So many rows in file order, epoch after epoch, which can be gone on with."""

    def __init__(self, count=6, source=""):
        self._count, self._source = count, source
        self.position = {"epoch": 0, "drawn": 0}

    def __iter__(self):
        while True:
            row = self.position["drawn"] % self._count
            epoch, drawn = self.position["drawn"] // self._count, self.position["drawn"] + 1
            self.position = {"epoch": epoch, "drawn": drawn}
            yield self._prompt(row, epoch)

    def _prompt(self, row, epoch):
        return Prompt(
            id=f"{self._source}{row}@{epoch}", ids=np.zeros(1, np.int32), answer="", row=row
        )

    def continued(self, position, outstanding):
        self.position = dict(position)
        pairs = (id.removeprefix(self._source).split("@") for id in outstanding)
        return chain([self._prompt(int(row), int(epoch)) for row, epoch in pairs], self)


class Scripted(SimulatedVerifier):
    def __init__(self, script):
        super().__init__()
        self._script = script

    async def check(self, group):
        await super().check(group)
        script, epoch = self._script[group.row], int(group.id.rpartition("@")[2])
        reward = {"r": 1.0, "w": 0.0, "?": None}[script[min(epoch, len(script) - 1)]]
        return (Verdict(id=f"{group.id}#0", reward=reward),)


def run(run_dir, *settings, script=SCRIPT, steps=9, lag=0, checkpoint=None, sources=(), **filter):
    """(summary, ids trained, rows) of a run that drops what `filter` says, as `launch.run` leaves
    it; it need not end well."""
    overrides = [*SETTINGS, f"run.steps={steps}", f"run.max_lag_steps={lag}", f"run.dir={run_dir}"]
    config = load("configs/demo.toml", [*overrides, *settings])
    filtered = FilterConfig(**filter) if filter else None
    data = replace(config.data, filter=filtered)
    if sources:
        data = replace(data, path="", sources={name: SourceConfig(path=name) for name in sources})
    config = replace(config, data=data)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.json").write_bytes(msgspec.json.encode(config))
    learner, rows = RecordingLearner(), []
    roles = Roles(
        generators=[SimulatedGenerator()],
        teachers={"": [SimulatedTeacher()]},
        verifier=Scripted(script),
        learner=learner,
    )
    meter = Meter([Jsonl(run_dir / "metrics.jsonl"), rows.append])
    source = Rows(len(script), f"{sources[0]}:" if sources else "")
    try:
        summary = virtual(train(config, roles, source, [], run_dir, meter, checkpoint=checkpoint))
    finally:
        meter.flush()
        run.trained = learner.trained
    return summary, learner.trained, rows


def dropped(run_dir) -> list[tuple[str, str]]:
    """Ids and causes, in the order of the books."""
    lines = (record for _, record in records(run_dir / "ledger.jsonl"))
    return [(each.id, each.cause) for each in lines if isinstance(each, Dropped)]


TWO_EPOCHS = [f"{row}@{epoch}" for epoch in (0, 1) for row in range(6)]


def test_what_the_last_tries_agree_on_is_not_handed_out_again_and_is_in_the_books(tmp_path):
    summary, trained, rows = run(tmp_path, tries=2)
    # 0: right twice; 1: wrong twice; 2: by turns; 3: unknown; 4: right, then wrong twice;
    # 5: unknown, right twice
    assert trained == [*TWO_EPOCHS, "2@2", "3@2", "4@2", "5@2", "2@3", "3@3"]
    right, wrong = "always right", "always wrong"
    assert dropped(tmp_path) == [("0@2", right), ("1@2", wrong), ("0@3", right), ("1@3", wrong)]
    assert (summary["prompts_always_right"], summary["prompts_always_wrong"]) == (2, 2)
    assert summary["scored_dropped"] == 0
    assert [row["prompts_always_right"] for row in rows] == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    of = audit(tmp_path)
    assert (of.discrepancies, of.finished, of.handed_out, of.trained) == ([], True, 22, 18)
    assert of.dropped == {right: 2, wrong: 2}


@pytest.mark.parametrize(
    ("drop", "third_epoch", "fourth"),
    [
        ("always_right", ["1@2", "2@2", "3@2", "4@2", "5@2"], ["1@3", "2@3", "3@3", "4@3", "1@4"]),
        ("always_wrong", ["0@2", "2@2", "3@2", "4@2", "5@2"], ["0@3", "2@3", "3@3", "5@3", "0@4"]),
    ],
)
def test_which_of_the_two_is_dropped_is_a_setting(tmp_path, drop, third_epoch, fourth):
    _, trained, _ = run(tmp_path, tries=2, drop=drop, steps=11)
    assert trained == [*TWO_EPOCHS, *third_epoch, *fourth]


def test_without_a_filter_every_prompt_comes_in_every_epoch(tmp_path):
    summary, trained, _ = run(tmp_path)
    assert trained == [*TWO_EPOCHS, *(f"{row}@2" for row in range(6))]
    assert "prompts_always_right" not in summary and dropped(tmp_path) == []
    assert "filter" not in find(tmp_path).state.counters


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """By the lag, a run directory, its summary and what it trained."""
    runs = {}
    for lag in (0, 1, 3):
        folder = tmp_path_factory.mktemp("unbroken") / f"{lag}"
        runs[lag] = folder, *run(folder, tries=2, lag=lag, steps=12)[:2]
    return runs


@pytest.mark.parametrize(("lag", "at"), [(0, 3), (0, 7), (0, 10), (1, 7), (1, 8), (3, 6), (3, 8)])
def test_a_resume_drops_what_the_run_would_have_dropped_without_one(tmp_path, unbroken, lag, at):
    folder, whole, trained = unbroken[lag]
    assert whole["prompts_always_right"] and whole["prompts_always_wrong"]
    shutil.copytree(folder, tmp_path / "cut", symlinks=True)
    checkpoint = find(tmp_path / "cut" / "checkpoints" / f"{at:06d}")
    checkpoint = checkpoint._replace(  # as it is read from the disk of another process
        state=msgspec.json.decode(
            msgspec.json.encode(checkpoint.state), type=type(checkpoint.state)
        )
    )
    again, rest, _ = run(tmp_path / "cut", tries=2, lag=lag, steps=12, checkpoint=checkpoint)
    assert rest == trained[2 * at :]
    for key in ("prompts_always_right", "prompts_always_wrong"):
        assert again[key] == whole[key]
    of = audit(tmp_path / "cut")
    assert of.discrepancies == [] and of.dropped == audit(folder).dropped


def test_an_epoch_of_which_nothing_is_left_ends_the_run_behind_what_is_trained(tmp_path):
    with pytest.raises(
        DataError, match=r"^data.filter: no prompt is left: the last 1 tries at each of an epoch"
    ):
        run(tmp_path, script=("r", "w", "r", "w"), steps=9, tries=1)
    assert run.trained == ["0@0", "1@0", "2@0", "3@0"]
    of = audit(tmp_path)
    assert (of.discrepancies, of.trained, of.outstanding) == ([], 4, [])
    assert find(tmp_path).state.version == 2


def test_where_all_is_dropped_a_wider_filter_goes_on(tmp_path):
    with pytest.raises(DataError):
        run(tmp_path, script=("r", "w", "r", "w"), steps=4, tries=1)
    summary, trained, _ = run(
        tmp_path, script=("r", "w", "r", "w"), steps=4, tries=3, checkpoint=find(tmp_path)
    )
    # all are dropped in two epochs, and once more in the third, before it is said
    assert trained == ["1@3", "2@3", "3@3", "0@4"]
    of = audit(tmp_path)
    assert of.discrepancies == [] and sum(of.dropped.values()) == 9
    assert summary["prompts_always_right"] + summary["prompts_always_wrong"] == 9


def test_a_filter_that_comes_with_a_resume_counts_from_there(tmp_path):
    run(tmp_path, steps=6)
    _, trained, _ = run(tmp_path, steps=15, tries=2, checkpoint=find(tmp_path))
    epochs = [f"{row}@{epoch}" for epoch in (2, 3) for row in range(6)]
    assert trained[:12] == epochs and trained[12] == "2@4"


def group(row, *rewards, from_teacher=False):
    verdicts = [Verdict(id=f"{row}@0#{n}", reward=each) for n, each in enumerate(rewards)]
    return SimpleNamespace(
        prompt=SimpleNamespace(row=row), student_verdicts=() if from_teacher else verdicts
    )


def cause(*tries, tries_asked=3, drop="both") -> str:
    """What becomes of a prompt whose groups came out as `tries` say."""
    filter = Filter(FilterConfig(tries=tries_asked, drop=drop), books())
    for each in tries:
        filter.trained([group(7, *each)])
    return filter.cause(Rows()._prompt(7, 1))


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ([(1, 1, 1)], "always right"),
        ([(1, 1)], ""),
        ([(1,), (1,), (1,)], "always right"),
        ([(0, 1, 1, 1)], "always right"),
        ([(1, 1, 1, 0)], ""),
        ([(1, 1, 1, 0), (0, 0)], "always wrong"),
        ([(1, None, 1), (None,), (1,)], "always right"),
        ([(None,) * 9], ""),
        ([(0,) * 300], "always wrong"),
        ([(1,) * 300, (0,)], ""),
        ([(0, 0, 0.2)], ""),
        ([(1, 1, 0.5)], ""),
        ([(0.5, 1, 1, 1)], "always right"),
        ([], ""),
    ],
)
def test_the_last_known_verdicts_decide(tries, expected):
    assert cause(*tries) == expected


def test_what_the_teacher_answered_is_no_try_of_the_student_s():
    filter = Filter(FilterConfig(tries=1), books())
    filter.trained([group(2, 1, from_teacher=True)])
    assert filter.cause(Rows()._prompt(2, 1)) == ""


@pytest.mark.parametrize("tries", [1, 127])
def test_every_number_of_tries_there_may_be_can_be_reached(tries):
    assert cause((1,) * tries, tries_asked=tries) == "always right"
    assert cause((0,) * tries, tries_asked=tries) == "always wrong"
    assert cause((1,) * (tries - 1), tries_asked=tries) == ""
    assert cause((0,) * 127, tries_asked=tries, drop="always_right") == ""


def test_a_million_rows_are_a_byte_each():
    filter = Filter(FilterConfig(tries=2), books())
    filter.trained([group(row, row % 3 == 0) for row in range(0, 10**6, 7)])
    filter.trained([group(10**6 - 1, True, True)])
    assert sys.getsizeof(filter._streaks) < 1.2e6
    state = json.loads(json.dumps(filter.state))
    assert len(json.dumps(state)) < 1.4e6
    again = Filter(FilterConfig(tries=1), books())
    again.restore(state)
    assert [again.cause(Rows()._prompt(row, 1)) for row in (10**6 - 1, 0, 7, 8)] == [
        "always right",
        "always right",
        "always wrong",
        "",
    ]


async def test_what_is_read_ahead_is_dropped_by_what_was_trained_when_its_turn_came():
    ledger = books()
    filter = Filter(FilterConfig(tries=1), ledger)
    ahead = ReadAhead(Rows(3), 8, 10.0, filter)
    assert [prompt.id for prompt in await ahead.next_few(6)] == [
        f"{row}@{epoch}" for epoch in (0, 1) for row in range(3)
    ]
    assert [next(ahead).id for _ in range(3)] == ["0@0", "1@0", "2@0"]
    filter.trained([group(0, True), group(1, False)])
    await ahead.read(1)
    assert filter.counts == {"prompts_always_right": 0, "prompts_always_wrong": 0}  # nor in books
    assert ahead.position == {"epoch": 0, "drawn": 3}
    assert next(ahead).id == "2@1" and ahead.position == {"epoch": 1, "drawn": 6}
    assert filter.counts == {"prompts_always_right": 1, "prompts_always_wrong": 1}
    assert ledger.outstanding == {}  # what is handed out is written by admission


async def test_what_is_outstanding_at_a_resume_is_handed_out_whatever_the_filter_says():
    filter = Filter(FilterConfig(tries=1), books())
    filter.trained([group(row, True) for row in range(2)])
    ahead = ReadAhead(Rows(3), 8, 10.0, filter)
    rows = ahead.continued({"epoch": 0, "drawn": 3}, ["1@0", "0@0"])
    assert [next(rows).id for _ in range(4)] == ["1@0", "0@0", "2@1", "2@2"]


@pytest.mark.parametrize("lag", [0, 2])
def test_a_row_says_what_each_source_has_given(tmp_path, lag):
    _, _, rows = run(tmp_path, sources=("easy", "hard"), steps=3, lag=lag)
    shares = [(row["share_easy"], row["share_hard"]) for row in rows]
    assert shares == [(1, 0)] * 3  # of this source, which is one of two
    assert [row["accuracy_easy"] for row in rows] == [0.5, 0.5, 0.5]
    assert {row["accuracy_hard"] for row in rows} == {None}
    assert Counter(id[:5] for id in run.trained) == {"easy:": 6}
