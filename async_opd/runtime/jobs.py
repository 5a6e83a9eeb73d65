"""Runs as jobs of a Ray cluster, by way of its dashboard: submitted, followed, scaled and
stopped."""

import asyncio
import logging
import math
import re
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, TypeVar

from ray import job_submission
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus

import async_opd
from async_opd.core.aside import aside
from async_opd.core.errors import ClusterError, ConfigError, TimedOut
from async_opd.core.foreign import foreign
from async_opd.core.printing import say
from async_opd.core.process_wide import environment, log_level
from async_opd.core.reading import refused
from async_opd.runtime.dashboard import HOW_TO_GET_A_TOKEN, dashboard_url, token_for
from async_opd.runtime.travel import LEFT_OUT, excluded, in_words, left_behind

POLL_S = 1.0
REQUEST_S = 30.0  # within which a dashboard has answered
TRANSFER_S = 600.0  # or has taken what is sent, or given a log
SCALE_S = 300.0  # for the short job that scales: it waits for a node, and for its files
LOG_SHARE = 0.05  # of the time in which a log is followed that goes into fetching it
LOST_LOGS = 5  # in a row, with which following it ends
END_S = 42  # for the end of the actors, behind the last save
# from SIGTERM to SIGKILL, of a run with the default last save; Ray's 3 s would cut that off
STOP_S = 60
EXIT_STATUS = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: 130}
RUN_DIR = "async_opd_run_dir"  # in the metadata of a job that trains
ID = re.compile(r"\w[\w.-]*", re.ASCII)  # of a job; what else a URL may hold leads elsewhere

T = TypeVar("T")


class JobSubmissionClient(job_submission.JobSubmissionClient):
    """Ray's, which follows a log without its WebSocket: of one that cannot be opened, because a job
    is not there or the head is in trouble, the head writes all headers into its log, which everyone
    may read, and the token is one of them."""

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Yield what comes to the job's log until the job has ended. The whole of it is fetched
        each time, LOG_SHARE of the time."""
        seen, lost = 0, 0
        while True:
            job = await aside(REQUEST_S, self._address, self.get_job_info, job_id)
            began = time.monotonic()
            try:
                log = await aside(TRANSFER_S, self._address, self.get_job_logs, job_id)
                lost = 0
            except (RuntimeError, OSError, TimedOut):
                lost += 1
                if lost == LOST_LOGS:
                    raise
                log = ""
            yield log[seen:]
            seen = max(seen, len(log))
            if job.status.is_terminal() and not lost:
                return
            await asyncio.sleep(max(POLL_S, (time.monotonic() - began) / LOG_SHARE))


class Jobs:
    """The jobs of the cluster whose dashboard is at an address. Everything here raises ClusterError
    for what the cluster, or the way to it, refuses, and for what it does not answer in time."""

    def __init__(self, address: str | None = None):
        """Open the way to the dashboard that `dashboard_url` chooses."""
        self.address = dashboard_url(address)
        token = self._ask(token_for, self.address)
        headers = {"Authorization": f"Bearer {token}"} if token else None
        # Ray takes its environment before what it is given.
        with environment(RAY_API_SERVER_ADDRESS=self.address):
            self._client = self._ask(partial(JobSubmissionClient, headers=headers))

    def submit(
        self, words: list[str], run_dir: str, package: Path, last_save_s: float = 0.0
    ) -> str:
        """Start `async-opd WORDS` with the files of `package` as its working directory; return its
        id. When it is stopped, it is left the time of its last save."""
        environment = {
            "working_dir": str(package),
            "py_modules": _this_package(),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_s(last_save_s))},
        }
        return self._start(words, environment, {RUN_DIR: run_dir})

    def scale(self, id: str, sizes: list[str]) -> int:
        """Ask the running job for other pool sizes and print its answer; return the exit status.
        The question is a job beside it, because RUN may lie on a disk that only the cluster
        sees."""
        job = self.about(id)
        run_dir = (job.metadata or {}).get(RUN_DIR)
        if job.status != JobStatus.RUNNING or run_dir is None:
            raise ClusterError(
                f"scale: {id} is {job.status.value}: only a run that is RUNNING can be scaled"
            )
        asking = self._start(["scale", run_dir, *sizes], job.runtime_env or {}, {})
        try:
            ended = self.wait(asking, SCALE_S)
        except ClusterError:  # it must not scale when nobody thinks of it any more
            self._ask(self._client.stop_job, asking)
            raise
        print(last_word(self.logs(asking)) or ended.message)
        return EXIT_STATUS[ended.status]

    def about(self, id: str) -> JobDetails:
        """Ask what has become of a job."""
        if not ID.fullmatch(id):
            raise ClusterError(f"{self.address}: Job {id!r} does not exist: no id is such a word")
        return self._ask(self._client.get_job_info, id)

    def runs(self) -> list[JobDetails]:
        """List every job that trains, or has trained, the oldest first."""
        jobs = self._ask(self._client.list_jobs)
        runs = (job for job in jobs if RUN_DIR in (job.metadata or {}))
        return sorted(runs, key=lambda job: job.start_time or 0)

    def logs(self, id: str) -> str:
        """Fetch the whole log of a job."""
        self.about(id)
        return self._ask(self._client.get_job_logs, id, transfer=True)

    def follow(self, id: str) -> int:
        """Print the job's log until it ends; return the exit status. Ctrl-C leaves it alone."""
        self.about(id)
        again = f"`async-opd logs {id} --follow --address {self.address}` goes on with its log"
        try:
            with self._asking(f"; the job may go on: {again}"):
                asyncio.run(self._print_log(id))
            ended = self.wait(id)
        except KeyboardInterrupt:
            say(
                f"\nleft {id}, which goes on; {again}, and with stop in place of logs ends it",
                sys.stderr,
            )
            return 130
        say(f"{id} {ended.status.value}", sys.stderr)
        return EXIT_STATUS[ended.status]

    def stop(self, id: str) -> JobDetails:
        """End the job as Ctrl-C would, with a checkpoint; return what became of it."""
        self.about(id)
        self._ask(self._client.stop_job, id)
        return self.wait(id, STOP_S + REQUEST_S)

    def wait(self, id: str, within_s: float = math.inf) -> JobDetails:
        """Wait for the end of a job, at most so many seconds."""
        until = time.monotonic() + within_s
        while not (job := self.about(id)).status.is_terminal():
            if time.monotonic() > until:
                raise ClusterError(
                    f"{self.address}: {id} is still {job.status.value} after {within_s:g} s; its"
                    f" log: `async-opd logs {id} --address {self.address}`"
                )
            time.sleep(POLL_S)
        return job

    def _start(
        self, words: list[str], environment: dict[str, Any], metadata: dict[str, str]
    ) -> str:
        start = partial(
            self._client.submit_job,
            entrypoint=shlex.join(["python", "-m", "async_opd", *words]),
            runtime_env=environment,
            metadata=metadata,
        )
        return self._ask(start, transfer=True)

    def _ask(self, request: Callable[..., T], *args: Any, transfer: bool = False) -> T:
        """The answer to a request, at most REQUEST_S later, or TRANSFER_S where files or a log
        travel."""
        within_s = TRANSFER_S if transfer else REQUEST_S
        with self._asking():
            return asyncio.run(aside(within_s, self.address, request, *args))

    async def _print_log(self, id: str) -> None:
        async for lines in self._client.tail_job_logs(id):
            print(lines, end="", flush=True)

    @contextmanager
    def _asking(self, behind: str = "") -> Iterator[None]:
        """Turn Ray's errors, of which some are pages, into one line, and what it makes of an answer
        that is no dashboard's."""
        with foreign(f"{self.address}: not as a Ray dashboard answers", ClusterError):
            try:
                with _quietly():
                    yield
            except AuthenticationError as e:
                raise ClusterError(
                    f"{self.address}: refuses the token found here; {HOW_TO_GET_A_TOKEN}"
                ) from e
            except TimedOut as e:
                raise ClusterError(f"{e}{behind}") from e
            except (RuntimeError, OSError) as e:
                # RuntimeError: what Ray makes of an HTTP status
                last = str(e).strip().rpartition("\n")[2] or type(e).__name__
                raise ClusterError(f"{self.address}: {last}{behind}") from e


def stop_s(last_save_s: float) -> int:
    """Seconds from SIGTERM to SIGKILL of a run whose `timeout.last_save_s` is that."""
    return max(STOP_S, math.ceil(last_save_s) + END_S)


def _quietly() -> AbstractContextManager[None]:
    """Keep Ray from telling of the packages that it makes and sends."""
    return log_level(logging.WARNING, *logging.getLogger("ray").handlers)


def last_word(text: str) -> str:
    """Pick from a log the last line that async-opd said of itself, else the last: libraries have
    last words, too."""
    lines = text.strip().splitlines()
    return ([line for line in lines if line.startswith("async-opd: ")] or lines or [""])[-1]


def _this_package() -> list[str]:
    """Name the folders of async_opd as it is here, and of its metadata, by which vLLM finds the
    plug-in: no node need have it installed."""
    installed = distribution("async-opd-ray")
    # in *.dist-info or *.egg-info
    plugins = next(file for file in installed.files or () if file.name == "entry_points.txt")
    metadata = Path(str(installed.locate_file(plugins))).resolve().parent
    return [str(Path(async_opd.__file__).parent), str(metadata)]


@contextmanager
def packed(folder: Path, needed: Mapping[str, Path]) -> Iterator[Path]:
    """Pack `folder`, less what git ignores and what must not travel, into an archive, and tell of
    that. Raises ConfigError where a file of what is `needed`, by the settings that name it, is left
    out, and where it is more than Ray takes."""
    with refused(f"--working-dir {folder}"):
        left = left_behind(folder)
    if left:
        say(in_words(left), sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch, "working_dir.zip")
        with _quietly(), foreign(f"--working-dir {folder}", ConfigError):
            create_package(
                str(folder), package, include_gitignore=True, excludes=LEFT_OUT + excluded(left)
            )
        with zipfile.ZipFile(package) as archive:
            inside = set(archive.namelist())
        for key, path in needed.items():
            files = path.rglob("*") if path.is_dir() else [path]
            for file in (f.relative_to(folder) for f in files if f.is_file()):
                if file.as_posix() not in inside:
                    raise ConfigError(
                        f"{key}: {file} would be missing: a .gitignore, a .rayignore, or one of"
                        f" {', '.join(LEFT_OUT)} keeps it out of the job, or it is left behind as a"
                        " secret or a link; or name an absolute path of the cluster"
                    )
        size = package.stat().st_size
        if size >= GCS_STORAGE_MAX_SIZE:
            raise ConfigError(
                f"--working-dir {folder}: {size >> 20} MiB packed, of which Ray takes"
                f" {GCS_STORAGE_MAX_SIZE >> 20}: name what the job does not need in .rayignore"
                " there"
            )
        yield package
