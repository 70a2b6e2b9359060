"""Overlap of communication with computation in a profiler's trace, by the purpose of the communication."""

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
    """Merges overlapping spans; the result is sorted."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """Total length of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


def common(a: list[Span], b: list[Span]) -> float:
    """Length of the intersection of two unions."""
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
    """Description of a collective that Kineto wrote with its kernel or, in older versions, with the call behind it."""
    args = event.get("args", {})
    return args if "Process Group Name" in args else calls.get(args.get("External id"), {})


def communication(events: Iterable[dict[str, Any]], purposes: Mapping[str, str]) -> dict[str, Any]:
    """Compares NCCL's kernels on one device with all other kernels and copies ("computation"), in milliseconds.

    Args:
        events: `traceEvents` of a Chrome trace.
        purposes: name of a process group -> its purpose; the purpose of all other groups is "other".

    Returns:
        compute_ms: time in which computation ran;
        span_ms: time from the first to the last event;
        compute: the union of all computation;
        purposes: for each purpose, ms: time in which one of its NCCL kernels ran; hidden_ms: the part of ms in which
        computation ran too; exposed_ms: the rest of ms; hidden: hidden_ms / ms; count: number of kernels; spans: of
        each kernel, in order, so that ranks can be compared;
        collectives: the same sums for each purpose, description of the group, collective and dtype.
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
    """Adds the time of the transfers alone, without waiting for other ranks: transfer_ms and transfer_hidden.

    The rank that comes last to a collective does not wait: the duration of its kernel is the transfer. In the kernels
    of the other ranks, the transfer is the same time at their end. The time before is waiting, which a smaller message
    would not shorten. transfer_hidden is the share of transfers beside which computation ran.

    Args:
        own: result of `communication` on this rank.
        ranks: for every rank, milliseconds of each kernel, by purpose.
    """
    for purpose, kernels in own["purposes"].items():
        everyones = [rank.get(purpose, []) for rank in ranks]
        if len(ranks) > 1 and len({len(one) for one in everyones}) == 1:
            shortest = [min(times) for times in zip(*everyones, strict=True)]
            spans = union((end - least, end) for (_, end), least in zip(kernels["spans"], shortest, strict=True))
            kernels["transfer_ms"] = sum(shortest)
            kernels["transfer_hidden"] = common(spans, own["compute"]) / length(spans)


def profile(run: Callable[[], Any], purposes: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """Traces one `run()` to `path`, and returns its `communication`; None without a GPU. Collective."""
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=kinds) as seen:
        run()
        if cuda:
            torch.cuda.synchronize()
    seen.export_chrome_trace(str(path))
    own = communication(json.loads(path.read_text())["traceEvents"], purposes)
    ranks: list[Any] = [None] * dist.get_world_size()
    times = {name: [end - begin for begin, end in kernels["spans"]] for name, kernels in own["purposes"].items()}
    dist.all_gather_object(ranks, times)
    transfers(own, ranks)
    for kernels in own["purposes"].values():
        del kernels["spans"]
    del own["compute"]
    return own if cuda else None
