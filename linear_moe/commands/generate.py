"""TODO commands.generate."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
import torch
from torch import Tensor
from linear_moe.options.errors import ConfigError
from linear_moe.inference.cache import prefill
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.tokens import Layout
from linear_moe.modeling.model import LanguageModel
from linear_moe.inference.generate import Generation
from linear_moe.inference.generate import Sampling
from linear_moe.inference.generate import TextStream
from linear_moe.inference.generate import check_device
from linear_moe.inference.generate import generate
from linear_moe.inference.generate import load_model
if TYPE_CHECKING:  # transformers takes seconds to import
    from linear_moe.inference.hf import LinearMoEForCausalLM


def main(args: argparse.Namespace) -> int:
    """`linear-moe generate`. Returns the exit code."""
    prompts = [*args.prompt, *(_read(path) for path in args.prompt_file)]
    if not prompts:
        raise ConfigError("--prompt", ..., "is needed", fix="or --prompt-file FILE")
    check_device(args.device)

    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = load_model(args.model, args.dtype, args.device, args.step)
    tokens = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise ConfigError("--prompt", prompt, "has no tokens")
    stream = TextStream(tokenizer, _print) if len(prompts) == 1 and not args.json else None
    if stream is not None:
        _print(prompts[0])
    eos = model.generation_config.eos_token_id
    result = generate(
        model.model,
        tokens,
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        tokenizer_size=model.config.tokenizer_size,
        stop=() if args.ignore_eos or eos is None else {eos} if isinstance(eos, int) else set(eos),
        use_cache=not args.no_cache,
        on_token=None if stream is None else lambda row, token: stream.put(token),
    )
    if stream is not None:
        stream.end()
        _print("\n")
    _report(args.json, model, tokenizer, prompts, tokens, result, cache=not args.no_cache)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError("--prompt-file", str(path), f"cannot be read: {reason}") from None


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _report(
    as_json: bool,
    model: LinearMoEForCausalLM,
    tokenizer: Any,
    prompts: list[str],
    tokens: Iterable[Sequence[int]],
    result: Generation,
    cache: bool,
) -> None:
    """JSON on standard output; or the texts of a batch there, and the figures on standard error."""
    completions = [tokenizer.decode(new, skip_special_tokens=True) for new in result.tokens]
    if as_json:
        record = {
            "prompts": prompts,
            "completions": completions,
            "tokens": result.tokens,
            "finish": result.finish,
            "prompt_tokens": [len(ids) for ids in tokens],
            "cache": cache,
            "prefill_seconds": result.prefill_seconds,
            "decode_seconds": result.decode_seconds,
            "tokens_per_second": result.tokens_per_second,
            "state_bytes_per_sequence": result.state_bytes,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        }
        print(json.dumps(record))
        return
    if len(prompts) > 1:
        for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True)):
            print(f"--- {i}\n{prompt}{text}")
    state = f"state {result.state_bytes / 1024:,.1f} KiB per sequence" if cache else "no cache"
    print(
        f"prompt {sum(map(len, tokens))} tokens in {result.prefill_seconds:.2f} s; "
        f"then {result.tokens_per_second:,.1f} tokens/s; {state}; {model.dtype} on {model.device}",
        file=sys.stderr,
    )
