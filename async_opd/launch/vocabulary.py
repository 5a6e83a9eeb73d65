"""Whether student, teachers and reference mean the same by the same ids, and end by the same."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from async_opd.config.schema import Config
from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.core.printing import say
from async_opd.core.vocabulary import Tokens, runs
from async_opd.launch.ends import Ends, ends_of
from async_opd.launch.models import text_config, tokenizer_of
from async_opd.launch.readings import arguments, source_of
from async_opd.roles.teacher.config import TeacherConfig

NAMED = 5  # of many tokens, in a message


@dataclass(frozen=True, kw_only=True)
class Words:
    """The tokens of one model: those that its tokenizer knows and its head has rows for."""

    section: str
    called: str
    ids: dict[str, int]
    head: int  # rows
    ends: Ends

    @property
    def tokens(self) -> dict[int, str]:
        """The tokens by their ids."""
        return {id: token for token, id in self.ids.items()}

    def named(self, ids: Iterable[int]) -> str:
        """Put some of its ids into words."""
        return named((self.tokens.get(id, "?"), id) for id in ids)


def named(tokens: Iterable[tuple[str, int]]) -> str:
    """Name tokens with their ids, the first NAMED of them."""
    words = [f"{token!r} ({id})" for token, id in sorted(tokens, key=lambda each: each[1])]
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(words[:NAMED]) + more


def read_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Read what the ids of the models of a run stand for, and what ends their responses. Raises
    DataError for a scorer whose ids mean something else, that cannot score all of the student's, or
    ends by a token that ends nothing of the student's."""
    student = words_of(config, "student", tokenizer)
    stops = stops_of(config, tokenizer, student)
    ends = dict.fromkeys([*student.ends.ids, *(stop for stop in stops if isinstance(stop, int))])
    scorers = {section: words_of(config, section) for section in config.scorers}
    ends_as = {
        section: _ends_as(scorer, config.scorers[section], student, ends)
        for section, scorer in scorers.items()
    }
    for section, scorer in scorers.items():
        _refuse_other_words(scorer, student)
        _refuse_other_ends(scorer, student, ends, dict(ends_as[section]))
    others = {theirs for pairs in ends_as.values() for theirs, _ in pairs}
    mine = [id for id in student.ids.values() if id not in others]
    _refuse_more_candidates(config, len(mine))
    records = {
        section: {
            "ids": list(words.ends.ids),
            "tokens": [words.tokens[id] for id in words.ends.ids],
            "file": words.ends.file,
        }
        for section, words in {"student": student, **scorers}.items()
    }
    return Tokens(
        student=runs(mine),
        eos_ids=tuple(ends),
        stops=stops,
        whole={section: runs(scorer.ids.values()) for section, scorer in scorers.items()},
        ends_as=ends_as,
        ends=records | ({"rollout.stop": {"stops": list(stops)}} if stops else {}),
    )


def words_of(
    config: Config, section: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Words:
    """Read the tokens of the model in `section`, and name once those that its head has no rows for.
    Raises DataError where the student's prompts hold such whatever the row."""
    key, model = f"{section}.model", config.models[section]
    args = key, model, config.run.trust_remote_code
    called = f"{key} = {model!r}"
    tokenizer = tokenizer or tokenizer_of(*args, weights=section not in config.served)
    head = getattr(text_config(*args), "vocab_size", None)
    if not isinstance(head, int):
        raise DataError(f"{called}: its config names no vocab_size")
    ids = tokenizer.get_vocab()
    beyond = {token: id for token, id in ids.items() if id >= head}
    if beyond:
        if section == "student":
            alone = [] if config.data.chat_template else _begins_with(called, tokenizer)
            written = str(tokenizer.chat_template) if config.data.chat_template else ""
            _refuse_in_use(called, tokenizer, beyond, head, alone=alone, written=written)
        elif isinstance(teacher := config.scorers[section], TeacherConfig):
            written = source_of(section, teacher, tokenizer, arguments(config, teacher))
            _refuse_in_use(called, tokenizer, beyond, head, alone=[], written=written)
        say(
            f"{called}: its head has {head} rows, and none for {named(beyond.items())}: a prompt"
            " that holds such is refused"
        )
    inside = {token: id for token, id in ids.items() if id < head}
    ends = ends_of(*args, tokenizer, {id: token for token, id in inside.items()})
    return Words(section=section, called=called, ids=inside, head=head, ends=ends)


def stops_of(
    config: Config, tokenizer: PreTrainedTokenizerBase, student: Words
) -> tuple[int | str, ...]:
    """Read what is asked for in rollout.stop: ids and texts, and the ids of tokens that are such a
    text. An added token is that id alone; any other text ends a response however it is spelled.
    Raises DataError for what the student cannot write."""
    stops: list[int | str] = []
    for stop in config.rollout.stop:
        called = f"rollout.stop = {stop!r}"
        if isinstance(stop, int):
            if stop not in student.tokens:
                raise DataError(f"{called}: must be an id of {student.called}")
            stops.append(stop)
            continue
        id = student.ids.get(stop)
        if id in tokenizer.added_tokens_decoder:
            stops.append(id)
            continue
        with foreign(called):
            ids = tokenizer(stop, add_special_tokens=False).input_ids
            text = str(tokenizer.decode(ids, skip_special_tokens=False))
            one = ids if len(ids) == 1 else [] if id is None else [id]
            alone = tokenizer.decode(one, skip_special_tokens=False) == stop
        if not text or text.strip() != stop.strip() or max(ids) >= student.head:
            raise DataError(f"{called}: {student.called} has no tokens that spell it")
        stops += [*one, stop] if alone else [stop]
    return tuple(dict.fromkeys(stops))


def _begins_with(called: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ask which tokens a tokenizer puts before a prompt."""
    with foreign(f"{called}: its tokenizer"):
        return tokenizer("").input_ids


def _refuse_in_use(
    called: str,
    tokenizer: PreTrainedTokenizerBase,
    beyond: dict[str, int],
    head: int,
    *,
    alone: Sequence[int],
    written: str,
) -> None:
    """Raise DataError where the chat template, whose source is `written`, or the tokenizer, which
    puts `alone` before a prompt, writes a token into a prompt that the head has no row for."""
    by_itself = {token: id for token, id in beyond.items() if id in alone}
    by_name = {
        str(token) for name, token in tokenizer.special_tokens_map.items() if name in written
    }
    in_template = {
        token: id for token, id in beyond.items() if token in written or token in by_name
    }
    for who, tokens in (("tokenizer", by_itself), ("chat template", in_template)):
        if tokens:
            raise DataError(
                f"{called}: its {who} writes {named(tokens.items())}, for which its head of {head}"
                " rows has none"
            )


def _refuse_other_words(scorer: Words, student: Words) -> None:
    """Raise DataError unless each of the student's ids means the same to `scorer`, and has a logit.
    It may know more."""
    ours, most = student.ids, max(student.ids.values()) + 1
    if scorer.head < most:
        raise DataError(f"{scorer.called}: {scorer.head} logits for {most} tokens")
    differ = sorted(token for token, id in ours.items() if scorer.ids.get(token) != id)
    if differ:
        token, section = differ[0], scorer.section
        raise DataError(
            f"{scorer.called}: its tokenizer disagrees with the student's on {len(differ)} tokens,"
            f" such as {token!r} (student {ours[token]}, {section} {scorer.ids.get(token)})"
        )


def _refuse_other_ends(
    scorer: Words, student: Words, ends: Collection[int], ends_as: dict[int, int]
) -> None:
    """Raise DataError for an end of the scorer's at which the student does not stop. Say which of
    the student's own are none of the scorer's."""
    theirs, ours = set(scorer.ends.ids), set(student.ends.ids)
    read_as = set(ends_as.values())
    if missing := theirs - set(ends) - ends_as.keys():
        tokens = [scorer.tokens[id] for id in sorted(missing)]
        ways = " or ".join(
            [f"add {tokens} to rollout.stop"] * (missing <= student.tokens.keys())
            + [f"map them in {scorer.section}.ends_as"] * (scorer.section != "reference")
        )
        raise DataError(
            f"{scorer.called}: ends by {scorer.named(missing)}, where the student does not stop: it"
            f" ends by {student.named(ends)}; {ways or 'the student has no such token'}"
        )
    if unknown := ours - theirs - read_as:
        say(
            f"{scorer.called}: does not end by {student.named(unknown)}, as the student does; it"
            f" ends by {scorer.named(theirs)}"
        )


def _ends_as(
    scorer: Words, config: object, student: Words, ends: Collection[int]
) -> tuple[tuple[int, int], ...]:
    """Read which ends of a teacher's are read as which of the student's. Raises DataError."""
    mapped = config.ends_as if isinstance(config, TeacherConfig) else {}
    pairs: dict[int, int] = {}
    for token, ours in mapped.items():
        called = f"{scorer.section}.ends_as = {{ {token!r} = {ours!r} }}"
        theirs, mine = scorer.ids.get(token), student.ids.get(ours)
        if theirs is None or theirs not in scorer.ends.ids:
            raise DataError(
                f"{called}: {token!r} must be an end of {scorer.called}, which ends by"
                f" {scorer.named(scorer.ends.ids)}"
            )
        if mine is None or mine not in ends or mine in pairs.values():
            raise DataError(
                f"{called}: {ours!r} must be an end of the student's, and named once: it ends by"
                f" {student.named(ends)}"
            )
        if theirs in ends:
            raise DataError(f"{called}: has no effect, the student ends by {token!r} itself")
        pairs[theirs] = mine
    return tuple(pairs.items())


def _refuse_more_candidates(config: Config, size: int) -> None:
    """Raise DataError for more of the likeliest than there are."""
    needs = config.objective.needs()
    likeliest = max(
        needs.teacher_topk, needs.teacher_at_student_ids if needs.student_ids == "likeliest" else 0
    )
    if likeliest > size:
        raise DataError(f"objective.k = {likeliest}: the vocabulary has {size}")
