"""Text from a model: prefill in one chunked pass, then token by token on recurrent states and key-value caches."""

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
    """How the next token is chosen.

    Attributes:
        temperature: 0: the most likely token (greedy); else logits are divided by it.
        top_k: choose among the k most likely; 0: all.
        top_p: choose among the fewest most likely tokens that together have this probability.
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
    """What `generate` returns.

    Attributes:
        tokens: new tokens per row, a stop token included.
        finish: per row "stop" (a stop token) or "length".
        prefill_seconds, decode_seconds: time of the prompts' pass, and of all later ones.
        steps: number of later passes.
        state_bytes: of one row's decoding state at the end; 0 without a cache.
    """

    tokens: list[list[int]]
    finish: list[str] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    state_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Over all rows, first tokens (which the prefill gives) left out; 0.0 if there were no others."""
        return (sum(map(len, self.tokens)) - len(self.tokens)) / self.decode_seconds if self.steps else 0.0


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Choose a token per row of `logits [B, V]`; CPU generators, one per row, so that devices and batches agree."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    values, ids = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    probs = values.softmax(-1)
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0
        probs /= probs.sum(-1, keepdim=True)
    if sampling.top_p < 1:  # a token stays if those before it have less: the first always does
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
    """Continue prompts of any lengths.

    Args:
        model: a whole model on one device.
        prompts: token ids, at least one each.
        max_new_tokens: at most so many per row.
        sampling: greedy unless told otherwise.
        tokenizer_size: ids from here on are padding of the vocabulary and never chosen; None: all are tokens.
        stop: tokens that end a row.
        use_cache: False recomputes every row's whole text for every token: the definition of what the cache must give.
        on_token: called with (row, token) as they come.
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
    """Logits `[B, V]` after each row's last token, from the decoding state."""

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
    """The same logits, from each row's whole text."""

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
    """Turns one row's tokens into text as soon as they form whole characters, and writes it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]):
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.context = self.written = 0  # text of tokens[context:written] is out and decodes the same with what follows

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
    """The model and tokenizer of an exported folder, or of a run folder (its latest checkpoint, or that of `step`).

    Args:
        dtype: "bf16" or "fp32"; None: as stored.
        device: None: a GPU if there is one.
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
    """Tokenizer and model of an exported folder; ConfigError if anything of it is missing or damaged."""
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
