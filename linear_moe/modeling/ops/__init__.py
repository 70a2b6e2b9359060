"""Recurrence mathematics: pure functions, no parameters, no collectives; imports nothing else of this package.

One folder per family of recurrences. Each holds `reference` (token by token, fp32: the definition), `chunk` (PyTorch,
any device), `gpu` (flash-linear-attention) and `step` (one token, in place, for decoding).
"""
