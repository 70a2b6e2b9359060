"""Model card: the README.md of an exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from linear_moe.config.schema import Config

if TYPE_CHECKING:
    from linear_moe.inference.hf import LinearMoEForCausalLM

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [linear-moe, {tags}]
---
# {name}

A language model with linear sequence modelling and mixture of experts, trained with Linear-MoE: {parameters:,}
parameters, {layers} layers ({pattern}), exported from step {step} of {steps}.

```python
import linear_moe.inference.hf  # registers the classes; or trust_remote_code=True below
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("import os", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

## Training
| | |
|---|---|
{figures}

Configuration:
```yaml
{config}```
"""


def model_card(config: Config, run: Path, step: int, model: LinearMoEForCausalLM) -> str:
    """Writes the model card in Markdown: the run's configuration, and its losses at `step` from metrics.jsonl."""
    figures = {
        "tokens": f"{step * config.training.global_batch * config.training.sequence_length:,}",
        "corpus": config.data.corpus,
        "sequence length": config.training.sequence_length,
        "batch": f"{config.training.global_batch} sequences",
        "precision": config.training.dtype,
        **last_losses(run / "metrics.jsonl", step),
    }
    tree = config.to_dict()
    sections = {name: tree[name] for name in ("model", "data", "optimizer", "schedule", "training")}
    mixers = dict.fromkeys(layer.mixer.config.type for layer in model.model.numbered_layers().values())
    return CARD.format(
        name=run.name,
        tags=", ".join(mixers),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.model.num_layers,
        pattern=config.model.pattern,
        step=step,
        steps=config.training.steps,
        figures="\n".join(f"| {name} | {value} |" for name, value in figures.items()),
        config=yaml.safe_dump(sections, sort_keys=False),
    )


def last_losses(metrics: Path, step: int) -> dict[str, Any]:
    """Returns the last training and validation loss that the file `metrics` records up to `step`, as texts by name."""
    losses: dict[str, Any] = {}
    if not metrics.is_file():
        return losses
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed may have written only a part of its last line
        if "loss" in record and record.get("step", step + 1) <= step:
            if record.get("event") == "validation":
                losses["validation loss"] = f"{record['loss']:.4f} nats/token (step {record['step']})"
            elif "event" not in record:
                losses["training loss"] = f"{record['loss']:.4f} nats/token (step {record['step']})"
    return losses
