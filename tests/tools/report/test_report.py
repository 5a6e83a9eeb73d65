"""What the page says, without a browser."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from async_opd.cli.main import main
from async_opd.core.errors import ConfigError, RunMissing
from async_opd.tools.report import figures, plot
from async_opd.tools.report.page import page
from async_opd.tools.report.read import read
from async_opd.tools.report.rollouts import rollouts
from tests.tools.report.conftest import rollout


def words(html: str) -> str:
    """Return the words of a page, without tags."""
    return re.sub(
        r"\s+", " ", re.sub(r"<[^>]+>", " ", html.split("<main", 1)[1].split("<script", 1)[0])
    )


def test_the_command_writes_one_file_beside_the_run_and_says_its_size(make_run, capsys):
    run = make_run()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html: 0.2 MB\n"
    html = (run / "report.html").read_text()
    assert html.startswith("<!doctype html>") and "25.0 % → 75.0 %" in html
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', html)) == {"data:,"}  # nothing is fetched


def test_a_folder_that_is_no_run_exits_with_two(make_run, tmp_path, capsys):
    make_run("demo")
    assert main(["report", str(tmp_path / "demo2")]) == 2
    message = capsys.readouterr().err
    assert "RunMissing: " in message and f"did you mean '{tmp_path}/demo'" in message
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "no metrics.jsonl in it" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics.jsonl").write_text("{]\n")
    with pytest.raises(RunMissing, match="holds no row with a step"):
        page([tmp_path / "empty"])


def test_a_page_that_cannot_be_written_is_refused(make_run, tmp_path, capsys):
    assert main(["report", str(make_run()), "-o", str(tmp_path)]) == 2
    assert (
        f"ConfigError: {tmp_path}: cannot be written: Is a directory\n" in capsys.readouterr().err
    )


def test_it_needs_neither_torch_nor_ray(make_run):
    code = (
        "import sys; from async_opd.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "report", make_run()],
        capture_output=True,
        text=True,
        check=True,
    )
    large = {"torch", "ray", "transformers", "vllm", "deepspeed"}
    assert large & set(result.stdout.split()) == set()


def test_damaged_lines_are_named_and_the_others_are_used(make_run):
    run = make_run(rollouts=[rollout(10, ["a"]), rollout(20, ["b"])])
    for file, torn in (
        ("metrics.jsonl", '{"step": 31, "kl'),
        ("events.jsonl", "[]\n"),
        ("samples.jsonl", '{"st\n'),
    ):
        with (run / file).open("a") as lines:
            lines.write(torn)
    text = words(page([run]))
    assert "metrics.jsonl: line 31 damaged: left out" in text
    assert "events.jsonl: line 2 damaged: left out" in text
    assert "samples.jsonl: line 3 damaged: left out" in text
    assert "step 10, ✓ right" in text and "step 20, ✓ right" in text


def test_what_a_run_lacks_is_left_out_with_a_word(make_run):
    run = make_run()
    for file in (
        "samples.jsonl",
        "summary.json",
        "environment.json",
        "events.jsonl",
        "ledger.jsonl",
    ):
        (run / file).unlink()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    older = [{"step": row["step"], "kl": row["kl"], "loss": float("nan")} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older))
    html = page([run])
    text = words(html)
    assert "samples.jsonl is not there: no rollouts to show" in text
    assert "summary.json is not there: the run has not ended" in text
    assert "environment.json is not there" in text
    assert re.search("run: its rows have no accuracy, entropy, length_mean, .*: left out", text)
    # by step alone: there is no time
    assert re.findall(r"<h3>([^<]*)</h3><p>", html) == ["KL to the teacher"]
    assert 'class="plot x-time"' not in html


def test_what_happens_in_every_run_hides_no_loss(make_run):
    run = make_run()
    routine = [
        {"step": 20, "who": "checkpoint", "what": "saved", "why": ""},
        {"step": 0, "who": "a", "what": "placed"},
    ]
    with (run / "events.jsonl").open("a") as lines:
        lines.writelines(json.dumps(event) + "\n" for event in routine * 40)
    text = words(page([run]))
    assert "generator 0 lost it died" in text
    assert "placed" not in text and "saved" not in text
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in routine))
    assert "a member was lost" not in words(page([run]))


def test_a_rollout_line_without_its_numbers_is_named(make_run):
    broken = rollout(20, ["a", "b"]) | {"student": [-0.5]}
    run = make_run(rollouts=[rollout(10, ["a"]), broken])
    text = words(page([run]))
    named = "samples.jsonl: a line without what it needs: left out"
    assert f"{named} (ValueError: student: not a number a token)" in text
    assert "step 10," in text and "step 20, ✓" not in text


def test_numbers_that_are_all_alike_are_those_of_every_token(make_run):
    whole = rollout(10, ["a", "b"])
    short = whole | {"student": -0.5, "behaviour": -0.5, "ratio": 1, "version": 9}
    run = read(make_run(rollouts=[whole, short | {"reference": None}, short]), "run", 3)
    first, unmeasured, last = rollouts(run)
    assert first == last and run.remarks == []
    assert unmeasured.numbers["log π reference"] == [None, None]


def test_what_has_rotated_is_read_with_what_came_later(make_run):
    run = make_run(rollouts=[rollout(20, ["b"])])
    (run / "samples.earlier.jsonl").write_text(json.dumps(rollout(10, ["a"])) + "\n")
    lost = {"time": 0.5, "step": 2, "who": "teacher 0", "what": "lost", "why": "earlier"}
    (run / "events.earlier.jsonl").write_text(json.dumps(lost) + "\n")
    text = words(page([run]))
    assert text.index("step 10, ✓ right") < text.index("step 20, ✓ right")
    assert text.index("teacher 0 lost earlier") < text.index("generator 0 lost it died")
    (run / "samples.jsonl").unlink()
    assert "step 10, ✓ right" in words(page([run]))


def test_a_verdict_is_shown_in_words_and_a_share_by_its_number(make_run):
    rewards = (1.0, 0.0, None, 0.375)
    run = make_run(rollouts=[rollout(i, ["a"], reward=x) for i, x in enumerate(rewards)])
    text = words(page([run]))
    for step, verdict in enumerate(("✓ right", "✗ wrong", "? unknown", "◐ reward 0.375")):
        assert f"step {step}, {verdict}" in text


def test_a_run_from_before_there_were_rewards_keeps_its_verdicts(make_run):
    lines = [rollout(i, ["a"], correct=x) for i, x in enumerate((True, False, None))]
    for line in lines:
        del line["reward"]
    run = read(make_run(rollouts=lines), "run", 3)
    shown = rollouts(run)
    assert [each.verdict for each in shown] == ["right", "wrong", "unknown"]
    assert not any("correct" in each.numbers for each in shown) and run.remarks == []


def test_what_the_teacher_read_is_shown_where_that_was_another(make_run):
    run = make_run(rollouts=[rollout(1, ["a"]), rollout(2, ["b"], teacher_prompt="sums: 1+2=")])
    text = words(page([run]))
    assert text.count("Its teacher reads: ") == 1 and "Its teacher reads: sums: 1+2=" in text


def test_seconds_go_on_over_a_restart(make_run):
    run = make_run()
    rows = [
        {"step": step, "elapsed_s": s} for step, s in enumerate([2.0, 4.0, 6.0, 1.0, 3.0, 0.5], 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(run, "run", 2).rows["seconds"].tolist() == [2, 4, 6, 7, 9, 9.5]


def test_tokens_in_all_are_those_of_every_start(make_run):
    run = make_run(steps=30)  # of 3,000 tokens each
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"steps": 10, "trained_tokens": 30_000}))
    assert "90k in all" in page([run])


def test_means_and_extremes_of_neighbours_leave_out_what_is_not_there():
    values = np.array([1.0, 3, np.nan, 5, np.nan, np.nan])
    np.testing.assert_array_equal(figures.averaged(values, 3), [2, 5, np.nan])
    low, high = figures.extremes(values, 3)
    np.testing.assert_array_equal(low, [1, 5, np.nan])
    np.testing.assert_array_equal(high, [3, 5, np.nan])


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 150, 5, [0, 50, 100, 150]),
        (0, 1, 4, [0, 0.25, 0.5, 0.75, 1]),
        (-0.3, 0.9, 4, [0, 0.5]),
        (0, 7, 5, [0, 2, 4, 6]),
    ],
)
def test_ticks_are_round(low, high, about, expected):
    assert plot.ticks(low, high, about) == pytest.approx(expected)


def test_evaluations_during_training_stand_at_the_version_they_belong_to(make_run):
    run = make_run()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[12] |= {"eval_accuracy": 0.5, "eval_version": 10}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy = figures.learning([read(run, "run", 2)])[0]
    (held_out,) = (series for series in accuracy.series if series.dots)
    assert (held_out.step.tolist(), held_out.mean.tolist()) == ([0, 10, 30], [0.25, 0.5, 0.75])


def test_lags_are_shares_of_the_trained_tokens_and_add_up(make_run):
    lag, *_ = figures.off_policy([read(make_run(), "run", 2)])
    assert [series.label for series in lag.series] == ["lag 0", "lag 1", "lag 2"]
    np.testing.assert_allclose(sum(series.mean for series in lag.series), 1)


def test_several_runs_are_compared_by_what_differs(make_run):
    first = make_run("slow", settings={"learner": {"lr": 0.001}})
    second = make_run("fast", settings={"learner": {"lr": 0.01}, "objective": {"tag": "dear"}})
    text = words(page([first, second]))
    differ = text.split("Settings that differ")[1].split("Horizontal axis")[0]
    assert "objective.tag opd dear" in differ and "learner.lr 0.001 0.01" in differ
    # the same but for the run's own directory
    assert "data.path" not in differ and "run.dir" not in differ
    with pytest.raises(ConfigError, match="9 runs: at most 8"):
        page([first] * 9)


def test_tokens_have_the_strength_of_their_advantage_weight_and_choice(make_run):
    line = rollout(
        10,
        list("abcd"),
        advantage=[1.0, -0.25, 0.0, -9.0],
        weight=[0.0, 1.0, 2.0, 2.0],
        selected=[1, 0, 1, 1],
    )
    (shown,) = rollouts(read(make_run(rollouts=[line]), "run", 2))
    assert [classes for classes, _ in shown.tokens] == [
        "a1 w0 in",
        "an1 w2 out",
        "a0 w4 in",
        "an4 w4 in",
    ]
    assert shown.signal == "advantage" and not shown.uniform


def test_agreement_of_teacher_and_verifier_is_shown_where_a_method_asks_for_it(make_run):
    line = rollout(
        10, list("abc"), selected=[1, 1, 1], agree=[1, 0, 0], disagree=[0, 1, 0], no_sign=[0, 0, 1]
    )
    (shown,) = rollouts(read(make_run(rollouts=[line]), "run", 2))
    assert [classes.split()[-1] for classes, _ in shown.tokens] == ["yes", "no", "neither"]


def test_a_divergence_is_coloured_by_teacher_minus_student(make_run):
    line = rollout(
        10, ["a", ""], teacher=[-0.1, -2.0], student=[-1.0, -0.5], weight=[1, 1], selected=[1, 1]
    )
    del line["advantage"]
    (shown,) = rollouts(read(make_run(rollouts=[line]), "run", 2))
    assert shown.signal == "teacher − student" and shown.uniform
    assert shown.numbers["teacher − student"] == [0.9, -1.5]
    assert [text for _, text in shown.tokens] == ["a", "◌"]  # the second is part of a character


def test_a_run_of_a_hundred_thousand_steps_gives_a_small_page_quickly(make_run):
    run = make_run(steps=1, rollouts=[rollout(step, ["word "] * 3000) for step in range(1, 41)])
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    head, tail = '{"step": 1, "elapsed_s": 2.0', line.removeprefix('{"step": 1, "elapsed_s": 2.0')
    assert head + tail == line
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(
            f'{{"step": {step}, "elapsed_s": {step / 2}{tail}\n' for step in range(1, 100_001)
        )
    began = time.process_time()
    html = page([run])
    assert time.process_time() - began < 10
    assert len(html.encode()) < 5e6
    assert "2500 more tokens are left out" in html
