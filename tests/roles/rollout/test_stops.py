import pytest

from async_opd.roles.rollout.stops import stop_tokens

TEXTS = {0: "a", 1: ".\n", 2: "\nUs", 3: "er:", 4: "<end>", 5: ""}


def decode(ids, *, skip_special_tokens):
    assert not skip_special_tokens
    return "".join(TEXTS[id] for id in ids)


@pytest.mark.parametrize(
    ("stopped_by", "ids", "expected"),
    [
        (None, [0, 1], 0),  # by its length
        (4, [0, 4], 0),  # by an end of the model's own
        (3, [0, 3], 1),
        ("\nUser:", [0, 2, 3], 2),
        ("\nUser:", [0, 1, 2, 3], 2),
        ("\n\nUser:", [0, 1, 2, 5, 3], 4),  # which begins inside of a token
        ("er:", [0, 2, 3], 1),
    ],
)
def test_the_tokens_that_spell_a_stop_are_counted(stopped_by, ids, expected):
    assert stop_tokens(stopped_by, ids, (3, "\nUser:", "\n\nUser:"), decode) == expected
