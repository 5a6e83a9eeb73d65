"""Ranks in processes of their own, forked from one that has imported what they need."""

import multiprocessing
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any


def run_ranks(module: ModuleType, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Run `main` of `module` with each of `jobs`, side by side; each must end well."""
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([module.__name__])
    processes = [forked.Process(target=module.main, kwargs=job) for job in jobs]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [0] * len(jobs)
    finally:
        for process in processes:
            process.kill()
