"""The command `linear-moe plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from linear_moe.options.errors import ConfigError
from linear_moe.config.load import load_config
from linear_moe.gpus import DEFAULT_GPU, GPUS
from linear_moe.plan.network import LATENCY, Cluster
from linear_moe.plan.plan import Plan, make_plan
from linear_moe.plan.plot import svg
from linear_moe.plan.search import Proposals, propose
from linear_moe.plan.show import show, show_layouts
from linear_moe.plan.show_sequence import show_simulation
from linear_moe.plan.simulate import LARGEST, Simulation, simulate, worlds

CLUSTER = ("intra_node_bandwidth", "inter_node_bandwidth", "latency")


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    simulates = args.sequence_length is not None or args.tokens_per_gpu is not None
    layouts = not simulates and (args.gpu is not None or args.memory is not None)
    check_options(args, simulates, layouts)
    found: Plan | Proposals | Simulation
    if simulates:
        total = args.sequence_length is not None
        tokens = args.sequence_length if total else args.tokens_per_gpu
        found = simulate(config, worlds(args.world or LARGEST), cluster(args), tokens, total)
        display = partial(show_simulation, found, args.config)
        if args.plot is not None:
            length = f"sequences of {tokens:,} tokens" if total else f"{tokens:,} tokens a GPU"
            Path(args.plot).write_text(svg(found, f"{config.model.pattern}, {length}"))
    elif layouts:
        found = propose(config, args.world, cluster(args))
        display = partial(show_layouts, found, config, args.config)
    else:
        found = make_plan(config, args.world)
        display = partial(show, found, config, args.config)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        display()
    return 0


def check_options(args: argparse.Namespace, simulates: bool, layouts: bool) -> None:
    """Raises ConfigError for options that would do nothing, or lack another one."""
    if layouts and args.world is None:
        raise ConfigError("--world", ..., "--gpu and --memory propose layouts of a number of GPUs", fix="set --world N")
    sequences = "--sequence-length or --tokens-per-gpu"
    without = dict.fromkeys(CLUSTER, (simulates or layouts, f"without --gpu, --memory, {sequences}"))
    without |= {"memory": (not simulates, f"with {sequences}"), "plot": (simulates, f"without {sequences}")}
    for name, (used, where) in without.items():
        if getattr(args, name) is not None and not used:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(args, name), f"does nothing {where}")


def cluster(args: argparse.Namespace) -> Cluster:
    """What the options say of GPUs and their connections."""
    gpu, changes = GPUS[args.gpu or DEFAULT_GPU], {}
    if args.memory is not None:
        changes["memory_gib"] = args.memory
    for name, option in (("link", "intra_node_bandwidth"), ("network", "inter_node_bandwidth")):
        if getattr(args, option) is not None:
            changes[name] = getattr(args, option) * 1e9
    latency = LATENCY if args.latency is None else args.latency * 1e-6
    return Cluster(replace(gpu, **changes), args.node, latency)
