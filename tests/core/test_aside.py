import asyncio
import threading

import pytest

from async_opd.core.aside import DaemonThread, aside
from async_opd.core.errors import TimedOut


async def test_what_blocks_has_a_thread_that_may_be_left_behind_and_the_loop_goes_on():
    assert await aside(60, "a disk", threading.current_thread) is not threading.main_thread()
    with pytest.raises(ZeroDivisionError):
        await aside(60, "a disk", divmod, 1, 0)
    release = threading.Event()
    with pytest.raises(TimedOut, match=r"^a disk: no answer in 0\.05 s$"):
        await aside(0.05, "a disk", release.wait, 60)
    (left,) = (thread for thread in threading.enumerate() if thread.name == "a disk")
    assert left.daemon
    release.set()
    left.join(60)
    assert not left.is_alive()  # nothing stays of one that ends after all


async def test_one_thread_keeps_the_order_and_leaves_out_what_was_given_up_before_it_began():
    thread, release, done = DaemonThread("disk"), threading.Event(), []
    with pytest.raises(TimedOut):
        await aside(0.05, "first", lambda: (release.wait(60), done.append(1)), thread=thread)
    with pytest.raises(TimedOut):
        await aside(0.05, "second", done.append, 2, thread=thread)
    third = asyncio.ensure_future(aside(60, "third", done.append, 3, thread=thread))
    await asyncio.sleep(0)
    release.set()
    await third
    assert done == [1, 3]
    thread.shutdown()
