"""Training on several ranks equals that in one process, for every mixer: weights, gradients, losses, checkpoints."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.load import from_dict
from linear_moe.training.data.dataset import SyntheticDataset
from tests.distributed.harness import Ranks, run
from tests.distributed.masked import masked_sample
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close, relative_error
from tests.unit.modeling.mixers.common import variants

STEPS, SOME = 10, 4
CHECKED = 3  # number of steps compared with a training written out in this module
VOCAB = 12  # vocabulary size, which is also the mean length of a document
Results = dict[str, list[Any]]

# Router losses that are large enough to show in the results, and a bias of the choice that follows the load.
ROUTER = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "shared_ffn_size": 16, "shared_gate": True}
ROUTER |= {"score": "sigmoid", "expert_bias": True, "bias_update_rate": 0.02, "z_loss": 0.05}
LOCAL = ROUTER | {"aux_loss": 0.3, "sequence_aux_loss": 0.3}
# Losses that do not depend on the distribution of sequences over micro-batches.
SEQUENCE = ROUTER | {"aux_loss": 0.0, "sequence_aux_loss": 0.3}
GLOBAL = SEQUENCE | {"global_aux_loss": 0.3}


def config(model: dict[str, Any], parallel: dict[str, Any], /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny model in fp32, trained on packed documents; one process has two micro-batches a step."""
    base: dict[str, Any] = {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "pattern": "LL",
            "ffn_size": 32,
            "vocab_size": VOCAB,
            "init_std": 0.1,
            # A document's first output is (q k) v. If q k happens to be near 0, a norm with a small epsilon would blow
            # up rounding errors in the gradient.
            "norm_eps": 1e-2,
            "moe": LOCAL,
        },
        "training": {"sequence_length": 24, "micro_batch": 2, "global_batch": 4, "dtype": "fp32", "steps": 100},
        # Adam's first steps follow the signs of the gradients. With a larger eps, rounding does not decide the step of
        # a gradient near 0.
        "optimizer": {"lr": 3e-3, "eps": 1e-4, "clip": 0.5, "weight_decay": 1.0},
        "schedule": {"warmup_steps": 4},
        "data": {"corpus": "synthetic", "isolate_documents": True},
    }
    base["training"]["eval_batches"] = 1
    base["model"] |= model
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return base | {"parallel": parallel}


def mixer_model(name: str, which: int, **model: Any) -> dict[str, Any]:
    return {"mixer": {"type": name, **variants(name)[which]}, **model}


def stack(names: list[str], which: int, ffns: str = "moe dense", **model: Any) -> dict[str, Any]:
    """A hybrid model with one layer of each mixer in `names`; the kinds of FFN in `ffns` take turns."""
    kinds = cycle(ffns.split())
    letters = dict(zip(ascii_uppercase, names, strict=False))
    symbols = {letter: mixer_model(name, which, ffn=next(kinds)) for letter, name in letters.items()}
    return {"pattern": "".join(letters), "num_layers": len(names), "symbols": symbols, **model}


def even(names: list[str], parts: int) -> list[str]:
    """`names`, with the first ones repeated at the end, so that `parts` stages can share them out evenly."""
    return [*names, *names[: -len(names) % parts]]


NAMES = sorted(MIXERS)
FAMILIES = sorted({mixer_class(name).family: name for name in reversed(NAMES)}.values())
OTHERS = [name for name in NAMES if name not in FAMILIES]
# PURE: the first mixer of every family in a model of its own, with experts and with its options on. FEW: the other
# mixers, six in a model.
PURE = {f"{name}-pure": mixer_model(name, -1) for name in FAMILIES}
FEW = {f"others-{i // 6}": stack(even(OTHERS[i : i + 6], 2), -1) for i in range(0, len(OTHERS), 6)}
# Name of the model of all families together, with layers of experts and dense layers.
ALL = "families"
# BASE is the model that is saved and resumed. LOSSES has router losses, one of which depends on the micro-batch, and is
# also trained by a loop that is written out in this module.
BASE, LOSSES = f"{FAMILIES[1]}-hybrid", "gla-hybrid"
MODELS: dict[str, dict[str, Any]] = PURE | FEW
MODELS |= {
    ALL: stack(even(FAMILIES, 4), 0, moe=GLOBAL),
    "dense": stack(FAMILIES, 0, ffns="dense"),
    "tied": mixer_model("gla", 0, ffn="dense", tie_embeddings=True),
    BASE: mixer_model(FAMILIES[1], 0, pattern="LN", moe=SEQUENCE),
    LOSSES: mixer_model("gla", 0, pattern="LN"),
}

PLAIN = {"optimizer": {"distributed": False}}
OVERLAP = {"optimizer": {"overlap": True}}
# name -> (ranks, replicas of the model, parallel sizes, other sections)
LAYOUTS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, 1, {}, {}),
    "tp2": (2, 1, {"tensor": 2}, {}),
    "pp2": (2, 1, {"pipeline": 2}, {}),
    "pp2x2": (2, 1, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "ep2": (2, 2, {"expert": 2}, {}),
    "dp2": (2, 2, {}, {}),
    "dp2-plain": (2, 2, {}, PLAIN),
    "dp2-overlap": (2, 2, {}, OVERLAP),
    "ep2-etp2": (4, 4, {"expert": 2, "expert_tensor": 2}, {}),
    "tp2-pp2-ep2": (4, 1, {"tensor": 2, "pipeline": 2, "expert": 2}, {}),
}
MORE_LAYOUTS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "tp2-replicated": (2, 1, {"tensor": 2, "tensor_sequence": False}, {}),
    "tp2-ep2": (2, 1, {"tensor": 2, "expert": 2}, {}),
    "tp2-etp2": (2, 1, {"tensor": 2, "expert_tensor": 2}, {}),
    "dp2-plain-overlap": (2, 2, {}, {"optimizer": {"distributed": False, "overlap": True}}),
    "ep2-dp2-overlap": (4, 4, {"expert": 2}, OVERLAP),
    "tp2-ep2-dp2": (4, 2, {"tensor": 2, "expert": 2}, {}),
    "tp2-ep2-etp2": (4, 2, {"tensor": 2, "expert": 2, "expert_tensor": 2}, {}),
    "pp2-ep2-overlap": (4, 2, {"pipeline": 2, "expert": 2}, OVERLAP),
}
# Layouts that save the base model. Its two layers suffice for two stages, not for two interleaved ones.
WRITERS = [name for name in LAYOUTS if name != "pp2x2"]
BEFORE, AFTER = 2, 10  # steps before a checkpoint and after it


def covered() -> list[tuple[str, str]]:
    """Pairs (model, layout) that are trained and compared with one process."""
    spread = [name for name in LAYOUTS if name != "one"]
    pairs = [(name, layout) for name in PURE | FEW for layout in ("tp2", "pp2")]
    pairs += [(ALL, layout) for layout in [*spread, "pp2-ep2-overlap"]]
    pairs += [("dense", "tp2-replicated")]
    pairs += [("tied", layout) for layout in ("tp2", "tp2-replicated", "dp2-overlap")]
    pairs += [(BASE, layout) for layout in WRITERS if layout != "one"]
    extra_layouts = [layout for layout in MORE_LAYOUTS if layout != "tp2-replicated"]
    pairs += [(LOSSES, layout) for layout in [*extra_layouts, "ep2", "dp2", "ep2-etp2"]]
    return pairs


COVERED = covered()


def steps_of(model: str, layout: str) -> int:
    """Number of steps to train: all for every family in the main layouts; fewer for the rest, to save time."""
    if model == BASE:
        return BEFORE + AFTER
    return STEPS if model in PURE or (model == ALL and layout in LAYOUTS) else SOME


def case(root: Path, model: str, layout: str, /, **sections: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A case of `follow`; the base model is saved on the way."""
    _, replicas, parallel, layout_sections = (LAYOUTS | MORE_LAYOUTS)[layout]
    tree = config(MODELS[model], parallel, **layout_sections | sections) | {"run": str(root / layout)}
    if model in (ALL, BASE, LOSSES):
        tree["training"] |= {"global_batch": 8}
    if model in (ALL, BASE) and replicas == 1:
        tree["training"] |= {"micro_batch": 4}
    arguments = {"config": tree, "steps": steps_of(model, layout), "save_at": BEFORE if model == BASE else 0}
    return "follow", arguments


def reference_name(model: str, layout: str) -> str:
    """Name of the one-process run with which to compare a run.

    A loss of the load of all replicas is compared with a process whose micro-batches are the replicas' merged ones.
    """
    replicas = (LAYOUTS | MORE_LAYOUTS)[layout][1] if model == ALL else 1
    return f"{model}-of-{replicas}-{steps_of(model, layout)}"


def references(root: Path) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for model, layout in COVERED:
        function, arguments = case(root, model, "one")
        arguments["steps"] = steps_of(model, layout)
        if model == ALL:
            arguments["replicas"] = replicas = (LAYOUTS | MORE_LAYOUTS)[layout][1]
            own = case(root, model, layout)[1]["config"]["training"]["micro_batch"]
            arguments["config"]["training"] |= {"micro_batch": replicas * own}
        cases[reference_name(model, layout)] = function, arguments
    return cases


def spread(root: Path, world: int) -> dict[str, Any]:
    pairs = [pair for pair in COVERED if (LAYOUTS | MORE_LAYOUTS)[pair[1]][0] == world]
    return {f"{model}-{layout}": case(root, model, layout) for model, layout in pairs}


# -- one process, each ingredient left out ----------------------------------------------------------------------------
LEFT_OUT: dict[str, dict[str, Any]] = {
    "loss of a micro-batch": {"model": {"moe": LOCAL | {"aux_loss": 0.0}}},
    "loss of a sequence": {"model": {"moe": LOCAL | {"sequence_aux_loss": 0.0}}},
    "z-loss": {"model": {"moe": LOCAL | {"z_loss": 0.0}}},
    "moved biases": {"model": {"moe": LOCAL | {"bias_update_rate": 0.0}}},
    "clipping": {"optimizer": {"clip": 0.0}},
    "weight decay": {"optimizer": {"weight_decay": 0.0}},
    "packing": {"data": {"isolate_documents": False}},
}


ONE = {BASE: reference_name(BASE, "tp2"), LOSSES: reference_name(LOSSES, "dp2"), ALL: reference_name(ALL, "tp2")}


def left_out(root: Path) -> dict[str, Any]:
    return {f"without {name}": case(root, LOSSES, "one", **LEFT_OUT[name]) for name in LEFT_OUT}


# -- checkpoints ------------------------------------------------------------------------------------------------------
# For each layout, another one from whose checkpoint it trains on, besides its own; each layout is chosen once.
PARTNER = {reader: WRITERS[(i + 4) % len(WRITERS)] for i, reader in enumerate(WRITERS)}


def resuming(root: Path, world: int) -> dict[str, Any]:
    folders = {name: str(root / name) for name in WRITERS}
    cases = {}
    for name in WRITERS:
        if LAYOUTS[name][0] == world:
            arguments = {"config": case(root, BASE, name)[1]["config"], "folders": folders, "after": AFTER}
            cases[f"resume-{name}"] = "resume_elsewhere", arguments | {"go_on": [name, PARTNER[name]]}
    return cases


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all runs. The runs of one process run beside those of two, to use the processor cores better."""
    root = tmp_path_factory.mktemp("runs")
    one = Ranks(1, references(root) | left_out(root))
    outcomes = run(2, spread(root, 2)) | one.results()
    outcomes |= run(4, spread(root, 4) | resuming(root, 4))
    one = Ranks(1, resuming(root, 1))
    return outcomes | run(2, resuming(root, 2)) | one.results()


def together(ranks: list[Any], key: str) -> dict[str, Tensor]:
    """Full tensors, put together from every rank's pieces. Asserts that elements which two ranks hold are equal."""
    full: dict[str, Tensor] = {}
    for rank in ranks:
        for name, (shape, index, value) in rank[key].items():
            flat = full.setdefault(name, torch.full(shape, torch.nan)).view(-1)
            known = flat[index]
            assert torch.equal(torch.where(known.isnan(), value, known), value), f"replicas of {key} {name} differ"
            flat[index] = value
    return full


def numbers(result: dict[str, Any]) -> dict[str, Tensor]:
    series = {key: torch.tensor([step[key] for step in result["steps"]]) for key in ("loss", "tokens", "gradient_norm")}
    return series | {"validation": torch.tensor(result["validation"])}


def assert_same_steps(result: dict[str, Any], expected: dict[str, Any], without: str = "") -> None:
    actual, reference = numbers(result), numbers(expected)
    assert len(result["steps"]) == len(expected["steps"])
    for key, value in reference.items():
        assert_close(actual[key].double(), value.double(), 0.0 if key == "tokens" else FP32, key)
    for step, other in zip(result["steps"], expected["steps"], strict=True):
        router = {key: value for key, value in other["router"].items() if key != without}
        assert {key: step["router"][key] for key in router} == pytest.approx(router, rel=FP32)
        assert step["routing"] == other["routing"]  # exactly: loads are integers, and all ranks update biases alike


@pytest.mark.parametrize(("model", "layout"), COVERED, ids=lambda name: name)
def test_equals_one_process(results: Results, model: str, layout: str) -> None:
    ranks, (reference,) = results[f"{model}-{layout}"], results[reference_name(model, layout)]
    initial, expected = together(ranks, "initial"), together([reference], "initial")
    assert initial.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(initial[name], value)]
    assert not different, f"initial weights differ: {different}"
    actual, expected = together(ranks, "gradients"), together([reference], "gradients")
    assert_gradients_close(actual, expected, FP32, FP32_GRADIENT_FLOOR)
    for rank in ranks:
        # The balance within micro-batches depends on their number, so these two models' loss is left out.
        assert_same_steps(rank, reference, "load_balancing_loss" if model in (ALL, BASE) else "")
    final, expected = together(ranks, "final"), together([reference], "final")
    for name, value in expected.items():
        assert_close(final[name], value, 10 * FP32, f"{name} after the last step")


@pytest.mark.parametrize("name", LEFT_OUT)
def test_every_ingredient_counts(results: Results, name: str) -> None:
    """Each ingredient of training changes the losses enough for `test_equals_one_process` to notice its absence."""
    (without,), (reference,) = results[f"without {name}"], results[ONE[LOSSES]]
    actual, expected = numbers(without), numbers(reference)
    assert relative_error(actual["loss"], expected["loss"]) > 10 * FP32


def test_micro_batches_count_different_numbers_of_tokens(results: Results) -> None:
    """Micro-batches and replicas count different numbers of tokens; otherwise wrong averages would go unnoticed."""
    tree = from_dict(Config, case(Path(), BASE, "one")[1]["config"])
    t, dataset = tree.training, SyntheticDataset(VOCAB, tree.training.sequence_length, 2 * tree.training.seed + 1, True)
    for step in range(STEPS):
        samples = [masked_sample(dataset, step * t.global_batch + i) for i in range(t.global_batch)]
        counts = torch.stack([sample["loss_mask"].sum() for sample in samples])
        assert counts.sum() == results[ONE[BASE]][0]["steps"][step]["tokens"]
        for parts in (2, 4):  # two replicas, and four micro-batches
            assert len(set(counts.view(parts, -1).sum(1).tolist())) > 1


def assert_goes_on(resumed: list[Any], expected: list[Any], exact: bool) -> None:
    """Asserts that steps after a checkpoint are those of the uninterrupted run; with `exact`, bit for bit."""
    assert len(resumed) == len(expected) == AFTER
    for one, other in zip(resumed, expected, strict=True):
        loads = [[(layer["load"], layer["bias"]) for layer in step["routing"]] for step in (one, other)]
        assert loads[0] == loads[1]
        if exact:
            assert all(one[key] == other[key] for key in ("loss", "gradient_norm", "tokens", "router"))
    for key in ("loss", "gradient_norm", "tokens"):
        sides = [torch.tensor([float(step[key]) for step in side]) for side in (resumed, expected)]
        assert_close(*sides, FP32, key)


@pytest.mark.parametrize("reader", WRITERS)
def test_resumes_what_any_layout_saved(results: Results, reader: str) -> None:
    ranks = results[f"resume-{reader}"]
    for rank in ranks:
        assert rank["wrong"] == {writer: [] for writer in WRITERS}
        for writer in (reader, PARTNER[reader]):
            saved = results[ONE[BASE] if writer == "one" else f"{BASE}-{writer}"][0]
            assert_goes_on(rank["steps"][writer], saved["steps"][BEFORE:], exact=writer == reader)


# -- the training of one process, written out -------------------------------------------------------------------------
class RecordingHost(Host):
    """Host that records every router's logits and choice, in the order of the tokens, and adds no losses."""

    def __init__(self) -> None:
        super().__init__()
        self.routed: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def router_losses(
        self, weights: Tensor, logits: Tensor, index: Tensor, config: MoEConfig, layer: int, layout: TokenLayout
    ) -> Tensor:
        self.routed.setdefault(layer, []).append((logits, index))
        return weights


def documents(tokens: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cuts tokens and mask `[T]` after every end of a document, which is token 0."""
    ends = [i + 1 for i, token in enumerate(tokens.tolist()) if token == 0 and i + 1 < len(tokens)]
    cuts = list(zip([0, *ends], [*ends, len(tokens)], strict=True))
    return [(tokens[a:b], mask[a:b]) for a, b in cuts]


def even_load(index: Tensor, scores: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Load-balancing loss `E * sum_i f_i P_i` of tokens with choices `index` and `scores`.

    The shares f_i are those of `index`, or with `chosen`, of these counts of choices per expert.
    """
    share = torch.bincount(index.flatten(), minlength=4) if chosen is None else chosen
    return 4 * (share / share.sum() * scores.mean(0)).sum()


def routers_loss(routed: list[tuple[Tensor, Tensor]], moe: MoEConfig, so_far: Tensor) -> Tensor:
    """Router losses of one layer and micro-batch, times its tokens; adds the choices to the load `so_far`.

    `routed` has logits and choices document by document.
    """
    logits, index = (torch.cat(parts) for parts in zip(*routed, strict=True))
    share = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    so_far += torch.bincount(index.flatten(), minlength=4)
    loss = moe.aux_loss * even_load(index, share) + moe.global_aux_loss * even_load(index, share, so_far.clone())
    loss = loss + moe.z_loss * logits.exp().sum(-1).log().square().mean()
    for one_logits, one_index in routed:
        one = one_logits.sigmoid() / one_logits.sigmoid().sum(-1, keepdim=True)
        loss = loss + moe.sequence_aux_loss * even_load(one_index, one) * len(one) / len(index)
    return loss * len(index)


@pytest.mark.parametrize("name", [LOSSES, ALL])
def test_one_process_is_what_the_options_say(results: Results, name: str) -> None:
    """One process trains like a plain loop over single documents, with PyTorch's loss, clipping and AdamW.

    The plain loop computes the routers' losses by `routers_loss`.
    """
    tree = from_dict(Config, case(Path(), name, "one")[1]["config"])
    t, o, moe = tree.training, tree.optimizer, tree.model.moe
    dataset = SyntheticDataset(VOCAB, t.sequence_length, 2 * t.seed + 1, True)
    host = RecordingHost()
    model = LanguageModel(tree.model, VOCAB, host)
    initialize(model, host, t.seed)
    trained: dict[bool, list[Any]] = {True: [], False: []}
    for p in model.parameters():
        if p.requires_grad:
            trained[p.spec.decay].append(p)  # type: ignore[attr-defined]
    groups = [{"params": trained[True], "weight_decay": o.weight_decay}, {"params": trained[False], "weight_decay": 0}]
    adam = torch.optim.AdamW(groups, o.lr, (o.beta1, o.beta2), o.eps)
    routers = {i: getattr(layer.ffn, "router", None) for i, layer in enumerate(model.layers.values())}
    biases = {i: router.expert_bias for i, router in routers.items() if router is not None}
    (reference,) = results[ONE[name]]
    computed = []
    for step in range(CHECKED):
        adam.zero_grad()
        total, counted = torch.zeros(()), 0
        loads = {layer: torch.zeros(4) for layer in biases}
        numbers = range(step * t.global_batch, (step + 1) * t.global_batch)
        masks = sum(masked_sample(dataset, number)["loss_mask"].sum() for number in numbers)
        # Routers' losses are means over all tokens, but gradients are divided by the number of counted tokens only.
        share = masks / (t.global_batch * t.sequence_length)
        for first in numbers[:: t.micro_batch]:
            host.routed.clear()
            objective = torch.zeros(())
            for number in range(first, first + t.micro_batch):
                sample = masked_sample(dataset, number)
                labels = sample["labels"]
                for tokens, mask in documents(sample["tokens"], sample["loss_mask"]):
                    logits = model(tokens.unsqueeze(0), TokenLayout(1, len(tokens)))[0]
                    losses = F.cross_entropy(logits, labels[: len(tokens)], reduction="none")
                    labels = labels[len(tokens) :]
                    objective = objective + (losses * mask).sum()
                    counted += int(mask.sum())
            total += objective.detach()
            (objective + share * sum(routers_loss(host.routed[i], moe, loads[i]) for i in biases)).backward()
        parameters = [*trained[True], *trained[False]]
        for p in parameters:
            p.grad /= counted
        norm = torch.nn.utils.clip_grad_norm_(parameters, o.clip)
        assert norm > o.clip
        if step == 0:
            actual = together([reference], "gradients")
            expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            assert_gradients_close(actual, expected, FP32, FP32_GRADIENT_FLOOR)
        for group in adam.param_groups:
            group["lr"] = o.lr * min(1.0, (step + 1) / tree.schedule.warmup_steps)
        adam.step()
        with torch.no_grad():
            for layer, bias in biases.items():
                bias += moe.bias_update_rate * torch.sign(loads[layer].mean() - loads[layer])
        computed.append((float(total) / counted, counted, float(norm)))
    steps = [(step["loss"], step["tokens"], step["gradient_norm"]) for step in reference["steps"][:CHECKED]]
    assert_close(torch.tensor(steps), torch.tensor(computed), FP32, "losses, tokens and gradient norms")
