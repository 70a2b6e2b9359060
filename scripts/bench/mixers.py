#!/usr/bin/env python3
"""Speed of every mixer beside its bare op and its projections, on one GPU, as docs/results/NAME.{json,md}.

Columns, in milliseconds of one forward and backward pass (CUDA events, median):
    mixer        the whole mixer: gradients of its input and of every parameter
    op           the mixer's calls of flash-linear-attention's kernels, replayed with the same tensors; equal to
                 `recurrence` for mixers without such calls
    recurrence   `mixer.recurrence` (`mix` for attention), replayed with the same tensors: op, and our op's overhead
    projections  all Linear layers of the mixer on inputs of the same sizes
    overhead     mixer - op - projections
`*_busy` columns have the time in which kernels ran, without the gaps between them (torch.profiler).
first_step_seconds ends with the first forward and backward pass. For a mixer's first shape it begins with the mixer's
process, which is forked after torch has been imported, and includes imports, building, compiling and tuning; for later
shapes it begins with building. The first steps of --together mixers run side by side and compete for the CPU; then one
mixer at a time measures.

    python scripts/bench/mixers.py                           # every mixer, B8 T2048 and B1 T32768
    python scripts/bench/mixers.py --mixers gla,mamba2 --update
    python scripts/bench/mixers.py --profile gla             # kernels of gla, longest first
    python scripts/bench/mixers.py --device cpu --tiny --folder /tmp
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import multiprocessing
import multiprocessing.connection
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from pretrain import commit, versions
from torch import Tensor, nn

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.base import LinearMixer, Mixer
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class, mixer_config
from linear_moe.modeling.ops import backends
from linear_moe.modeling.tokens import TokenLayout

Work = Callable[[], Any]
"""Function that runs one forward and backward pass."""


@dataclass(frozen=True)
class Setting:
    device: torch.device
    hidden: int
    heads: int
    shapes: tuple[tuple[int, int], ...]
    repeats: int


def setting(device: str, tiny: bool, shapes: str | None, repeats: int) -> Setting:
    sizes = shapes or ("2x96,1x128" if tiny else "8x2048,1x32768")
    pairs = tuple((int(b), int(t)) for b, t in (size.split("x") for size in sizes.split(",")))
    return Setting(torch.device(device), *((64, 4) if tiny else (1024, 8)), pairs, repeats)


def build(name: str, at: Setting) -> Mixer:
    """Builds a mixer with its default config, in bf16, as the second of 24 layers.

    rwkv7 is built as the first layer, without value residual.
    """
    host = Host(dtype=torch.bfloat16, device=at.device)
    dims = Dims(at.hidden, at.heads, 24, 1, norm_eps=1e-5, init_std=0.02, output_init_std=0.02 / 48**0.5)
    cls, config = mixer_class(name), mixer_config(name)
    cls.validate(config, dims, 1, "model.mixer")
    if cls.crossing(config, dims):
        dims = Dims(**{**vars(dims), "layer": 0})  # a later layer would read the tensors of the run before
    mixer = cls(config, dims, host)
    initialize(mixer, host, seed=0)
    return mixer


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def fresh(value: Any) -> Any:
    """Copies a nested value; tensors become leaves that require gradients where the originals did."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: fresh(item) for key, item in value.items()}
    return type(value)(map(fresh, value)) if isinstance(value, list | tuple) else value


def work(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Work:
    """Makes a pass of `function`: forward, and backward from its first output to all tensors among the arguments."""
    inputs = [t for t in tensors([args, kwargs]) if t.requires_grad]

    def run() -> None:
        y = tensors([function(*args, **kwargs)])[0]
        if inputs and y.requires_grad:
            torch.autograd.grad(y, inputs, y.detach(), allow_unused=True)

    return run


class Recorder:
    """Context that records calls of fla.ops, of the mixer's recurrence and of its Linear layers, with their inputs."""

    def __init__(self, mixer: Mixer):
        self.mixer = mixer
        self.kernels: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self.recurrences: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.linears: list[tuple[nn.Linear, Tensor]] = []
        self.method = "recurrence" if isinstance(mixer, LinearMixer) else "mix"

    def _import(self, name: str) -> Any:
        module = importlib.import_module(name)
        if not name.startswith("fla.ops"):
            return module
        return SimpleNamespace(**{key: self._wrap(value) for key, value in vars(module).items() if callable(value)})

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.kernels.append((function, fresh(args), fresh(kwargs)))
            return function(*args, **kwargs)

        return call

    def __enter__(self) -> Recorder:
        original = getattr(self.mixer, self.method)

        def recurrence(*args: Any, **kwargs: Any) -> Any:
            self.recurrences.append((fresh(args), fresh(kwargs)))
            return original(*args, **kwargs)

        setattr(self.mixer, self.method, recurrence)
        backends.importlib = SimpleNamespace(import_module=self._import)  # type: ignore[assignment]
        self.hooks = [
            module.register_forward_pre_hook(lambda m, args: self.linears.append((m, args[0])))
            for module in self.mixer.modules()
            if isinstance(module, nn.Linear)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        delattr(self.mixer, self.method)
        backends.importlib = importlib
        for hook in self.hooks:
            hook.remove()

    def projections(self) -> Work:
        """Makes a pass of all Linear layers; layers that had the same input share one again."""
        leaves = {id(x): x.detach().clone().requires_grad_() for _, x in self.linears}
        calls = [(linear, leaves[id(x)]) for linear, x in self.linears]
        inputs = [*leaves.values(), *{p for linear, _ in calls for p in linear.parameters()}]

        def run() -> None:
            ys = [nn.functional.linear(x, linear.weight, linear.bias) for linear, x in calls]
            torch.autograd.grad(ys, inputs, [y.detach() for y in ys])

        return run


def every(works: list[Work]) -> Work:
    """Makes a pass that runs all of `works`."""

    def run() -> None:
        for w in works:
            w()

    return run


def parts(mixer: Mixer, batch: int, length: int, x: Tensor, step: Work) -> tuple[dict[str, Work], str | None]:
    """Makes the passes to measure, by column; returns them and the names of the bare kernels."""
    with Recorder(mixer) as seen:
        mixer(x, TokenLayout(batch, length))
    method = getattr(mixer, seen.method)
    recurrence = every([work(method, *args, **kwargs) for args, kwargs in seen.recurrences])
    # A kernel that one of our autograd functions calls is recorded without gradients: it has no backward to replay.
    kernels = [call for call in seen.kernels if any(t.requires_grad for t in tensors(call[1:]))]
    op = every([work(function, *args, **kwargs) for function, args, kwargs in kernels]) if kernels else recurrence
    names = ", ".join(getattr(function, "__name__", "?") for function, *_ in kernels) or None
    return {"mixer": step, "op": op, "recurrence": recurrence, "projections": seen.projections()}, names


def milliseconds(run: Work, at: Setting) -> float:
    """Median milliseconds of `repeats` passes after a warm-up of 3; of 2 passes if one takes over 0.3 s."""
    cuda = at.device.type == "cuda"
    for _ in range(3):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        slow = time.perf_counter() - start > 0.3
        if slow:
            break
    repeats = min(at.repeats, 2) if slow else at.repeats
    if not cuda:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def profiled(run: Work, at: Setting, passes: int, host: bool = True) -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU] if host else []
    if at.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(passes):
            run()
        if at.device.type == "cuda":
            torch.cuda.synchronize()
    return profile


MARK = "spin_kernel"  # name of the kernel of torch.cuda._sleep, which marks the begin of a part in a profile


def busy(works: dict[str, Work], at: Setting, passes: int) -> dict[str, tuple[float, float]]:
    """Milliseconds in which kernels and copies ran in one pass of each of `works`, and their number; {} without a GPU.

    All works share one profile, because each profile takes a second; a kernel that does nothing marks their begins.
    """
    if at.device.type != "cuda":
        return {}

    def run() -> None:
        for work in works.values():
            torch.cuda._sleep(1)
            for _ in range(passes):
                work()

    parts: list[list[float]] = []
    events = profiled(run, at, 1, host=False).events()
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        if MARK in event.name:
            parts.append([])
        elif parts:
            parts[-1].append(event.time_range.elapsed_us())
    if len(parts) != len(works):
        raise RuntimeError(f"the profile has {len(parts)} marks, not {len(works)}")
    return {name: (sum(part) / passes / 1e3, len(part) / passes) for name, part in zip(works, parts, strict=True)}


def first_step(name: str, at: Setting, batch: int, length: int) -> tuple[Mixer, Tensor, Work]:
    mixer = build(name, at)
    x = torch.randn(batch * length, at.hidden, device=at.device).bfloat16().requires_grad_()
    grad = torch.randn_like(x)
    inputs = [x, *mixer.parameters()]

    def step() -> None:
        torch.autograd.grad(mixer(x, TokenLayout(batch, length)), inputs, grad, allow_unused=True)

    step()
    if at.device.type == "cuda":
        torch.cuda.synchronize()
    return mixer, x, step


def measure(mixer: Mixer, x: Tensor, step: Work, at: Setting, batch: int, length: int) -> dict[str, Any]:
    """Measures one mixer and shape; returns the row without mixer, batch and length."""
    works, kernel = parts(mixer, batch, length, x, step)
    spans = {column: milliseconds(run, at) for column, run in works.items()}
    slow = spans["mixer"] > 300
    running = busy({column: run for column, run in works.items() if column != "recurrence"}, at, 1 if slow else 3)
    row: dict[str, Any] = {"kernel": kernel} | {f"{column}_ms": span for column, span in spans.items()}
    row["overhead_ms"] = spans["mixer"] - spans["op"] - spans["projections"]
    row["overhead_over_op"] = row["overhead_ms"] / spans["op"]
    if running:
        row |= {f"{column}_busy_ms": value[0] for column, value in running.items()}
        row["mixer_launches"] = running["mixer"][1]
        row["overhead_busy_ms"] = row["mixer_busy_ms"] - row["op_busy_ms"] - row["projections_busy_ms"]
        row["overhead_busy_over_op"] = row["overhead_busy_ms"] / row["op_busy_ms"]
    if at.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        row["memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def guarded(row: dict[str, Any], function: Callable[[], Any]) -> Any:
    """Returns `function()`; if it raises an error, writes the error into `row` and returns None."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"[:500]
        return None


def worker(name: str, at: Setting, parent: Connection) -> None:
    """Runs the first steps, waits until no other process uses the device, then measures and sends a row per shape."""
    since, prepared = time.perf_counter(), []
    for batch, length in at.shapes:
        row: dict[str, Any] = {"mixer": name, "batch": batch, "length": length}
        row["device"] = torch.cuda.get_device_name() if at.device.type == "cuda" else platform.processor() or "cpu"
        made = guarded(row, lambda batch=batch, length=length: first_step(name, at, batch, length))  # type: ignore[misc]
        row["first_step_seconds"] = time.perf_counter() - since
        prepared.append((row, made))
        if at.device.type == "cuda" and made:
            torch.cuda.empty_cache()
        since = time.perf_counter()
    parent.send("ready")
    parent.recv()
    for row, made in prepared:
        if made:
            mixer, x, step = made
            row |= guarded(row, partial(measure, mixer, x, step, at, row["batch"], row["length"])) or {}
            del mixer, x, step
            made = None
        parent.send(row)


class Isolated:
    """Measurement of one mixer in a process of its own, which a fault of the device or a time-out may end."""

    def __init__(self, name: str, at: Setting):
        self.name, self.at = name, at
        context = multiprocessing.get_context("fork")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=worker, args=(name, at, child))
        self.process.start()
        child.close()

    def receive(self, deadline: float) -> Any:
        if not self.connection.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError("not done in time")
        return self.connection.recv()

    def rows(self, prepared_by: float, timeout: float) -> list[dict[str, Any]]:
        """Returns the rows of all shapes; a row that the process did not send has an error."""
        rows: list[dict[str, Any]] = []
        try:
            self.receive(prepared_by)
            self.connection.send("go")
            deadline = time.monotonic() + timeout
            rows += [self.receive(deadline) for _ in self.at.shapes]
        except (EOFError, TimeoutError, OSError) as error:
            self.process.join(0 if isinstance(error, TimeoutError) else 10)
            why = str(error) or f"the process ended with exit code {self.process.exitcode}"
            missing = self.at.shapes[len(rows) :]
            rows += [{"mixer": self.name, "batch": b, "length": t, "error": why} for b, t in missing]
        self.process.join(5)
        self.process.kill()
        self.process.join()
        return rows


COLUMNS = ("mixer_ms", "op_ms", "recurrence_ms", "projections_ms", "overhead_ms", "overhead_over_op", "mixer_busy_ms",
           "op_busy_ms", "projections_busy_ms", "overhead_busy_over_op", "mixer_launches", "memory_mib",
           "first_step_seconds")  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as a Markdown table."""

    def cell(row: dict[str, Any], column: str) -> str:
        value = row.get(column)
        if value is None:
            return ""
        if "_over_" in column:
            return f"{value:.0%}"
        return f"{value:.0f}" if column in ("mixer_launches", "memory_mib") else f"{value:.2f}"

    lines = ["| mixer | shape | kernel | " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |"]
    lines.append("|" + "---|" * (3 + len(COLUMNS)))
    for row in rows:
        start = f"| {row['mixer']} | B{row['batch']} T{row['length']} | "
        if "error" in row:
            lines.append(start + "failed: " + row["error"].replace("\n", " ").replace("|", "/")[:160] + " |")
        else:
            lines.append(start + " | ".join([row.get("kernel") or "", *(cell(row, c) for c in COLUMNS)]) + " |")
    return "\n".join(lines) + "\n"


def write(path: Path, rows: list[dict[str, Any]], at: Setting, revision: str, update: bool) -> None:
    """Writes the rows measured so far; with `update`, keeps the other rows of an existing file."""
    result = {
        "name": path.stem,
        "device": next((row["device"] for row in rows if "device" in row), None),
        "gpus": int(at.device.type == "cuda"),
        **versions(),
        "commit": revision,
        "command": shlex.join(["scripts/bench/mixers.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hidden_size": at.hidden,
        "num_heads": at.heads,
        "dtype": "bf16",
    }
    rows = [row | {"commit": revision} for row in rows]
    if update and path.exists():
        done = {(row["mixer"], row["batch"], row["length"]) for row in rows}
        old = json.loads(path.read_text())["rows"]
        rows = [row for row in old if (row["mixer"], row["batch"], row["length"]) not in done] + rows
    rows.sort(key=lambda row: (row["mixer"], -row["batch"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows))


def show_profile(name: str, at: Setting) -> None:
    """Prints the kernels of one mixer, longest first, for each shape."""
    key = "self_device_time_total" if at.device.type == "cuda" else "self_cpu_time_total"
    for batch, length in at.shapes:
        _, _, step = first_step(name, at, batch, length)
        averages = profiled(step, at, 5).key_averages()
        print(f"{name} B{batch} T{length}, 5 passes")
        print(averages.table(sort_by=key, row_limit=60, max_name_column_width=70))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", help="names, comma separated (default: all)")
    parser.add_argument("--shapes", help="comma separated BATCHxLENGTH")
    parser.add_argument("--name", default="mixers_gpu", help="FOLDER/NAME.json and .md")
    parser.add_argument("--folder", default="docs/results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--timeout", type=float, default=150.0, help="seconds for the first steps of a group, and for measuring a mixer"
    )
    parser.add_argument("--together", type=int, default=1, help="mixers that take their first steps side by side")
    parser.add_argument("--commit", help="default: $COMMIT, or git's HEAD")
    parser.add_argument(
        "--update", action="store_true", help="keep rows of the existing file that are not measured now"
    )
    profile = "print one mixer's kernels, and write nothing"
    parser.add_argument("--profile", choices=sorted(MIXERS), metavar="NAME", help=profile)
    args = parser.parse_args()
    if unknown := set(args.mixers.split(",") if args.mixers else ()) - set(MIXERS):
        parser.error(f"no such mixers: {', '.join(sorted(unknown))}; there are {', '.join(sorted(MIXERS))}")
    return args


def main() -> None:
    args = arguments()
    at = setting(args.device, args.tiny, args.shapes, args.repeats)
    if args.profile:
        show_profile(args.profile, at)
        return
    names = args.mixers.split(",") if args.mixers else sorted(MIXERS)
    path, rows = Path(args.folder) / f"{args.name}.json", []
    revision = args.commit or commit()
    describe = partial(write, path, at=at, revision=revision, update=args.update)
    for group in (names[i : i + args.together] for i in range(0, len(names), args.together)):
        started = [Isolated(name, at) for name in group]
        prepared_by = time.monotonic() + args.timeout
        for mixer in started:  # no mixer measures while others run their first steps
            multiprocessing.connection.wait(
                [mixer.connection, mixer.process.sentinel], max(0.0, prepared_by - time.monotonic())
            )
            if not mixer.connection.poll():
                mixer.process.kill()
        for mixer in started:
            new = mixer.rows(prepared_by, args.timeout)
            rows += new
            describe(rows)
            print(table(new).splitlines()[-len(new) :], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
