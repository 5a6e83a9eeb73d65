"""The files that `async-opd cluster render` makes, each by what it is read by."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray._private.utils import resolve_object_store_memory

from async_opd.cli.main import main
from async_opd.config.load import load
from async_opd.core.errors import ConfigError
from async_opd.tools.cluster_files import KINDS
from async_opd.tools.cluster_files.shape import shape_of
from tests.tools.cluster_files.recipe import RDMA, RECIPE, ROOT, SETTINGS, rendered

THREE_ENGINES_OF_FOUR = [
    "learner.ranks=1",
    "rollout.generators=3",
    "rollout.tensor_parallel_size=4",
    "teacher.replicas=1",
    "teacher.tensor_parallel_size=1",
]


@pytest.mark.parametrize("rdma", [None, RDMA, "vpc.amazonaws.com/efa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_the_command_that_makes_it_again(kind, rdma, capsys):
    text = rendered(kind, "learner.betas=[0.8, 0.9]", gpus=4, rdma=rdma)
    (command,) = re.findall(r"^# Rendered by: async-opd (.*)$", text, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == text


def test_a_path_or_setting_that_a_shell_or_yaml_would_take_apart_stays_whole():
    odd, lines = "run.dir=/it's # mine/runs/a", "run.sinks=[\n]"
    (mounts,) = [
        container["volumeMounts"][0]["mountPath"]
        for document in yaml.safe_load_all(rendered("kuberay", odd, lines))
        if document["kind"] == "RayJob"
        for container in document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
            "containers"
        ]
    ]
    assert mounts == "/it's # mine"
    options = yaml.safe_load(rendered("launcher", odd, lines))["docker"]["run_options"]
    assert shlex.split(options[-1]) == ["--volume=/it's # mine:/it's # mine"]
    for kind in KINDS:
        assert "\n]" not in rendered(kind, lines).split("FROM")[0].split("#SBATCH")[0]


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


FOR_CARDS = [path for path in (ROOT / "configs").glob("*.toml") if "\n# GPUs: " in path.read_text()]


@pytest.mark.parametrize("path", FOR_CARDS, ids=lambda path: path.stem)
def test_a_recipe_is_placed_on_as_many_gpus_as_it_says_and_says_how_it_was_tested(path):
    top, _, _ = path.read_text().partition("\n\n")
    shape = shape_of(load(path, ["run.dir=/shared/runs/a"], elsewhere=True), 8)
    (gpus,) = re.findall(r"^# GPUs: (\d+) of 80 GB", top, re.MULTILINE)
    assert shape.nodes * shape.gpus == int(gpus)
    assert "# Tested without a card: " in top and "Never run on a card: " in top


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


@pytest.mark.parametrize("kind", KINDS)
def test_no_mark_of_the_templates_is_left_in_a_file(kind):
    with_rdma, without = rendered(kind, rdma=RDMA), rendered(kind)
    assert "# --rdma" not in with_rdma and "@{" not in with_rdma
    rest = iter(with_rdma.splitlines())
    assert all(line in rest for line in without.splitlines() if "Rendered by" not in line)


@pytest.mark.parametrize(
    ("words", "resource"),
    [
        (["--rdma"], RDMA),
        (["--rdma=nvidia.com/mlnxnics"], "nvidia.com/mlnxnics"),
        (["--rdma", "vpc.amazonaws.com/efa"], "vpc.amazonaws.com/efa"),
    ],
)
def test_rdma_is_asked_for_by_the_name_of_its_resource(words, resource, capsys):
    render = ["cluster", "render", "--kind", "kuberay", str(RECIPE), *SETTINGS]
    assert main([*render, *words]) == 0
    assert capsys.readouterr().out == rendered("kuberay", rdma=resource)


@pytest.mark.parametrize("word", [str(RECIPE), "configs/one_gpu.toml", "run.seed=7", "rdma", ""])
def test_a_word_behind_rdma_that_names_no_resource_is_refused(word, capsys):
    assert main(["cluster", "render", "--kind", "slurm", *SETTINGS, "--rdma", word]) == 2
    assert f"{word!r}: is no resource such as {RDMA}" in capsys.readouterr().err


@pytest.mark.parametrize("rdma", [None, RDMA])
def test_the_launcher_file_keeps_to_rays_schema(rdma):
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    launcher = yaml.safe_load(rendered("launcher", gpus=4, rdma=rdma))
    jsonschema.validate(launcher, schema)
    assert launcher["max_workers"] == len(launcher["provider"]["worker_ips"]) == 3
    assert all(
        "RAY_AUTH_MODE=token RAY_process_group_cleanup_enabled=true ray start"
        in launcher[f"{role}_start_ray_commands"][1]
        for role in ("head", "worker")
    )
    with pytest.raises(jsonschema.ValidationError, match="gpus"):
        jsonschema.validate(launcher | {"gpus": 4}, schema)


def test_the_launchers_containers_have_shared_memory_files_and_with_rdma_its_devices():
    options = [
        yaml.safe_load(rendered("launcher", rdma=rdma))["docker"]["run_options"]
        for rdma in (None, RDMA)
    ]
    assert {"--gpus=all", "--shm-size=256g", "--ulimit=nofile=1048576"} < set(options[0])
    devices = {"--ulimit=memlock=-1", "--cap-add=IPC_LOCK", "--device=/dev/infiniband"}
    assert devices < set(options[1]) - set(options[0])
    assert all(option.startswith("--") and " " not in option for option in options[1])


def test_ray_puts_its_object_store_into_the_shared_memory_of_a_node():
    shape = shape_of(load(RECIPE, SETTINGS), 8)
    store = resolve_object_store_memory(shape.memory_gib * 2**30)
    assert store < 0.95 * shape.shm_gib * 2**30 and shape.shm_gib < shape.memory_gib
    one = yaml.safe_load(
        rendered("launcher", "learner.ranks=1", "rollout.generators=1", "teacher.replicas=1")
    )
    assert (one["max_workers"], one["provider"]["worker_ips"]) == (0, [])


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
    assert "vllm/vllm-openai:v" in lines[0] and "libibverbs1" in lines[1]
    assert f'gpu = ["vllm=={lines[0].partition(":v")[2]}"]' in project
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert lines[4].endswith(f'"/opt/async-opd[gpu]" "ray[default]=={ray.__version__}"')
    assert [json.loads(line.partition(" ")[2]) for line in lines[5:]] == [[], ["bash"]]
