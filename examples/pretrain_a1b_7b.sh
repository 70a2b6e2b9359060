#!/usr/bin/env bash
# Pretrain A1B-7B as in the paper (GLA with softmax attention in every fourth layer, 64 experts, top-8).
#   data.corpus is yours to give: text files, .jsonl, or the prefix of an indexed dataset.
#   GPUS=8 bash examples/pretrain_a1b_7b.sh data.corpus=/data/slimpajama data.tokenizer.path=/data/qwen2-tokenizer
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 GPUS=8 bash examples/pretrain_a1b_7b.sh ... parallel.expert=8
# Any field of the configuration can be changed the same way: model.mixer.type=mamba2 training.micro_batch=4
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/linear-moe ] && source .venv/bin/activate
exec bash scripts/launch.sh configs/train/a1b_7b.yaml "$@"
