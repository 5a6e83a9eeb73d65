"""End a submitted run as Ctrl-C would: with a checkpoint to go on from.

The step at hand is finished and saved, where both take at most timeout.last_save_s, 18 s by
default; else the checkpoint before it is the last. What has not ended 42 s later is killed.
`submit --resume` goes on.

  async-opd stop raysubmit_4LamXRuQpYdSMg7J
"""

import argparse

from async_opd.cli.options import ADDRESS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="what submit printed")
    parser.add_argument("--address", metavar="URL", help=ADDRESS)


def run(args: argparse.Namespace) -> int:
    from async_opd.runtime.jobs import RUN_DIR, Jobs, last_word

    jobs = Jobs(args.address)
    ended, log = jobs.stop(args.id), jobs.logs(args.id)
    # saved, or why not
    checkpoints = [line for line in log.splitlines() if " checkpoint: " in line]
    print(*checkpoints[-1:], f"{args.id} {ended.status.value}: {last_word(log)}", sep="\n")
    run_dir = (ended.metadata or {}).get(RUN_DIR)
    if ended.status == "STOPPED" and run_dir:
        print(f"async-opd submit --resume {run_dir} --address {jobs.address}")
    return 0
