"""Show what every actor of a run did when, in Perfetto.

Writes a trace of the last steps of a run, which may be at work: a lane per actor with its states
(busy, starved, blocked, syncing, down) and its calls, each group's way from its generator to the
step that trained it, weight updates, checkpoints, who was lost and who came, the queue's depth and
tokens/s. Open it at https://ui.perfetto.dev, which uploads nothing. `run.trace_steps` of a run says
how many steps are kept, at least.

  async-opd trace runs/demo
  async-opd trace runs/demo -o demo.json
"""

import argparse

from async_opd.cli.options import path, write


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=path, metavar="RUN", help="its directory")
    parser.add_argument(
        "-o", "--output", type=path, metavar="FILE", help="where to; RUN/trace.json where absent"
    )


def run(args: argparse.Namespace) -> int:
    import sys

    import msgspec

    from async_opd.tools.trace.events import trace
    from async_opd.tools.trace.read import recorded

    spans = recorded(args.run_dir)
    output = args.output or args.run_dir / "trace.json"
    written = trace(spans, str(args.run_dir))
    write(output, msgspec.json.encode(written).decode())
    for damaged in spans.damaged:
        print(damaged, file=sys.stderr)
    about = written["otherData"]
    print(
        f"{output}: {len(written['traceEvents'])} events, steps {about['first_step']} to"
        f" {about['last_step']}; open it at https://ui.perfetto.dev"
    )
    return 0
