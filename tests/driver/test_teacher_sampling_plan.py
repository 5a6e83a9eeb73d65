"""What the teacher answered reaches the ranks in micro-batches of its own."""

import numpy as np
from async_opd.runtime.remote_roles import LearnerProxy

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.ports import Ready
from async_opd.core.wire import GroupMeta, Prompt, Span, StepResult


class Rank:
    """Keeps what each step was called with."""

    async def call(self, timeout_s, method, *args):
        if method == "width":
            return 64
        self.plan, self.verdicts, self.data = args[0], args[1], args[2:]
        return StepResult(version=1, metrics={})


def group(id: int, tokens: int, samples: int = 1, taught: bool = False) -> Ready:
    """A group of `samples` of `tokens` each, behind a prompt of one token."""
    meta = GroupMeta(
        id=str(id),
        prompt_len=1,
        spans=((Span(version=0, start=0, end=tokens),),) * samples,
        truncated=(False,) * samples,
    )
    prompt = Prompt(id=str(id), ids=np.zeros(1, np.int32), answer="", taught=taught)
    scores = None if taught else f"scores {id}"
    return Ready(id, prompt, meta, f"group {id}", scores, (f"verdict {id}",), tuple(range(samples)))


async def stepped(*groups: Ready, ranks: int = 2) -> list[Rank]:
    members = [Rank() for _ in range(ranks)]
    await LearnerProxy(members, "", load(DEMO, ["learner.micro_batch_tokens=80"])).step(
        list(groups)
    )
    return members


async def test_what_the_teacher_answered_trains_in_micro_batches_of_its_own_as_many_on_every_rank():
    groups = [
        group(0, 30, samples=2),
        group(1, 10, taught=True),
        group(2, 50, samples=2),
        group(3, 10, taught=True),
    ]
    ranks = await stepped(*groups, group(4, 10, taught=True))
    taught = {1, 3, 4}
    seen, kinds = [], []
    for rank in ranks:
        used = [int(data.split()[1]) for data in rank.data[: len(rank.verdicts)]]
        assert rank.data[len(used) :] == tuple(None if g in taught else f"scores {g}" for g in used)
        assert rank.verdicts == [(f"verdict {g}",) for g in used]
        micros = [[(used[g], s) for g, s in micro] for micro in rank.plan]
        seen += [pair for micro in micros for pair in micro]
        kinds.append([{g in taught for g, _ in micro} for micro in micros])
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    assert kinds == [[{False}, {False}, {True}]] * 2  # 51 + 31 tokens are over 80, 2 x 11 are not


async def test_a_step_without_them_has_no_micro_batch_more():
    (rank,) = await stepped(group(0, 30), group(1, 30), ranks=1)
    assert rank.plan == [[(0, 0), (1, 0)]]


async def test_a_step_of_nothing_else_is_planned_too():
    ranks = await stepped(group(0, 30, taught=True))
    assert [rank.plan for rank in ranks] == [[[(0, 0)]], [[]]]
