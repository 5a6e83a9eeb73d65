"""How a server is asked: one session, so much at a time, in its time; where its key goes; and who
is asked instead of one that is gone or busy."""

import asyncio
import logging
import ssl
import threading
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from async_opd.core.errors import ActorLost, AsyncOpdError, CallFailed, ConfigError, TimedOut
from async_opd.core.ports import Teacher
from async_opd.core.wire import Needs
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.roles.teacher.probe import RESPONSES
from async_opd.roles.teacher.server import vllm_routes
from async_opd.roles.teacher.server.answers import checked
from async_opd.roles.teacher.server.client import AT_ONCE, Client, Reply
from async_opd.roles.teacher.server.served import look
from tests.roles.teacher.server.asked import KEY, group, scores_of, teaching
from tests.roles.teacher.server.stub import MODEL, serving


def busy(times: int, status: int = 429, **headers: str):
    """Answer that many requests by `status`."""
    left = iter(range(times))

    async def rule(stub, request, body):
        if next(left, None) is None:
            return None
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return web.Response(status=status, text="later", headers=named)

    return rule


async def test_requests_that_follow_one_another_share_a_connection():
    async with serving() as stub, teaching(stub) as teacher:
        for _ in range(5):
            await scores_of(teacher, group(3))
        assert len(stub.asked) == 5
        assert len(stub.connections) <= RESPONSES  # of the probe, which were at once


async def test_a_connection_that_the_server_has_closed_is_none_that_is_lost():
    """As vLLM does with one that is idle: here at the moment in which the next request comes."""

    async def rule(stub, request, body):
        if len(stub.asked) == 2:
            request.transport.close()
        return None

    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = rule
        await scores_of(teacher, group(3))
        await scores_of(teacher, group(3))
        assert len(stub.asked) == 3


async def test_a_server_is_sent_a_bounded_number_of_requests_at_once():
    async def rule(stub, request, body):
        await asyncio.sleep(0.02)

    async with serving() as stub, teaching(stub, within_s=30) as teacher:
        stub.rule = rule
        lengths = [2] * (AT_ONCE + 40)
        await scores_of(teacher, group(*lengths))
        assert stub.busiest == AT_ONCE
        assert len(stub.asked) == len(lengths)


@pytest.mark.parametrize("status", [429, 503])
async def test_one_that_is_busy_is_asked_again_when_it_says(status):
    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = busy(1, status, Retry_After="0.4")
        began = time.monotonic()
        await scores_of(teacher, group(3))
        assert time.monotonic() - began >= 0.4
        assert len(stub.asked) == 2


async def test_while_it_is_busy_nothing_else_is_sent_to_it_either():
    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = busy(1, Retry_After="0.6")
        first = asyncio.create_task(scores_of(teacher, group(3)))
        while not teacher._client._free_at:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await scores_of(teacher, group(3))
        assert time.monotonic() - began > 0.4
        await first


async def test_one_that_says_nothing_of_when_is_asked_ever_more_rarely():
    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = busy(2)  # 0.25 s, and 0.5 s
        began = time.monotonic()
        await scores_of(teacher, group(3))
        assert time.monotonic() - began >= 0.75
        assert len(stub.asked) == 3


@pytest.mark.parametrize("after", ["", "600", "nan"])
async def test_one_that_stays_busy_fails_the_call_within_half_its_time(after):
    async with serving() as stub, teaching(stub, within_s=0.8) as teacher:
        stub.rule = busy(1000, 503, **({"Retry_After": after} if after else {}))
        began = time.monotonic()
        with pytest.raises(
            CallFailed, match=r"busy for too long: it answers 503 and asks for .*: l"
        ):
            await teacher.score(group(3))
        assert time.monotonic() - began >= 0.4
        # again after 0.25 s; not where it asks to be left alone for longer than there is time
        assert len(stub.asked) == (1 if after == "600" else 2)


@pytest.mark.parametrize("status", [429, 503])
async def test_one_that_asks_for_a_long_rest_costs_no_group_where_it_is_the_only_one(status):
    """It is left alone for as long as a request may take, and asked again within the tries that a
    group has."""
    async with serving() as stub, teaching(stub, within_s=0.8) as teacher:
        stub.rule = busy(8, status, Retry_After="600")
        teacher.kill = lambda: None
        pool = ReplicaPool("teacher", [teacher])
        groups = [group(3, id=f"{row}@0") for row in range(8)]
        answers = await asyncio.gather(*(pool.ask(Teacher.score, each) for each in groups))
        assert all(causes == ("",) for causes, _ in answers)
        assert len(stub.asked) == 16


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("", 0),
        ("x", 0),
        ("-1", 0),
        ("nan", 0),
        ("Mon, 01 Jan 1990 00:00:00 GMT", 0),
        ("Mon, 01 Jan 2026 00:00:00 +99999999999999999", 0),
    ],
)
def test_when_a_server_is_to_be_asked_again(text, seconds):
    assert Reply(429, b"", text).wait_s == seconds


def test_it_may_name_a_time_of_day():
    until = datetime.now(UTC) + timedelta(seconds=40)
    assert Reply(429, b"", format_datetime(until, usegmt=True)).wait_s == pytest.approx(40, abs=2)


@asynccontextmanager
async def speaking(sent: bytes | None):
    """The URL of what answers a connection by some bytes, or by none until it ends."""
    ended = []

    async def answer(reader, writer):
        ended.append(done := asyncio.Event())
        await reader.read(100)
        if sent is None:
            await reader.read()
        else:
            writer.write(sent)
        writer.close()
        await writer.wait_closed()
        done.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield "http://{}:{}".format(*server.sockets[0].getsockname())
    finally:
        server.close()
        for done in ended:
            await done.wait()


@asynccontextmanager
async def asking(url: str, within_s: float):
    client = Client("teacher", url, KEY, within_s=within_s)
    try:
        yield client
    finally:
        await client.close()


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{", b"SSH-2.0\r\n"]
)
async def test_a_connection_that_breaks_off_or_speaks_otherwise_is_an_error_by_name(sent):
    async with speaking(sent) as url, asking(url, 5) as client:
        with pytest.raises(
            (ActorLost, CallFailed), match=rf"^teacher, {url}: .*(hangs|breaks|no HTTP)"
        ):
            await client.ask("/v1/models")


async def test_one_that_is_gone_is_lost_and_its_health_says_so_until_it_is_back():
    async with serving() as stub, teaching(stub) as teacher:
        await teacher.check_health()
        port = int(stub.url.rpartition(":")[2])
        await stub.runner.cleanup()
        for call in (teacher.score(group(3)), teacher.check_health()):
            with pytest.raises(ActorLost, match=r"^teacher, http.*: cannot be reached: .*onnect"):
                await call
        async with serving(port) as again:
            again.rule = None
            await teacher.check_health()
            await scores_of(teacher, group(3))


@pytest.mark.parametrize(
    ("status", "after", "lives"),
    [
        (200, "", True),
        (404, "", True),
        (429, "", True),
        (503, "2", True),
        (503, "", False),
        (500, "", False),
    ],
)
async def test_what_its_health_says(status, after, lives):
    async with serving() as stub, teaching(stub) as teacher:
        stub.healthy, stub.retry_after = status, after
        if lives:
            await teacher.check_health()
        else:
            with pytest.raises(ActorLost, match=f"says {status} of its health"):
                await teacher.check_health()


async def test_it_gives_signs_of_life_while_it_reads_a_long_answer(monkeypatch):
    """What is long takes seconds to read; here until it has given one."""
    alive = threading.Event()

    def slowly(*args):
        assert alive.wait(20)
        return checked(*args)

    async with serving() as stub, teaching(stub) as teacher:
        monkeypatch.setattr(vllm_routes, "checked", slowly)
        scoring = asyncio.create_task(scores_of(teacher, group(3, 4)))
        while not teacher._client._reading.locked():
            await asyncio.sleep(0.01)
        await teacher.check_health()
        alive.set()
        await scoring


async def test_the_time_of_a_look_at_its_health_is_bounded():
    async with speaking(None) as url, asking(url, 0.2) as client:
        with pytest.raises(TimedOut, match=r"^teacher, http.*: no answer in 0.2 s$"):
            await client.get("/health")


async def test_the_key_goes_to_its_server_alone_and_into_no_message(caplog):
    caplog.set_level(logging.DEBUG)
    messages = []
    async with serving() as stub, serving() as elsewhere, teaching(stub) as teacher:
        await scores_of(teacher, group(3))
        assert set(stub.keys) == {f"Bearer {KEY}"}
        bad = {
            "echo": web_answer(401, f'{{"error": {{"message": "Invalid key {KEY}"}}}}'),
            "echo2": web_answer(500, f"key {KEY} is no good"),
            "redirect": web_answer(307, "", Location=f"{elsewhere.url}/v1/completions?k={KEY}"),
            "page": web_answer(200, f"{KEY}"),
            "its own": web_answer(400, f"{KEY}"),
            "as model": web_answer(200, f'{{"model": "{KEY * 99}", "choices": []}}'),
        }
        for rule in bad.values():
            stub.rule = rule
            try:
                causes, _ = await teacher.score(group(3))
                messages += causes
            except AsyncOpdError as e:
                messages.append(f"{e!r} {e} {e.__cause__!r}")
        with pytest.raises(ConfigError) as e:
            stub.rule = bad["echo"]
            await look(stub.url, KEY, MODEL, timeout_s=5)
        messages.append(f"{e.value!r} {e.value.__cause__!r}")
        assert elsewhere.keys == [] and elsewhere.asked == []
        messages += [repr(teacher), repr(teacher._client), repr(teacher._served)]
    assert len(messages) == len(bad) + 4
    assert all(messages) and not any(KEY in message for message in messages)
    assert KEY not in caplog.text


def web_answer(status, text, **headers):
    async def rule(stub, request, body):
        return web.Response(status=status, text=text, headers=headers)

    return rule


async def test_without_a_key_none_is_sent_and_the_environment_has_no_say(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    async with serving() as stub, teaching(stub, key=None) as teacher:
        await scores_of(teacher, group(3))
        assert set(stub.keys) == {None}


async def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    async with serving(tls=context) as stub:
        assert stub.url.startswith("https://")
        with pytest.raises(ConfigError, match=r"cannot be reached: its certificate: .*self.signed"):
            await look(stub.url, KEY, MODEL, timeout_s=5)
        assert stub.keys == []


class Member:
    """A teacher as a pool's member."""

    def __init__(self, teacher):
        self._teacher = teacher
        self.check_health, self.probe = teacher.check_health, teacher.probe

    async def score(self, ref):
        return await self._teacher.score(ref)

    def kill(self):
        pass


@asynccontextmanager
async def pool_of(*stubs):
    needs = Needs(teacher_topk=2)
    async with (
        teaching(stubs[0], needs, within_s=1.2) as one,
        teaching(stubs[1], needs, within_s=1.2) as two,
    ):
        yield ReplicaPool("teacher", [Member(one), Member(two)])


WORSE = {
    "it goes away": None,
    "it is busy": busy(10_000, 503),
    "it is busy, and asks to be left alone": busy(10_000, 429, Retry_After="3600"),
    "it fails": web_answer(500, "boom"),
    "it sends a page": web_answer(200, "<html>"),
    "it sends nothing of the kind": web_answer(200, "{}"),
}


@pytest.mark.parametrize("rule", WORSE.values(), ids=[*WORSE])
async def test_of_two_servers_the_other_scores_what_one_does_not(rule):
    """Whatever becomes of one in the middle of it, each group has its scores, once."""
    async with serving() as bad, serving() as good, pool_of(bad, good) as pool:
        groups = [group(3, 4, id=f"{i}@0") for i in range(24)]

        asked = [ask(pool, one) for one in groups[:8]]
        await asyncio.sleep(0)
        if rule:
            bad.rule = rule
        else:
            await bad.runner.cleanup()
        asked += [ask(pool, one) for one in groups[8:]]
        answers = await asyncio.gather(*asked)
    for one, (causes, scores) in zip(groups, answers, strict=True):
        assert causes == ("", "")
        assert [s.id for s in scores] == [r.id for r in one.rollouts]
        assert all(np.isfinite(s.sampled_logp).all() for s in scores)


def ask(pool, one):
    def failed(answer):
        return [cause for cause in answer[0] if cause]

    asking = pool.ask(Teacher.score, one, of=one.prompt.id, unsound=failed)
    return asyncio.create_task(asking)
