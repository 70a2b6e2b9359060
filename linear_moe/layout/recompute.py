"""Choice of the modules and layers whose activations are recomputed in the backward pass."""

from __future__ import annotations

from linear_moe.config.schema import Config


def recomputed(config: Config) -> tuple[frozenset[str], frozenset[int]]:
    """Returns the modules, as `Activations` names them, and the layers that the backward pass computes again."""
    training, total = config.training, config.model.num_layers
    modules = frozenset(training.recompute_modules) | ({"layer"} if training.recompute == "full" else set())
    number = total if training.recompute_layers is None else training.recompute_layers
    return modules, frozenset(i * total // number for i in range(number))
