"""Output of a run's numbers, on rank 0: progress display, metrics.jsonl and TensorBoard, from the same records."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

if TYPE_CHECKING:
    from linear_moe.training.experts.routing import LayerRouting

SHOWN = {  # key of a record -> format in the progress display
    "loss": "loss {:.4f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "tflops_per_device": "{:.3g} TFLOP/s",
    "learning_rate": "lr {:.2e}",
    "gradient_norm": "gnorm {:.2f}",
}


def duration(seconds: float) -> str:
    """Formats seconds as 1:02:03 or 2:03."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def progress_line(record: dict[str, Any]) -> str:
    """The figures of a step's record that are in SHOWN, and the time left, as one line."""
    parts = [form.format(record[key]) for key, form in SHOWN.items() if key in record]
    if "seconds_left" in record:
        parts.append(f"{duration(record['seconds_left'])} left")
    return "  ".join(parts)


def routing_line(record: dict[str, Any]) -> str:
    """The routing figures of a step's record as one line; "" for a model without experts."""
    if "max_load" not in record:
        return ""
    return (
        f"experts: max/mean load {record['max_load']:.2f} (layer {record['max_load_layer']})  "
        f"entropy {record['load_entropy']:.3f}  dropped {record['dropped_fraction']:.2%}  "
        f"dead {record['dead_experts']}"
    )


def some(items: Sequence[object], most: int, separator: str = ", ") -> str:
    """Joins the first `most` items, and says how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(map(str, items[:most])) + rest


class Logger:
    """Writes a run's records on rank 0; on the other ranks every method does nothing.

    Args:
        run: the run folder.
        steps: number of steps of the whole run, for the progress display.
        active: whether this is rank 0.
        tensorboard: whether to write TensorBoard events too.
        step: last step before this start of the run, 0 for a new run; TensorBoard events after it are dropped.
    """

    def __init__(self, run: Path, steps: int, *, active: bool, tensorboard: bool, step: int = 0):
        self.active = active
        self._dead = 0  # number of dead experts at the last warning
        self._file: TextIO | None = None
        self._writer: Any = None
        self._bar: Progress | None = None
        self._last_line = 0.0
        if not active:
            return
        run.mkdir(parents=True, exist_ok=True)
        self._file = (run / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        if sys.stderr.isatty():
            whole = Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)
            rest = Column(ratio=1)  # takes the rest of the width, and wraps in a narrow terminal
            columns = (
                MofNCompleteColumn(table_column=whole),
                BarColumn(bar_width=10, table_column=Column(min_width=10)),
                TextColumn("{task.fields[figures]}", table_column=rest),
            )
            self._bar = Progress(*columns, console=self.console, expand=True)
            self._task = self._bar.add_task("train", total=steps, completed=step, figures="")
            self._bar.start()
        self.steps = steps

    def message(self, text: str) -> None:
        """Prints a line for the user on stderr."""
        if self.active:
            self.console.print(text, markup=False)

    def event(self, name: str, **fields: Any) -> None:
        """Writes an event (start, checkpoint, validation, stopped, ...) with its time to metrics.jsonl."""
        self._write({"event": name, "time": time.time(), **fields})

    def step(self, record: dict[str, Any]) -> None:
        """Writes and displays the figures of one training step; `record["step"]` counts from 1."""
        if not self.active:
            return
        self._write(record)
        self._scalars("train", record)
        if self._bar is not None:
            figures = "\n".join(filter(None, [progress_line(record), routing_line(record)]))
            self._bar.update(self._task, completed=record["step"], figures=figures)
        elif time.monotonic() - self._last_line > 5 or record["step"] == self.steps:
            # Without a terminal there is no bar: a line is printed at most every 5 seconds, and for the last step.
            self._last_line = time.monotonic()
            self.message(f"step {record['step']}/{self.steps}  {progress_line(record)}")
            if line := routing_line(record):
                self.message(f"  {line}")

    def routing(self, step: int, layers: list[LayerRouting]) -> None:
        """Writes the routing of every MoE layer, expert by expert, to metrics.jsonl and TensorBoard."""
        if not self.active or not layers:
            return
        self.event("routing", step=step, layers={str(layer.layer): layer.to_json() for layer in layers})
        if self._writer is None:
            return
        for layer in layers:
            for name in ("max_load", "entropy", "dropped"):
                self._writer.add_scalar(f"routing_{name}/layer_{layer.layer}", getattr(layer, name), step)
            self._writer.add_histogram(f"routing_load/layer_{layer.layer}", np.array(layer.load), step)
            if layer.bias is not None:
                self._writer.add_histogram(f"routing_bias/layer_{layer.layer}", np.array(layer.bias), step)

    def dead_experts(self, step: int, layers: list[LayerRouting], dead_after: int) -> None:
        """Warns of experts that no token has chosen in the last `dead_after` steps.

        The warning comes again when twice as many experts are dead. It names a few of them; metrics.jsonl has all.
        """
        dead = {layer.layer: layer.dead(dead_after) for layer in layers}
        number = sum(map(len, dead.values()))
        if not self.active or number < max(1, 2 * self._dead):
            return
        self._dead = number
        self.event(
            "dead_experts", step=step, layers={str(layer): experts for layer, experts in dead.items() if experts}
        )
        where = some([f"layer {layer}: {some(experts, 6)}" for layer, experts in dead.items() if experts], 3, "; ")
        fix = "set model.moe.expert_bias, or raise model.moe.aux_loss"
        if any(layer.bias is not None for layer in layers):
            fix = "raise model.moe.bias_update_rate"
        self.message(
            f"warning: step {step}: {number} of {sum(len(layer.load) for layer in layers)} experts are dead, chosen by "
            f"no token in the last {dead_after} steps ({where}); {fix}"
        )

    def validation(self, step: int, loss: float, tokens: int) -> None:
        """Writes a validation's mean loss, in nats per token, over `tokens` tokens."""
        self.event("validation", step=step, loss=loss, tokens=tokens)
        self._scalars("validation", {"step": step, "loss": loss})
        self.message(f"step {step}: validation loss {loss:.4f} over {tokens:,} tokens")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")

    def _scalars(self, group: str, record: dict[str, Any]) -> None:
        if self._writer is not None:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{group}/{key}", value, record["step"])
