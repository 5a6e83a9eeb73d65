"""The config that the files are rendered for."""

from pathlib import Path

from async_opd.tools.cluster_files.render import render

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "configs" / "multi_node_deepmath.toml"
SETTINGS = ["run.dir=/shared/runs/deepmath"]
RDMA = "rdma/hca_shared_devices_a"


def rendered(kind: str, *more: str, gpus: int = 8, rdma: str | None = None) -> str:
    """The file of that kind for nodes of so many GPUs."""
    return render(kind, RECIPE, [*SETTINGS, *more], gpus, "async-opd", rdma)
