"""`linear-moe import`: begins a run with the weights of another run, or of an exported model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from linear_moe.checkpoints.run import EMBEDDING, check_no_checkpoints
from linear_moe.checkpoints.weights import WeightSource, open_weights
from linear_moe.config.load import save_config
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.host import DTYPES, Host, ParameterSpec, spec_of
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.modeling.upcycle import DENSE, Upcycler, granularity, is_exact
from linear_moe.options.errors import ConfigError
from linear_moe.training import platform
from linear_moe.training.supervision.faults import lock_run

Parameters = dict[str, nn.Parameter]


def import_weights(source: Path, config: Config, *, upcycle: bool = False, step: int | None = None) -> dict[str, Any]:
    """Writes the first checkpoint of `config.run` with the weights of `source`, and the run's config and tokenizer.

    The optimizer's state, the random states and the position in the data are those of a new run.

    Args:
        source: a run folder, or a folder that `linear-moe export` wrote.
        config: validated configuration of the run to begin.
        upcycle: whether to make experts of the dense FFN of `source` in layers that have experts in `config`.
        step: step of the source's checkpoint; None: its latest complete one.

    Returns:
        the object that `--json` prints: run, checkpoint, source, upcycled (layers), granularity, exact, parameters,
        bytes.

    Raises:
        ConfigError: the models differ (with `upcycle`: in more than the experts), the run has begun already, or the
            disk is full.
    """
    platform.install()
    from linear_moe.training.checkpointing.initial import save_initial
    from linear_moe.training.checkpointing.save import dtype_name
    from linear_moe.training.data.tokenizer import copy_tokenizer

    run = Path(config.run)
    check_no_checkpoints("run", run)
    weights = open_weights(source, step)
    layers = _upcycled_layers(config, weights, upcycle)
    parts = granularity(config.model.moe, weights.model.ffn_size) if layers else None
    host = Host(DTYPES[config.training.dtype], "meta")
    parameters = dict(LanguageModel(config.model, _embedding_rows(config, weights), host).named_parameters())
    _check_parameters(weights, parameters, layers)
    upcycler = Upcycler(config.model, parts, config.training.seed, weights.read) if parts else None
    imported = {
        "source": str(weights.place),
        "upcycled": layers,
        "granularity": parts,
        "exact": not layers or is_exact(config.model.moe),
    }
    with lock_run(run):
        if weights.tokenizer is not None:
            copy_tokenizer(weights.tokenizer, run / "tokenizer", f"that of {source}")
        save_config(config, run / "config.yaml")
        dtypes = {name: dtype_name(p) for name, p in parameters.items()}
        folder = save_initial(config, _pieces(weights, parameters, layers, upcycler), dtypes, imported)
    count = sum(p.numel() for p in parameters.values())
    size = sum(f.stat().st_size for f in folder.iterdir())
    return {"run": config.run, "checkpoint": str(folder), **imported, "parameters": count, "bytes": size}


def _upcycled_layers(config: Config, weights: WeightSource, upcycle: bool) -> list[int]:
    """Indices of the layers whose dense FFN becomes experts. ConfigError if the models differ in anything else."""
    from linear_moe.training.checkpointing.load import model_difference

    difference = model_difference(config.model, weights.model, upcycle=upcycle)
    if difference is not None:
        path, here, there = difference
        experts = not upcycle and (here, there) == ("moe", "dense")
        fix = "give --upcycle to make experts of the dense FFN" if experts else f"set {path} to the source's value"
        raise ConfigError(path, here, f"{weights.place} has {there!r}", fix=fix)
    pairs = enumerate(zip(resolve_layers(config.model), resolve_layers(weights.model), strict=True))
    layers = [i for i, (here, there) in pairs if here.ffn != there.ffn]
    if upcycle and not layers:
        constraint = f"no layer that is dense in {weights.place} has experts in the config"
        raise ConfigError("--upcycle", ..., constraint, fix="set model.ffn=moe, or leave --upcycle out")
    return layers


def _embedding_rows(config: Config, weights: WeightSource) -> int:
    """Number of rows of the source's embedding. ConfigError if the config gives another number.

    The vocabulary size of a `bpe` tokenizer is known only once it has been trained, so it is not compared here.
    """
    rows = weights.shapes.get(EMBEDDING, (0,))[0]
    grown = config.model.vocab_size is None and config.data.tokenizer.type == "bpe"
    if not grown and rows and vocab_size(config) != rows:
        constraint = f"{weights.place} has an embedding of {rows} rows"
        value = config.model.vocab_size or vocab_size(config)
        raise ConfigError("model.vocab_size", value, constraint, fix=f"set model.vocab_size={rows}")
    return rows


def _check_parameters(weights: WeightSource, parameters: Parameters, layers: list[int]) -> None:
    """Raises ConfigError if a parameter of the source is missing, unexpected or of another shape."""
    from linear_moe.training.checkpointing.load import check_shapes

    expected = {name: _spec(p).shape for name, p in parameters.items() if _upcycled(name, layers) is None}
    hidden, ffn = weights.model.hidden_size, weights.model.ffn_size
    for i in layers:
        for name in DENSE:
            expected[f"layers.{i}.ffn.{name}.weight"] = (hidden, ffn) if name == "down_proj" else (ffn, hidden)
    check_shapes(
        str(weights.place), expected, weights.shapes, fix="give another source, or configure the source's model"
    )


def _pieces(weights: WeightSource, parameters: Parameters, layers: list[int], upcycler: Upcycler | None) -> list[Any]:
    """The pieces of every parameter. Each expert is a piece of its own, so that a rank reads only its own experts."""
    from linear_moe.training.checkpointing.initial import TensorPiece

    pieces = []
    for name, parameter in parameters.items():
        spec = _spec(parameter)
        part = _upcycled(name, layers)
        none = (0,) * len(spec.shape)
        if part is None:
            pieces.append(TensorPiece(name, spec.shape, none, spec.shape, partial(weights.read, name)))
            continue
        assert upcycler is not None
        if not spec.by_expert:
            pieces.append(TensorPiece(name, spec.shape, none, spec.shape, partial(upcycler.value, *part, spec)))
            continue
        for i in range(spec.shape[0]):
            value = partial(_one_expert, upcycler, *part, spec, i)
            pieces.append(TensorPiece(name, spec.shape, (i, *none[1:]), (1, *spec.shape[1:]), value))
    return pieces


def _one_expert(upcycler: Upcycler, prefix: str, name: str, spec: ParameterSpec, i: int) -> Any:
    return upcycler.value(prefix, name, spec, i).unsqueeze(0)


def _upcycled(name: str, layers: list[int]) -> tuple[str, str] | None:
    """Prefix of the layer, and name in its FFN, of a parameter that is made by upcycling; None: it is copied."""
    words = name.split(".", 3)
    if words[0] != "layers" or words[2] != "ffn" or int(words[1]) not in layers:
        return None
    return f"layers.{words[1]}.", words[3]


def _spec(parameter: nn.Parameter) -> ParameterSpec:
    return spec_of(parameter)
