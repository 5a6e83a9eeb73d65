"""Say how a submitted run is doing, or list every run of the cluster.

A line a run: its id, what it is doing, since when or for how long, its directory; then why it
failed, if it did.

  async-opd status
  async-opd status raysubmit_4LamXRuQpYdSMg7J --address http://127.0.0.1:8265
"""

import argparse
import time

from async_opd.cli.options import ADDRESS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", metavar="ID", help="what submit printed; else all of them")
    parser.add_argument("--address", metavar="URL", help=ADDRESS)


def run(args: argparse.Namespace) -> int:
    from async_opd.runtime.jobs import RUN_DIR, Jobs, last_word

    jobs = Jobs(args.address)
    listed = [jobs.about(args.id)] if args.id else jobs.runs()
    now = 1000 * time.time()
    for job in listed:
        minutes = ((job.end_time or now) - (job.start_time or now)) / 60_000
        where = (job.metadata or {}).get(RUN_DIR, job.entrypoint)
        why = f"\n  {last_word(job.message or '')}" if job.status == "FAILED" else ""
        print(f"{job.submission_id}  {job.status.value:9}  {minutes:6.1f} min  {where}{why}")
    if not listed:
        print(f"no run has been submitted to {jobs.address}")
    return 0
