"""Training spread over ranks = training in one process: losses of several steps and the first step's gradients."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from linear_moe.config.load import from_dict
from linear_moe.config.schema import Config, ModelConfig
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.base import Layout
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class
from linear_moe.modeling.model import LanguageModel
from tests.distributed.harness import run
from tests.distributed.masked import VALIDATION, global_batch
from tests.tolerances import BF16, FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close
from tests.unit.mixers.common import variants

STEPS = 3


def config(model: dict[str, Any], parallel: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny model in fp32 with micro-batches of two sequences, two of them a step in one process."""
    base: dict[str, Any] = {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "pattern": "LL",
            "ffn_size": 64,
            "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "shared_ffn_size": 16},
        },
        "training": {"sequence_length": 32, "micro_batch": 2, "global_batch": 4, "dtype": "fp32"},
        # Adam's first steps are signs of the gradients, and rounding decides the sign of one that vanishes.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "data": {"tokenizer": {"type": "bytes"}},
    }
    base["model"] |= model
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return base | {"parallel": parallel}


HYBRID = {"pattern": "LN", "symbols": {"N": {"ffn": "dense"}}}
DENSE = {"ffn": "dense"}
# Every mixer of the registry, in the first and in the last config that it is tested with: plain, and with options on.
PLAIN = {name: {"mixer": {"type": name, **variants(name)[0]}} for name in sorted(MIXERS)}
OPTIONS = {f"{name}-options": {"mixer": {"type": name, **variants(name)[-1]}} for name in sorted(MIXERS)}
MODELS: dict[str, dict[str, Any]] = (
    PLAIN | OPTIONS | {"hybrid": HYBRID, "dense": DENSE, "tied": {"tie_embeddings": True}}
)
BF16_TRAINING = {"training": {"dtype": "bf16"}}
TP2 = {"tensor": 2}
PARTS = {"recompute": "selective", "recompute_modules": ["norm", "core", "experts", "activation", "logits"]}
MIXER = {"recompute": "selective", "recompute_modules": ["norm", "mixer"], "recompute_layers": 1}


def fits_stages(mixer: dict[str, Any]) -> bool:
    """Whether pipeline stages can share out layers of this mixer."""
    return not mixer_class(mixer["type"]).crosses_layers(from_dict(ModelConfig, {"mixer": mixer}).mixer)


# name -> (model, parallel sizes, other sections)
TWO: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"{name}-tp2": (name, TP2, {}) for name in OPTIONS},
    **{f"{name}-pp2": (name, {"pipeline": 2}, {}) for name, model in PLAIN.items() if fits_stages(model["mixer"])},
    "gla-dp2": ("gla", {}, {}),
    "gla-dp2-no-zero": ("gla", {}, {"optimizer": {"distributed": False}}),
    "gla-dp2-overlap": ("gla", {}, {"optimizer": {"overlap": True}}),
    "gla-ep2": ("gla", {"expert": 2}, {}),
    "gla-ep2-allgather": ("gla", {"expert": 2}, {"allgather": {}}),
    "gla-tp2-ep2": ("gla", {"tensor": 2, "expert": 2}, {}),
    "gla-tp2-etp2": ("gla", {"tensor": 2, "expert_tensor": 2}, {}),
    "gla-tp2-recompute": ("gla", TP2, {"training": {"recompute": "full"}}),
    "hybrid-tp2-recompute-parts": ("hybrid", TP2, {"training": PARTS}),
    "dense-tp2-replicated-recompute-parts": ("dense", TP2 | {"tensor_sequence": False}, {"training": PARTS}),
    "rwkv7-tp2-recompute-parts": ("rwkv7", TP2, {"training": PARTS}),
    "rwkv7-tp2-recompute-mixer": ("rwkv7", TP2, {"training": MIXER}),
    "mom-tp2-recompute-mixer": ("mom", TP2, {"training": MIXER}),
    "hybrid-pp2-recompute-overlap": ("hybrid", {"pipeline": 2}, {"training": PARTS, "optimizer": {"overlap": True}}),
    "gla-dp2-recompute-overlap": ("gla", {}, {"training": PARTS, "optimizer": {"overlap": True}}),
    "tied-tp2-recompute-logits": ("tied", TP2, {"training": PARTS}),
    "dense-tp2-replicated": ("dense", TP2 | {"tensor_sequence": False}, {}),
}
FOUR: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "hybrid-tp2-ep2-dp2": ("hybrid", {"tensor": 2, "expert": 2}, {}),
    "hybrid-tp2-ep4": ("hybrid", {"tensor": 2, "expert": 4}, {}),
    "hybrid-tp2-ep2-etp2": ("hybrid", {"tensor": 2, "expert": 2, "expert_tensor": 2}, {}),
    "hybrid-tp2-pp2": ("hybrid", {"tensor": 2, "pipeline": 2}, {}),
    "hybrid-pp2-ep2-overlap": ("hybrid", {"pipeline": 2, "expert": 2}, {"optimizer": {"overlap": True}}),
}
# Through the trainer's Stepper, with masks: four micro-batches a step in one process, two on each of two replicas.
MASKED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp2": (2, {}, {}),
    "dp2-no-zero-overlap": (2, {}, {"optimizer": {"distributed": False, "overlap": True}}),
    "tp2": (2, TP2, {}),
    "pp2": (2, {"pipeline": 2}, {}),
    "ep2": (2, {"expert": 2}, {}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}, {}),
}


def masked_config(parallel: dict[str, Any], *, router_losses: bool = True, **sections: Any) -> dict[str, Any]:
    tree = config(MODELS["gla"], parallel, **sections)
    tree["training"] = tree["training"] | {"global_batch": 8}
    if not router_losses:
        tree["model"]["moe"] = tree["model"]["moe"] | {"aux_loss": 0.0, "z_loss": 0.0}
    return tree


def masked_cases(world: int) -> dict[str, tuple[str, dict[str, Any]]]:
    trees = {name: masked_config(sizes, **rest) for name, (ranks, sizes, rest) in MASKED.items() if ranks == world}
    if world == 1:
        trees = {"one": masked_config({}), "one-no-router-losses": masked_config({}, router_losses=False)}
    return {f"masked-{name}": ("masked_training", {"config": tree, "steps": STEPS}) for name, tree in trees.items()}


def case(model: str, parallel: dict[str, Any], sections: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    tree = config(MODELS[model], parallel, **{k: v for k, v in sections.items() if k != "allgather"})
    if "allgather" in sections:
        tree["model"]["moe"] = tree["model"]["moe"] | {"dispatcher": "allgather"}
    return "train", {"config": tree, "steps": STEPS}


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    bf16 = {"bf16": case("gated_deltanet", {}, BF16_TRAINING)}
    one = run(1, {name: case(name, {}, {}) for name in MODELS} | bf16 | masked_cases(1))
    bf16 = {"bf16-tp2-ep2": case("gated_deltanet", {"tensor": 2, "expert": 2}, BF16_TRAINING)}
    two = run(2, {name: case(*spec) for name, spec in TWO.items()} | bf16 | masked_cases(2))
    four = run(4, {name: case(*spec) for name, spec in FOUR.items()} | masked_cases(4))
    return one | two | four


def losses(ranks: list[Any]) -> torch.Tensor:
    """Loss sums of all replicas, per step; replicas of a replica (tensor ranks) must agree."""
    by_replica: dict[int, torch.Tensor] = {}
    for result in ranks:
        if result["last_stage"]:
            value = torch.stack(result["losses"])
            assert_close(value, by_replica.setdefault(result["data_rank"], value), FP32, "tensor ranks' losses")
    return torch.stack(list(by_replica.values())).sum(0)


def gradients(ranks: list[Any]) -> dict[str, torch.Tensor]:
    """Full gradients, put together from every rank's shards; where shards overlap they must agree."""
    full: dict[str, torch.Tensor] = {}
    for result in ranks:
        for name, (shape, offset, value) in result["gradients"].items():
            target = full.setdefault(name, torch.full(shape, float("nan")))
            place = target[tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))]
            if not place.isnan().any():
                assert_close(value, place, FP32, f"replicas of the gradient of {name}")
            place.copy_(value)
    return full


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_equals_one_process(results: dict[str, list[Any]], name: str) -> None:
    reference = results[(TWO | FOUR)[name][0]]
    assert_gradients_close(gradients(results[name]), gradients(reference), FP32, FP32_GRADIENT_FLOOR)
    assert_close(losses(results[name]), losses(reference), FP32, "losses")
    for rank in results[name]:
        assert_close(torch.tensor(rank["norms"]), torch.tensor(reference[0]["norms"]), FP32, "gradient norms")
        for step, expected_losses in enumerate(reference[0]["router"]):
            assert rank["router"][step] == pytest.approx(expected_losses, rel=FP32)


def test_bf16(results: dict[str, list[Any]]) -> None:
    """bf16 weights and collectives, fp32 gates and gradients: near the same training in one process."""
    reference, ranks = results["bf16"], results["bf16-tp2-ep2"]
    assert_close(losses(ranks), losses(reference), BF16, "losses")
    assert_close(torch.tensor(ranks[0]["norms"]), torch.tensor(reference[0]["norms"]), BF16, "gradient norms")


def assert_same_results(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Losses, numbers of counted tokens, gradient norms of every validation and step."""
    assert len(actual) == len(expected) == STEPS + 2
    for key, tolerance in {"loss": FP32, "gradient_norm": FP32, "tokens": 0.0}.items():
        a, b = (torch.tensor([float(result[key]) for result in results]) for results in (actual, expected))
        assert_close(a, b, tolerance, key)


@pytest.mark.parametrize("name", MASKED)
def test_masked_equals_one_process(results: dict[str, list[Any]], name: str) -> None:
    """Every counted token weighs the same, however many its micro-batch and its rank count."""
    (reference,), ranks = results["masked-one"], results[f"masked-{name}"]
    counts = dict(sorted((rank["data_rank"], rank["counts"]) for rank in ranks)).values()
    assert [*chain(*counts)] == reference["counts"] and len(set(reference["counts"])) == 4
    assert len({sum(count) for count in counts}) == len(counts) and all(len(count) > 1 for count in counts)
    for rank in ranks:
        assert_same_results(rank["results"], reference["results"])
    actual, expected = gradients(ranks), gradients([reference])
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_close(actual[parameter], gradient, FP32, f"gradient of {parameter}")


def plain_loss(model: LanguageModel, config: Config, numbers: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """PyTorch's mean cross-entropy of the counted tokens of global batches, all rows in one batch; and their number."""
    batches = [global_batch(config, number) for number in numbers]
    tokens, labels, mask = (torch.cat([batch[key] for batch in batches]) for key in ("tokens", "labels", "loss_mask"))
    logits = model(tokens, Layout(*tokens.shape))
    counted = mask.bool()
    return F.cross_entropy(logits[counted], labels[counted]), int(counted.sum())


def test_masked_one_process_is_the_masked_mean(results: dict[str, list[Any]]) -> None:
    """The trainer in one process against the model on the plain host, autograd and PyTorch's cross-entropy."""
    tree = from_dict(Config, masked_config({}, router_losses=False))
    model = LanguageModel(tree.model, vocab_size(tree), Host())
    initialize(model, model.host, tree.training.seed)
    (trained,) = results["masked-one-no-router-losses"]

    with torch.no_grad():
        loss, tokens = plain_loss(model, tree, VALIDATION)
    validation, step = trained["results"][:2]
    assert_close(torch.tensor(validation["loss"]), loss, FP32, "validation loss")
    assert validation["tokens"] == tokens

    loss, tokens = plain_loss(model, tree, (0,))
    loss.backward()
    assert_close(torch.tensor(step["loss"]), loss, FP32, "training loss")
    assert step["tokens"] == tokens
    actual = gradients([trained])
    squares = torch.zeros(())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        squares += parameter.grad.square().sum()
        assert_close(actual.pop(name), parameter.grad, FP32, f"gradient of {name}")
    assert not actual
    assert_close(torch.tensor(step["gradient_norm"]), squares.sqrt(), FP32, "gradient norm")
