"""Choice of the optimizer that updates a parameter, and the names of its state tensors."""

from __future__ import annotations

from linear_moe.modeling.host import ParameterSpec


def orthogonalized(spec: ParameterSpec) -> bool:
    """Whether Muon may update a parameter: a linear map with more than one row and column. AdamW updates all others."""
    return spec.matrices is not None and min(spec.shape[-2:]) > 1


def state_names(spec: ParameterSpec, optimizer: str) -> tuple[str, ...]:
    """Names of the tensors that the optimizer `optimizer.type` keeps for a parameter."""
    return ("momentum",) if optimizer == "muon" and orthogonalized(spec) else ("exp_avg", "exp_avg_sq")
