"""The training loop of one process. It reads top to bottom: render, step, average, log, save."""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from u4d.checkpoint import save_checkpoint
from u4d.errors import UserError
from u4d.model.codec import TinyCodec
from u4d.model.latents import Statistics
from u4d.model.streams import Streams
from u4d.model.transformer import Transformer
from u4d.train.clips import Schedule, batches
from u4d.train.codec import channel_weights, fit_grey_decoders, measure_statistics, train_codec
from u4d.train.recipe import Optim, Recipe
from u4d.train.step import training_loss


def train(
    recipe: Recipe, out: Path, *, workers: int = 1, device: str | torch.device = "cpu", progress: bool = True
) -> Path:
    """Train codec and transformer into `out/checkpoint`, resuming whatever `out` already holds.

    Args:
        recipe: what to train.
        out: run folder: recipe.json, log.jsonl, state.pt, codec/ and checkpoint/.
        workers: rendering processes; 0 renders in this one.
        device: where the transformer is trained; codec and statistics are made on the CPU.
    Returns:
        the checkpoint folder (diffusers layout, EMA weights).
    Raises:
        UserError: `out` belongs to another recipe, or the loss is not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    claim(out, recipe)
    codec = prepare_codec(recipe, out, progress)
    statistics, streams = measure_statistics(codec, recipe)
    weights = channel_weights(codec, statistics).to(device)
    model = build(recipe, codec, statistics, streams).to(device)
    codec = codec.to(device)
    average = deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, recipe.optim)
    start = restore(out, model, average, optimizer)
    schedule = Schedule(recipe.window, recipe.batch, recipe.draws, recipe.seed)
    frames, size = recipe.preset.transformer.num_frames, recipe.preset.transformer.image_size
    clips = batches(schedule, frames, size, start, recipe.steps, workers)
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, disable=not progress, unit="step")
    for step in bar:
        set_learning_rate(optimizer, recipe, step)
        began = time.perf_counter()
        batch = next(clips)
        waited = time.perf_counter() - began
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        with efficient_attention(weights.device):
            loss = training_loss(model, codec, statistics, batch, recipe.phase_at(step), weights, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip)
        require_finite(loss.total, norm, step, out)
        optimizer.step()
        update_average(average, model, min(recipe.optim.ema, (step + 1) / (step + 10)))
        log(out, step, loss.per_stream.detach(), norm.detach(), time.perf_counter() - began, waited)
        bar.set_postfix(loss=f"{float(loss.total.detach()):.3f}", wait=f"{waited:.1f}s")
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            save(out, step + 1, model, average, optimizer, codec)
    return out / "checkpoint"


def claim(out: Path, recipe: Recipe) -> None:
    """Write the recipe into a new run folder, or check that an old one is the same recipe's."""
    text = json.dumps(asdict(recipe), indent=1)
    path = out / "recipe.json"
    if path.exists() and path.read_text() != text:
        raise UserError(f"{path}: this folder holds a run of another recipe; choose a new folder or delete it")
    path.write_text(text)


def prepare_codec(recipe: Recipe, out: Path, progress: bool) -> TinyCodec:
    """The run's codec: loaded if it was trained before."""
    folder = out / "codec"
    if folder.exists():
        trained: TinyCodec = TinyCodec.from_pretrained(folder).eval()
        return trained
    with tqdm(total=recipe.codec.steps, disable=not progress, unit="step", desc="codec") as bar:

        def report(step: int, values: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix({name: f"{value:.1f}" for name, value in values.items()})

        codec = train_codec(recipe, report)
    codec.save_pretrained(folder)
    return codec


def build(recipe: Recipe, codec: TinyCodec, statistics: Statistics, streams: Streams) -> Transformer:
    """A fresh model that carries its latent statistics."""
    torch.manual_seed(recipe.seed)
    config = replace(
        recipe.preset.transformer,
        latents_mean=tuple(map(tuple, statistics.mean.tolist())),
        latents_std=tuple(map(tuple, statistics.std.tolist())),
        reference_fov_rad=statistics.reference_fov_rad,
    )
    model = Transformer(config)
    if model.motion is not None:
        fit_grey_decoders(model.motion, codec, statistics, streams)
    return model


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 3]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 3]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Linear warm-up, constant, linear decay to zero at the end."""
    optim, steps = recipe.optim, recipe.steps
    warm = (step + 1) / optim.warmup
    left = (steps - step) / max(1, round(optim.decay * steps))
    for group in optimizer.param_groups:
        group["lr"] = optim.lr * min(1.0, warm, left)


def efficient_attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU, plain bf16 products are 1.3x as fast in training as the fused kernel (docs/lab-notes.md)."""
    if device.type == "cuda":
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return sdpa_kernel([SDPBackend.MATH])


def require_finite(loss: Tensor, norm: Tensor, step: int, out: Path) -> None:
    """Stop at the first NaN: it is never masked."""
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise UserError(f"step {step}: loss {float(loss)}, gradient norm {float(norm)}; last good state is in {out}")


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Exponential moving average of the weights."""
    mine: list[Tensor] = list(average.parameters())
    theirs: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(mine, theirs, 1 - keep)


def log(out: Path, step: int, per_stream: Tensor, norm: Tensor, seconds: float, waited: float) -> None:
    """One JSON line per step."""
    line = {
        "step": step,
        "loss": [round(float(value), 5) for value in per_stream],
        "grad_norm": round(float(norm), 4),
        "seconds": round(seconds, 3),
        "data_wait": round(waited, 3),
    }
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def save(
    out: Path, step: int, model: nn.Module, average: Transformer, optimizer: torch.optim.Optimizer, codec: TinyCodec
) -> None:
    """Write the resumable state and the checkpoint, each by renaming a finished file or folder."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optim": optimizer.state_dict(),
    }
    torch.save(state, out / "state.tmp")
    os.replace(out / "state.tmp", out / "state.pt")
    save_checkpoint(out / "checkpoint", average, codec, torch.bfloat16)


def restore(out: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the state that `out` holds, if any; returns the step to go on from. The log is cut back to that step.

    Raises:
        UserError: the state is damaged.
    """
    path = out / "state.pt"
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(f"{path}: damaged, so this run can't go on: {error}; delete it to start again") from error
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optim"])
    step = int(state["step"])
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < step))
    return step
