"""`linear-moe generate`: continue a prompt with an exported model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linear_moe.commands import arguments
from linear_moe.options.errors import ConfigError

if TYPE_CHECKING:
    from linear_moe.inference.generate import Generation
    from linear_moe.inference.hf import LinearMoEForCausalLM

HELP = "continue a prompt with an exported model"
EXAMPLE = "linear-moe generate exported/first --prompt 'def main('"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = arguments.number(int, "a whole number >= 0", lambda n: n >= 0)
    parser.add_argument("model", type=Path, help="exported folder, or run folder")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; give several for a batch")
    parser.add_argument("--prompt-file", action="append", default=[], type=Path, help="prompt from a UTF-8 file")
    parser.add_argument(
        "--max-new-tokens", type=arguments.number(int, "a whole number >= 1", lambda n: n >= 1), default=128
    )
    finite = arguments.number(float, "a number >= 0", lambda t: 0 <= t < math.inf)
    parser.add_argument("--temperature", type=finite, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-k", type=count, default=0, help="choose among the k most likely tokens; 0: all")
    share = arguments.number(float, "a number in (0, 1]", lambda p: 0 < p <= 1)
    parser.add_argument(
        "--top-p", type=share, default=1.0, help="choose among the likeliest tokens that have this probability"
    )
    seed = arguments.number(int, "a whole number from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)
    parser.add_argument("--seed", type=seed, default=0, help="row i of a batch draws with seed + i")
    parser.add_argument("--no-cache", action="store_true", help="recompute the whole text for every token")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    parser.add_argument("--step", type=int, help="checkpoint of a run folder (default: latest)")
    parser.add_argument("--dtype", choices=arguments.DTYPES, help="default: as stored")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of streamed text")


def main(args: argparse.Namespace) -> int:
    """Runs `linear-moe generate`; returns the exit code."""
    from linear_moe.inference.generate import Sampling, TextStream, check_device, generate, load_model

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
    """Prints JSON on standard output, or a batch's texts on standard output and the speed on standard error."""
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
