#!/usr/bin/env python3
"""Speed of sequence parallelism on two GPUs beside the same work without it, and speed over length on one GPU.

A case is NAME[:LAYOUT/...]@LENGTH[xROWS]/...[+a.b=c...], with lengths in tokens per GPU (32K, 1M) and overrides. NAME
is a mixer in all layers, `hybrid` (the preset's LLLN) or `softmax`, and a layout is
    sp2      one sequence of twice LENGTH, shared out over two GPUs
    dp2      two sequences of LENGTH, one on each GPU: the same tokens, gradients and optimizer shards per GPU
    single   one sequence of LENGTH on one GPU, which holds the whole optimizer
A micro-batch has ROWS sequences (default: 1). NAME `layer` is one Gated DeltaNet layer; sequence_layer.py lists its
layouts. `speed`, `layer` and `lengths` stand for lists of cases (CASES below). A case without a layout is measured in
sp2 and dp2, or in most layouts of a layer.

A step is the trainer's: forward, backward, reduction, clipping and optimizer, on random tokens, with one micro-batch a
step and the distributed optimizer, overlapped. Layers are recomputed as --recompute says, and logits are computed in
blocks of the vocabulary. All lengths of a model in one layout are measured one after the other on the same weights.
After the warm-up, one to ten steps of about --budget seconds are measured; `ms` is their median. By rank, `peak_gib` is
the most memory that PyTorch's allocator had allocated, `state_gib` the part of weights, gradients and optimizer;
`mib_per_1k_tokens` is the rest. --profile traces one more step of sp2. Of the time of NCCL's kernels, by purpose,
`hidden` is the share beside which computation ran, and `exposed` is the rest as a share of the step; both include
waiting for the other GPU. For the sequence's messages, `transfer_ms` and the share of it that computation hides
(`transfer_hidden`, of the GPU with the smaller share) do not include waiting.

A layout that runs out of memory is tried again with half its ROWS; if it has one row, longer lengths are not tried.
Jobs that need more than --slack times the memory, according to `plan`, are left out. Results are written again whenever
a job is done.

    python scripts/bench/sequence.py speed --profile 32K,128K --seconds 500
    python scripts/bench/sequence.py gla:sp2@128K+parallel.sequence_exchange=ring layer:ours/fla@64K --name more
    python scripts/bench/sequence.py --merge sequence_gpu.json more.json --plot
    python scripts/bench/sequence.py --device cpu --tiny --folder /tmp gla@64 hybrid@64 layer@64
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform as machine
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import launcher as bench
import torch
import torch.distributed as dist
from overlap import profile
from pretrain import commit, versions
from sequence_tables import SAID, compare, merge, plot, row_of, tables

from linear_moe.checks.validate import validate
from linear_moe.config.load import load_config
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.mixers.registry import MIXERS

LAYOUTS = {
    "single": (),
    "dp2": ("optimizer.overlap=true",),
    "sp2": ("optimizer.overlap=true", "parallel.sequence=2"),
}
WAYS = ("alone", "ours", "fla", "fla_padded", "ulysses")  # layouts of NAME `layer`
SPEED = ("linear_attention", "gla", "mamba2", "gated_deltanet", "hybrid")
CASES = {
    "speed": [f"{name}:sp2/dp2/single@32K/64K/128K/256K/512K" for name in SPEED],
    "layer": ["layer@32K/64K/128K/256K"],
    "lengths": [f"{name}:single@2Kx256/16Kx32/128Kx4/512K" for name in (*SPEED[:-1], "softmax")],
}
LONG = 20  # a step of so many seconds is measured without a warm-up, unless it is the model's first
STEPS = 10  # largest number of measured steps


@dataclass(frozen=True)
class Job:
    """Measurement of one length of a case in one layout.

    Attributes:
        overrides: overrides of the case.
        common: overrides of all jobs.
    """

    model: str
    layout: str
    length: int
    rows: int
    overrides: tuple[str, ...]
    common: tuple[str, ...]
    preset: str
    budget: float
    slack: float
    profile: bool

    @property
    def ranks(self) -> int:
        return 1 if self.layout == "single" else 2

    @property
    def key(self) -> tuple[Any, ...]:
        """Key of jobs that use the same model or, for a layer, the same process groups."""
        return self.model, None if self.model == "layer" else self.layout, self.overrides

    @property
    def name(self) -> str:
        sizes = f"{self.model}-{self.layout}-{self.length}x{self.rows}"
        return re.sub(r"[^\w.=-]+", "_", "+".join((sizes, *self.overrides)))

    def config(self) -> Config:
        """Makes the job's configuration; raises ConfigError if it is invalid on the job's ranks."""
        path = bench.ROOT / "configs" / "models" / f"{self.preset}.yaml"
        layers = load_config(path, self.common).model.num_layers
        pattern = {"hybrid": f"LLLN * {layers // 4}", "softmax": f"N * {layers}"}.get(self.model, f"L * {layers}")
        mixer = (f"model.mixer.type={self.model}",) if self.model in MIXERS else ()
        shared = self.layout not in ("single", "dp2")
        sizes = (
            f"training.sequence_length={self.length * (2 if shared else 1)}",
            f"training.micro_batch={self.rows}",
            f"training.global_batch={self.rows * (2 if self.layout == 'dp2' else 1)}",
        )
        layout = LAYOUTS.get(self.layout, LAYOUTS["sp2"])
        everywhere = "parallel.sequence_pieces="
        own = tuple(x for x in self.overrides if shared or x.startswith(everywhere) or not x.startswith("parallel."))
        config = load_config(path, [*self.common, f"model.pattern={pattern}", *mixer, *layout, *sizes, *own])
        validate(config, self.ranks, files=False)
        return config


# -- a rank ------------------------------------------------------------------------------------------------------------
@dataclass
class Trial:
    """Process groups, model and optimizer on this rank, which all jobs with one `key` use."""

    job: Job
    groups: Any
    model: list[Any] = field(default_factory=list)
    optimizer: Any = None
    groups_named: frozenset[str] = frozenset()
    state_gib: float = 0.0
    steps: int = 0

    @classmethod
    def begin(cls, job: Job, config: Config) -> Trial:
        from linear_moe.training import parallel
        from linear_moe.training.build import build_model
        from linear_moe.training.optimizer.build import build_optimizer

        trial = cls(
            job,
            parallel.initialize_groups(config),
            groups_named=frozenset(dist.distributed_c10d._world.pg_names.values()),
        )
        if job.model != "layer":
            trial.model = build_model(config, vocab_size(config), trial.groups)
            trial.optimizer = build_optimizer(trial.model, config)
            trial.state_gib = bench.used_gib()["allocated"]
        return trial

    def purposes(self, line: Any) -> dict[str, str]:
        """Purpose of each process group, by name; groups made after the start belong to the exchange of sequences."""
        from megatron.core import parallel_state as ps

        made = set(dist.distributed_c10d._world.pg_names.values()) - self.groups_named
        reducing = (ps.get_data_parallel_group(with_context_parallel=True), ps.get_expert_data_parallel_group())
        gradients = {group.group_name: "gradients" for group in reducing}
        return gradients | dict.fromkeys([*made, line.group.group_name], "sequence")

    def end(self) -> float:
        """Destroys model and process groups; returns the most GiB left allocated on any rank. Collective."""
        self.model, self.optimizer = [], None
        left = torch.tensor(bench.end_groups())
        left = left.cuda() if torch.cuda.is_available() else left
        dist.all_reduce(left, dist.ReduceOp.MAX)
        return float(left)


def agreed(count: float) -> int:
    """Broadcasts rank 0's `count` to all ranks. Collective."""
    value = torch.tensor(count, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.broadcast(value, 0)
    return int(value)


def steps_of(trial: Trial, job: Job, config: Config, folder: Path) -> dict[str, Any]:
    from linear_moe.training.data import TrainLoader, prepare_data
    from linear_moe.training.optimizer.schedule import learning_rate, set_learning_rate
    from linear_moe.training.step import Stepper
    from linear_moe.training.supervision.faults import StopSignal
    from linear_moe.training.supervision.watch import mark

    groups, optimizer = trial.groups, trial.optimizer
    stepper = Stepper(config, trial.model, optimizer, groups.device, StopSignal())
    data = (groups.data_rank, groups.data_size)
    batches = TrainLoader(prepare_data(config), config, *data, sequence_rank=groups.sequence_rank)
    seconds: list[float] = []
    losses: list[float] = []

    def step() -> float:
        mark(job.name, len(seconds) + 1)
        set_learning_rate(optimizer, learning_rate(1, config))
        begin = time.perf_counter()
        result = stepper.train(batches)  # ends with every rank's sum of losses on the host
        seconds.append(time.perf_counter() - begin)
        losses.append(result.loss)
        return seconds[-1]

    bench.start_peak()
    step()
    if agreed(trial.steps == 0):
        step()
    warmup = 0 if agreed(seconds[-1] > LONG and trial.steps > 0) else len(seconds)
    if warmup:
        bench.start_peak()
        while agreed(len(seconds) < warmup + STEPS and sum(seconds[warmup:]) < job.budget):
            step()
    trial.steps += len(seconds)
    result = {"seconds": list(seconds), "warmup": warmup, "losses": list(losses), "peak_gib": bench.used_gib()["peak"]}
    result["state_gib"] = trial.state_gib
    if job.profile and stepper.line is not None:
        path = folder / f"trace.{groups.rank}.json"
        result["overlap"] = profile(step, trial.purposes(stepper.line), path)
        path.unlink()
    return result


def measure(trial: Trial | None, job: Job, folder: Path) -> tuple[Trial | None, dict[str, Any]]:
    """Does one job on this rank; returns the trial for the next job with the same key, and the result. Collective."""
    began, config = time.perf_counter(), job.config()
    plan: dict[str, Any] = {}
    if job.model != "layer":
        plan = {"plan_gib": bench.planned_gib(config, job.ranks, 0)["total"]}
        if torch.cuda.is_available():
            capacity = torch.cuda.get_device_properties(0).total_memory / bench.GIB
            if plan["plan_gib"] > job.slack * capacity:
                return trial, plan | {"skipped": f"needs {plan['plan_gib']:.0f} of {capacity:.0f} GiB by plan"}
    trial = trial or Trial.begin(job, config)
    if job.model == "layer":
        import sequence_layer  # imports Megatron-Core

        result = sequence_layer.measure(config, job.layout, trial.groups.device, job.budget)
    else:
        result = steps_of(trial, job, config, folder)
    return trial, plan | result | {"total_seconds": time.perf_counter() - began}


def work(folder: Path) -> None:
    """Does all jobs of `folder`/jobs.json, one after the other; each rank writes FOLDER/NAME.RANK.json."""
    from linear_moe.training import platform
    from linear_moe.training.supervision import watch

    platform.install()
    rank, cuda = int(os.environ.get("RANK", 0)), torch.cuda.is_available()
    jobs = [
        Job(**job | {k: tuple(job[k]) for k in ("overrides", "common")})
        for job in json.loads((folder / "jobs.json").read_text())
    ]
    trial: Trial | None = None
    with watch.watching(replace(jobs[0].config(), run=str(folder / "run"))):
        for job in jobs:
            if trial is not None and trial.job.key != job.key:
                left, trial = trial.end(), None
                if cuda and left > bench.LEFT_GIB:
                    break
            trial, result = measure(trial, job, folder)
            part = folder / f"{job.name}.{rank}.part"
            part.write_text(json.dumps(result))
            part.rename(folder / f"{job.name}.{rank}.json")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


# -- the launcher ------------------------------------------------------------------------------------------------------
class Group(bench.Group):
    """Group of jobs that calls `saved()` whenever a job has ended, with the rows to save in `rows`."""

    script = __file__

    def __init__(self, jobs: list[Job], devices: str | None, timeout: float, saved: Callable[[], None]):
        super().__init__(jobs, devices, timeout)
        self.saved, self.rows = saved, list[dict[str, Any]]()

    def after_failure(self, job: Job, memory: bool) -> None:
        if memory and job.rows > 1:
            self.left.insert(0, replace(job, rows=job.rows // 2))
            return
        case = (job.key, job.layout)
        for longer in [
            waiting for waiting in self.left if (waiting.key, waiting.layout) == case and waiting.length >= job.length
        ]:
            self.left.remove(longer)
            why = "out of memory" if memory else self.results[job]["failed"]
            self.results[longer] = {"failed": f"{why} at a shorter length", "log": ""}
            self.report(longer, self.results[longer])

    def report(self, job: Job, results: Any) -> None:
        row, log = row_of(job, results), ""
        if isinstance(results, dict) and results["failed"] != "no time left":
            log = "\n" + results["log"][-3000:]
        told = {k: v for k, v in row.items() if k in SAID}
        print(f"[{time.monotonic() - bench.STARTED:5.0f} s] {job.name}: {json.dumps(told)} {log}", flush=True)
        self.rows.append(row)
        self.saved()


def header(path: Path, cuda: bool, revision: str) -> dict[str, Any]:
    return {
        "name": path.stem,
        "device": bench.gpu_name() if cuda else machine.processor() or "cpu",
        **versions(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "PYTORCH_CUDA", "CUDA_DEVICE_MAX"))
        },
        "commit": revision,
        "command": shlex.join(["scripts/bench/sequence.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON, and its tables as Markdown."""
    result["rows"].sort(key=lambda row: (row["model"], row["overrides"], row["length"], row["layout"]))
    compare(result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(result["rows"]))


def tokens(text: str) -> int:
    """Parses a number of tokens: 32K -> 32768."""
    match = re.fullmatch(r"(\d+)([KM]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no length such as 2048, 32K or 1M")
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]]


def jobs_of(text: str, args: argparse.Namespace, common: tuple[str, ...]) -> list[Job]:
    """Makes the jobs of one case."""
    front, at, rest = text.partition("@")
    lengths, *overrides = rest.split("+")
    name, _, given = front.partition(":")
    allowed = WAYS if name == "layer" else tuple(LAYOUTS)
    layouts = given.split("/") if given else [x for x in allowed if x not in ("single", "fla_padded")]
    if not at or name not in (*MIXERS, "hybrid", "softmax", "layer") or (unknown := set(layouts) - set(allowed)):
        known = f"layouts are {', '.join(allowed)}" if at and unknown else "names are mixers, hybrid, softmax, layer"
        raise argparse.ArgumentTypeError(f"{text!r} is no case; {known}")
    sizes = [(tokens(size), int(rows or 1)) for size, _, rows in (x.partition("x") for x in lengths.split("/"))]
    traced = {tokens(x) for x in args.profile.split(",") if x}
    # All layouts of a layer are measured at one length before the next length; a model in one layout at all lengths.
    pairs = (
        [(x, size) for size in sizes for x in layouts]
        if name == "layer"
        else [(x, size) for x in layouts for size in sizes]
    )
    return [
        Job(
            name, x, n, rows, tuple(overrides), common, args.preset, args.budget, args.slack, x == "sp2" and n in traced
        )
        for x, (n, rows) in pairs
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="cases, names of lists of cases, and a.b=c for all cases")
    parser.add_argument("--preset", default="a0.3b_2b", help="file of configs/models")
    parser.add_argument("--layers", type=int, help="number of layers in place of the preset's, recorded in every row")
    parser.add_argument("--recompute", default="full", choices=("none", "full"), help="recomputed layers")
    parser.add_argument("--profile", default="", help="lengths at which sp2 is traced: 32K,128K")
    parser.add_argument("--budget", type=float, default=5, help="seconds of the measured steps of a job")
    parser.add_argument(
        "--slack", type=float, default=1.1, help="leave out jobs that need this times the memory, by plan"
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one case at one length")
    parser.add_argument("--seconds", type=float, default=1800, help="for everything; jobs not done then are left out")
    parser.add_argument("--name", default="sequence_gpu", help="FOLDER/NAME.json and .md")
    parser.add_argument("--folder", default="docs/results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--commit", help="default: $COMMIT, or git's HEAD")
    parser.add_argument(
        "--merge", nargs="+", type=Path, default=[], help="measure nothing: merge the rows of these JSON files"
    )
    parser.add_argument("--plot", action="store_true", help="measure nothing: draw FOLDER/NAME_*.svg (after --merge)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    try:
        args.jobs = all_jobs(args)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return args


def all_jobs(args: argparse.Namespace) -> list[Job]:
    layers = () if args.layers is None else (f"model.num_layers={args.layers}", f"model.pattern=L * {args.layers}")
    named = (f"training.timeout_minutes={0.8 * args.timeout / 60:g}", f"training.steps={STEPS + 3}", "run=unused",
             "data.corpus=synthetic", "schedule.type=constant", "schedule.warmup_steps=0", "optimizer.lr=1e-4",
             f"training.recompute={'full' if args.recompute == 'full' else 'selective'}",
             "training.recompute_modules=[logits]")  # fmt: skip
    cases = [text for text in args.cases if "@" in text or "=" not in text]
    given = tuple(text for text in args.cases if text not in cases)
    common = (*named, *(bench.TINY if args.tiny else ()), *layers, *given)
    expanded = [case for text in cases for case in CASES.get(text, [text])]
    jobs = list(dict.fromkeys(job for case in expanded for job in jobs_of(case, args, common)))
    for job in jobs:
        job.config()  # raises ConfigError before any job runs
    return jobs


def run(args: argparse.Namespace, path: Path) -> None:
    jobs, cuda = args.jobs, args.device == "cuda"
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    top = header(path, cuda, args.commit or commit())
    groups: list[Group] = []

    def saved() -> None:
        write(path, top | {"rows": [row for group in groups for row in group.rows]})

    both = Group([job for job in jobs if job.ranks > 1], None, args.timeout, saved)
    alone = [job for job in jobs if job.ranks == 1]
    devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(
        ","
    )
    keys, gpus = list(dict.fromkeys(job.key for job in alone)), len(devices)
    split = [[job for job in alone if keys.index(job.key) % gpus == i] for i in range(gpus)]
    groups += [both, *(Group(part, devices[i] if cuda else None, args.timeout, saved) for i, part in enumerate(split))]
    for together in ([both], groups[1:]):  # jobs on one GPU run side by side
        bench.run(together, args.seconds - (time.monotonic() - bench.STARTED))
    saved()


def main() -> None:
    args = arguments()
    if args.worker is not None:
        work(args.worker)
        return
    path = Path(args.folder) / f"{args.name}.json"
    if args.merge:
        write(path, merge([json.loads(part.read_text()) for part in args.merge], path.stem))
    elif not args.plot:
        run(args, path)
    if args.plot:
        for written in plot(json.loads(path.read_text()), path):
            print(written)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
