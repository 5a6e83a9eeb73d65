"""What the ids of a run become for each of its roles."""

import pickle

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from async_opd.config.load import load
from async_opd.config.precision import with_dtypes
from async_opd.core.errors import ActorLost
from async_opd.core.vocabulary import Tokens
from async_opd.roles.teacher.server.teacher import ServerTeacher
from async_opd.runtime.actor_specs import ActorSpecs
from async_opd.runtime.actors import refuse_unsendable
from async_opd.runtime.building import built

# the student ends by 1, which the teacher's 30 is read as, and by 9 and a text
TOKENS = Tokens(
    student=((0, 24),),
    eos_ids=(1, 9),
    stops=(9, "two words"),
    whole={"teacher": ((0, 31),)},
    ends_as={"teacher": ((30, 1),)},
)
THEIRS = ((0, 1), (2, 24), (30, 31))
SAMPLING = ("share=0.5", "full_until_step=1", "until_step=2")


KEY = "sk-Of-Nobody-5f0e"


@pytest.fixture
def specs() -> ActorSpecs:
    settings = [f"teacher_sampling.{setting}" for setting in SAMPLING]
    settings += ['rollout.stop=[9, "two words"]', "rollout.train_stop=false"]
    config = load("configs/demo.toml", settings)
    return ActorSpecs(config, tokens=TOKENS, tokenizer=Tokenizer(WordLevel()), first_seed=0)


def test_the_student_s_roles_have_its_ids_and_ends(specs):
    generator, learner = specs.member("generator", 0).args[0], specs.learner_rank(0).args[1]
    assert generator.vocabulary == learner.vocabulary == ((0, 24),)
    assert (generator.eos_ids, generator.stops) == ((1, 9), (9, "two words"))
    assert generator.ends_as == () and not learner.train_stop
    assert specs.member("verifier", 0).args[3:] == ("two words",)


def test_a_teacher_has_them_in_its_own_ids_whether_it_scores_or_answers(specs):
    teacher, answers = (specs.member(pool, 0).args[0] for pool in ("teacher", "teacher-generator"))
    for each in (teacher, answers):
        assert (each.vocabulary, each.eos_ids, each.ends_as) == (THEIRS, (30, 9), ((30, 1),))
    assert teacher.whole == ((0, 31),)
    assert (teacher.stops, answers.stops) == (("two words",), (9, "two words"))


def test_what_asks_a_server_has_its_address_and_a_key_that_does_not_print_itself(monkeypatch):
    monkeypatch.setenv("THEIR_KEY", KEY)
    settings = ["teacher.backend=server", 'teacher.urls=["http://localhost:1"]']
    config = load("configs/demo.toml", [*settings, "teacher.key_env=THEIR_KEY"])
    specs = ActorSpecs(config, tokens=TOKENS, tokenizer=Tokenizer(WordLevel()), first_seed=0)
    spec = specs.member("teacher", "http://localhost:1")
    role, scorer, needs, url, key, within_s = spec.args
    assert (role.name, url) == ("teacher http://localhost:1", "http://localhost:1")
    assert (role.section, scorer, within_s) == ("teacher", config.teacher, config.timeout.score_s)
    assert needs.teacher_topk == 24 and not spec.engine
    refuse_unsendable("start", spec.args)
    assert pickle.loads(pickle.dumps(key)).value == KEY
    for shown in (f"{spec}", f"{spec!r}", f"{spec.args}", f"{with_dtypes(config, gpus=True)}"):
        assert KEY not in shown


def test_a_role_that_cannot_be_built_prints_no_key(monkeypatch, capfd):
    monkeypatch.setenv("THEIR_KEY", KEY)
    settings = ["teacher.backend=server", 'teacher.urls=["http://localhost:1"]']
    config = load("configs/demo.toml", [*settings, "teacher.key_env=THEIR_KEY"])
    specs = ActorSpecs(config, tokens=TOKENS, tokenizer=Tokenizer(WordLevel()), first_seed=0)
    spec = specs.member("teacher", "http://localhost:1")
    monkeypatch.setattr(ServerTeacher, "__init__", broken)
    role = built("teacher http://localhost:1", spec.target, *spec.args)
    with pytest.raises(ActorLost, match="teacher http://localhost:1 cannot be built") as why:
        role.start()
    printed = capfd.readouterr()
    assert "RuntimeError" in printed.err and KEY not in printed.err + printed.out + f"{why.value}"


def broken(self, *args):
    raise RuntimeError("no event loop")
