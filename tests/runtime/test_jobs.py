"""What is refused on the way to a cluster, and what is said of a job, without a cluster."""

import contextlib
import copy
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from ray.job_submission import JobStatus

from async_opd.cli import stop
from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.config.load import load
from async_opd.config.sections import TimeoutConfig
from async_opd.driver.checkpoints import Checkpoints, RunState
from async_opd.runtime import jobs
from async_opd.runtime.dashboard import _token, dashboard_url, token_for
from async_opd.telemetry.console import lines


@pytest.fixture(autouse=True)
def a_home_without_a_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_AUTH_MODE",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jobs, "POLL_S", 0.01)


def refusal(capsys, *argv: str, status: int = 2) -> str:
    assert main(list(argv)) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.fixture
def dashboard():
    """An HTTP server in a dashboard's place: its address, and its answers by path, each a status
    and a body."""
    answers = {"/api/authentication_mode": (200, {"authentication_mode": "token"})}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answers.setdefault("tokens", []).append(self.headers.get("Authorization"))
            status, body = answers.get(self.path, (404, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def test_a_cluster_that_is_not_there_is_one_line(capsys):
    line = refusal(capsys, "status", "--address", "http://127.0.0.1:1")
    assert (
        "http://127.0.0.1:1: no Ray dashboard answers within 10 s: [Errno 111] Connection refused;"
        " is it up" in line
    )


def test_a_server_that_does_not_answer_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr("async_opd.runtime.dashboard.ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = refusal(capsys, "status", "--address", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "no Ray dashboard answers within 0.2 s: timed out" in line


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((404, {}), "answers 404 Not Found, as no Ray dashboard of 2.60 does"),
        ((200, b"<html>"), "answers, but not as a Ray dashboard does"),
        ((200, {"result": 1}), "answers, but not as a Ray dashboard does"),
    ],
)
def test_another_server_is_none(answer, says, dashboard, capsys):
    address, answers = dashboard
    answers["/api/authentication_mode"] = answer
    assert says in refusal(capsys, "status", "--address", address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8265", "ray://head:10001", "auto", "http://", "http://a:b", "http://[::1"],
)
def test_an_address_that_is_no_dashboards_url_is_refused(address, monkeypatch, capsys):
    must = (
        f"{address!r}: must be the URL of a Ray dashboard, such as --address http://127.0.0.1:8265"
    )
    assert f"--address = {must}" in refusal(capsys, "status", "--address", address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert f"RAY_ADDRESS = {must}" in refusal(capsys, "status")


def test_what_is_given_goes_before_the_environment(monkeypatch):
    assert dashboard_url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1")
    assert dashboard_url(None) == "http://a:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://b:2/")
    assert dashboard_url(None) == "http://b:2"
    assert dashboard_url("https://c") == "https://c"


def test_without_a_token_a_cluster_that_asks_for_one_gets_nothing(dashboard, capsys):
    address, answers = dashboard
    line = refusal(capsys, "status", "--address", address)
    assert (
        "asks for a token, and there is none here; `ray get-auth-token` on its head node prints"
        in line
    )
    assert answers["tokens"] == [None]


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_says_where_the_right_one_is(
    status, dashboard, monkeypatch, capsys
):
    address, answers = dashboard
    answers["/api/version"] = status, b"Unauthorized: or so"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    line = refusal(capsys, "status", "--address", address)
    assert "refuses the token found here; `ray get-auth-token` on its head node" in line
    assert answers["tokens"] == [None, "Bearer wrong"]


def test_the_token_is_found_where_ray_looks_for_it(monkeypatch, tmp_path):
    assert _token() is None
    home = tmp_path / "home" / ".ray" / "auth_token"
    home.parent.mkdir(parents=True)
    home.write_text("of the home\n")
    assert _token() == "of the home"
    (tmp_path / "token").write_text("of a file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert _token() == "of a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert _token() == "given"


def answers_with(mode: str, monkeypatch) -> None:
    answer = json.dumps({"authentication_mode": mode}).encode()
    monkeypatch.setattr(
        "async_opd.runtime.dashboard.urlopen", lambda url, timeout: io.BytesIO(answer)
    )


@pytest.mark.parametrize(
    "address", ["https://10.0.0.5:8265", "http://10.0.0.5:8265", "https://8.8.8.8"]
)
def test_a_cluster_elsewhere_without_token_authentication_is_refused_with_the_fix(
    address, monkeypatch, capsys
):
    answers_with("disabled", monkeypatch)
    line = refusal(
        capsys,
        "submit",
        str(DEMO),
        "run.dir=/shared/a",
        "--working-dir",
        str(DEMO.parent),
        "--address",
        address,
    )
    assert (
        "the cluster has no token authentication, so anyone can run code on it: set"
        " RAY_AUTH_MODE=token and" in line
    )


def test_a_token_never_crosses_the_open_net_in_clear(monkeypatch, capsys):
    monkeypatch.setattr("async_opd.runtime.dashboard.urlopen", None)  # nothing is asked
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    line = refusal(capsys, "status", "--address", "http://8.8.8.8:8265")
    assert (
        "http would send the token in clear through the open net: use https, or a tunnel (ssh -L"
        " 8265:localhost:8265" in line
    )


@pytest.mark.parametrize(
    ("address", "mode", "token", "warned"),
    [
        ("http://127.0.0.1:8265", "disabled", None, False),
        ("http://127.0.0.1:8265", "token", "secret", False),
        ("https://8.8.8.8:8265", "token", "secret", False),
        ("http://10.0.0.5:8265", "token", "secret", True),
    ],
)
def test_a_token_goes_where_it_is_asked_for_and_a_private_network_is_warned_of(
    address, mode, token, warned, monkeypatch, capsys
):
    answers_with(mode, monkeypatch)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert token_for(address) == token
    assert (
        "warning: http://10.0.0.5:8265 gets the token in clear" in capsys.readouterr().err
    ) == warned


class Client:
    """A cluster with the jobs in `jobs_by_id`: Ray's client, as far as it is used."""

    jobs_by_id: dict[str, SimpleNamespace]

    def __init__(self, headers=None):
        self.headers = headers

    def get_job_info(self, id):
        if id not in self.jobs_by_id:
            raise RuntimeError(f"Request failed with status code 404: Job {id} does not exist.")
        return self.jobs_by_id[id]

    def list_jobs(self):
        return list(self.jobs_by_id.values())

    def get_job_logs(self, id):
        return self.jobs_by_id[id].log

    async def tail_job_logs(self, id):
        for line in self.jobs_by_id[id].log.splitlines(keepends=True):
            yield line
        if error := self.jobs_by_id[id].error:
            raise error

    def stop_job(self, id):
        self.jobs_by_id[id].status = JobStatus.STOPPED

    def submit_job(self, *, entrypoint, runtime_env, metadata):
        self.jobs_by_id["raysubmit_new"] = job(
            "raysubmit_new", "SUCCEEDED", "starting\ngenerators: 1 -> 2\n", metadata
        )
        self.jobs_by_id["raysubmit_new"].asked = entrypoint, runtime_env
        return "raysubmit_new"


def job(
    id: str, status: str, log: str = "", metadata: dict | None = None, error=None
) -> SimpleNamespace:
    return SimpleNamespace(
        submission_id=id,
        status=JobStatus(status),
        log=log,
        error=error,
        message="why\nit failed",
        entrypoint="x",
        metadata={jobs.RUN_DIR: "/shared/a"} if metadata is None else metadata,
        start_time=60_000,
        end_time=240_000,
        runtime_env={"env_vars": {"A": "1"}},
    )


@pytest.fixture
def cluster(monkeypatch):
    """Puts jobs on the cluster at the default address."""
    answers_with("disabled", monkeypatch)
    monkeypatch.setattr(jobs, "JobSubmissionClient", Client)
    monkeypatch.setattr(Client, "jobs_by_id", {}, raising=False)

    def has(*present: SimpleNamespace) -> dict[str, SimpleNamespace]:
        Client.jobs_by_id.update({one.submission_id: one for one in present})
        return Client.jobs_by_id

    return has


def test_what_ray_reads_of_the_process_is_put_back(cluster, monkeypatch):
    handlers = logging.getLogger("ray").handlers

    def said_to_ray() -> tuple:
        return os.environ.get("RAY_API_SERVER_ADDRESS"), [handler.level for handler in handlers]

    read = []
    monkeypatch.setattr(Client, "__init__", lambda self, headers: read.append(said_to_ray()))
    before = said_to_ray()
    cluster()
    assert main(["status"]) == 0
    assert said_to_ray() == before
    assert read == [("http://127.0.0.1:8265", [logging.WARNING for _ in handlers])]


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 130)])
def test_following_ends_with_the_status_of_the_job(status, code, cluster, capsys):
    cluster(job("raysubmit_a", status, "one\ntwo\n"))
    assert main(["logs", "raysubmit_a", "--follow"]) == code
    assert capsys.readouterr() == ("one\ntwo\n", f"raysubmit_a {status}\n")


def test_ctrl_c_leaves_the_job_and_says_how_to_get_back(cluster, capsys):
    jobs_by_id = cluster(job("raysubmit_a", "RUNNING", "one\n", error=KeyboardInterrupt()))
    assert main(["logs", "raysubmit_a", "--follow"]) == 130
    out, err = capsys.readouterr()
    assert out == "one\n" and "left raysubmit_a, which goes on" in err
    assert (
        "`async-opd logs raysubmit_a --follow --address http://127.0.0.1:8265` goes on with its log"
        in err
    )
    assert jobs_by_id["raysubmit_a"].status == "RUNNING"


def test_a_connection_that_breaks_says_that_the_job_may_go_on(cluster, capsys):
    cluster(job("raysubmit_a", "RUNNING", error=RuntimeError("WebSocket connection closed")))
    line = refusal(capsys, "logs", "raysubmit_a", "--follow")
    assert (
        "WebSocket connection closed; the job may go on: `async-opd logs raysubmit_a --follow"
        " --address" in line
    )


@pytest.mark.parametrize(
    "command", [["status"], ["logs"], ["logs", "--follow"], ["stop"], ["scale", "generators=2"]]
)
def test_an_unknown_job_is_one_line(command, cluster, monkeypatch, capsys):
    monkeypatch.setattr(Client, "stop_job", Client.get_job_info)
    monkeypatch.setattr(Client, "get_job_logs", Client.get_job_info)
    monkeypatch.setattr(Client, "tail_job_logs", Client.get_job_info)
    name, *rest = command
    assert "Job raysubmit_b does not exist" in refusal(capsys, name, "raysubmit_b", *rest)


def test_status_lists_the_runs_and_says_why_one_failed(cluster, capsys):
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no run has been submitted to http://127.0.0.1:8265\n"
    cluster(
        job("raysubmit_a", "FAILED"),
        job("raysubmit_b", "RUNNING"),
        job("raysubmit_other", "RUNNING", metadata={}),
    )
    assert main(["status"]) == 0
    assert (
        capsys.readouterr().out
        == "raysubmit_a  FAILED        3.0 min  /shared/a\n  it failed\nraysubmit_b  RUNNING      "
        " 3.0 min  /shared/a\n"
    )
    assert main(["status", "raysubmit_b"]) == 0
    assert capsys.readouterr().out == "raysubmit_b  RUNNING       3.0 min  /shared/a\n"


def test_logs_are_printed_as_they_are(cluster, capsys):
    cluster(job("raysubmit_a", "RUNNING", "one\ntwo"))
    assert main(["logs", "raysubmit_a"]) == 0
    assert capsys.readouterr().out == "one\ntwo"


def test_stop_says_what_was_saved_and_how_to_go_on(cluster, capsys):
    event = {"time": 0.0, "who": "checkpoint", "what": "saved", "why": "step 6"}
    saved, not_saved = (
        lines.event_line(event),
        lines.event_line(event | {"what": "not saved", "why": "the disk is full"}),
    )
    cluster(
        job(
            "raysubmit_a",
            "RUNNING",
            f"{saved}\nstep 7\n{not_saved}\nasync-opd: interrupted\nnoise of a library\n",
        )
    )
    assert main(["stop", "raysubmit_a"]) == 0
    assert (
        capsys.readouterr().out
        == f"{not_saved}\nraysubmit_a STOPPED: async-opd: interrupted\nasync-opd submit --resume"
        " /shared/a --address http://127.0.0.1:8265\n"
    )
    last_save_s = TimeoutConfig().last_save_s
    assert f"timeout.last_save_s, {last_save_s:g} s by\ndefault;" in stop.__doc__
    assert f"{jobs.END_S} s later is killed" in stop.__doc__


@pytest.mark.parametrize("last_save_s", [0.5, 18, 18.5, 600, 10**6])
def test_a_job_is_left_the_time_of_its_last_save_before_it_is_killed(last_save_s):
    assert jobs.stop_s(last_save_s) >= max(60, last_save_s + jobs.END_S)


def test_scale_asks_by_a_job_beside_the_run_with_its_environment(cluster, capsys):
    jobs_by_id = cluster(job("raysubmit_a", "RUNNING"), job("raysubmit_done", "SUCCEEDED"))
    assert main(["scale", "raysubmit_a", "generators=2"]) == 0
    assert capsys.readouterr().out == "generators: 1 -> 2\n"
    asked = "python -m async_opd scale /shared/a generators=2", {"env_vars": {"A": "1"}}
    assert jobs_by_id["raysubmit_new"].asked == asked
    assert "only a run that is RUNNING can be scaled" in refusal(
        capsys, "scale", "raysubmit_done", "generators=2"
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with a config of its own data."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("{}\n")
    (folder / "a.toml").write_text(DEMO.read_text().replace("toy:train", "data/train.jsonl"))
    monkeypatch.chdir(folder)
    return folder


SUBMIT = ["submit", "a.toml", "run.dir=/shared/runs/a"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "submit: needs a config, a TOML file, or --resume RUN"),
        (["a.toml"], "run.dir = 'runs/demo': must be absolute, on a disk that every node sees"),
        (["b.toml"], "config b.toml: no such file"),
        ([*SUBMIT[1:], "learner.lr=-1"], "learner.lr = -1"),
        ([*SUBMIT[1:], "data.path=../train.jsonl"], "data.path = '../train.jsonl': no such file"),
        (["../a.toml", "run.dir=/shared/a"], "is outside of the working directory"),
        (
            [*SUBMIT[1:], "eval.path=../outside.jsonl"],
            "outside.jsonl is outside of the working directory",
        ),
        ([*SUBMIT[1:], "--working-dir", "nowhere"], "--working-dir nowhere: no such folder"),
        (["--resume", "runs/a"], "--resume runs/a: must be absolute"),
    ],
)
def test_what_cannot_be_submitted_is_refused_before_the_cluster_is_asked(
    words, says, project, monkeypatch, capsys
):
    (project.parent / "outside.jsonl").write_text("{}\n")
    monkeypatch.setattr(jobs, "Jobs", None)
    assert says in refusal(capsys, "submit", *words)


def test_a_run_that_can_be_seen_from_here_is_checked_here(project, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "Jobs", None)
    assert "RunMissing: " in refusal(capsys, "submit", "--resume", str(project))


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run of the project's that was stopped after step 3, on a disk that is seen from here
    too."""
    run_dir = tmp_path / "shared"
    run_dir.mkdir()
    config = load(DEMO, ["teacher.model=/cluster/teacher", f"run.dir={run_dir}"], elsewhere=True)
    tree = msgspec.to_builtins(config) | {
        "data": msgspec.to_builtins(config.data) | {"path": "data/train.jsonl"}
    }
    (run_dir / "config.json").write_text(json.dumps(tree))
    checkpoints = Checkpoints(run_dir, keep=1)
    checkpoints.begin(3)
    checkpoints.commit(3, RunState(version=3, position={}, outstanding=[]))
    return run_dir


def test_a_run_is_gone_on_with_in_its_working_directory_wherever_one_stands(
    stopped, project, cluster, monkeypatch, capsys
):
    jobs_by_id = cluster()
    monkeypatch.chdir(project.parent)  # where no data/train.jsonl is
    assert main(["submit", "--resume", str(stopped), "--working-dir", "project", "--no-wait"]) == 0
    assert jobs_by_id["raysubmit_new"].asked[0] == f"python -m async_opd train --resume {stopped}"
    capsys.readouterr()
    assert "data.path = 'data/train.jsonl': no such file" in refusal(
        capsys, "submit", "--resume", str(stopped)
    )


def test_a_run_that_is_gone_on_with_misses_a_file_that_git_ignores_too(
    stopped, project, cluster, capsys
):
    (project / ".gitignore").write_text("*.jsonl\n")
    line = refusal(capsys, "submit", "--resume", str(stopped))
    assert (
        "data.path = 'data/train.jsonl': data/train.jsonl would be missing: a .gitignore, a"
        " .rayignore" in line
    )


def test_a_file_that_git_ignores_is_missed_before_the_job_misses_it(project, cluster, capsys):
    (project / ".gitignore").write_text("*.jsonl\n")
    line = refusal(capsys, *SUBMIT)
    assert (
        "data.path = 'data/train.jsonl': data/train.jsonl would be missing: a .gitignore, a"
        " .rayignore" in line
    )


def test_more_than_ray_takes_is_refused(project, cluster, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "GCS_STORAGE_MAX_SIZE", 100)
    assert "MiB packed, of which Ray takes" in refusal(capsys, *SUBMIT)


@pytest.mark.parametrize(
    ("words", "trains"),
    [
        (SUBMIT[1:], "a.toml run.dir=/shared/runs/a"),
        (
            [*SUBMIT[1:], "data.path=/not here.jsonl"],
            "a.toml run.dir=/shared/runs/a 'data.path=/not here.jsonl'",
        ),
        (["--resume", "/shared/runs/a", "run.steps=9"], "--resume /shared/runs/a run.steps=9"),
    ],
)
def test_a_job_trains_in_a_copy_of_the_working_directory_with_this_package(
    words, trains, project, cluster, monkeypatch, capsys
):
    inside = {}

    def submit_job(self, *, entrypoint, runtime_env, metadata):
        inside.update(
            names=set(zipfile.ZipFile(runtime_env["working_dir"]).namelist()), metadata=metadata
        )
        return Client.SUBMIT(
            self, entrypoint=entrypoint, runtime_env=runtime_env, metadata=metadata
        )

    monkeypatch.setattr(Client, "SUBMIT", Client.submit_job, raising=False)
    monkeypatch.setattr(Client, "submit_job", submit_job)
    for left_out in ("runs", ".venv", ".git"):
        (project / left_out).mkdir()
        (project / left_out / "file").write_text("")
    jobs_by_id = cluster()
    assert main(["submit", *words, "--no-wait"]) == 0
    assert capsys.readouterr().out == "raysubmit_new\n"
    entrypoint, environment = jobs_by_id["raysubmit_new"].asked
    assert entrypoint == f"python -m async_opd train {trains}"
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    package, metadata = map(Path, environment["py_modules"])
    # by which vLLM finds it
    assert (package / "cli" / "main.py").is_file() and (metadata / "entry_points.txt").is_file()
    assert {name for name in inside["names"] if not name.endswith("/")} == {
        "a.toml",
        "data/train.jsonl",
    }
    assert inside["metadata"] == {jobs.RUN_DIR: "/shared/runs/a"}


def test_submit_follows_the_job_it_started(project, cluster, capsys):
    cluster()
    assert main(SUBMIT) == 0
    out, err = capsys.readouterr()
    assert (
        out == "raysubmit_new\nstarting\ngenerators: 1 -> 2\n"
        and err == "raysubmit_new SUCCEEDED\n"
    )


# a script's background jobs ignore Ctrl-C
@pytest.mark.parametrize("sigint", ["default_int_handler", "SIG_IGN"])
@pytest.mark.parametrize(
    ("signals", "printed"), [(1, ["step", "saved", "interrupted"]), (2, ["interrupted"])]
)
def test_sigterm_is_ctrl_c_and_lets_the_step_at_hand_finish(sigint, signals, printed):
    code = f"""
import asyncio, signal
signal.signal(signal.SIGINT, signal.{sigint})
from async_opd.launch.signals import interrupted_by_signal

async def step():
    await asyncio.sleep(0.25)
    print("step", flush=True)

async def run():
    for n in range({signals}):
        asyncio.get_running_loop().call_later(0.05 + 0.05 * n, signal.raise_signal, signal.SIGTERM)
    at_work = asyncio.ensure_future(step())
    with interrupted_by_signal():
        try:
            await asyncio.shield(at_work)
        except asyncio.CancelledError:
            await asyncio.shield(at_work)
            print("saved", flush=True)
            raise

try:
    asyncio.run(run())
except (KeyboardInterrupt, asyncio.CancelledError):
    print("interrupted")
"""
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (completed.stdout.split(), completed.returncode) == (printed, 0), completed.stderr


@pytest.fixture
def head(monkeypatch):
    """A head's dashboard with one job: its address, what it was asked, and where it hangs: what it
    sends for a path, piece by piece, for ever."""
    asked, hangs = [], {}
    details = {"type": "SUBMISSION", "submission_id": "raysubmit_a", "entrypoint": "x"}
    details |= {"status": "RUNNING", "metadata": {jobs.RUN_DIR: "/shared/a"}}
    answers = {
        "GET /api/authentication_mode": {"authentication_mode": "token"},
        "GET /api/version": {"ray_version": "2.60.0"},
        "GET /api/jobs/raysubmit_a": details,
        "GET /api/jobs/": [details],
        "GET /api/jobs/raysubmit_a/logs": {"logs": "one\n"},
        "POST /api/jobs/raysubmit_a/stop": {"stopped": True},
        "POST /api/jobs/": {"job_id": "raysubmit_a", "submission_id": "raysubmit_a"},
    }
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            asked.append((f"{self.command} {self.path}", dict(self.headers)))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            for path, piece in hangs.items():
                while self.path.startswith(path) and not ended.wait(0.02):
                    self.wfile.write(piece)
            answer = answers.get(f"{self.command} {self.path}")
            if self.path.startswith("/api/packages/"):
                answer = {"is": "there"}
            if ended.is_set():
                return
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer or "Job ... does not exist").encode())

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *_):
            pass

        def handle(self):
            with contextlib.suppress(OSError):  # who asked has left
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    yield f"http://127.0.0.1:{server.server_port}", asked, hangs
    ended.set()
    server.shutdown()
    server.server_close()


DRIBBLE = b"HTTP/1.1 200 OK\r\nX: y\r\n"  # a header at a time


@pytest.mark.parametrize("piece", [b"", DRIBBLE], ids=["silent", "dribbles"])
@pytest.mark.parametrize(
    ("hangs", "words"),
    [
        ("/api/authentication_mode", "status"),
        ("/api/version", "status"),
        ("/api/jobs/", "status"),
        ("/api/jobs/raysubmit_a", "status raysubmit_a"),
        ("/api/jobs/raysubmit_a", "logs raysubmit_a --follow"),
        ("/api/jobs/raysubmit_a/logs", "logs raysubmit_a"),
        ("/api/jobs/raysubmit_a/logs", "logs raysubmit_a --follow"),
        ("/api/jobs/raysubmit_a/stop", "stop raysubmit_a"),
        ("/api/jobs/raysubmit_a", "scale raysubmit_a generators=2"),
        ("/api/packages/", "submit a.toml run.dir=/shared/runs/a"),
    ],
)
def test_every_request_has_a_bound(hangs, words, piece, head, project, monkeypatch, capsys):
    address, _, hanging = head
    hanging[hangs] = piece
    for bound in ("REQUEST_S", "TRANSFER_S"):
        monkeypatch.setattr(jobs, bound, 0.3)
    monkeypatch.setattr(jobs, "LOST_LOGS", 1)
    monkeypatch.setattr("async_opd.runtime.dashboard.ANSWER_S", 0.2)
    began = time.monotonic()
    line = refusal(capsys, *words.split(), "--address", address)
    assert time.monotonic() - began < 5
    assert re.search(r"no answer in 0\.3 s|no Ray dashboard answers within 0\.2 s|got more", line)


def test_what_does_not_end_in_time_is_told_and_a_scale_that_waits_is_called_off(
    head, monkeypatch, capsys
):
    address, asked, _ = head
    for bound in ("SCALE_S", "STOP_S"):
        monkeypatch.setattr(jobs, bound, 0.05)
    monkeypatch.setattr(jobs, "REQUEST_S", 1.0)
    at = ["--address", address]
    line = refusal(capsys, "scale", "raysubmit_a", "generators=2", *at)
    assert "raysubmit_a is still RUNNING after 0.05 s; its log: `async-opd logs ray" in line
    assert [path for path, _ in asked].count("POST /api/jobs/raysubmit_a/stop") == 1
    assert "is still RUNNING after 1.05 s" in refusal(capsys, "stop", "raysubmit_a", *at)


@pytest.mark.parametrize(
    "id",
    ["raysubmit_b", "x/logs/tail", "../jobs/x/logs/tail", "..", "a?b=c", "a#b", "a%2Fb", "a b"],
)
@pytest.mark.parametrize("command", ["logs", "logs --follow", "status", "stop", "scale"])
def test_no_request_can_bring_the_token_into_the_heads_log(command, id, head, capsys):
    """The head logs the headers of a WebSocket that it cannot open, whoever asks for one."""
    address, asked, _ = head
    name, *rest = command.split()
    sizes = ["generators=2"] if name == "scale" else []
    which = f"raysubmit_{id}" if name == "scale" else id
    assert "does not exist" in refusal(capsys, name, which, *sizes, *rest, "--address", address)
    assert {
        path for path, headers in asked if headers.get("Authorization") and "tail" in path
    } == set()
    assert not [headers for _, headers in asked if "Upgrade" in headers]


def test_a_log_is_followed_without_a_websocket(head, monkeypatch, capsys):
    address, asked, _ = head
    said = iter(["one\n", "one\ntw", RuntimeError("torn"), "one\ntwo\n", "one\ntwo\nthree\n"])

    def logs(self, id):
        if isinstance(text := next(said), Exception):
            raise text
        return text

    def about(self, id, of=jobs.JobSubmissionClient.get_job_info):
        job = of(self, id)
        left = len(list(copy.copy(said)))
        return job.model_copy(update={"status": JobStatus.SUCCEEDED}) if left < 2 else job

    monkeypatch.setattr(jobs.JobSubmissionClient, "get_job_logs", logs)
    monkeypatch.setattr(jobs.JobSubmissionClient, "get_job_info", about)
    assert main(["logs", "raysubmit_a", "--follow", "--address", address]) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert not [headers for _, headers in asked if "Upgrade" in headers]


@pytest.mark.parametrize(
    "address",
    [
        *("http://me:secret@127.0.0.1", "http://127.0.0.1?token=secret", "http://127.0.0.1#a"),
        *("ray://me:secret@127.0.0.1:10001", "me:secret@127.0.0.1", "http://me:secret@[::1"),
    ],
)
def test_an_address_holds_no_secret_that_messages_would_tell(address, capsys):
    line = refusal(capsys, "status", "--address", address)
    assert "must be a URL without a user, a ? and a #" in line and "secret" not in line
