#!/bin/bash
# A run on @{nodes} node(s) of @{gpus} GPU(s) by Slurm: a Ray cluster of its own, with a token, gone when the run has ended.
# Rendered by: @{command}
#
#   sbatch FILE                                       # from the folder where that command was typed, on a shared disk
#   scancel --batch --signal=TERM JOBID               # ends it with a checkpoint; without --batch, without one
#
# Activate the environment that has async-opd before sbatch, which passes it on, or put that in this file. The job has all
# cores and all memory of its nodes, and their limits rather than those of the shell that calls sbatch. A site that wants
# --account, --partition or --time gets them on the command line of sbatch, or in SBATCH_ACCOUNT and the like.
# RDMA: NCCL finds it by itself, and needs no bound on locked memory. `NET/IB` or `NET/Socket` in the logs says what it uses. # --rdma
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=@{gpus}
#SBATCH --mincpus=@{cpus}
#SBATCH --mem=0
#SBATCH --propagate=NONE
#SBATCH --signal=B:TERM@@@{ahead_s}
#SBATCH --output=%x-%j.log
set -euo pipefail

ulimit -n "$(ulimit -Hn)"
if [ "$(ulimit -Hl)" != unlimited ]; then # --rdma
  echo "--rdma: $(ulimit -Hl) KiB of memory may be locked here: slurmd needs LimitMEMLOCK=infinity" >&2 # --rdma
  exit 1 # --rdma
fi # --rdma
ulimit -l unlimited # --rdma
umask 077
mkdir -p @{runs_quoted}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=@{runs_quoted}/.ray-token-"$SLURM_JOB_ID"
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"
steps=()
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; kill "${steps[@@]}" 2>/dev/null || true' EXIT
export @{reaper}
export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET # --rdma

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # this script runs on the first of them
ip=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
export RAY_ADDRESS="$ip:6379"
# A step has one core where it does not ask for more, and is bound to those of its task. --exclusive made all of them ours.
on_node=(--nodes=1 --ntasks=1 --overlap --cpus-per-task="${SLURM_CPUS_ON_NODE:-$SLURM_CPUS_PER_TASK}" --cpu-bind=none)
srun "${on_node[@@]}" --nodelist="${nodes[0]}" \
  ray start --head --block --node-ip-address="$ip" --port=6379 --dashboard-host=127.0.0.1 &
steps+=($!)
for node in "${nodes[@@]:1}"; do
  srun "${on_node[@@]}" --nodelist="$node" ray start --address="$RAY_ADDRESS" --block &
  steps+=($!)
done
python - <<'PYTHON'
import sys, time
import ray

deadline = time.monotonic() + 300
while True:
    try:
        ray.init(logging_level="ERROR")
        break
    except ConnectionError:
        if time.monotonic() > deadline:
            sys.exit("no Ray head answers within 300 s")
        time.sleep(2)
while (alive := sum(node["Alive"] for node in ray.nodes())) < @{nodes}:
    if time.monotonic() > deadline:
        sys.exit(f"{alive} of @{nodes} nodes have joined within 300 s")
    time.sleep(2)
PYTHON

python -m async_opd train @{config_path} @{overrides} &
run=$!
trap 'kill -TERM "$run"' TERM # of which the run makes a checkpoint
status=0
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do # the signal ended the first wait, not the run
  status=0
  wait "$run" || status=$?
done
exit "$status"
