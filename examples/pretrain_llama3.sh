#!/usr/bin/env bash
# Pretrain a Llama 3, dense.
#   MODEL: llama3_1b, llama3_8b, llama3_small (one GPU); in configs/models.
#   data.corpus is yours to give: text files, .jsonl, or the prefix of an indexed dataset.
#   GPUS=8 bash examples/pretrain_llama3.sh data.corpus=/data/text data.tokenizer.path=/data/tokenizer
#   MODEL=llama3_8b NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 GPUS=8 bash examples/pretrain_llama3.sh ...
# Published models are softmax attention throughout; linear or hybrid, with any mixer, by overrides:
#   model.pattern='LLLN * 4' model.mixer.type=gla
# What fits: linear-moe plan configs/models/$MODEL.yaml --world N
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/linear-moe ] && source .venv/bin/activate
model=${MODEL:-llama3_1b}
exec bash scripts/launch.sh "configs/models/$model.yaml" run="runs/$model" data.tokenizer.type=hf \
  optimizer.lr=3e-4 schedule.min_lr=3e-5 schedule.warmup_steps=2000 training.steps=100000 checkpoint.every=1000 "$@"
