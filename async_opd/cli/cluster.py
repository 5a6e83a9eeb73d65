"""Write the files that make a cluster for a config: as many nodes and GPUs as its roles ask for.

Kinds: kuberay (a RayJob with token authentication), slurm (a script for sbatch), launcher (YAML for
`ray up`), and container (the image of either). run.dir must be absolute; the first folder of it is
the disk that all nodes share. With --rdma the nodes use InfiniBand or RoCE between them.

  async-opd cluster render --kind slurm configs/dear.toml run.dir=/shared/runs/dear -o dear.sh
"""

import argparse
import re

from async_opd.cli.options import OVERRIDES, count, path, write
from async_opd.tools.cluster_files import KINDS

HCAS = "rdma/hca_shared_devices_a"  # as the plugin for shared RDMA devices names them by default


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "async-opd cluster render --kind KIND CONFIG [key=value ...] [-o FILE] [options]"
    parser.add_argument("render", choices=["render"], metavar="render", help="what is to be done")
    parser.add_argument("config", type=path, metavar="CONFIG", help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    parser.add_argument("--kind", required=True, choices=KINDS, help="of file")
    parser.add_argument(
        "--gpus-per-node", type=count, default=8, metavar="N", help="how many a node has; absent, 8"
    )
    parser.add_argument(
        "--image",
        default="async-opd",
        metavar="NAME",
        help="of the container, as the nodes pull it",
    )
    parser.add_argument(
        "--rdma",
        type=resource,
        nargs="?",
        const=HCAS,
        metavar="RESOURCE",
        help=f"of the nodes, for NCCL between them; the name is Kubernetes's, absent {HCAS}",
    )
    parser.add_argument("-o", "--output", type=path, metavar="FILE", help="else it is printed")


def resource(text: str) -> str:
    """Read the name of an extended resource of Kubernetes: argparse takes the word behind --rdma
    for it."""
    if not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+", text) or text.endswith(".toml"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: is no resource such as {HCAS}; without one, --rdma comes last"
        )
    return text


def run(args: argparse.Namespace) -> int:
    from async_opd.tools.cluster_files.render import render

    text = render(args.kind, args.config, args.overrides, args.gpus_per_node, args.image, args.rdma)
    if args.output is None:
        print(text, end="")
    else:
        write(args.output, text)
    return 0
