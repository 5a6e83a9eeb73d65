"""Requests to one server over HTTP: one session, so many at a time, each within its time, and
whatever goes wrong by its name."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
import msgspec

from async_opd.core.aio import bounded, in_thread
from async_opd.core.errors import ActorLost, CallFailed, WireError

T = TypeVar("T")

AT_ONCE = 64  # requests of one client; a server's own queue is no place to wait in
BUSY = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
# what is wrong with the request itself, which another server would say as well
ITS_OWN = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
}
BACKOFF_S = 0.25  # after the first answer that a server is busy, then twice as long each
IDLE_S = 4.0  # that a connection is kept without a request; vLLM closes it after 5
SHOWN = 200  # characters of an error's body in a message
MOST_BYTES = 1 << 20  # of an answer that is not said to be longer
PIECE = 1 << 16  # bytes read at once


class Refused(WireError):
    """A server refuses one request for what is in it. The message is the server's."""


@dataclass(frozen=True)
class Reply:
    """What came back of a request."""

    status: int
    content: bytes
    retry_after: str = ""  # as the server wrote it
    location: str = ""

    @property
    def wait_s(self) -> float:
        """Seconds that the server asks to be left alone, 0 where it does not say."""
        try:
            seconds = float(self.retry_after)
        except ValueError:
            try:
                until = parsedate_to_datetime(self.retry_after)
            except (ValueError, OverflowError):
                return 0.0
            until = until if until.tzinfo else until.replace(tzinfo=UTC)
            seconds = (until - datetime.now(UTC)).total_seconds()
        return seconds if seconds > 0 else 0.0


class Client:
    """Asks one server. The key goes to its URL alone: nothing follows a redirection, and no proxy
    or netrc of the environment is read."""

    def __init__(self, called: str, url: str, key: str | None, *, within_s: float):
        """`called` begins every message. `within_s` bounds one request, the time in which the
        server is busy included; not the time in which the client itself has no place for it."""
        self._called = called
        self._url = url
        self._key = key
        self._within_s = within_s
        self._places = asyncio.Semaphore(AT_ONCE)
        self._reading = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None
        self._free_at = 0.0  # when a server that is busy may be asked again, on the loop's clock …
        self._busy = ""  # … and what it says

    async def close(self) -> None:
        """Close the connections."""
        if self._session:
            await self._session.close()
            self._session = None

    async def get(self, path: str) -> Reply:
        """Ask for `path`, once, whatever the server answers. Raises ActorLost where it is gone,
        TimedOut, and CallFailed for what is no HTTP."""
        return await bounded(self._reply("GET", path, None, MOST_BYTES), self._within_s, self.who)

    async def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        most_bytes: int = MOST_BYTES,
        *,
        as_long_as_it_takes: bool = False,
    ) -> bytes:
        """The JSON that the server answers: to `body`, or where there is none to a mere look.
        `as_long_as_it_takes`, the caller bounds it.

        One that is busy is asked again at the time that it names, and no later than `within_s` from
        then; where that is too late, the call has waited for half its time when it fails. Raises
        ActorLost where the server, or what is asked of it, is gone; TimedOut where it is late;
        Refused for what is wrong with this request alone; WireError for an answer that is too long;
        CallFailed where it is busy for too long, refuses the key, sends elsewhere, or answers no
        JSON."""
        async with self._places:
            seconds = None if as_long_as_it_takes else self._within_s
            return await self._asked(path, body, most_bytes, seconds)

    async def read(
        self, take: Callable[[bytes], T], path: str, body: Mapping[str, Any], most_bytes: int
    ) -> T:
        """What `take` makes of the answer, in a thread, of one answer at a time: that of a long
        response takes seconds, in which others come, and the actor gives signs of life. Raises
        what `ask` does."""
        async with self._places:  # until it is read: so many are held at most
            content = await self._asked(path, body, most_bytes, self._within_s)
            async with self._reading:
                return await in_thread(take, content)

    @property
    def who(self) -> str:
        """What messages call the server."""
        return f"{self._called}, {self._url}"

    async def _asked(
        self, path: str, body: Mapping[str, Any] | None, most_bytes: int, seconds: float | None
    ) -> bytes:
        reply = await bounded(self._patiently(path, body, most_bytes), seconds, self.who)
        self._refuse(path, reply)
        if not reply.content.lstrip().startswith((b"{", b"[")):
            raise CallFailed(f"{self.who}: {path} answers no JSON, but {self._shown(reply)}")
        return reply.content

    async def _patiently(self, path: str, body: Mapping[str, Any] | None, most_bytes: int) -> Reply:
        clock = asyncio.get_running_loop().time
        patient_until, backoff_s = clock() + self._within_s / 2, BACKOFF_S
        sent = None if body is None else msgspec.json.encode(body)
        while True:
            await asyncio.sleep(max(min(self._free_at, patient_until) - clock(), 0.0))
            if self._free_at > patient_until:
                raise CallFailed(f"{self.who}: busy for too long: {self._busy}")
            reply = await self._reply("GET" if sent is None else "POST", path, sent, most_bytes)
            if reply.status not in BUSY:
                return reply
            wait_s = max(reply.wait_s, backoff_s)
            says = self._shown(reply)
            self._busy = f"it answers {reply.status} and asks for {wait_s:.3g} s: {says}"
            self._free_at = max(self._free_at, clock() + min(wait_s, self._within_s))
            backoff_s *= 2

    async def _reply(self, method: str, path: str, sent: bytes | None, most_bytes: int) -> Reply:
        """What one request gives; a connection that ends under it is tried anew once, since a
        server closes those that are idle."""
        for last in (False, True):
            try:
                return await self._once(method, path, sent, most_bytes)
            except aiohttp.ClientConnectorError as e:
                raise ActorLost(f"{self.who}: cannot be reached: {_cause(e)}") from e
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as e:
                if last and isinstance(e, aiohttp.ClientConnectionError):
                    raise ActorLost(f"{self.who}: hangs up: {_cause(e)}") from e
                if last:
                    raise CallFailed(f"{self.who}: {path}: its answer breaks off") from e
            except aiohttp.ClientError as e:
                raise CallFailed(f"{self.who}: {path} answers no HTTP: {_cause(e)}") from e
        raise AssertionError

    async def _once(self, method: str, path: str, sent: bytes | None, most_bytes: int) -> Reply:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),  # `bounded` is
            )
        headers = None if sent is None else {"Content-Type": "application/json"}
        async with self._session.request(
            method, self._url + path, data=sent, headers=headers, allow_redirects=False
        ) as response:
            content = bytearray()
            async for piece in response.content.iter_chunked(PIECE):
                content += piece
                if len(content) > most_bytes:
                    raise WireError(f"{path} answers more than {most_bytes} bytes")
            return Reply(
                response.status,
                bytes(content),
                response.headers.get("Retry-After", ""),
                response.headers.get("Location", ""),
            )

    def _refuse(self, path: str, reply: Reply) -> None:
        """Raise what a status other than 200 means."""
        if reply.status == HTTPStatus.OK:
            return
        text = f"{path} answers {reply.status}: {self._shown(reply)}"
        if reply.status in ITS_OWN:
            raise Refused(text)
        if reply.status == HTTPStatus.UNAUTHORIZED:
            which = "the key that it is sent" if self._key else "a request without a key"
            text = f"refuses {which}: {text}"
        elif reply.status == HTTPStatus.NOT_FOUND:  # the model is none of its any more
            raise ActorLost(f"{self.who}: is not the server that was asked for: {text}")
        elif reply.location:
            text = f"{path} answers {reply.status} and sends elsewhere, which is not followed"
        raise CallFailed(f"{self.who}: {text}")

    def shown(self, text: str) -> str:
        """Shorten what a server has written to what a message holds: it may have written the key
        it was sent."""
        text = text.replace(self._key, "…") if self._key else text
        words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return words[:SHOWN] + "…" * (len(words) > SHOWN)

    def _shown(self, reply: Reply) -> str:
        text = reply.content.decode(errors="replace")
        if text.lstrip()[:1] == "<":
            return "a page of HTML or XML"
        return self.shown(_message(text)) or "nothing"


def _message(text: str) -> str:
    """What an error's body says, as vLLM and others write it; the body itself where it is no
    such."""
    try:
        match msgspec.json.decode(text):
            case {"error": {"message": str(message)}} | {"message": str(message)}:
                return message
            case {"error": str(message)} | {"detail": str(message)}:
                return message
            case _:
                return text
    except (msgspec.DecodeError, RecursionError):
        return text


def _cause(error: aiohttp.ClientError) -> str:
    """What went wrong, without the request that it went wrong with."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or f"{error.os_error}"
    if isinstance(error, ssl.SSLError):
        return f"{error.reason}"
    return type(error).__name__
