"""An engine of two processes, by vLLM's own tensor parallelism, on CPUs: none of them outlives who
has started it, not even one that hears nothing."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from async_opd import toy
from tests.processes import command_line

pytestmark = pytest.mark.ray

ENGINE = """
import sys
from vllm import LLM
from async_opd.roles.models.vllm_cpu import cpu_engine

if __name__ == "__main__":
    engine = LLM(
        sys.argv[1],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        block_size=128,
        max_num_seqs=2,
        tensor_parallel_size=2,
        **cpu_engine(1, enforce_eager=True) | {"distributed_executor_backend": "mp"},
    )
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(600)
def test_the_workers_of_an_engine_end_with_the_actor_even_those_that_hear_nothing(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    environment = {
        **os.environ,
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    command = [sys.executable, str(script), str(toy.WEIGHTS / "teacher")]
    log = tmp_path / "engine.log"
    with log.open("wb") as output:
        actor = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while "ready" not in log.read_text():
            assert actor.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        others = psutil.Process(actor.pid).children(recursive=True)
        titles = [" ".join(command_line(other)) for other in others]
        workers = [p for p, title in zip(others, titles, strict=True) if "Worker" in title]
        assert len(workers) == 2, titles
        for worker in workers:  # as one that waits in a kernel for a peer: it reads no pipe
            worker.send_signal(signal.SIGSTOP)
        actor.kill()
        _, alive = psutil.wait_procs([p for p in others if p.is_running()], timeout=20)
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        for process in (actor, *psutil.Process(actor.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        actor.stdin.close()
        actor.wait()
