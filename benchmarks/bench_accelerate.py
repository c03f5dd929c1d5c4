"""diffusers' Wan transformer as it is, on our ops, and compiled block by block: one forward without gradients.

    python benchmarks/bench_accelerate.py [--batch 1] [--layers N] [--no-compile] [--device cpu|cuda]
                                          [--threads N] [--rounds N] [--save]

On a GPU Wan2.1-T2V-1.3B at its own 480p, 81 frames: latents [1,16,21,60,104], 32,760 tokens, 30 layers, text of 512
tokens, bfloat16 with what diffusers keeps in float32. On a CPU a small model of the same class in float32. Weights are
random. In bfloat16 a version may be off by no more than twice what diffusers itself is off from float32, at two layers.
Compiled versions come last, since they take a minute to be made ready, and only if --seconds leaves one.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor

import u4d_fast

OURS = "u4d_fast.accelerate"
CHECKED_LAYERS = 2  # deep random models drown in rounding
FLOAT32_TOLERANCE = 1e-4
COMPILE_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """Sizes of a model and of what it is given."""

    name: str
    model: dict[str, Any]
    latents: tuple[int, ...]
    text_tokens: int
    dtype: torch.dtype


WAN_480P = Case(
    "wan2.1-1.3b, 81 frames of 480x832",
    {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096},
    (16, 21, 60, 104),
    512,
    torch.bfloat16,
)
SMALL = Case(
    "4 layers of 256, 6 latent frames of 24x32",
    {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "text_dim": 64},
    (16, 6, 24, 32),
    32,
    torch.float32,
)


def make_model(case: Case, layers: int, device: str, dtype: torch.dtype) -> Any:
    """Random weights; in half precision all but what diffusers keeps in float32."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(**case.model | {"num_layers": layers}).eval()
    kept = set(model._keep_in_fp32_modules)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def make_inputs(case: Case, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Noise and a prompt, the same for every dtype."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, *case.latents, generator=generator)
    text = torch.randn(batch, case.text_tokens, case.model["text_dim"], generator=generator)
    return {
        "hidden_states": latents.to(device, dtype),
        "timestep": torch.full((batch,), 500.0, device=device),
        "encoder_hidden_states": text.to(device, dtype),
        "return_dict": False,
    }


@torch.no_grad()
def forward(model: Callable[..., tuple[Tensor]], inputs: dict[str, Any]) -> Tensor:
    return model(**inputs)[0]


@torch.no_grad()
def check(case: Case, batch: int, device: str) -> dict[str, float]:
    """Errors of diffusers and of ours against float32, relative.

    Raises:
        SystemExit: ours is too large.
    """
    found: dict[str, Tensor] = {}
    for name, dtype in (("truth", torch.float32), ("diffusers", case.dtype), ("ours", case.dtype)):
        model = make_model(case, CHECKED_LAYERS, device, dtype)
        if name == "ours":
            u4d_fast.accelerate(model)
        found[name] = forward(model, make_inputs(case, batch, device, dtype)).double()
    truth = found.pop("truth")
    errors = {name: float((value - truth).norm() / truth.norm()) for name, value in found.items()}
    if not errors["ours"] <= max(2 * errors["diffusers"], FLOAT32_TOLERANCE):
        raise SystemExit(f"accelerate: off by {errors['ours']:g}, diffusers by {errors['diffusers']:g}: not measured")
    return errors


def measure(
    case: str, calls: dict[str, Callable[[], Tensor]], options: argparse.Namespace, error: dict[str, float]
) -> list[harness.Row]:
    """Rows of those versions, timed in turns, with the memory that each needs."""
    memory: dict[str, dict[str, float | str]] = {}
    for name, call in calls.items():
        memory[name] = {"error": error["ours" if "accelerate" in name else "diffusers"]}
        with harness.peak_memory(options.device, memory[name]):
            call()
    times = harness.measure(calls, options.device, options.rounds)
    return [harness.row(case, name, times[name], **memory[name]) for name in calls]


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=5)
    parser.add_argument("--batch", type=int, default=1, help="clips in one forward")
    parser.add_argument("--layers", type=int, help="of the model; by default all")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = WAN_480P if options.device == "cuda" else SMALL
    errors = check(case, options.batch, options.device)
    layers = options.layers or case.model["num_layers"]
    inputs = make_inputs(case, options.batch, options.device, case.dtype)
    plain, ours = (make_model(case, layers, options.device, case.dtype) for _ in range(2))
    u4d_fast.accelerate(ours)
    calls = {name: partial(forward, model, inputs) for name, model in (("diffusers, eager", plain), (OURS, ours))}
    shape, skipped = f"{case.name} x {options.batch}", dict[str, str]()
    gc.collect()
    rows = measure(shape, calls, options, errors)
    harness.keep("accelerate", rows, options)  # a compiler that takes too long must not cost these
    for name, model in () if options.no_compile else (("diffusers, compiled", plain), (f"{OURS}, compiled", ours)):
        if harness.time_left() < COMPILE_SECONDS:
            skipped[name] = f"{harness.time_left():.0f} s were left, too few to compile in"
            continue
        for block in model.blocks:
            block.compile(fullgraph=True)
        try:
            rows += measure(shape, {name: partial(forward, model, inputs)}, options, errors)
        except Exception as error:
            skipped[name] = harness.reason_of(error)
    harness.show("accelerate", rows, options, skipped)


if __name__ == "__main__":
    main()
