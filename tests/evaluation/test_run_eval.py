"""The problems of one evaluation, over simulated roles."""

import json
from types import SimpleNamespace

import pytest

from async_opd.core.errors import CallFailed
from async_opd.core.wire import Ballot, Sampling
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.evaluation.run import _problems
from tests.simulated.roles import Prompts, SimulatedGenerator, SimulatedVerifier
from tests.simulated.virtual_time import virtual

CONFIG = SimpleNamespace(
    rollout=SimpleNamespace(concurrency=4),
    run=SimpleNamespace(max_failed_share=0.5),
    timeout=SimpleNamespace(step_s=60.0),
)
ASKED = SimpleNamespace(sampling=Sampling(), k=1)


class Refuses(SimulatedGenerator):
    def __init__(self, refused):
        super().__init__()
        self.refused = refused

    async def respond(self, prompt, sampling):
        if prompt.id in self.refused:
            raise CallFailed(f"ValueError: no {prompt.id}")
        return await super().respond(prompt, sampling)


class Verifier(SimulatedVerifier):
    async def ballots(self, group, *verdicts):
        return tuple(Ballot(text="text", vote=0) for _ in verdicts)


def evaluated(tmp_path, refused):
    pools = (
        ReplicaPool("generator", [Refuses(refused)]),
        ReplicaPool("verifier", [Verifier()]),
    )
    file = tmp_path / "problems.jsonl"
    problems = virtual(_problems(CONFIG, ASKED, *pools, list(Prompts(6)), file))
    return problems, [json.loads(line) for line in file.read_bytes().splitlines()]


def test_a_problem_that_nobody_responds_to_is_unknown_by_its_cause(tmp_path, capsys):
    problems, lines = evaluated(tmp_path, {"2", "4"})
    assert [problem.id for problem in problems] == [f"{id}" for id in range(6)]
    assert sorted(line["id"] for line in lines) == [f"{id}" for id in range(6)]
    for problem in problems:
        (response,) = problem.responses
        assert (response.reward is None) == (problem.id in {"2", "4"})
    assert "no 2" in problems[2].responses[0].cause
    assert "2 of 6 problems have no response" in "".join(capsys.readouterr())


def test_where_too_many_have_none_the_evaluation_ends_by_name(tmp_path):
    with pytest.raises(CallFailed, match="ValueError: no"):
        evaluated(tmp_path, {"1", "2", "3", "4"})
