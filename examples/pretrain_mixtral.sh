#!/usr/bin/env bash
# Pretrain a Mixtral: 8 experts, top-2.
#   MODEL: mixtral_8x7b, mixtral_small (one GPU); in configs/models.
#   data.corpus is yours to give: text files, .jsonl, or the prefix of an indexed dataset.
#   GPUS=8 bash examples/pretrain_mixtral.sh data.corpus=/data/text data.tokenizer.path=/data/tokenizer
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 GPUS=8 bash examples/pretrain_mixtral.sh ...
# Published models are softmax attention throughout; linear or hybrid, with any mixer, by overrides:
#   model.pattern='LLLN * 8' model.mixer.type=gated_deltanet
# What fits: linear-moe plan configs/models/$MODEL.yaml --world N
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/linear-moe ] && source .venv/bin/activate
model=${MODEL:-mixtral_8x7b}
exec bash scripts/launch.sh "configs/models/$model.yaml" run="runs/$model" data.tokenizer.type=hf \
  optimizer.lr=3e-4 schedule.min_lr=3e-5 schedule.warmup_steps=2000 training.steps=100000 checkpoint.every=1000 "$@"
