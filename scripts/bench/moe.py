#!/usr/bin/env python3
"""Speed of one MoE layer's experts, forward and backward, beside other implementations on the same GPU.

All contenders get the same tokens, weights and routing (top-k indices and their weights; the router is not measured),
and compute the gradients of tokens, router's weights and experts' weights:
    ours      linear_moe.modeling.ops.experts, as model.moe.experts=grouped: on Hopper, Triton kernels
    grouped_mm  as ours, with PyTorch's grouped_mm for all products, and Triton kernels around them
    quack     as ours, with quack-kernels for all products, if it can be imported
    eager     nonzero, gather, grouped_mm and index_add in PyTorch, from a dense routing map
    loop      one expert after the other
    sonicmoe  SonicMoE, if it can be imported, on weights whose rows of gate and up alternate
    dense     the matrix products alone, of all tokens' copies with one expert: the same FLOPs, nothing around them
    dense_ffn a dense SwiGLU, top_k times as wide as an expert: the same FLOPs
Contenders take turns of some runs in a row; their time is the median over turns. `memory_mib` is the peak above the
memory allocated before, so that it includes the gradients. `error` is the largest norm-wise relative error of the
output and gradients against those of the loop. `waits_for_device` says whether the host waits for the device, that is
whether torch.cuda.set_sync_debug_mode("error") raised an error.

    python scripts/bench/moe.py
    python scripts/bench/moe.py --profile ours --presets a0.3b_2b --tokens 16384
    python scripts/bench/moe.py --device cpu --tiny --folder /tmp
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from pretrain import commit, versions
from torch import Tensor

from linear_moe.config.load import load_config
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.ops.experts import assign, experts
from linear_moe.modeling.ops.experts.products import grouped_mm

PACKAGES = ("quack", "sonicmoe")
"""Contenders that need the package of the same name."""

Function = Callable[..., Tensor]
Work = Callable[[], list[Tensor]]
"""Function that runs a forward and backward pass and returns the output and all gradients."""

TURN = 200  # milliseconds of a contender's turn


@dataclass(frozen=True)
class Case:
    """Input of a measurement: tokens `x [n, D]` routed to experts, the experts' weights, and the output's gradient."""

    x: Tensor
    weights: Tensor
    index: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products, forward and backward."""
        _, two, ffn, hidden = self.gate_up.shape
        return 3 * 2 * self.index.numel() * (two + 1) * ffn * hidden


def make(moe: MoEConfig, hidden: int, tokens: int, skew: float, device: str) -> Case:
    """Draws a case whose experts differ in popularity by `skew`, as in a model early in training."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    logits = draw(tokens, moe.num_experts) + skew * draw(moe.num_experts)
    weights, index = logits.softmax(-1).topk(moe.top_k)
    experts, ffn = moe.num_experts, moe.expert_ffn_size
    x = draw(tokens, hidden).bfloat16()
    gate_up = draw(experts, 2, ffn, hidden, scale=hidden**-0.5).bfloat16()
    down = draw(experts, hidden, ffn, scale=ffn**-0.5).bfloat16()
    leaves = [t.requires_grad_() for t in (x, weights / weights.sum(-1, keepdim=True), gate_up, down)]
    return Case(leaves[0], leaves[1], index, leaves[2], leaves[3], draw(tokens, hidden).bfloat16())


# -- implementations ---------------------------------------------------------------------------------------------------
def ours(x: Tensor, weights: Tensor, index: Tensor, gate_up: Tensor, down: Tensor, products: str = "grouped") -> Tensor:
    return experts(x, weights, gate_up, down, assign(index, len(gate_up)), products)


def eager(x: Tensor, weights: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    shape = (len(x), len(gate_up))
    probs = weights.new_zeros(shape).scatter(1, index, weights)
    routing_map = torch.zeros(shape, dtype=torch.bool, device=x.device).scatter(1, index, True)
    expert, token = routing_map.T.nonzero(as_tuple=True)
    ends = routing_map.sum(0).cumsum(0).to(torch.int32)
    gate, up = grouped_mm(x[token], gate_up.flatten(1, 2).transpose(1, 2), offs=ends).chunk(2, -1)
    h = (F.silu(gate) * up * probs[token, expert].unsqueeze(-1)).to(x.dtype)
    y = grouped_mm(h, down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add(0, token, y)


def loop(x: Tensor, weights: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, choice = (index == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[e].flatten(0, 1)).chunk(2, -1)
        h = (F.silu(gate) * up * weights[token, choice].unsqueeze(-1)).to(x.dtype)
        out = out.index_add(0, token, F.linear(h, down[e]))
    return out


def sonicmoe(x: Tensor, weights: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Runs SonicMoE's own layer from the chosen experts on; in its `gate_up [E, 2F, D]`, rows of gate and up alternate.

    SonicMoE also has an entry point for routing from outside, which allows any number of experts per token, but it is
    slower.
    """
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import _DownProjection, _UpProjection
    from sonicmoe.functional.triton_kernels import TC_topk_router_metadata_triton

    tokens, top_k, experts = len(x), index.shape[1], len(gate_up)
    slots = tokens * top_k
    counts, ends, token, sort, unsort = (
        torch.empty(size, dtype=torch.int32, device=x.device) for size in (experts, experts + 1, slots, slots, slots)
    )
    TC_topk_router_metadata_triton(index.int(), experts, counts, ends, token, sort, unsort)
    a, h = _UpProjection.apply(
        x, gate_up.permute(1, 2, 0), None, ends, slots, top_k, token, sort, unsort, None, False, ActivationType.SWIGLU,
        False,
    )  # fmt: skip
    return _DownProjection.apply(
        a, h, down.permute(1, 2, 0), None, weights, ends, tokens, top_k, token, sort, unsort, None, False,
        ActivationType.SWIGLU,
    )  # fmt: skip


def dense(rows: Tensor, gate_up: Tensor, h: Tensor, down: Tensor, grad: Tensor) -> list[Tensor]:
    """Runs the six matrix products of an expert, forward and backward, and nothing else.

    The output of the first product takes the place of its gradient, which has the same shape.
    """
    dgate_up = rows @ gate_up.T
    y, dh, ddown = h @ down.T, grad @ down, grad.T @ h
    return [y, dh, ddown, dgate_up @ gate_up, dgate_up.T @ rows]


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def leaf(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_()


def work(function: Function, inputs: list[Tensor], grad: Tensor) -> Work:
    leaves = [t for t in inputs if t.requires_grad]

    def run() -> list[Tensor]:
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    return run


def contenders(case: Case, wanted: list[str]) -> dict[str, Work]:
    """Makes the passes of the contenders in `wanted`; a contender that needs other shapes gets copies of tensors."""
    routed = [case.x, case.weights, case.index, case.gate_up, case.down]
    top_k = case.index.shape[1]
    hidden = case.x.shape[1]

    def copies(x: Tensor) -> Tensor:
        return x.detach().repeat_interleave(top_k, 0)

    made: dict[str, Callable[[], Work]] = {
        "loop": lambda: work(loop, routed, case.grad),
        "eager": lambda: work(eager, routed, case.grad),
        "ours": lambda: work(ours, routed, case.grad),
        "grouped_mm": lambda: work(partial(ours, products="grouped_mm"), routed, case.grad),
        "quack": lambda: work(partial(ours, products="quack"), routed, case.grad),
        "sonicmoe": lambda: work(
            sonicmoe, [*routed[:3], leaf(case.gate_up.transpose(1, 2).flatten(1, 2)), case.down], case.grad
        ),
        "dense": lambda: partial(
            dense,
            copies(case.x),
            case.gate_up[0].detach().flatten(0, 1),
            torch.randn(case.index.numel(), case.down.shape[2], dtype=case.x.dtype, device=case.x.device),
            case.down[0].detach(),
            copies(case.grad),
        ),
        "dense_ffn": lambda: work(
            dense_ffn,
            [
                case.x,
                *(leaf(case.gate_up[:top_k, i].reshape(-1, hidden)) for i in (0, 1)),
                leaf(case.down[:top_k].transpose(0, 1).reshape(hidden, -1)),
            ],
            case.grad,
        ),
    }
    return {name: made[name]() for name in wanted if name not in PACKAGES or find_spec(name)}


# -- measuring ---------------------------------------------------------------------------------------------------------
def milliseconds(run: Work, cuda: bool, runs: int) -> float:
    """Milliseconds of a run, the mean of `runs` in a row, between which the device does not wait for the host."""
    if not cuda:
        start = time.perf_counter()
        for _ in range(runs):
            run()
        return 1e3 * (time.perf_counter() - start) / runs
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / runs


def in_turns(works: dict[str, Work], turns: int, cuda: bool) -> dict[str, float]:
    """Median milliseconds of every contender over `turns`.

    In every turn each contender runs for about TURN milliseconds, long enough for the GPU's clocks to settle.
    """
    runs = {name: max(1, round(TURN / milliseconds(run, cuda, 2))) if cuda else 1 for name, run in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, run in works.items():
            times[name].append(milliseconds(run, cuda, runs[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def memory(run: Work) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def waits(run: Work) -> bool:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def error(actual: list[Tensor], expected: list[Tensor], in_turns: bool) -> float:
    """Largest norm-wise relative error; `in_turns`: rows of gate and up alternate in the gradient of `actual`."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            e = (e.transpose(1, 2) if in_turns else e).flatten(1, 2)
        worst = max(worst, float((a.float() - e.float()).norm() / e.float().norm()))
    return worst


def first_calls(works: dict[str, Work], cuda: bool) -> tuple[list[dict[str, Any]], dict[str, Work]]:
    """Runs every contender once; returns their rows, with seconds and error against the loop, and those that work."""
    rows, running, expected = [], {}, None
    for name, run in works.items():
        row: dict[str, Any] = {"contender": name}
        rows.append(row)
        start = time.perf_counter()
        try:
            results = run()
            if cuda:
                torch.cuda.synchronize()
            row["first_call_seconds"] = time.perf_counter() - start
            if name == "loop":
                expected = results
            elif expected is not None and not name.startswith("dense"):
                row["error"] = error(results, expected, in_turns=name == "sonicmoe")
            running[name] = run
        except Exception as problem:
            traceback.print_exc()
            row["failed"] = f"{type(problem).__name__}: {problem}"[:500]
    return rows, running


def measure(case: Case, wanted: list[str], turns: int) -> list[dict[str, Any]]:
    cuda = case.x.is_cuda
    rows, works = first_calls(contenders(case, wanted), cuda)
    times = in_turns(works, turns, cuda)
    for row in rows:
        name = row["contender"]
        if name in works:
            row |= {"ms": times[name], "tflops": case.flops / times[name] / 1e9}
            row |= {f"{base}_over_it": times[base] / times[name] for base in ("dense", "loop") if base in times}
            if cuda:
                row |= {"memory_mib": memory(works[name]), "waits_for_device": waits(works[name])}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as a Markdown table."""
    columns = {"ms": ".2f", "tflops": ".0f", "dense_over_it": ".0%", "loop_over_it": ".1f", "memory_mib": ".0f",
               "waits_for_device": "", "error": ".1e", "first_call_seconds": ".1f"}  # fmt: skip
    lines = ["| preset | tokens | | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines.append("|" + "---|" * (3 + len(columns)))
    for row in rows:
        cells = [format(row[c], form) if c in row else "" for c, form in columns.items()]
        cells = [f"failed: {row['failed'][:100]}"] if "failed" in row else cells
        lines.append(f"| {row['preset']} | {row['tokens']} | {row['contender']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(path: Path, rows: list[dict[str, Any]], device: str, skew: float, revision: str) -> None:
    cuda = device != "cpu"
    result = {
        "name": path.stem,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "gpus": int(cuda),
        **versions(),
        **{name: getattr(sys.modules.get(name), "__version__", None) for name in PACKAGES},  # null: not used
        "commit": revision,
        "command": shlex.join(["scripts/bench/moe.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "dtype": "bf16",
        "skew": skew,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows))


def show_profile(case: Case, name: str) -> None:
    run = contenders(case, [name])[name]
    for _ in range(3):
        run()
    with torch.profiler.profile() as profile:
        for _ in range(5):
            run()
    key = "self_device_time_total" if case.x.is_cuda else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90))


ALL = ("loop", "eager", "ours", "grouped_mm", "quack", "sonicmoe", "dense", "dense_ffn")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="a0.3b_2b,a1b_7b", help="files of configs/models, comma separated")
    parser.add_argument("--tokens", default="16384,65536", help="comma separated")
    parser.add_argument("--contenders", default=",".join(ALL), help="comma separated")
    parser.add_argument(
        "--skew", type=float, default=0.5, help="spread of the experts' mean logits; the spread over tokens is 1"
    )
    parser.add_argument("--name", default="moe_gpu", help="FOLDER/NAME.json and .md")
    parser.add_argument("--folder", default="docs/results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender")
    parser.add_argument("--commit", help="default: $COMMIT, or git's HEAD")
    parser.add_argument("--profile", choices=ALL, metavar="NAME", help="print a contender's kernels, write nothing")
    args = parser.parse_args()
    if unknown := set(args.contenders.split(",")) - set(ALL):
        parser.error(f"no such contenders: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    return args


def main() -> None:
    args = arguments()
    wanted = args.contenders.split(",")
    revision = args.commit or commit()
    path, rows = Path(args.folder) / f"{args.name}.json", []
    for preset in args.presets.split(","):
        model = load_config(str(Path(__file__).parents[2] / "configs" / "models" / f"{preset}.yaml"), []).model
        moe, hidden = model.moe, model.hidden_size
        if args.tiny:
            moe, hidden = MoEConfig(16, top_k=4, expert_ffn_size=48), 64
        for tokens in (64, 256) if args.tiny else map(int, args.tokens.split(",")):
            case = make(moe, hidden, tokens, args.skew, args.device)
            if args.profile:
                show_profile(case, args.profile)
                continue
            load = case.index.flatten().bincount(minlength=moe.num_experts)
            balance = {"max_over_mean_load": float(load.max() / load.float().mean()), "idle": int((load == 0).sum())}
            where = {"preset": preset, "tokens": tokens, "hidden": hidden, "experts": moe.num_experts}
            where |= {"top_k": moe.top_k, "ffn": moe.expert_ffn_size} | balance
            new = [where | row for row in measure(case, wanted, args.turns)]
            rows += new
            print(table(new), flush=True)
            write(path, rows, args.device, args.skew, revision)


if __name__ == "__main__":
    main()
