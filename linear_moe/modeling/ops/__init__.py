"""Mathematics of the model's parts: pure functions without parameters or collectives.

The package imports nothing else of `linear_moe`. `recurrences/` has one folder per family, which holds `reference`
(the definition, token by token in fp32), `chunk` (PyTorch on any device), `fla` or `triton` (kernels of
flash-linear-attention, or our own), `decode` (one token, in place) and `summary` (the transition and the state that a
piece of a sequence contributes). `attention/` has softmax attention, `fused/` the operations around recurrences,
`experts/` the routed experts.
"""

FAMILIES = {
    "complex_decay": "recurrences.complex_decay",
    "decay": "recurrences.decay",
    "delta": "recurrences.delta",
    "dplr": "recurrences.dplr",
    "fast_weights": "recurrences.fast_weights",
    "scan": "recurrences.scan",
    "softmax": "attention.softmax",
}
"""Families of mixers, each with the module (relative to this package) of the operation that its mixers run."""
