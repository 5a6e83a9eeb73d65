"""What a node of a Slurm cluster has, for a script that is tested without one: `sbatch`, `srun` and
`ray` that do nothing but check what they are asked, say it, and wait. Options are those of their
manual pages; what they refuse is said, too, and exits with 2.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

REAPER = "RAY_process_group_cleanup_enabled=true"
NODES = ("one", "two")
CORES = 96  # of a node
VALUED = """
account acctg-freq bb bbf bcast bell cluster-constraint clusters comment compress
constraint container container-id context core-spec cores-per-socket cpu-bind cpu- freq
cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution epilog error
exclude export extra gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-
task gres gres-flags hint input job-name licenses mail-type mail-user mem mem-bind mem-
per-cpu mem-per-gpu mincpus network nice nodefile nodelist nodes ntasks ntasks-per-core
ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output partition prefer
priority profile propagate qos reservation signal sockets-per-node switches thread-spec
threads-per-core time time-min tmp tres-bind tres-per-task uid wait wait-all-nodes wckey
"""
FLAGS = """
contiguous exclusive hold ignore-pbs immediate no-requeue oversubscribe overcommit requeue
quiet spread-job
"""
OF_STEPS = """
exact overlap kill-on-bad-exit label no-kill unbuffered whole verbose
"""


class Refused(Exception):
    """What Slurm would say."""


def options(words: list[str], flags: str) -> tuple[dict[str, str], list[str]]:
    """The options before the command, and the command. Raises Refused for one that there is not."""
    asked = {}
    for position, word in enumerate(words):
        if not word.startswith("--"):
            return asked, words[position:]
        name, _, value = word[2:].partition("=")
        if name not in flags.split() and not (name in VALUED.split() and value):
            raise Refused(f"unrecognized option '{word}'")
        asked[name] = value
    return asked, []


def sbatch(script: str) -> dict[str, str]:
    """The variables that a job of `script` sees. Raises Refused."""
    before_commands = re.match(r"#!/bin/bash\n(#.*\n|\n)*", script)
    directives = before_commands[0] if before_commands else ""
    if script.count("\n#SBATCH ") != directives.count("\n#SBATCH "):
        raise Refused("a directive behind the first command is none")
    words = re.findall(r"^#SBATCH (\S+)$", directives, re.MULTILINE)
    asked, _ = options(words, FLAGS)
    nodes, tasks = int(asked["nodes"]), int(asked["ntasks-per-node"])
    cores = int(asked.get("cpus-per-task", 1)) * tasks
    if max(cores, int(asked.get("mincpus", 1))) > CORES or nodes > len(NODES):
        raise Refused("Requested node configuration is not available")
    if not re.fullmatch(r"(R?B?:)?[A-Z0-9]+(@\d+)?", asked["signal"]):
        raise Refused(f"invalid --signal {asked['signal']}")
    if not re.fullmatch(r"\d+[KMGT]?", asked["mem"]):
        raise Refused(f"invalid --mem {asked['mem']}")
    given = {"SLURM_CPUS_PER_TASK": asked["cpus-per-task"]} if "cpus-per-task" in asked else {}
    return given | {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": f"[{','.join(NODES[:nodes])}]",
        "SLURM_CPUS_ON_NODE": str(CORES if "exclusive" in asked else cores),
    }


def step(words: list[str], cores: int) -> tuple[str, list[str]]:
    """The node and the command of a step of one task, in a job that has `cores` of each node.
    Raises Refused, also for a step that would have fewer: srun takes no --cpus-per-task from the
    job, since 22.05, and binds a task to its cores."""
    asked, command = options(words, f"{FLAGS} {OF_STEPS}")
    nodes, tasks = int(asked["nodes"]), int(asked["ntasks"])
    hosts = asked["nodelist"].split(",")
    if not set(hosts) <= set(NODES) or len(hosts) != nodes or tasks < nodes:
        raise Refused(f"{nodes} nodes and {tasks} tasks on {hosts}")
    each = int(asked.get("cpus-per-task", 1))
    if each * tasks > cores * nodes:
        raise Refused("More processors requested than permitted")
    if each < cores:
        raise Refused(f"a step of {each} of {cores} cores")
    if asked.get("cpu-bind", "cores") != "none":
        raise Refused("bound to what the site thinks best")
    if "overlap" not in asked:
        raise Refused("waits for the steps before it")
    if not command:
        raise Refused("No command given to execute.")
    return hosts[0], command


def say(line: str) -> None:
    with Path(os.environ["SAID"]).open("a") as said:
        said.write(f"{line}\n")


def srun() -> None:
    """Runs the command, until a SIGTERM."""
    try:
        node, command = step(sys.argv[1:], int(os.environ["SLURM_CPUS_ON_NODE"]))
    except (Refused, KeyError) as e:
        say(f"refused: {e!r}")
        sys.exit(2)
    task = subprocess.Popen(command, env=os.environ | {"SLURMD_NODENAME": node})
    signal.signal(signal.SIGTERM, lambda *_: task.terminate())
    sys.exit(task.wait())


def ray() -> None:
    """Says what it is asked, with which variables, and when it ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    node, token = os.environ["SLURMD_NODENAME"], Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    name, _, wanted = REAPER.partition("=")
    cleanup = "kills orphans" if os.environ.get(name) == wanted else "leaves orphans"
    say(" ".join([node, "ray", *sys.argv[1:], os.environ["RAY_AUTH_MODE"], token, cleanup]))
    signal.sigwait([signal.SIGTERM])
    say(f"{node} stopped")


SCRIPTS = {
    name: f"#!{sys.executable}\nfrom {__name__} import {name}\n\n{name}()\n"
    for name in ("srun", "ray")
} | {
    "scontrol": f"""#!/bin/bash
[ "$*" = "show hostnames [{",".join(NODES)}]" ] && printf "%s\\n" {" ".join(NODES)}
""",
    "python": """#!/bin/bash
case "$1$2" in
-masync_opd)
  echo "$@" >>"$SAID"
  trap 'echo saved >>"$SAID"; exit 130' TERM
  while sleep 0.05; do [ -e "$SAID.end" ] && exit 7; done ;;
*get_node_ip_address*) echo 10.0.0.1 ;;
-c*) echo -n secret ;;
esac
""",
}
