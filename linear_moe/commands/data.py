"""`linear-moe data`: prepare a configuration's corpus ahead of training, and describe it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from linear_moe.commands import arguments
from linear_moe.options.errors import ConfigError

if TYPE_CHECKING:
    from linear_moe.config.schema import Config
    from linear_moe.training.data.prepared import PreparedData

HELP = "tokenize text files into an indexed dataset"
EXAMPLE = "linear-moe data --help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.with_config(parser)
    parser.add_argument("--bigram", action="store_true", help="print a bigram model's validation loss")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Prepares the corpus; prints files, documents, tokens, vocabulary and bytes per token. Returns the exit code."""
    from linear_moe.config.load import load_config
    from linear_moe.training.data.prepare import prepare_data

    config = load_config(args.config, args.overrides)
    if args.bigram and config.data.validation_fraction == 0:
        raise ConfigError("data.validation_fraction", 0, "must be above 0: --bigram scores the held-out files")
    prepared = prepare_data(config)
    result = describe_data(config, prepared)
    if args.bigram:
        from linear_moe.training.data.bigram import bigram_loss

        result["bigram_loss"] = bigram_loss(prepared, config)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def describe_data(config: Config, prepared: PreparedData) -> dict[str, Any]:
    """Describes the prepared corpus, with stable keys; `bytes_per_token` is None if the bytes are not known."""
    result: dict[str, Any] = {
        "corpus": config.data.corpus,
        "train_prefix": prepared.train_prefix,
        "validation_prefix": prepared.validation_prefix,
        "tokenizer_folder": prepared.tokenizer_folder,
        "vocab_size": prepared.vocab_size,
        "fingerprint": prepared.fingerprint,
        **prepared.summary,
    }
    for split in prepared.tokens:
        counts = result[split]
        counts["bytes_per_token"] = counts["bytes"] / counts["tokens"] if "bytes" in counts else None
    return result


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['corpus']}, {result.get('tokenizer', 'no')} tokenizer")
    for column in ("", "documents", "tokens", "bytes", "bytes/token"):
        table.add_column(column, justify="right" if column else "left")
    for split in ("train", "validation"):
        if split in result:
            counts = result[split]
            rate = counts["bytes_per_token"]
            table.add_row(
                split,
                f"{counts['documents']:,}",
                f"{counts['tokens']:,}",
                f"{counts['bytes']:,}" if "bytes" in counts else "",
                f"{rate:.2f}" if rate else "",
            )
    console = Console()
    console.print(table)
    skipped = "".join(f", {count} {why} skipped" for why, count in result.get("skipped", {}).items())
    files = f"{result['files']:,} files{skipped}; " if "files" in result else ""
    lines = [f"{files}vocabulary {result['vocab_size']:,}; {result['train_prefix']}"]
    if "bigram_loss" in result:
        lines.append(f"bigram model on the validation set: {result['bigram_loss']:.4f} nats per token")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
