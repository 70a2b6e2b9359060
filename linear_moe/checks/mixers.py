"""Constraints of every mixer that a model uses."""

from __future__ import annotations

from typing import Any

from linear_moe.config.schema import Config
from linear_moe.layout.sequence import in_pieces
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.pattern import ResolvedLayer, mixer_path
from linear_moe.options.errors import ConfigError


def check_mixers(config: Config, layers: list[ResolvedLayer]) -> None:
    """Raises ConfigError for a mixer whose sizes are invalid, or that does not support a feature in use."""
    first: dict[str, tuple[str, Any]] = {}  # type of mixer -> path and config of the first layer with it
    pieces = f"parallel.sequence{'' if config.parallel.sequence > 1 else '_pieces'} > 1"
    for i, layer in enumerate(layers):
        path, cls = mixer_path(config.model, layer.symbol), mixer_class(layer.mixer.type)
        first_path, first_mixer = first.setdefault(layer.mixer.type, (path, layer.mixer))
        for name in cls.crossing_fields:
            value, expected = getattr(layer.mixer, name), getattr(first_mixer, name)
            if value != expected:
                constraint = f"must be {first_path}.{name} = {expected!r}: these layers pass each other tensors"
                raise ConfigError(f"{path}.{name}", value, constraint)
        cls.validate(layer.mixer, layer_dims(config.model, i), config.parallel.tensor, path)
        for needed, capability, option in (
            (config.parallel.tensor > 1, "tensor_parallel", "parallel.tensor > 1"),
            (config.data.isolate_documents, "packing", "data.isolate_documents"),
            (in_pieces(config.parallel), "sequence_parallel", pieces),
        ):
            if needed and not getattr(cls.capabilities, capability):
                why = f": {cls.limits[capability]}" if capability in cls.limits else ""
                raise ConfigError(f"{path}.type", layer.mixer.type, f"does not support {option}{why}")
