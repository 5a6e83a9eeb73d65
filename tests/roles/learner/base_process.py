"""One learner rank in a process of its own, whose teacher and reference are the student's frozen
base.

Not a test: `test_base_ranks.py` starts `main`.
"""

import json
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from async_opd.core.lora import LoraConfig
from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare, Needs
from async_opd.maths.packing import plan
from async_opd.objectives.egrsd import Egrsd
from async_opd.objectives.g_opd import GOpd
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.engine import LearnerRank
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.transformers_teacher import TransformersTeacher
from tests.roles.learner.rank_process import LENGTHS, group, rendezvous
from tests.roles.teacher.settings import scorer_settings

OBJECTIVES = dict(egrsd=Egrsd(), g_opd=GOpd())
SHOWN = [20, 1, 2, 1, 9, 1]  # tokens that each group's teacher is shown


def shown_more(i: int) -> Group:
    """A group whose teacher reads another prompt than the student."""
    each, _, _ = group(i)
    ids = np.random.default_rng(i).integers(40, size=SHOWN[i], dtype=np.int32)
    return Group(msgspec.structs.replace(each.prompt, teacher_ids=ids), each.rollouts)


def by_a_pool(model: str, groups: tuple[Group, ...], needs: Needs, *, student: bool) -> tuple:
    """Scores of another process's model, which has its weights as they lie on the disk."""
    teacher = TransformersTeacher(
        scorer_settings(40, temperature=0.7), TeacherConfig(model=model), needs
    )
    return tuple(
        tuple(
            teacher.score_rollouts(
                [(each.prompt.ids if student else each.prompt.teacher_ids, each.rollouts[0])]
            )
        )
        for each in groups
    )


def main(
    rank: int, meeting: str, model: str, out: str, settings: dict, objective: str, inside: bool
) -> None:
    """Takes three steps, with scores of the base where `inside`, else with those of a pool."""
    config = LearnerConfig(
        trajectories_per_step=len(LENGTHS), lr=1e-2, micro_batch_tokens=30, **settings
    )
    chosen = OBJECTIVES[objective]
    needs = chosen.needs()
    scoring = scorer_settings(40, temperature=0.7)
    reference = msgspec.structs.replace(scoring, as_student=True, section="reference")
    learner = LearnerRank(
        rank,
        LearnerSettings(
            model=model,
            temperature=0.7,
            steps=3,
            max_lag_steps=9,
            stale="mask",
            truncated="mask",
            max_new_tokens=64,
            seed=0,
            backend="gloo",
            bucket_bytes=4096,
            sync_s=60.0,
            timeout_s=60.0,
            lora=LoraConfig(rank=16),
            teachers={"": scoring} if inside else {},
            reference=reference if inside and needs.reference else None,
        ),
        config,
        chosen,
    )
    learner.start(rendezvous(learner, rank, Path(meeting)))
    groups = tuple(map(shown_more, range(len(LENGTHS))))
    verdicts = tuple(group(i)[2] for i in range(len(LENGTHS)))
    lengths = [3 + n for n in LENGTHS]
    mine = plan(lengths, ranks=config.ranks, tokens=config.micro_batch_tokens, width=32)[rank]
    share = LearnerShare(
        tuple(tuple((i, 0) for i in micro) for micro in mine),
        verdicts,
        by_learner=tuple(range(len(groups))) if inside else (),
    )
    columns: dict = {"scores": (None,) * len(groups)}
    if not inside:
        columns["scores"] = by_a_pool(model, groups, needs, student=False)
        if needs.reference:
            columns["references"] = by_a_pool(model, groups, Needs(), student=True)
    results = [learner.step(share, groups=groups, **columns) for _ in range(3)]
    says = learner.logprobs(np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)).tolist()
    result = dict(
        metrics=[each.metrics for each in results],
        unscored=[each.unscored for each in results],
        says=says,
        trains=[p.requires_grad for n, p in learner._lm.named_parameters() if "lora_" in n],
    )
    if inside:  # nothing of a step is left that breaks off in its scoring, on every rank alike
        broken = torch.nn.Module.register_forward_pre_hook
        hook = broken(learner._lm.get_input_embeddings(), _breaks)
        try:
            learner.step(share, groups=groups, **columns)
        except RuntimeError as e:
            result["broken"] = f"{e}"
        hook.remove()
        result["says_again"] = learner.logprobs(
            np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)
        ).tolist()
    Path(out).write_text(json.dumps(result))
    dist.barrier()  # rank 0 holds the store: the others abort when it goes first
    dist.destroy_process_group()


def _breaks(module, args):
    raise RuntimeError("out of memory")
