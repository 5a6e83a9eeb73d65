"""Prove from a run's ledger that no prompt was lost or trained twice."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="its directory")
    parser.add_argument("--json", action="store_true", help="the books as one object")


def run(args: argparse.Namespace) -> int:
    import msgspec

    from async_opd.audit.books import audit

    books = audit(args.run_dir)
    print(msgspec.json.encode(books).decode() if args.json else "\n".join(books.lines()))
    return 1 if books.discrepancies else 0
