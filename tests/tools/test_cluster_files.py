"""The files that `async-opd cluster render` makes, each by what it is read by."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

from async_opd.cli.main import main
from async_opd.config.load import load
from async_opd.core.errors import ConfigError
from async_opd.tools.cluster_files import KINDS
from async_opd.tools.cluster_files.render import render
from async_opd.tools.cluster_files.shape import shape_of

ROOT = Path(__file__).parents[2]
RECIPE = Path("configs/multi_node_deepmath.toml")
SETTINGS = ["run.dir=/shared/runs/deepmath"]
THREE_ENGINES_OF_FOUR = [
    "learner.ranks=1",
    "rollout.generators=3",
    "rollout.tensor_parallel_size=4",
    "teacher.replicas=1",
    "teacher.tensor_parallel_size=1",
]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def rendered(kind: str, *more: str, gpus: int = 8) -> str:
    return render(kind, RECIPE, [*SETTINGS, *more], gpus, "async-opd")


def manifest(*more: str) -> tuple[dict, dict]:
    return tuple(yaml.safe_load_all(rendered("kuberay", *more)))


def pods(job: dict) -> list[dict]:
    cluster = job["spec"]["rayClusterSpec"]
    return [
        group["template"]["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_the_command_that_makes_it_again(kind, capsys):
    text = rendered(kind, "learner.betas=[0.8, 0.9]", gpus=4)
    (command,) = re.findall(r"^# Rendered by: async-opd (.*)$", text, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("settings", "per_node", "nodes", "gpus", "cpus", "memory"),
    [
        ([], 8, 2, 8, 48, 512),  # 6 ranks, 6 generators, 2 teachers of 2
        ([], 4, 4, 4, 32, 256),
        ([], 16, 1, 16, 80, 1024),
        # not eight for four
        (["learner.ranks=1", "rollout.generators=1", "teacher.replicas=1"], 8, 1, 4, 32, 256),
        (["rollout.generators=2", "rollout.tensor_parallel_size=4"], 8, 3, 8, 48, 512),  # 18 GPUs
        # 14 GPUs, but two of the engines fit no node together
        (THREE_ENGINES_OF_FOUR, 7, 3, 7, 44, 448),
    ],
)
def test_there_are_as_few_nodes_as_hold_every_role(settings, per_node, nodes, gpus, cpus, memory):
    shape = shape_of(load(RECIPE, [*SETTINGS, *settings]), per_node)
    assert (shape.nodes, shape.gpus, shape.cpus, shape.memory_gib) == (nodes, gpus, cpus, memory)


def test_an_engine_wider_than_a_node_is_refused_with_its_setting():
    config = load(RECIPE, [*SETTINGS, "rollout.tensor_parallel_size=8"])
    with pytest.raises(
        ConfigError,
        match=r"--gpus-per-node 4: too few: generator asks for 8 on one node: lower .*tensor",
    ):
        shape_of(config, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_directory_that_only_one_node_sees_is_refused(kind, capsys):
    assert main(["cluster", "render", "--kind", kind, str(RECIPE)]) == 2
    assert (
        "run.dir = 'runs/multi_node_deepmath': must be absolute, on a disk that every node sees"
        in capsys.readouterr().err
    )


def test_pods_are_not_given_a_path_of_this_machine(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.toml").write_text(RECIPE.read_text())
    (tmp_path / "train.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    words = ["a.toml", "run.dir=/shared/runs/a", "data.path=train.jsonl"]
    assert main(["cluster", "render", "--kind", "kuberay", *words]) == 2
    assert (
        "data.path = 'train.jsonl': the pods see no file of this machine" in capsys.readouterr().err
    )
    # it is run where the file is
    assert main(["cluster", "render", "--kind", "slurm", *words]) == 0


def test_a_file_is_written_where_asked(tmp_path, capsys):
    words = ["cluster", "render", "--kind", "slurm", str(RECIPE), *SETTINGS, "-o"]
    assert main([*words, str(tmp_path / "run.sh")]) == 0
    assert (tmp_path / "run.sh").read_text().startswith("#!/bin/bash\n")
    assert main([*words, str(tmp_path / "none" / "run.sh")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_the_manifest_gives_every_pod_what_a_node_has_and_asks_for_a_token():
    config, job = manifest()
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"], config["kind"]) == ("ray.io/v1", "RayJob", "ConfigMap")
    assert cluster["authOptions"] == {"mode": "token"}
    # below, KubeRay refuses authOptions
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
    assert len(job["metadata"]["name"]) <= 47  # KubeRay's bound
    amounts = {"cpu": "48", "memory": "512Gi", "nvidia.com/gpu": "8"}
    for pod in pods(job):
        (container,) = pod["containers"]
        assert container["resources"] == {"limits": amounts, "requests": amounts}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm", "config": "/config"}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(volumes) == set(mounts)
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "256Gi"}
        assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"]
    assert yaml.safe_load(yaml.safe_dump(job)) == job


def test_the_manifest_trains_with_the_config_and_settings_it_was_rendered_from():
    config, job = manifest("run.seed=7")
    assert config["data"]["config.toml"].rstrip("\n") == RECIPE.read_text().rstrip("\n")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:5] == ["python", "-m", "async_opd", "train", "/config/config.toml"]
    assert words[5:] == [*SETTINGS, "run.seed=7"]
    assert job["spec"]["metadata"] == {"async_opd_run_dir": "/shared/runs/deepmath"}
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    }


def test_one_node_has_no_workers():
    _, job = manifest("learner.ranks=1", "rollout.generators=1", "teacher.replicas=1")
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 0
    one = yaml.safe_load(
        rendered("launcher", "learner.ranks=1", "rollout.generators=1", "teacher.replicas=1")
    )
    assert (one["max_workers"], one["provider"]["worker_ips"]) == (0, [])


def test_the_launcher_file_keeps_to_rays_schema():
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    found = yaml.safe_load(rendered("launcher", gpus=4))
    jsonschema.validate(found, schema)
    assert found["max_workers"] == len(found["provider"]["worker_ips"]) == 3
    assert all(
        "RAY_AUTH_MODE=token" in found[f"{role}_start_ray_commands"][1]
        for role in ("head", "worker")
    )
    with pytest.raises(jsonschema.ValidationError, match="gpus"):
        jsonschema.validate(found | {"gpus": 4}, schema)


def test_the_launcher_file_is_complete_to_ray_itself():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(rendered("launcher"))))


def test_the_container_file_has_the_vllm_and_the_ray_of_the_package():
    lines = [
        line
        for line in rendered("container").replace("\\\n", "").splitlines()
        if line and line[0] != "#"
    ]
    instructions = [line.split()[0] for line in lines]
    assert instructions == ["FROM", "RUN", "COPY", "COPY", "RUN", "ENTRYPOINT", "CMD"]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'gpu = ["vllm=={lines[0].partition(":v")[2]}"]' in project
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert f'"ray[default]=={ray.__version__}"' in lines[4]
    assert [json.loads(line.partition(" ")[2]) for line in lines[5:]] == [[], ["bash"]]


STAND_INS = {
    "srun": 'echo "$@" "$RAY_AUTH_MODE" "$(cat "$RAY_AUTH_TOKEN_PATH")" >>"$SAID"',
    "scontrol": 'printf "%s\\n" one two',
    "python": (
        """case "$1$2" in
-masync_opd) echo "$@" >>"$SAID"; trap 'echo saved >>"$SAID"; exit 130' TERM; touch "$SAID.runs"
  while sleep 0.05; do [ -e "$SAID.end" ] && exit 7; done ;;
*get_node_ip_address*) echo 10.0.0.1 ;;
-c*) echo -n secret ;;
esac"""
    ),
}


@pytest.fixture
def slurm(tmp_path):
    """The Slurm script at work, with stand-ins for what a cluster has; what they say is in the file
    `said`."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "run.sh"
    script.write_text(rendered("slurm", f"run.dir={tmp_path}/run"))
    said = {"SAID": str(tmp_path / "said"), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"}
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | said
    job = subprocess.Popen(
        ["bash", str(script)], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "said.runs").exists() or (tmp_path / "said").read_text().count("\n") < 3:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield job
    job.kill()
    job.stderr.close()


def test_the_slurm_script_starts_every_node_with_one_token_and_ends_as_the_run_does(
    slurm, tmp_path
):
    assert subprocess.run(["bash", "-n", tmp_path / "run.sh"], check=False).returncode == 0
    said = sorted((tmp_path / "said").read_text().splitlines())
    on, head = "--nodes=1 --ntasks=1 --overlap --nodelist", "--node-ip-address=10.0.0.1 --port=6379"
    assert said[:2] == [
        f"{on}=one ray start --head --block {head} --dashboard-host=127.0.0.1 token secret",
        f"{on}=two ray start --address=10.0.0.1:6379 --block token secret",
    ]
    assert (
        said[2]
        == f"-m async_opd train {RECIPE} {shlex.join([*SETTINGS, f'run.dir={tmp_path}/run'])}"
    )
    (tmp_path / "said.end").touch()
    assert slurm.wait(10) == 7
    assert list(tmp_path.glob(".ray-token-*")) == []


def test_sigterm_to_the_slurm_script_is_the_runs_and_waits_for_its_checkpoint(slurm, tmp_path):
    (token,) = tmp_path.glob(".ray-token-7")
    assert token.stat().st_mode & 0o077 == 0
    slurm.send_signal(signal.SIGTERM)
    assert slurm.wait(10) == 130
    assert "saved" in (tmp_path / "said").read_text()
