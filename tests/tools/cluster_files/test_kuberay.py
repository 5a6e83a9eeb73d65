"""The manifest for KubeRay, against the schema of what KubeRay and Kubernetes know, and by what its
pods have."""

import copy
import json
import re
import shlex
import subprocess
import threading
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.tools.cluster_files.recipe import RDMA, RECIPE, SETTINGS, rendered

SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
ONE_NODE = ("learner.ranks=1", "rollout.generators=1", "teacher.replicas=1")
MAPS = {"rayStartParams", "limits", "requests", "data"}  # any keys; and `metadata` of a RayJob


def manifest(*more: str, rdma: str | None = None) -> tuple[dict, dict]:
    return tuple(yaml.safe_load_all(rendered("kuberay", *more, rdma=rdma)))


def errors(made: dict) -> list[str]:
    kind = {"RayJob": "RayJob", "ConfigMap": "V1ConfigMap"}[made["kind"]]
    checks = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", **SCHEMA})
    return [f"{error.json_path}: {error.message}" for error in checks.iter_errors(made)]


def pods(job: dict) -> list[dict]:
    cluster = job["spec"]["rayClusterSpec"]
    return [
        group["template"]["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


def objects(made, path=()):
    """Every object inside, by the keys that lead there."""
    if isinstance(made, dict):
        yield path
    for key, inner in made.items() if isinstance(made, dict) else enumerate(made):
        if isinstance(inner, dict | list):
            yield from objects(inner, (*path, key))


@pytest.mark.parametrize("rdma", [None, RDMA])
@pytest.mark.parametrize("more", [(), ONE_NODE, ("timeout.last_save_s=600", "verify.workers=1")])
def test_kuberay_knows_every_field_of_the_manifest(more, rdma):
    config, job = manifest(*more, rdma=rdma)
    assert errors(config) == errors(job) == []


def test_the_schema_refuses_a_field_that_kuberay_would_drop_without_a_word():
    job = json.loads(json.dumps(manifest(rdma=RDMA)[1]))  # nothing shared
    paths = [path for path in objects(job) if path and path[-1] not in MAPS]
    paths = [path for path in paths if not {"workerGroupSpecs", "template"} < set(path)]
    assert len(paths) > 20
    for path in paths:
        changed = copy.deepcopy(job)
        inner = changed
        for key in path:
            inner = inner[key]
        inner["tolerationz"] = []
        assert len(errors(changed)) == 1, path


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ("512Gi", "512GB"),
        ('"48"', "[48]"),
        ("mode: token", "mode: tokens"),
        ("jobId:", "jobID:"),
        ("backoffLimit: 0", "backoffLimit: none"),
        ("replicas: 1", 'replicas: "1"'),
        ("groupName: workers", "name: workers"),
        ("mountPath: /dev/shm", "path: /dev/shm"),
        ("containerPort: 6379", "containerPort: gcs"),
        ('"true"', "true"),
    ],
)
def test_the_schema_refuses_a_wrong_name_or_type(said, instead):
    text = rendered("kuberay")
    assert said in text
    _, job = yaml.safe_load_all(text.replace(said, instead))
    assert errors(job)


def test_every_pod_has_what_a_node_has_and_asks_for_a_token():
    config, job = manifest()
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    # below, KubeRay refuses authOptions
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
    assert len(job["metadata"]["name"]) <= 47  # KubeRay's bound
    for pod in pods(job):
        (container,) = pod["containers"]
        # no limit of CPU: all cores of its node
        limits, least = {"memory": "512Gi", "nvidia.com/gpu": "8"}, {"cpu": "48"}
        assert container["resources"] == {"limits": limits, "requests": least}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
        (cleanup,) = container["env"]
        assert cleanup == {"name": "RAY_process_group_cleanup_enabled", "value": "true"}
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
    _, job = manifest(*ONE_NODE)
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 0


def test_with_rdma_every_pod_has_the_cards_and_may_lock_memory_and_without_it_none():
    for rdma in ("rdma/roce", "vpc.amazonaws.com/efa"):
        for pod in pods(manifest(rdma=rdma)[1]):
            (container,) = pod["containers"]
            assert container["resources"]["limits"][rdma] == "1"
            assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
            assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
            assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
    text = rendered("kuberay")
    assert not re.search("rdma|IPC_LOCK|hostNetwork|NCCL", text.split("kind: RayJob")[1])


@pytest.mark.parametrize(("last_save_s", "stop_s"), [(18, 60), (600, 642)])
def test_a_pod_that_is_to_go_has_the_time_for_the_last_checkpoint(last_save_s, stop_s):
    _, job = manifest(f"timeout.last_save_s={last_save_s}")
    head, workers = pods(job)
    assert head["terminationGracePeriodSeconds"] == stop_s + 30
    assert workers["terminationGracePeriodSeconds"] == stop_s + 30
    hook = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    stop = ["ray", "job", "stop", "--address", "http://127.0.0.1:8265"]
    assert hook == [*stop, job["spec"]["jobId"]]
    assert f"{{1..{stop_s}}}" in worker_hook(workers)[-1]


def worker_hook(pod: dict) -> list[str]:
    return pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]


@pytest.mark.parametrize("title", ["Generator", "Teacher-generator", "Learner", "Verifier.call"])
def test_a_worker_pod_stays_while_there_is_a_role_in_it(tmp_path, title):
    *bash, script = worker_hook(pods(manifest()[1])[1])
    for pid, cmdline in enumerate(["python\0-m\0x\0", f"ray::{title}\0\0", "ray::IDLE\0"], 1):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text(cmdline)
    process = subprocess.Popen(
        [*bash, script.replace("/proc", f"{tmp_path}").replace("sleep 1", "sleep 0.05")]
    )
    threading.Timer(0.3, (tmp_path / "2" / "cmdline").write_text, [""]).start()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.25)
    assert process.wait(5) == 0
