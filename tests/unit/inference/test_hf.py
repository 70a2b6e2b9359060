"""The Hugging Face class: saving and loading, data types, decoding, generate(), padding, loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from linear_moe.inference.generate import generate
from linear_moe.inference.hf import LinearMoECache, LinearMoEForCausalLM
from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import DECODE, FP32, assert_close
from tests.unit.inference.common import CASES, VOCAB, build, prompt

NAMES = ("past_key_values", "cache")  # transformers' old and new name of a decoding state
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_save_and_load_is_bit_equal(case: str, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LinearMoEForCausalLM
    tokens = torch.tensor([prompt(21), prompt(21, seed=1)])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        # the class adds nothing of its own
        assert torch.equal(model(tokens).logits, model.model(tokens, TokenLayout(2, 21)))


@every_case
def test_names_on_disk_are_the_training_names(case: str, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"model.{name}" for name, _ in model.model.named_parameters()}


@every_case
def test_bf16_load_keeps_fp32_parameters(case: str, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    parameters = dict(loaded.named_parameters())
    for name, original in model.named_parameters():
        kind = torch.float32 if original.spec.fp32 else torch.bfloat16
        assert parameters[name].dtype == kind, name
        assert torch.equal(parameters[name], original.to(kind)), name
    tokens = torch.tensor([prompt(9)])
    with torch.no_grad():
        logits = loaded(tokens).logits
        state = loaded(tokens, use_cache=True).past_key_values.state
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert torch.float32 not in {t.dtype for layer in state.layers for name, t in layer.items() if name in ("k", "v")}
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in parameters.items()}


@every_case
@pytest.mark.parametrize("first", [1, 12])
def test_decoding_equals_the_full_forward_pass(case: str, first: int) -> None:
    model, length = build(case), 20
    tokens = torch.tensor([prompt(length), prompt(length, seed=1)])
    with torch.no_grad():
        full = model(tokens).logits
        out = model(tokens[:, :first], use_cache=True)
        logits = [out.logits]
        for t in range(first, length):
            out = model(tokens[:, t : t + 1], **{NAMES[t % 2]: out.cache})
            logits.append(out.logits)
        assert_close(torch.cat(logits, 1), full, DECODE)
        # a second chunk on top of a state
        cache = model(tokens[:, :first], use_cache=True).past_key_values
        assert_close(model(tokens[:, first:], past_key_values=cache).logits, full[:, first:], DECODE)
        assert cache.get_seq_length() == length and cache.state.positions.tolist() == [length, length]


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_has_two_names(name: str) -> None:
    model = build("hybrid")
    tokens = torch.tensor([prompt(20)])
    with torch.no_grad():
        full = model(tokens).logits
        caches = [model(tokens[:, :12], use_cache=True).cache for _ in range(2)]
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            model(tokens[:, 12:], past_key_values=caches[0], cache=caches[1])
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            model.generate(tokens, past_key_values=caches[0], cache=caches[1])
        assert [cache.get_seq_length() for cache in caches] == [12, 12]
        out = model(tokens[:, 12:15], **{name: caches[0]})
        assert_close(out.logits, full[:, 12:15], DECODE)
        assert out.cache is out.past_key_values is caches[0]
        out = model(tokens[:, 15:], past_key_values=out.cache, cache=out.cache)  # one object, both names
        assert_close(out.logits, full[:, 15:], DECODE)


def test_output_is_that_of_transformers() -> None:
    """The output stores one decoding state, in the field of the installed transformers, as attribute, item or tuple."""
    model = build("hybrid")
    tokens = torch.tensor([prompt(6)])
    with torch.no_grad():
        out = model(tokens, labels=tokens, use_cache=True)
        without = model(tokens)
    assert isinstance(out, CausalLMOutputWithPast) and type(out.cache) is LinearMoECache
    theirs = CausalLMOutputWithPast(out.loss, out.logits, out.cache)  # the third field, whatever its name
    assert list(out.items()) == list(theirs.items())
    assert out.to_tuple() == out[:] == (out.loss, out.logits, out.cache) and out[0] is out.loss
    assert list(without) == ["logits"] and without.cache is None and without.past_key_values is None
    gathered = type(out)((key, value) for key, value in out.items())  # DataParallel gathers outputs in this way
    assert gathered.cache is gathered.past_key_values is out.cache and gathered.loss is out.loss


@every_case
def test_hf_generate_equals_ours(case: str) -> None:
    model, new = build(case), 12
    tokens = prompt(15)
    ours = generate(model.model, [tokens], max_new_tokens=new).tokens[0]
    for use_cache in (True, False):
        theirs = model.generate(torch.tensor([tokens]), max_new_tokens=new, do_sample=False, use_cache=use_cache)
        assert theirs[0].tolist() == tokens + ours, use_cache


@every_case
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_changes_nothing(case: str, use_cache: bool) -> None:
    model, new = build(case), 8
    prompts = [prompt(n, seed=n) for n in (3, 11, 7)]
    alone = [generate(model.model, [p], max_new_tokens=new).tokens[0] for p in prompts]
    width = max(map(len, prompts))
    tokens = torch.tensor([[5] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=use_cache)
    assert out[:, width:].tolist() == alone


def test_beam_search_and_sampling_with_cache_equal_those_without() -> None:
    model = build("hybrid")
    tokens = torch.tensor([prompt(9), prompt(9, seed=1)])
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}):
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            options |= {"attention_mask": mask, "max_new_tokens": 10, "use_cache": use_cache}
            runs.append(model.generate(tokens, **options))
        assert torch.equal(*runs), options


@pytest.mark.parametrize("name", NAMES)
def test_generate_continues_from_a_cache(name: str) -> None:
    """generate() gets the tokens that the cache has seen once more, but does not feed them to the model again."""
    model, new = build("hybrid"), 8
    prompts = [prompt(n, seed=n) for n in (7, 15)]
    alone = [generate(model.model, [p], max_new_tokens=new).tokens[0] for p in prompts]
    tokens = torch.tensor([[5] * 8 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 8 + [1] * 7, [1] * 15])
    with torch.no_grad():
        cache = model(tokens[:, :11], attention_mask=mask[:, :11], use_cache=True).cache
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, **{name: cache})
    assert out[:, 15:].tolist() == alone
    assert cache.get_seq_length() == 15 + new - 1 and cache.state.positions.tolist() == [7 + new - 1, 15 + new - 1]


def test_assisted_generation_is_refused() -> None:
    model = build("hybrid")
    for options in ({"assistant_model": build("tied")}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(torch.tensor([prompt(9)]), max_new_tokens=4, do_sample=False, **options)


def test_state_grows_beyond_its_first_capacity() -> None:
    model = build("hybrid")
    tokens = torch.tensor([prompt(5)])
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        room = cache.state.capacity
        more = torch.tensor([prompt(room, seed=1)])
        logits = model(more, past_key_values=cache).logits
        assert cache.state.capacity > room
        assert_close(logits, model(torch.cat([tokens, more], 1)).logits[:, 5:], DECODE)


def test_right_padding_is_for_training_only() -> None:
    model = build("hybrid")
    tokens = torch.tensor([prompt(9), prompt(9, seed=1)])
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    with torch.no_grad():
        assert_close(model(tokens, attention_mask=mask).logits[1, :6], model(tokens[1:, :6]).logits[0], FP32)
        with pytest.raises(ValueError, match="left padding"):
            model(tokens, attention_mask=mask, use_cache=True)
        mask[1, 8] = 1
        with pytest.raises(ValueError, match="left padding"):
            model(tokens, attention_mask=mask)


def test_cache_and_gradients_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="no_grad"):
        build("tied")(torch.tensor([prompt(3)]), use_cache=True)


def test_loss_is_the_mean_over_next_tokens_and_has_gradients() -> None:
    model = build("hybrid")
    tokens = torch.tensor([prompt(12), prompt(12, seed=1)])
    labels = tokens.clone()
    labels[0, :4] = -100
    out = model(tokens, labels=labels)
    probs = out.logits.detach().softmax(-1)
    picked = [probs[b, t, tokens[b, t + 1]].log() for b in range(2) for t in range(11) if labels[b, t + 1] != -100]
    assert_close(out.loss, -torch.stack(picked).mean(), FP32)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    training = model.model(tokens[:, :-1], TokenLayout(2, 11), labels=tokens[:, 1:])
    assert_close(training.mean(), F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), FP32)


def test_logits_to_keep() -> None:
    model = build("hybrid")
    tokens = torch.tensor([prompt(12)])
    with torch.no_grad():
        for use_cache in (True, False):
            for mask in (None, torch.tensor([[0] + 11 * [1]])):
                options = {"attention_mask": mask, "use_cache": use_cache}
                every = model(tokens, **options).logits
                assert_close(model(tokens, logits_to_keep=2, **options).logits, every[:, -2:], FP32)
                assert every.shape == (1, 12, VOCAB) and (mask is None) == bool(every[0, 0].any())
    assert_close(every[0, 1:], model(tokens[:, 1:]).logits[0], FP32)


def test_a_checkpoint_that_lacks_a_parameter_is_refused(tmp_path: Path) -> None:
    model = build("hybrid")
    state = model.state_dict()
    state.pop("model.layers.1.mixer.A_log")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 parameter.*layers\.1\.mixer\.A_log"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_unknown_model_key_is_a_clear_error(tmp_path: Path) -> None:
    build("tied").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["mixer"]["typo"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="typo"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


SCRIPT = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
assert "linear_moe" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
import linear_moe.inference.hf
from linear_moe.inference import export, generate
again = AutoModelForCausalLM.from_pretrained(sys.argv[2])
for m in (model, again):
    print(m.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False).tolist())
assert not [name for name in sys.modules if name.split(".")[0] == "megatron"]
"""


def test_loads_and_generates_without_megatron_installed(tmp_path: Path) -> None:
    """A process without Megatron-Core loads the model twice: by the exported module, then by our registered classes."""
    model = build("hybrid")
    model.save_pretrained(tmp_path / "a")
    path = os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a"), str(tmp_path / "b")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False).tolist()
    assert [json.loads(line) for line in result.stdout.splitlines()] == [expected, expected]
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b  # what was loaded remotely is saved as it was
