"""Search for checkpoints in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linear_moe.checkpoints.reader import complete_checkpoints, latest_checkpoint, read_info
from linear_moe.options.errors import ConfigError

if TYPE_CHECKING:
    pass


EMBEDDING = "embedding.weight"


def is_run(path: Path) -> bool:
    """Whether `path` looks like a run folder."""
    return (path / "config.yaml").is_file()


def find_checkpoint(run: Path, step: int | None) -> Path:
    """Returns the complete checkpoint of `step` (None: the latest one); raises ConfigError if there is none."""
    folder = run / "checkpoints"
    if step is None:
        if (latest := latest_checkpoint(folder)) is None:
            raise ConfigError("run", str(run), "has no complete checkpoint yet")
        return latest
    complete = {read_info(path)["step"]: path for path in complete_checkpoints(folder)}
    if step not in complete:
        steps = ", ".join(map(str, complete)) or "none"
        raise ConfigError("--step", step, f"no complete checkpoint of this step in {run}", fix=f"complete are: {steps}")
    return complete[step]
