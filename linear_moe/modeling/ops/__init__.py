"""Mathematics of the model's parts: pure functions, no parameters, no collectives; imports nothing else of ours.

`recurrences/` has one folder per family. Each holds `reference` (token by token, fp32: the definition), `chunk`
(PyTorch, any device), `fla` or `triton` (kernels of flash-linear-attention, or ours), `decode` (one token, in place)
and `summary` (what a piece of a sequence does to the state). `attention/` is softmax attention, `fused/` what stands
around recurrences, `experts/` the routed experts.
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
"""The module, below this package, of the operation that a family of mixers runs."""
