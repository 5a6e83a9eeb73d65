"""What each rank of the learner is given of a step."""

import asyncio
from dataclasses import replace

import numpy as np

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.ports import ScoredGroup
from async_opd.core.wire import GroupMeta, LearnerShare, Prompt, Span, StepResult, Unscored, Verdict
from async_opd.runtime.remote_learner import RemoteLearner
from tests.runtime.test_ports import TIMEOUTS


class Rank:
    """An actor that keeps what it is given of a step."""

    async def call(self, timeout_s: float, method: str, share: LearnerShare, **columns):
        self.share, self.columns = share, columns
        return StepResult(version=1, metrics={})


def group(
    id: int,
    tokens: int,
    samples: int = 1,
    *,
    reference: str | None = None,
    from_teacher: bool = False,
) -> ScoredGroup:
    """A group of `samples` of `tokens` each, behind a prompt of one token."""
    meta = GroupMeta(
        id=f"{id}",
        prompt_len=1,
        spans=((Span(version=0, start=0, end=tokens),),) * samples,
        truncated=(False,) * samples,
    )
    return ScoredGroup(
        ticket=id,
        prompt=Prompt(id=f"{id}", ids=np.zeros(1, np.int32), answer=""),
        meta=meta,
        group=f"group {id}",
        scores=None if from_teacher else f"scores {id}",
        verdicts=(Verdict(id=f"{id}", reward=1.0),),
        samples=tuple(range(samples)),
        since=0,
        reference=reference,
        from_teacher=from_teacher,
    )


async def stepped(*groups: ScoredGroup, ranks: int = 2) -> list[Rank]:
    actors = [Rank() for _ in range(ranks)]
    config = load(DEMO, ["learner.micro_batch_tokens=80"])
    await RemoteLearner(actors, "", 64, config, TIMEOUTS).step(groups)
    return actors


async def test_a_rank_gets_its_groups_and_scores_by_name_in_the_order_of_its_verdicts():
    (rank,) = await stepped(group(0, 50), group(1, 40), ranks=1)
    micros = rank.share.micro_batches
    assert sorted(pair for micro in micros for pair in micro) == [(0, 0), (1, 0)]
    assert [verdict.id for (verdict,) in rank.share.verdicts] == ["0", "1"]
    assert rank.columns == {"groups": ["group 0", "group 1"], "scores": ["scores 0", "scores 1"]}


async def test_references_come_by_name_and_none_stands_where_a_group_has_none():
    groups = group(0, 5, reference="refs 0"), group(1, 5, from_teacher=True)
    (rank,) = await stepped(*groups, ranks=1)
    assert rank.columns["scores"] == ["scores 0", None]
    assert rank.columns["references"] == ["refs 0", None]


async def test_each_rank_gets_only_the_groups_it_trains_with_their_own_references():
    ranks = await stepped(*(group(id, 50, reference=f"refs {id}") for id in range(2)))
    columns = sorted([rank.columns for rank in ranks], key=lambda column: column["groups"])
    assert columns == [
        {"groups": [f"group {id}"], "scores": [f"scores {id}"], "references": [f"refs {id}"]}
        for id in range(2)
    ]


async def test_what_the_teacher_answered_trains_in_micro_batches_of_its_own_as_many_on_every_rank():
    groups = [
        group(0, 30, samples=2),
        group(1, 10, from_teacher=True),
        group(2, 50, samples=2),
        group(3, 10, from_teacher=True),
        group(4, 10, from_teacher=True),
    ]
    seen, kinds = [], []
    for rank in await stepped(*groups):
        used = [int(name.split()[1]) for name in rank.columns["groups"]]
        assert [verdict.id for (verdict,) in rank.share.verdicts] == [f"{g}" for g in used]
        # what every rank calls them by, so that sums over a group may be over ranks
        assert [rank.share.number(g) for g in range(len(used))] == used and rank.share.groups == 5
        assert rank.columns["scores"] == [groups[g].scores for g in used]
        micros = [[(used[g], s) for g, s in micro] for micro in rank.share.micro_batches]
        seen += [pair for micro in micros for pair in micro]
        kinds.append([{groups[g].from_teacher for g, _ in micro} for micro in micros])
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    assert kinds == [[{False}, {False}, {True}]] * 2  # 51 + 31 tokens are over 80, 2 x 11 are not


async def test_a_rank_scores_what_no_pool_has_and_all_of_them_say_what_they_could_not():
    """Told apart from what the teacher has answered, which has no scores either."""

    class Scores(Rank):
        async def call(self, timeout_s, method, share, **columns):
            await super().call(timeout_s, method, share, **columns)
            names = [columns["groups"][g] for g in share.by_learner]
            unscored = [Unscored(id=name, sample=0, role="teacher", why="no") for name in names]
            return StepResult(version=1, metrics={}, unscored=tuple(unscored))

    groups = [
        replace(group(0, 60), scores=None, by_learner=True),
        group(1, 10, from_teacher=True),
        replace(group(2, 60), scores=None, by_learner=True),
        group(3, 70),
    ]
    actors = [Scores(), Scores()]
    config = load(DEMO, ["learner.micro_batch_tokens=80"])
    result = await RemoteLearner(actors, "", 64, config, TIMEOUTS).step(groups)
    assert sorted(each.id for each in result.unscored) == ["group 0", "group 2"]
    for rank in actors:
        mine = {rank.columns["groups"][g] for g in rank.share.by_learner}
        assert mine == {"group 0", "group 2"} & set(rank.columns["groups"])


async def test_a_step_without_them_has_no_micro_batch_more():
    (rank,) = await stepped(group(0, 30), group(1, 30), ranks=1)
    assert rank.share.micro_batches == (((0, 0), (1, 0)),)


async def test_a_step_of_nothing_else_is_planned_too():
    ranks = await stepped(group(0, 30, from_teacher=True))
    assert [rank.share.micro_batches for rank in ranks] == [(((0, 0),),), ((),)]


async def test_what_nobody_waits_for_any_more_is_cancelled_on_every_rank():
    class Hangs(Rank):
        cancelled = False

        async def call(self, timeout_s, method, *args):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.cancelled = True
                raise

    ranks = [Hangs(), Hangs()]
    learner = RemoteLearner(ranks, "", 64, load(DEMO), TIMEOUTS)
    saving = asyncio.ensure_future(learner.save("folder"))
    await asyncio.sleep(0.01)
    saving.cancel()
    await asyncio.wait([saving])
    await asyncio.sleep(0)
    assert [rank.cancelled for rank in ranks] == [True, True]
