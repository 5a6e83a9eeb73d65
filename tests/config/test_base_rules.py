"""A teacher, or the reference, that is the student's frozen base, in the learner."""

import pytest

from async_opd.config.load import load
from async_opd.config.precision import with_dtypes
from async_opd.core.errors import ConfigError
from async_opd.core.vocabulary import Tokens
from async_opd.runtime.actor_specs import ActorSpecs
from async_opd.runtime.placement import resource_requests
from async_opd.toy.tokenizer import build_tokenizer

DEMO = "configs/demo.toml"
TOKENIZER = build_tokenizer().backend_tokenizer
LORA = ["student.lora.rank=2"]
TEACHER = [
    *LORA,
    "teacher.backend=learner",
    "teacher.model=toy:student",
    "teacher.evaluate=false",
    "objective={tag='egrsd'}",
]
REFERENCE = ["objective={tag='g_opd'}"]  # an objective that needs one
CONTEXT = ["data.solution=answer", "teacher.context={prompt} {solution}"]


def roles(config):
    return [request.role for request in resource_requests(config, gpus=True)]


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ([], "transformers"),
        (LORA, "learner"),
        ([*LORA, "reference.replicas=2"], "transformers"),  # asked for, with a pool of its own
        ([*LORA, "reference.backend=learner"], "learner"),
        ([*LORA, "reference.model=toy:teacher"], "transformers"),
    ],
)
@pytest.mark.parametrize("gpus", [True, False])
def test_the_reference_is_the_learners_where_the_student_is_an_adapter(settings, backend, gpus):
    config = load(DEMO, ["objective={tag='g_opd'}", *settings])
    for each in (config, with_dtypes(config, gpus=gpus)):
        assert each.scorers["reference"].backend == backend
        assert ("reference" in roles(each)) == (backend != "learner")
        assert "reference" in each.on_transformers


def test_a_teacher_in_the_learner_takes_no_card_and_no_place():
    config = with_dtypes(load(DEMO, TEACHER), gpus=True)
    assert roles(config) == ["learner rank", "generator", "verifier"]
    assert config.scorers["teacher"].backend == "learner"


def test_the_ranks_are_built_with_what_a_pool_would_be():
    """Vocabularies, ends and lengths are those of each scorer's own section."""
    settings = ["objective={tag='g_opd'}", *TEACHER[:-1], *CONTEXT, "teacher.max_prompt_tokens=40"]
    config = load(DEMO, settings)
    sections = ("teacher", "reference")
    tokens = Tokens(
        student=((0, 9),),
        eos_ids=(1,),
        stops=(),
        whole={each: ((0, 12 + i),) for i, each in enumerate(sections)},
        ends_as={"teacher": ((7, 1),), "reference": ()},
        ends={},
    )
    specs = ActorSpecs(
        config, tokens=tokens, tokenizer=build_tokenizer().backend_tokenizer, first_seed=0
    )
    _, (_, learner, *_), _ = specs.learner_rank(0)
    teacher, reference = learner.teachers[""], learner.reference
    assert (teacher.section, reference.section) == sections
    assert (teacher.as_student, reference.as_student) == (False, True)
    assert (teacher.whole, reference.whole) == (((0, 12),), ((0, 13),))
    assert (teacher.ends_as, reference.ends_as) == (((7, 1),), ())
    assert (teacher.longest, reference.longest) == (40 + 64, 16 + 64)
    assert teacher.temperature == config.rollout.temperature
    pooled = ActorSpecs(
        load(DEMO, []), tokens=tokens, tokenizer=build_tokenizer().backend_tokenizer, first_seed=0
    )
    _, (_, alone, *_), _ = pooled.learner_rank(0)
    assert (alone.teachers, alone.reference) == ({}, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([TEACHER[1], *TEACHER[2:]], "teacher.backend = 'learner': needs student.lora"),
        (
            ["objective={tag='g_opd'}", "reference.backend=learner"],
            "reference.backend = 'learner': needs student.lora",
        ),
        (
            [*TEACHER, "teacher.model=toy:teacher"],
            "teacher.model = 'toy:teacher': must be student.model = 'toy:student' with"
            " teacher.backend = 'learner'",
        ),
        (
            [*LORA, *REFERENCE, "reference.backend=learner", "reference.model=toy:teacher"],
            "reference.model = 'toy:teacher': must be student.model = 'toy:student'",
        ),
        (
            [*TEACHER, "teacher.update=ema"],
            "teacher.update = 'ema': must be 'frozen' with teacher.backend = 'learner'",
        ),
        (
            [*TEACHER, "teacher.evaluate=true"],
            "teacher.evaluate = true: must be false with teacher.backend = 'learner'",
        ),
        ([*TEACHER, "teacher.replicas=2"], "teacher.replicas = 2: has no effect with"),
        ([*TEACHER, "teacher.dtype=bfloat16"], "teacher.dtype = bfloat16: has no effect with"),
        ([*TEACHER, "teacher.batch_tokens=99"], "teacher.batch_tokens = 99: has no effect with"),
        ([*TEACHER, "teacher.tensor_parallel_size=2"], "teacher.tensor_parallel_size = 2: has no"),
        ([*TEACHER, "teacher.engine.seed=2"], "teacher.engine = "),
        (
            [*TEACHER, *CONTEXT, "teacher.max_prompt_tokens=99", "learner.micro_batch_tokens=100"],
            "learner.micro_batch_tokens = 100: must be >= teacher.max_prompt_tokens +"
            " rollout.max_new_tokens = 163 with teacher.backend = 'learner'",
        ),
    ],
)
def test_what_the_base_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError) as refused:
        load(DEMO, settings)
    assert f"{refused.value}".startswith(message) and "\n" not in f"{refused.value}"


def test_the_engines_of_teacher_sampling_have_their_settings_from_such_a_teacher():
    """They hold the base as it lies on the disk, and answer with it."""
    sampling = [
        f"teacher_sampling.{k}={v}"
        for k, v in dict(share=0.5, full_until_step=2, until_step=4).items()
    ]
    config = load(DEMO, [*TEACHER, *sampling, "teacher.memory_gib=2", "teacher.dtype=float32"])
    assert roles(config) == ["learner rank", "generator", "teacher-generator", "verifier"]
    with pytest.raises(ConfigError, match=r"^teacher\.replicas = 2: has no effect"):
        load(DEMO, [*TEACHER, *sampling, "teacher.replicas=2"])


def test_addresses_beside_it_are_refused_once_and_show_no_secret():
    with pytest.raises(ConfigError) as refused:
        load(DEMO, [*TEACHER, 'teacher.urls=["http://me:hunter2@a:1"]'])
    assert f"{refused.value}" == (
        "teacher.urls: has no effect with teacher.backend = 'learner'; did you mean 'server'?"
    )
