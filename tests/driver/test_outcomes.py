from types import SimpleNamespace

import numpy as np
import pytest

from async_opd.core.errors import (
    ActorLost,
    CallFailed,
    Lethal,
    OverAge,
    TimedOut,
    TooManyDropped,
)
from async_opd.core.wire import Prompt, StepResult, Verdict
from async_opd.driver.outcomes import TEACHER, GroupFailed, Outcomes, blamed, verdicts
from async_opd.driver.respond import Accuracy
from tests.simulated.runs import books

PER_STEP = 4  # so that 8 groups are looked at
FAILURE = GroupFailed("teacher", "7@0#1: nan")


class Game:
    """Outcomes of numbered prompts, and the events of them."""

    def __init__(self, share: float = 0.5, slots: int = 100):
        self.events = []
        config = SimpleNamespace(
            groups_per_step=PER_STEP,
            run=SimpleNamespace(max_failed_share=share, max_lag_steps=3),
            rollout=SimpleNamespace(max_new_tokens=2),
        )
        self.outcomes = Outcomes(config, slots, books(), lambda *event: self.events.append(event))
        self.prompts = 0

    def play(self, outcomes: str, of: int | None = None) -> None:
        """Each letter is one group: of a prompt of its own, or all of prompt `of`."""
        for letter in outcomes:
            self.prompts += 1
            id = f"{self.prompts if of is None else of}"
            prompt = Prompt(id=id, ids=np.zeros(1, np.int32), answer="")
            match letter:
                case "f":
                    self.outcomes.failed(prompt, FAILURE)
                case "o":
                    failure = GroupFailed("teacher-generator", "no")
                    self.outcomes.failed(prompt, failure, by=TEACHER)
                case "a":
                    self.outcomes.scored(prompt, cut=False, by=TEACHER)
                case "w":
                    self.outcomes.refused()
                case "v":
                    self.outcomes.failed(prompt, GroupFailed("verifier", "late"))
                case "t":
                    self.outcomes.dropped(prompt, "truncated")
                case "s":
                    self.outcomes.dropped(prompt, "stale")
                case "x":  # the teacher's own answers have causes that are none of these
                    self.outcomes.dropped(prompt, "teacher_wrong")
                case _:
                    self.outcomes.scored(prompt, cut=letter == "c")


@pytest.mark.parametrize(
    ("share", "goes_on", "ends", "says"),
    [
        (0.5, "f.f.f.f.", "f" * 5, r"5 of the last 8 groups failed \(5 teacher\), above"),
        (0.5, "ffff", "f", "5 of the last 8 groups"),
        (0.5, "fvfv", "f", r"5 of the last 8 groups failed \(3 teacher, 2 verifier\)"),
        (0.5, "ffff........f...f...", "ffff", "5 of the last 8"),
        (0.0, "........", "f", "1 of the last 8 groups failed"),
    ],
)
def test_a_share_of_failed_groups_ends_the_run_by_cause_count_and_role(share, goes_on, ends, says):
    game = Game(share)
    game.play(goes_on)
    with pytest.raises(
        TooManyDropped, match=rf"{says}.*run\.max_failed_share = {share:g}; the last"
    ):
        game.play(ends)


def test_more_failed_groups_in_a_row_than_may_be_outstanding_end_the_run_at_any_share():
    game = Game(share=1.0, slots=12)
    game.play("f" * 12 + "." + "f" * 12)
    with pytest.raises(TooManyDropped, match=r"^13 groups in a row failed .13 teacher., more than"):
        game.play("f")


@pytest.mark.parametrize(
    ("goes_on", "ends", "says"),
    [
        ("o." * 6, "o", "7 groups in a row failed .7 teacher-generator."),
        ("o." * 5 + "oa" + "o." * 6, "o", "7 groups"),  # an answer that can be trained
        ("o." * 5 + "ow" + "o." * 6, "o", "7 groups"),  # or that came, and was wrong
        ("a" + "ff" * 3, "f", "7 groups in a row failed .7 teacher."),  # none of the student's
    ],
)
def test_the_student_s_groups_are_no_answers_of_the_teacher_s(goes_on, ends, says):
    game = Game(share=1.0, slots=6)
    game.play(goes_on)
    with pytest.raises(TooManyDropped, match=says):
        game.play(ends)


def test_a_prompt_that_is_issued_again_counts_once_for_the_share():
    game = Game()
    game.play("....")
    game.play("fffffff", of=1)
    game.play("ff", of=2)
    with pytest.raises(TooManyDropped, match="2 groups in a row failed"):
        Game(slots=1).play("ff", of=1)


def test_the_first_failure_in_each_role_is_an_event():
    game = Game()
    game.play("..f..f..v..f..v")
    assert [event[:2] for event in game.events] == [("failed", "teacher"), ("failed", "verifier")]
    assert "7@0#1: nan" in game.events[0][2]


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ("t" * 8, "8 truncated.: rollout.max_new_tokens = 2 cuts them$"),
        ("c" * 8, "8 truncated.: rollout.max_new_tokens = 2 cuts them$"),
        ("s" * 8, "8 stale.: older than run.max_lag_steps = 3 allows$"),
        ("tsts" * 2, "rollout.max_new_tokens = 2 cuts them, older than run.max_lag_steps"),
        ("ttttttff", "6 truncated, 2 teacher.: rollout.max_new_tokens = 2 cuts them$"),
    ],
)
def test_two_steps_worth_that_leave_nothing_to_train_end_the_run_and_name_the_setting(
    outcomes, says
):
    game = Game()
    game.play("." + outcomes[:-1])  # one that can be trained is enough
    with pytest.raises(TooManyDropped, match=rf"^of the last 8 groups none is left.*{says}"):
        game.play(outcomes[-1])


@pytest.mark.parametrize(
    ("letter", "name"), [("t", "truncated"), ("c", "truncated"), ("s", "stale")]
)
def test_truncated_and_stale_groups_above_the_share_are_an_event_and_no_more(letter, name):
    game = Game()
    game.play("...." + letter * 4)
    assert game.events == []
    game.play(letter + letter + "." * 8)
    assert [event[:2] for event in game.events] == [(name, "groups")]
    assert game.events[0][2].startswith("5 of the last 8; ")
    game.play(letter * 5)  # it had gone below
    assert len(game.events) == 2


def test_the_teachers_own_wrong_answers_are_no_failure():
    game = Game(share=0.0)
    game.play("x" * 20)
    assert game.events == []


def test_counts_are_gone_on_with():
    game = Game()
    game.outcomes.lost(Prompt(id="1", ids=np.zeros(1, np.int32), answer=""), 3, FAILURE)
    for tokens in (0, 5, 0):
        game.outcomes.trained([], StepResult(version=1, metrics={"tokens": tokens}))
    counts = {"rollouts_failed": 1, "steps_without_tokens": 2}
    assert game.outcomes.counts == counts
    again = Game().outcomes
    again.restore(counts)
    assert again.counts == counts
    again.restore({})
    assert again.counts == dict.fromkeys(counts, 0)


@pytest.mark.parametrize("error", [ActorLost("gone"), OverAge("old")])
def test_who_is_gone_and_what_is_too_old_is_nobody_s_failure(error):
    with pytest.raises(type(error)), blamed("teacher"):
        raise error


@pytest.mark.parametrize("error", [CallFailed("a\nb"), TimedOut("a"), Lethal("a")])
def test_other_errors_are_blamed_in_one_line(error):
    with pytest.raises(GroupFailed, match=r"^teacher: a$") as failure, blamed("teacher"):
        raise error
    assert failure.value.lethal == isinstance(error, Lethal)


def test_steps_in_a_row_without_a_token_end_the_run_whatever_left_them_out():
    game = Game()
    for tokens in (0, 7, 0):
        game.outcomes.trained([], StepResult(version=1, metrics={"tokens": tokens}))
    game.play("..")
    game.outcomes.trained([], StepResult(version=2, metrics={"tokens": 0}))
    with pytest.raises(
        TooManyDropped, match=r"the last 2 steps kept no token .* rollout.train_stop"
    ):
        game.play(".")


def test_references_that_a_check_cannot_read_are_told_once():
    game = Game()
    causes = ["", "check raised DataError: reference '' holds no answer", "timed out after 5.0 s"]
    for id in ("1" * 1000, "2"):
        game.outcomes.undecided.hear([Verdict(id=id, reward=None, cause=one) for one in causes])
    game.outcomes.undecided.hear([Verdict(id="3", reward=None, cause="check raised KeyError")])
    assert game.events == [
        ("not decided", "verifier", f"{'1' * 100}: {causes[1]}; further ones are counted"),
        ("not decided", "verifier", "3: check raised KeyError; further ones are counted"),
    ]


def test_an_accuracy_counts_unknown_as_wrong_and_says_how_much_is_known():
    rewards = [1.0, 0.0, None, None]
    group = SimpleNamespace(student_verdicts=[Verdict(id="", reward=one) for one in rewards])
    assert verdicts([group]) == {
        "accuracy": 0.25,
        "verdicts_unknown": 2,
        "verdicts_known": 0.5,
    }
    group = SimpleNamespace(student_verdicts=[Verdict(id="", reward=x) for x in (0.3, 0.7, None)])
    assert verdicts([group]) == {
        "accuracy": pytest.approx(1 / 3),
        "verdicts_unknown": 1,
        "verdicts_known": pytest.approx(2 / 3),
    }
    assert verdicts([]) == {"accuracy": None, "verdicts_unknown": 0, "verdicts_known": None}
    measured = Accuracy.of([Verdict(id="", reward=one) for one in [1.0, *[None] * 99]])
    assert (measured.share, measured.known) == (0.01, pytest.approx(0.01))
    measured = Accuracy.of([Verdict(id="", reward=one) for one in (0.25, 1.0, None, 0.0)])
    assert (measured.share, measured.known) == (0.3125, 0.75)
