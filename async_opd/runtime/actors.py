"""Plain role classes as Ray actors, and calls of them."""

import asyncio
import gc
import inspect
import itertools
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import ray
from ray import exceptions
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_opd.core.aio import bounded, retrieved
from async_opd.core.errors import (
    ActorLost,
    AsyncOpdError,
    CallFailed,
    SyncFailed,
    SystemFailed,
    TimedOut,
    WireError,
)
from async_opd.core.foreign import foreign
from async_opd.core.message import Struct
from async_opd.core.ports import Ref
from async_opd.objectives.base import Objective
from async_opd.roles.verifier.sandbox.namespaces import die_with
from async_opd.runtime.actor_log import ActorLog, follow
from async_opd.runtime.actor_specs import ActorSpec
from async_opd.runtime.batcher import LINGER_S
from async_opd.runtime.building import built, take_of_card
from async_opd.runtime.placement import ResourceRequest

GONE = (RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError, OutOfMemoryError)
CALLS_AT_ONCE = 10_000  # an async actor refuses nothing below this; the slots bound what there is
PLAIN = (bool, int, float, str, bytes, np.ndarray, type(None))
PATIENCE_S = 100 * LINGER_S  # the longest a quick call waits for a slow one that travels with it


class RoleActor:
    """The actor: builds one role in its own process and forwards calls to it."""

    def __init__(self, target: str, memory_share: float, *args: Any, called: str = ""):
        """Build `target`, "module:name", with `args`; errors name it by `called`. `memory_share`
        below 1 is that of the card's memory that PyTorch may take here."""
        take_of_card(memory_share)
        self._role = built(called or target, target, *args)
        self._late: dict[str, asyncio.Task[Any]] = {}  # calls that were slow, by their ticket
        self._tickets = itertools.count()
        gc.collect()
        gc.freeze()  # what was imported and built is not garbage: a full collection need not see it

    async def call(self, method: str, *args: Any, **columns: Any) -> Any:
        """Call the role. `columns` of references come as `name.0`, `name.1`, … and reach it as one
        tuple each."""
        tables: dict[str, tuple[Any, ...]] = {}
        for key, value in columns.items():
            name = key.partition(".")[0]
            tables[name] = (*tables.get(name, ()), value)
        result = getattr(self._role, method)(*args, **tables)
        return await result if inspect.isawaitable(result) else result

    async def each(self, method: str, *args: Any) -> list[Any]:
        """`call` for each of `args`: its result, its error, or, where it takes longer than
        PATIENCE_S, a ticket for `late`."""
        calls = [retrieved(asyncio.create_task(self.call(method, arg))) for arg in args]
        try:
            await asyncio.wait(calls, timeout=PATIENCE_S)
        except asyncio.CancelledError:  # nobody waits for any of them
            for call in calls:
                call.cancel()
            raise
        return [_outcome(method, call) if call.done() else self._later(call) for call in calls]

    async def each_kept(self, method: str, *args: Any) -> tuple[Any, ...]:
        """`each` for calls whose second results stay references: the caller awaits what comes
        before them, for each of `args` its first result, its error or a ticket."""
        outcomes = await self.each(method, *args)
        pairs = [o if isinstance(o, tuple) else (o, None) for o in outcomes]
        return [first for first, _ in pairs], *(kept for _, kept in pairs)

    async def late(self, ticket: str) -> Any:
        """The result of a call of `each` that was slow."""
        return await self._late.pop(ticket)

    async def forget(self, ticket: str) -> None:
        """Cancel a call of `each` that was slow: nobody waits for it."""
        if call := self._late.pop(ticket, None):
            call.cancel()

    def _later(self, call: asyncio.Task[Any]) -> str:
        ticket = f"{next(self._tickets)}"
        self._late[ticket] = call
        return ticket

    async def start(self) -> None:
        """Have the role begin, where it has something to begin with. Raises what kept it from being
        built."""
        if start := getattr(self._role, "start", None):
            await start()

    async def check_health(self) -> None:
        """Answered by a process that lives; a role with an engine of its own looks at it too."""
        if check := getattr(self._role, "check_health", None):
            await check()

    async def address(self) -> str:
        """This node's address."""
        return ray.util.get_node_ip_address()

    async def place(self) -> str:
        """This node's address and the GPUs that are this actor's."""
        gpus = ", ".join(map(str, ray.get_gpu_ids()))
        return f"node {ray.util.get_node_ip_address()}{gpus and ', GPU '}{gpus}"

    async def sees(self, file: str) -> bool:
        """Whether a file of the driver's is here, too."""
        return Path(file).exists()


def _outcome(method: str, call: asyncio.Task[Any]) -> Any:
    """The result of a call that is done, or its error, under a name of ours and with its place."""
    error = call.exception()
    if error is None or isinstance(error, AsyncOpdError):
        return error or call.result()
    place = traceback.extract_tb(error.__traceback__)[-1]
    return CallFailed(f"{method}: {error!r} ({place.filename}:{place.lineno})")


class ActorProcess(RoleActor):
    """The actor in a process that Ray has started: it ends with its raylet, whose main thread has
    forked it, even in a C call, and prints into its log."""

    def __init__(self, *args: Any, called: str, log: str, begins: str):
        """As RoleActor; `log` and `begins` are what an ActorLog holds."""
        die_with(os.getppid())
        follow(Path(log), begins)
        super().__init__(*args, called=called)


class RemoteActor:
    """An actor, with a name and bounded calls."""

    log = ActorLog("", "")

    def __init__(
        self,
        name: str,
        spec: ActorSpec,
        request: ResourceRequest,
        node: str | None,
        log: ActorLog = log,
    ):
        """On that node, or where Ray finds room once there is some; it prints into `log`."""
        self.log = log
        self.name = name
        self.request = request
        self.node = node
        self.killed = False
        # of the process, in `ps` and Ray's tools
        title = name.split()[0].split(".")[0].removesuffix("s").capitalize()
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": request.gpus,
            "max_concurrency": CALLS_AT_ONCE,
            # a byte: Ray puts what asks for nothing on any node, whatever is said of nodes
            "memory": 1,
        }
        if node is not None:  # softly: a node that dies meanwhile keeps nobody waiting
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        # an engine of vLLM's, in a process of its own, is told by its gpu_memory_utilization
        share = 0.0 if spec.engine else request.gpus
        refuse_unsendable(title, spec.args)
        with foreign(f"{name}, start", SystemFailed):
            role = ray.remote(type(title, (ActorProcess,), {})).options(**options)
            self._handle: Any = role.remote(
                spec.target, share, *spec.args, called=name, log=log.path, begins=log.line
            )

    async def call(
        self, timeout_s: float | None, method: str, *args: Any, **columns: Sequence[Ref]
    ) -> Any:
        """The result of the role's `method`; `columns` are references, each a tuple there. No
        `timeout_s`, here and below: the caller bounds it."""
        flat = {f"{name}.{i}": ref for name, refs in columns.items() for i, ref in enumerate(refs)}
        refuse_unsendable(method, (*args, *flat.values()))
        with foreign(f"{self.name}, {method}", SystemFailed):
            ref = self._handle.call.remote(method, *args, **flat)
        return await self._result(ref, timeout_s, method)

    async def call_keeping(
        self, timeout_s: float | None, refs: int, how: str, *args: Any, what: str = ""
    ) -> tuple[Any, list[Ref]]:
        """A call by `how` with 1 + `refs` results: the first awaited, the others left where they
        are. `what` is what errors call it, or else the first of `args`, the role's method."""
        what = what or args[0]
        refuse_unsendable(what, args)
        remote = getattr(self._handle, how).options(num_returns=1 + refs)
        with foreign(f"{self.name}, {what}", SystemFailed):
            first, *rest = remote.remote(*args)
        return await self._result(first, timeout_s, what), rest

    async def ask_host(
        self, timeout_s: float | None, method: str, *args: Any, what: str = ""
    ) -> Any:
        """The result of a method of `RoleActor` itself; `what` is what errors call it."""
        refuse_unsendable(method, args)
        with foreign(f"{self.name}, {what or method}", SystemFailed):
            ref = getattr(self._handle, method).remote(*args)
        return await self._result(ref, timeout_s, what or method)

    def kill(self) -> None:
        """End the process; one that Ray cannot reach ends with its connection."""
        self.killed = True
        with suppress(SystemFailed), foreign(f"{self.name}, kill", SystemFailed):
            ray.kill(self._handle)

    def forget(self, ticket: str) -> None:
        """Have a call of `RoleActor.each` that was slow be cancelled, without waiting for it."""
        self._unwanted(lambda: self._handle.forget.remote(ticket))

    def _unwanted(self, cancel: Callable[[], Any]) -> None:
        """Have the actor `cancel` a call, where Ray still reaches it."""
        if not self.killed:
            with suppress(SystemFailed), foreign(f"{self.name}, cancel", SystemFailed):
                cancel()

    async def _result(self, ref: Ref, timeout_s: float | None, what: str) -> Any:
        """Await a call's result. Raises the role's own named error, or one of ours for it. Where
        nobody waits for it any more it is cancelled in the actor."""
        try:
            return await bounded(ref, timeout_s, f"{self.name}, {what}")
        except asyncio.CancelledError:
            self._unwanted(lambda: ray.cancel(ref))
            raise
        except TimedOut as e:
            self._unwanted(lambda: ray.cancel(ref))
            raise TimedOut(f"{e}; {await self.log.words()}") from None
        except GONE as e:
            lines = str(e).partition("Some common causes")[0].strip().splitlines()
            lines = lines or [type(e).__name__]
            why = " … ".join(dict.fromkeys((lines[0], lines[-1])))
            words = await self.log.words()
            raise ActorLost(f"{self.name} died during {what}: {why}; {words}") from None
        except exceptions.RayTaskError as e:
            if isinstance(e.cause, ActorLost | SyncFailed):
                raise type(e.cause)(f"{e.cause}; {await self.log.words()}") from None
            if isinstance(e.cause, AsyncOpdError):
                raise e.cause from None
            # of a bare one its last line, behind the trace
            why = f"{type(e.cause).__name__}: {e.cause}" if e.cause else str(e).split("\n")[-1]
            words = await self.log.words()
            raise CallFailed(f"{self.name}, {what}: {why}; {words}") from e
        except (exceptions.RayError, OSError):  # such as what it was to work on, gone with a node
            with foreign(f"{self.name}, {what}", SystemFailed):
                raise


def refuse_unsendable(method: str, args: Sequence[Any]) -> None:
    """Raise WireError unless each of `args` may be given to a remote call: a message, an objective,
    a role's own section of the config, a plain number, text, bytes or array, or a reference."""
    for arg in args:
        if isinstance(arg, (*PLAIN, ray.ObjectRef, Struct, Objective)) or _is_role_section(arg):
            continue
        raise WireError(
            f"{method}: {type(arg).__name__} is given to a remote call; allowed are messages, an"
            " objective, a role's own section, numbers, text, bytes, arrays and references"
        )


def _is_role_section(arg: Any) -> bool:
    place = type(arg).__module__
    ours = place.startswith("async_opd.roles.") and place.endswith(".config")
    return isinstance(arg, msgspec.Struct) and ours
