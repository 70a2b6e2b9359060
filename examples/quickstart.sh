#!/usr/bin/env bash
# The whole path on a machine with nothing but Python (>= 3.11), in minutes on 2 cores:
# install, train a hybrid MoE on the Python standard library's own sources with 2 processes, kill it, resume,
# validate against a bigram model, export to Hugging Face format, generate with and without the state cache.
#   bash examples/quickstart.sh [a.b=c ...]        changes to configs/train/quickstart.yaml, e.g. model.mixer.type=mamba2
#   RUN=runs/mine bash examples/quickstart.sh      run folder (default: a new one each time)
set -euo pipefail
cd "$(dirname "$0")/.."
SECONDS=0
say() { printf '\n== %s (%d:%02d)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

config=configs/train/quickstart.yaml
run=${RUN:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}
overrides=("run=$run" "$@")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say "set-up"
bash scripts/setup.sh
source .venv/bin/activate

say "plan"
linear-moe plan "$config" "${overrides[@]}" --world 2

say "data: tokenizer, tokens, and the bigram model to beat"
linear-moe data "$config" "${overrides[@]}" --bigram
mkdir -p "$run"
linear-moe data "$config" "${overrides[@]}" --bigram --json >"$run/data.json"

say "train, 2 processes"
train() { GPUS=2 bash scripts/launch.sh "$config" "${overrides[@]}"; }
train &
job=$!
until compgen -G "$run/checkpoints/step_*/" >/dev/null; do
  kill -0 $job 2>/dev/null || { wait $job; exit 1; }
  sleep 1
done
sleep 3
python - "$run" <<'PYTHON'
import sys

import psutil

mine = [p for p in psutil.process_iter(["cmdline"]) if f"run={sys.argv[1]}" in (p.info["cmdline"] or [])]
for process in sorted(mine, key=lambda p: p.pid):  # torchrun first, which would report the others' end
    process.kill()
PYTHON
wait $job 2>/dev/null || true

say "killed in mid-run (kill -9); the same command again resumes"
train

say "export"
linear-moe export "$run" "$run/export"

say "generate, with the recurrent state and KV cache, and without"
prompt=$'def read(self, path):\n    """'
linear-moe generate "$run/export" --prompt "$prompt" --max-new-tokens 48 --json >"$run/cached.json"
linear-moe generate "$run/export" --prompt "$prompt" --max-new-tokens 48 --json --no-cache >"$run/uncached.json"

say "result"
python - "$run" <<'PYTHON'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
loss = [r["loss"] for r in records if r.get("event") == "validation"][-1]
bigram = json.loads((run / "data.json").read_text())["bigram_loss"]
starts = [r["step"] for r in records if r.get("event") == "start"]
cached, uncached = (json.loads((run / f"{name}.json").read_text())["completions"] for name in ("cached", "uncached"))
print(f"resumed from step {starts[-1]} after kill -9")
print(f"validation loss {loss:.4f} nats/token, bigram model {bigram:.4f}")
print(f"greedy text with state cache {'=' if cached == uncached else '!='} without:\n{cached[0]}")
sys.exit(not (len(starts) == 2 and starts[1] > 0 and loss < bigram and cached == uncached))
PYTHON
printf '\nDone in %d:%02d. Next: linear-moe generate %s --prompt "import os"\n' $((SECONDS / 60)) $((SECONDS % 60)) "$run/export"
