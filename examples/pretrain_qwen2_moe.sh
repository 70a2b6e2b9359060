#!/usr/bin/env bash
# Pretrain a Qwen2-MoE: 64 experts, top-8, and a gated shared one.
#   MODEL: qwen2_57b_a14b; the paper's a0.3b_2b and a1b_7b have scripts of their own; in configs/models.
#   data.corpus is yours to give: text files, .jsonl, or the prefix of an indexed dataset.
#   GPUS=8 bash examples/pretrain_qwen2_moe.sh data.corpus=/data/text data.tokenizer.path=/data/tokenizer
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 GPUS=8 bash examples/pretrain_qwen2_moe.sh ...
# Published models are softmax attention throughout; linear or hybrid, with any mixer, by overrides:
#   model.pattern='LLLN * 7' model.mixer.type=mamba2
# What fits: linear-moe plan configs/models/$MODEL.yaml --world N
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/linear-moe ] && source .venv/bin/activate
model=${MODEL:-qwen2_57b_a14b}
exec bash scripts/launch.sh "configs/models/$model.yaml" run="runs/$model" data.tokenizer.type=hf \
  optimizer.lr=3e-4 schedule.min_lr=3e-5 schedule.warmup_steps=2000 training.steps=100000 checkpoint.every=1000 "$@"
