"""The script for sbatch, at work between stand-ins that check their arguments."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from tests.tools.cluster_files.recipe import RDMA, RECIPE, ROOT, SETTINGS, rendered
from tests.tools.cluster_files.stand_ins import CORES, SCRIPTS, Refused, sbatch, step

STEP = "--nodes=1 --ntasks=1 --overlap --cpus-per-task=96 --cpu-bind=none --nodelist=two ray start"

RUN = "somebody's runs of $5/run"  # what a shell would take apart


@pytest.fixture
def slurm(tmp_path):
    """The script at work; what the stand-ins say is in the file `said`."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "run.sh"
    script.write_text(rendered("slurm", f"run.dir={tmp_path}/{RUN}"))
    job = sbatch(script.read_text())
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        ["bash", str(script)],
        env=os.environ | paths | job | {"SAID": str(tmp_path / "said")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 20
        while len(said(tmp_path)) < 3:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield job
    finally:  # with its steps, however it has ended
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait(10)
        job.stderr.close()


def said(folder) -> list[str]:
    file = folder / "said"
    return file.read_text().splitlines() if file.exists() else []


def until(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_job_starts_every_node_with_one_token_and_all_cores_and_ends_as_the_run_does(
    slurm, tmp_path
):
    words = sorted(said(tmp_path))
    head = "--head --block --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=127.0.0.1"
    asked = " ".join([str(RECIPE), *SETTINGS, f"run.dir={tmp_path}/{RUN}"])
    assert words == [
        f"-m async_opd train {asked}",
        f"one ray start {head} token secret kills orphans",
        "two ray start --address=10.0.0.1:6379 --block token secret kills orphans",
    ]
    (tmp_path / "said.end").touch()
    assert slurm.wait(10) == 7
    assert list(tmp_path.glob("*/.ray-token-*")) == []
    assert until(lambda: {"one stopped", "two stopped"} <= set(said(tmp_path)))


def test_sigterm_to_the_script_is_the_runs_and_waits_for_its_checkpoint(slurm, tmp_path):
    (token,) = tmp_path.glob("*/.ray-token-7")
    assert token.stat().st_mode & 0o077 == 0
    slurm.send_signal(signal.SIGTERM)
    assert slurm.wait(10) == 130
    assert until(lambda: {"one stopped", "two stopped"} <= set(said(tmp_path)))
    assert said(tmp_path).index("saved") < said(tmp_path).index("one stopped")


@pytest.mark.parametrize("rdma", [None, RDMA])
@pytest.mark.parametrize("gpus", [4, 8])
def test_the_script_is_one_that_bash_and_shellcheck_have_nothing_against(tmp_path, rdma, gpus):
    script = tmp_path / "run.sh"
    script.write_text(rendered("slurm", gpus=gpus, rdma=rdma))
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shellcheck := shutil.which("shellcheck"):
        assert subprocess.run([shellcheck, script], check=False).returncode == 0


def test_a_job_has_its_nodes_whole_with_no_limit_of_the_shell_that_submits_it():
    script = rendered("slurm")
    assert sbatch(script)["SLURM_CPUS_ON_NODE"] == str(CORES)
    directives = set(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE))
    whole = {"--nodes=2", "--gpus-per-node=8", "--exclusive", "--mem=0", "--propagate=NONE"}
    assert whole | {"--mincpus=48", "--signal=B:TERM@180"} <= directives
    assert "--signal=B:TERM@642" in rendered("slurm", "timeout.last_save_s=600")


def test_rdma_needs_memory_that_may_be_locked_and_says_so_before_anything_starts(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(rendered("slurm", f"run.dir={tmp_path}/run", rdma=RDMA))
    limited = ["bash", "-c", f"ulimit -l 64; exec bash {script}"]
    ended = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "--rdma: 64 KiB of memory may be locked here" in ended.stderr
    assert list(tmp_path.iterdir()) == [script]
    assert "memlock" not in rendered("slurm").lower() and "ulimit -l" not in rendered("slurm")


@pytest.mark.parametrize(
    ("change", "to", "refused"),
    [
        ("--cpus-per-task=96 ", "", "1 of 96 cores"),
        ("--cpus-per-task=96", "--cpus-per-task=48", "48 of 96 cores"),
        ("--cpus-per-task=96", "--cpus-per-task=97", "More processors"),
        ("--cpus-per-task", "--cpu-per-task", "unrecognized option '--cpu-per-task=96'"),
        ("--cpu-bind=none ", "", "bound"),
        ("--overlap ", "", "waits"),
        ("--nodes=1", "--nodes=2", "2 nodes and 1 tasks"),
        ("=two", "=three", "three"),
        (" ray start", "", "No command"),
    ],
)
def test_the_stand_in_for_srun_refuses_what_srun_does(change, to, refused):
    assert step(STEP.split(), CORES) == ("two", ["ray", "start"])
    with pytest.raises(Refused, match=re.escape(refused)):
        step(STEP.replace(change, to).split(), CORES)
