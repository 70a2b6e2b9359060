"""`linear-moe plan --gpu`: proposed layouts are legal and fit, others have a reason; the cost model by hand."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from linear_moe.checks.fields import validate_fields
from linear_moe.cli import main
from linear_moe.config.schema import Config
from linear_moe.gpus import GPU, GPUS
from linear_moe.layout.flops import flops_per_token, forward_flops
from linear_moe.layout.pipeline import HEAD_SPEED
from linear_moe.layout.processes import parallel_layout
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict
from linear_moe.plan import make_plan, show
from linear_moe.plan.cost import EFFICIENCY, LAYER_SECONDS, MEMORY_EFFICIENCY, WAIT_SECONDS, dispatch, stage_cost
from linear_moe.plan.network import LATENCY, LINK_STEP, NETWORK_STEP, Cluster, Group
from linear_moe.plan.ranks import RankModels, rank_chunks
from linear_moe.plan.search import Candidate, Proposals, propose

MODELS = Path(__file__).parents[3] / "configs" / "models"
ROUND = GPU(memory_gib=1.0, peak_tflops=100.0, memory_bandwidth=1e12, link=100e9, network=10e9)


def tree(**training: Any) -> dict[str, Any]:
    return {
        "model": {
            "hidden_size": 96,
            "num_layers": 6,
            "num_heads": 6,
            "pattern": "LLN * 2",
            "vocab_size": 1536,
            "moe": {"num_experts": 8, "top_k": 2, "expert_ffn_size": 96},
        },
        "training": {"sequence_length": 384, "micro_batch": 2, "global_batch": 24} | training,
        "data": {"corpus": "synthetic"},
    }


def with_overrides(candidate: Candidate) -> Config:
    """Makes the configuration that a user gets by the candidate's overrides, without the search's own copy."""
    sections = tree()
    for path, value in candidate.overrides().items():
        section, name = path.split(".")
        sections.setdefault(section, {})[name] = value
    return from_dict(Config, sections)


@pytest.fixture(scope="module")
def proposals() -> Proposals:
    """Proposals for 12 GPUs in nodes of 6, with so little memory that some layouts do not fit."""
    config = from_dict(Config, tree())
    need = make_plan(config, 1).memory
    gib = (need["weights"] + need["gradients"]) * 0.6 / 2**30
    return propose(config, 12, Cluster(GPU(gib, 100.0, 1e12, 100e9, 10e9), 6))


def test_proposals_are_legal_and_fit(proposals: Proposals) -> None:
    assert len(proposals.fit) > 10
    for candidate in proposals.fit:
        config = with_overrides(candidate)
        plan = make_plan(config, 12)  # raises ConfigError if the layout is illegal
        assert plan.memory == candidate.memory and plan.memory["total"] <= proposals.limit
        assert candidate.layout == parallel_layout(config, 12) and not candidate.reason
        assert candidate.seconds is not None
        assert candidate.seconds["total"] == pytest.approx(sum(candidate.seconds.values()) / 2)
    totals = [candidate.seconds["total"] for candidate in proposals.fit if candidate.seconds]
    assert totals == sorted(totals)


def test_the_others_say_why(proposals: Proposals) -> None:
    assert proposals.big and proposals.illegal
    for candidate in proposals.big:
        assert make_plan(with_overrides(candidate), 12).memory["total"] > proposals.limit
        assert f"{candidate.memory['weights'] / 2**30:.1f}" in candidate.reason  # type: ignore[index]
        assert all(part in candidate.reason for part in ("needs", "gradients", "optimizer", "activations", "logits"))
    for candidate in proposals.illegal:
        with pytest.raises(ConfigError) as error:
            validate_fields(with_overrides(candidate), 12)
        assert str(error.value) == candidate.reason
    shapes = [c.name for c in (*proposals.fit, *proposals.big, *proposals.illegal)]
    assert len(shapes) == len(set(shapes))
    assert not any("TP4" in name.split() for name in shapes), "four of six GPUs: some groups are on two nodes"
    assert {"DP only", "TP2 PP2 EP2", "TP6", "PP3x2", "TP2 EP3"} <= set(shapes)
    assert any("num_experts" in c.reason for c in proposals.illegal if "EP3" in c.name)


def test_more_memory_is_never_slower() -> None:
    config = from_dict(Config, tree())
    best = []
    for gib in (0.02, 0.05, 1.0):
        fit = propose(config, 2, Cluster(GPU(gib, 100.0, 1e12, 100e9, 10e9), 8)).fit
        best.append({c.name: c.seconds["total"] for c in fit if c.seconds})
    assert best[2]
    for less, more in zip(best, best[1:], strict=False):
        assert less.keys() <= more.keys()
        assert all(more[name] <= seconds for name, seconds in less.items())


def test_compute_is_flops_at_the_stated_efficiency() -> None:
    """A model so wide that no layer is bound by launches takes, on one GPU, the time of its FLOPs and memory."""
    sections = tree(global_batch=8, micro_batch=8, sequence_length=1024)
    sections["model"] |= {"hidden_size": 6144, "moe": {"num_experts": 8, "top_k": 2, "expert_ffn_size": 4096}}
    config = from_dict(Config, sections)
    (only,) = propose(config, 1, Cluster(GPU(1e6, 100.0, 1e12, 100e9, 10e9), 8)).fit
    assert only.seconds is not None and only.config.training.recompute == "none"
    head = 3 * 2 * 6144 * config.model.vocab_size
    compute = 8 * 1024 * (flops_per_token(config) - head + head / HEAD_SPEED) / (100e12 * EFFICIENCY)
    assert compute > 6 * LAYER_SECONDS
    assert only.seconds["compute"] == pytest.approx(compute)
    assert only.seconds["tensor"] == only.seconds["expert"] == only.seconds["bubble"] == only.seconds["data"] == 0


def test_groups_by_hand() -> None:
    cluster = Cluster(ROUND, 4)
    node, across = Group.of([0, 1, 2, 3], cluster), Group.of([0, 2, 4, 6], cluster)
    assert Group.of([5], cluster).ring(1e9) == Group.of([5], cluster).exchange(1e9) == 0
    assert node.ring(1e9) == pytest.approx(LATENCY + 3 * LINK_STEP + 0.75e9 / 100e9)
    steps = 2 * LINK_STEP + NETWORK_STEP
    assert across.ring(1e9) == pytest.approx(LATENCY + steps + 0.75e9 / 20e9)  # two network adapters in each node
    assert node.exchange(1e9) == pytest.approx(LATENCY + 0.75e9 / 100e9)
    assert across.exchange(1e9) == pytest.approx(LATENCY + 0.25e9 / 100e9 + 0.5e9 / 10e9)
    assert node.send(1e9) == pytest.approx(LATENCY + 0.01)
    assert Group.of([0, 4], cluster).send(1e9) == pytest.approx(LATENCY + 0.1)


def test_dispatch_by_hand() -> None:
    """A rank of four sends its tokens twice with top-2 (alltoall), or gets all tokens once (allgather)."""
    config = from_dict(Config, tree())
    cluster = Cluster(ROUND, 4)
    groups = {"expert": Group.of([0, 1, 2, 3], cluster), "expert_tensor": Group.of([0], cluster)}
    assert dispatch(config, groups, 1e9) == pytest.approx(LATENCY + 2 * 0.75e9 / 100e9)
    config.model.moe.dispatcher = "allgather"
    assert dispatch(config, groups, 1e9) == pytest.approx(LATENCY + 3 * LINK_STEP + 3e9 / 100e9)


def test_a_stage_by_hand() -> None:
    """Every term but compute follows from bytes: two tensor and two expert ranks in a node, six MoE layers, bf16."""
    config = from_dict(Config, tree() | {"parallel": {"tensor": 2, "expert": 2}, "optimizer": {"overlap": False}})
    layout, cluster = parallel_layout(config, 4), Cluster(ROUND, 4)
    chunks = rank_chunks(config, RankModels(config, 1536)(config.parallel), 0)
    cost = stage_cost(config, layout, chunks, forward_flops(config), cluster, {})
    experts = 6 * 4 * 3 * 96 * 96  # half of the experts' gate, up and down
    (chunk,) = chunks
    rest = sum(p.numel() for p in chunk.parameters) - experts
    stream = 2 * 2 * 384 * 96  # bytes of a micro-batch

    def ring(size: float) -> float:
        return LATENCY + LINK_STEP + size / 2 / ROUND.link

    seconds, bandwidth = cost.micro_batch, MEMORY_EFFICIENCY * ROUND.memory_bandwidth
    # Bytes per weight: it is read forward and backward; its gradient is written and read in bf16, and in fp32.
    read, gradients = 2 * 2, 2 * 2 + 8
    assert seconds["weights"] == pytest.approx((rest + experts) * (read + gradients) / bandwidth)
    assert seconds["tensor"] == pytest.approx(6 * 4 * ring(stream) + 2 * ring(stream))  # mixers, then the head
    assert seconds["expert"] == pytest.approx(6 * 4 * ring(stream))  # gather and scatter, forward and backward
    assert cost.data == pytest.approx(sum(ring(4 * n) + ring(2 * n) for n in (rest, experts)))
    state = 2 * 12 + 4  # moments and fp32 weights read and written, gradients read, by half the replicas each
    assert cost.optimizer == pytest.approx((rest + experts) / 2 * state / bandwidth)

    config.model.moe.dispatcher = "alltoall"
    sent = stage_cost(config, layout, chunks, forward_flops(config), cluster, {}).micro_batch["expert"]
    assert sent == pytest.approx(6 * (4 * (LATENCY + stream / 2 / ROUND.link) + WAIT_SECONDS))


def test_bubble_and_overlap() -> None:
    config = from_dict(Config, tree(global_batch=48))
    cluster = Cluster(GPU(100.0, 100.0, 1e12, 100e9, 10e9), 8)
    by_name = {c.name: c for c in propose(config, 4, cluster).fit}
    for name, share in (("PP2", 1.0), ("PP2x2", 0.5)):
        candidate = by_name[name]
        assert candidate.seconds is not None and candidate.layout is not None
        number = 48 // candidate.config.training.micro_batch // candidate.layout.data
        kinds = ("compute", "weights", "tensor", "expert", "pipeline")
        micro_batch = sum(candidate.seconds[kind] for kind in kinds) / number
        assert candidate.seconds["bubble"] == pytest.approx(share * micro_batch)
    assert by_name["DP only"].seconds["data"] == 0  # type: ignore[index]


def test_the_fastest_is_a_command_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed command is valid, although the configuration has the settings of another layout."""
    sections = tree(recompute="selective", recompute_modules=["norm"], recompute_layers=2)
    sections["parallel"] = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 2, 2, 1]}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(sections | {"run": str(tmp_path / "run")}))
    assert main(["plan", str(config), "--world", "2", "--memory", "8"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The fastest: ")]
    words = shlex.split(line.removeprefix("The fastest: "))
    assert "parallel.pipeline_layers=null" in words and "training.recompute_layers=null" in words
    assert main(["check", *words, "--world", "2"]) == 0


def test_long_lists_are_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing fits, there is no empty table, and the smallest layouts come first."""
    monkeypatch.setattr(show, "ROWS", 1)
    words = ["plan", str(MODELS / "tiny.yaml"), "training.global_batch=8", "--world", "2", "--memory", "0.001"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "0 layouts fit" in out and "tokens/s/GPU" not in out and "The fastest" not in out
    assert main([*words, "--json"]) == 0
    big = [entry["reason"] for entry in json.loads(capsys.readouterr().out)["rejected"] if "needs" in entry["reason"]]
    assert out.count("needs") == 1 and big[0] in out and f"and {len(set(big)) - 1} more" in out


@pytest.mark.parametrize("words", [["--gpu", "h200"], ["--memory", "100"]])
def test_command(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    config = str(MODELS / "tiny.yaml")
    assert main(["plan", config, "training.global_batch=8", "--world", "2", "--json", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    gib = GPUS["h200"].memory_gib if "h200" in words else 100
    assert printed["memory_limit_bytes"] == round(0.9 * gib * 2**30)
    first = printed["layouts"][0]
    assert list(first["memory_per_rank_bytes"])[-1] == "total" and first["reason"] is None
    assert first["seconds_per_step"]["total"] > 0 and first["tokens_per_second_per_gpu"] > 0 and first["data"] >= 1
    assert main(["plan", config, "training.global_batch=8", "--world", "2", *words]) == 0
    out = capsys.readouterr().out
    assert "The fastest:" in out and "tokens/s/GPU" in out and "EP2" in out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--gpu", "h200"], "--world"),
        (["--gpu", "v100", "--world", "2"], "v100"),
        (["--memory", "-1", "--world", "2"], "must be a number > 0"),
        (["--memory", "8", "--world", "0"], "--world = 0"),
    ],
)
def test_mistakes_are_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["plan", str(MODELS / "tiny.yaml"), *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    err = capsys.readouterr().err
    assert code == 2 and part in err and err.count("\n") == 1
