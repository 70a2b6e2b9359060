#!/usr/bin/env bash
# Checks a run, then launches it with torchrun:  scripts/launch.sh CONFIG [a.b=c ...]
# Environment: GPUS (processes on this node; default: its GPUs, or 1), NNODES (1), NODE_RANK (0),
# MASTER_ADDR (localhost), MASTER_PORT (29500). Run it once on every node; a rerun resumes from the last checkpoint.
set -euo pipefail
[ $# -ge 1 ] && [ "$1" != --help ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
config=$1
shift

gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)}
[ "${gpus:-0}" -gt 0 ] || gpus=1
nnodes=${NNODES:-1}

# One clear line and exit code 2 for bad input, before any process starts.
linear-moe check "$config" "$@" --world $((gpus * nnodes))

# torchrun hands these on to the processes, which save and end; a scheduler's warning (SIGUSR1) too.
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1

if [ "$nnodes" -eq 1 ]; then
  exec torchrun --standalone --nproc-per-node "$gpus" -m linear_moe train "$config" "$@"
fi
exec torchrun --nnodes "$nnodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$gpus" \
  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
  -m linear_moe train "$config" "$@"
