"""`async-opd plan`, through the command line and without the hub."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.config.load import load
from async_opd.roles.rollout import survey
from async_opd.tools.plan.report import CALIBRATE
from async_opd.toy import TEACHER

CONFIGS = Path(__file__).parents[3] / "configs"
# but for those of models that `make real` makes, which need no card
LAID_OUT = [path for path in sorted(CONFIGS.glob("*.toml")) if not path.match("smollm2_*")]
ONE_NODE = CONFIGS / "node8_deepmath_4b.toml"


def planned(capsys, config: Path, *words: str) -> tuple[int, dict]:
    """Exit status and the object of an offline plan."""
    status = main(["plan", str(config), *words, "--offline", "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("config", LAID_OUT, ids=lambda path: path.stem)
def test_every_config_fits_the_cards_that_it_is_laid_out_for(config, capsys):
    says = next(
        (line for line in config.read_text().splitlines() if line.startswith("# GPUs: ")),
        "# GPUs: 8 of 80 GB",
    )
    gpus = int(says.split()[2])
    size = min(gpus, 8)
    status, plan = planned(
        capsys, config, "--nodes", str(gpus // size), "--gpus-per-node", str(size)
    )
    assert (status, plan["fits"], plan["problems"]) == (0, True, [])
    if config.stem != "demo":
        used = sum(role["members"] * role["gpus"] for role in plan["roles"])
        assert gpus - 1 < used <= gpus  # none is left idle


@pytest.mark.parametrize("config", LAID_OUT, ids=lambda path: path.stem)
def test_every_config_takes_the_short_run_that_a_plan_asks_for(config):
    (short,) = re.findall(r"run\.steps=\d+", CALIBRATE)
    assert load(config, [short]).run.steps == 20


def test_a_plan_is_one_object_with_these_fields(capsys):
    _, plan = planned(capsys, ONE_NODE)
    assert list(plan) == [
        "config",
        "fits",
        "cluster",
        "nodes",
        "roles",
        "groups_outstanding",
        "trajectories_outstanding",
        "worst_lag_steps",
        "sent_gib",
        "longest_response",
        "longest_bound_by",
        "balance",
        "problems",
        "servers",
        "checked",
        "skipped",
    ]
    assert plan["cluster"] == {"nodes": None, "gpus_per_node": 8, "gpu_memory_gib": 80.0}
    learner, generator, teacher = plan["roles"]
    assert (
        list(learner)
        == list(generator)
        == [
            "role",
            "members",
            "gpus",
            "model",
            "parameters",
            "parts_gib",
            "total_gib",
            "limit_gib",
            "host_gib",
            "fits",
            "kv_tokens",
            "longest_tokens",
            "typical_tokens",
        ]
    )
    assert list(learner["parts_gib"]) == [
        "weights",
        "gradients",
        "optimizer",
        "buckets",
        "backward",
        "update",
    ]
    assert list(generator["parts_gib"]) == ["weights", "forward", "kv_cache", "sync"]
    assert (teacher["model"], teacher["parameters"]) == (
        "Qwen/Qwen3-4B-Instruct-2507",
        4_022_468_096,
    )
    assert plan["checked"] == ["config"]
    assert plan["skipped"] == [
        "model files",
        "vocabularies",
        "rows of data (of a hub's set the first)",
    ]


SERVERS = ["teacher.backend=server", 'teacher.urls=["http://a:1", "http://b:1/v1"]']


def test_a_teacher_that_servers_are_takes_no_card(capsys):
    status, plan = planned(capsys, DEMO, *SERVERS, "--gpus-per-node", "2", "--nodes", "1")
    assert (status, [role["role"] for role in plan["roles"]]) == (0, ["learner rank", "generator"])
    assert plan["servers"] == {"teacher": ["http://a:1", "http://b:1"]}
    assert plan["nodes"]["node 0"][2:] == ["teacher http://a:1", "teacher http://b:1", "verifier 0"]
    assert main(["plan", str(DEMO), *SERVERS, "--offline"]) == 0
    said = capsys.readouterr().out
    assert "teacher          no GPU       asks 2 server(s): http://a:1, http://b:1" in said


def test_of_a_model_that_servers_hold_only_the_context_counts(capsys, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(TEACHER, folder)
    file = folder / "config.json"
    for change, bound in (
        ({"max_position_embeddings": 90}, "teacher.model"),
        ({"model_type": "unheard-of"}, "student.model"),
    ):
        model = json.loads((TEACHER / "config.json").read_text()) | change
        file.write_text(json.dumps(model))
        status, plan = planned(capsys, DEMO, *SERVERS, f"teacher.model={folder}")
        assert status == 0 and plan["longest_bound_by"] == [f"the context of {bound}"]
    assert main(["plan", str(DEMO), f"teacher.model={folder}", "--offline"]) == 2
    assert "plan cannot count a model of type 'unheard-of'" in capsys.readouterr().err


def test_slots_lag_and_the_longest_response_are_those_of_the_config(capsys):
    _, plan = planned(capsys, CONFIGS / "sg_opd.toml", "run.max_lag_steps=2")
    assert (plan["groups_outstanding"], plan["trajectories_outstanding"]) == (3 * 128, 3 * 1024)
    assert plan["worst_lag_steps"] == 2
    # vLLM samples a token behind what the teacher scores
    assert plan["longest_response"] == 40_960 - 2048 - 1
    assert plan["longest_bound_by"] == [
        "the context of teacher.model",
        "the context of reference.model",
    ]


def test_memory_bounds_the_longest_response_where_it_is_the_smaller(capsys):
    tight = "learner.gradient_checkpointing=false"
    _, plan = planned(capsys, ONE_NODE, tight, "rollout.max_new_tokens=4096")
    assert plan["longest_bound_by"] == ["the memory of a learner rank"]
    longest = plan["longest_response"]

    def fits(response: int) -> int:
        batch = f"learner.micro_batch_tokens={max(2048 + response, 16384)}"
        return planned(capsys, ONE_NODE, tight, batch, f"rollout.max_new_tokens={response}")[0]

    assert 2048 + longest > 16384
    assert (fits(longest), fits(longest + 1)) == (0, 1)


def test_sequences_that_run_at_once_are_said_at_the_longest_and_at_a_typical_length(capsys):
    assert main(["plan", str(ONE_NODE), "--offline"]) == 0
    printed = capsys.readouterr().out
    _, plan = planned(capsys, ONE_NODE)
    generator = plan["roles"][1]
    longest, typical = generator["longest_tokens"], generator["typical_tokens"]
    assert (longest, typical) == (2048 + 10240, (2048 + 10240) // 2)
    tokens = generator["kv_tokens"]
    says = f"{tokens // longest:,} sequences of the longest, {longest:,}, {tokens // typical:,} of"
    assert f"{says} a typical {typical:,}\n" in printed


def test_chunks_of_weights_lie_beside_the_share_of_an_engine(capsys):
    """vLLM fills its share whatever arrives over nccl, which therefore needs room behind it."""
    _, plan = planned(capsys, ONE_NODE, "rollout.gpu_memory_utilization=0.98")
    (problem,) = plan["problems"]
    assert problem["what"].startswith("generator, Qwen/Qwen3-1.7B: ")
    assert "rollout.gpu_memory_utilization=0.95" in problem["changes"]


def test_members_are_laid_on_nodes_as_a_run_lays_them(capsys):
    _, plan = planned(capsys, CONFIGS / "multi_node_deepmath.toml")
    first, second = plan["nodes"]["node 0"], plan["nodes"]["node 1"]
    assert {f"learner rank {rank}" for rank in range(6)} <= set(first)
    assert len(plan["nodes"]) == 2 and any(member.startswith("generator") for member in second)


@pytest.mark.parametrize(
    ("words", "what", "change"),
    [
        (
            ["student.model=Qwen/Qwen3-8B", "learner.ranks=2"],
            "learner rank, Qwen/Qwen3-8B: ",
            "learner.ranks=4",
        ),
        (
            ["student.model=Qwen/Qwen3-8B", "learner.ranks=4", "learner.zero_stage=1"],
            "learner rank",
            "zero_stage=2",
        ),
        (
            ["student.model=Qwen/Qwen3-14B"],
            "learner rank, Qwen/Qwen3-14B: ",
            "learner.offload_optimizer=true",
        ),
        (
            ["learner.gradient_checkpointing=false", "learner.micro_batch_tokens=32768"],
            "learner rank",
            "checkpointing=true",
        ),
        (
            [
                "learner.dtype=float32",
                "learner.zero_stage=0",
                "student.model=Qwen/Qwen3-4B",
                "rollout.max_new_tokens=2048",
                "learner.micro_batch_tokens=4096",
            ],
            "learner rank",
            "learner.dtype=bfloat16 learner.zero_stage=2",
        ),
        (
            ["teacher.model=Qwen/Qwen2.5-72B"],
            "teacher, Qwen/Qwen2.5-72B: ",
            "teacher.tensor_parallel_size=4",
        ),
        (
            ["teacher.dtype=float32", "teacher.model=Qwen/Qwen3-32B"],
            "teacher, ",
            "teacher.dtype=bfloat16",
        ),
        (
            [
                "teacher.backend=transformers",
                "teacher.model=Qwen/Qwen3-32B",
                "teacher.batch_tokens=131072",
            ],
            "teacher, ",
            "teacher.batch_tokens=12288",
        ),
    ],
)
def test_what_does_not_fit_names_a_change_that_lets_it_fit(words, what, change, capsys):
    status, plan = planned(capsys, ONE_NODE, *words)
    (problem,) = plan["problems"]
    assert status == 1 and problem["what"].startswith(what)
    change_line = next(each for each in problem["changes"] if change in each)
    assert planned(capsys, ONE_NODE, *words, *change_line.split())[0] == 0


def test_changes_that_are_enough_only_together_are_named_together(capsys):
    words = [
        "student.model=Qwen/Qwen3-32B",
        "rollout.tensor_parallel_size=2",
        "learner.gradient_checkpointing=false",
    ]
    status, plan = planned(capsys, ONE_NODE, *words)
    (problem,) = plan["problems"]
    (change,) = problem["changes"]
    assert status == 1 and len(change.split()) > 1
    assert planned(capsys, ONE_NODE, *words, *change.split())[0] == 0
    for left_out in change.split():
        fewer = [each for each in change.split() if each != left_out]
        assert planned(capsys, ONE_NODE, *words, *fewer)[0] == 1


def test_what_no_setting_helps_says_so(capsys):
    status, plan = planned(capsys, ONE_NODE, "--gpu-memory-gib", "1")
    assert status == 1 and plan["longest_response"] == 0
    assert all(
        "no change that was tried is enough: take a smaller model, or larger GPUs" in p["what"]
        for p in plan["problems"]
    )


def test_a_cluster_that_is_too_small_is_told_how_many_nodes_it_needs(capsys):
    status, plan = planned(capsys, ONE_NODE, "--nodes", "1", "--gpus-per-node", "4")
    (problem,) = plan["problems"]
    assert (
        status == 1
        and problem["what"].startswith("asked are 8 GPUs")
        and problem["changes"] == ["--nodes 2"]
    )
    status, plan = planned(capsys, ONE_NODE, "teacher.tensor_parallel_size=16")
    (problem,) = plan["problems"]
    assert (
        status == 1
        and "no node has 16 left for the next teacher" in problem["what"]
        and problem["changes"] == []
    )


def test_a_plan_in_words_says_parts_bounds_and_what_was_skipped(capsys):
    assert main(["plan", str(ONE_NODE), "teacher.model=Qwen/Qwen2.5-72B", "--offline"]) == 1
    printed = capsys.readouterr().out
    assert "node 0   learner rank 0, 1, 2; generator 0, 1, 2, 3; teacher 0; verifier 0\n" in printed
    assert (
        "    weights 3.2, gradients 2.1, optimizer 6.4, buckets 1.7, backward 6.3, update 2.1\n"
        in printed
    )
    assert "worst lag        4 optimizer steps\n" in printed and "DOES NOT FIT" in printed
    assert (
        "does not fit     teacher, Qwen/Qwen2.5-72B: " in printed
        and "  set teacher.tensor_parallel_size=4\n" in printed
    )
    assert "bottleneck       not known: a run needs rates" in printed and "--like DIR" in printed
    assert (
        "skipped          model files; vocabularies; rows of data (of a hub's set the first)\n"
        "it does not fit\n" in printed
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["student.model=Qwen/Qwen3-1.8B"],
            "student.model = 'Qwen/Qwen3-1.8B': --offline knows Qwen/Qwen3-0.6B, ",
        ),
        (
            ["learner.zero_stage=0"],
            "learner.dtype = 'bfloat16': needs learner.zero_stage 1, 2 or 3",
        ),
        (
            ["learner.dtype=float32"],
            "learner.dtype = 'float32': must be 'bfloat16' on GPUs, where float32 has no fused"
            " attention for 16 heads of queries over 8 of keys; a layer would hold 16 x 16,384",
        ),
        (["learner.lr=fast"], "learner.lr = 'fast': must be a finite number > 0 and < 1"),
        (
            ["--rates", "generator=3"],
            "--rates generator=3: must be generator=TOKENS_PER_S,teacher=TOKENS_PER_S,learner=",
        ),
        (["--rates", "generator=3,teacher=0,learner=1"], "must be generator=TOKENS_PER_S"),
        (["--rates", "generator=a,teacher=1,learner=1"], "must be generator=TOKENS_PER_S"),
        (
            ["--like", "no/run"],
            "no/run: --like needs a run's directory with config.json and metrics.jsonl",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exits_with_two(words, says, capsys):
    settings = [word for word in words if "=" in word and words[0] == word]
    assert (
        main(
            [
                "plan",
                str(ONE_NODE),
                *settings,
                "--offline",
                *(w for w in words if w not in settings),
            ]
        )
        == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "option", ["--nodes=0", "--gpus-per-node=x", "--gpu-memory-gib=-1", "--gpu-memory-gib=nan"]
)
def test_a_cluster_of_no_shape_exits_with_two(option, capsys):
    assert main(["plan", str(ONE_NODE), option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_hub_that_cannot_be_asked_points_to_offline(capsys):
    assert main(["plan", str(ONE_NODE)]) == 2
    message = capsys.readouterr().err
    assert (
        message.startswith("async-opd: DataError: student.model = 'Qwen/Qwen3-1.7B': ")
        and message.count("\n") == 1
    )
    assert message.endswith(
        "; with --offline plan asks neither hub nor data, and says what it skipped\n"
    )


def test_models_vocabularies_and_rows_are_read_where_they_can_be(capsys, monkeypatch):
    monkeypatch.setattr(survey, "SAY_S", 0.0)  # how far it is with the rows is none of the object
    assert main(["plan", str(DEMO), "--json"]) == 0
    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    assert "looked at" in printed.err
    assert plan["checked"] == [
        "config",
        "model files",
        "vocabularies",
        "rows of data (of a hub's set the first)",
    ]
    assert plan["skipped"] == [] and [role["model"] for role in plan["roles"]] == [
        "toy:student"
    ] * 2 + ["toy:teacher"]
    assert main(["plan", str(DEMO), "data.prompt=question"]) == 2
    assert "data.prompt = 'question'" in capsys.readouterr().err


def test_an_offline_plan_loads_nothing_heavy_and_starts_nothing():
    words = ["plan", str(ONE_NODE), "--offline"]
    code = f"import sys; from async_opd.cli.main import main; main({words}); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in ran.stdout.splitlines()[-1].split()}
    assert {"torch", "ray", "vllm", "transformers", "datasets", "deepspeed", "numpy"} & loaded <= {
        "numpy"
    }


def test_a_teacher_in_the_learner_takes_no_card_and_the_learner_holds_its_forward(capsys):
    inside = ["student.lora.rank=2", "teacher.model=toy:student", "teacher.evaluate=false"]
    _, pooled = planned(capsys, DEMO, *inside)
    inside += ["teacher.backend=learner", "data.solution=answer", "teacher.max_prompt_tokens=99"]
    _, plan = planned(capsys, DEMO, *inside, "teacher.context={prompt} {solution}")
    assert [role["role"] for role in plan["roles"]] == ["learner rank", "generator"]
    assert "teacher" in [role["role"] for role in pooled["roles"]]
    assert not [name for names in plan["nodes"].values() for name in names if "teacher" in name]
    learner, before = (each["roles"][0]["parts_gib"] for each in (plan, pooled))
    assert set(learner) - set(before) == {"scoring"}
    # what the teacher is shown is longer than the student's prompt, and bounds what is sampled
    assert plan["longest_response"] < pooled["longest_response"]
