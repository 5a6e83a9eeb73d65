"""Runs as jobs of a Ray cluster, by way of its dashboard: submitted, followed, scaled and
stopped."""

import asyncio
import ipaddress
import json
import logging
import os
import shlex
import socket
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPException
from importlib.metadata import distribution
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import aiohttp
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import async_opd
from async_opd.core.errors import ClusterError, ConfigError
from async_opd.core.printing import say
from async_opd.core.process_wide import environment, log_level

DEFAULT = "http://127.0.0.1:8265"
ANSWER_S = 10.0  # within which a dashboard answers
POLL_S = 1.0
# from SIGTERM to SIGKILL; Ray's 3 s would cut off train.INTERRUPT_S and the end of the actors
STOP_S = 60
# Of the working directory, besides what git ignores.
LEFT_OUT = ["/.git", ".venv", "venv", "__pycache__", "/runs", "/wandb"]
EXIT_STATUS = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: 130}
RUN_DIR = "async_opd_run_dir"  # in the metadata of a job that trains


class Jobs:
    """The jobs of the cluster whose dashboard is at an address. Everything here raises ClusterError
    for what the cluster, or the way to it, refuses."""

    def __init__(self, address: str | None = None):
        """`address`: absent, that of Ray's environment variables, or of this machine."""
        self.address = _url(address)
        token = _token_for(self.address)
        # Ray takes its environment before what it is given.
        with self._asking(), environment(RAY_API_SERVER_ADDRESS=self.address):
            self._client = JobSubmissionClient(
                headers={"Authorization": f"Bearer {token}"} if token else None
            )

    def submit(self, words: list[str], run_dir: str, package: Path) -> str:
        """Start `async-opd WORDS` with the files of `package` as its working directory; its id."""
        environment = {
            "working_dir": str(package),
            "py_modules": _this_package(),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
        }
        return self._start(words, environment, {RUN_DIR: run_dir})

    def scale(self, id: str, sizes: list[str]) -> int:
        """Ask the running job for other pool sizes and print its answer; the exit status. The
        question is a job of its own beside it, because RUN may lie on a disk that only the cluster
        sees."""
        found = self.about(id)
        if found.status != JobStatus.RUNNING or RUN_DIR not in (found.metadata or {}):
            raise ClusterError(
                f"scale: {id} is {found.status.value}: only a run that is RUNNING can be scaled"
            )
        asking = self._start(["scale", found.metadata[RUN_DIR], *sizes], found.runtime_env, {})
        ended = self.wait(asking)
        print(last_word(self.logs(asking)) or ended.message)
        return EXIT_STATUS[ended.status]

    def about(self, id: str) -> JobDetails:
        with self._asking():
            return self._client.get_job_info(id)

    def runs(self) -> list[JobDetails]:
        """Every job that trains, or has trained, the oldest first."""
        with self._asking():
            found = [job for job in self._client.list_jobs() if RUN_DIR in (job.metadata or {})]
        return sorted(found, key=lambda job: job.start_time or 0)

    def logs(self, id: str) -> str:
        with self._asking():
            return self._client.get_job_logs(id)

    def follow(self, id: str) -> int:
        """Print the job's log until it ends; the exit status. Ctrl-C leaves it alone."""
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
        """End the job as Ctrl-C would, with a checkpoint; what became of it."""
        with self._asking():
            self._client.stop_job(id)
        return self.wait(id)

    def wait(self, id: str) -> JobDetails:
        while not (found := self.about(id)).status.is_terminal():
            time.sleep(POLL_S)
        return found

    def _start(self, words: list[str], environment: dict, metadata: dict[str, str]) -> str:
        entrypoint = shlex.join(["python", "-m", "async_opd", *words])
        with self._asking():
            return self._client.submit_job(
                entrypoint=entrypoint, runtime_env=environment, metadata=metadata
            )

    async def _print_log(self, id: str) -> None:
        async for lines in self._client.tail_job_logs(id):
            print(lines, end="", flush=True)

    @contextmanager
    def _asking(self, behind: str = "") -> Iterator[None]:
        """Ray's errors, of which some are pages, as one line."""
        try:
            with _quietly():
                yield
        except AuthenticationError as e:
            raise ClusterError(
                f"{self.address}: refuses the token found here; {HOW_TO_GET_A_TOKEN}"
            ) from e
        except (RuntimeError, OSError, aiohttp.ClientError) as e:
            # RuntimeError: what Ray makes of an HTTP status
            last = str(e).strip().rpartition("\n")[2] or type(e).__name__
            raise ClusterError(f"{self.address}: {last}{behind}") from e


def _quietly() -> AbstractContextManager[None]:
    """Ray says nothing of the packages that it makes and sends."""
    return log_level(logging.WARNING, *logging.getLogger("ray").handlers)


def last_word(text: str) -> str:
    """Of a log: the last line that async-opd said of itself, else the last: libraries have their
    own last words."""
    lines = text.strip().splitlines()
    return ([line for line in lines if line.startswith("async-opd: ")] or lines or [""])[-1]


HOW_TO_GET_A_TOKEN = (
    "`ray get-auth-token` on its head node prints the one it asks for: put it into RAY_AUTH_TOKEN,"
    " or ~/.ray/auth_token"
)
TUNNEL = (
    "a tunnel (ssh -L 8265:localhost:8265 HEAD, or kubectl port-forward) and --address"
    " http://127.0.0.1:8265"
)


def _url(given: str | None) -> str:
    """Of the dashboard. An address of Ray's own protocol is refused: nothing bounds the wait for
    its answer."""
    named = {"--address": given} | {
        name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    }
    name, address = next(
        ((name, address) for name, address in named.items() if address), ("", DEFAULT)
    )
    try:
        url = urlsplit(address)
        right = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        right = False
    if not right:
        raise ClusterError(
            f"{name} = {address!r}: must be the URL of a Ray dashboard, such as --address {DEFAULT}"
        )
    return address.rstrip("/")


def _token_for(address: str) -> str | None:
    """The token for the cluster at `address`, if it asks for one. Whoever reaches a dashboard runs
    what he likes on its cluster, and whoever reads a token reaches it: so one that is not local
    must ask for it, and get it unread."""
    url = urlsplit(address)
    reached = _resolved(address, url.hostname)
    local = all(ip.is_loopback for ip in reached)
    if url.scheme == "http" and not all(ip.is_private for ip in reached):
        clear = "http would send the token in clear through the open net"
        raise ClusterError(f"{address}: {clear}: use https, or {TUNNEL}")
    if _authentication(address) != "token":
        if local:
            return None
        fix = (
            "set RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN on all of its nodes before `ray start`"
        )
        raise ClusterError(
            f"{address}: the cluster has no token authentication, so anyone can run code on it:"
            f" {fix}"
        )
    token = _token()
    if token is None:
        raise ClusterError(
            f"{address}: asks for a token, and there is none here; {HOW_TO_GET_A_TOKEN}"
        )
    if url.scheme == "http" and not local:
        clear = f"{address} gets the token in clear"
        say(f"warning: {clear}; unless you trust this network, use https or {TUNNEL}", sys.stderr)
    return token


def _resolved(address: str, host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        return [
            ipaddress.ip_address(found[4][0].partition("%")[0])
            for found in socket.getaddrinfo(host, None)
        ]
    except OSError as e:
        raise ClusterError(f"{address}: {host} is unknown here: {e.strerror}") from e


def _authentication(address: str) -> str:
    """How the cluster knows its users: "token" or "disabled"."""
    try:
        with urlopen(f"{address}/api/authentication_mode", timeout=ANSWER_S) as answer:
            return json.load(answer)["authentication_mode"]
    except HTTPError as e:
        e.close()
        raise ClusterError(
            f"{address}: answers {e.code} {e.reason}, as no Ray dashboard of 2.60 does"
        ) from e
    except OSError as e:
        why = f"{getattr(e, 'reason', None) or e}"
        started = "is it up (`ray start --head` starts one here), and its port forwarded?"
        raise ClusterError(
            f"{address}: no Ray dashboard answers within {ANSWER_S:g} s: {why}; {started}"
        ) from e
    except (HTTPException, ValueError, KeyError, TypeError) as e:
        raise ClusterError(f"{address}: answers, but not as a Ray dashboard does") from e


def _token() -> str | None:
    """The token where Ray itself looks for it, whatever RAY_AUTH_MODE says: the cluster has asked
    for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _this_package() -> list[str]:
    """async_opd as it is here, and its metadata, by which vLLM finds the plug-in: no node need have
    it installed."""
    own = distribution("async-opd-ray")
    # in *.dist-info or *.egg-info
    plugins = next(file for file in own.files if file.name == "entry_points.txt")
    return [
        str(Path(async_opd.__file__).parent),
        str(Path(own.locate_file(plugins)).resolve().parent),
    ]


@contextmanager
def packed(folder: Path, needed: Mapping[str, Path]) -> Iterator[Path]:
    """`folder` in an archive, less what git ignores. Raises ConfigError where a file of what is
    `needed`, by the settings that name it, is left out, and where it is more than Ray takes."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch, "working_dir.zip")
        with _quietly():
            create_package(str(folder), package, include_gitignore=True, excludes=LEFT_OUT)
        with zipfile.ZipFile(package) as archive:
            inside = set(archive.namelist())
        for key, path in needed.items():
            files = path.rglob("*") if path.is_dir() else [path]
            for file in (f.relative_to(folder) for f in files if f.is_file()):
                if file.as_posix() not in inside:
                    why = (
                        f"a .gitignore, a .rayignore, or one of {', '.join(LEFT_OUT)} keeps it out"
                        " of the job"
                    )
                    raise ConfigError(
                        f"{key}: {file} would be missing: {why}; or name an absolute path of the"
                        " cluster"
                    )
        if package.stat().st_size >= GCS_STORAGE_MAX_SIZE:
            size = (
                f"{package.stat().st_size >> 20} MiB packed, of which Ray takes"
                f" {GCS_STORAGE_MAX_SIZE >> 20}"
            )
            raise ConfigError(
                f"--working-dir {folder}: {size}: name what the job does not need in .rayignore"
                " there"
            )
        yield package
