"""Tuning of flash-linear-attention's kernels on this machine's GPU, as mixers call them, into a file that is shipped.

    python scripts/bench/tune.py --out linear_moe/modeling/ops/tuned      # every mixer at the widths of A0.3B and A1B
    python scripts/bench/tune.py --out /tmp --mixers gla kda --widths 1024:8 --jobs 4

Each mixer and width runs forward and backward in a process of its own, on whole rows and on packed documents. Processes
compile side by side; a lock lets one at a time measure. The script prints progress; the merged file is called after the
GPU, for example `NVIDIA_H100.json`. Kernels whose flags and dtypes are in the file already are not tuned for further
sizes, except with --again.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from linear_moe.modeling.mixers.registry import MIXERS, mixer_class, mixer_config
from linear_moe.modeling.ops import tuned

TOKENS = 16384


def measure_one_at_a_time(lock: Path, most: int, known: dict[str, list[tuned.Entry]]) -> None:
    """Patches Triton's autotuner: it compiles first, then measures under a lock, `most` configurations per kernel.

    Call it after `tuned.install`, so that entries of the shipped table are looked up among all configurations.

    Args:
        lock: file that serves as the lock.
        most: largest number of configurations per kernel.
        known: earlier choices, by kernel, which are measured besides.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    bench, prune = Autotuner._bench, Autotuner.prune_configs

    def locked(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        def measure(call: Any, quantiles: Any) -> Any:
            call()  # compiles
            with lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                return do_bench(call, warmup=5, rep=20, quantiles=quantiles)

        self.do_bench = measure
        return bench(self, *args, config=config, **meta)

    def evenly(self: Any, kwargs: Any) -> list[Any]:
        configs = prune(self, kwargs)
        if len(configs) <= most:
            return configs
        key, names = tuned.tuning_key(self, kwargs)
        before = tuned.nearest_tuned(known.get(tuned.kernel_name(self), []), list(key), names)
        some = [configs[i * len(configs) // most] for i in range(most)]
        return [config for config in configs if config in some or tuned.describe(config) == before]

    Autotuner._bench, Autotuner.prune_configs = locked, evenly


def run_mixer(name: str, hidden: int, heads: int) -> None:
    """Runs one mixer forward and backward, on rows of 2048 tokens and on documents packed into one row."""
    import torch

    from linear_moe.modeling.dims import Dims
    from linear_moe.modeling.host import Host, initialize
    from linear_moe.modeling.tokens import TokenLayout

    dims = Dims(hidden, heads, num_layers=12, layer=1, norm_eps=1e-5, init_std=0.02, output_init_std=0.02)
    config = mixer_config(name)
    mixer_class(name).validate(config, dims, 1, "model.mixer")
    host = Host(dtype=torch.bfloat16, device="cuda")
    mixer = mixer_class(name)(config, dims, host)
    initialize(mixer, host, seed=0)
    offsets = torch.arange(0, TOKENS + 1, 2048, device="cuda")
    positions = torch.arange(2048, device="cuda").repeat(TOKENS // 2048)
    for layout in (TokenLayout(TOKENS // 2048, 2048), TokenLayout(1, TOKENS, offsets, 2048, positions[None])):
        if mixer.crossing(config, dims):  # tensors that the model's first layer would have left
            first = mixer_class(name)(config, Dims(**{**dims.__dict__, "layer": 0}), host)
            initialize(first, host, seed=0)
            first(torch.randn(TOKENS, hidden, device="cuda", dtype=torch.bfloat16), layout)
        x = torch.randn(TOKENS, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        mixer(x, layout).float().square().mean().backward()
    torch.cuda.synchronize()


def chosen() -> dict[str, list[tuned.Entry]]:
    """Configurations that the autotuners of this process have chosen by measuring, by kernel."""
    from triton.runtime.autotuner import Autotuner

    table: dict[str, list[tuned.Entry]] = {}
    for tuner in gc.get_objects():
        if isinstance(tuner, Autotuner) and tuner.cache and tuned.kernel_name(tuner).startswith("fla."):
            name = tuned.kernel_name(tuner)
            new = [(key, config) for key, config in tuner.cache.items() if (name, key) not in tuned.install()]
            table.setdefault(name, []).extend({"key": list(key), "config": tuned.describe(c)} for key, c in new)
    return table


def table_of(path: Path) -> dict[str, list[tuned.Entry]]:
    kernels: dict[str, list[tuned.Entry]] = json.loads(path.read_text())["kernels"]
    return kernels


def merge(into: dict[str, list[tuned.Entry]], new: dict[str, list[tuned.Entry]]) -> None:
    for kernel, entries in new.items():
        kept = {json.dumps(entry["key"]): entry for entry in into.get(kernel, [])}
        into[kernel] = [*(kept | {json.dumps(entry["key"]): entry for entry in entries}).values()]


def write(path: Path, header: dict[str, str], table: dict[str, list[tuned.Entry]]) -> None:
    """Writes a table with one line per entry, so that diffs are readable."""
    kernels = [
        f"  {json.dumps(kernel)}: [\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in table[kernel]) + "\n  ]"
        for kernel in sorted(table)
    ]
    text = json.dumps(header, indent=1)[:-2] + ',\n "kernels": {\n' + ",\n".join(kernels) + "\n }\n}\n"
    json.loads(text)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the configuration file")
    parser.add_argument("--mixers", nargs="*", choices=sorted(MIXERS), default=sorted(MIXERS), metavar="NAME")
    parser.add_argument("--widths", nargs="*", default=["1024:8", "2048:16"], help="hidden size : heads")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--configs", type=int, default=8, help="most configurations to try per kernel")
    parser.add_argument(
        "--seconds", type=float, default=600, help="time for everything; mixers not done by then are left out"
    )
    parser.add_argument("--again", action="store_true", help="also tune kernels that the file has")
    parser.add_argument(
        "--known", type=Path, help="also measure the choices of this file, for example of a similar GPU"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.worker:
        name, width, lock = args.worker
        tuned.install()
        measure_one_at_a_time(Path(lock), args.configs, table_of(args.known) if args.known else {})
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        try:
            run_mixer(name, *map(int, width.split(":")))
        finally:
            print(json.dumps(chosen()))
        return 0

    import torch
    import triton

    gpu = torch.cuda.get_device_name()
    path = args.out / ("_".join(gpu.split()[:2]) + ".json")
    table = table_of(path) if path.exists() else {}
    args.out.mkdir(parents=True, exist_ok=True)
    header = {"gpu": gpu, "triton": triton.__version__, "torch": torch.__version__, "command": " ".join(sys.argv)}
    header["fla"] = __import__("fla").__version__
    waiting = [(name, width) for width in args.widths for name in args.mixers]
    running: dict[tuple[str, str], Any] = {}
    folder, start, failed = Path(tempfile.mkdtemp()), time.monotonic(), []
    environment = {**os.environ, tuned.VARIABLE: "off" if args.again or not path.exists() else str(path)}
    while waiting or running:
        late = time.monotonic() - start > args.seconds
        if late:
            failed += waiting
            waiting = []
        while waiting and len(running) < args.jobs:
            name, width = waiting.pop(0)
            command = [sys.executable, __file__, "--out", str(args.out), "--configs", str(args.configs)]
            command += ["--known", str(args.known)] if args.known else []
            log = folder / f"{name}_{width}"
            with log.open("w") as output, log.with_suffix(".err").open("w") as errors:
                worker = [*command, "--worker", name, width, str(folder / "gpu")]
                running[name, width] = subprocess.Popen(worker, stdout=output, stderr=errors, env=environment)
        for (name, width), process in list(running.items()):
            if late:
                process.terminate()  # the process still prints the configurations chosen so far
                process.wait()
            if process.poll() is None:
                continue
            del running[name, width]
            log = folder / f"{name}_{width}"
            lines = log.read_text().splitlines()
            new = json.loads(lines[-1]) if lines else {}
            merge(table, new)
            write(path, header, table)
            state = f"{sum(map(len, new.values()))} entries"
            if process.returncode:
                failed.append((name, width))
                state += ", NOT DONE: " + log.with_suffix(".err").read_text()[-500:]
            print(f"{time.monotonic() - start:5.0f} s  {name} {width}: {state}", flush=True)
        time.sleep(0.2)
    print(f"{path}: {len(table)} kernels, {sum(map(len, table.values()))} entries")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
