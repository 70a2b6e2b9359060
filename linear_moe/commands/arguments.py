"""The arguments of every command, apart from the commands: `--help` and a mistyped option need no PyTorch."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from linear_moe.gpus import DEFAULT_GPU, GPUS

DTYPES = ("bf16", "fp32")


def number(kind: type, constraint: str, valid: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: an int or float that is `valid`, as `constraint` says in words."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"{text!r}: must be {constraint}")
        return value

    return parse


def size(text: str) -> str:
    """An argparse type: a size in words that transformers reads."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of KB, MB, GB or TB, for example 5GB")
    return text


def tokens(text: str) -> int:
    """An argparse type: a number of tokens; K and M are 2**10 and 2**20."""
    if not re.fullmatch(r"[1-9]\d{0,12}[KM]?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number > 0, for example 32768, 32K or 1M")
    return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)


def with_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    # With a default, or argparse calls them required when the config is missing.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="changes to it: training.steps=100 model.pattern=LLLN"
    )


def with_world(parser: argparse.ArgumentParser) -> None:
    with_config(parser)
    parser.add_argument("--world", type=int, help="number of ranks; default: the fewest that the parallel sizes allow")


def plan(parser: argparse.ArgumentParser) -> None:
    with_world(parser)
    positive = number(float, "a number > 0", lambda n: 0 < n < math.inf)
    layouts = parser.add_argument_group("layouts", "with --gpu or --memory: how to spread the model over --world GPUs")
    names = f"propose layouts that fit into this GPU: {', '.join(GPUS)}"
    layouts.add_argument("--gpu", choices=GPUS, metavar="NAME", help=names)
    layouts.add_argument(
        "--memory",
        type=positive,
        metavar="GiB",
        help=f"the same for so much memory; without --gpu, at the speed of {DEFAULT_GPU}",
    )
    sequences = parser.add_argument_group(
        "sequences",
        "with one of the first two: bytes and time of a layer if all GPUs share out one sequence, in every way that "
        "there is, on 8, 16, ... up to --world GPUs (default: 4096)",
    )
    length = sequences.add_mutually_exclusive_group()
    length.add_argument("--sequence-length", type=tokens, metavar="N", help="tokens of the sequence: 1M")
    length.add_argument("--tokens-per-gpu", type=tokens, metavar="N", help="tokens of it for each GPU: 32K")
    sequences.add_argument("--plot", metavar="FILE.svg", help="draw what is not hidden of the exchange, too")
    cluster = parser.add_argument_group("cluster", "of both")
    node = number(int, "a whole number from 1 to 1024", lambda n: 1 <= n <= 1024)
    cluster.add_argument("--node", type=node, default=8, metavar="N", help="GPUs in a node (default: 8)")
    sheet = "each way and GPU (default: the data sheet's of --gpu)"
    cluster.add_argument("--intra-node-bandwidth", type=positive, metavar="GB/s", help=f"within a node, {sheet}")
    cluster.add_argument("--inter-node-bandwidth", type=positive, metavar="GB/s", help=f"between nodes, {sheet}")
    microseconds = "of any collective or message (default: 20, assumed)"
    cluster.add_argument("--latency", type=positive, metavar="us", help=microseconds)
    parser.add_argument("--json", action="store_true", help="print JSON")


def mixers(parser: argparse.ArgumentParser) -> None:
    positive = number(int, "a whole number from 1 to 2**20", lambda n: 1 <= n <= 2**20)
    parser.add_argument("--hidden", type=positive, default=1024, help="width of the residual stream (default: 1024)")
    parser.add_argument("--heads", type=positive, default=8, help="model.num_heads (default: 8)")
    length = "tokens that the state of attention has seen (default: 2048)"
    parser.add_argument("--length", type=positive, default=2048, help=length)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print docs/mixers.md: options and weight names too")


def data(parser: argparse.ArgumentParser) -> None:
    with_config(parser)
    parser.add_argument("--bigram", action="store_true", help="print a bigram model's validation loss")
    parser.add_argument("--json", action="store_true", help="print JSON")


def export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the latest complete one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as trained")
    parser.add_argument("--max-shard-size", type=size, default="5GB", help="of a weights file (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def import_(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run folder, or folder that `linear-moe export` wrote")
    with_config(parser)
    parser.add_argument(
        "--upcycle",
        action="store_true",
        help="where SOURCE has a dense FFN and the config has experts, make them of it: copies, or parts of copies",
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run folder (default: the latest complete one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def checkpoint(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="inspect|reshard")
    source = "run folder (its latest complete checkpoint), or RUN/checkpoints/step_..."
    inspect = actions.add_parser("inspect", help="what is in it, and whether it is whole")
    inspect.add_argument("source", type=Path, metavar="RUN_OR_STEP", help=source)
    inspect.add_argument("--tensors", metavar="PATTERN", help="list those whose names match: 'model.layers.0.*', '*'")
    inspect.add_argument("--no-verify", action="store_true", help="do not read the files to compare their sums")
    reshard = actions.add_parser("reshard", help="rewrite it in other files, with or without the optimizer's state")
    reshard.add_argument("source", type=Path, metavar="SRC", help=source)
    reshard.add_argument("out", type=Path, metavar="DST", help="run folder to begin with it; must have no checkpoint")
    positive = number(int, "a whole number from 1 to 65536", lambda n: 1 <= n <= 65536)
    reshard.add_argument("--files", type=positive, default=8, help="that the tensors are spread over (default: 8)")
    for axis in ("tensor", "expert", "expert-tensor"):
        cut = f"cut tensors as parallel.{axis.replace('-', '_')} of so many ranks does (default: that of SRC)"
        reshard.add_argument(f"--{axis}", type=positive, help=cut)
    reshard.add_argument("--no-optimizer", action="store_true", help="leave the optimizer's state out")
    for action in (inspect, reshard):
        action.add_argument("--step", type=int, help="checkpoint of a run folder (default: the latest complete one)")
        action.add_argument("--json", action="store_true", help="print one JSON object")


def generate(parser: argparse.ArgumentParser) -> None:
    count = number(int, "a whole number >= 0", lambda n: n >= 0)
    parser.add_argument("model", type=Path, help="exported folder, or run folder")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; give several for a batch")
    parser.add_argument("--prompt-file", action="append", default=[], type=Path, help="the same, from a UTF-8 file")
    parser.add_argument("--max-new-tokens", type=number(int, "a whole number >= 1", lambda n: n >= 1), default=128)
    finite = number(float, "a number >= 0", lambda t: 0 <= t < math.inf)
    parser.add_argument("--temperature", type=finite, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-k", type=count, default=0, help="choose among the k most likely tokens; 0: all")
    share = number(float, "a number in (0, 1]", lambda p: 0 < p <= 1)
    parser.add_argument("--top-p", type=share, default=1.0, help="choose among the likeliest of this probability")
    seed = number(int, "a whole number from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)
    parser.add_argument("--seed", type=seed, default=0, help="row i of a batch draws with seed + i")
    parser.add_argument("--no-cache", action="store_true", help="recompute the whole text for every token")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    parser.add_argument("--step", type=int, help="checkpoint of a run folder (default: latest)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of streamed text")
