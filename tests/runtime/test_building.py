"""A role that cannot be built is one line for whoever calls first, by its own name."""

import pickle

import pytest

from async_opd.core.errors import ActorLost, AsyncOpdError, ConfigError
from async_opd.runtime.actors import RoleActor

ERRORS = {
    "own": ConfigError("model x: no"),
    "foreign": KeyError("x"),
    "long": OSError("a\nb"),
}


class Refused:
    def __init__(self, error: str):
        raise ERRORS[error]


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        ("own", ConfigError, "model x: no"),
        ("foreign", ActorLost, "teacher 1 cannot be built: KeyError: 'x'"),
        ("long", ActorLost, "teacher 1 cannot be built: a"),
    ],
)
async def test_a_role_that_cannot_be_built_says_so_to_whoever_calls(error, kind, line, capfd):
    actor = RoleActor(f"{__name__}:Refused", 0.0, error, called="teacher 1")
    assert "Traceback" in capfd.readouterr().err  # in the actor's own log
    for call in (actor.start, lambda: actor.call("score"), actor.check_health):
        with pytest.raises(AsyncOpdError) as raised:
            await call()
        assert (type(raised.value), str(raised.value)) == (kind, line)
        assert str(pickle.loads(pickle.dumps(raised.value))) == line


async def test_a_role_that_is_not_there_is_one_line_too():
    actor = RoleActor("none_such:Role", 0.0, called="learner 0")
    with pytest.raises(ActorLost, match=r"^learner 0 cannot be built: ModuleNotFoundError: No mod"):
        await actor.call("listen", "host")
