"""Recording of the results of flash-linear-attention's layers, which tests/golden expects; needs a CUDA device and fla.

    python scripts/golden/record.py --out tests/golden            # all layers; kernels compile for a few minutes
    python scripts/golden/record.py --out tests/golden --only gla kda --jobs 2

For each layer there is one safetensors file, all in bf16: `x [B, T, hidden]`, `cotangent` and `y` of the same shape,
`weight.NAME` and `grad.NAME` for every parameter under fla's names, `grad.x`, and further inputs as `input.NAME`. The
metadata have layer, options and versions.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH, LENGTH, HIDDEN = 2, 90, 128
HEADS = {"hidden_size": HIDDEN, "num_heads": 2}

# Name of the file -> fla's layer, its options, and the shapes of further inputs of its forward pass by name.
LAYERS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "linear_attention": (
        "linear_attn:LinearAttention",
        HEADS | {"feature_map": "elu", "do_feature_map_norm": True},
        {},
    ),
    "linear_attention_hedgehog": ("linear_attn:LinearAttention", HEADS | {"feature_map": "hedgehog"}, {}),
    "retention": ("multiscale_retention:MultiScaleRetention", HEADS, {}),
    "gla": ("gla:GatedLinearAttention", HEADS | {"expand_k": 1.0}, {}),
    "gla_conv": ("gla:GatedLinearAttention", HEADS | {"expand_k": 1.0, "use_short_conv": True}, {}),
    "deltanet": ("delta_net:DeltaNet", HEADS, {}),
    "deltanet_gate": ("delta_net:DeltaNet", HEADS | {"use_gate": True, "allow_neg_eigval": True}, {}),
    "gated_deltanet": ("gated_deltanet:GatedDeltaNet", HEADS | {"head_dim": 64, "expand_v": 1.0}, {}),
    "gsa": ("gsa:GatedSlotAttention", HEADS | {"num_slots": 64}, {}),
    "based": ("based:BasedLinearAttention", HEADS | {"num_key_value_heads": 2}, {}),
    "rebased": ("rebased:ReBasedLinearAttention", HEADS | {"num_key_value_heads": 2, "mode": "chunk"}, {}),
    "kda": ("kda:KimiDeltaAttention", HEADS | {"head_dim": 64}, {}),
    "gated_deltaproduct": (
        "gated_deltaproduct:GatedDeltaProduct",
        HEADS | {"head_dim": 64, "expand_v": 1.0, "num_householder": 2},
        {},
    ),
    "mom": ("mom:MomAttention", HEADS | {"head_dim": 64, "expand_v": 1.0, "num_memories": 4}, {}),
    "mom_shared": (
        "mom:MomAttention",
        HEADS | {"head_dim": 64, "expand_v": 1.0, "num_memories": 4, "shared_mem": True, "single_kv_proj": True},
        {},
    ),
    "mamba2": (
        "mamba2:Mamba2",
        {"hidden_size": HIDDEN, "num_heads": 4, "head_dim": 64, "state_size": 64, "backend": "triton"},
        {},
    ),
    "mamba": ("mamba:Mamba", {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "backend": "triton"}, {}),
    "rwkv6": ("rwkv6:RWKV6Attention", HEADS | {"expand_k": 1.0}, {}),
    "rwkv7_first": (
        "rwkv7:RWKV7Attention",
        {"hidden_size": HIDDEN, "head_dim": 64, "layer_idx": 0, "num_hidden_layers": 2},
        {},
    ),
    "rwkv7": (
        "rwkv7:RWKV7Attention",
        {"hidden_size": HIDDEN, "head_dim": 64, "layer_idx": 1, "num_hidden_layers": 2},
        {"v_first": (BATCH, LENGTH, HIDDEN)},
    ),
    "hgrn": ("hgrn:HGRNAttention", {"hidden_size": HIDDEN, "layer_idx": 1}, {"lower_bound": (HIDDEN,)}),
    "hgrn2": (
        "hgrn2:HGRN2Attention",
        {"hidden_size": HIDDEN, "expand_ratio": 64, "layer_idx": 1},
        {"lower_bound": (HIDDEN,)},
    ),
}


def first_configurations() -> None:
    """Makes every Triton kernel take its first configuration that launches.

    Autotuning would take minutes, and the choice does not change the results.
    """
    from triton.runtime.autotuner import Autotuner

    bench = Autotuner._bench

    def first_that_launches(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if getattr(self, "_launched_for", None) is self.nargs:
            return [float("inf")] * 3
        self.do_bench = lambda call, quantiles: call() or [0.0] * 3
        timing = bench(self, *args, config=config, **meta)
        if timing[0] == 0.0:
            self._launched_for = self.nargs
        return timing

    Autotuner._bench = first_that_launches


def record(name: str, out: Path) -> None:
    import fla
    import torch
    import triton
    from safetensors.torch import save_file

    first_configurations()
    place, options, further = LAYERS[name]
    module, _, cls = place.partition(":")
    torch.manual_seed(0)
    layer = getattr(importlib.import_module(f"fla.layers.{module}"), cls)(**options)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():  # at initial values, a swapped or ignored parameter could go unnoticed
        for parameter in layer.parameters():
            parameter.add_(0.05 * normal(*parameter.shape))
    layer = layer.to("cuda", torch.bfloat16).eval()  # eval: MoM's convolution runs across sequences in training mode
    x, cotangent = (normal(BATCH, LENGTH, HIDDEN).to("cuda", torch.bfloat16) for _ in range(2))
    inputs = {key: normal(*shape).to("cuda", torch.bfloat16) for key, shape in further.items()}
    if "lower_bound" in inputs:
        inputs["lower_bound"] = inputs["lower_bound"].sigmoid()
    # Inputs are copied, because fla's RWKV-7 overwrites its input with the gradient of the input.
    tensors = {"x": x.clone()} | {f"input.{key}": value.clone() for key, value in inputs.items()}
    x.requires_grad_()
    output = layer(x, **inputs)
    y = output[0] if isinstance(output, tuple) else output
    parameters = dict(layer.named_parameters())
    (y * cotangent).sum().backward()
    assert x.grad is not None
    tensors |= {"cotangent": cotangent, "y": y, "grad.x": x.grad}
    tensors |= {f"weight.{key}": value for key, value in parameters.items()}
    tensors |= {f"grad.{key}": value.grad for key, value in parameters.items() if value.grad is not None}
    assert all(bool(t.isfinite().all()) for t in tensors.values()), name
    metadata = {
        "layer": f"fla.layers.{module}.{cls}",
        "options": json.dumps(options),
        "fla": fla.__version__,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
    }
    contents = {key: t.detach().to("cpu", torch.bfloat16).contiguous() for key, t in tensors.items()}
    save_file(contents, out / f"{name}.safetensors", metadata)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden"), help="folder of the files")
    parser.add_argument("--only", nargs="*", choices=list(LAYERS), metavar="NAME", help=f"layers: {', '.join(LAYERS)}")
    parser.add_argument("--jobs", type=int, default=8, help="processes, each of which records one layer at a time")
    parser.add_argument("--here", action="store_true", help="record in this process")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    names = args.only or list(LAYERS)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here:
        for name in names:
            record(name, args.out)
        return 0
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            command = [sys.executable, __file__, "--here", "--out", str(args.out), "--only", name]
            running[name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        name, process = next(iter(running.items()))
        _, errors = process.communicate()
        del running[name]
        print(name, "recorded" if process.returncode == 0 else "FAILED", flush=True)
        if process.returncode:
            failed.append(name)
            print(errors[-1500:], file=sys.stderr, flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
