#!/usr/bin/env bash
# Checks a run, then launches it with torchrun:  scripts/launch.sh CONFIG [a.b=c ...]
# Environment: GPUS (processes on this node; default: its GPUs, or 1), NNODES (1), NODE_RANK (0),
# MASTER_ADDR (localhost), MASTER_PORT (29500). Run it once on every node; a rerun resumes from the last checkpoint.
# If a rank dies, hangs or fails, the last line names the rank.
set -euo pipefail
[ $# -ge 1 ] && [ "$1" != --help ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
config=$1
shift

gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)}
[ "${gpus:-0}" -gt 0 ] || gpus=1
nnodes=${NNODES:-1}

# The check ends with one clear line and exit code 2 for bad input, before any process starts.
linear-moe check "$config" "$@" --world $((gpus * nnodes))

# torchrun passes these signals to the processes, which save and end; SIGUSR1 is a scheduler's warning.
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1

# File in which ranks leave the line about a lost rank, to print it last: torchrun's own report is long and comes after.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export LINEAR_MOE_FAILURE_FILE=$folder/failure

if [ "$nnodes" -eq 1 ]; then
  where=(--standalone)
else
  where=(--nnodes "$nnodes" --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}")
fi
set -m # torchrun gets a process group of its own, so that a Ctrl-C reaches it once, through the trap below
torchrun "${where[@]}" --nproc-per-node "$gpus" -m linear_moe train "$config" "$@" &
job=$!
for name in TERM INT HUP QUIT USR1; do
  trap "kill -$name $job 2>/dev/null || true" "$name"
done
status=0
while true; do # a signal ends `wait`, but not the job: wait again
  if wait "$job"; then status=0; else status=$?; fi
  kill -0 "$job" 2>/dev/null || break
done
[ ! -s "$LINEAR_MOE_FAILURE_FILE" ] || cat "$LINEAR_MOE_FAILURE_FILE" >&2
exit "$status"
