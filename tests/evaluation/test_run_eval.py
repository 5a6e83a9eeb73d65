"""The problems of one evaluation, over simulated roles."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_opd.config.evaluation import load_eval, run_config
from async_opd.core.errors import CallFailed
from async_opd.core.wire import Ballot, Sampling
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.evaluation.run import _problems, _whole
from async_opd.toy.tokenizer import build_tokenizer
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
        assert (response.correct is None) == (problem.id in {"2", "4"})
    assert "no 2" in problems[2].responses[0].cause
    assert "2 of 6 problems have no response" in "".join(capsys.readouterr())


def test_where_too_many_have_none_the_evaluation_ends_by_name(tmp_path):
    with pytest.raises(CallFailed, match="ValueError: no"):
        evaluated(tmp_path, {"1", "2", "3", "4"})


def merged(tmp_path, tiny_lm, **settings):
    """An adapter beside a model, as peft alone saves it, and the model that is evaluated."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    vocabulary = dict(vocab_size=len(build_tokenizer()), eos_token_id=1, pad_token_id=0)
    tiny_lm(**vocabulary).to(torch.bfloat16).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = dict(init_lora_weights=False, task_type="CAUSAL_LM") | settings
    live = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules="all-linear", **settings))
    live.save_pretrained(adapter)
    asked = load_eval(str(adapter), ["data.path=toy:heldout"])
    config = virtual(_whole(run_config(asked), tmp_path / "out"))
    return live.eval(), config.student.model


@pytest.mark.parametrize("settings", [{}, dict(use_dora=True), dict(use_rslora=True, lora_alpha=3)])
def test_an_adapter_is_evaluated_merged_with_the_model_that_it_is_of(tmp_path, tiny_lm, settings):
    live, model = merged(tmp_path, tiny_lm, **settings)
    assert model == str(tmp_path / "out" / "model")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert whole.dtype == torch.float32  # nothing is rounded yet
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, live(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(model).get_vocab() == build_tokenizer().get_vocab()
