"""One learner rank in a process of its own: trains on the same random groups in every run and saves
what came of it.

Not a test: `test_engine.py` starts `main`.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from async_opd.core.errors import CheckpointError, Diverged
from async_opd.core.files import write_file
from async_opd.core.lora import LoraConfig
from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare, Rollout, Scores, Verdict
from async_opd.maths.packing import plan
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.engine import LearnerRank
from tests.roles.learner.centred import Centred, Remembering
from tests.roles.learner.trajectories import trajectory

LENGTHS = [9, 4, 7, 5, 3, 6]  # response tokens of each group's one sample


def group(i: int) -> tuple[Group, tuple[Scores, ...], tuple[Verdict, ...]]:
    one = trajectory(3, [(0, LENGTHS[i])], id=f"{i}@0#0", seed=i)
    return Group(prompt=one.prompt, rollouts=(one.rollout,)), (one.scores,), one.verdicts


def cut(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Groups all of whose responses are cut, so that no token of them is trained."""

    def truncated(rollout: Rollout) -> Rollout:
        return msgspec.structs.replace(rollout, truncated=True)

    return tuple(Group(each.prompt, tuple(map(truncated, each.rollouts))) for each in groups)


def weights(learner: LearnerRank) -> list[torch.Tensor]:
    """A copy of every weight, gathered from all ranks."""
    return [weight.clone() for weight in learner._weights.copied(keep=True).values()]


def fail(learner: LearnerRank, step: Callable[[], object]) -> dict:
    """Take a step that must not move the weights; says what became of it."""
    before = weights(learner)
    try:
        step()
        error = None
    except Diverged as raised:
        error = str(raised)
    unmoved = all(torch.equal(a, b) for a, b in zip(before, weights(learner), strict=True))
    return dict(error=error, unmoved=unmoved, version=learner.version)


def poison_gradient(module, args, out):
    """A forward hook: the gradient of the last hidden states is not a number."""
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * float("nan"))


def on_a_full_disk(learner: LearnerRank, folder: str) -> str:
    """What saving says where no file may grow beyond 4 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        learner.save_state(folder)
    except CheckpointError as e:
        return str(e)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rendezvous(learner: LearnerRank, rank: int, meeting: Path) -> str:
    """Where rank 0 listens, which it leaves in the file `meeting`."""
    if rank == 0:
        write_file(meeting, learner.listen("127.0.0.1").encode())
    while not meeting.exists():
        time.sleep(0.01)
    return meeting.read_text()


def gap(learner: LearnerRank, model: str, live: list[float]) -> float:
    """How far the log-probs of the live student are from those of the plain model with the weights
    that leave it."""
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    left = learner._weights.copied(keep=True)
    missing, unexpected = whole.load_state_dict(left, strict=False)
    assert not unexpected and {*missing} <= {"lm_head.weight"}  # where it is tied
    whole.tie_weights()
    with torch.no_grad():
        logits = whole(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:4]
    logp = torch.log_softmax(logits / 0.7, dim=-1)
    return max(abs(logp[0, 8].item() - live[0]), abs(logp[1, 9].item() - live[1]))


def masters(learner: LearnerRank) -> list[int]:
    """How many numbers this rank's optimizer keeps moments of."""
    optimizer = learner._engine.optimizer
    state = getattr(optimizer, "optimizer", optimizer).state.values()
    return [each["exp_avg"].numel() for each in state if "exp_avg" in each]


OBJECTIVES = dict(
    opd=Opd(correction=Importance(at_most=5.0)), centred=Centred(), remembering=Remembering()
)
SAVED = 3  # the step after which the state is saved


def main(
    rank: int,
    meeting: str,
    model: str,
    out: str,
    steps: int,
    settings: dict,
    objective: str,
    lopsided: bool,
    resume: str | None,
    lora: dict | None,
) -> None:
    config = LearnerConfig(trajectories_per_step=len(LENGTHS), **settings)
    learner = LearnerRank(
        rank,
        LearnerSettings(
            model=model,
            temperature=0.7,
            steps=steps,
            max_lag_steps=steps + 1,
            stale="mask",
            truncated="mask",
            max_new_tokens=64,
            seed=0,
            backend="gloo",
            bucket_bytes=4096,
            sync_s=60.0,
            timeout_s=60.0,
            record_every_steps=2,
            lora=lora and LoraConfig(**lora),
        ),
        config,
        OBJECTIVES[objective],
    )
    learner.start(rendezvous(learner, rank, Path(meeting)))
    # elements of weights this rank holds whole
    held = sum(p.numel() for p in learner._lm.parameters())
    began = [weight.detach().clone() for weight in learner._weights._parameters.values()]
    groups, scores, verdicts = zip(*map(group, range(len(LENGTHS))), strict=True)
    lengths, tokens = [3 + n for n in LENGTHS], config.micro_batch_tokens
    mine = plan(lengths, ranks=1 if lopsided else config.ranks, tokens=tokens, width=32)[
        0 if lopsided else rank
    ]
    if lopsided and rank:  # everything is rank 0's, and the others only join in
        mine = [[] for _ in mine]
    share = LearnerShare(tuple(tuple((i, 0) for i in micro) for micro in mine), verdicts)

    def logprobs() -> list[float]:
        return learner.logprobs(np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)).tolist()

    recorded, apart = [], []

    def step() -> dict[str, float]:
        done = learner.step(share, groups=groups, scores=scores)
        if lora and config.dtype == "float32":
            apart.append(gap(learner, model, logprobs()))
        recorded.extend([one.step, one.id, sorted(one.numbers)] for one in done.recorded)
        # gathered, as an update does between any two steps
        assert all(weight.isfinite().all() for weight in weights(learner))
        if learner.version == SAVED:
            torch.rand(1 + rank)  # so that each rank is somewhere else in its random numbers
            learner.save_state(f"{Path(out).with_suffix('')}.state")
        return done.metrics

    if resume:
        learner.load_state(resume)
    result = dict(held=held, micro_batches=len(mine), before=logprobs())
    result["metrics"] = [step() for _ in range(steps - learner.version)]
    result |= dict(
        recorded=recorded,
        random=torch.rand(3).tolist(),
        apart=apart,
        running=[value for moments in learner._running.values() for value in moments],
    )
    # only the last rank's is full, and the others end with it
    full = on_a_full_disk if rank == config.ranks - 1 else LearnerRank.save_state
    result["full"] = full(learner, f"{Path(out).with_suffix('')}.full")
    if config.dtype == "bfloat16":
        optimizer = learner._engine.optimizer
        sums = (
            optimizer.grad_partitions_flat_buffer
            if config.zero_stage == 3
            else optimizer.fp32_groups_gradients_flat[0]
        )
        result["accumulates"] = str(sums.dtype)
    nothing = {}

    def cut_step() -> None:
        nothing.update(learner.step(share, groups=cut(groups), scores=scores).metrics)

    result["nothing"] = fail(learner, cut_step) | nothing
    learner.save(f"{out}.model")
    if lora:
        parameters = learner._weights._parameters.values()
        result["base_stays"] = all(map(torch.equal, parameters, began))
        result["masters"] = sum(masters(learner))
        learner.save_whole(f"{out}.whole")
    result["logprobs"] = logprobs()
    # only the last rank goes wrong
    norm, last = learner._lm.base_model.norm, rank == config.ranks - 1
    hook = norm.register_forward_hook(poison_gradient if last else lambda *_: None)
    result["gradient"] = fail(learner, step)
    hook.remove()
    norm.register_forward_hook(lambda module, args, out: out * (float("inf") if last else 1))
    result["loss"] = fail(learner, step)
    Path(out).write_text(json.dumps(result))
    dist.barrier()  # rank 0 holds the store: the others abort when it goes first
    dist.destroy_process_group()
