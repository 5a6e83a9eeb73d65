"""What a run leaves behind so that another can go on: its ledger, and checkpoints of everything
that is trained."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from async_opd.config.schema import Config
from async_opd.core.aio import bounded
from async_opd.core.aside import aside
from async_opd.core.errors import CheckpointError, ConfigError, SystemFailed
from async_opd.core.events import EventSink
from async_opd.core.foreign import foreign
from async_opd.core.ports import Learner, ScoredGroup
from async_opd.core.run_dir import LEARNER, MODEL
from async_opd.core.wire import Prompt
from async_opd.driver import set_aside
from async_opd.driver.checkpoints import Checkpoint, Checkpoints, RunState, thread_of
from async_opd.driver.ledger import Ledger
from async_opd.driver.replica import Replica
from async_opd.driver.self_teachers import SelfTeachers

T = TypeVar("T")


class Source(Protocol):
    """Prompts that can be gone on with: `roles.rollout.prompts.PromptSource`."""

    @property
    def position(self) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[Prompt]: ...
    def continued(
        self, position: dict[str, Any], outstanding: Sequence[str]
    ) -> Iterator[Prompt]: ...


def fixed(config: Config) -> dict[str, Any]:
    """List the settings that a run goes on with as they were, by name: on them depend which prompts
    come in which order, and how many make a step, in the books as in the schedule; or what is
    trained, and the optimizer's state of it."""
    data = config.data
    return {
        "learner.trajectories_per_step": config.learner.trajectories_per_step,
        "rollout.samples_per_prompt": config.rollout.samples_per_prompt,
        "run.seed": config.run.seed,
        "data.id": data.id,
        "data.streaming": data.streaming,
        "data.sources": {
            name: {"weight": source.weight, "id": source.id}
            for name, source in data.sources.items()
        },
        **({"data.shuffle_buffer": data.shuffle_buffer} if data.streaming else {}),
        "student.lora": config.student.lora and config.student.lora.written_out(),
    }


def refuse_changed(config: Config, was: dict[str, Any], student: str) -> None:
    """Raise ConfigError where a setting of those that `fixed` lists is not what it `was`, or where
    an adapter would be beside another model than the `student` it was trained with."""
    # a run of a version without these in its list had one set, and trained all weights
    absent: dict[str, Any] = {"student.lora": None, "data.sources": {}}
    now, was = fixed(config), absent | was
    if config.student.lora:
        now, was = now | {"student.model": config.student.model}, was | {"student.model": student}
    for name, value in now.items():
        if value != was.get(name, value):
            allowed = "absent" if was[name] in (None, {}) else repr(was[name])
            why = "its books, or the order of its prompts, go by it"
            if name.startswith("student."):
                why = "what is trained, and the optimizer's state of it, goes by it"
            raise ConfigError(f"{name} = {value!r}: must be {allowed}, as the run has it: {why}")


class Progress:
    """The books of one run, and its checkpoints."""

    def __init__(
        self,
        ledger: Ledger,
        run_dir: Path,
        source: Source,
        learner: Replica[Learner],
        self_teachers: SelfTeachers,
        config: Config,
        emit: EventSink,
    ):
        """`emit` hears of each checkpoint that is saved, and of what is set aside."""
        self.ledger = ledger
        self._checkpoints = Checkpoints(run_dir, config.run.keep_checkpoints)
        self._disk_s = config.timeout.step_s
        self._fixed = fixed(config)
        self._run_dir = run_dir
        self._source = source
        self._learner = learner
        self._self_teachers = self_teachers
        self._emit = emit
        self.saved: int | None = None  # version of the newest checkpoint
        self._rewards, self._verdicts = 0.0, 0  # since then

    async def restore(self, checkpoint: Checkpoint, needed: int) -> None:
        """Bring learner, self-teachers and the source of prompts to where they were, at that
        checkpoint or at the start of the run. First come the prompts that were outstanding, at most
        the `needed` ones: there may be fewer steps than there were to be."""
        folder, state = checkpoint
        if state.version:  # at the start they are as they begin
            await self._learner.call(Learner.load_state, str(folder / LEARNER))
            await self._self_teachers.restore(folder)
        what = f"what lies behind step {state.version}"
        await self._on_disk(
            "prompts", self._source.continued, state.position, state.outstanding[:needed]
        )
        # It can be gone on with: what came later is void.
        void = await self._on_disk(what, self._checkpoints.rewind, state.version)
        self.ledger.resumed(state.version, state.outstanding)
        for id in state.outstanding[needed:]:
            self.ledger.dropped(id, "no step left")
        await self.synced()
        cut = partial(set_aside.cut, self._run_dir, state.version, copied=void is not None)
        with foreign(f"{self._run_dir}: its rows behind step {state.version}", SystemFailed):
            rows = await self._on_disk(what, cut)
        if void:
            self._emit("set aside", "run", f"all that lay behind step {state.version}: {void}")
        elif rows:
            self._emit("set aside", "run", f"the rows behind step {state.version}: {rows}")
        self.saved = state.version

    def trained(self, step: int, batch: Sequence[ScoredGroup]) -> None:
        """Note that step `step` trained `batch`."""
        self.ledger.trained(step, [group.prompt.id for group in batch])
        rewards = [verdict.reward for group in batch for verdict in group.student_verdicts]
        self._rewards += sum(reward or 0.0 for reward in rewards)
        self._verdicts += len(rewards)

    async def save(self, version: int, counters: dict[str, Any]) -> None:
        """Save a checkpoint of `version`, unless there is one. The best is the one with the
        largest mean reward of rollouts since the one before. Generation goes on meanwhile. Raises
        CheckpointError or LedgerError."""
        if version == self.saved:
            return
        state = RunState(
            version=version,
            position=self._source.position,
            outstanding=self.ledger.checkpoint(version),
            score=self._rewards / self._verdicts if self._verdicts else None,
            counters=counters,
            fixed=self._fixed,
        )
        what = f"checkpoint of step {version}"
        folder = await self._on_disk(what, self._begun, version)
        await self.synced()
        await self._learner.call(Learner.save, str(folder / MODEL), of=version)
        await self._learner.call(Learner.save_state, str(folder / LEARNER), of=version)
        await self._self_teachers.save(folder)
        left = ""
        try:
            await self._on_disk(what, self._checkpoints.commit, version, state)
        except CheckpointError as e:  # it may be whole, and only what comes behind it undone
            if not await self._on_disk(what, self._checkpoints.holds, version):
                raise
            left = f"; {e}"
        self._rewards, self._verdicts = 0.0, 0
        self.saved = version
        self._emit("saved", "checkpoint", f"step {version}{left}")

    async def _on_disk(self, what: str, call: Callable[..., T], *args: Any) -> T:
        return await aside(self._disk_s, what, call, *args, thread=thread_of(self._run_dir))

    def _begun(self, version: int) -> Path:
        return self._checkpoints.begin(version).resolve()

    async def synced(self) -> None:
        """Wait until the ledger is on disk."""
        await bounded(self.ledger.sync(), self._disk_s, "ledger, fsync")
