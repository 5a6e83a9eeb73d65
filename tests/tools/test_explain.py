"""`async-opd explain` through its command line. Expected numbers are those published, or written
out by hand."""

import json
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import msgspec
import pytest
import torch

from async_opd.cli.main import main
from async_opd.config.load import load_objective
from async_opd.maths.logprobs import Read
from async_opd.objectives import all_objectives
from async_opd.roles.learner.batch import MicroBatch
from async_opd.roles.learner.step import StepContext, batch_statistics, token_batch
from async_opd.tools.explain.batch import BatchReader
from async_opd.tools.explain.effect import explain
from async_opd.tools.explain.rollouts import Rollouts, Trajectory

SIX = dict(
    student_logp=[-0.10, -1.20, -0.05, -2.30, -0.40, -0.02],
    behaviour_logp=[-0.10, -1.20, -0.05, -2.30, -0.40, -0.02],
    teacher_logp=[-0.15, -0.70, -3.05, -2.80, -0.40, -0.01],
    reference_logp=[-0.12, -1.10, -0.30, -2.10, -0.50, -0.02],
    teacher_entropy=[0.05, 2.0, 1.5, 0.1, 3.0, 2.8],
    length_cap=10,
)
# ±1 in SG-OPD, ±0.5 in EGRSD
PAIR = [SIX | {"prompt": "p", "reward": 1}, SIX | {"prompt": "p", "reward": 0}]
DRIFTED = dict(  # by 0.02, -0.04, 0.30, 0.10, -0.50, -0.30
    student_logp=[-1.0] * 6,
    behaviour_logp=[-1.02, -0.96, -1.3, -1.1, -0.5, -0.7],
    teacher_logp=[-1.0] * 6,
)
AGED = SIX | dict(behaviour_logp=[-0.15, -1.00, -0.05, -2.50, -0.30, -0.05], lag=[2, 2, 2, 1, 1, 1])
DECISIONS = dict(
    student_logp=[-5.0] * 10,
    behaviour_logp=[-5.0] * 10,
    teacher_logp=[gap - 5 for gap in (0.5, 3, 0.2, 0.1, 1, 2, 4, 0.3, 0.05, 2.5)],
    student_entropy=[2.0, 0.1, 1.8, 0.05, 0.2, 0.1, 0.3, 0.15, 0.02, 0.4],
    hidden=[
        [1, 0],
        [0.9, 0.1],
        [0, 1],
        [0.1, 0.9],
        [1, 0.2],
        [-1, 0],
        [0, -1],
        [0.7, 0.7],
        [0.95, 0.05],
        [0.2, 1],
    ],
)
GAP = [-0.05, 0.5, -3.0, -0.5, 0.0, 0.01]
PUBLISHED = {  # command, rollouts; trajectory, field, its numbers
    "OPD": ("opd", [SIX], 0, "advantage", GAP),
    "OPD, nothing stale": ("opd", [SIX], 0, "coefficient", GAP),
    "G-OPD": (
        "g_opd lambda=1.25",
        [SIX],
        0,
        "advantage",
        [-0.0575, 0.6, -3.6875, -0.675, 0.025, 0.0125],
    ),
    "IW-OPD, code": (
        "iw_opd",
        [SIX],
        0,
        "weight",
        [1.5, 1.493842, 1.432266, 1.062808, 1.001232, 1.001232],
    ),
    "IW-OPD, paper": (
        "iw_opd total=before_last",
        [SIX],
        0,
        "weight",
        [1.5, 1.493827, 1.432099, 1.061728, 1.0, 1.0],
    ),
    "f-OPD, weight": ("opd freshness.xi=0.05", [AGED], 0, "weight", [0.316177] * 6),
    "f-OPD, coefficient": (
        "opd freshness.xi=0.05",
        [AGED],
        0,
        "coefficient",
        [-0.018281, 0.134609, -0.948532, -0.200813, 0.002861, 0.002281],
    ),
    "PNPO": (
        "opd correction.tag=importance correction.ratio=prefix_normalised",
        [AGED],
        0,
        "ratio",
        [1.051271, 0.927743, 0.951229, 1.012578, 0.990050, 0.996672],
    ),
    "TOP-D": (
        "top_d",
        [SIX],
        0,
        "advantage",
        [-0.009802, 0.121991, -0.210774, -0.081963, 0, 0.002008],
    ),
    "SG-OPD, right": ("sg_opd", PAIR, 0, "advantage", [-0.05, 0.82, -3.0, -0.5, 0.0, 0.018]),
    "SG-OPD, wrong": ("sg_opd", PAIR, 1, "advantage", [-0.074, 0.5, -5.2, -1.06, 0.0, 0.01]),
    "SG-OPD, magnitude": ("sg_opd", PAIR, 0, "weight", [1.125, 1.125, 0.375, 1.125, 1.125, 1.125]),
    "EGRSD, certainty": ("egrsd", PAIR, 0, "certainty", [0.995, 0.8, 0.85, 0.99, 0.7, 0.72]),
    "EGRSD, right": ("egrsd", PAIR, 0, "direction", [0.951229, 1.2, 0.8, 0.8, 1.0, 1.01005]),
    "EGRSD, its step": (
        "egrsd length_bonus=0",
        PAIR,
        0,
        "coefficient",
        [0.473237, 0.48, 0.34, 0.396, 0.35, 0.363618],
    ),
    "EGRSD, wrong": ("egrsd", PAIR, 1, "direction", [1.051271, 0.8, 1.2, 1.2, 1.0, 0.99005]),
    "EGRSD, γ = 1": (
        "egrsd gamma=1",
        PAIR,
        0,
        "certainty",
        [0.983333, 0.333333, 0.5, 0.966667, 0.1, 0.1],
    ),
    "CL-EGRSD": (
        "cl_egrsd window=2 gamma=1",
        PAIR,
        0,
        "certainty",
        [0.983333, 0.966667, 0.966667, 0.966667, 0.1, 0.1],
    ),
    "drift gate": (
        "opd drift_gate.block=2",
        [DRIFTED],
        0,
        "weight",
        [1.198075, 1.198075, 0.990759, 0.990759, 0.811165, 0.811165],
    ),
    "DEAR": ("dear", [DECISIONS], 0, "selected", [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]),
}

SAMPLED = {"student_logp", "behaviour_logp", "teacher_logp"}
TAILED = {"candidates", "student_tail_logp", "teacher_tail_logp"}
NEEDED = {  # command: the fields without which it cannot be
    "opd": SAMPLED,
    "opd correction.tag=importance correction.ratio=none": {"student_logp", "teacher_logp"},
    "opd correction.tag=ppo": SAMPLED,
    "g_opd": SAMPLED | {"reference_logp"},
    "g_opd lambda=1": SAMPLED,
    "iw_opd": SAMPLED,
    "dear": SAMPLED | {"student_entropy", "hidden"},
    "sg_opd": SAMPLED | {"reference_logp", "prompt", "reward"},
    "sg_opd lambda_high=1": SAMPLED | {"prompt", "reward"},
    "egrsd": SAMPLED | {"teacher_entropy", "reward", "length_cap"},
    "egrsd length_bonus=0": SAMPLED | {"teacher_entropy", "reward"},
    "egrsd gamma=0": SAMPLED | {"reward", "length_cap"},
    "cl_egrsd": SAMPLED | {"teacher_entropy", "reward", "length_cap"},
    "mc_opd m=4": SAMPLED | {"candidates"},
    "mc_opd m=1": SAMPLED,
    "topk_kl k=3 divergence=forward signal_at_most=0.5": TAILED,
    "eopd k=3 signal_at_most=0.5 weight_at_most=1.5": SAMPLED | {"candidates", "teacher_entropy"},
    "topk_kl k=3": TAILED,
    "topk_kl k=3 rest=renormalise": {"candidates"},
    "topk_kl k=3 prefix.at_most=2": TAILED | {"student_logp", "behaviour_logp"},
    "topk_kl k=3 drift_gate.block=2": TAILED | {"student_logp", "behaviour_logp"},
    "eopd k=3": SAMPLED | {"candidates", "teacher_entropy"},
    "eopd k=3 tau=0 rest=bucket": SAMPLED | TAILED,
    "topk_kl k=3 rest=sampled": SAMPLED | {"candidates", "tokens"},
    "topk_kl k=3 freshness.alpha=2": TAILED | {"student_logp", "behaviour_logp", "lag"},
    "opd freshness.lambda=0.2": SAMPLED | {"lag"},
    "opd correction.tag=importance correction.ratio=prefix": SAMPLED,
    "top_d": SAMPLED,
    "top_d normalise=true future=true": SAMPLED | {"prompt"},
    "renio": SAMPLED | {"lag"},
    "rg_opd k=3": TAILED | {"student_logp", "teacher_logp", "prompt", "reward"},
    "opsa": {"student_logp", "behaviour_logp", "student_entropy"},
    "opsa entropy=false": {"student_logp", "behaviour_logp"},
}
LENGTHS, PROMPTS, REWARDS = (4, 1, 6, 3), ("a", "a", "b", "a"), (1, 0, None, 1)


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Runs `explain` on rollouts; returns what it said, or fails unless the exit status is that
    expected."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, rollouts, *, status: int = 0, as_json: bool = True):
        text = rollouts if isinstance(rollouts, str) else json.dumps(rollouts)
        (tmp_path / "rollouts.json").write_text(text)
        argv = [
            "explain",
            "--objective",
            *command.split(),
            "rollouts.json",
            *(["--json"] if as_json else []),
        ]
        assert main(argv) == status
        out, err = capsys.readouterr()
        if status:
            assert out == "" and err.count("\n") == 1
            return err.removeprefix("async-opd: ").rstrip()
        return json.loads(out) if as_json else out

    return run


def everything() -> list[dict]:
    """Trajectories that have every field, one of a single token, one of an unknown verdict."""
    draw = random.Random(0)

    def logp():
        return draw.uniform(-3, -0.05)

    def trajectory(length, prompt, reward):
        per_token = {
            name: [logp() for _ in range(length)]
            for name in Trajectory.__struct_fields__
            if "logp" in name
        }
        per_token |= {
            f"{who}_entropy": [-logp() for _ in range(length)] for who in ("student", "teacher")
        }
        candidate = [f"{who}_logp" for who in ("student", "teacher", "behaviour")]
        return per_token | {
            "hidden": [[draw.gauss(0, 1) for _ in range(4)] for _ in range(length)],
            "candidates": [
                [{name: logp() - 1 for name in candidate} | {"token": f"t{i}"} for i in range(3)]
                for _ in range(length)
            ],
            "lag": [2] * (length // 2) + [1] * (length - length // 2),
            "tokens": [f"t{i}" for i in range(length)],
            "prompt": prompt,
            "reward": reward,
            "length_cap": 8,
        }

    return [trajectory(*each) for each in zip(LENGTHS, PROMPTS, REWARDS, strict=True)]


@pytest.mark.parametrize(
    ("command", "trajectories", "index", "field", "expected"), PUBLISHED.values(), ids=PUBLISHED
)
def test_the_published_numbers(command, trajectories, index, field, expected, say):
    found = say(command, {"step": 1, "trajectories": trajectories})["trajectories"][index][field]
    assert found == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("command", NEEDED)
def test_what_a_method_needs_and_lacks_is_named_and_what_it_does_not_need_changes_nothing(
    command, say
):
    whole = say(command, {"trajectories": everything()})
    for field in Trajectory.__struct_fields__:
        rollouts = {"trajectories": everything()}
        del rollouts["trajectories"][2][field]
        if field in NEEDED[command]:
            lacking = (
                f"rollouts.json: trajectories[2] has no {field}, which objective"
                f" {command.split()[0]} needs"
            )
            assert say(command, rollouts, status=2) == f"DataError: {lacking}"
        else:
            assert say(command, rollouts) == whole


def test_every_objective_is_among_them():
    assert {command.split()[0] for command in NEEDED} == set(all_objectives())


def test_samples_need_the_behaviour_policys_log_probs(say):
    rollouts = {"trajectories": everything()}
    del rollouts["trajectories"][3]["candidates"][1][2]["behaviour_logp"]
    lacking = "trajectories[3].candidates[1] has no behaviour_logp, which objective mc_opd needs"
    assert say("mc_opd m=4", rollouts, status=2) == f"DataError: rollouts.json: {lacking}"
    assert len(say("topk_kl k=3", rollouts)["trajectories"]) == 4


def test_moments_of_past_steps_are_needed_once_they_are_used(say):
    rollouts = {"step": 10, "trajectories": PAIR}
    assert say("egrsd length_bonus=0", rollouts)["trajectories"][1]["advantage"] == [-0.5] * 6
    said = say("egrsd", rollouts | {"step": 11}, status=2)
    assert (
        said
        == "DataError: rollouts.json has no running.reward at step 11, which objective egrsd needs"
    )
    past = {"reward": {"count": 4, "mean": 0.25, "squares": 1.0}}  # σ = 0.5
    found = say("egrsd length_bonus=0", rollouts | {"step": 11, "running": past})["trajectories"]
    assert found[0]["advantage"] == pytest.approx([1.5] * 6, abs=1e-5)
    assert found[1]["advantage"] == pytest.approx([-0.5] * 6, abs=1e-5)


def test_a_group_is_what_has_the_same_prompt_and_an_unknown_verdict_is_no_part_of_it(say):
    prompts, rewards = ["a", "b", "a", "a", "b", "a"], [1, 1, 0, None, 1, 1]
    trajectories = [SIX | {"prompt": p, "reward": r} for p, r in zip(prompts, rewards, strict=True)]
    found = say("sg_opd fallback=grpo lambda_high=1", {"trajectories": trajectories})[
        "trajectories"
    ]
    # fourth token: the teacher says less; where the verifier says more, the fallback shows its own
    # advantage a: 1, 0, 1 known: mean 2/3, σ = √2/3; b: all alike
    trusted = [each["advantage"][3] for each in found]
    assert trusted == pytest.approx([0.5**0.5, 0, -0.5, 0, 0, 0.5**0.5], abs=1e-5)


def test_a_reward_may_be_a_share(say):
    trajectories = [SIX | {"prompt": "p", "reward": reward} for reward in (0.3, 0.9)]
    found = say("egrsd length_bonus=0", {"trajectories": trajectories})["trajectories"]
    assert found[0]["advantage"] == pytest.approx([-0.2] * 6)
    assert found[1]["advantage"] == pytest.approx([0.4] * 6)


def test_a_clipped_token_is_not_moved(say):
    stale = dict(
        student_logp=[-1.0] * 4,
        behaviour_logp=[-2.0, -2.0, -0.5, -0.5],
        teacher_logp=[-0.5, -3, -0.5, -3],
    )
    found = say("opd correction.tag=ppo correction.clip=0.2", {"trajectories": [stale]})[
        "trajectories"
    ][0]
    e, low = 2.718282, 0.606531  # ρ above and below
    assert found["ratio"] == pytest.approx([1.2, e, low, 0.8], abs=1e-6)
    assert found["coefficient"] == pytest.approx([0, -2 * e, 0.5 * low, 0], abs=1e-6)
    unclipped = say("opd", {"trajectories": [stale]})["trajectories"][0]
    assert unclipped["coefficient"] == pytest.approx(
        [0.5 * e, -2 * e, 0.5 * low, -2 * low], abs=1e-6
    )


def test_candidates_have_coefficients_of_their_own(say):
    mc = say("mc_opd m=4", {"trajectories": everything()})["trajectories"]
    for given, found in zip(everything(), mc, strict=True):
        for t, row in enumerate(found["coefficient"]):
            all_ = [{name: given[name][t] for name in SAMPLED}, *given["candidates"][t]]
            gaps = [x["teacher_logp"] - x["student_logp"] for x in all_]
            rho = [2.718281828459045 ** (x["student_logp"] - x["behaviour_logp"]) for x in all_]
            assert found["advantage"][t] == pytest.approx(gaps) and found["ratio"][
                t
            ] == pytest.approx(rho)
            assert row == pytest.approx([r * a / 4 for r, a in zip(rho, gaps, strict=True)])
    dense = say("topk_kl k=3 divergence=forward rest=drop", {"trajectories": everything()})[
        "trajectories"
    ]
    eopd = say("eopd k=3 rest=drop alpha=0.5 tau=1.5", {"trajectories": everything()})[
        "trajectories"
    ]
    opd = say("opd correction.tag=ppo", {"trajectories": everything()})["trajectories"]
    for given, kl, both, sampled in zip(everything(), dense, eopd, opd, strict=True):
        teacher = [
            [2.718281828459045 ** c["teacher_logp"] for c in row] for row in given["candidates"]
        ]
        assert kl["advantage"] is None and both["coefficient"] == sampled["coefficient"]
        for t, row in enumerate(teacher):
            assert kl["coefficient"][t] == pytest.approx(row)  # -∂ Σ p_T (log p_T - log p)
            added = [0.5 * p * (given["teacher_entropy"][t] >= 1.5) for p in row]
            assert both["candidate_coefficient"][t] == pytest.approx(added)


def test_a_tail_has_a_coefficient_of_its_own(say):
    one = (
        {"student_logp": -0.51082579, "teacher_logp": -0.69314718},
        {"student_logp": -0.91629073, "teacher_logp": -0.7985077},
    )
    tails = {
        "student_tail_logp": [-16.11809565],
        "teacher_tail_logp": [-2.99573227],
    }  # .6 - 1e-7, .4, 1e-7; .5, .45, .05
    given = {"trajectories": [{"candidates": [one]} | tails]}
    (found,) = say("topk_kl k=2 divergence=forward", given)["trajectories"]
    assert found["coefficient"] == [pytest.approx([0.5, 0.45])]
    assert found["tail_coefficient"] == pytest.approx([0.05])
    *_, last = say("topk_kl k=2 divergence=forward", given, as_json=False).splitlines()
    assert " ".join(last.split()) == "· all others -16.1181 - -2.9957 - - - 0.0500"


@pytest.mark.parametrize(
    "command", [*NEEDED, "egrsd drift_gate.block=2 random.share=0.5 mean_over=selected"]
)
def test_it_is_what_the_learner_computes(command):
    tag, *settings = command.split()
    objective = load_objective(tag, settings)
    rollouts = msgspec.convert({"step": 7, "trajectories": everything()}, Rollouts)
    batch = BatchReader(objective, rollouts, "file").batch()
    given = {f.name: getattr(batch, f.name) for f in fields(MicroBatch) if hasattr(batch, f.name)}
    others = dict.fromkeys({f.name for f in fields(MicroBatch)} - set(given))
    kept = {"ids_L": torch.zeros(14), "keep_N": torch.ones(14, dtype=bool), "from_teacher": False}
    micro = MicroBatch(**(others | given | kept))
    read = Read(
        batch.student_logp_N,
        batch.student_entropy_N,
        batch.student_logp_NK,
        None,
        None,
        batch.student_tail_logp_N,
        batch.hidden_ND,
    )
    context = StepContext(step=7, running=batch.running, groups=batch.groups)
    statistics = batch_statistics(lambda *_: read, lambda *_: None, objective, [micro], context)
    seen = token_batch(micro, read, context, statistics)
    learned = objective.loss(seen)
    learned.loss_N.sum().backward()
    found = explain(objective, rollouts, "file")
    assert [x for each in found for x in each["weight"]] == learned.weight_N.tolist()
    assert [x for each in found for x in each["selected"]] == learned.selected_N.int().tolist()
    assert [x for each in found for x in each["coefficient"]] == (-_slope(batch, tag)).tolist()


def _slope(batch, tag):
    slope_N, slope_NK = batch.student_logp_N.grad, getattr(batch.student_logp_NK, "grad", None)
    if tag == "mc_opd":
        return slope_N[:, None] if slope_NK is None else torch.cat([slope_N[:, None], slope_NK], 1)
    return slope_NK if slope_N is None else slope_N


ONE = {"student_logp": [-1.0, -2.0], "behaviour_logp": [-1.0, -2.0], "teacher_logp": [-1.0, -2.0]}
MALFORMED = {  # the file; what the message says after its name
    "no JSON": ("{", " is not JSON: Expecting property name enclosed in double quotes"),
    "a list": ([ONE], ": Expected `object`, got `array`"),
    "no trajectories": ({"step": 1}, ": Object missing required field `trajectories`"),
    "none of them": (
        {"trajectories": []},
        ": Expected `array` of length >= 1 - at `$.trajectories`",
    ),
    "a misspelt field": (
        {"trajectories": [ONE, {"studnet_logp": [-1.0]}]},
        ": trajectories[1]: field = 'studnet_logp': must be ",
        "did you mean 'student_logp'?",
    ),
    "a misspelt field on top": (
        {"stpe": 1, "trajectories": [ONE]},
        ": top level: field = 'stpe'",
        "did you mean 'step'?",
    ),
    "a misspelt field of a candidate": (
        {
            "trajectories": [
                ONE | {"candidates": [[], [{"tok": 1, "student_logp": -1, "teacher_logp": -1}]]}
            ]
        },
        ": trajectories[0].candidates[1][0]: field = 'tok': must be ",
        "did you mean 'token'?",
    ),
    "a proximal policy, of which there is none": (
        {"trajectories": [ONE | {"proximal_logp": [-1, -2]}]},
        ": trajectories[0]: field = 'proximal_logp': must be ",
    ),
    "a misspelt context": (
        {
            "trajectories": [ONE],
            "running": {"reward": {"count": 1, "maen": 0, "mean": 0, "squares": 0}},
        },
        (
            ": running.reward: field = 'maen': must be 'count', 'mean' or 'squares'; did you mean"
            " 'mean'?"
        ),
    ),
    "a misspelt context of a task reward": (
        {
            "trajectories": [ONE],
            "running": {"task_reward": {"count": 1, "maen": 0, "mean": 0, "squares": 0}},
        },
        (
            ": running.task_reward: field = 'maen': must be 'count', 'mean' or 'squares'; did you"
            " mean 'mean'?"
        ),
    ),
    "step zero": ({"step": 0, "trajectories": [ONE]}, ": Expected `int` >= 1 - at `$.step`"),
    "a word for a number": (
        {"trajectories": [ONE | {"teacher_logp": [-1, "x"]}]},
        ": Expected `float`, got `str` - at `$.trajectories[0].teacher_logp[1]`",
    ),
    "another reward": (
        {"trajectories": [ONE | {"reward": 2}]},
        ": Expected `float` <= 1.0 - at `$.trajectories[0].reward`",
    ),
    "a likelihood": (
        {"trajectories": [ONE, ONE | {"teacher_logp": [-1, 0.5]}]},
        ": trajectories[1].teacher_logp[1] = 0.5: must be a finite log-prob <= 0",
    ),
    "no number": (
        {"trajectories": [ONE | {"student_logp": [float("nan"), -1]}]},
        ": trajectories[0].student_logp[0] = nan: must be a finite log-prob <= 0",
    ),
    "an endless one": (
        {"trajectories": [ONE | {"reference_logp": [-1, -float("inf")]}]},  # not even needed
        ": trajectories[0].reference_logp[1] = -inf: must be a finite log-prob <= 0",
    ),
    "negative entropy": (
        {"trajectories": [ONE | {"student_entropy": [1, -1]}]},
        ": trajectories[0].student_entropy[1] = -1.0: must be a finite entropy >= 0",
    ),
    "lengths": (
        {"trajectories": [ONE, ONE | {"tokens": ["a", "b", "c"]}]},
        (
            ": trajectories[1]: lengths differ: {'tokens': 3, 'student_logp': 2, 'behaviour_logp':"
            " 2, 'teacher_logp': 2}"
        ),
    ),
    "no token": (
        {"trajectories": [{"prompt": "a", "student_logp": []}]},
        ": trajectories[0]: holds no token",
    ),
    "over its cap": (
        {"trajectories": [ONE | {"length_cap": 1}]},
        ": trajectories[0].length_cap = 1: must be >= its 2 tokens",
    ),
    "ragged": (
        {"trajectories": [ONE | {"hidden": [[1], [1, 2]]}]},
        ": trajectories[0].hidden: rows of different lengths",
    ),
    "ragged over trajectories": (
        {"trajectories": [ONE | {"hidden": [[1], [1]]}, ONE | {"hidden": [[1, 2], [1, 2]]}]},
        ": hidden has rows of different lengths",
    ),
}


@pytest.mark.parametrize(
    ("rollouts", "fragments"), [(m[0], m[1:]) for m in MALFORMED.values()], ids=MALFORMED
)
def test_a_malformed_file_is_refused_with_the_place_and_what_is_allowed(rollouts, fragments, say):
    said = say("opd", rollouts, status=2)
    assert said.startswith(f"DataError: rollouts.json{fragments[0]}") and fragments[-1] in said


def test_other_candidates_than_the_objective_asks_for_are_refused(say):
    said = say("topk_kl k=4", {"trajectories": everything()}, status=2)
    assert (
        said
        == "DataError: rollouts.json: trajectories[0].candidates[0] has 3 candidates: must be 4 for"
        " objective topk_kl"
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("opd signal_at_most=0", "objective.signal_at_most = 0: must be a finite number > 0"),
        ("topk_kl k=3 signal_at_most=-1", "objective.signal_at_most = -1: must be a finite number"),
        ("egrsd weight_at_most=inf", "objective.weight_at_most = inf: must be a finite number > 0"),
        ("dera", "objective.tag = 'dera': must be 'cl_egrsd', 'dear', "),
        ("dear p=2", "objective.p = 2: must be a finite number > 0 and <= 1"),
        ("dear pp=0.2", "objective.pp = 0.2: no such setting; did you mean 'objective.p'?"),
        ("opd correction.tag=pp", "objective.correction.tag = 'pp': must be 'importance' or 'ppo'"),
        (
            "opd corection.tag=ppo",
            "objective.corection: no such section; did you mean 'objective.correction'?",
        ),
        (
            "opd correction.tag=importance correction.between=[2,1]",
            "objective.correction.between = [2.0, 1.0]: must be [least, most]",
        ),
        (
            "egrsd floor=0.5",
            "objective.floor = 0.5: has no effect with gamma = 0.3, which leaves at least 0.7",
        ),
        ("topk_kl", "objective.k: missing; must be an integer >= 1"),
        ("opd other.json", "explain: needs one file with rollouts, got other.json, rollouts.json"),
    ],
)
def test_a_mistake_in_the_settings_is_refused_as_in_a_config(command, says, say):
    assert say(command, {"trajectories": [ONE]}, status=2).startswith(f"ConfigError: {says}")


@pytest.mark.parametrize("argv", [["a=b.json"], ["lambda=2", "a=b.json"], ["a=b.json", "lambda=2"]])
def test_a_word_with_an_equals_sign_is_a_setting_unless_there_is_such_a_file(
    argv, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.json").write_text(json.dumps({"trajectories": [SIX]}))
    assert main(["explain", "--objective", "g_opd", *argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"]["lambda"] == (
        2 if "lambda=2" in argv else 1.25
    )


def test_a_file_that_is_not_there_is_named(say, capsys):
    say("opd", {"trajectories": [ONE]})
    assert main(["explain", "--objective", "opd", "rollout.json"]) == 2
    said = capsys.readouterr().err
    assert (
        said == "async-opd: DataError: rollout.json: no such file; did you mean 'rollouts.json'?\n"
    )
    assert main(["explain", "--objective", "dear", "p=0.3"]) == 2
    assert (
        capsys.readouterr().err
        == "async-opd: ConfigError: explain: needs one file with rollouts, got none\n"
    )


def test_the_settings_come_back_with_their_defaults(say):
    found = say(
        "opd correction.tag=ppo correction.clip=0.1 drift_gate.block=2", {"trajectories": [ONE]}
    )["objective"]
    assert (found["tag"], found["mean_over"], found["random"]) == ("opd", "tokens", None)
    assert found["correction"] == {"tag": "ppo", "clip": 0.1, "dual_clip": None}
    assert found["drift_gate"] == {"block": 2, "tau": 1.0}


def test_the_table_has_a_row_a_token_and_one_for_each_of_its_candidates(say):
    six = SIX | {"tokens": [" a", "\n", 7, "a long token of a text", "", "b"]}
    head, names, *rows = say("opd", {"trajectories": [six]}, as_json=False).splitlines()
    assert head == "trajectory 0: 6 tokens" and len(rows) == 6
    assert names.split() == [
        "place",
        "token",
        "student",
        "behaviour",
        "teacher",
        "reference",
        "advantage",
        "weight",
        "selected",
        "ratio",
        "coefficient",
    ]
    assert (
        " ".join(rows[1].split())
        == "1 \\n -1.2000 -1.2000 -0.7000 -1.1000 0.5000 1.0000 1 1.0000 0.5000"
    )
    assert rows[3].startswith("    3  a long token of…   -2.3000")
    whole = {"trajectories": everything()}
    for command in NEEDED:
        table = say(command, whole, as_json=False).splitlines()
        candidates = 3 * 14 if "candidates" in NEEDED[command] else 0
        tails = 14 if "student_tail_logp" in NEEDED[command] else 0
        legend = 2 * ("at_most=0.5" in command)
        assert len(table) == 2 * 4 + 3 + 14 + candidates + tails + legend
        assert max(map(len, table)) <= 120
    mc = say("mc_opd m=4", whole, as_json=False).splitlines()
    found = say("mc_opd m=4", whole)["trajectories"][0]["coefficient"][0]
    assert [float(line.split()[-1]) for line in mc[2:6]] == pytest.approx(found, abs=1e-4)


def test_what_a_bound_lowered_is_marked_and_told(say):
    stale = SIX | {"behaviour_logp": [-0.10, -1.20, -0.05, -2.30, -0.40, -3.02]}
    command = "opd signal_at_most=0.4 weight_at_most=2"
    *rows, empty, legend = say(command, {"trajectories": [stale]}, as_json=False).splitlines()[2:]
    cells = [row.split()[5:] for row in rows]
    assert cells[1] == ["0.4000*", "1.0000", "1", "1.0000", "0.4000"]
    assert cells[2] == ["-0.4000*", "1.0000", "1", "1.0000", "-0.4000"]
    assert cells[5] == ["0.0100", "0.0996*", "1", "20.0855", "0.0200"]  # e³ lowered to 2
    marked = [[i for i in range(6) if cells[i][place].endswith("*")] for place in (0, 1)]
    assert marked == [[1, 2, 3], [5]] and empty == ""
    assert legend == "* lowered: the signal by signal_at_most, weight · ratio by weight_at_most"
    found = say(command, {"trajectories": [stale]})["trajectories"][0]
    assert found["signal_bounded"] == [False, True, True, True, False, False]
    assert found["weight_bounded"] == [False] * 5 + [True]
    loose = say("opd signal_at_most=9 weight_at_most=99", {"trajectories": [SIX]}, as_json=False)
    assert loose == say("opd", {"trajectories": [SIX]}, as_json=False)


def test_the_table_of_a_divergence_is_marked_where_there_is_no_advantage(say):
    rows = say("topk_kl k=3 signal_at_most=0.01", {"trajectories": everything()}, as_json=False)
    assert " ".join(rows.splitlines()[2].split()).endswith("-* 1.0000 1 1.0000 -")
    assert max(map(len, rows.splitlines())) <= 120


def test_what_is_raised_is_green_and_what_is_lowered_is_red_on_a_terminal_only(say, monkeypatch):
    rollouts = {"trajectories": [SIX]}
    plain = say("opd", rollouts, as_json=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    rows = say("opd", rollouts, as_json=False).splitlines()[2:]
    painted = {gap: row[:5] for gap, row in zip(GAP, rows, strict=True)}
    assert painted == {
        gap: "\033[32m" if gap > 0 else "\033[31m" if gap < 0 else "    4" for gap in GAP
    }
    monkeypatch.setenv("NO_COLOR", "1")
    assert say("opd", rollouts, as_json=False) == plain and "\033" not in plain


def test_it_starts_without_ray_vllm_deepspeed_or_transformers(tmp_path):
    (tmp_path / "rollouts.json").write_text(json.dumps({"trajectories": [ONE]}))
    code = (
        "import sys, async_opd.cli.main as c; c.main(sys.argv[1:]); print(*sys.modules,"
        " file=sys.stderr)"
    )
    argv = ["explain", "--objective", "opd", "rollouts.json"]
    call = [sys.executable, "-c", code, *argv]
    found = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert {"ray", "vllm", "deepspeed", "transformers", "datasets"} & set(
        found.stderr.split()
    ) == set()
    assert found.stdout.startswith("trajectory 0: 2 tokens\n")


def test_the_example_shows_what_the_command_says(capsys):
    root = Path(__file__).parents[2]
    assert (
        main(["explain", "--objective", "sg_opd", str(root / "configs/explain_example.json")]) == 0
    )
    command = "async-opd explain --objective sg_opd configs/explain_example.json\n```\n\n```\n"
    assert command + capsys.readouterr().out + "```\n" in (root / "configs/README.md").read_text()
