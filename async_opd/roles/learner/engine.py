"""One data-parallel rank of the learner, on DeepSpeed. A plain class, which a
`runtime.actors.RoleActor` builds."""

import math
import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from async_opd.core.errors import CheckpointNotSaved, Diverged
from async_opd.core.role_settings import LearnerSettings
from async_opd.core.weights import WeightGroup, WeightLayout
from async_opd.core.wire import Floats, Group, Ints, LearnerShare, StepResult, trained_tokens
from async_opd.maths.advantages import Moments
from async_opd.objectives import Objective
from async_opd.roles.learner import checkpoint, lora
from async_opd.roles.learner.base import Base
from async_opd.roles.learner.batch import Columns, TrainingBounds, pack, trajectories
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.deepspeed_config import deepspeed_config, refused, schedule
from async_opd.roles.learner.loading import hidden_size, load_student
from async_opd.roles.learner.probe import probe_batches
from async_opd.roles.learner.recorder import Recorder
from async_opd.roles.learner.step import StepContext, Student, accumulate
from async_opd.roles.learner.threads import optimizer_threads
from async_opd.roles.learner.weight_group import LearnerGroup
from async_opd.roles.learner.weights import student_weights
from async_opd.roles.models import causal_lm
from async_opd.roles.teacher.config import TeacherSamplingConfig
from async_opd.roles.weight_sync.gloo import join_store, open_store

DEEPSPEED = "deepspeed"  # folder of its files in a rank's state


class LearnerRank:
    """Holds the live student. Every rank is called with the same methods in the same order: they
    are collective."""

    def __init__(
        self,
        rank: int,
        settings: LearnerSettings,
        config: LearnerConfig,
        objective: Objective,
        teacher_sampling: TeacherSamplingConfig | None = None,
    ):
        """Keep the settings; `start` does the work once rank 0 listens. `teacher_sampling` has the
        weight of the cross-entropy on the teacher's own answers."""
        self._rank = rank
        self._settings, self._lora = settings, settings.lora
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._config = config.on(self._device.type == "cuda")
        self._objective = objective
        self._teacher_sampling = teacher_sampling
        self._bounds = TrainingBounds.of(settings)
        self._running = {name: Moments() for name in objective.needs().running}
        # Of rank 0; torch's stubs do not export its type.
        self._store: dist.TCPStore | None = None  # pyright: ignore[reportPrivateImportUsage]
        self.version, self._moving = 0, False

    def listen(self, host: str) -> str:
        """Rank 0: open the store where all ranks meet, at `host`; returns "tcp://host:port"."""
        self._store = open_store(host, self._settings.timeout_s)
        return f"tcp://{host}:{self._store.port}"

    def start(self, rendezvous: str) -> int:
        """Join the process group at `rendezvous`, where rank 0 listens, and load the student;
        returns its hidden size, for the plan."""
        settings, config = self._settings, self._config
        host, port = rendezvous.removeprefix("tcp://").rsplit(":", 1)
        # one visible device an actor
        os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR=self._device.type)
        # or it compiles, for half a minute, an all-reduce for inference alone
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
        store = self._store or join_store(host, int(port), settings.timeout_s)
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=store,
            rank=self._rank,
            world_size=config.ranks,
            timeout=timedelta(seconds=settings.timeout_s),
        )
        if config.offload_optimizer and self._device.type == "cuda":
            torch.set_num_threads(optimizer_threads(store, self._rank, config.ranks))
        torch.manual_seed(settings.seed)
        width = hidden_size(settings.model, settings.trust_remote_code)
        engine_config = deepspeed_config(config, width)
        shard = partial(_shard, engine_config) if config.zero_stage == 3 else None
        lm = load_student(settings, config, self._device, shard)
        self._source = checkpoint.read_source(settings.model, settings.trust_remote_code)
        gather: Any = deepspeed.zero.GatheredParameters  # a context manager in all but its types
        self._lm, self._weights = lm, student_weights(lm, settings, gather)
        self._group = LearnerGroup(self._rank, settings, self._weights)
        self._base = Base(settings, config, self._objective.needs(), lm.config, self._device)
        student = Student(
            lm,
            temperature=settings.temperature,
            chunk_rows=config.head_chunk_rows,
            head_float32=config.head_float32,
            vocabulary=settings.vocabulary,
        )
        initialize: Any = deepspeed.initialize  # its own types name other classes
        with refused(config.deepspeed):
            self._engine, optimizer, _, _ = initialize(
                model=student,
                model_parameters=[p for p in student.parameters() if p.requires_grad],
                config=engine_config,
                lr_scheduler=partial(schedule, config, settings.steps),
                dist_init_required=False,
            )
        # the ZeRO optimizers clip and refuse non-finite gradients by themselves
        if config.zero_stage == 0:
            optimizer.register_step_pre_hook(self._clip)
        if shard:
            causal_lm.refuse_unless_packing_is_exact(lm, f"model {settings.model}", gather)
        return width

    def step(
        self,
        share: LearnerShare,
        *,
        groups: tuple[Group, ...] = (),
        scores: tuple[Columns, ...] = (),
        references: tuple[Columns, ...] = (),
    ) -> StepResult:
        """Train one step on this rank's `share` of it, in the order of whose verdicts the `groups`
        come, their `scores` (None where the teacher has answered, or the base is it), and, where
        there is a pool of references, its scores. A step that keeps no token leaves weights,
        optimizer and schedule as they are. Raises Diverged on every rank before the optimizer moves
        if a loss or gradient is not finite anywhere.
        """
        step, live = self.version + 1, self.version
        scored = self._base.score(self._engine, self._all_reduce, share, groups, scores, references)
        batches = trajectories(scored.share, groups, scored.scores, scored.references)
        micros = [pack(b, self._bounds, live=live, device=self._device) for b in batches]
        every = self._settings.record_every_steps
        due = self._rank == 0 and every and step % every == 0
        recorder = Recorder(self._objective, batches, micros, self.version) if due else None
        sampling = self._teacher_sampling
        drops, seed = self._lora and self._lora.dropout, (self._settings.seed, step, self._rank)
        metrics, running = accumulate(
            lora.one_mask(self._engine, micros, seed) if drops else self._engine,
            lambda loss: self._engine.backward(loss * self._config.ranks, scale_wrt_gas=False),
            self._all_reduce,
            self._objective,
            micros,
            StepContext(
                step=step,
                max_lag_steps=self._settings.max_lag_steps,
                groups=share.groups,
                running=self._running,
                teacher_weight=sampling.weight(step) if sampling else 0.0,
            ),
            recorder and recorder.look,
        )
        tokens = trained_tokens(metrics)
        if not math.isfinite(metrics["loss"]):
            raise Diverged(f"step {step}: loss {metrics['loss']} over {tokens:.0f} tokens")
        metrics["lr"] = self._engine.get_lr()[0]
        metrics["grad_norm"] = self._moved(step) if tokens else 0.0
        self.version, self._running = step, running
        self._moving = False
        return StepResult(
            version=self.version,
            metrics={**metrics, **scored.metrics},
            unscored=scored.unscored,
            recorded=tuple(recorder.recorded if recorder else ()),
        )

    def _moved(self, step: int) -> float:
        """Move the optimizer; returns the gradient's norm. Raises Diverged before."""
        self._moving = True  # until the step is done, or refused
        self._engine.step()
        if getattr(self._engine.optimizer, "overflow", False):
            self._moving = False
            raise Diverged(f"step {step}: the gradient is not finite")
        zero = self._config.zero_stage
        return float(self._engine.get_global_grad_norm() if zero else self._grad_norm)

    @torch.no_grad()
    def logprobs(self, *ids: Ints) -> Floats:
        """Log-probs float32 [T] of responses under the live student, one behind the other, for the
        parity probe. `ids` are a prompt, its response, the next prompt and so on."""
        empty = pack([], self._bounds, live=self.version, device=self._device)
        micros = probe_batches(ids, empty, self._config.micro_batch_tokens)
        with lora.undropped(self._lm):
            return np.concatenate([self._engine(micro).sampled_N.cpu().numpy() for micro in micros])

    def open_group(self, host: str, generators: int, ranks: int) -> list[WeightGroup]:
        """Rank 0: prepare at `host` a group with so many generators of so many `ranks` each."""
        return self._group.open(host, generators, ranks)

    async def join_group(self, world: int) -> None:
        """Rank 0: wait for the opened group's members. Raises SyncFailed when one stays away."""
        await self._group.join(world)

    async def leave_group(self) -> None:
        """Rank 0: end the group; returns once nothing goes on in it any more."""
        await self._group.leave()

    def weight_layout(self) -> WeightLayout:
        """What an update carries: the same for every update, and for every generator."""
        return self._weights.layout()

    async def send_weights(self) -> None:
        """Rank 0 broadcasts the live weights. Raises SyncFailed when a member is gone or slow."""
        await self._group.send(self.version)

    def save(self, folder: str) -> None:
        """Rank 0 writes the Hugging Face checkpoint, from a whole copy in its host memory; of an
        adapter peft's, which holds nothing else."""
        if self._lora is None:
            return self.save_whole(folder)
        adapter = self._weights.adapter(keep=self._rank == 0)
        if self._rank == 0:
            checkpoint.save_adapter(self._lm, adapter, self._source, Path(folder))

    def save_whole(self, folder: str) -> None:
        """Rank 0 writes the Hugging Face checkpoint of a model that needs no other: an adapter is
        merged."""
        copies = self._weights.copied(keep=self._rank == 0)
        if self._rank == 0:
            checkpoint.save(self._lm, copies, self._source, Path(folder))

    def save_state(self, folder: str) -> None:
        """Every rank writes its part of what `load_state` goes on from: optimizer, master weights,
        schedule, random state, version and running moments. All ranks and the driver must see
        `folder`: a shared file system is assumed.

        Raises CheckpointError where it cannot be written, or a step broke off while weights moved.
        """
        if self._moving:
            raise CheckpointNotSaved(f"{folder}: the step behind {self.version} is half done")
        with checkpoint.writing(Path(folder)), checkpoint.to_its_end(self._engine):
            self._engine.save_checkpoint(
                folder,
                tag=DEEPSPEED,
                save_latest=False,
                exclude_frozen_parameters=self._lora is not None,
            )
            checkpoint.save_rank(
                checkpoint.RankState(
                    ranks=self._config.ranks,
                    zero_stage=self._config.zero_stage or 0,
                    dtype=self._config.dtype,
                    version=self.version,
                    running=self._running,
                    random=checkpoint.random_state(),
                    lora=self._lora,
                    base_sum=self._lora and lora.base_sum(self._lm),
                ),
                Path(folder),
                self._rank,
            )

    def load_state(self, folder: str) -> None:
        """Go on, right after `start`, from what `save_state` wrote and `checkpoints.find` has
        verified: DeepSpeed's files are pickles. Raises CheckpointError, with nothing loaded, where
        ranks, stage, dtype, adapter or the weights beside it are others now.
        """
        base_sum = self._lora and lora.base_sum(self._lm)
        state = checkpoint.load_rank(Path(folder), self._rank, self._config, self._lora, base_sum)
        self._engine.load_checkpoint(folder, tag=DEEPSPEED, load_module_strict=self._lora is None)
        self.version = state.version
        # a run may go on with another objective, whose moments begin here
        self._running = {
            name: state.running.get(name, none) for name, none in self._running.items()
        }
        checkpoint.restore_random_state(state.random)

    def _clip(self, *_: object) -> None:
        self._grad_norm = torch.nn.utils.clip_grad_norm_(
            self._engine.module.parameters(), self._config.grad_clip
        )
        # gradients are already averaged, so every rank sees the same
        if not torch.isfinite(self._grad_norm):
            self._moving = False
            raise Diverged(f"step {self.version + 1}: gradient norm {self._grad_norm.item()}")

    @staticmethod
    def _all_reduce(tensor: Tensor, op: str) -> None:
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])


def _shard(engine_config: dict[str, Any], weight: torch.nn.Parameter) -> None:
    """Leave of a whole `weight` the part that this rank holds under ZeRO-3."""
    deepspeed.zero.Init(module=torch.nn.ParameterList([weight]), config_dict_or_path=engine_config)
