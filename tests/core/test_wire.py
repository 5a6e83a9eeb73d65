import inspect
import pickle

import msgspec
import numpy as np
import pytest

from async_opd.core import errors, role_settings, weights, wire
from async_opd.core.errors import WireError
from async_opd.core.lora import LoraConfig
from async_opd.core.recorded import RecordedTrajectory
from async_opd.core.role_settings import GeneratorSettings, LearnerSettings, ScorerSettings
from async_opd.core.weights import WeightGroup, WeightLayout
from async_opd.core.wire import (
    Ballot,
    Check,
    Group,
    GroupMeta,
    LearnerShare,
    Needs,
    Prompt,
    Rollout,
    Sampling,
    Scores,
    Span,
    StepResult,
    Unscored,
    Verdict,
)

STRUCTS = [
    kind
    for kind in (*vars(wire).values(), *vars(weights).values(), *vars(role_settings).values())
    if inspect.isclass(kind) and issubclass(kind, wire.Struct)
]
MESSAGES = [kind for kind in STRUCTS if kind is not wire.Struct]
ERRORS = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
NAN, INF = np.nan, np.inf


def ints(*values) -> np.ndarray:
    return np.array(values, np.int32)


def floats(*values) -> np.ndarray:
    return np.array(values, np.float32)


def spans(*rows) -> tuple[Span, ...]:
    return tuple(Span(version=version, start=start, end=end) for version, start, end in rows)


PROMPT = dict(id="p7@0", ids=ints(3, 4), answer="5", teacher_ids=ints(3))
ROLLOUT = dict(
    id="p7@0#1",
    ids=ints(5, 6, 1),
    behaviour_logp=floats(-0.5, -1, 0),
    spans=spans((2, 0, 1), (4, 1, 3)),
    truncated=False,
    candidate_ids=ints([5, 6], [6, 7], [1, 2]),
)
SCORES = dict(
    id="p7@0#1",
    sampled_logp=floats(-1, -2, -3),
    topk_ids=ints([5, 6], [6, 7], [1, 2]),
    topk_logp=floats([-1, -2], [-1, -2], [-1, -2]),
    entropy=floats(0, 1, 2),
    candidate_logp=floats([-1], [-2], [-3]),
    tail_logp=floats(-3, -2, -100),
)

RECORDED = dict(
    id="p7@0#1",
    step=3,
    prompt_ids=np.array([1, 2], np.int32),
    ids=np.array([3, 4], np.int32),
    prompt_tokens=9,
    tokens=5,
    truncated=True,
    reward=None,
    numbers={"student": np.array([-0.5, -1], np.float32)},
    teacher_prompt_ids=np.array([7], np.int32),
)

BAD = {
    "reward above one": (
        Verdict,
        dict(id="p7@0#1", reward=1.0),
        dict(reward=1.5),
        r"p7@0#1: reward = 1\.5: must be from 0 to 1, or None",
    ),
    "reward below nothing": (
        Verdict,
        dict(id="p7@0#1", reward=1.0),
        dict(reward=-1e-9),
        r"p7@0#1: reward = -1e-09: must be",
    ),
    "reward that is no number": (
        Verdict,
        dict(id="p7@0#1", reward=1.0),
        dict(reward=np.nan),
        "p7@0#1: reward = nan: must be",
    ),
    "prompt as a list": (
        Prompt,
        PROMPT,
        dict(ids=[3, 4]),
        "p7@0: ids must be a 1-d int32 array, got list",
    ),
    "prompt of wide integers": (
        Prompt,
        PROMPT,
        dict(ids=np.array([3])),
        "p7@0: ids must be .* got int64",
    ),
    "teacher's prompt in rows": (
        Prompt,
        PROMPT,
        dict(teacher_ids=ints([3])),
        r"p7@0: teacher_ids .*int32 \(1, 1\)",
    ),
    "ids as a list": (
        Rollout,
        ROLLOUT,
        dict(ids=[5, 6, 1]),
        "p7@0#1: ids must be a 1-d int32 array, got list",
    ),
    "candidates in one row": (
        Rollout,
        ROLLOUT,
        dict(candidate_ids=ints(5)),
        "p7@0#1: candidate_ids must be .*2-d",
    ),
    "one log-prob too few": (
        Rollout,
        ROLLOUT,
        dict(behaviour_logp=floats(-1, -1)),
        r"p7@0#1: behaviour_logp .*\(2,\)",
    ),
    "log-probs as doubles": (
        Rollout,
        ROLLOUT,
        dict(behaviour_logp=np.zeros(3)),
        "p7@0#1: behaviour_logp .*float64",
    ),
    "NaN log-prob": (
        Rollout,
        ROLLOUT,
        dict(behaviour_logp=floats(-1, NAN, -1)),
        r"p7@0#1: behaviour_logp\[1\] = nan",
    ),
    "infinite log-prob": (
        Rollout,
        ROLLOUT,
        dict(behaviour_logp=floats(-1, -1, -INF)),
        r"behaviour_logp\[2\] = -inf",
    ),
    "positive log-prob": (
        Rollout,
        ROLLOUT,
        dict(behaviour_logp=floats(0.5, -1, -1)),
        r"behaviour_logp\[0\] = 0.5",
    ),
    "spans of one that has failed": (
        Rollout,
        ROLLOUT,
        dict(failure="why", behaviour_logp=floats(NAN, -1, -1), spans=()),
        "p7@0#1: spans cover 0 tokens of 3",
    ),
    "gap": (
        Rollout,
        ROLLOUT,
        dict(spans=spans((2, 0, 1), (4, 2, 3))),
        "p7@0#1: spans must be contiguous",
    ),
    "overlap": (
        Rollout,
        ROLLOUT,
        dict(spans=spans((2, 0, 2), (4, 1, 3))),
        "p7@0#1: spans must be contiguous",
    ),
    "late start": (
        Rollout,
        ROLLOUT,
        dict(spans=spans((2, 1, 3))),
        "p7@0#1: spans must be contiguous",
    ),
    "version goes back": (
        Rollout,
        ROLLOUT,
        dict(spans=spans((4, 0, 1), (2, 1, 3))),
        "p7@0#1: spans .* increasing",
    ),
    "version twice": (
        Rollout,
        ROLLOUT,
        dict(spans=spans((4, 0, 1), (4, 1, 3))),
        "p7@0#1: spans .* increasing",
    ),
    "span of nothing": (
        Rollout,
        ROLLOUT,
        dict(spans=spans((2, 0, 0), (4, 0, 3))),
        "p7@0#1: spans must be contiguous",
    ),
    "no spans": (Rollout, ROLLOUT, dict(spans=()), "p7@0#1: spans cover 0 tokens of 3"),
    "spans too short": (
        Rollout,
        ROLLOUT,
        dict(spans=spans((2, 0, 2))),
        "p7@0#1: spans cover 2 tokens of 3",
    ),
    "empty response": (
        Rollout,
        ROLLOUT,
        dict(ids=ints(), behaviour_logp=floats(), spans=(), candidate_ids=None),
        "p7@0#1: spans cover 0 tokens of 0; a response has at least one",
    ),
    "scores as a list": (
        Scores,
        SCORES,
        dict(sampled_logp=[-1.0]),
        "p7@0#1: sampled_logp must be a 1-d float32",
    ),
    "NaN score": (
        Scores,
        SCORES,
        dict(sampled_logp=floats(-1, -1, NAN)),
        r"p7@0#1: sampled_logp\[2\] = nan",
    ),
    "ids without scores": (
        Scores,
        SCORES,
        dict(topk_logp=None),
        "p7@0#1: topk_logp must be .* got NoneType",
    ),
    "too few scores": (
        Scores,
        SCORES,
        dict(topk_logp=floats([-1], [-1], [-1])),
        r"p7@0#1: topk_logp.*\(3, 1\)",
    ),
    "entropy in rows": (
        Scores,
        SCORES,
        dict(entropy=floats([0, 1, 2])),
        "p7@0#1: entropy must be a 1-d float32",
    ),
    "candidates of two tokens": (
        Scores,
        SCORES,
        dict(candidate_logp=floats([-1], [-2])),
        r"candidate_logp .*\(2, 1\)",
    ),
    "a number missing": (
        RecordedTrajectory,
        RECORDED,
        dict(numbers={"ratio": floats(1)}),
        "p7@0#1: ratio has 1 rows for 2",
    ),
    "positive candidate": (
        Scores,
        SCORES,
        dict(candidate_logp=floats([-1], [2], [-3])),
        r"candidate_logp\[1\] = 2.0",
    ),
    "tail of two tokens": (
        Scores,
        SCORES,
        dict(tail_logp=floats(-1, -2)),
        r"p7@0#1: tail_logp has shape \(2,\), exp",
    ),
    "tail of no log": (
        Scores,
        SCORES,
        dict(tail_logp=floats(-1, -INF, -3)),
        r"p7@0#1: tail_logp\[1\] = -inf is not",
    ),
}


@pytest.mark.parametrize(("kind", "good", "change", "message"), BAD.values(), ids=BAD)
def test_a_bad_message_fails_where_it_is_made(kind, good, change, message):
    with pytest.raises(WireError, match=message):
        kind(**good | change)


@pytest.mark.parametrize(("kind", "good", "change", "message"), BAD.values(), ids=BAD)
def test_a_bad_message_fails_where_it_arrives(kind, good, change, message):
    broken = kind(**good)
    for field, value in change.items():
        msgspec.structs.force_setattr(broken, field, value)
    # refused by its type, before the field's own rules
    if any(isinstance(value, list) for value in change.values()):
        message = r"^p7@0(#1)?: (Prompt|Rollout|Scores): .*got `list`"
    with pytest.raises(WireError, match=message):
        pickle.loads(pickle.dumps(broken, protocol=5))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (StepResult, (1, {"loss": None}), "1: StepResult: Expected `float`"),
        (Sampling, (None,), "None: Sampling: Expected `int`"),
        (LearnerShare, ((), ("x",)), r"\[\]: LearnerShare: Expected `array`"),
    ],
)
def test_a_message_that_begins_with_no_id_is_refused_all_the_same(kind, fields, message):
    with pytest.raises(WireError, match=message):
        pickle.loads(pickle.dumps(kind(*fields), protocol=5))


GOOD = [
    Span(version=1, start=0, end=2),
    Prompt(**PROMPT),
    Rollout(**ROLLOUT),
    Scores(**SCORES),
    Group(prompt=Prompt(**PROMPT), rollouts=(Rollout(**ROLLOUT),)),
    GroupMeta(id="p7@0", prompt_len=2, spans=(ROLLOUT["spans"],), truncated=(False,)),
    Needs(teacher_topk=2, student_entropy=True),
    Verdict(id="p7@0#1", reward=None, cause="timed out after 5.0 s"),
    Verdict(id="p7@0#1", reward=0.375),
    Check(id="p7@0#1", response="5", answer="5"),
    Sampling(samples=4, temperature=0.6, top_p=0.95),
    Ballot(text="so it is 5", vote=None),
    RecordedTrajectory(**RECORDED),
    StepResult(version=3, metrics={"loss": 0.5}, recorded=(RecordedTrajectory(**RECORDED),)),
    LearnerShare((((0, 0), (1, 2)), ()), ((Verdict(id="p7@0#1", reward=1.0),),)),
    WeightGroup(host="10.0.0.1", port=1, rank_offset=1, world=3, bucket_bytes=9, timeout_s=0.5),
    Unscored(id="train-7@2", sample=1, role="teacher", why="a token that it has not"),
    WeightLayout(names=("a",), dtypes=("float32",), shapes=((2, 3),)),
    GeneratorSettings(
        name="generator 0",
        model="m",
        eos_ids=(1, 2),
        max_prompt_tokens=3,
        vocabulary=((0, 24), (30, 31)),
        backend="gloo",
        seed=0,
    ),
    ScorerSettings(
        name="teacher 0",
        temperature=0.7,
        vocabulary=((0, 24), (30, 31)),
        longest=9,
        eos_ids=(1,),
        max_new_tokens=4,
    ),
    LearnerSettings(
        model="m",
        temperature=0.7,
        steps=3,
        max_lag_steps=2,
        stale="mask",
        truncated="drop",
        max_new_tokens=4,
        seed=0,
        backend="nccl",
        bucket_bytes=9,
        sync_s=1.0,
        timeout_s=2.0,
        lora=LoraConfig(rank=2, alpha=1.5, target_modules=("q_proj", "v_proj")),
    ),
]


@pytest.mark.parametrize("message", GOOD, ids=lambda message: type(message).__name__)
def test_a_good_message_survives_the_trip(message):
    arrived = pickle.loads(pickle.dumps(message, protocol=5))
    assert type(arrived) is type(message)
    np.testing.assert_equal(_plain(arrived), _plain(message))


def _plain(value):
    """Structs as dicts, so that arrays in them are compared by value and type."""
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return (value.dtype.name, value) if isinstance(value, np.ndarray) else value


def test_every_message_is_in_the_trip():
    assert {type(message) for message in GOOD} == set(MESSAGES)


def test_arrays_travel_out_of_band():
    buffers = []
    sent = pickle.dumps(Rollout(**ROLLOUT), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 3  # ids, log-probs, candidates
    assert pickle.loads(sent, buffers=buffers).ids.tolist() == [5, 6, 1]


def test_a_read_only_array_is_a_good_array():
    ids = ints(5, 6, 1)
    ids.flags.writeable = False
    assert Rollout(**ROLLOUT | dict(ids=ids)).ids is ids


def test_rounding_above_zero_is_within_tolerance():
    assert Scores(id="a", sampled_logp=floats(9e-5)).sampled_logp[0] > 0
    with pytest.raises(WireError, match=r"a: sampled_logp\[0\]"):
        Scores(id="a", sampled_logp=floats(2e-4))


def test_versions_are_those_of_the_spans():
    assert Rollout(**ROLLOUT).versions().tolist() == [2, 4, 4]


def test_metadata_knows_the_lengths_and_the_oldest_version():
    meta = GroupMeta(
        id="a",
        prompt_len=2,
        spans=(spans((3, 0, 2)), spans((1, 0, 1), (2, 1, 5))),
        truncated=(True, True),
    )
    assert (meta.lengths, meta.oldest) == ((2, 5), 1)


def test_a_message_cannot_be_changed():
    with pytest.raises(AttributeError, match="immutable"):
        Prompt(**PROMPT).id = "other"


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_message_says_who_makes_and_who_consumes_it(kind):
    doc = " ".join(kind.__doc__.split())
    assert "Made by " in doc and "consumed by " in doc


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_survives_the_trip_with_its_message(kind):
    error = pickle.loads(pickle.dumps(kind("learner rank 1: died"), protocol=5))
    assert (type(error), str(error), error.exit_status) == (
        kind,
        "learner rank 1: died",
        kind.exit_status,
    )


def test_only_mistakes_in_what_was_asked_exit_with_two():
    wrong = [
        "ConfigError",
        "ClusterTooSmall",
        "DataError",
        "RunMissing",
        "RunInUse",
        "CheckpointError",
        "ClusterError",
    ]
    assert [kind.__name__ for kind in ERRORS if kind.exit_status == 2] == wrong
    assert {kind.exit_status for kind in ERRORS} == {1, 2}


@pytest.mark.parametrize(
    ("reward", "correct"), [(1.0, True), (0.0, False), (0.999, False), (None, None)]
)
def test_only_all_of_the_reward_is_right_and_unknown_is_neither(reward, correct):
    assert Verdict(id="p7@0#1", reward=reward).correct is correct


def test_entropy_must_fit_the_tokens_and_be_finite():
    for bad in (
        np.ones(1, np.float32),
        np.array([0.5, np.nan], np.float32),
        np.array([0.5, -1], np.float32),
    ):
        with pytest.raises(WireError, match=r"^r#0: entropy"):
            Scores(id="r#0", sampled_logp=np.zeros(2, np.float32), entropy=bad)


def test_an_empty_prompt_is_refused():
    with pytest.raises(WireError, match=r"^p: ids is empty"):
        Prompt(id="p", ids=np.zeros(0, np.int32), answer="")


def test_candidate_ids_need_a_row_for_each_token():
    with pytest.raises(WireError, match=r"^r#0: candidate_ids has 1 rows for 2 tokens"):
        Rollout(
            id="r#0",
            ids=np.zeros(2, np.int32),
            behaviour_logp=np.zeros(2, np.float32),
            spans=spans((0, 0, 2)),
            truncated=False,
            candidate_ids=np.zeros((1, 4), np.int32),
        )


def test_a_rollout_that_has_failed_may_have_log_probs_that_are_none():
    sent = Rollout(**ROLLOUT | dict(failure="why", behaviour_logp=floats(NAN, -1, -1)))
    arrived = pickle.loads(pickle.dumps(sent, protocol=5))
    assert arrived.failure == "why" and np.isnan(arrived.behaviour_logp[0])
