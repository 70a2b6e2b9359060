"""Tests of the shipped kernel configurations: which one a kernel gets, and what happens if none fits."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from linear_moe.modeling.ops import tuned

BF16 = "torch.bfloat16"


def test_nearest_entry() -> None:
    entries = [
        {"key": [64, True, BF16], "config": {"n": 64}},
        {"key": [128, True, BF16], "config": {"n": 128}},
        {"key": [128, False, BF16], "config": {"n": -1}},
        {"key": [128, True, "torch.float32"], "config": {"n": -2}},
    ]
    heads = ["H", "USE_G"]
    for size, expected in ((64, 64), (128, 128), (32, 64), (256, 128), (90, 64), (97, 128), (0, 64)):
        assert tuned.nearest_tuned(entries, [size, True, BF16], heads) == {"n": expected}
    assert tuned.nearest_tuned(entries, [128, False, "torch.float32"], heads) is None
    assert tuned.nearest_tuned(entries, [128, True, BF16, BF16], heads) is None
    assert tuned.nearest_tuned([], [128], heads) is None
    sizes = ["K", "USE_G"]  # sizes within a head must be equal
    assert tuned.nearest_tuned(entries, [64, True, BF16], sizes) == {"n": 64}
    assert tuned.nearest_tuned(entries, [32, True, BF16], sizes) is None


def test_states_that_a_kernel_is_given_or_not() -> None:
    fp32, names = "torch.float32", ["H", "USE_G"]
    entries: list[dict[str, Any]] = [
        {"key": [8, True, BF16, fp32, BF16], "config": {"n": 1}},
        {"key": [8, True, BF16, fp32, BF16, fp32, fp32], "config": {"n": 2}},
    ]
    for dtypes, expected in (
        ([BF16, fp32, BF16], 1),
        ([BF16, fp32, BF16, fp32], 1),  # both entries are equally far: the first is taken
        ([BF16, fp32, BF16, fp32, fp32, fp32], 2),
        ([fp32, BF16, fp32, BF16], 1),
    ):
        assert tuned.nearest_tuned(entries, [4, True, *dtypes], names) == {"n": expected}
    for dtypes in ([BF16, fp32], [BF16, BF16, BF16, fp32], ["torch.int64", BF16, fp32, BF16]):
        assert tuned.nearest_tuned(entries, [8, True, *dtypes], names) is None, dtypes
    assert tuned.nearest_tuned(entries, [8, False, BF16, fp32, BF16], names) is None


def test_file_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    path = tuned.table_path("NVIDIA H100 80GB HBM3")
    assert path is not None and path.name == "NVIDIA_H100.json"
    assert tuned.table_path("A GPU that nobody tuned for") is None
    monkeypatch.setenv(tuned.VARIABLE, "off")
    assert tuned.table_path("NVIDIA H100 80GB HBM3") is None
    monkeypatch.setenv(tuned.VARIABLE, "/some/where.json")
    assert tuned.table_path("NVIDIA H100 80GB HBM3") == Path("/some/where.json")


@pytest.mark.parametrize("path", sorted(Path(tuned.__file__).parent.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files(path: Path) -> None:
    table = json.loads(path.read_text())
    assert table["gpu"].startswith(path.stem.replace("_", " ")) and table["triton"] and table["fla"]
    assert table["kernels"]
    for kernel, entries in table["kernels"].items():
        assert kernel.startswith("fla.")
        keys = [json.dumps(entry["key"]) for entry in entries]
        assert entries and len(set(keys)) == len(keys)
        for entry in entries:
            assert tuned.nearest_tuned(entries, entry["key"], []) == entry["config"]
            assert {"num_warps", "num_stages"} <= set(entry["config"])


class Config:
    def __init__(self, **fields: Any):
        self.fields = fields

    def all_kwargs(self) -> dict[str, Any]:
        return {**self.fields, "maxnreg": None}


class OutOfResources(Exception):
    pass


class Autotuner:
    """A stand-in for the parts of Triton's autotuner that `install` uses; its search takes the last configuration."""

    def __init__(self, broken: int | None = None):
        self.arg_names, self.keys, self.broken = ["x", "H"], ["H"], broken
        self.configs, self.cache = [Config(block=n) for n in (16, 32, 64)], {}  # type: ignore[var-annotated]
        self.base_fn, self.searched = types.SimpleNamespace(__module__="fla.ops", __name__="kernel"), 0

    def prune_configs(self, kwargs: dict[str, Any]) -> list[Config]:
        assert self.nargs  # type: ignore[attr-defined]
        return self.configs

    def run(self, *args: Any, **kwargs: Any) -> int:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        key = (kwargs["H"],)
        if key not in self.cache:
            self.cache[key] = self.prune_configs(kwargs)[-1]
            self.searched += 1
        block = self.cache[key].fields["block"]
        if block == self.broken:
            raise OutOfResources
        return block


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Autotuner]:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"kernels": {"fla.ops.kernel": [{"key": [128], "config": {"block": 32}}]}}))
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(tuned.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned.torch.cuda, "get_device_name", lambda: "a GPU")
    patched = type("Autotuner", (Autotuner,), {"run": Autotuner.run, "prune_configs": Autotuner.prune_configs})
    for name, content in (("autotuner", {"Autotuner": patched}), ("errors", {"OutOfResources": OutOfResources})):
        module = types.ModuleType(f"triton.runtime.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, f"triton.runtime.{name}", module)
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    tuned.install.cache_clear()
    tuned.install()
    yield patched
    tuned.install.cache_clear()


def test_a_tuned_kernel_is_not_searched_for(tuner: type[Autotuner]) -> None:
    kernel = tuner()
    assert [kernel.run(None, H=size) for size in (128, 256, 128)] == [32, 32, 32] and kernel.searched == 0


def test_a_configuration_that_does_not_fit_is_replaced(tuner: type[Autotuner]) -> None:
    kernel = tuner(broken=32)
    assert kernel.run(None, H=128) == 64 and kernel.searched == 1
    assert kernel.run(None, H=128) == 64 and kernel.searched == 1


def test_unknown_kernels_and_configurations_are_tuned(tuner: type[Autotuner]) -> None:
    other, foreign, changed = tuner(), tuner(), tuner()
    other.base_fn.__name__ = "another"
    foreign.base_fn.__module__ = "mine"
    changed.configs = [Config(block=n) for n in (16, 64)]  # another release of the package
    for kernel in (other, foreign, changed):
        assert kernel.run(None, H=128) == 64 and kernel.searched == 1


def test_the_first_search_is_a_warning(tuner: type[Autotuner], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", tuned.__name__)
    known, first, second, single = tuner(), tuner(), tuner(), tuner()
    first.base_fn.__name__, second.base_fn.__name__, single.base_fn.__name__ = "first", "second", "single"
    single.configs = single.configs[-1:]  # nothing to search for
    for kernel in (known, first, second, single, first):
        kernel.run(None, H=96)
    assert [(r.levelname, r.args[0]) for r in caplog.records] == [
        ("WARNING", "fla.ops.first"),
        ("INFO", "fla.ops.second"),
    ]
    text = caplog.messages[0]
    assert "{'H': 96}" in text and "table.json" in text and "LINEAR_MOE_TUNED" in text
    assert "scripts/bench/tune.py" in text and "--widths HIDDEN:HEADS" in text
