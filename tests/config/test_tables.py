"""Tables that are passed through to vLLM and DeepSpeed: what they may hold, and that it arrives."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config import deepspeed_keys, signatures, tables, vllm_arguments
from async_opd.config.evaluation import load_eval, run_config
from async_opd.config.load import load, load_run
from async_opd.config.teacher_rules import refuse_without_gpus
from async_opd.core.errors import ConfigError
from async_opd.core.run_dir import CONFIG
from async_opd.toy import STUDENT

VLLM_TEACHER = "teacher.backend=vllm"
REFERENCE = ("objective={ tag = 'g_opd', lambda = 1.25 }", "reference.backend=vllm")
SAMPLING = (
    "teacher_sampling.share=0.125",
    "teacher_sampling.full_until_step=30",
    "teacher_sampling.until_step=35",
)
SPECULATION = "rollout.engine.speculative_config"

# Overrides of the demo, and what the message must say.
MISTAKES = {
    "misspelt": (
        ["rollout.engine.max_num_batch_tokens=8192"],
        "rollout.engine.max_num_batch_tokens = 8192: no such setting; did you mean"
        " 'rollout.engine.max_num_batched_tokens'?",
    ),
    "wrong type": (
        ["rollout.engine.max_num_batched_tokens=many"],
        "rollout.engine.max_num_batched_tokens = 'many': must be an integer >= 1",
    ),
    "out of vLLM's bounds": (
        ["rollout.engine.watermark=1.5"],
        "rollout.engine.watermark = 1.5: must be a finite number >= 0",
    ),
    "none of a few words": (
        ["rollout.engine.kv_cache_dtype=fp9"],
        "must be 'auto', 'bfloat16', 'float16', 'fp8'",
    ),
    "nearest word": ([VLLM_TEACHER, "teacher.engine.quantization=fp7"], "did you mean 'fp8'?"),
    "nearest member of an enum": (
        ["rollout.engine.attention_backend=flash_atn"],
        "did you mean 'FLASH_ATTN'?",
    ),
    "misspelt in a table of a table": (
        ["rollout.engine.compilation_config.cudagraph_mod=FULL"],
        "did you mean 'rollout.engine.compilation_config.cudagraph_mode'?",
    ),
    "a value for a table": (
        ["rollout.engine.compilation_config=3"],
        "rollout.engine.compilation_config = 3: must be a section",
    ),
    "misspelt in what vLLM declares as anything": (
        [f"{SPECULATION}.metod=ngram"],
        f"did you mean '{SPECULATION}.method'?",
    ),
    "no table": (["rollout.engine=3"], "rollout.engine = 3: must be a table"),
    "a setting of ours": (
        ["rollout.engine.max_num_seqs=3"],
        "rollout.engine.max_num_seqs = 3: may not be set: is set by rollout.concurrency",
    ),
    "the model": (
        ["rollout.engine.model=x"],
        "rollout.engine.model = 'x': may not be set: the model is student.model",
    ),
    "a teacher's model": (
        [VLLM_TEACHER, "teacher.engine.tokenizer=x"],
        "teacher.engine.tokenizer = 'x': may not be set: the model is teacher.model",
    ),
    "a guarantee": (
        ["rollout.engine.logprobs_mode=raw_logprobs"],
        "may not be set: log-probs must be those of the distribution that was sampled from",
    ),
    "quantized rollouts": (
        ["rollout.engine.quantization=fp8"],
        "rollout.engine.quantization = 'fp8': may not be set: the learner's weights are not",
    ),
    "several nodes": (["rollout.engine.pipeline_parallel_size=2"], "one actor on one node"),
    "speculation that samples something else": (
        [f"{SPECULATION}.rejection_sample_method=synthetic"],
        f"{SPECULATION}.rejection_sample_method = 'synthetic': may not be set",
    ),
    "fewer tokens than sequences": (
        ["rollout.engine.max_num_batched_tokens=8"],
        "must be >= rollout.concurrency = ",
    ),
    "a teacher's batch": (
        [VLLM_TEACHER, "teacher.engine.max_num_batched_tokens=64"],
        "is set by teacher.batch_tokens",
    ),
    "a teacher on transformers": (
        ["teacher.engine.quantization=fp8"],
        "has no effect with teacher.backend = 'transformers'",
    ),
    "a reference": (
        [*REFERENCE, "reference.engine.dtype=half"],
        "reference.engine.dtype = 'half': may not be set: is set by reference.dtype",
    ),
    "stage": (
        ["learner.deepspeed.zero_optimization.stage=2"],
        "learner.deepspeed.zero_optimization.stage = 2: may not be set: is set by"
        " learner.zero_stage",
    ),
    "optimizer": (["learner.deepspeed.optimizer.type=Lamb"], "is set by learner.lr, betas"),
    "layout of checkpoints": (
        ["learner.deepspeed.zero_optimization.round_robin_gradients=true"],
        "checkpoints are laid out without it",
    ),
    "misspelt of DeepSpeed's": (
        ["learner.deepspeed.zero_optimization.reduce_buket_size=4"],
        "did you mean 'learner.deepspeed.zero_optimization.reduce_bucket_size'?",
    ),
    "misspelt table of DeepSpeed's": (
        ["learner.deepspeed.zero_optimisation.stage=1"],
        "did you mean 'learner.deepspeed.zero_optimization'?",
    ),
    "bounds of DeepSpeed's": (
        ["learner.deepspeed.zero_optimization.reduce_bucket_size=0"],
        "must be an integer > 0",
    ),
    "overlap that DeepSpeed asserts against": (
        ["learner.deepspeed.zero_optimization.overlap_comm=true"],
        "overlap_comm = true: needs learner.zero_stage 2 or 3",
    ),
    "word of DeepSpeed's": (
        ["learner.deepspeed.communication_data_type=bf15"],
        "must be 'bf16', 'fp16' or 'fp32'; did you mean 'bf16'?",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_place_and_what_is_allowed(name, tmp_path):
    overrides, message = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        load(DEMO, [*overrides, f"run.dir={tmp_path}/run"])
    assert message in str(caught.value)


TAKEN = [
    ["rollout.engine.max_num_batched_tokens=8192", "rollout.engine.kv_cache_dtype=fp8"],
    ['rollout.engine={ block_size = 32, compilation_config = { cudagraph_mode = "NONE" } }'],
    [f"{SPECULATION}={{ method = 'ngram', num_speculative_tokens = 3, prompt_lookup_max = 4 }}"],
    [VLLM_TEACHER, "teacher.engine.quantization=fp8", "teacher.engine.kv_cache_dtype=fp8"],
    [VLLM_TEACHER, "teacher.engine.hf_overrides.rope_parameters.factor=4.0"],
    [*SAMPLING, "teacher.engine.quantization=fp8"],
    [*REFERENCE, "reference.engine.attention_backend=FLASHINFER"],
    ["learner.zero_stage=2", "learner.deepspeed.zero_optimization.overlap_comm=true"],
    ["learner.deepspeed={ communication_data_type = 'fp32', wall_clock_breakdown = true }"],
]


@pytest.mark.parametrize("overrides", TAKEN, ids=" ".join)
def test_a_table_goes_into_the_runs_config_and_comes_back(overrides, tmp_path):
    config = load(DEMO, [*overrides, f"run.dir={tmp_path}"])
    assert config != load(DEMO, [*overrides[:-1], f"run.dir={tmp_path}"])
    (tmp_path / CONFIG).write_bytes(msgspec.json.encode(config))
    assert load_run(tmp_path) == config
    more = load_run(tmp_path, ["rollout.engine.max_num_scheduled_tokens=512"])
    assert more.rollout.engine == config.rollout.engine | {"max_num_scheduled_tokens": 512}


def test_speculation_is_refused_where_its_log_probs_are_wrong(tmp_path):
    """On CPU vLLM draws what follows a draft by writing over the logits that it reads log-probs
    from: in a trial of 60 tokens 56 were off, or NaN."""
    speculation = "{ method = 'ngram', num_speculative_tokens = 3 }"
    for section, more in {"rollout": [], "teacher": [VLLM_TEACHER]}.items():
        table = f"{section}.engine.speculative_config"
        config = load(DEMO, [f"{table}={speculation}", *more, f"run.dir={tmp_path}/run"])
        with pytest.raises(ConfigError, match=f"^{re.escape(table)}: must be absent on a cluster"):
            refuse_without_gpus(config.scorers, config.rollout, config.objective, False, "gloo")


def test_a_teachers_context_is_what_its_table_makes_of_it(tmp_path):
    long = [VLLM_TEACHER, "rollout.max_new_tokens=3000", "learner.micro_batch_tokens=8192"]
    run, model = f"run.dir={tmp_path}/run", tmp_path / "student"
    shutil.copytree(STUDENT, model)
    read = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(read | {"max_position_embeddings": 10_000}))
    settings = [*long, f"student.model={model}", run]
    with pytest.raises(ConfigError, match=r"the context of teacher\.model"):
        load(DEMO, settings)
    more = "teacher.engine.hf_overrides={ max_position_embeddings = 4096 }"
    assert load(DEMO, [*settings, more]).teacher.engine


def test_an_evaluation_has_the_table_too(tmp_path):
    settings = ["data.path=toy:heldout", f"run.dir={tmp_path}/eval"]
    asked = load_eval("toy:student", [*settings, "rollout.engine.block_size=32"])
    assert run_config(asked).rollout.engine == {"block_size": 32}
    with pytest.raises(ConfigError, match=r"did you mean 'rollout\.engine\.block_size'"):
        load_eval("toy:student", [*settings, "rollout.engine.block_sise=32"])


@pytest.fixture
def without(monkeypatch):
    """Leaves out of what is installed the packages of these names."""
    find_spec = importlib.util.find_spec
    caches = signatures._tree, signatures._type_of_name, tables.engine_takes, tables.deepspeed_takes

    def leave_out(*names: str) -> None:
        monkeypatch.setattr(
            signatures, "find_spec", lambda name: None if name in names else find_spec(name)
        )
        for cached in caches:
            cached.cache_clear()

    yield leave_out
    for cached in caches:
        cached.cache_clear()


def test_without_the_packages_what_breaks_a_guarantee_is_refused_all_the_same(without, tmp_path):
    without("vllm", "deepspeed")
    here = f"run.dir={tmp_path}/run"
    assert load(DEMO, ["rollout.engine.block_sise=32", here]).rollout.engine == {"block_sise": 32}
    for broken, why in {
        "rollout.engine.dtype=half": "is set by rollout.dtype",
        "learner.deepspeed.zero_optimization.stage=2": "is set by learner.zero_stage",
    }.items():
        with pytest.raises(ConfigError, match=why):
            load(DEMO, [broken, here])


@pytest.mark.parametrize(
    ("may", "never"),
    [
        (vllm_arguments.GENERATOR_MAY, vllm_arguments.GENERATOR_NEVER),
        (vllm_arguments.TEACHER_MAY, vllm_arguments.TEACHER_NEVER),
    ],
    ids=["generator", "teacher"],
)
def test_every_argument_of_the_installed_vllm_was_looked_at(may, never):
    listed = f"{vllm_arguments.MAY} {may}".split()
    for table in (vllm_arguments.NEVER, never):
        listed += " ".join(table.values()).split()
    assert sorted(listed) == sorted(tables.engine_takes().__struct_fields__)


def test_every_key_that_the_installed_deepspeed_reads_was_looked_at():
    from deepspeed.runtime.config import (
        _REMOVED_TOP_LEVEL_CONFIG_KEYS,
        _REMOVED_ZERO_CONFIG_KEYS,
        DeepSpeedConfig,
    )
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    read = set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)

    class Noting(dict):
        """Settings that note which of them are asked for."""

        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            read.add(key)
            return super().__contains__(key)

    DeepSpeedConfig(Noting(train_micro_batch_size_per_gpu=1))
    looked_at = {"zero_optimization", *deepspeed_keys.MAY, *tables.by_name(deepspeed_keys.NEVER)}
    assert {key.lower() for key in read} - looked_at == set()
    declared = {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()}
    zero = next(
        f.type
        for f in msgspec.structs.fields(tables.deepspeed_takes())
        if f.name == "zero_optimization"
    )
    assert set(zero.__struct_encode_fields__) == declared
    never = tables.by_name(deepspeed_keys.ZERO_NEVER)
    assert set(never) <= declared | set(_REMOVED_ZERO_CONFIG_KEYS)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::Warning")  # those of importing vLLM
def test_signatures_are_those_of_the_imported_vllm():
    """Names, words and nothing refused that pydantic takes: vLLM itself against its source."""
    import dataclasses
    from typing import Literal, get_args, get_origin

    from vllm import AsyncEngineArgs

    def words(kind) -> set:
        inner = [kind] if get_origin(kind) is Literal else get_args(kind)
        return {v for each in inner if get_origin(each) is Literal for v in get_args(each)}

    hints = {f.name: f.type for f in dataclasses.fields(AsyncEngineArgs)}
    fields = {f.name: f.type for f in msgspec.structs.fields(tables.engine_takes())}
    assert set(fields) == {name for name in hints if not name.startswith("_")}
    told = {name: words(hints[name]) for name in fields if words(hints[name])}
    assert len(told) > 20
    assert {name: words(fields[name]) for name in told} == told


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeeds_table_goes_beside_what_is_ours(stage):
    from deepspeed.runtime.config import DeepSpeedConfig

    from async_opd.roles.learner.config import LearnerConfig
    from async_opd.roles.learner.deepspeed_config import deepspeed_config

    table = {
        "communication_data_type": "fp32",
        "zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 10},
    }
    learner = LearnerConfig(trajectories_per_step=1, lr=1e-3, zero_stage=stage, deepspeed=table)
    without = msgspec.structs.replace(learner, deepspeed={})
    made, ours = deepspeed_config(learner, 8), deepspeed_config(without, 8)
    assert made["zero_optimization"] == ours["zero_optimization"] | table["zero_optimization"]
    assert {k: v for k, v in made.items() if k not in table} == {
        k: v for k, v in ours.items() if k not in table
    }
    read = DeepSpeedConfig(made)
    assert read.zero_config.stage == stage
    assert read.zero_config.reduce_bucket_size == 1000
    assert read.zero_config.max_live_parameters == 10


SOURCE = {
    "__init__.py": "",
    "words.py": """
from enum import Enum, IntEnum
from typing import Literal, TypeAlias
One = Literal["red"]
Word = Literal[One, "green"]
More: TypeAlias = Word | Literal["blue"]
class Level(IntEnum):
    low = 1
    high = 2
class Way(str, Enum):
    up = "upward"
class Kernel(Enum):
    FAST = "package.Fast"
""",
    "deep/__init__.py": "from ..words import Word as Colour, Level\nfrom .inner import Inner\n",
    "deep/inner.py": """
from dataclasses import dataclass
from pydantic import Field, BaseModel
@dataclass
class Inner:
    count: int = Field(default=1, ge=1)
    share: "float | None" = None
""",
    "made.py": """
from __future__ import annotations
import torch
from typing import Any, Callable, ClassVar, Optional, Union
from dataclasses import dataclass, field
from pydantic import BaseModel, Field
from made_up.deep import Colour, Inner, Level
from made_up.words import Kernel, More, Way
from somewhere.else_ import Strange
@dataclass
class Base:
    colour: Colour = "red"
@dataclass
class Made(Base):
    needed: int
    _hidden: int = 0
    shared: ClassVar[int] = 3
    level: Level = Level.low
    way: Optional[Way] = None
    kernel: Kernel | None = None
    more: More | str = "blue"
    names: list[str] | None = None
    inner: Inner = field(default_factory=Inner)
    either: Union[dict[str, Any], Inner, None] = None
    dtype: str | torch.dtype | None = None
    hook: Callable[[int], int] | None = None
    strange: Strange | int = 0
    computed: int = field(init=False, default=0)
    size: Optional[int] = Field(None, gt=0, alias="outer_size")
""",
}


@pytest.fixture
def made(tmp_path, monkeypatch) -> type[msgspec.Struct]:
    for name, text in SOURCE.items():
        (tmp_path / "made_up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made_up" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    struct = signatures.struct_of(signatures.Place("made_up.made", "Made"))
    yield struct
    signatures._tree.cache_clear()
    signatures._type_of_name.cache_clear()


TAKES = [
    ({}, True),
    ({"colour": "green"}, True),
    ({"colour": "blue"}, False),
    ({"more": "blue"}, True),
    ({"more": "grey"}, False),
    ({"level": 2}, True),
    ({"level": "high"}, True),
    ({"level": 3}, False),
    ({"way": "upward"}, True),
    ({"way": "up"}, False),
    ({"kernel": "FAST"}, True),
    ({"kernel": "package.Fast"}, False),
    ({"names": ["a"]}, True),
    ({"names": "a"}, False),
    ({"inner": {"count": 2, "share": 0.5}}, True),
    ({"inner": {"count": 0}}, False),
    ({"inner": {"cuont": 2}}, False),
    ({"either": {"share": 1}}, True),
    ({"either": {"any": 1}}, False),
    ({"dtype": "half"}, True),
    ({"dtype": 3}, False),
    ({"strange": [{}]}, True),
    ({"outer_size": 1}, True),
    ({"outer_size": 0}, False),
    ({"size": 1}, False),
    ({"computed": 1}, False),
    ({"_hidden": 1}, False),
    ({"shared": 1}, False),
]


@pytest.mark.parametrize(("settings", "fits"), TAKES, ids=[f"{each}" for each, _ in TAKES])
def test_a_class_is_read_from_its_source(settings, fits, made):
    if fits:
        msgspec.convert({"needed": 1} | settings, made)
    else:
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"needed": 1} | settings, made)


def test_a_field_without_a_default_is_needed(made):
    with pytest.raises(msgspec.ValidationError, match="needed"):
        msgspec.convert({}, made)


def test_a_table_is_checked_without_an_import_of_what_it_is_for():
    """A command that only looks at a config must not take seconds."""
    import subprocess
    import sys

    script = (
        "import sys; from async_opd.config.load import load\n"
        f"load({str(Path(DEMO))!r}, ['rollout.engine.block_size=32', 'run.dir=/tmp/none',"
        " 'learner.deepspeed.steps_per_print=1'])\n"
        "assert not {'vllm', 'deepspeed', 'torch'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
