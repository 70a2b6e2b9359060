#!/usr/bin/env python3
"""Speed and memory of presets' training steps in several parallel layouts on this machine's GPUs.

    single           one GPU
    tp2              tensor parallel, also in experts; activations between tensor-parallel regions split by tokens
    tp2_ep2          as tp2, but with whole experts, half of them on each rank
    pp2              two pipeline stages, cut as `plan` cuts them
    pp2_even         two pipeline stages with equally many layers
    pp2_flops        two pipeline stages, the first with three quarters of the layers, where FLOPs are about equal
    pp2_interleaved  two pipeline stages with two chunks of layers each
    ep2              half of the experts on each rank, the rest data parallel, distributed optimizer, overlapped
    ep2_alltoall     as ep2, with each token sent to the ranks of its experts
    dp2_plain        data parallel, every rank with the whole optimizer
    dp2              data parallel, distributed optimizer, reduction and gather overlapped
NAME@N is layout NAME with a global batch of N sequences instead of the preset's.

A step is the trainer's: forward, backward, reduction, clipping and optimizer, on random tokens. Every layout gets the
same weights and the same global batch, so that losses and gradient norms of all steps must agree (`*_difference`: the
largest relative difference of any step from `single`). `ms` is the median step after --warmup. By rank, `peak_gib` is
the most memory that PyTorch's allocator had allocated in these steps, `build_gib` the memory allocated before the first
step, and `plan_gib` the total that `plan` predicts. `device_gib` is all used memory of the device at the end, with
NCCL's buffers, the CUDA context and the allocator's cache.

The runs on one GPU go side by side, each on a GPU of its own. All other layouts run one after the other in one
torchrun. It is restarted after a layout that leaves memory allocated (`left_gib`), and after a layout that fails or
takes longer than --timeout, without this layout; out of memory, the layout is tried again with half the micro-batch. A
layout that does not fit according to `plan` is left out, and its row says so.

    python scripts/bench/parallel.py
    python scripts/bench/parallel.py --device cpu --tiny --folder /tmp
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform as machine
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import launcher
import torch
import torch.distributed as dist
from launcher import GIB, LEFT_GIB, ROOT, STARTED, TINY, end_groups, gpu_name, planned_gib, run, start_peak, used_gib
from pretrain import commit, versions

from linear_moe.checks.validate import validate
from linear_moe.config.load import load_config
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.flops import flops_per_token
from linear_moe.plan.memory import STATE

LAYOUTS: dict[str, tuple[str, ...]] = {
    "single": (),
    "tp2": ("parallel.tensor=2", "parallel.expert_tensor=2"),
    "pp2": ("parallel.pipeline=2",),
    "ep2": ("parallel.expert=2", "optimizer.overlap=true"),
    "ep2_alltoall": ("parallel.expert=2", "optimizer.overlap=true", "model.moe.dispatcher=alltoall"),
    "dp2": ("optimizer.overlap=true",),
    "dp2_plain": ("optimizer.distributed=false",),
    "tp2_ep2": ("parallel.tensor=2", "parallel.expert=2"),
    "pp2_even": ("parallel.pipeline=2", "parallel.pipeline_layers=[{half},{half}]"),
    "pp2_flops": ("parallel.pipeline=2", "parallel.pipeline_layers=[{most},{least}]"),
    "pp2_interleaved": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
}


@dataclass(frozen=True)
class Job:
    """Measurement of one layout of one preset."""

    preset: str
    layout: str
    micro_batch: int
    global_batch: int
    warmup: int
    iterations: int
    overrides: tuple[str, ...]

    @property
    def ranks(self) -> int:
        return 1 if self.layout == "single" else 2

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.layout}-{self.micro_batch}-{self.global_batch}"

    def config(self) -> Config:
        """Makes the job's configuration; raises ConfigError if it is invalid on the job's ranks."""
        path = ROOT / "configs" / "models" / f"{self.preset}.yaml"
        common = ["data.corpus=synthetic", "run=unused", "schedule.type=constant", "schedule.warmup_steps=0",
                  "optimizer.lr=1e-4", f"training.micro_batch={self.micro_batch}", *self.overrides,
                  f"training.global_batch={self.global_batch}",
                  f"training.steps={self.warmup + self.iterations}"]  # fmt: skip
        layers = load_config(path, common).model.num_layers
        sizes = {"half": layers // 2, "most": layers * 3 // 4, "least": layers - layers * 3 // 4}
        config = load_config(path, [*common, *(text.format(**sizes) for text in LAYOUTS[self.layout])])
        validate(config, self.ranks, files=False)
        return config


# -- a rank ------------------------------------------------------------------------------------------------------------
def too_big(config: Config, job: Job) -> str | None:
    """Reason for which this device cannot hold a rank, according to `plan`; None if it can."""
    if not torch.cuda.is_available():
        return None
    capacity = torch.cuda.get_device_properties(0).total_memory / GIB
    totals = [planned_gib(config, job.ranks, stage)["total"] for stage in range(config.parallel.pipeline)]
    return f"needs {max(totals):.1f} of {capacity:.1f} GiB by plan" if max(totals) > capacity else None


def steps_of(config: Config, job: Job, groups: Any) -> dict[str, Any]:
    """Builds this rank's part of the model, trains, and returns times, losses and memory."""
    from linear_moe.training.build import build_model
    from linear_moe.training.data import TrainLoader, prepare_data
    from linear_moe.training.optimizer.build import build_optimizer
    from linear_moe.training.optimizer.schedule import learning_rate, set_learning_rate
    from linear_moe.training.step import Stepper
    from linear_moe.training.supervision.faults import StopSignal
    from linear_moe.training.supervision.watch import mark

    model = build_model(config, vocab_size(config), groups)
    optimizer = build_optimizer(model, config)
    build = used_gib()
    stepper = Stepper(config, model, optimizer, groups.device, StopSignal())
    batches = TrainLoader(prepare_data(config), config, groups.data_rank, groups.data_size)
    seconds, losses, norms = [], [], []
    for step in range(1, config.training.steps + 1):
        mark(job.name, step)
        if step == job.warmup + 1:
            start_peak()
        set_learning_rate(optimizer, learning_rate(step, config))
        begin = time.perf_counter()
        result = stepper.train(batches)  # ends with every rank's sum of losses on the host
        seconds.append(time.perf_counter() - begin)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    used = used_gib()
    plan = planned_gib(config, job.ranks, groups.stage)
    return {
        "stage": groups.stage,
        "chunks": [list(chunk.module.layers) for chunk in model],
        "seconds": seconds,
        "losses": losses,
        "gradient_norms": norms,
        "build_gib": build["allocated"],
        "build_peak_gib": build["peak"],
        "peak_gib": used["peak"],
        "device_gib": used["device"],
        "plan": plan,
    }


def measure(job: Job) -> dict[str, Any]:
    """Measures one layout on this rank. Collective.

    Afterwards, model, optimizer and all process groups but the default one are destroyed.
    """
    from linear_moe.training import parallel

    began = time.perf_counter()
    config = job.config()
    if (reason := too_big(config, job)) is not None:
        return {"skipped": reason}
    start_peak()
    result = steps_of(config, job, parallel.initialize_groups(config))
    trained = time.perf_counter()
    result["left_gib"] = end_groups()
    result["total_seconds"], result["end_seconds"] = trained - began, time.perf_counter() - trained
    return result


def work(folder: Path) -> None:
    """Does all jobs of `folder`/jobs.json, one after the other; each rank writes FOLDER/NAME.RANK.json."""
    from linear_moe.training import platform
    from linear_moe.training.supervision import watch

    platform.install()
    rank = int(os.environ.get("RANK", 0))
    jobs = [
        Job(**{**job, "overrides": tuple(job["overrides"])}) for job in json.loads((folder / "jobs.json").read_text())
    ]
    with watch.watching(replace(jobs[0].config(), run=str(folder / "run"))):
        for job in jobs:
            result = measure(job)
            part = folder / f"{job.name}.{rank}.part"
            part.write_text(json.dumps(result))
            part.rename(folder / f"{job.name}.{rank}.json")
            left: list[Any] = [None] * job.ranks
            dist.all_gather_object(left, result.get("left_gib", 0.0))
            if torch.cuda.is_available() and max(left) > LEFT_GIB:
                break
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


# -- the launcher ------------------------------------------------------------------------------------------------------
class Group(launcher.Group):
    script = __file__

    def after_failure(self, job: Any, memory: bool) -> None:
        """Tries a job that ran out of memory again with half the micro-batch."""
        if memory and job.micro_batch > 1:
            self.left.insert(0, replace(job, micro_batch=job.micro_batch // 2))

    def report(self, job: Any, results: Any) -> None:
        """Prints a line about a job that has ended."""
        text = (
            f"{1e3 * median(job, results[0]):.1f} ms"
            if isinstance(results, list) and "seconds" in results[0]
            else results
        )
        if isinstance(results, list) and "seconds" in results[0]:
            first = results[0]
            peak, plan = max(r["peak_gib"] for r in results), max(r["plan"]["total"] for r in results)
            text += f", peak {peak:.2f} GiB, plan {plan:.2f}"
            text += f", first step {first['seconds'][0]:.1f} s"
            text += f", all {first['total_seconds']:.1f} + {first['end_seconds']:.1f} s"
        elif isinstance(results, dict):
            text = f"{results['failed']}\n{results['log'][-3000:]}"
        print(f"[{time.monotonic() - STARTED:5.0f} s] {job.name}: {text}", flush=True)


def median(job: Job, rank: dict[str, Any]) -> float:
    return statistics.median(rank["seconds"][job.warmup :])


# -- results -----------------------------------------------------------------------------------------------------------
def row_of(job: Job, results: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"preset": job.preset, "layout": job.layout, "gpus": job.ranks}
    config = job.config()
    training, model = config.training, config.model
    row |= {"mixer": model.mixer.type, "pattern": model.pattern, "dtype": training.dtype, "layers": model.num_layers}
    row |= {"sequence_length": training.sequence_length, "micro_batch": training.micro_batch}
    row |= {"global_batch": training.global_batch, "overrides": [*job.overrides, *LAYOUTS[job.layout]]}
    if isinstance(results, dict):
        return row | {"failed": results["failed"]}
    if "skipped" in results[0]:
        return row | results[0]
    seconds = median(job, results[0])
    tokens = training.global_batch * training.sequence_length
    fullest = max(results, key=lambda rank: rank["peak_gib"])
    state = [sum(rank["plan"][kind] for kind in STATE) for rank in results]
    return row | {
        "ms": 1e3 * seconds,
        "ms_of_steps": [1e3 * s for s in results[0]["seconds"]],
        "tokens_per_second_per_gpu": tokens / seconds / job.ranks,
        "tflops_per_gpu": tokens * flops_per_token(config) / seconds / job.ranks / 1e12,
        "peak_gib": [rank["peak_gib"] for rank in results],
        "plan_gib": [rank["plan"]["total"] for rank in results],
        "plan_over_measured": [rank["plan"]["total"] / rank["peak_gib"] for rank in results],
        "fullest_gib": fullest["peak_gib"],
        "plan_over_fullest": max(rank["plan"]["total"] for rank in results) / fullest["peak_gib"],
        "state_gib": [rank["build_gib"] for rank in results],
        "plan_state_gib": state,
        "plan_by_kind_gib": [rank["plan"] for rank in results],
        "build_peak_gib": [rank["build_peak_gib"] for rank in results],
        "device_gib": [rank["device_gib"] for rank in results],
        "left_gib": [rank["left_gib"] for rank in results],
        "layers_of_stages": [rank["chunks"] for rank in results],
        "losses": results[0]["losses"],
        "gradient_norms": results[0]["gradient_norms"],
        "seconds": results[0]["total_seconds"],
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its speed-up, and the differences of losses and norms, from `single` with the same batches."""

    def batches(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["preset"], row["global_batch"]  # one GPU may need smaller micro-batches

    singles = {batches(row): row for row in rows if row["layout"] == "single" and "ms" in row}
    for row in rows:
        single = singles.get(batches(row))
        if "ms" in row and single is not None:
            row["speed_up"] = single["ms"] / row["ms"]
            for name, key in (("loss", "losses"), ("norm", "gradient_norms")):
                pairs = zip(row[key], single[key], strict=True)
                row[f"{name}_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)


COLUMNS = {
    "micro_batch": ("micro batch", "d"),
    "global_batch": ("global batch", "d"),
    "ms": ("ms", ".1f"),
    "speed_up": ("x single", ".2f"),
    "tokens_per_second_per_gpu": ("tokens/s/GPU", ",.0f"),
    "tflops_per_gpu": ("TFLOP/s/GPU", ".0f"),
    "fullest_gib": ("peak GiB", ".2f"),
    "plan_over_fullest": ("plan / peak", ".3f"),
    "loss_difference": ("loss", ".1e"),
    "norm_difference": ("gradient norm", ".1e"),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as a Markdown table; memory is that of the fullest rank."""
    lines = ["| preset | layout | " + " | ".join(title for title, _ in COLUMNS.values()) + " | GiB by rank (plan) |"]
    lines.append("|---|---|" + "---:|" * len(COLUMNS) + "---|")
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, (_, form) in COLUMNS.items()]
        pairs = zip(row.get("peak_gib", []), row.get("plan_gib", []), strict=True)
        last = ", ".join(f"{peak:.2f} ({plan:.2f})" for peak, plan in pairs)
        last = row.get("skipped") or row.get("failed") or last
        lines.append(f"| {row['preset']} | {row['layout']} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines) + "\n"


def write(path: Path, groups: list[Group], revision: str, cuda: bool) -> None:
    rows = [row_of(job, results) for group in groups for job, results in group.results.items()]
    order = list(LAYOUTS)
    rows.sort(key=lambda row: (row["preset"], row["global_batch"], order.index(row["layout"])))
    compare(rows)
    result = {
        "name": path.stem,
        "device": gpu_name() if cuda else machine.processor() or "cpu",
        "gpus": max((row["gpus"] for row in rows), default=0),
        **versions(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "PYTORCH_CUDA", "CUDA_DEVICE_MAX"))
        },
        "commit": revision,
        "command": shlex.join(["scripts/bench/parallel.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="a.b=c, for all presets and layouts")
    presets = "files of configs/models, with the sequences of a micro-batch and of a step over all ranks"
    parser.add_argument("--presets", default="a0.3b_2b:8:64,a1b_7b:4:32", help=presets)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="NAME or NAME@N, in the order in which they run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--iterations", type=int, default=7, help="measured steps")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one layout")
    parser.add_argument("--seconds", type=float, default=1800, help="for everything; jobs not done then are left out")
    parser.add_argument("--name", default="parallel_2gpu", help="FOLDER/NAME.json and .md")
    parser.add_argument("--folder", default="docs/results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--commit", help="default: $COMMIT, or git's HEAD")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if unknown := {layout.partition("@")[0] for layout in args.layouts.split(",")} - set(LAYOUTS):
        parser.error(f"no such layouts: {', '.join(sorted(unknown))}; there are {', '.join(LAYOUTS)}")
    args.jobs = [] if args.worker else jobs_of(args)
    return args


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Makes the jobs, layout by layout, so that the least important layouts come last and may remain undone."""
    # The trainer's own timeout comes before the launcher's, so that the log names a rank that hangs.
    named = f"training.timeout_minutes={0.8 * args.timeout / 60:g}"
    overrides = (*(TINY if args.tiny else ()), named, *args.overrides)
    presets = [(name, *map(int, sizes)) for name, *sizes in (p.split(":") for p in args.presets.split(","))]
    layouts = [(name, int(size or 0)) for name, _, size in (x.partition("@") for x in args.layouts.split(","))]
    jobs = [
        Job(preset, layout, micro_batch, size or global_batch, args.warmup, args.iterations, overrides)
        for layout, size in layouts
        for preset, micro_batch, global_batch in presets
    ]
    for job in jobs:
        job.config()  # raises ConfigError before any job runs
    return jobs


def main() -> None:
    args = arguments()
    if args.worker is not None:
        work(args.worker)
        return
    jobs, revision, path = args.jobs, args.commit or commit(), Path(args.folder) / f"{args.name}.json"
    cuda = args.device == "cuda"
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    end = STARTED + args.seconds
    by_preset: dict[str, list[Job]] = {}
    for job in (job for job in jobs if job.ranks == 1):
        by_preset.setdefault(job.preset, []).append(job)
    alone = [Group(singles, str(i % 2) if cuda else None, args.timeout) for i, singles in enumerate(by_preset.values())]
    together = Group([job for job in jobs if job.ranks > 1], None, args.timeout)
    for i in range(0, len(alone), 2):  # two at a time, each with a GPU of its own
        run(alone[i : i + 2], end - time.monotonic())
    write(path, alone, revision, cuda)
    run([together], end - time.monotonic())
    write(path, [*alone, together], revision, cuda)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
