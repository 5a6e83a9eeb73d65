"""Prompts of several data sets by their weights, from real files and with the toy tokenizer."""

import json
from collections import Counter
from itertools import islice
from math import ceil, floor

import datasets
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from async_opd.core.errors import DataError
from async_opd.roles.rollout.config import DataConfig, SourceConfig, source_key
from async_opd.roles.rollout.mixture import Mixture
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.roles.rollout.teacher_prompt import TeacherView
from async_opd.toy import STUDENT

TOKENIZER = AutoTokenizer.from_pretrained(STUDENT)
WEIGHTS = st.one_of(st.integers(1, 9), st.floats(0.01, 100.0), st.sampled_from([1e-3, 0.1, 1 / 3]))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of 1 to 7 rows with columns of other names each, by the number of their rows."""
    folder = tmp_path_factory.mktemp("rows")
    paths = {}
    for count in range(1, 8):
        paths[count] = folder / f"{count}.jsonl"
        rows = [
            {f"q{count}": f"{count}+{n}=", f"a{count}": str(count + n), "name": f"n{n}"}
            for n in range(count)
        ]
        paths[count].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return paths


def mixture(files, weights, *, seed=0, views=None, more=None, **data) -> Mixture:
    """A mixture of the files of so many rows as `weights` has keys, called "s1", "s2", …"""
    sources = {
        f"s{count}": SourceConfig(
            path=str(files[count]),
            weight=weight,
            prompt=f"q{count}",
            answer=f"a{count}",
            **(more or {}).get(count, {}),
        )
        for count, weight in weights.items()
    }
    config = msgspec.convert({"sources": sources} | data, DataConfig)
    parts = {
        name: PromptSource(each, TOKENIZER, seed=seed, views=views, key=key)
        for name, (key, each) in zip(sources, config.sets.items(), strict=True)
    }
    return Mixture(parts, {name: source.weight for name, source in sources.items()})


def ids_of(prompts) -> list[str]:
    return [prompt.id for prompt in prompts]


def sources_of(ids) -> Counter[str]:
    return Counter(id.partition(":")[0] for id in ids)


BY_COUNT = st.dictionaries(st.integers(1, 7), WEIGHTS, min_size=1, max_size=5)
QUICK = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUICK
@given(weights=BY_COUNT)
def test_at_every_moment_a_source_has_given_its_share_rounded_up_or_down(files, weights):
    ids = ids_of(islice(mixture(files, weights), 60))
    total = sum(weights.values())
    for n in range(1, len(ids) + 1):
        gave = sources_of(ids[:n])
        for count, weight in weights.items():
            share = n * weight / total
            assert floor(share - 1e-9) <= gave[f"s{count}"] <= ceil(share + 1e-9), (n, gave)


def test_weights_of_small_numbers_give_their_shares_exactly_again_and_again(files):
    ids = ids_of(islice(mixture(files, {2: 0.1, 5: 0.3, 7: 0.6}), 100))
    for start in range(0, 100, 10):
        assert sources_of(ids[start : start + 10]) == {"s2": 1, "s5": 3, "s7": 6}


@pytest.mark.parametrize("streaming", [False, True])
def test_each_source_goes_through_epochs_of_its_own_with_every_row_once(files, streaming):
    data = {"streaming": streaming, "id": "name"}
    ids = ids_of(islice(mixture(files, {3: 1, 5: 2}, **data), 90))
    assert len(set(ids)) == 90
    for count, gave in ((3, 30), (5, 60)):
        rows = [id.partition(":")[2] for id in ids if id.startswith(f"s{count}:")]
        assert len(rows) == gave
        for epoch, start in enumerate(range(0, gave, count)):
            expected = [f"n{n}@{epoch}" for n in range(count)]
            assert sorted(rows[start : start + count]) == expected


def test_the_order_within_a_source_is_that_of_the_source_alone_and_of_the_seed(files):
    mixed = ids_of(islice(mixture(files, {5: 1, 7: 3}, seed=3), 40))
    alone = ids_of(islice(mixture(files, {7: 1}, seed=3), 30))
    assert [id for id in mixed if id.startswith("s7:")] == alone
    assert mixed != ids_of(islice(mixture(files, {5: 1, 7: 3}, seed=4), 40))


@pytest.mark.parametrize("streaming", [False, True])
@QUICK
@given(
    weights=BY_COUNT,
    seed=st.integers(0, 3),
    at=st.integers(0, 25),
    mask=st.integers(0, 2**25 - 1),
    named=st.booleans(),
)
def test_it_goes_on_as_an_unbroken_iteration_would(
    files, streaming, weights, seed, at, mask, named
):
    data = {"streaming": streaming, "seed": seed} | ({"id": "name"} if named else {})
    source = mixture(files, weights, **data)
    reading = iter(source)
    before = ids_of(islice(reading, at))
    outstanding = [id for n, id in enumerate(before) if mask >> n & 1]
    position = json.loads(json.dumps(source.position))
    rest = ids_of(islice(reading, 15))
    again = mixture(files, weights, **data)
    again.continued(position, [])  # as a resume looks at it before it starts
    prompts = list(islice(again.continued(position, outstanding), len(outstanding) + 15))
    assert ids_of(prompts) == outstanding + rest
    assert again.position == source.position


def test_a_row_has_one_place_among_all_in_every_epoch(files):
    places: dict[str, set[int]] = {}
    for prompt in islice(mixture(files, {2: 1, 4: 2, 7: 1}, id="name"), 80):
        places.setdefault(prompt.id.rpartition("@")[0], set()).add(prompt.row)
    assert sorted(row for rows in places.values() for row in rows) == list(range(13))
    assert all(len(rows) == 1 for rows in places.values())
    source = mixture(files, {2: 1, 4: 2, 7: 1}, id="name")
    position = source.position
    (again,) = islice(source.continued(position, ["s7:n3@2"]), 1)
    assert {again.row} == places["s7:n3"]


def test_columns_are_those_of_the_source_or_of_data(files):
    first, second = islice(mixture(files, {3: 1, 4: 1}, id="name", more={4: {"id": "a4"}}), 2)
    assert first.id.startswith("s3:n") and second.id.split(":")[1].split("@")[0] == second.answer
    assert int(first.answer) in range(3, 6) and int(second.answer) in range(4, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_there_is_named_by_its_source(files, streaming):
    expected = r"^data\.sources\.s4\.solution = 'why': .*4.jsonl has columns q4, a4, name$"
    with pytest.raises(DataError, match=expected):
        mixture(files, {3: 1, 4: 1}, more={4: {"solution": "why"}}, streaming=streaming)


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("data.sources.evaluation.path", "data.sources.evaluation"),
        ("data.path", "data"),
        ("eval.path", "data"),
    ],
)
def test_a_column_is_named_by_the_section_that_has_it(files, key, section):
    config = DataConfig(path=str(files[3]), prompt="why")
    with pytest.raises(DataError, match=rf"^{section}\.prompt = 'why': "):
        PromptSource(config, TOKENIZER, seed=0, key=key)


def test_a_row_that_cannot_be_used_is_named_with_its_source(files, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"q3": "1+1=", "a3": "2"}\n{"q3": "", "a3": "2"}\n')
    source = mixture({**files, 3: bad}, {3: 1, 4: 1})
    with pytest.raises(DataError, match=r"^data\.sources\.s3\.path = '.*bad.jsonl': row 1: 'q3'"):
        source.survey()
    left_out = mixture({**files, 3: bad}, {3: 1, 4: 1}, bad_rows="skip")
    left_out.survey()
    assert left_out.left_out_words.startswith(f"1 of 2 rows of {bad}, the first: row 1: 'q3'")
    assert sources_of(ids_of(islice(left_out, 10))) == {"s3": 5, "s4": 5}  # as the weights say
    # one an epoch, of which the fifth may not have come to it
    assert left_out.counts in [{"prompts_skipped": 0, "rows_skipped": n} for n in (4, 5)]
    assert json.loads(json.dumps(left_out.position))["epoch"] == 1  # of s4; s3 is in its fifth


@pytest.mark.parametrize("streaming", [False, True])
def test_a_streamed_row_that_is_left_out_is_told_with_its_source(files, tmp_path, streaming):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"q3": "1+1=", "a3": "2"}\n{"q3": "", "a3": "2"}\n')
    source = mixture({**files, 3: bad}, {3: 1, 4: 1}, bad_rows="skip", streaming=streaming)
    told = []
    source.tell = told.append
    list(islice(source, 8))
    assert len(told) == 1 and told[0].startswith("s3:1: 'q3' must be a string")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_without_rows_is_named(files, tmp_path, streaming):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"^data\.sources\.s3\.path = '.*empty.jsonl'.*: .*no rows"):
        list(islice(mixture({**files, 3: empty}, {3: 1, 4: 1}, streaming=streaming), 4))


def test_the_epochs_of_a_source_that_are_used_up_end_it_by_name(files):
    source = iter(mixture(files, {1: 1, 7: 1}, epochs=2))
    assert sources_of(ids_of(islice(source, 4))) == {"s1": 2, "s7": 2}
    with pytest.raises(DataError, match=r"^data\.sources\.s1\.path = .*: 2 epochs are used up"):
        next(source)


def test_each_source_has_a_column_of_its_own_that_names_a_row_s_teacher(tmp_path):
    for name, column in (("one", "kind"), ("two", "whose")):
        rows = [{"prompt": "1+1=", "answer": "2", column: teacher} for teacher in ("a", "b")]
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(map(json.dumps, rows)))
    sources = {
        name: SourceConfig(path=str((tmp_path / name).with_suffix(".jsonl")), teacher=column)
        for name, column in (("one", "kind"), ("two", "whose"))
    }
    config = DataConfig(sources=sources)
    views = {"a": TeacherView(), "b": TeacherView()}
    parts = {
        name: PromptSource(data, TOKENIZER, seed=0, views=views, key=source_key(name))
        for name, data in zip(sources, config.sets.values(), strict=True)
    }
    prompts = list(islice(Mixture(parts, {"one": 1, "two": 1}), 4))
    assert {(each.id, each.teacher) for each in prompts} == {
        (f"{source}:{row}@0", teacher)
        for source in ("one", "two")
        for row, teacher in enumerate("ab")
    }


def test_a_set_that_has_changed_since_is_refused_by_its_source(files, tmp_path):
    source = mixture(files, {3: 1, 4: 1})
    other = tmp_path / "other.jsonl"
    other.write_text(files[4].read_text().replace("4+1=", "4+9="))
    changed = mixture({**files, 4: other}, {3: 1, 4: 1})
    with pytest.raises(DataError, match=r"^data\.sources\.s4\.path = .*its rows are not those"):
        changed.continued(source.position, [])
