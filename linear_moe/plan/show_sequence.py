"""Terminal output of a simulation of sequence parallelism, as tables."""

from __future__ import annotations

from collections.abc import Iterator

from linear_moe.plan.show import human, show_table
from linear_moe.plan.simulate import WAYS, LayerKind, Simulation

COLUMNS = ("GPUs", "tokens", "way", "sent", "got", "compute", "local", "waited", "hidden", "total")
NUMBERS = ("sent", "received", "hidden", "exposed")


def show_simulation(simulation: Simulation, path: str) -> None:
    """Prints a table for each kind of layer, and one for the model. `path` is the file of the configuration."""
    cluster, gpu = simulation.cluster, simulation.cluster.gpu
    for kind in simulation.kinds:
        count = f"{kind.layers} layers" if kind.layers else "none in this model, to compare with"
        title = f"{path}: {kind.mixer} ({count}), one of them forward and backward, in ms"
        show_table(title, COLUMNS, layer_lines(simulation, kind))
    show_model(simulation)
    print(
        "sent: bytes that a rank hands to collectives; got: bytes that a rank receives from others; local: summaries "
        "and scans; waited: for messages; hidden: time of messages during which local work goes on. The total is "
        "compute + local + waited.\n"
        f"Calculated for {cluster.node} GPUs a node, each way and GPU {human(gpu.link, 'B/s')} within a node and "
        f"{human(gpu.network, 'B/s')} between nodes, {cluster.latency * 1e6:g} us a message: numbers from the options, "
        "or else from data sheets; nothing is measured."
    )


def layer_lines(simulation: Simulation, kind: LayerKind) -> Iterator[tuple[str, ...]]:
    """Yields the lines of one kind of layer's table, one for every number of GPUs and way."""
    ways = {way: simulation.of(kind, way) for way in WAYS[kind.by]}
    for world, length in simulation.lengths.items():
        head = (str(world), tokens(length))
        for way, rows in ways.items():
            row = rows[world]
            if row.reason:
                yield (*head, way, *["-"] * (len(COLUMNS) - 4), row.reason)
            else:
                sent, got, hidden, waited = (sum(row.exchange.totals(name)) for name in NUMBERS)
                seconds = (row.compute, row.exchange.local, waited, hidden, row.seconds)
                yield (*head, way, human(sent, "B"), human(got, "B"), *map(milliseconds, seconds))
            head = "", ""


def show_model(simulation: Simulation) -> None:
    """Prints the model's tokens per second and GPU, and the share of the time that sharing out sequences adds."""
    entries = list(simulation.models())
    names = [by for by in WAYS if entries and by in entries[0]]
    schemes = list(dict.fromkeys(tuple(entry[by] for by in names) for entry in entries))
    by_cell = {(entry["gpus"], tuple(entry[by] for by in names)): entry for entry in entries}

    def cell(world: int, scheme: tuple[str, ...]) -> str:
        entry = by_cell[world, scheme]
        if entry["reason"]:
            return str(entry["reason"])
        return f"{human(entry['tokens_per_second_per_gpu'])} ({100 * entry['overhead']:.1f} %)"

    lines = (
        (str(world), tokens(length), *(cell(world, scheme) for scheme in schemes))
        for world, length in simulation.lengths.items()
    )
    title = "All layers and the head: tokens/s/GPU (share of the time that goes into sharing sequences out)"
    show_table(title, ("GPUs", "tokens", *(" + ".join(scheme) for scheme in schemes)), lines)


def tokens(number: int) -> str:
    """Formats a number of tokens in units of 2**20 (M) or 2**10 (K) where it is a whole number of them."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
