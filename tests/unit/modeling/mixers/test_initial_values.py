"""Initial values that the papers and their code give to decays, step sizes and memories."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.mixers.registry import MIXERS
from tests.unit.modeling.mixers.common import build, dims, variants

WIDE = dims(512, 64)  # enough heads to see a distribution


def build_wide(name: str) -> Mixer:
    return build(name, variants(name)[0], at=WIDE)


def named(mixer: Mixer, name: str) -> Tensor:
    """Returns a parameter by name, which must be small, in fp32 and without weight decay."""
    parameter = mixer.get_parameter(name)
    spec = parameter.spec  # type: ignore[attr-defined]
    assert spec.fp32 and not spec.decay
    return parameter.detach()


def having(name: str) -> list[str]:
    return [n for n in sorted(MIXERS) if name in dict(build_wide(n).named_parameters())]


@pytest.mark.parametrize("name", having("dt_bias"))
def test_step_sizes_are_log_uniform(name: str) -> None:
    """The initial softplus(dt_bias) is log-uniform in [0.001, 0.1] (arXiv 2312.00752, section 3.6)."""
    exponent = F.softplus(named(build_wide(name), "dt_bias").double()).log10()
    assert -3 - 1e-3 < exponent.min() < -2.8 and -1.2 < exponent.max() < -1 + 1e-3
    assert abs(float(exponent.mean()) + 2) < 0.25


@pytest.mark.parametrize("name", sorted(set(having("A_log")) - {"mamba"}))
def test_rates_are_uniform(name: str) -> None:
    """The initial A is uniform in [1, 16] (arXiv 2405.21060), in some mixers from 0."""
    rate = named(build_wide(name), "A_log").exp()
    assert 0 < rate.min() < 2.5 and 14.5 < rate.max() < 16 + 1e-4
    assert abs(float(rate.mean()) - 8.5) < 2.5


def test_mamba_begins_as_hugging_faces() -> None:
    from transformers.models.mamba.configuration_mamba import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaModel

    ours = build_wide("mamba")
    config = MambaConfig(hidden_size=512, state_size=4, num_hidden_layers=1, vocab_size=8)
    theirs = MambaModel(config).layers[0].mixer
    torch.testing.assert_close(named(ours, "A_log"), theirs.A_log.detach())
    torch.testing.assert_close(named(ours, "D"), theirs.D.detach())
    assert isinstance(theirs.dt_proj, nn.Linear)
    weights = ours.get_parameter("dt_proj.weight").detach(), theirs.dt_proj.weight.detach()
    assert weights[0].shape == weights[1].shape
    for statistic in (lambda x: x.std(), lambda x: x.max(), lambda x: x.min()):
        torch.testing.assert_close(*map(statistic, weights), rtol=0.05, atol=0.0)


def test_s4s_complex_weights() -> None:
    """C and D are drawn with variance 1, as in the authors' minimal S4D."""
    ours = build_wide("s4")
    assert abs(float(torch.view_as_complex(ours.get_parameter("C").detach()).abs().square().mean()) - 1) < 0.1
    assert abs(float(ours.get_parameter("D").detach().std()) - 1) < 0.15


def test_titans_gates_begin_where_the_config_says() -> None:
    gates = {"theta": "initial_rate", "eta": "initial_momentum", "alpha": "initial_forget"}
    ours = build("titans", {"initial_rate": 0.02, "initial_momentum": 0.7, "initial_forget": 0.05}, at=WIDE)
    for gate, field in gates.items():
        start = named(ours, f"{gate}_bias").sigmoid()
        torch.testing.assert_close(start, torch.full_like(start, getattr(ours.config, field)))
