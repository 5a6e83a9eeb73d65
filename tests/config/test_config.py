"""Mistakes in a config go through the real command line, in this process; a run that would start is
an ImportError."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.config.load import load, load_run
from async_opd.core.errors import ConfigError, RunMissing
from async_opd.core.wire import Needs
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.teacher.config import ReferenceConfig

# but for those of models that `make real` makes (tests/test_real.py)
CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").glob("*.toml")
    if not path.name.startswith("smollm2_")
)
MAX_SECONDS = 2  # of CPU
TEACHER, MATH = (
    '[teacher]\nmodel = "toy:teacher"\nevaluate = true',
    '[teachers.math]\nmodel = "toy:teacher"',
)
PRIVILEGED = "teacher.context={prompt}{solution} data.solution=answer"
SAMPLING = (
    "teacher_sampling.share=0.125 teacher_sampling.full_until_step=30"
    " teacher_sampling.until_step=35"
)

# Overrides of the demo, or (old, new) text of its file; then what the message must say.
MISTAKES = {
    "misspelt setting": (
        "run.stpes=3",
        ["run.stpes = 3", "no such setting", "did you mean 'run.steps'?"],
    ),
    "misspelt section": ("learnr.lr=3", ["learnr: no such section", "did you mean 'learner'?"]),
    "setting in the wrong section": (
        "run.lr=1e-4",
        ["run.lr = 0.0001", "did you mean 'learner.lr'?"],
    ),
    "setting in no section": (
        "epochs=2",
        ["epochs = 2: no such setting", "did you mean 'data.epochs'"],
    ),
    "nothing like it": (
        "sync.zzz=1",
        ["sync.zzz = 1", "allowed: backend, bucket_mib, timeout_s, parity_every_steps"],
    ),
    "setting of another objective": (
        "objective.tag=opd",
        ["objective.k = 24: no such setting", "correction"],
    ),
    "misspelt objective": (
        "objective.tag=topkl",
        ["objective.tag = 'topkl'", "'opd'", "did you mean 'topk_kl'?"],
    ),
    "objective without a tag": (
        ('tag = "topk_kl"', ""),
        ["objective.tag: missing; must be ", "'topk_kl'"],
    ),
    "objective as a word": (
        "objective=opd",
        ["objective = 'opd': must be a section [objective] with tag"],
    ),
    "missing setting": (
        ("lr = 1e-3", ""),
        ["learner.lr: missing; must be a finite number > 0 and < 1"],
    ),
    "missing section": (
        ('[student]\nmodel = "toy:student"', ""),
        ["student: missing", "section [student] with model"],
    ),
    "not one of the allowed": (
        "run.stale=maks",
        ["run.stale = 'maks'", "'drop' or 'mask'", "did you mean 'mask'?"],
    ),
    "not one of the numbers": (
        "learner.zero_stage=4",
        ["learner.zero_stage = 4: must be 0, 1, 2 or 3"],
    ),
    "word for a number": (
        "learner.lr=fast",
        ["learner.lr = 'fast': must be a finite number > 0 and < 1"],
    ),
    "fraction for an integer": ("run.steps=1e3", ["run.steps = 1000.0: must be an integer >= 1"]),
    "word for a switch": (
        "teacher.evaluate=yes",
        ["teacher.evaluate = 'yes': must be true or false"],
    ),
    "number for a text": ("run.dir=2024", ["run.dir = 2024: must be a string"]),
    "empty text": ("eval.path=", ["eval.path = '': must be a string that is not empty"]),
    "no data": (
        "data.path=",
        [
            "data.path: missing; must be a text, or sections [data.sources.NAME] with path and"
            " weight"
        ],
    ),
    "value for a section": ("eval=3", ["eval = 3: must be a section [eval] with path"]),
    "pair that is no pair": (
        "learner.betas=[0.9]",
        ["learner.betas = [0.9]: must be [a finite number >= 0 and < 1, "],
    ),
    "out of bounds": (
        "rollout.gpu_memory_utilization=85",
        ["utilization = 85: must be a finite number > 0 and <= 1"],
    ),
    "wait without a bound": (
        "sync.timeout_s=inf",
        ["sync.timeout_s = inf: must be a finite number > 0"],
    ),
    "no checkpoint kept": (
        "run.keep_checkpoints=0",
        ["run.keep_checkpoints = 0: must be an integer >= 1"],
    ),
    "more outstanding than the lag allows": (
        "run.max_outstanding_steps=5.5",
        ["run.max_outstanding_steps = 5.5: must be <= run.max_lag_steps + 1 = 5"],
    ),
    "weights that go out too seldom for the bound": (
        "sync.every_steps=6",
        ["sync.every_steps = 6: must be <= run.max_lag_steps + 1 = 5, for the last step before"],
    ),
    "less outstanding than is trained between two updates": (
        "sync.every_steps=3 run.max_outstanding_steps=2",
        ["sync.every_steps = 3: must be <= run.max_outstanding_steps = 2, for no slot is given"],
    ),
    "weights that do not go out after each synchronous step": (
        "sync.every_steps=2 run.max_lag_steps=0",
        ["sync.every_steps = 2: must be <= run.max_lag_steps + 1 = 1"],
    ),
    "KV that is neither": ("sync.kv=kept", ["sync.kv = 'kept': must be ", "'keep'"]),
    "less outstanding than a step": (
        "run.max_outstanding_steps=0.5",
        ["outstanding_steps = 0.5: must be ", ">= 1"],
    ),
    "negative seed": ("run.seed=-1", ["run.seed = -1: must be an integer >= 0"]),
    "groups that do not fill a step": (
        "rollout.samples_per_prompt=7",
        ["per_step = 96: must be a multiple", "= 7"],
    ),
    "more ranks than work": (
        "learner.ranks=97",
        ["learner.ranks = 97: must be <= ", "trajectories_per_step = 96"],
    ),
    "batch below one sequence": (
        "learner.micro_batch_tokens=64",
        ["micro_batch_tokens = 64: must be >= ", "= 80"],
    ),
    "teacher batch below one": (
        "teacher.batch_tokens=64",
        ["teacher.batch_tokens = 64: must be >= ", "= 80"],
    ),
    "no such teacher": ("teacher.backend=vlm", ["teacher.backend = 'vlm'", "did you mean 'vllm'?"]),
    "vLLM teacher at a temperature": (
        "teacher.backend=vllm rollout.temperature=0.7",
        ["rollout.temperature = 0.7: must be 1 with teacher.backend = 'vllm'"],
    ),
    "split teacher on transformers": (
        "teacher.tensor_parallel_size=2",
        ["teacher.tensor_parallel_size = 2: must be 1 with teacher.backend = 'transformers'"],
    ),
    "no room for vLLM's own token": (
        "teacher.backend=vllm rollout.max_new_tokens=240",
        [
            "= 256: must be <= 255, the context of teacher.model = 'toy:teacher'",
            "teacher.backend = 'vllm' samples",
        ],
    ),
    "beyond the model's context": (
        "rollout.max_new_tokens=300",
        ["= 316: must be <= 256", "model = 'toy:student'"],
    ),
    "warm-up without an end": (
        "run.steps=10",
        ["learner.warmup_steps = 10: must be < run.steps = 10"],
    ),
    "bfloat16 without masters": (
        "learner.dtype=bfloat16 learner.zero_stage=0",
        ["learner.dtype = 'bfloat16'", "zero_stage 1, 2 or 3"],
    ),
    "offload of what is whole": (
        "learner.offload_optimizer=true learner.zero_stage=0",
        ["learner.offload_optimizer = true: needs learner.zero_stage 1, 2 or 3"],
    ),
    "no bound of the mean": (
        "sync.parity_mean=0",
        ["sync.parity_mean = 0", "must be "],
    ),
    "a way out for no adapter": (
        "sync.lora=merged",
        ["sync.lora = 'merged': has no effect without student.lora"],
    ),
    "an adapter alone, and none": (
        "sync.lora=adapter",
        ["sync.lora = 'adapter': has no effect without student.lora"],
    ),
    "another way out": (
        "student.lora.rank=4 sync.lora=both",
        ["sync.lora = 'both'", "'merged'", "'adapter'"],
    ),
    "an adapter too large to go alone": (
        "student.lora.rank=513 sync.lora=adapter",
        ["student.lora.rank = 513: must be <= 512 for sync.lora = 'adapter'", "'merged'"],
    ),
    "an adapter alone for a model by other code": (
        "student.lora.rank=4 sync.lora=adapter rollout.engine.model_impl=transformers",
        ["rollout.engine.model_impl = 'transformers': must be 'vllm' or 'auto'", "'merged'"],
    ),
    "no drift": (
        "sync.parity_drift=-0.1",
        ["sync.parity_drift = -0.1", "must be "],
    ),
    "check outlasts the wait": (
        "verify.timeout_s=200",
        ["verify.timeout_s = 200.0: must be < timeout.score_s = 120.0"],
    ),
    "template args, no template": (
        "data.template_args.think=true",
        ["{'think': True}", "data.chat_template = true"],
    ),
    "teacher's, no template": (
        "teacher.template_args.think=true",
        ["teacher.template_args", "data.chat_template"],
    ),
    "teacher's own way, no template": (
        "teacher.system=brief",
        [
            "teacher.system = 'brief': has no effect without data.chat_template = true or"
            " teacher.chat_template"
        ],
    ),
    "an empty message, no template": ('teacher.system=""', ["teacher.system = '': has no effect"]),
    "no template by that name": (
        "teacher.chat_template=missing.jinja",
        ["teacher.chat_template = 'missing.jinja': no such file"],
    ),
    "no file of a template": (
        "teacher.chat_template=pyproject.toml",
        [
            "teacher.chat_template = 'pyproject.toml': must be true, a file that ends in .jinja, or"
            " a template in Jinja"
        ],
    ),
    "neither text nor true": (
        "teacher.chat_template=7",
        ["teacher.chat_template = 7: must be true or false or a string that is not empty"],
    ),
    "the student's own template": (
        "teacher.model=toy:student data.chat_template=true teacher.chat_template=true",
        ["teacher.chat_template = true: has no effect with teacher.model = student.model"],
    ),
    "template as an argument of itself": (
        "data.chat_template=true teacher.template_args.chat_template=x",
        ["teacher.template_args.chat_template", "set teacher.chat_template"],
    ),
    "what transformers takes itself": (
        "data.chat_template=true data.template_args.add_generation_prompt=false",
        ["data.template_args.add_generation_prompt: is no argument of a template"],
    ),
    "what transformers takes itself, a teacher's": (
        "data.chat_template=true teacher.template_args.tokenize=false",
        ["teacher.template_args.tokenize: is no argument of a template"],
    ),
    "a reference reads as the student": (
        "reference.system=brief",
        ["reference.system = 'brief': no such setting"],
    ),
    "teacher measured on nothing": (
        ('[eval]\npath = "toy:heldout"\nproblems = 256', ""),
        ["an [eval] section"],
    ),
    "both forms of teachers": (
        "teachers.math.model=toy:teacher",
        ["teacher: must not stand beside [teachers.NAME]"],
    ),
    "no teacher": (
        (TEACHER, ""),
        ["teacher: missing; must be a section [teacher] with model, or sections [teachers.NA"],
    ),
    "no section of a name": (
        (TEACHER, "[teachers]"),
        ["teacher: missing; must be a section [teacher] with model, or"],
    ),
    "teachers without a column": (
        (TEACHER, MATH),
        ["data.teacher: missing; must be the name of the column"],
    ),
    "column without teachers": (
        "data.teacher=kind",
        ["data.teacher = 'kind': has no effect without", "[teachers.NAME]"],
    ),
    "misspelt setting of a named one": (
        (TEACHER, MATH.replace("model", "modle")),
        [
            "teachers.math.modle = 'toy:teacher': no such setting",
            "did you mean 'teachers.math.model'?",
        ],
    ),
    "named one without a model": (
        (TEACHER, "[teachers.math]"),
        ["teachers.math.model: missing; must be a string"],
    ),
    "named one as a word": (
        "teachers.math=3",
        ["teachers.math = 3: must be a section [teachers.math] with model"],
    ),
    "teachers as a word": ("teachers=3", ["teachers = 3: must be sections [teachers.NAME]"]),
    "teacher of no usable name": (
        (TEACHER, MATH.replace("math", '"a b"')),
        ["teachers.'a b': a name must be of letters, digits, - and _"],
    ),
    "named one out of bounds": (
        (TEACHER, MATH + "\nreplicas = 0"),
        ["teachers.math.replicas = 0: must be an integer >= 1"],
    ),
    "reference that nobody needs": (
        "reference.replicas=2",
        ["reference: has no effect with objective.tag = 'topk_kl', which needs none"],
    ),
    "context without its places": (
        "teacher.context={prompt} data.solution=answer",
        ["teacher.context = '{prompt}': must contain {prompt} and {solution}"],
    ),
    "context without solutions": (
        "teacher.context={prompt}{solution}",
        [
            "data.solution: missing; must be the name of the column with the solutions for"
            " teacher.context"
        ],
    ),
    "solutions for nobody": (
        "data.solution=answer",
        ["data.solution = 'answer': has no effect without a teacher's c"],
    ),
    "own bound of no own rendering": (
        "teacher.max_prompt_tokens=40",
        [
            "teacher.max_prompt_tokens = 40: has no effect without teacher.context, teacher.system,"
            " teacher.chat_template or teacher.template_args"
        ],
    ),
    "teacher batch below its own": (
        f"{PRIVILEGED} teacher.max_prompt_tokens=90 teacher.batch_tokens=100",
        [
            "teacher.batch_tokens = 100: must be >= teacher.max_prompt_tokens +"
            " rollout.max_new_tokens = 154"
        ],
    ),
    "beyond the teacher's context": (
        f"{PRIVILEGED} teacher.max_prompt_tokens=200",
        [
            "teacher.max_prompt_tokens + rollout.max_new_tokens = 264: must be <= 256, the context"
            " of teacher.model = "
        ],
    ),
    "teacher that is not the student": (
        "teacher.update=ema",
        [
            "teacher.model = 'toy:teacher': must be student.model = 'toy:student', or"
            " teacher.update = 'ema' has nothing"
        ],
    ),
    "vLLM teacher that follows": (
        "teacher.update=copy teacher.model=toy:student teacher.backend=vllm",
        ["teacher.update = 'copy': must be 'frozen' with teacher.backend = 'vllm'"],
    ),
    "steps of a frozen teacher": (
        "teacher.update_every_steps=5",
        ["teacher.update_every_steps = 5: has no effect with teacher.update = 'frozen'"],
    ),
    "decay of a copy": (
        "teacher.update=copy teacher.model=toy:student teacher.ema_decay=0.9",
        ["teacher.ema_decay = 0.9: has no effect with teacher.update = 'copy'"],
    ),
    "decay of nothing": (
        "teacher.ema_decay=1",
        ["teacher.ema_decay = 1: must be a finite number > 0 and < 1"],
    ),
    "teacher sampling without an end": (
        "teacher_sampling.share=0.1",
        ["teacher_sampling.full_until_step: missing"],
    ),
    "every prompt the teacher's": (
        f"{SAMPLING} teacher_sampling.share=1.0",
        ["share = 1.0: must be", "> 0 and < 1"],
    ),
    "teacher sampling that ends before it falls": (
        f"{SAMPLING} teacher_sampling.until_step=29",
        ["teacher_sampling.until_step = 29: must be >= teacher_sampling.full_until_step = 30"],
    ),
    "several teachers that should answer": (
        (
            f"{TEACHER}\n\n[data]",
            (
                f"{MATH}\n\n[teacher_sampling]\nshare = 0.1\nfull_until_step = 1\nuntil_step ="
                ' 2\n\n[data]\nteacher = "id"'
            ),
        ),
        ["teacher_sampling: needs one [teacher] that answers, not [teachers.NAME]"],
    ),
    "a teacher that answers and follows": (
        f"{SAMPLING} teacher.model=toy:student teacher.update=copy",
        ["teacher_sampling: needs teacher.update = 'frozen', not 'copy'"],
    ),
    "groups of one": (
        ('tag = "topk_kl"\nk = 24\ndivergence = "reverse"', 'tag = "sg_opd"'),
        [
            "rollout.samples_per_prompt = 1: must be >= 2 for objective.tag = 'sg_opd', which"
            " compares them"
        ],
    ),
    "groups of one, for a gate on verdicts": (
        ('tag = "topk_kl"\nk = 24\ndivergence = "reverse"', 'tag = "rg_opd"'),
        [
            "rollout.samples_per_prompt = 1: must be >= 2 for objective.tag = 'rg_opd', which"
            " compares them"
        ],
    ),
    "groups of one, for moments over them": (
        (
            'tag = "topk_kl"\nk = 24\ndivergence = "reverse"',
            'tag = "top_d"\nnormalise = true',
        ),
        [
            "rollout.samples_per_prompt = 1: must be >= 2 for objective.tag = 'top_d', which"
            " compares them"
        ],
    ),
    "groups of one, for a reward among them": (
        (
            'tag = "topk_kl"\nk = 24\ndivergence = "reverse"',
            'tag = "opd"\nreward = { weight = 2.0 }',
        ),
        [
            "rollout.samples_per_prompt = 1: must be >= 2 for objective.reward.baseline = 'group',"
            " which compares them"
        ],
    ),
    "two corrections of the same drift": (
        (
            'divergence = "reverse"',
            'divergence = "reverse"\nprefix = {}\nfreshness = { alpha = 2.0 }',
        ),
        [
            "freshness: must not stand beside prefix, for both correct how far the"
            " student has moved from what it wrote"
        ],
    ),
    "a sampled rest of another divergence": (
        ('divergence = "reverse"', 'divergence = "forward"\nrest = "sampled"'),
        ["rest = 'sampled': must be of divergence = 'reverse', not 'forward'"],
    ),
    "a gate of another ratio": (
        (
            'tag = "topk_kl"\nk = 24\ndivergence = "reverse"',
            'tag = "opd"\ncorrection = { tag = "importance", narrowing = [0.1, 0.1] }',
        ),
        ["narrowing = (0.1, 0.1): has no effect with ratio = 'token'"],
    ),
    "bounds of no ratio": (
        (
            'tag = "topk_kl"\nk = 24\ndivergence = "reverse"',
            'tag = "opd"\ncorrection = {tag="importance", ratio="none", at_most=2}',
        ),
        ["objective.correction.at_most = 2.0: has no effect with ratio = 'none'"],
    ),
    "share of no mixture": (
        "objective.beta=0.3",
        ["objective.beta = 0.3: has no effect with divergence = 'reverse'"],
    ),
    "mean over what nothing selects": (
        "objective.mean_over=selected",
        ["objective.mean_over = 'selected': has no effect without position or random"],
    ),
    "end of all of it": (
        'objective.position={share=1.0,part="suffix"}',
        ["objective.position.part = 'suffix': has no effect with share = 1"],
    ),
    "proximal policy that would be the live one": (
        'objective={tag="opd",correction={tag="decoupled"}}',
        ["objective.correction.tag = 'decoupled': must be 'importance' or 'ppo'"],
    ),
    "nothing added": (
        'objective={tag="eopd",alpha=0}',
        ["objective.alpha = 0: must be a finite number > 0"],
    ),
    "running mean without what is dropped": (
        'objective={tag="egrsd"} rollout.truncated=drop',
        [
            "rollout.truncated = 'drop': must be 'train' or 'mask' for objective.tag = 'egrsd',"
            " whose running mean would"
        ],
    ),
    "running mean of a task reward without what is dropped": (
        'objective={tag="opd",reward={baseline="running"}} rollout.truncated=drop',
        [
            "rollout.truncated = 'drop': must be 'train' or 'mask' for objective.reward.baseline ="
            " 'running', whose running mean would"
        ],
    ),
    "last weight of no fall": (
        f"{SAMPLING} teacher_sampling.full_until_step=35 teacher_sampling.weight_end=0.5",
        [
            "teacher_sampling.weight_end = 0.5: has no effect with teacher_sampling.until_step ="
            " full_until_step = 35"
        ],
    ),
    "answers longer than what is checked": (
        f"{SAMPLING} teacher_sampling.max_new_tokens=65",
        ["teacher_sampling.max_new_tokens = 65: must be <= rollout.max_new_tokens = 64"],
    ),
    "misspelt check": ("verify.check=maths", ["verify.check = 'maths'", "did you mean 'math'?"]),
    "tolerance of another check": (
        "verify.tolerance=0.1",
        ["verify.tolerance = 0.1: is of verify.check = 'numeric', not 'math'"],
    ),
    "tolerance below nothing": (
        "verify.check=numeric verify.tolerance=-0.1",
        ["verify.tolerance = -0.1: must be", ">= 0"],
    ),
    "special tokens for a check of ours": (
        "verify.special_tokens=true",
        ["verify.special_tokens = true: is of a function of yours", "check = 'math'"],
    ),
    "check of no form": (
        "verify.check=mod.fn:",
        ["verify.check = 'mod.fn:'", "'package.module:function'"],
    ),
    "misspelt sandbox": ("verify.sandbox=non", ["verify.sandbox = 'non'", "did you mean 'none'?"]),
    "misspelt shipped data": (
        "data.path=toy:trian",
        ["data.path = 'toy:trian'", "did you mean 'toy:train'?"],
    ),
    "misspelt shipped model": (
        "teacher.model=toy:taecher",
        ["toy:taecher", "did you mean 'toy:teacher'?"],
    ),
    "misspelt data file": (
        "data.path=rows/trian.jsonl",
        ["rows/trian.jsonl", "did you mean 'rows/train.jsonl'?"],
    ),
    "misspelt eval file": (
        "eval.path=rows/trian.jsonl",
        ["eval.path", "did you mean 'rows/train.jsonl'?"],
    ),
    "data of another format": (
        "data.path=rows/train.csv",
        ["rows/train.csv", "ending in .jsonl, .json, .parquet"],
    ),
    "misspelt model folder": (
        "student.model=models/smal",
        ["models/smal", "did you mean 'models/small'?"],
    ),
    "no model in the folder": ("teacher.model=rows", ["teacher.model = 'rows'", "no config.json"]),
    "broken model": (
        "teacher.model=models/small",
        ["teacher.model = 'models/small'", "config.json is not JSON"],
    ),
    "run.dir is a file": (
        "run.dir=rows/train.csv/demo",
        ["run.dir = 'rows/train.csv/demo'", "train.csv is a file"],
    ),
    "run.dir moves its data": (
        "run.dir=rows data.path=rows/train.jsonl",
        ["run.dir = 'rows'", "rows/train.jsonl"],
    ),
    "run.dir moves everything": ("run.dir=.", ["run.dir = '.': holds the working directory"]),
    "override without a value": ("learner.lr", ["override 'learner.lr': write key.path=value"]),
    "override through a value": (
        "run.steps.max=3",
        ["override 'run.steps.max=3': steps is a value"],
    ),
    "not TOML": (("[run]", "[run"), ["config demo.toml is not valid TOML", "line 3"]),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a config, rows and a model that has a broken config; no run can be
    started from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "async_opd.launch.run", None)
    for name, text in {
        "rows/train.jsonl": "{}",
        "rows/train.csv": "",
        "models/small/config.json": "{",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    Path("demo.toml").write_text(DEMO.read_text())
    return tmp_path


@pytest.mark.parametrize(("mistake", "fragments"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_in_no_time_with_its_place_value_and_remedy(
    mistake, fragments, folder, capsys
):
    if isinstance(mistake, tuple):
        assert mistake[0] in DEMO.read_text()
        Path("demo.toml").write_text(DEMO.read_text().replace(*mistake))
    start = time.process_time()
    assert main(["train", "demo.toml", *(mistake.split() if isinstance(mistake, str) else ())]) == 2
    assert time.process_time() - start < MAX_SECONDS
    message = capsys.readouterr().err
    assert message.startswith("async-opd: ConfigError: ") and message.count("\n") == 1
    assert [fragment for fragment in fragments if fragment not in message] == []


def test_a_mistake_costs_under_two_seconds_from_the_shell(folder):
    start = os.times()
    completed = subprocess.run(
        [sys.executable, "-m", "async_opd", "demo", "learner.lrr=1e-4"],
        capture_output=True,
        text=True,
    )
    end = os.times()
    spent = end.children_user + end.children_system - start.children_user - start.children_system
    assert spent < MAX_SECONDS
    assert completed.returncode == 2 and completed.stdout == ""
    assert (
        completed.stderr
        == "async-opd: ConfigError: learner.lrr = 0.0001: no such setting; did you mean"
        " 'learner.lr'?\n"
    )


def test_reading_a_config_loads_nothing_heavy():
    code = (
        "import sys, async_opd, async_opd.config.load as c; c.load(c.Path(sys.argv[1]));"
        " print(*sys.modules)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, DEMO], capture_output=True, text=True, check=True
    )
    heavy = {
        "torch",
        "ray",
        "transformers",
        "vllm",
        "datasets",
        "deepspeed",
        "math_verify",
        "wandb",
        "rich",
    }
    assert heavy & set(completed.stdout.split()) == set()


def test_a_vllm_teacher_is_refused_where_the_objective_needs_exact_entropy(monkeypatch):
    monkeypatch.setattr(TopkKl, "needs", lambda self: Needs(teacher_entropy=True))
    assert load(DEMO).teacher.backend == "transformers"
    with pytest.raises(
        ConfigError, match=r"^teacher.backend = 'vllm': must be 'transformers' for objective.tag"
    ):
        load(DEMO, ["teacher.backend=vllm"])


def test_a_reference_is_the_student_before_its_first_step_unless_it_is_another_model(monkeypatch):
    assert "reference" not in load(DEMO).scorers
    monkeypatch.setattr(TopkKl, "needs", lambda self: Needs(reference=True))
    assert load(DEMO).scorers["reference"] == ReferenceConfig(model="toy:student")
    other = load(DEMO, ["reference.model=toy:teacher", "reference.replicas=2"]).scorers["reference"]
    assert (other.model, other.replicas) == ("toy:teacher", 2)


def test_a_vllm_reference_needs_no_entropy_but_the_plain_temperature(monkeypatch):
    monkeypatch.setattr(TopkKl, "needs", lambda self: Needs(reference=True, teacher_entropy=True))
    assert load(DEMO, ["reference.backend=vllm"]).scorers["reference"].backend == "vllm"
    with pytest.raises(
        ConfigError, match=r"temperature = 0.5: must be 1 with reference.backend = 'vllm'"
    ):
        load(DEMO, ["reference.backend=vllm", "rollout.temperature=0.5"])


def test_several_teachers_are_scorers_by_their_sections(folder):
    Path("demo.toml").write_text(DEMO.read_text().replace(TEACHER, MATH))
    config = load(
        "demo.toml",
        ["data.teacher=kind", "teachers.code.model=toy:student", "teachers.code.replicas=3"],
    )
    assert {name: t.model for name, t in config.named_teachers.items()} == {
        "math": "toy:teacher",
        "code": "toy:student",
    }
    assert [(section, s.replicas) for section, s in config.scorers.items()] == [
        ("teachers.math", 1),
        ("teachers.code", 3),
    ]
    with pytest.raises(
        ConfigError,
        match=r"teachers.code.batch_tokens = 9: must be >= data.max_prompt_tokens \+ roll",
    ):
        load(
            "demo.toml",
            [
                "data.teacher=kind",
                "teachers.code.model=toy:student",
                "teachers.code.batch_tokens=9",
            ],
        )


def test_a_run_directory_that_holds_a_teacher_is_refused(folder):
    (folder / "runs/other").mkdir(parents=True)
    (folder / "runs/other/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run.dir = 'runs': holds teacher.model = 'runs/other'"):
        load(DEMO, ["run.dir=runs", "teacher.model=runs/other"])


def test_a_vllm_teacher_takes_a_sequence_in_pieces():
    # though sequences have up to 80 tokens
    assert (
        load(DEMO, ["teacher.backend=vllm", "teacher.batch_tokens=64"]).teacher.batch_tokens == 64
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_loads(path):
    assert load(path).run.steps >= 1


def test_the_weight_of_teacher_sampling_is_1_and_falls_to_0_unless_said_otherwise():
    sampling = load(DEMO, SAMPLING.split()).teacher_sampling
    assert [round(sampling.weight(step), 6) for step in (1, 30, 33, 35, 36)] == [
        1,
        1,
        0.345492,
        0,
        0,
    ]
    sampling = load(
        DEMO,
        [*SAMPLING.split(), "teacher_sampling.weight_start=2", "teacher_sampling.weight_end=0.5"],
    )
    assert [sampling.teacher_sampling.weight(step) for step in (30, 35, 36)] == [2.0, 0.5, 0.0]


def test_groups_per_step_are_trajectories_over_samples():
    assert load(DEMO, ["rollout.samples_per_prompt=8"]).groups_per_step == 12  # 96 / 8


def test_overrides_replace_nested_keys_and_the_last_one_wins():
    config = load(
        DEMO, ["learner.lr=1e-4", "run.steps=3000", "run.steps=30", "learner.betas=[0.8, 0.9]"]
    )
    assert (config.learner.lr, config.run.steps, config.learner.betas) == (1e-4, 30, (0.8, 0.9))


def test_overrides_make_tables_and_sections_that_the_file_has_not():
    overrides = [
        "data.chat_template=true",
        "data.template_args.think=false",
        "data.template_args.lang=de",
    ]
    config = load(DEMO, [*overrides, "timeout.start_s=60", 'eval.split="7"'])
    assert config.data.template_args == {"think": False, "lang": "de"}
    assert (config.timeout.start_s, config.timeout.step_s, config.eval.split) == (60.0, 600.0, "7")


def test_a_teachers_own_way_of_reading(tmp_path, monkeypatch):
    """What it may be, with which of the student's, and that its file is an input of the run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in ("own.jinja", "a.jinja"):
        (tmp_path / file).write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    for template in ("~/own.jinja", "own.jinja", "~{{ messages }}", "{# nothing #}"):
        config = load(DEMO, [f"teacher.chat_template={json.dumps(template)}", 'teacher.system=""'])
        assert config.teacher.system == ""
        name = template.replace("~", f"{tmp_path}") if "own" in template else None
        assert config.teacher.template_file == name
        assert config.inputs.get("teacher.chat_template") == name
        shipped = {"teacher.chat_template": name} if template == "own.jinja" else {}
        assert config.relative_inputs == shipped
    # on a cluster, an absolute path is one of its own
    far = "teacher.chat_template=/nowhere/a.jinja"
    assert load(DEMO, [far], elsewhere=True).teacher.template_file == "/nowhere/a.jinja"
    with pytest.raises(ConfigError, match=r"'/nowhere/a\.jinja': no such file"):
        load(DEMO, [far])


def test_a_hub_id_is_not_looked_for_on_disk(folder):
    config = load(DEMO, ["student.model=Qwen/Qwen3-0.6B", "data.path=openai/gsm8k-v1.5"])
    assert (config.student.model, config.data.path) == ("Qwen/Qwen3-0.6B", "openai/gsm8k-v1.5")


def test_a_new_run_may_not_move_its_own_model_aside(folder):
    (folder / "runs/checkpoint").mkdir(parents=True)
    (folder / "runs/checkpoint/config.json").write_text(json.dumps({"max_position_embeddings": 80}))
    overrides = ["run.dir=runs", "student.model=runs/checkpoint"]
    with pytest.raises(
        ConfigError, match=r"run.dir = 'runs': holds student.model = 'runs/checkpoint'"
    ):
        load(DEMO, overrides)


def test_a_stretched_context_is_not_bounded_by_the_trained_one(folder):
    (folder / "yarn").mkdir()
    rope = {"rope_type": "yarn", "factor": 4.0}
    (folder / "yarn/config.json").write_text(
        json.dumps({"max_position_embeddings": 40, "rope_parameters": rope})
    )
    assert load(DEMO, ["student.model=yarn"]).student.model == "yarn"


def test_a_misspelt_config_names_the_nearest_file(folder):
    with pytest.raises(
        ConfigError, match=r"config dmeo.toml: no such file; did you mean 'demo.toml'\?"
    ):
        load("dmeo.toml")


@pytest.mark.parametrize("path", [DEMO, *CONFIGS], ids=lambda path: path.stem)
def test_what_a_run_keeps_of_its_config_is_enough_to_go_on_with(path, tmp_path):
    config = load(path, [f"run.dir={tmp_path}"])
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    assert load_run(tmp_path) == config
    more = load_run(tmp_path, [f"run.steps={config.run.steps + 1}"])
    assert more.run.steps == config.run.steps + 1


def test_a_directory_that_holds_no_run_cannot_be_gone_on_with(tmp_path):
    with pytest.raises(RunMissing, match=r"no config\.json in it"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunMissing, match=r"config\.json is damaged"):
        load_run(tmp_path)
