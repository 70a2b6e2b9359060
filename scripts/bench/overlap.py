"""How much of the communication in a profiler's trace computation hides, by what the communication is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Span = tuple[float, float]
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def union(spans: Iterable[Span]) -> list[Span]:
    """Sorted, without overlaps."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def common(a: list[Span], b: list[Span]) -> float:
    """The length of what two unions share."""
    total, i = 0.0, 0
    for begin, end in a:
        while i < len(b) and b[i][1] <= begin:
            i += 1
        j = i
        while j < len(b) and b[j][0] < end:
            total += min(end, b[j][1]) - max(begin, b[j][0])
            j += 1
    return total


def process_group(event: dict[str, Any], calls: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """What Kineto wrote of a collective beside its kernel or, in older versions, beside the call that launched it."""
    args = event.get("args", {})
    return args if "Process Group Name" in args else calls.get(args.get("External id"), {})


def communication(events: Iterable[dict[str, Any]], purposes: Mapping[str, str]) -> dict[str, Any]:
    """NCCL's kernels on one device against all others, in milliseconds.

    Args:
        events: `traceEvents` of a Chrome trace.
        purposes: a process group's name -> what it is for; those of other groups are "other".

    Returns:
        compute_ms, span_ms: of all other kernels and copies together, and from the first to the last event;
        purposes: {purpose: {ms: some kernel ran, hidden_ms: computation ran beside it, exposed_ms: none did,
        hidden: the share, count, spans: of each kernel, in order, so that ranks can be compared}};
        compute: all other kernels and copies, as a union;
        collectives: the same sums by purpose, description of the group, collective and dtype.
    """
    device, calls = [], {}
    for event in events:
        if event.get("ph") != "X":
            continue
        if event.get("cat") in DEVICE:
            device.append(event)
        elif event.get("name") == "record_param_comms":
            calls[event["args"].get("External id")] = event["args"]
    device.sort(key=lambda event: event["ts"])

    def span(event: dict[str, Any]) -> Span:
        return event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3

    compute = union(span(event) for event in device if "nccl" not in event["name"].lower())
    by_purpose: dict[str, list[Span]] = {}
    by_kind: dict[tuple[str, ...], list[Span]] = {}
    for event in device:
        if "nccl" not in event["name"].lower():
            continue
        about = process_group(event, calls)
        purpose = purposes.get(str(about.get("Process Group Name")), "other")
        kind = about.get("Process Group Description"), about.get("Collective name", event["name"]), about.get("dtype")
        by_purpose.setdefault(purpose, []).append(span(event))
        by_kind.setdefault((purpose, *map(str, kind)), []).append(span(event))

    def summary(spans: list[Span]) -> dict[str, Any]:
        whole = union(spans)
        total, hidden = length(whole), common(whole, compute)
        share = hidden / total if total else 1.0
        return {"ms": total, "hidden_ms": hidden, "exposed_ms": total - hidden, "hidden": share, "count": len(spans)}

    ends = [time for event in device for time in span(event)]
    return {
        "compute": compute,
        "compute_ms": length(compute),
        "span_ms": max(ends) - min(ends) if ends else 0.0,
        "purposes": {purpose: summary(spans) | {"spans": spans} for purpose, spans in by_purpose.items()},
        "collectives": [
            dict(zip(("purpose", "group", "collective", "dtype"), kind, strict=True)) | summary(spans)
            for kind, spans in by_kind.items()
        ],
    }


def transfers(own: dict[str, Any], ranks: list[dict[str, list[float]]]) -> None:
    """Add what only sends, without waiting for the other ranks: transfer_ms, and the share beside computation.

    The last rank to come does not wait in a collective: what it takes there is the transfer, and in the other ranks'
    kernels the same time at their end. What they take before is waiting, which no smaller message would shorten.

    Args:
        own: of `communication`.
        ranks: of all, by purpose the milliseconds of each kernel.
    """
    for purpose, found in own["purposes"].items():
        everyones = [rank.get(purpose, []) for rank in ranks]
        if len(ranks) > 1 and len({len(one) for one in everyones}) == 1:
            shortest = [min(times) for times in zip(*everyones, strict=True)]
            spans = union((end - least, end) for (_, end), least in zip(found["spans"], shortest, strict=True))
            found["transfer_ms"] = sum(shortest)
            found["transfer_hidden"] = common(spans, own["compute"]) / length(spans)


def profile(run: Callable[[], Any], purposes: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """`communication` of one `run()`, its trace left at `path`; None without a GPU. Collective."""
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=kinds) as seen:
        run()
        if cuda:
            torch.cuda.synchronize()
    seen.export_chrome_trace(str(path))
    own = communication(json.loads(path.read_text())["traceEvents"], purposes)
    ranks: list[Any] = [None] * dist.get_world_size()
    times = {name: [end - begin for begin, end in found["spans"]] for name, found in own["purposes"].items()}
    dist.all_gather_object(ranks, times)
    transfers(own, ranks)
    for found in own["purposes"].values():
        del found["spans"]
    del own["compute"]
    return own if cuda else None
