#!/usr/bin/env bash
# Pretrain a DeepSeek: latent attention (MLA), fine-grained and shared experts.
#   MODEL: deepseek_v2_lite, deepseek_v2, deepseek_small (one GPU); in configs/models.
#   data.corpus is yours to give: text files, .jsonl, or the prefix of an indexed dataset.
#   GPUS=8 bash examples/pretrain_deepseek_v2.sh data.corpus=/data/text data.tokenizer.path=/data/tokenizer
#   MODEL=deepseek_v2 NNODES=64 NODE_RANK=0 MASTER_ADDR=node0 GPUS=8 bash examples/pretrain_deepseek_v2.sh ...
# Published models are softmax attention throughout; linear or hybrid, with any mixer, by overrides:
#   model.pattern='LLLN * 6 + LLN' model.mixer.type=kda
# What fits: linear-moe plan configs/models/$MODEL.yaml --world N
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/linear-moe ] && source .venv/bin/activate
model=${MODEL:-deepseek_v2_lite}
exec bash scripts/launch.sh "configs/models/$model.yaml" run="runs/$model" data.tokenizer.type=hf \
  optimizer.lr=2.4e-4 schedule.min_lr=2.4e-5 schedule.warmup_steps=2000 training.steps=100000 checkpoint.every=1000 "$@"
