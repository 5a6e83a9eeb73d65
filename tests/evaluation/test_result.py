"""Figures of hand-made problems, and results that are compared or refused."""

import msgspec
import numpy as np
import pytest

from async_opd.core.errors import ConfigError, RunMissing
from async_opd.core.wire import Ballot, GroupMeta, Prompt, Span, Verdict
from async_opd.evaluation.result import (
    Result,
    Settings,
    compare,
    digest,
    figures,
    lines_of,
    problem,
    table,
)

SETTINGS = dict(
    rows="ab12",
    problems=4,
    k=2,
    samples=2,
    temperature=1.0,
    top_p=1.0,
    max_new_tokens=64,
    chat_template=False,
    template_args={},
    check="math",
)


def prompt(id: str = "7@0", answer: str = "2") -> Prompt:
    return Prompt(id=id, ids=np.zeros(1, np.int32), answer=answer)


def responded(*outcomes: tuple[float | None, int | None], k: int, reads: bool = True):
    """The problem of responses of these rewards, None where unknown, with their votes."""
    verdicts = [
        (
            Verdict(
                id=f"{index}",
                reward=reward,
                cause="" if reward is not None else "timed out after 5.0 s",
            )
            if reward is None or not reads
            else Verdict(id=f"{index}", reward=reward, answer="" if vote is None else "\\boxed{1}")
        )
        for index, (reward, vote) in enumerate(outcomes)
    ]
    spans = tuple((Span(version=0, start=0, end=3 + index),) for index in range(len(outcomes)))
    meta = GroupMeta(
        id="7@0", prompt_len=1, spans=spans, truncated=(True,) + (False,) * (len(outcomes) - 1)
    )
    return problem(
        prompt(), meta, verdicts, [Ballot(text="so", vote=vote) for _, vote in outcomes], k
    )


def test_a_problem_has_its_share_in_each_figure():
    problem_shares = responded((1.0, 0), (0.0, 1), (0.0, 1), (0.0, None), k=2)
    # Of the 6 pairs 3 hold the right one; it wins against silence, and shares with either of the
    # other two.
    assert (problem_shares.avg, problem_shares.pass_, problem_shares.maj) == (
        0.25,
        0.5,
        pytest.approx((1 + 0.5 + 0.5) / 6),
    )
    assert [response.tokens for response in problem_shares.responses] == [3, 4, 5, 6]
    assert [response.truncated for response in problem_shares.responses] == [
        True,
        False,
        False,
        False,
    ]


def test_an_unknown_verdict_counts_as_wrong_and_votes_for_nothing():
    problem_shares = responded((1.0, 0), (None, None), (0.0, 2), k=2)
    # of three pairs two hold the right one; it wins against silence, and shares with the other
    assert (problem_shares.avg, problem_shares.pass_, problem_shares.maj) == (
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        pytest.approx((1 + 0.5) / 3),
    )
    assert problem_shares.responses[1].cause == "timed out after 5.0 s"


def test_one_right_and_99_unknown_are_one_percent():
    measured = responded((1.0, 0), *[(None, None)] * 99, k=1)
    assert (measured.avg, measured.pass_, measured.maj) == (0.01, pytest.approx(0.01), 0.01)


def test_a_share_counts_in_the_mean_and_is_right_in_no_other_figure():
    measured = responded((0.5, 0), (1.0, 1), (0.25, 0), (None, None), k=2)
    # of six pairs three hold the right one; it wins against silence, and shares with either of two
    assert (measured.avg, measured.pass_, measured.maj) == (
        0.4375,
        0.5,
        pytest.approx((1 + 0.5 + 0.5) / 6),
    )
    assert [response.reward for response in measured.responses] == [0.5, 1.0, 0.25, None]
    nothing = responded((0.9, None), (0.7, None), k=2, reads=False)
    assert (nothing.avg, nothing.pass_, nothing.maj) == (pytest.approx(0.8), 0.0, None)


def test_a_problem_of_which_nothing_is_known_counts_like_the_others():
    nothing = responded((None, None), (None, None), k=2)
    right = responded((1.0, 0), (1.0, 0), k=2)
    assert table([nothing, right]).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert set(figures(table([nothing]))) == {"avg", "pass"}  # does its check read answers?


def test_there_is_no_vote_where_the_check_reads_no_answers():
    problem_shares = responded((1.0, None), (0.0, None), k=2, reads=False)
    assert (problem_shares.avg, problem_shares.pass_, problem_shares.maj) == (0.5, 1.0, None)
    assert set(figures(table([problem_shares, problem_shares]))) == {"avg", "pass"}


def test_figures_are_means_over_the_problems_that_count():
    shares = np.array([[1.0, 1.0, np.nan], [0.0, 0.0, np.nan], [np.nan] * 3, [0.5, np.nan, np.nan]])
    measured = figures(shares)
    assert [(name, figure.mean, figure.problems) for name, figure in measured.items()] == [
        ("avg", 0.5, 3),
        ("pass", 0.5, 2),
    ]
    assert measured["avg"].low < 0.5 < measured["avg"].high


def saved(folder, shares: list[tuple[str, float]], model: str = "one", **changes):
    """A result of problems by id and share, the same in each figure."""
    folder.mkdir()
    settings = Settings(**SETTINGS | changes)
    values = np.array([[share] * 3 for _, share in shares])
    result = Result(
        model=model,
        path="rows.jsonl",
        settings=settings,
        thinking=None,
        seed=0,
        figures=figures(values),
        interval="",
        tokens=3.0,
        truncated=0.25,
        unknown=0.0,
        wall_s=1.0,
        environment={},
    )
    (folder / "result.json").write_bytes(msgspec.json.encode(result))
    lines = [
        dict(id=id, answer="2", avg=s, maj=s, responses=[{"text": "so"}]) | {"pass": s}
        for id, s in shares
    ]
    (folder / "problems.jsonl").write_bytes(
        b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    )
    return folder


BEFORE = [("1@0", 0.0), ("2@0", 0.5), ("3@0", 1.0), ("4@0", 0.0)]
# in the order in which they ended
AFTER = [("4@0", 0.25), ("3@0", 1.0), ("1@0", 0.25), ("2@0", 0.75)]


def test_two_results_are_compared_problem_by_problem(tmp_path):
    lines = compare(saved(tmp_path / "a", BEFORE), saved(tmp_path / "b", AFTER, model="two"))
    assert (
        lines[0].startswith("from one (")
        and " to two (" in lines[0]
        and lines[0].endswith("the same 4 problems")
    )
    # Each problem gains 25 points but the third, so no resample loses, and one of the third alone
    # gains nothing.
    assert lines[1].split() == [
        "avg@2",
        "37.5%",
        "->",
        "56.2%",
        "+18.8",
        "points",
        "(+6.2",
        "to",
        "+25.0)",
    ]
    assert [line.split()[0] for line in lines[1:4]] == ["avg@2", "pass@2", "maj@2"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": "cd34"}, "rows = 'ab12' and 'cd34'"),
        ({"temperature": 0.6, "k": 4}, "k = 2 and 4; temperature = 1.0 and 0.6"),
        (
            {"template_args": {"enable_thinking": True}},
            "template_args = {} and {'enable_thinking': True}",
        ),
    ],
)
def test_results_of_other_problems_or_settings_are_refused_by_name(tmp_path, changes, says):
    with pytest.raises(ConfigError) as refused:
        compare(saved(tmp_path / "a", BEFORE), saved(tmp_path / "b", AFTER, **changes))
    assert f"measured by other settings: {says}" in str(refused.value)


def test_what_holds_no_whole_result_is_refused(tmp_path):
    whole = saved(tmp_path / "a", BEFORE)
    with pytest.raises(
        RunMissing, match=r"/b: holds no result of `async-opd eval`: result.json: No such file"
    ):
        compare(whole, tmp_path / "b")
    cut = saved(tmp_path / "c", AFTER)
    (cut / "problems.jsonl").write_bytes((cut / "problems.jsonl").read_bytes()[:-70])
    with pytest.raises(RunMissing, match="/c: its result is damaged: "):
        compare(whole, cut)
    (cut / "problems.jsonl").write_bytes(
        b"\n".join((whole / "problems.jsonl").read_bytes().splitlines()[:3])
    )
    with pytest.raises(RunMissing, match="/c: its result is damaged: 3 problems of 4"):
        compare(whole, cut)


def test_the_digest_is_of_rows_and_answers_whatever_the_tokens():
    other_tokens = Prompt(id="7@0", ids=np.ones(5, np.int32), answer="2")
    assert digest([prompt()]) == digest([other_tokens]) != digest([prompt(answer="3")])


def test_a_result_says_how_it_was_measured(tmp_path):
    saved(tmp_path / "a", BEFORE)
    result = msgspec.json.decode((tmp_path / "a/result.json").read_bytes(), type=Result)
    first, avg, *_, last = lines_of(result)
    assert (
        first
        == "one on 4 problems of rows.jsonl: 2 response(s) each, temperature 1, top-p 1, at most 64"
        " tokens"
    )
    assert avg.startswith("  avg@2      37.5%  (")
    assert last.startswith("  mean length 3.0 tokens, 25.0% truncated, 0.0% unknown; ")
