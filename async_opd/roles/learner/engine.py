"""One data-parallel rank of the learner, on DeepSpeed. A plain class: `runtime/actors.py` makes a
Ray actor of it."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore
from transformers import get_scheduler

from async_opd.core.errors import Diverged, SyncFailed
from async_opd.core.wire import StepResult, Verdict
from async_opd.maths.advantages import Moments
from async_opd.objectives import Objective
from async_opd.roles.learner import checkpoint
from async_opd.roles.learner.batch import pack, samples
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.recorder import Recorder
from async_opd.roles.learner.step import StepContext, Student, accumulate
from async_opd.roles.models import causal_lm
from async_opd.roles.weight_sync import checkpoint_names
from async_opd.roles.weight_sync.gloo import TensorMeta, buckets, join_store, open_store
from async_opd.roles.weight_sync.sender import SENDERS

DEEPSPEED = "deepspeed"  # folder of its files in a rank's state


class LearnerRank:
    """Holds the live student. Every rank is called with the same methods in the same order: they
    are collective."""

    def __init__(
        self,
        config: LearnerConfig,
        objective: Objective,
        *,
        model: str,
        temperature: float,
        steps: int,
        max_lag_steps: int,
        stale: str,
        truncated: str,
        cap: int,
        seed: int,
        rank: int,
        timeout_s: float,
        bucket_bytes: int,
        taught_weight: Callable[[int], float] | None = None,
        record_every_steps: int = 0,
        trust_remote_code: bool = False,
    ):
        """Keep the settings; `start` does the work once rank 0 listens.

        `cap` is the most tokens a response may have. `bucket_bytes` of weights are gathered and
        sent at once. `taught_weight(step)` is that of the cross-entropy on the teacher's own
        answers. Rank 0 returns a few trajectories with every `record_every_steps`-th step, with
        none where that is 0.
        """
        self._config = config
        self._objective = objective
        self._model = model
        self._temperature = temperature
        self._bounds = dict(max_lag_steps=max_lag_steps, stale=stale, truncated=truncated, cap=cap)
        self._steps = steps
        self._seed = seed
        self._rank = rank
        self._timeout_s = timeout_s
        self._record_every = record_every_steps
        self._taught_weight = taught_weight or (lambda step: 0.0)
        self._bucket_bytes, self._trust_remote_code = bucket_bytes, trust_remote_code
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._running = {name: Moments() for name in objective.needs().running}
        self._store: TCPStore | None = None  # of rank 0
        self.version = 0

    def listen(self, host: str) -> str:
        """Rank 0: open the store where all ranks meet, at `host`, an address of this machine;
        returns "tcp://host:port", the port being one that the system has chosen."""
        self._store = open_store(host, self._timeout_s)
        return f"tcp://{host}:{self._store.port}"

    def start(self, rendezvous: str) -> None:
        """Join the process group at `rendezvous`, where rank 0 listens, and load the student."""
        config = self._config
        host, port = rendezvous.removeprefix("tcp://").rsplit(":", 1)
        # one visible device an actor
        os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR=self._device.type)
        # or it compiles, for half a minute, an all-reduce for inference alone
        deepspeed.ops.__compatible_ops__ = {}
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=self._store or join_store(host, int(port), self._timeout_s),
            rank=self._rank,
            world_size=config.ranks,
            timeout=timedelta(seconds=self._timeout_s),
        )
        torch.manual_seed(self._seed)
        sharded = config.zero_stage == 3
        host = torch.device("cpu") if sharded else self._device
        lm = causal_lm.load(
            self._model, config.dtype, host, trust_remote_code=self._trust_remote_code
        )
        self._pieces, self._width = (
            checkpoint_names.pieces(lm),
            lm.config.get_text_config().hidden_size,
        )
        lm.train()
        for module in lm.modules():  # the network that learns must be the one that sampled
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if config.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        student = Student(lm, temperature=self._temperature, chunk_rows=config.head_chunk_rows)
        settings = _deepspeed_config(config, self._width)
        # weight by weight from host memory, so that no device ever holds the whole model
        if sharded:
            deepspeed.zero.Init(module=student, config_dict_or_path=settings)
            student.to(self._device)  # what is left are buffers
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=student,
            model_parameters=[p for p in student.parameters() if p.requires_grad],
            config=settings,
            lr_scheduler=lambda opt: get_scheduler(
                "constant_with_warmup" if config.schedule == "constant" else config.schedule,
                opt,
                num_warmup_steps=config.warmup_steps,
                num_training_steps=self._steps,
            ),
            dist_init_required=False,
        )
        self._lm, self._parameters = lm, dict(lm.named_parameters())
        # the ZeRO optimizers clip and refuse non-finite gradients by themselves
        if config.zero_stage == 0:
            optimizer.register_step_pre_hook(self._clip)

    def width(self) -> int:
        """Hidden size of the student, for the plan."""
        return self._width

    def step(
        self, plan: list[list[tuple[int, int]]], verdicts: list[tuple[Verdict, ...]], *data
    ) -> StepResult:
        """Train one step on `plan`: per micro-batch, pairs of (index of group, sample).

        `data` holds the groups, then their scores (None for the teacher's own answers), then, where
        there is a reference, its scores, in one order. Raises Diverged on every rank before the
        optimizer moves if a loss or gradient is not finite anywhere.
        """
        given = samples(plan, verdicts, data)
        micros = [
            pack(own, live=self.version, device=self._device, **self._bounds) for own in given
        ]
        due = (
            self._rank == 0 and self._record_every and (self.version + 1) % self._record_every == 0
        )
        recorder = Recorder(self._objective, given, micros, self.version) if due else None
        metrics, running = accumulate(
            self._engine,
            lambda loss: self._engine.backward(loss * self._config.ranks, scale_wrt_gas=False),
            self._all_reduce,
            self._objective,
            micros,
            StepContext(
                step=self.version + 1,
                max_lag_steps=self._bounds["max_lag_steps"],
                running=self._running,
                taught_weight=self._taught_weight(self.version + 1),
            ),
            recorder and recorder.look,
        )
        tokens = metrics["tokens"] + metrics["tokens_taught"]
        if not math.isfinite(metrics["loss"]) or tokens == 0:
            raise Diverged(
                f"step {self.version + 1}: loss {metrics['loss']} over {tokens:.0f} tokens"
            )
        metrics["lr"] = self._engine.get_lr()[0]
        self._engine.step()
        if getattr(self._engine.optimizer, "overflow", False):
            raise Diverged(f"step {self.version + 1}: the gradient is not finite")
        zero = self._config.zero_stage > 0
        metrics["grad_norm"] = float(
            self._engine.get_global_grad_norm() if zero else self._grad_norm
        )
        self.version, self._running = self.version + 1, running
        return StepResult(
            version=self.version,
            metrics=metrics,
            recorded=tuple(recorder.recorded if recorder else ()),
        )

    def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        """Log-probs float32 [T] of `response_ids` after `prompt_ids` under the live student, for
        the parity probe."""
        ids_L = torch.as_tensor(
            np.concatenate([prompt_ids, response_ids]), dtype=torch.int64, device=self._device
        )
        empty = pack([], live=self.version, device=self._device, **self._bounds)
        rows_N = torch.arange(len(prompt_ids) - 1, len(ids_L) - 1, device=self._device)
        micro = replace(
            empty,
            ids_L=ids_L,
            segment_lengths=[len(ids_L)],
            rows_N=rows_N,
            targets_N=ids_L[rows_N + 1],
        )
        with torch.no_grad():
            return self._engine(micro).sampled_N.cpu().numpy()

    def open_group(
        self, backend: str, host: str, rank_offsets: list[int], world: int, timeout_s: float
    ) -> list[dict]:
        """Rank 0: prepare a weight group of `world` members; returns each generator's init info."""
        self._sender = SENDERS[backend](host, bucket_bytes=self._bucket_bytes, timeout_s=timeout_s)
        return [self._sender.init_info(offset, world) for offset in rank_offsets]

    def join_group(self, world: int) -> None:
        """Rank 0: wait for the members of the opened group. Raises SyncFailed when one stays
        away."""
        try:
            self._sender.join(world)
        except (RuntimeError, OSError) as e:  # the second: somebody took its port
            raise SyncFailed(f"the weight group of {world} members did not form: {e}") from e

    def update_info(self) -> dict:
        """What an update carries, in checkpoint names: the same for every update, and for every
        generator."""
        described = self._described()
        return dict(
            names=[meta.name for meta in described],
            dtype_names=[meta.dtype for meta in described],
            shapes=[list(meta.shape) for meta in described],
        )

    def send_weights(self) -> None:
        """Rank 0 broadcasts the live weights. Raises SyncFailed when a member is gone or too
        slow."""
        weights = (
            w
            for bucket in self._gathered()
            for w in checkpoint_names.tensors(self._lm, bucket, self._parameters)
        )
        try:
            if self._rank == 0:
                self._sender.send(self._described(), weights)
        except RuntimeError as e:
            raise SyncFailed(f"the broadcast of version {self.version} broke off: {e}") from e
        finally:
            for _ in weights:  # every rank gathers to the end, also where the broadcast broke off
                pass

    def save(self, folder: str) -> None:
        """Rank 0 writes the Hugging Face checkpoint; a whole copy of the weights is in its host
        memory meanwhile."""
        weights = {}
        for bucket in self._gathered():
            if self._rank == 0:
                names = (name for piece in bucket for name in piece.parameters)
                weights |= {name: self._parameters[name].detach().cpu() for name in names}
        if self._rank == 0:
            checkpoint.save(self._lm, weights, self._model, Path(folder))

    def save_state(self, folder: str) -> None:
        """Every rank writes its part of what `load_state` goes on from: optimizer, master weights,
        schedule, random state, version and running moments. All ranks and the driver must see
        `folder`: a shared file system is assumed.

        Raises CheckpointError where it cannot be written; the other ranks then wait for that one in
        vain.
        """
        with checkpoint.writing(Path(folder)):
            self._engine.save_checkpoint(folder, tag=DEEPSPEED, save_latest=False)
            state = checkpoint.RankState(
                ranks=self._config.ranks,
                zero_stage=self._config.zero_stage,
                dtype=self._config.dtype,
                version=self.version,
                running=self._running,
                random={
                    device: of.get_rng_state().numpy().tobytes()
                    for device, of in _generators().items()
                },
            )
            checkpoint.save_rank(state, Path(folder), self._rank)

    def load_state(self, folder: str) -> None:
        """Go on, right after `start`, from what `save_state` wrote and `checkpoints.find` has
        verified: DeepSpeed's files are pickles. Raises CheckpointError, with nothing loaded, where
        ranks, stage or dtype are others now.
        """
        state = checkpoint.load_rank(Path(folder), self._rank, self._config)
        self._engine.load_checkpoint(folder, tag=DEEPSPEED)
        self.version, self._running = state.version, state.running
        for device, generator in _generators().items():
            if device in state.random:
                generator.set_rng_state(
                    torch.frombuffer(bytearray(state.random[device]), dtype=torch.uint8)
                )

    def _gathered(self) -> Iterator[list[checkpoint_names.Piece]]:
        """Collective: all weights, a bucket at a time; only those of the bucket in hand are whole
        under ZeRO-3."""
        for bucket in buckets(self._pieces, self._bucket_bytes):
            names = (name for piece in bucket for name in piece.parameters)
            with deepspeed.zero.GatheredParameters([self._parameters[name] for name in names]):
                yield bucket

    def _described(self) -> list[TensorMeta]:
        return [meta for piece in self._pieces for meta in piece.tensors]

    def _clip(self, optimizer, args, kwargs) -> None:
        self._grad_norm = torch.nn.utils.clip_grad_norm_(
            self._engine.module.parameters(), self._config.grad_clip
        )
        # gradients are already averaged, so every rank sees the same
        if not torch.isfinite(self._grad_norm):
            raise Diverged(f"step {self.version + 1}: gradient norm {self._grad_norm.item()}")

    @staticmethod
    def _all_reduce(tensor: Tensor, op: str) -> None:
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])


def _generators() -> dict[str, ModuleType]:
    """What has `get_rng_state` and `set_rng_state`, by kind of device."""
    return {"cpu": torch, "cuda": torch.cuda} if torch.cuda.is_available() else {"cpu": torch}


def _deepspeed_config(config: LearnerConfig, hidden_size: int) -> dict:
    # norms and biases
    zero = {"stage": config.zero_stage, "stage3_param_persistence_threshold": 10 * hidden_size}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        # the plan decides how many micro-batches make a step
        "managed_gradient_accumulation": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": list(config.betas),
                "weight_decay": config.weight_decay,
                # DeepSpeed's own are compiled on first use, with a compiler that may be absent
                "torch_adam": True,
            },
        },
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # over micro-batches, whatever the weights are
        # absent, it would be 1.0
        "gradient_clipping": config.grad_clip if config.zero_stage else 0.0,
    }
