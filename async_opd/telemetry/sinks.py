"""Sinks of rows besides metrics.jsonl, asked for by `run.sinks`. Each is made and fed on its own
thread."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from async_opd.config.schema import Config
from async_opd.core.process_wide import environment
from async_opd.telemetry import metric_names
from async_opd.telemetry.metrics import Row


class Wandb:
    """Weights & Biases: offline, in RUN/wandb, where there is no key. Project and mode are its own
    variables'."""

    def __init__(self, config: Config, run_dir: Path):
        reporting = os.environ.get("WANDB_ERROR_REPORTING", "false")  # it is sent offline too
        with environment(WANDB_ERROR_REPORTING=reporting):
            import wandb

            online = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "async-opd"),
                name=run_dir.name,
                dir=run_dir,
                mode=None if online else "offline",
                config=msgspec.to_builtins(config),
                # the terminal is the console's
                settings=wandb.Settings(console="off", silent=True),
            )

    def __call__(self, row: Row) -> None:
        self._run.log(row, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: Config, run_dir: Path):
        # not by way of torch, which the driver does without
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # protobuf makes the classes when it is imported, where no checker sees them
        self._event = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        self._summary = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))

    def __call__(self, row: Row) -> None:
        values = [
            self._summary.Value(tag=key, simple_value=value) for key, value in _known(row).items()
        ]
        self._writer.add_event(
            self._event(
                wall_time=time.time(), step=row["step"], summary=self._summary(value=values)
            )
        )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Prometheus:
    """Gauges of Ray's metrics, which the node exports as `ray_async_opd_<key>`, tagged with the
    run's name."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        gauge: Callable[[str, str, str], Callable[[float], None]],
    ):
        """`gauge(name, meaning, run)` makes one; it returns what sets it."""
        self._run, self._make = run_dir.name, gauge
        self._setters: dict[str, Callable[[float], None]] = {}

    def __call__(self, row: Row) -> None:
        for key, value in _known(row).items():
            if key not in self._setters:
                self._setters[key] = self._make(
                    metric_names.PREFIX + key, metric_names.of(key).meaning, self._run
                )
            self._setters[key](value)


def _known(row: Row) -> dict[str, float]:
    return {key: value for key, value in row.items() if value is not None}
