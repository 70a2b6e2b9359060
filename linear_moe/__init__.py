"""Linear-MoE: linear sequence modelling x mixture of experts, from pretraining to serving."""

__version__ = "0.1.0"
