"""The command `linear-moe plan`."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from linear_moe.commands import arguments
from linear_moe.gpus import DEFAULT_GPU, GPUS
from linear_moe.options.errors import ConfigError

if TYPE_CHECKING:
    from linear_moe.plan.network import Cluster
    from linear_moe.plan.plan import Plan
    from linear_moe.plan.search import Proposals
    from linear_moe.plan.simulate import Simulation

HELP = (
    "print parameters, FLOPs, process groups and memory of a config, or propose layouts that fit, or simulate the cost "
    "of sharing out sequences; needs no GPU"
)
EXAMPLE = """linear-moe plan configs/train/a1b_7b.yaml parallel.tensor=2 --world 64
  linear-moe plan configs/train/a1b_7b.yaml --world 8 --gpu h100
  linear-moe plan configs/models/a0.3b_2b.yaml --tokens-per-gpu 32K --gpu h200 --plot sequence.svg"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.with_world(parser)
    positive = arguments.number(float, "a number > 0", lambda n: 0 < n < math.inf)
    layouts = parser.add_argument_group("layouts", "with --gpu or --memory: how to spread the model over --world GPUs")
    names = f"propose layouts that fit into this GPU: {', '.join(GPUS)}"
    layouts.add_argument("--gpu", choices=GPUS, metavar="NAME", help=names)
    layouts.add_argument(
        "--memory",
        type=positive,
        metavar="GiB",
        help=f"propose layouts that fit into this memory per GPU; without --gpu, the speed is that of {DEFAULT_GPU}",
    )
    sequences = parser.add_argument_group(
        "sequences",
        "with --sequence-length or --tokens-per-gpu: bytes and time of a layer if all GPUs share out one sequence, in "
        "every way, on 8, 16, ... up to --world GPUs (default: 4096)",
    )
    length = sequences.add_mutually_exclusive_group()
    length.add_argument("--sequence-length", type=arguments.tokens, metavar="N", help="tokens of the sequence: 1M")
    length.add_argument(
        "--tokens-per-gpu", type=arguments.tokens, metavar="N", help="tokens of the sequence per GPU: 32K"
    )
    sequences.add_argument("--plot", metavar="FILE.svg", help="also draw the time that exchanges add to a layer")
    cluster = parser.add_argument_group("cluster", "GPUs and network, for layouts and for sequences")
    node = arguments.number(int, "a whole number from 1 to 1024", lambda n: 1 <= n <= 1024)
    cluster.add_argument("--node", type=node, default=8, metavar="N", help="GPUs in a node (default: 8)")
    sheet = "each way and GPU (default: from the data sheet of --gpu)"
    cluster.add_argument("--intra-node-bandwidth", type=positive, metavar="GB/s", help=f"within a node, {sheet}")
    cluster.add_argument("--inter-node-bandwidth", type=positive, metavar="GB/s", help=f"between nodes, {sheet}")
    microseconds = "latency of any collective or message (default: 20, assumed)"
    cluster.add_argument("--latency", type=positive, metavar="us", help=microseconds)
    parser.add_argument("--json", action="store_true", help="print JSON")


CLUSTER = ("intra_node_bandwidth", "inter_node_bandwidth", "latency")


def main(args: argparse.Namespace) -> int:
    from linear_moe.config.load import load_config
    from linear_moe.plan.plan import make_plan
    from linear_moe.plan.plot import svg
    from linear_moe.plan.search import propose
    from linear_moe.plan.show import show, show_layouts
    from linear_moe.plan.show_sequence import show_simulation
    from linear_moe.plan.simulate import LARGEST, simulate, worlds

    config = load_config(args.config, args.overrides)
    simulates = args.sequence_length is not None or args.tokens_per_gpu is not None
    layouts = not simulates and (args.gpu is not None or args.memory is not None)
    check_options(args, simulates, layouts)
    result: Plan | Proposals | Simulation
    if simulates:
        total = args.sequence_length is not None
        tokens = args.sequence_length if total else args.tokens_per_gpu
        result = simulate(config, worlds(args.world or LARGEST), cluster(args), tokens, total)
        display = partial(show_simulation, result, args.config)
        if args.plot is not None:
            length = f"sequences of {tokens:,} tokens" if total else f"{tokens:,} tokens a GPU"
            Path(args.plot).write_text(svg(result, f"{config.model.pattern}, {length}"))
    elif layouts:
        result = propose(config, args.world, cluster(args))
        display = partial(show_layouts, result, config, args.config)
    else:
        result = make_plan(config, args.world)
        display = partial(show, result, config, args.config)
    if args.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        display()
    return 0


def check_options(args: argparse.Namespace, simulates: bool, layouts: bool) -> None:
    """Raises ConfigError for options that would have no effect, or that need another option."""
    if layouts and args.world is None:
        raise ConfigError("--world", ..., "--gpu and --memory propose layouts of a number of GPUs", fix="set --world N")
    sequences = "--sequence-length or --tokens-per-gpu"
    without = dict.fromkeys(CLUSTER, (simulates or layouts, f"without --gpu, --memory, {sequences}"))
    without |= {"memory": (not simulates, f"with {sequences}"), "plot": (simulates, f"without {sequences}")}
    for name, (used, where) in without.items():
        if getattr(args, name) is not None and not used:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(args, name), f"does nothing {where}")


def cluster(args: argparse.Namespace) -> Cluster:
    """Makes the cluster that the options describe: GPUs, their connections and latency."""
    from linear_moe.plan.network import LATENCY, Cluster

    gpu, changes = GPUS[args.gpu or DEFAULT_GPU], {}
    if args.memory is not None:
        changes["memory_gib"] = args.memory
    for name, option in (("link", "intra_node_bandwidth"), ("network", "inter_node_bandwidth")):
        if getattr(args, option) is not None:
            changes[name] = getattr(args, option) * 1e9
    latency = LATENCY if args.latency is None else args.latency * 1e-6
    return Cluster(replace(gpu, **changes), args.node, latency)
