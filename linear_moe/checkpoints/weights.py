"""Reading of weights, one parameter at a time, from a run folder or an exported folder, without Megatron-Core."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linear_moe.checkpoints.reader import MODEL, read_metadata, read_tensors, verify_checkpoint, weight_shapes
from linear_moe.checkpoints.run import find_checkpoint, is_run
from linear_moe.config.load import load_config
from linear_moe.modeling.config import ModelConfig
from linear_moe.options.errors import ConfigError, one_line
from linear_moe.options.load import from_dict

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KEPT = 4  # tensors in the cache of `read`: upcycling makes all experts of a layer from the same three


class WeightSource(ABC):
    """Model on disk, whose parameters are read one at a time.

    Attributes:
        place: the folder with the weights.
        model: the model's configuration.
        tokenizer: folder of the model's tokenizer; None if it has no tokenizer.
    """

    def __init__(self, place: Path, model: ModelConfig, tokenizer: Path):
        self.place, self.model = place, model
        self.tokenizer = tokenizer if (tokenizer / "tokenizer.json").is_file() else None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Unsharded shape of every parameter, by its name in the model; a checkpoint's files are verified first."""
        return self._open()

    def read(self, name: str) -> Tensor:
        """Returns an unsharded parameter in fp32, on the CPU; callers must not change it, because it is cached."""
        assert name in self.shapes, name
        if name not in self._kept:
            self._kept[name] = self._read(name)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[name]

    @abstractmethod
    def _open(self) -> dict[str, tuple[int, ...]]: ...

    @abstractmethod
    def _read(self, name: str) -> Tensor: ...


class RunWeights(WeightSource):
    """Weights of a run's checkpoint: the optimizer's fp32 weights."""

    def __init__(self, run: Path, step: int | None):
        super().__init__(find_checkpoint(run, step), load_config(run / "config.yaml").model, run / "tokenizer")

    def _open(self) -> dict[str, tuple[int, ...]]:
        verify_checkpoint(self.place)
        return weight_shapes(read_metadata(self.place))

    def _read(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=torch.float32)
        read_tensors(self.place, {MODEL + name: tensor})
        return tensor


class ExportedWeights(WeightSource):
    """Weights of a folder that `linear-moe export` wrote; they have been rounded to the exported dtype."""

    def __init__(self, folder: Path):
        config = _json(folder / "config.json")
        kind = config.get("model_type")
        if kind != "linear_moe" or not isinstance(config.get("model"), dict):
            raise ConfigError(str(folder), ..., f"holds a model of type {kind!r}, not one of linear-moe export")
        super().__init__(folder, from_dict(ModelConfig, config["model"]), folder)
        self._files: dict[str, Path] = {}

    def _open(self) -> dict[str, tuple[int, ...]]:
        index = self.place / INDEX
        files = set(_json(index).get("weight_map", {}).values()) if index.is_file() else {SINGLE}
        shapes = {}
        for file in sorted(self.place / name for name in files):
            with _open(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118  not a mapping
                    name = key.removeprefix(MODEL)
                    self._files[name], shapes[name] = file, tuple(tensors.get_slice(key).get_shape())
        return shapes

    def _read(self, name: str) -> Tensor:
        with _open(self._files[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(MODEL + name)
            return tensor.float()


def open_weights(source: Path, step: int | None = None) -> WeightSource:
    """Opens the weights of a run folder (at `step`; None: its latest complete checkpoint) or of an exported folder.

    Raises ConfigError if `source` is neither of the two, or if it is damaged.
    """
    if is_run(source):
        return RunWeights(source, step)
    if not (source / "config.json").is_file():
        constraint = "does not exist" if not source.exists() else "is neither a run folder nor an exported one"
        raise ConfigError(
            "source", str(source), constraint, fix="give the `run` of a training, or the OUT of an export"
        )
    if step is not None:
        raise ConfigError("--step", step, f"{source} is an exported folder, which has no steps", fix="leave it out")
    return ExportedWeights(source)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise ConfigError(str(file), ..., "does not exist") from None
    except SafetensorError as error:
        raise ConfigError(str(file), ..., f"is damaged: {one_line(error)}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(str(file), ..., f"is not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(str(file), ..., "is not a JSON object")
    return tree
