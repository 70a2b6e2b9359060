"""Search for checkpoints in a run folder."""

from __future__ import annotations

from pathlib import Path

from linear_moe.checkpoints.reader import (
    INFO,
    LATEST,
    complete_checkpoints,
    damaged,
    latest_checkpoint,
    read_info,
    step_name,
)
from linear_moe.options.errors import ConfigError

EMBEDDING = "embedding.weight"


def is_run(path: Path) -> bool:
    """Whether `path` looks like a run folder."""
    return (path / "config.yaml").is_file()


def find_checkpoint(place: Path, step: int | None = None) -> Path:
    """Finds the step folder that a user means by `place`: that folder itself, or one of the run folder `place`.

    Of a run, the folder of `step` is returned (None: of the latest checkpoint). Raises ConfigError if there is no such
    checkpoint, or if it is incomplete; the message names the file that is missing or short.
    """
    if not place.is_dir():
        raise ConfigError("checkpoint", str(place), "is no folder", fix="give a run folder or RUN/checkpoints/step_...")
    if not is_run(place) and ((place / INFO).exists() or place.name.lstrip(".").startswith("step_")):
        if step is not None:
            raise ConfigError("--step", step, f"{place} is one step", fix="leave it out")
        check_complete(place)
        return place
    checkpoints = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    if step is not None:
        return _find_step(checkpoints, step)
    latest = latest_checkpoint(checkpoints)
    if latest is None:
        for folder in sorted(checkpoints.glob("step_*")):
            check_complete(folder)
        if is_run(place):
            raise ConfigError("run", str(place), "has no complete checkpoint yet")
        raise ConfigError("checkpoint", str(place), "is neither a run folder with a checkpoint nor a checkpoint")
    return latest


def _find_step(checkpoints: Path, step: int) -> Path:
    complete = {int(folder.name.removeprefix("step_")): folder for folder in complete_checkpoints(checkpoints)}
    if step in complete:
        return complete[step]
    constraint = f"{checkpoints} has no such checkpoint"
    if (checkpoints / step_name(step)).is_dir():
        try:
            check_complete(checkpoints / step_name(step))
        except ConfigError as error:
            constraint = f"{error.path} {error.constraint}"
    raise ConfigError("--step", step, constraint, fix=f"complete are: {', '.join(map(str, complete)) or 'none'}")


def check_complete(folder: Path) -> None:
    """Raises ConfigError for the first file that is missing, or does not have the size recorded when it was saved."""
    if folder.name.startswith("."):
        raise ConfigError(
            "checkpoint", str(folder), "was left behind by a save that did not end", fix=f"rm -r {folder}"
        )
    for name, size in read_info(folder)["files"].items():
        try:
            present = (folder / name).stat().st_size
        except OSError as error:
            raise damaged(folder / name, f"is missing: {error.strerror}") from None
        if present != size:
            raise damaged(folder / name, f"is incomplete: {present:,} of {size:,} bytes")


def check_no_checkpoints(argument: str, run: Path) -> None:
    """Raises ConfigError if the run folder that `argument` names has checkpoints already."""
    if (run / "checkpoints" / LATEST).exists() or complete_checkpoints(run / "checkpoints"):
        raise ConfigError(argument, str(run), "has checkpoints already", fix="choose another run folder")
