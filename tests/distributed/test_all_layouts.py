"""Full coverage of what test_layouts.py covers by samples; runs only with `-m slow`, for minutes.

Pure models of every family are trained in every layout, and every layout's checkpoint is resumed in every other layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import Ranks, run
from tests.distributed.test_layouts import (
    AFTER,
    BASE,
    BEFORE,
    LAYOUTS,
    PURE,
    SEQUENCE,
    STEPS,
    WRITERS,
    Results,
    assert_goes_on,
    assert_same_steps,
    case,
    config,
    together,
)
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close

pytestmark = pytest.mark.slow

SPREAD = [layout for layout in LAYOUTS if layout != "one"]
LAYERS = {"pp2x2": 4}  # layers of the model; other layouts have 2


def pure_case(root: Path, name: str, layout: str, layers: int) -> tuple[str, dict[str, Any]]:
    """A run of 10 steps, with router losses that do not depend on the distribution of sequences over micro-batches."""
    _, _, parallel, sections = LAYOUTS[layout]
    model = PURE[name] | {"moe": SEQUENCE, "num_layers": layers, "pattern": "L" * layers}
    tree = config(model, parallel, **sections) | {"run": str(root / f"{name}-{layout}-{layers}")}
    tree["training"] |= {"global_batch": 8}
    return "follow", {"config": tree, "steps": STEPS, "save_at": 0}


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("pure")
    alone = Ranks(1, {f"{n}-one-{k}": pure_case(root, n, "one", k) for n in PURE for k in (2, 4)}, timeout=1800)
    outcomes: Results = {}
    for world in (2, 4):
        layouts = [layout for layout in SPREAD if LAYOUTS[layout][0] == world]
        cases = {f"{n}-{la}": pure_case(root, n, la, LAYERS.get(la, 2)) for n in PURE for la in layouts}
        outcomes |= run(world, cases, timeout=1800)
    return outcomes | alone.results()


@pytest.mark.parametrize("layout", SPREAD)
@pytest.mark.parametrize("name", PURE)
def test_pure_models(pure: Results, name: str, layout: str) -> None:
    """Gradients of the first step, losses of ten steps, and final weights are those of one process."""
    ranks, (reference,) = pure[f"{name}-{layout}"], pure[f"{name}-one-{LAYERS.get(layout, 2)}"]
    actual, expected = together(ranks, "gradients"), together([reference], "gradients")
    assert_gradients_close(actual, expected, FP32, FP32_GRADIENT_FLOOR)
    for rank in ranks:
        assert len(rank["steps"]) == STEPS
        assert_same_steps(rank, reference, "load_balancing_loss")
    final, expected = together(ranks, "final"), together([reference], "final")
    for key, value in expected.items():
        assert_close(final[key], value, 10 * FP32, key)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results "write-WRITER" of the uninterrupted runs; and "READER" of the runs from all checkpoints, by writer."""
    root = tmp_path_factory.mktemp("resumed")
    outcomes: Results = {}
    for world in (1, 2, 4):
        cases = {name: case(root, BASE, name) for name in WRITERS if LAYOUTS[name][0] == world}
        outcomes |= {f"write-{name}": result for name, result in run(world, cases, timeout=1800).items()}
    folders = {name: str(root / name) for name in WRITERS}
    for world in (1, 2, 4):
        cases = {
            name: ("resume_elsewhere", {"config": case(root, BASE, name)[1]["config"], "folders": folders}
                   | {"after": AFTER, "go_on": list(WRITERS)})
            for name in WRITERS
            if LAYOUTS[name][0] == world
        }  # fmt: skip
        outcomes |= run(world, cases, timeout=1800)
    return outcomes


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", WRITERS)
def test_every_checkpoint_in_every_layout(resumed: Results, reader: str, writer: str) -> None:
    (saved, *_) = resumed[f"write-{writer}"]
    for rank in resumed[reader]:
        assert rank["wrong"][writer] == []
        assert_goes_on(rank["steps"][writer], saved["steps"][BEFORE:], exact=writer == reader)
