"""Export of a training run as a Hugging Face folder, verified bit for bit by loading the folder again."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linear_moe.checkpoints.reader import load_full_weights, read_info
from linear_moe.checkpoints.run import EMBEDDING, find_checkpoint, is_run
from linear_moe.checks.experts import check_grouped_gemm
from linear_moe.config.load import load_config
from linear_moe.config.schema import Config
from linear_moe.inference.card import model_card
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import DTYPES, spec_of
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.options.errors import ConfigError, one_line

if TYPE_CHECKING:
    from linear_moe.inference.hf import LinearMoEForCausalLM


@dataclass
class LoadedRun:
    """Model of a run at one checkpoint, with the run's configuration."""

    config: Config
    checkpoint: Path
    step: int
    model: LinearMoEForCausalLM


def load_run(run: Path, step: int | None = None, dtype: str | None = None) -> LoadedRun:
    """Loads the model of a run folder on the CPU, without Megatron-Core.

    Args:
        run: the run folder.
        step: step of the checkpoint; None: the latest complete one.
        dtype: "bf16" or "fp32"; None: the dtype in which the model was trained. Parameters declared fp32 stay fp32.

    Raises:
        ConfigError: `run` is no run folder, has no such checkpoint, or its files are damaged or do not fit each other.
    """
    from linear_moe.inference.hf import LinearMoEForCausalLM

    if not is_run(run):
        raise ConfigError("run", str(run), "is not a run folder: it has no config.yaml")
    config = load_config(run / "config.yaml")
    if config.model.moe.experts == "quack":  # the loaded model must also run on devices that quack does not support
        config.model.moe.experts = "auto"
    check_dtype(config.model, dtype)
    checkpoint = find_checkpoint(run, step)
    weights = load_full_weights(checkpoint, fp32=dtype == "fp32")
    hf_config = _hf_config(config, run / "tokenizer", weights)
    with torch.device("meta"):
        model = LinearMoEForCausalLM(hf_config)
    kind = DTYPES[dtype or config.training.dtype]
    for name, parameter in model.model.named_parameters():
        if name in weights:
            weights[name] = weights[name].to(torch.float32 if spec_of(parameter).fp32 else kind)
    try:
        model.model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        constraint = f"does not fit {run / 'config.yaml'}: {one_line(error)}"
        raise ConfigError("checkpoint", str(checkpoint), constraint) from None
    model.generation_config = _generation_config(model)
    return LoadedRun(config, checkpoint, read_info(checkpoint)["step"], model.eval())


def load_run_tokenizer(folder: Path) -> Any:
    """Loads the fast tokenizer of a folder; raises ConfigError if the folder has none, or it cannot be loaded."""
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError("tokenizer", str(folder), f"has no {name}")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ConfigError("tokenizer", str(folder), f"cannot be loaded: {one_line(error)}") from error


def check_dtype(model: ModelConfig, dtype: str | None) -> None:
    """Raises ConfigError if the experts of `model` cannot compute in `dtype`, the argument of --dtype."""
    if dtype is None or model.moe.experts == "sequential" or all(layer.ffn != "moe" for layer in resolve_layers(model)):
        return
    try:
        check_grouped_gemm(model, dtype)
    except ConfigError as error:
        constraint = f"{error.path} {error.value} {error.constraint}"
        raise ConfigError("--dtype", dtype, constraint, fix="leave it out") from None


def _hf_config(config: Config, tokenizer_folder: Path, weights: dict[str, Tensor]) -> Any:
    """Makes the LinearMoEConfig of a run; a run on random tokens has no tokenizer, and the config then no token ids."""
    from linear_moe.inference.hf import LinearMoEConfig

    if EMBEDDING not in weights:
        raise ConfigError("checkpoint", ..., f"holds no {EMBEDDING}: not one of a Linear-MoE model")
    ids: dict[str, Any] = {}
    if (tokenizer_folder / "tokenizer_config.json").is_file():
        tokenizer = load_run_tokenizer(tokenizer_folder)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        ids["pad_token_id"] = ids["eos_token_id"] if ids["pad_token_id"] is None else ids["pad_token_id"]
        ids["tokenizer_size"] = max(tokenizer.get_vocab().values()) + 1  # a vocabulary may have holes
    return LinearMoEConfig(model=dataclasses.asdict(config.model), vocab_size=len(weights[EMBEDDING]), **ids)


def _generation_config(model: LinearMoEForCausalLM) -> Any:
    """Makes the GenerationConfig: greedy decoding that never chooses a padding row of the vocabulary."""
    from transformers import GenerationConfig

    config = model.config
    unused = [] if config.tokenizer_size is None else list(range(config.tokenizer_size, config.vocab_size))
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**ids, suppress_tokens=unused or None)


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    say: Callable[[str], Any] = lambda text: None,
) -> dict[str, Any]:
    """Writes the folder `out`: config, safetensors, tokenizer and model card.

    The folder is written and verified under a temporary name, so that `out` appears complete or not at all.

    Args:
        run: the run folder.
        out: the folder to write.
        step, dtype: see `load_run`.
        overwrite: replace `out` if it exists.
        max_shard_size: largest size of a file of weights, for example "5GB".
        say: called with messages about the progress.

    Returns:
        The record that `--json` prints: out, checkpoint, step, dtype, parameters, tensors, bytes.

    Raises:
        ConfigError: `out` exists, or cannot be written, or the run cannot be loaded (see `load_run`).
    """
    if out.exists() and not (overwrite or (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError("out", str(out), "exists", fix="give --overwrite to replace it")
    loaded = load_run(run, step, dtype)
    state = loaded.model.state_dict()
    size = sum(t.nbytes for t in state.values())
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    say(f"step {loaded.step} of {run}: {len(state)} tensors, {size / 2**20:,.1f} MiB")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(temporary)
        if disk.total and disk.free < size * 1.01 + 2**24:  # total is 0 on network file systems that do not tell
            raise OSError(errno.ENOSPC, f"{size:,} bytes to write, {disk.free:,} free")
        loaded.model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if (run / "tokenizer").is_dir():
            shutil.copytree(run / "tokenizer", temporary, dirs_exist_ok=True)
        card = model_card(loaded.config, run, loaded.step, loaded.model)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in temporary.iterdir():  # safetensors makes files that only their owner can read
            path.chmod((temporary / "config.json").stat().st_mode)
        say("verifying")
        verify_export(temporary, state)
        _replace(temporary, out)
    except Exception as error:  # for a full disk, safetensors raises an exception of its own instead of OSError
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            reason = "no space left on the disk"
        elif isinstance(error, OSError):
            reason = f"{error.strerror}: {error.filename}"
        else:
            raise
        raise ConfigError("out", str(out), f"cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "out": str(out),
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.step,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "parameters": sum(t.numel() for t in state.values()),
        "tensors": len(state),
        "bytes": size,
    }


def verify_export(folder: Path, expected: dict[str, Tensor]) -> None:
    """Loads `folder` as a user would; AssertionError unless its tensors equal `expected` in dtype and every bit."""
    from transformers import AutoModelForCausalLM

    import linear_moe.inference.hf  # noqa: F401  registers the classes

    actual = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    for name, tensor in expected.items():
        same = actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (actual[name], tensor)]
        assert same and torch.equal(*bits), f"{name} changed on the way to disk and back"


def _replace(temporary: Path, out: Path) -> None:
    """Moves the finished folder `temporary` to `out`, and deletes a file or folder that was at `out` before."""
    if not out.exists():
        os.rename(temporary, out)
        return
    old = temporary.with_suffix(".old")
    os.rename(out, old)
    os.rename(temporary, out)
    shutil.rmtree(old) if old.is_dir() else old.unlink()
