"""Version windows, locks, and distributions, which are built from the sources, installed in a new environment, used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = {"cpu-py3.11": "setup-cpu", "gpu-py3.12": "setup-gpu"}  # lock -> extra whose packages it pins
CLOSELY_USED = {"torch", "megatron-core", "transformers", "triton", "fla-core", "quack-kernels"}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "scripts" / "requirements.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


requirements = load_script()


def test_every_lock_has_its_files() -> None:
    assert {path.stem for path in (ROOT / "requirements").glob("*.txt")} == set(LOCKS)


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_hold_every_dependency_inside_its_window(lock: str) -> None:
    pins = requirements.pins((ROOT / "requirements" / f"{lock}.txt").read_text())
    for requirement in requirements.dependencies([LOCKS[lock]]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    kind = lock.partition("-")[0]
    chosen = requirements.pins((ROOT / "requirements" / f"{kind}.in").read_text())
    assert chosen and chosen.items() <= pins.items()


def test_what_is_used_closely_has_a_window() -> None:
    everything = list(requirements.dependencies(["gpu", "quack"]))
    windows = {r.name: {s.operator for s in r.specifier} for r in everything}
    assert windows.keys() >= CLOSELY_USED
    for name, operators in windows.items():
        assert operators == {">=", "<"}, name


def test_newest_lifts_upper_ends_only() -> None:
    requirement = Requirement("a[b]>=5.20,<5.25,!=5.21.1; platform_system == 'Linux'")
    lifted = requirements.without_upper_end(requirement)
    assert str(lifted) == 'a[b]!=5.21.1,>=5.20; platform_system == "Linux"'
    assert requirement.specifier.contains("5.20") and not requirement.specifier.contains("5.25")


def test_check_names_what_differs() -> None:
    """A local version of the locked release does not differ; another release, and one that is not locked, do."""
    installed = {name: version for name, version in requirements.needed("build") if version is not None}
    assert installed.keys() >= {"build", "packaging", "pyproject-hooks"}
    del installed["build"]
    text = "\n".join(f"{name}=={version.partition('+')[0]}+local  # why" for name, version in installed.items())
    lock = requirements.pins(text)
    assert requirements.differences(lock, "build") == []
    (line,) = requirements.differences(lock | {"packaging": Version("0.1")}, "build")
    assert line == f"packaging {installed['packaging']} is installed, not 0.1"
    del lock["pyproject-hooks"]
    (line,) = requirements.differences(lock, "build")
    assert line == f"pyproject-hooks {installed['pyproject-hooks']} is installed, which is not in the lock"


def test_check_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = requirements.metadata.distribution

    def without_hooks(name: str) -> Any:
        if name == "pyproject-hooks":
            raise requirements.metadata.PackageNotFoundError(name)
        return distribution(name)

    lock = {name: Version(version) for name, version in requirements.needed("build")}
    monkeypatch.setattr(requirements.metadata, "distribution", without_hooks)
    assert requirements.differences(lock, "build") == ["pyproject-hooks is not installed"]


# ---------------------------------------------------------------------------------------------------- distributions


def sources(*options: str) -> list[str]:
    """Lists files of the checkout by `git ls-files` with these options."""
    command = ["git", "ls-files", "--cached", *options]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in files if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Builds the sdist, and from it the wheel, in a copy of the sources without leftovers of earlier builds."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files belong to it")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in sources("--others", "--exclude-standard"):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_distributions_are_complete(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = distributions
    package = {name for name in sources("--others", "--exclude-standard") if name.startswith("linear_moe/")}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == package
    with tarfile.open(sdist) as archive:
        shipped = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in sources() if not name.startswith(".")} <= shipped  # files of CI and git are not shipped
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-compile", "--target", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(sdist)], check=True)
    installed = {str(path.relative_to(tmp_path)) for path in (tmp_path / "linear_moe").rglob("*") if path.is_file()}
    assert installed == package


def test_wheel_works_where_nothing_else_is(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """The wheel trains, exports and generates in a new environment and an empty folder.

    Its dependencies have the lock's versions; with `scripts/test.sh --newest`, pip chooses them.
    """
    lock = ROOT / "requirements" / f"cpu-py{sys.version_info[0]}.{sys.version_info[1]}.txt"
    locked = "LINEAR_MOE_NEWEST" not in os.environ
    constraints = ["-c", lock if lock.exists() else lock.with_name("cpu.in")] if locked else []
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    bin_ = tmp_path / "venv" / "bin"

    def run(*command: Any) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    pip = (bin_ / "python", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", *constraints, distributions[1])
    run(*pip, "check")
    if locked and lock.exists():
        listed = json.loads(run(*pip, "list", "--format=json"))
        unlocked = {canonicalize_name(p["name"]) for p in listed} - requirements.pins(lock.read_text()).keys()
        assert unlocked <= {"linear-moe", "pip", "setuptools"}

    (tmp_path / "text").mkdir()
    for n in range(8):
        (tmp_path / "text" / f"{n}.txt").write_text(f"The square of {n} is {n * n}. " * 200)
    moe = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 32}
    model = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "pattern": "LN", "mixer": {"type": "gla"}, "moe": moe}
    data = {"corpus": "text", "tokenizer": {"type": "bytes"}, "cache": "cache", "validation_fraction": 0.25}
    training = {"dtype": "fp32", "sequence_length": 64, "micro_batch": 2, "global_batch": 2, "steps": 2}
    tree = {"model": model, "data": data, "training": training | {"eval_batches": 1}, "run": "run"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree | {"schedule": {"warmup_steps": 1}}))
    linear_moe = bin_ / "linear-moe"
    assert run(linear_moe, "--version").startswith("linear-moe ")
    run(linear_moe, "train", "tiny.yaml")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "event" not in r] == [1, 2]
    run(linear_moe, "export", "run", "exported")
    generated = json.loads(
        run(linear_moe, "generate", "exported", "--prompt", "The square", "--max-new-tokens", "4", "--json")
    )
    assert len(generated["tokens"][0]) == 4
    where = run(bin_ / "python", "-c", "import linear_moe; print(linear_moe.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
