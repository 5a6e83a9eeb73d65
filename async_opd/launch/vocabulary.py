"""Whether student, teachers and reference mean the same by the same ids."""

from transformers import PreTrainedTokenizerFast

from async_opd.config.schema import Config
from async_opd.core.errors import DataError
from async_opd.launch.models import eos_ids, text_config, tokenizer_of


def check_scorers(config: Config, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a teacher or reference whose tokens mean something else, or that cannot score all of
    them."""
    ours = tokenizer.get_vocab()
    for section in config.scorers:
        key, model = f"{section}.model", config.models[section]
        args = model, config.run.trust_remote_code
        theirs = tokenizer_of(key, *args).get_vocab()
        if ours != theirs:
            differ = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
            raise DataError(
                f"{key} = {model!r}: its tokenizer disagrees with the student's on {len(differ)}"
                f" tokens, such as {differ[0]!r} (student {ours.get(differ[0])}, {section}"
                f" {theirs.get(differ[0])})"
            )
        size = text_config(key, *args).vocab_size
        if size < len(tokenizer):
            raise DataError(f"{key} = {model!r}: {size} logits for {len(tokenizer)} tokens")
    needs = config.objective.needs()
    likeliest = max(
        needs.teacher_topk, needs.teacher_at_student_ids if needs.student_ids == "likeliest" else 0
    )
    if likeliest > len(tokenizer):
        raise DataError(f"objective.k = {likeliest}: the vocabulary has {len(tokenizer)}")


def check_ends(config: Config) -> None:
    """Refuse a teacher that is to answer prompts, but ends its answers by a token that ends none of
    the student's."""
    ours, theirs = (
        set(eos_ids(f"{section}.model", config.models[section], config.run.trust_remote_code))
        for section in ("student", "teacher")
    )
    if not theirs <= ours:
        raise DataError(
            f"teacher.model = {config.models['teacher']!r}, with [teacher_sampling]: its answers"
            f" end by tokens {sorted(theirs)}, the student's by {sorted(ours)}"
        )
