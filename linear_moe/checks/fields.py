"""Constraints between options of a configuration; checking them needs no file and no process group."""

from __future__ import annotations

from linear_moe.checks.experts import check_ffn
from linear_moe.checks.mixers import check_mixers
from linear_moe.checks.parallel import check_parallel
from linear_moe.checks.training import check_batch, check_recompute, check_schedule
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.processes import parallel_layout
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.options.checks import check_divisible, unused
from linear_moe.options.errors import ConfigError


def validate_fields(config: Config, world: int | None = None) -> None:
    """Raises ConfigError as `validate` does, but reads no files and does not search for a layout that would work."""
    for path, folder in (("run", config.run), ("data.corpus", config.data.corpus), ("data.cache", config.data.cache)):
        if not folder.strip():
            raise ConfigError(path, folder, "must not be empty")
    layers = resolve_layers(config.model)
    check_mixers(config, layers)
    check_ffn(config, layers)
    check_parallel(config, layers)
    _check_vocabulary(config)
    check_schedule(config)
    if config.optimizer.type != "muon":
        unused("optimizer.muon", config.optimizer.muon, *vars(config.optimizer.muon), needs="set optimizer.type=muon")
    check_recompute(config)
    if world is not None:
        check_batch(config, parallel_layout(config, world))


def _check_vocabulary(config: Config) -> None:
    rows, tensor = vocab_size(config), config.parallel.tensor
    if config.model.vocab_size is None:  # a trained tokenizer may come out smaller, and `rows` then be another multiple
        check_divisible("model.vocab_multiple", config.model.vocab_multiple, "parallel.tensor", tensor)
    else:
        check_divisible("model.vocab_size", rows, "parallel.tensor", tensor)
