"""What newcomers get wrong: each mistake gives one helpful line and status 2, starts nothing and
leaves nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import COMMANDS, main
from async_opd.config.load import load
from async_opd.config.teacher_rules import refuse_without_gpus
from async_opd.core.errors import ConfigError
from async_opd.driver.checkpoints import Checkpoints, RunState
from async_opd.toy import STUDENT

ROWS = "data.path=rows.jsonl"
NOBODY = "http://127.0.0.1:9"  # where RFC 863 has a service that nobody runs
LORA = "LoRA is set by student.lora = { rank, alpha, dropout, target_modules }"
SEQUENCE = "sequence parallelism is"
TOOLS = "multi-turn tools are"

# A command line; then what its one line must say.
COMMAND_LINES = {
    "": ["required: COMMAND", "usage: async-opd"],
    "tarin demo.toml": ["COMMAND = 'tarin': must be 'train'", "did you mean 'train'?"],
    "--lr=3": ["COMMAND = '--lr=3': must be 'train'"],
    "train": ["train: needs a config, a TOML file, or --resume RUN"],
    "train demo.tml": ["config demo.tml: no such file; did you mean 'demo.toml'?"],
    "train models": ["config models: Is a directory"],
    "train wide.toml": ["config wide.toml is not valid TOML", "can't decode"],
    "train deep.toml": ["config deep.toml is not valid TOML: RecursionError"],
    "train huge.toml": ["config huge.toml is not valid TOML", "integer string conversion"],
    "train /dev/zero": ["config /dev/zero: Is a device, not a file"],
    "train pipe.toml": ["run: missing"],  # that nobody writes
    f"train {'a' * 300}.toml": ["File name too long"],
    "train loop.toml": ["config loop.toml: Too many levels of symbolic links"],
    "plan demo.toml run.steps=0x" + "f" * 5000: ["run.steps = a value that cannot be shown"],
    f"plan demo.toml run.steps={2**63}": [f"run.steps = {2**63}: must be an integer"],
    "plan demo.toml student.model=models/pipe": ["tokenizer.json is neither a file nor a folder"],
    "demo data.path=pipe.toml": ["data.path = 'pipe.toml': is neither a file nor a folder"],
    "demo run.dir=loop.toml/a": ["run.dir = 'loop.toml/a': Too many levels of symbolic links"],
    "plan demo.toml --offline --rates generator=1e-300,teacher=1,learner=1": [
        "from 0.001 to 1e+12"
    ],
    f"export finished --checkpoint {'9' * 5000}": ["no checkpoint '999"],
    "audit finished/config.json": ["finished/config.json: no config.json in it: Not a directory"],
    "report finished": ["finished: no metrics.jsonl in it"],
    "train latin.toml": ["config latin.toml is not valid TOML", "can't decode"],
    "train rows.jsonl": ["config rows.jsonl is not valid TOML", "line 1"],
    "train demo.toml --resum": ["--resume: expected one argument", "usage: async-opd train CONFIG"],
    "train demo.toml --learner.lr=3": [
        "--learner.lr=3: no such option",
        "usage: async-opd train CONFIG",
    ],
    "train --resume nowhere": ["RunMissing: nowhere: no config.json in it"],
    "train --resume rows.jsonl": ["RunMissing: rows.jsonl: no config.json in it"],
    "train --resume finished": ["run.steps = 3: must be larger to go on", "is of step 3"],
    "train --resume damaged run.steps=9": ["CheckpointError: ", "learner/a.pt"],
    "demo learner.lr": ["override 'learner.lr': write key.path=value"],
    "demo learner.lrr=3": ["learner.lrr = 3: no such setting; did you mean 'learner.lr'?"],
    "demo learnr.lr=3": ["learnr: no such section; did you mean 'learner'?"],
    "demo run.steps=-5": ["run.steps = -5: must be an integer >= 1"],
    "demo run.steps=ten": ["run.steps = 'ten': must be an integer >= 1"],
    "demo learner.micro_batch_tokens=64": ["learner.micro_batch_tokens = 64: must be >= ", "= 80"],
    "demo rollout.max_new_tokens=300": ["= 316: must be <= 256, the context of student.model"],
    "demo sync.parity_mean=0": ["sync.parity_mean = 0", "must be "],
    "demo run.dir=rows.jsonl": ["run.dir = 'rows.jsonl': ", "is a file"],
    "demo run.dir=/proc/nope/run": ["run.dir = '/proc/nope/run': cannot be made"],
    f"demo {ROWS} run.dir=.": ["run.dir = '.': holds data.path = 'rows.jsonl'"],
    "demo objective.k=99": ["objective.k = 99: the vocabulary has 24"],
    "demo data.epochs=1 run.steps=1000": [
        "data.epochs = 1: 1 x 20480 rows, but run.steps = 1000 needs 96000"
    ],
    "demo data.max_prompt_tokens=2": [
        "rows cannot be used: row",
        "7 prompt tokens, data.max_prompt_tokens = 2",
        "shorten it, raise the limit",
    ],
    "demo eval.problems=5000": ["512 usable rows, eval.problems = 5000"],
    f"demo {ROWS} data.prompt=question": [
        "data.prompt = 'question': rows.jsonl has columns id, prompt, answer"
    ],
    "demo data.path=late.jsonl": [
        "data.path = 'late.jsonl': 2 of 60 rows cannot be used: row 50: 'answer' must be",
        "; row 55: 'answer': reference answer '' does not parse: it is empty; data.bad_rows =",
    ],
    "demo eval.path=late.jsonl eval.problems=60": ["eval.path = 'late.jsonl': 2 of 60 rows cannot"],
    "demo data.path=late.jsonl data.bad_rows=skip data.epochs=32 run.steps=20": [
        "data.epochs = 32: 32 x 58 rows, but run.steps = 20 needs"
    ],
    "demo data.path=late.jsonl data.bad_rows=no": ["data.bad_rows = 'no': must be"],
    "eval models/template --data late.jsonl": ["data.path = 'late.jsonl': 2 of 60 rows cannot"],
    "plan demo.toml data.path=late.jsonl": ["data.path = 'late.jsonl': 2 of 60 rows cannot"],
    f"demo {ROWS} data.split=trian": ["split 'trian'", "Should be one of ['train']"],
    f"demo {ROWS} data.chat_template=true": [
        "data.chat_template = true",
        "student.model has no chat template",
    ],
    "demo data.path=empty.jsonl": ["data.path = 'empty.jsonl', split 'train': no rows"],
    "demo data.path=broken.jsonl": ["data.path = 'broken.jsonl'", "JSON parse error", "in row 1"],
    "demo student.model=models/no_tokenizer": [
        "student.model = 'models/no_tokenizer': holds no tokenizer"
    ],
    "demo student.model=models/no_weights": [
        "student.model = 'models/no_weights': holds no weights"
    ],
    "demo teacher.model=models/no_weights": [
        "teacher.model = 'models/no_weights': holds no weights"
    ],
    "demo student.model=models/generation": [
        "student.model = 'models/generation': its generation_config.json: `max_new_tokens` must be"
    ],
    "demo teacher.model=models/generation": [
        "teacher.model = 'models/generation': its generation_config.json: `max_new_tokens` must be"
    ],
    "eval models/generation --data rows.jsonl --out eval": [
        "student.model = 'models/generation': its generation_config.json: `max_new_tokens` must be"
    ],
    "demo student.model=models/damaged": [
        "student.model = 'models/damaged': model.safetensors: SafetensorError"
    ],
    "demo teacher.model=models/damaged": [
        "teacher.model = 'models/damaged': model.safetensors: SafetensorError"
    ],
    "eval models/damaged --data rows.jsonl --out eval": [
        "student.model = 'models/damaged': model.safetensors: SafetensorError"
    ],
    "demo student.model=models/wordless": [
        "student.model = 'models/wordless': its tokenizer: Expecting property name"
    ],
    "eval models/wordless --data rows.jsonl --out eval": [
        "student.model = 'models/wordless': its tokenizer: "
    ],
    "demo student.model=models/narrow": [
        "student.model = 'models/narrow': 29 weights have another shape than its config says"
    ],
    "demo teacher.model=models/images": [
        "teacher.model = 'models/images': ",
    ],
    "demo student.model=models/list": [
        "student.model = 'models/list': its config.json is not a model's"
    ],
    "plan demo.toml student.model=models/words": [
        "student.model = 'models/words': its config: ",
        "Validation error for field 'num_hidden_layers': TypeError",
    ],
    "demo student.model=models/unknown": [
        "student.model = 'models/unknown'",
        "model type `nonesuch`",
    ],
    "demo student.model=models/swapped": [
        "its tokenizer disagrees with the student's on 2 tokens, such as '3'"
    ],
    "demo student.model=models/template teacher.model=models/template data.chat_template=true": [
        "the chat template refuses 'prompt': TemplateSyntaxError: unexpected '}'"
    ],
    "demo teacher.model=Qwen/Nonesuch-7B": ["teacher.model = 'Qwen/Nonesuch-7B': "],
    "demo teacher.model=toy:taecher": ["did you mean 'toy:teacher'?"],
    "demo learner.lora_rank=8": [f"learner.lora_rank: {LORA}"],
    "demo lora.rank=8": [f"lora: {LORA}"],
    "demo student.lora.lora_alpha=8": [f"student.lora.lora_alpha: {LORA}"],
    "demo rollout.qlora=true": ["rollout.qlora: QLoRA is out of scope for now"],
    "demo learner.peft.r=8": [f"learner.peft: {LORA}"],
    "demo student.lora.alpha=8": ["student.lora.rank: missing; must be an integer >= 1"],
    "demo student.lora.rank=0": ["student.lora.rank = 0: must be an integer >= 1"],
    "demo student.lora={rank=8,dropout=1}": ["student.lora.dropout = 1: must be ", ">= 0 and < 1"],
    "demo student.lora={rank=8,target_modules='q_proj'}": [
        "student.lora.target_modules = 'q_proj': must be a list of a string that is not empty or"
        " 'all-linear'"
    ],
    "demo student.lora={rank=8,target_modules=['q_proj','q_prj']}": [
        "student.lora.target_modules = ['q_proj', 'q_prj']: 'q_prj' is no linear layer of"
        " student.model = ",
        "; linear layers are down_proj, gate_proj",
        "did you mean 'q_proj'?",
    ],
    "demo student.lora={rank=8,target_modules=['lm_head']}": ["'lm_head' is the head of"],
    "demo rollout.engine.enable_lora=true": [
        "an adapter of the student is set by student.lora, and a teacher is one whole model"
    ],
    "demo learner.sequence_parallel_size=2": [
        f"learner.sequence_parallel_size: {SEQUENCE} out of scope for now"
    ],
    "demo learner.ulysses_degree=2": [f"learner.ulysses_degree: {SEQUENCE} out of scope for now"],
    "demo rollout.tools=[]": [f"rollout.tools: {TOOLS} out of scope for now"],
    "demo rollout.max_turns=3": [f"rollout.max_turns: {TOOLS} out of scope for now"],
    "demo multi_turn=true": [f"multi_turn: {TOOLS} out of scope for now"],
    "scale finished": ["required: POOL=NUMBER", "usage: async-opd scale"],
    "scale nowhere generators=2": ["RunMissing: nowhere: no config.json in it"],
    "scale finished generators=no": [
        "'generators=no': write POOL=NUMBER with a number of at least 1"
    ],
    "explain --objective dera rollouts.json": ["objective.tag = 'dera'", "did you mean 'dear'?"],
    "explain --objective dear": ["required: FILE.json", "usage: async-opd explain"],
    "explain --objective dear rollout.json": [
        "rollout.json: no such file; did you mean 'rollouts.json'?"
    ],
    "explain --objective dear rollouts.json": ["rollouts.json: ", "`trajectories`"],
    "plan nosuch.toml": ["config nosuch.toml: no such file"],
    "plan demo.toml --nodes x": ["--nodes: x: must be an integer >= 1"],
    "plan demo.toml --gpu-memory-gib 80GB": ["--gpu-memory-gib: 80GB: must be a finite number > 0"],
    "plan demo.toml learner.lrr=3": [
        "learner.lrr = 3: no such setting; did you mean 'learner.lr'?"
    ],
    "submit demo.toml": ["run.dir = 'runs/demo': must be absolute"],
    f"submit demo.toml run.dir=/shared/demo --address {NOBODY}": [
        f"{NOBODY}: no Ray dashboard answers"
    ],
    f"status job --address {NOBODY}": [f"{NOBODY}: no Ray dashboard answers"],
    f"logs job --address {NOBODY}": [f"{NOBODY}: no Ray dashboard answers"],
    f"stop job --address {NOBODY}": [f"{NOBODY}: no Ray dashboard answers"],
    "export nowhere": ["RunMissing: nowhere: no config.json in it"],
    "trace nowhere": ["RunMissing: nowhere: no config.json in it"],
    "cluster": ["required: ", "--kind", "usage: async-opd cluster render"],
    "cluster rendr demo.toml --kind slurm": ["invalid choice: 'rendr' (choose from 'render')"],
    "cluster render demo.toml --kind slurm run.dir=/shared/runs/a learner.lrr=3": [
        "learner.lrr = 3: no such setting"
    ],
    "cluster render demo.toml --kind kubray": [
        "--kind: invalid choice: 'kubray' (choose from 'kuberay'"
    ],
    "cluster render demo.toml --kind slurm --gpus-per-node 0": [
        "--gpus-per-node: 0: must be an integer >= 1"
    ],
    "cluster render demo.toml run.dir=/shared/runs/a --kind slurm -o no/a.sh": [
        "no/a.sh: cannot be written: No such file"
    ],
    "audit nowhere": ["RunMissing: nowhere: no config.json in it"],
    "audit models": ["RunMissing: models: no config.json in it"],
    "audit finished damaged": ["damaged: one word too many", "usage: async-opd audit"],
    "audit finished --json out.json": [
        "--json out.json: --json takes no value",
        "for a file, end the command with > out.json; usage: ",
    ],
    "audit finished --json=out.json": [
        "--json out.json: --json takes no value",
        "usage: async-opd audit",
    ],
    "plan demo.toml --json out.json": [
        "--json out.json: --json takes no value",
        "usage: async-opd plan CONFIG",
    ],
    "plan demo.toml learner.lr=1 --offline now": [
        "--offline now: --offline takes no value; usage: "
    ],
    "explain --objective opd rollouts.json --json out.json": [
        "--json out.json: --json takes no value"
    ],
    "explain --objective opd --json rollouts.json": ["rollouts.json: ", "`trajectories`"],
    "explain --json correction.tag=ppo rollouts.json --objective opd": [
        "rollouts.json: ",
        "`trajectories`",
    ],
    "explain --json --objective opd rollout.json": [
        "rollout.json: no such file; did you mean 'rollouts.json'?"
    ],
    "submit demo.toml --no-wait now": [
        "--no-wait now: --no-wait takes no value",
        "usage: async-opd submit CONFIG",
    ],
    "submit demo.toml --no-wait learner.lrr=3": ["learner.lrr = 3: no such setting"],
    "logs job --follow now": ["--follow now: --follow takes no value", "usage: async-opd logs"],
    "plan demo.toml --offline learner.lrr=3": [
        "learner.lrr = 3: no such setting; did you mean 'learner.lr'?"
    ],
    "train run.steps=9 --resume finished learner.lrr=3": ["learner.lrr = 3: no such setting"],
    "scale finished --address http://a generators=no": ["'generators=no': write POOL=NUMBER"],
    "report nowhere -o page.html finished": ["RunMissing: nowhere: "],
}


def model(name: str, file: str = "config.json", **changes) -> Path:
    """A copy of the shipped student with `changes` made to one of its JSON files."""
    shutil.copytree(STUDENT, folder := Path("models") / name)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def trained(name: str) -> Path:
    """A run of three steps that saved its last."""
    Path(name).mkdir()
    config = load(DEMO, ["run.steps=3", "learner.warmup_steps=0"])
    Path(name, "config.json").write_bytes(msgspec.json.encode(config))
    checkpoints = Checkpoints(Path(name), keep=1)
    folder = checkpoints.begin(3)
    for part in ("model", "learner"):
        folder.joinpath(part).mkdir()
        folder.joinpath(part, "a.pt").write_bytes(b"state")
    checkpoints.commit(3, RunState(version=3, position={}, outstanding=[]))
    return Path(name) / "checkpoints" / "000003"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory full of what a newcomer may point at."""
    folder = tmp_path_factory.mktemp("newcomer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        row = '{"id": "a", "prompt": "1+1=", "answer": "2"}\n'
        texts = {
            "rows.jsonl": row * 9,
            "empty.jsonl": "",
            "late.jsonl": "".join(
                json.dumps({"id": n, "prompt": "1+1=", "answer": {50: None, 55: ""}.get(n, "2")})
                + "\n"
                for n in range(60)
            ),
            "broken.jsonl": row + '{"id": "b", "prompt"\n',
        }
        texts |= {"demo.toml": DEMO.read_text(), "rollouts.json": "{}"}
        for name, text in texts.items():
            Path(name).write_text(text)
        Path("latin.toml").write_bytes(b"# caf\xe9\n")
        Path("wide.toml").write_bytes(DEMO.read_text().encode("utf-16"))
        Path("deep.toml").write_text("a = " + "[" * 20_000 + "]" * 20_000)
        Path("huge.toml").write_text("a = " + "9" * 6000)
        Path("loop.toml").symlink_to("loop.toml")
        os.mkfifo("pipe.toml")
        (tokenizer := model("pipe") / "tokenizer.json").unlink()
        os.mkfifo(tokenizer)
        for file in model("no_tokenizer").glob("*token*"):
            file.unlink()
        (model("no_weights") / "model.safetensors").unlink()
        model("unknown", model_type="nonesuch")
        model("generation", "generation_config.json", max_new_tokens=0)
        (model("damaged") / "model.safetensors").write_bytes(b"damaged")
        (model("wordless") / "tokenizer.json").write_text("{")
        (model("list") / "config.json").write_text("[]")
        model("narrow", hidden_size=72)
        model("images", model_type="qwen2_vl")
        model("words", num_hidden_layers="three")
        core = json.loads((STUDENT / "tokenizer.json").read_text())["model"]
        core["vocab"] |= {"3": core["vocab"]["7"], "7": core["vocab"]["3"]}
        model("swapped", "tokenizer.json", model=core)
        (model("template") / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.content }"
        )
        trained("finished")
        (trained("damaged") / "learner" / "a.pt").write_bytes(b"stale")
        yield folder


def listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*"))


@pytest.fixture
def refused(folder, monkeypatch, capfd):
    """Runs a command line that must be refused, where a cluster that starts is a bug; gives its one
    line."""
    from async_opd.runtime import actors

    def starts(**_) -> None:
        pytest.fail("a cluster was started")

    monkeypatch.setattr(actors.ray, "init", starts)
    monkeypatch.chdir(folder)

    def refused(*words: str) -> str:
        before = listed(folder)
        assert main(list(words)) == 2
        captured = capfd.readouterr()
        assert (
            captured.out == ""
            and captured.err.startswith("async-opd: ")
            and captured.err.count("\n") == 1
        ), captured
        assert listed(folder) == before
        return captured.err

    return refused


@pytest.mark.parametrize(("line", "fragments"), COMMAND_LINES.items(), ids=COMMAND_LINES)
def test_a_wrong_command_is_one_helpful_line(line, fragments, refused):
    message = refused(*line.split())
    assert [fragment for fragment in fragments if fragment not in message] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_option_that_is_none(command, refused):
    assert "usage: async-opd " + command in refused(command, "--nonesuch")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there_is_said_at_once(scheme, refused, monkeypatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"ConfigError: RAY_ADDRESS = '{address}': no cluster answers there: " in refused(
            "demo"
        )


def test_nccl_is_refused_on_a_cluster_without_gpus():
    config = load(DEMO, ["sync.backend=nccl"])
    with pytest.raises(
        ConfigError, match=r"^sync\.backend = 'nccl': must be 'gloo' on a cluster without GPUs$"
    ):
        refuse_without_gpus(
            config.scorers, config.rollout, config.objective, False, config.sync.backend
        )


@pytest.mark.parametrize("line", ["tarin", "demo learner.lora_rank=8"])
def test_from_the_shell_it_is_the_same(line, tmp_path):
    completed = subprocess.run(
        [sys.executable, "-m", "async_opd", *line.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ,
    )
    assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (2, "", 1)
    assert (
        completed.stderr.startswith("async-opd: ConfigError: ") and list(tmp_path.iterdir()) == []
    )


def test_a_mark_of_byte_order_before_a_config_is_no_part_of_it(tmp_path):
    marked = tmp_path / "demo.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + DEMO.read_bytes())
    assert load(marked) == load(DEMO)


@pytest.mark.parametrize("place", ["nothing/a.sh", "full", "demo.toml/a.sh", "loop.toml", "models"])
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(place, refused):
    if place == "full":
        place = "/dev/full"
    words = ["cluster", "render", "--kind", "slurm", "demo.toml", "run.dir=/shared/a", "-o", place]
    message = refused(*words)
    assert f"{place}: " in message or repr(place) in message
