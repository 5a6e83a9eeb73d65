"""A learner's rank and a generator without Ray: on one card together, or each on its own."""

import asyncio
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig

from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.wire import Group, LearnerShare, Needs, Prompt, Scores, Verdict
from async_opd.roles.learner.engine import LearnerRank
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.rollout.generator import RolloutGenerator
from tests.gpu.place import Place, visible
from tests.gpu.ranks import HOST, learner_rank, saved, started
from tests.gpu.student import PROMPT

ENGINE_SHARE = 0.4  # of the memory of a card that the learner has a part of


@dataclass
class Pair:
    """A learner and its generator, who have the same weights."""

    learner: LearnerRank
    generator: RolloutGenerator
    place: Place
    ranks: int  # of the generator
    vocabulary: int

    async def join(self) -> None:
        """Form the group that weights travel over."""
        (group,) = self.learner.open_group(HOST, 1, self.ranks)
        await asyncio.gather(
            self.learner.join_group(group.world),
            self.generator.join_group(group),
        )

    async def publish(self, version: int) -> float:
        """Give the generator the learner's weights, as that version, under whatever runs there;
        returns how many seconds it stood still."""
        began = time.perf_counter()
        await asyncio.gather(
            self.learner.send_weights(),
            self.generator.update(version, self.learner.weight_layout(), 0),
        )
        await self.generator.resume(0)
        return time.perf_counter() - began

    async def step(self, group: Group) -> None:
        """Train one step on what was sampled, towards any other distribution, so that the weights
        move."""
        scores = tuple(
            Scores(id=r.id, sampled_logp=np.linspace(-9, -1, len(r.ids), dtype=np.float32))
            for r in group.rollouts
        )
        verdicts = tuple(Verdict(id=r.id, reward=1.0) for r in group.rollouts)
        samples = tuple((0, i) for i in range(len(group.rollouts)))
        share = LearnerShare((samples,), (verdicts,))
        await asyncio.to_thread(self.learner.step, share, groups=(group,), scores=(scores,))

    def prompt(self, number: int) -> Prompt:
        """Draw the prompt of that number."""
        random = np.random.default_rng(number)
        ids = random.integers(self.vocabulary, size=PROMPT, dtype=np.int32)
        return Prompt(id=f"{number}", ids=ids, answer="")

    def stop(self) -> None:
        """End the engine and the learner's process group."""
        self.generator._engine.shutdown()
        torch.distributed.destroy_process_group()


def start(
    place: Place,
    *,
    backend: str,
    tokens: int,
    concurrency: int,
    ranks: int = 1,
    engine: dict | None = None,
    known: int | None = None,
    needs: Needs | None = None,
    **settings,
) -> Pair:
    """Start both on the same random weights, or those of `place.model`: over nccl the generator on
    cards of its own, behind the learner's; over gloo from the learner's card on. Responses have
    `tokens` tokens, of ids below `known`; `engine` is a table of vLLM's arguments, and `settings`
    are the generator's."""
    model = place.model or saved(place.folder / "student", place.small, place.device)
    lr = 1e-3 if place.tiny else 1e-4  # at which a few steps move what is sampled
    vocabulary = known or AutoConfig.from_pretrained(model).get_text_config().vocab_size
    learner = learner_rank(
        place,
        model,
        backend,
        vocabulary=((0, vocabulary),),
        lr=lr,
        micro_batch_tokens=PROMPT + 2 * tokens,
    )
    started(learner, learner.listen(HOST))
    os.environ.pop("LOCAL_RANK", None)  # the learner's
    if place.device == "cuda":  # read by the engine's process, which is a new one
        cards = visible(1 if backend == "nccl" else 0, ranks)
        os.environ |= {"CUDA_VISIBLE_DEVICES": cards, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    generator = RolloutGenerator(
        GeneratorSettings(
            name="generator 0",
            model=model,
            eos_ids=(),  # every response has full length
            max_prompt_tokens=PROMPT + tokens,
            vocabulary=((0, vocabulary),),
            backend=backend,
            seed=0,
            **settings,
        ),
        RolloutConfig(
            max_new_tokens=tokens,
            concurrency=concurrency,
            dtype="bfloat16",
            tensor_parallel_size=ranks,
            enforce_eager=place.device == "cpu",
            engine=engine or {},
            gpu_memory_utilization=0.85 if backend == "nccl" else ENGINE_SHARE,
        ),
        needs or Needs(),
    )
    return Pair(learner, generator, place, ranks, vocabulary)
