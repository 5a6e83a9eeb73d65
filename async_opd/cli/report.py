"""Write one HTML page of a run, or of several side by side.

Curves, where the time of each role went, events, and rollouts with their tokens coloured by
advantage, weight and selection. Reads the run directories, which may still be at work, and writes
one file that needs no network: open it in a browser, or send it. Several runs are drawn over one
another, with the settings in which they differ.

  async-opd report runs/demo                        writes runs/demo/report.html
  async-opd report runs/sync runs/async -o both.html
"""

import argparse

from async_opd.cli.options import path, write


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="its directory")
    parser.add_argument(
        "-o",
        "--output",
        type=path,
        metavar="FILE.html",
        help="absent: report.html of the first run",
    )


def run(args: argparse.Namespace) -> int:
    from async_opd.tools.report.page import page

    html, file = page(args.runs), args.output or args.runs[0] / "report.html"
    print(f"{file}: {write(file, html) / 1e6:.1f} MB")
    return 0
