"""Text generation: prompts in one chunked pass, then token by token with recurrent states and key-value caches."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linear_moe.inference.cache import prefill
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.errors import ConfigError

if TYPE_CHECKING:  # transformers takes seconds to import
    from linear_moe.inference.hf import LinearMoEForCausalLM


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token.

    Attributes:
        temperature: logits are divided by the temperature; 0: the most likely token is chosen (greedy).
        top_k: number of the most likely tokens to choose among; 0: all.
        top_p: probability of the tokens to choose among, which are as few of the most likely ones as have it together.
        seed: row i of a batch draws from its own generator, seeded with `seed + i`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"temperature and top_k must be >= 0 and top_p in (0, 1]: {self}")


@dataclass
class Generation:
    """Result of `generate`.

    Attributes:
        tokens: new tokens of each row, with the stop token if there was one.
        finish: for each row "stop" (it ended with a stop token) or "length".
        prefill_seconds: duration of the pass over the prompts, and of choosing the first new tokens.
        decode_seconds: duration of all later passes.
        steps: number of later passes.
        state_bytes: bytes of one row's decoding state at the end; 0 without a cache.
    """

    tokens: list[list[int]]
    finish: list[str] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    state_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second over all rows, without each row's first one, which the prefill gives; 0.0 if none."""
        return (sum(map(len, self.tokens)) - len(self.tokens)) / self.decode_seconds if self.steps else 0.0


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Chooses a token for each row of `logits [B, V]`.

    There is one CPU generator per row, so that the choice does not depend on the device or on other rows of the batch.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    values, ids = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    probs = values.softmax(-1)
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0
        probs /= probs.sum(-1, keepdim=True)
    if sampling.top_p < 1:  # a token stays if more likely ones have less than top_p
        probs[probs.cumsum(-1) - probs >= sampling.top_p] = 0
    cumulative = probs.cumsum(-1)
    draw = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
    index = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
    last = (probs > 0).sum(-1, keepdim=True) - 1
    return ids.gather(-1, index.minimum(last))[:, 0].tolist()


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    tokenizer_size: int | None = None,
    stop: Collection[int] = (),
    use_cache: bool = True,
    on_token: Callable[[int, int], Any] | None = None,
) -> Generation:
    """Continues prompts of any lengths.

    Args:
        model: a whole model on one device.
        prompts: token ids of each prompt, at least one.
        max_new_tokens: largest number of new tokens per row.
        sampling: choice of tokens; the default is greedy.
        tokenizer_size: number of tokens; larger ids are padding of the vocabulary, and are never chosen. None: all ids
            are tokens.
        stop: token ids that end a row.
        use_cache: keep a decoding state; False recomputes every row's whole text for every token, which defines the
            result that the decoding state must give.
        on_token: called with (row, token) for every new token.

    Raises:
        ValueError: `max_new_tokens` is below 1, or a prompt is empty.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1: {max_new_tokens}")
    if not prompts or not all(map(len, prompts)):
        raise ValueError(f"every prompt needs at least one token; lengths: {[len(p) for p in prompts]}")
    device = next(model.parameters()).device
    rows = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(rows))]
    result = Generation(tokens=[[] for _ in rows])
    decoder = _Cached(model, max_new_tokens) if use_cache else _Recomputed(model)
    start = time.perf_counter()
    with torch.inference_mode():
        logits = decoder.prefill(rows)
        while True:
            tokens = sample(logits[:, :tokenizer_size], sampling, generators)
            if not result.steps:
                result.prefill_seconds, start = time.perf_counter() - start, time.perf_counter()
            for row, (new, token) in enumerate(zip(result.tokens, tokens, strict=True)):
                if not new or new[-1] not in stop:
                    new.append(token)
                    if on_token is not None:
                        on_token(row, token)
            longest = result.steps + 1
            if longest == max_new_tokens or all(new[-1] in stop for new in result.tokens):
                break
            logits = decoder.step(torch.tensor(tokens, device=device))
            result.steps += 1
    result.decode_seconds = time.perf_counter() - start
    result.state_bytes = decoder.state_bytes()
    result.finish = ["stop" if new[-1] in stop else "length" for new in result.tokens]
    return result


class _Cached:
    """Decoder that computes the logits `[B, V]` after each row's last token from the decoding state."""

    def __init__(self, model: LanguageModel, new_tokens: int):
        self.model, self.new_tokens = model, new_tokens

    def prefill(self, rows: list[Tensor]) -> Tensor:
        logits, self.state = prefill(self.model, rows, self.new_tokens)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self.state.advance(self.model, tokens[:, None])[:, 0]

    def state_bytes(self) -> int:
        return self.state.bytes_per_sequence()


class _Recomputed:
    """Decoder that computes the logits `[B, V]` after each row's last token from each row's whole text."""

    def __init__(self, model: LanguageModel):
        self.model = model

    def prefill(self, rows: list[Tensor]) -> Tensor:
        self.rows = rows
        return torch.stack([self.model(row[None], TokenLayout(1, len(row)), keep=1)[0, 0] for row in rows])

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill([torch.cat([row, token[None]]) for row, token in zip(self.rows, tokens, strict=True)])

    def state_bytes(self) -> int:
        return 0


class TextStream:
    """Writes one row's text while its tokens arrive, as soon as they form whole characters.

    Args:
        tokenizer: decodes the tokens.
        write: called with each new part of the text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]):
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        # The text of tokens[:written] has been written. Later tokens are decoded together with tokens[context:written],
        # because the text of a token may depend on the tokens before it.
        self.context = self.written = 0

    def put(self, token: int) -> None:
        self.tokens.append(token)
        self._flush(final=False)

    def end(self) -> None:
        self._flush(final=True)

    def _flush(self, final: bool) -> None:
        before, now = self._text(self.written), self._text(len(self.tokens))
        if len(now) > len(before) and (final or not now.endswith("\ufffd")):
            self.write(now[len(before) :])
            self.context, self.written = self.written, len(self.tokens)

    def _text(self, end: int) -> str:
        return self.tokenizer.decode(self.tokens[self.context : end], skip_special_tokens=True)


def load_model(
    path: Path, dtype: str | None = None, device: str | None = None, step: int | None = None
) -> tuple[LinearMoEForCausalLM, Any]:
    """Loads model and tokenizer from an exported folder, or from a run folder.

    Args:
        path: the folder.
        dtype: "bf16" or "fp32"; None: as stored.
        device: device of the model; None: a GPU if there is one.
        step: step of a run's checkpoint; None: the latest complete one.

    Raises:
        ConfigError: `path` is no such folder, or a file is missing or damaged.
    """
    from linear_moe.checkpoints.run import is_run
    from linear_moe.inference.export import load_run, load_run_tokenizer

    if is_run(path):
        tokenizer = load_run_tokenizer(path / "tokenizer")
        model = load_run(path, step, dtype).model
    else:
        if step is not None:
            raise ConfigError("--step", step, "is for run folders; an exported folder holds one step")
        tokenizer, model = _load_exported(path, dtype)
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def _load_exported(path: Path, dtype: str | None) -> tuple[Any, LinearMoEForCausalLM]:
    """Loads tokenizer and model from an exported folder; raises ConfigError if a file is missing or damaged."""
    from safetensors import SafetensorError

    from linear_moe.inference.export import check_dtype, load_run_tokenizer
    from linear_moe.inference.hf import LinearMoEConfig, LinearMoEForCausalLM
    from linear_moe.options.errors import one_line

    if not (path / "config.json").is_file():
        raise ConfigError("model", str(path), "is neither an exported folder nor a run folder")
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        constraint = f"is not a model's configuration: {one_line(error)}"
        raise ConfigError("model", str(path / "config.json"), constraint) from None
    if model_type != LinearMoEConfig.model_type:
        raise ConfigError("model", str(path), f"holds a {model_type} model", fix="generate with transformers instead")
    if not any(path.glob("*.safetensors")):
        raise ConfigError("model", str(path), "has no weights (*.safetensors)", fix="export it again")
    tokenizer = load_run_tokenizer(path)
    try:
        check_dtype(LinearMoEConfig.from_pretrained(path).model_config(), dtype)
        return tokenizer, LinearMoEForCausalLM.from_pretrained(path, dtype=DTYPES[dtype] if dtype else "auto")
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        constraint = f"cannot be loaded: {one_line(error)}"
        raise ConfigError("model", str(path), constraint, fix="export it again") from error


def check_device(device: str | None) -> None:
    """Raises ConfigError for a --device that this machine does not have."""
    if device is None:
        return
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError("--device", device, "must be cpu, cuda or cuda:INDEX")
    gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        constraint = f"this machine has {gpus} usable GPUs"
        raise ConfigError("--device", device, constraint, fix="" if gpus else "use --device cpu")
