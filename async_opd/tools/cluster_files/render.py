"""Files of a cluster, rendered: templates beside this file, filled from a Shape."""

import json
import shlex
from dataclasses import asdict
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path
from string import Template
from textwrap import indent

from async_opd.config.load import load
from async_opd.core.errors import ConfigError
from async_opd.runtime.jobs import RUN_DIR, stop_s
from async_opd.tools.cluster_files import KINDS
from async_opd.tools.cluster_files.shape import shape_of

# The raylet kills what a dead actor leaves behind, as workers of its engine that hang in NCCL and
# keep their cards. Ray's default since 2.60, here for a site that has set it otherwise.
REAPER = "RAY_process_group_cleanup_enabled=true"
ROLES = ("Generator", "Learner", "Reference", "Teacher", "Verifier")  # titles of their processes
RDMA = " # --rdma"  # ends the lines of a template that are for RDMA alone
GRACE_S = 30  # of a pod, behind its run's last save


class _Filled(Template):
    """A template with fields `@{name}`: `$` is the shell's."""

    delimiter = "@"


def render(
    kind: str,
    path: Path,
    overrides: list[str],
    gpus_per_node: int,
    image: str,
    rdma: str | None = None,
) -> str:
    """Render the file of that kind for the config at `path` with `overrides`; with `rdma`, the name
    of a Kubernetes resource, for nodes that have RDMA between them. Raises ConfigError."""
    config = load(path, overrides, elsewhere=True)
    here = [f"{key} = {name!r}" for key, name in config.relative_inputs.items()]
    if kind == "kuberay" and here:
        raise ConfigError(
            f"{', '.join(here)}: the pods see no file of this machine: name an absolute path of"
            " theirs"
        )
    shape = shape_of(config, gpus_per_node)
    asked = [str(path), *overrides, "--gpus-per-node", str(gpus_per_node), "--image", image]
    if rdma:
        asked.append(f"--rdma={rdma}")
    stop = stop_s(config.timeout.last_save_s)
    text = files("async_opd.tools.cluster_files").joinpath(KINDS[kind]).read_text(encoding="utf-8")
    return _Filled(_lines(text, rdma is not None)).substitute(
        asdict(shape),
        command=_in_comment("async-opd", "cluster", "render", "--kind", kind, *asked),
        config=indent(path.read_text(encoding="utf-8"), " " * 4),
        config_path=shlex.quote(str(path)),
        overrides=shlex.join(overrides),
        submitted=_in_comment(str(path), *overrides),
        runs_quoted=shlex.quote(shape.runs),
        shared_quoted=json.dumps(shape.shared),
        volume=json.dumps(f"--volume={shlex.quote(f'{shape.shared}:{shape.shared}')}"),
        entrypoint=json.dumps(
            shlex.join(["python", "-m", "async_opd", "train", "/config/config.toml", *overrides])
        ),
        image=image,
        metadata=json.dumps({RUN_DIR: shape.run_dir}),
        ray=version("ray"),
        rdma=rdma,
        reaper=REAPER,
        reaper_name=REAPER.partition("=")[0],
        roles="|".join(ROLES),
        stop_s=stop,
        grace_s=stop + GRACE_S,
        ahead_s=max(180, stop),
        vllm=_vllm(),
        workers=shape.nodes - 1,  # besides the head
        worker_ips=json.dumps([f"worker-{number}.example" for number in range(1, shape.nodes)]),
    )


def _lines(text: str, rdma: bool) -> str:
    """Take from a template the lines that are for RDMA alone, or the mark from them."""
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if rdma or not line.endswith(f"{RDMA}\n")]
    return "".join(kept).replace(RDMA, "")


def _in_comment(*words: str) -> str:
    """Write a command into a comment, of which each line of it must be."""
    return shlex.join(words).replace("\n", "\n# ")


def _vllm() -> str:
    """Look up the release that the package asks for on GPUs."""
    (asked,) = (line for line in requires("async-opd-ray") or () if line.startswith("vllm=="))
    return asked.partition(";")[0].removeprefix("vllm==").strip()
