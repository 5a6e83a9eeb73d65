"""Prove from a run's ledger that no prompt was lost or trained twice.

Follows every prompt from its hand-out to the step that trained it, or to the cause for which it was
dropped, through losses and resumes, and holds that against metrics.jsonl and the newest checkpoint.
The run may be at work, or have been killed. Each discrepancy is a line; with any, the exit status
is 1.

  async-opd audit runs/demo
"""

import argparse

from async_opd.cli.options import path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=path, metavar="RUN", help="its directory")
    parser.add_argument("--json", action="store_true", help="the books as one object")


def run(args: argparse.Namespace) -> int:
    import msgspec

    from async_opd.tools.audit.books import audit

    books = audit(args.run_dir)
    print(msgspec.json.encode(books).decode() if args.json else "\n".join(books.lines()))
    return 1 if books.discrepancies else 0
