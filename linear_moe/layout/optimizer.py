"""Which optimizer updates a parameter, and the state that it keeps."""

from __future__ import annotations

from linear_moe.modeling.host import ParameterSpec


def orthogonalized(spec: ParameterSpec) -> bool:
    """Whether Muon updates a parameter; AdamW does otherwise, also where a linear map has one row or column."""
    return spec.matrices is not None and min(spec.shape[-2:]) > 1


def state_names(spec: ParameterSpec, optimizer: str) -> tuple[str, ...]:
    """The tensors of a parameter's state under `optimizer.type`."""
    return ("momentum",) if optimizer == "muon" and orthogonalized(spec) else ("exp_avg", "exp_avg_sq")
