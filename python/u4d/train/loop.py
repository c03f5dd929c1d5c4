"""The training loop of one process. It reads top to bottom: render, step, average, log, save."""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from u4d.checkpoint import save_checkpoint
from u4d.errors import UserError
from u4d.model.codec import TinyCodec
from u4d.model.lora import lora_parameters
from u4d.model.lora_folder import save_lora
from u4d.model.transformer import Transformer
from u4d.train.clips import Schedule, batches
from u4d.train.codec import channel_weights
from u4d.train.recipe import Optim, Recipe
from u4d.train.start import fresh_start, start_from_checkpoint
from u4d.train.step import training_loss


def train(
    recipe: Recipe, out: Path, *, workers: int = 1, device: str | torch.device = "cpu", progress: bool = True
) -> Path:
    """Train codec and transformer, or what the recipe wants of a checkpoint, resuming whatever `out` already holds.

    Args:
        recipe: what to train.
        out: run folder: recipe.json, log.jsonl, state.pt, and checkpoint/ (and codec/, if new) or adapter/.
        workers: rendering processes; 0 renders in this one.
        device: where the transformer is trained; codec and statistics are made on the CPU.
    Returns:
        the checkpoint folder (diffusers layout, EMA weights), or the adapter's (peft's layout, EMA adapters).
    Raises:
        UserError: `out` belongs to another recipe, its checkpoint is not there or does not fit, or the loss is not
            finite.
    """
    begin = None if recipe.start is None else start_from_checkpoint(recipe)  # refused before anything is written
    claim(out, recipe)
    begin = begin or fresh_start(recipe, out, progress)
    statistics = begin.statistics
    weights = channel_weights(begin.codec, statistics).to(device)
    model, codec = begin.model.to(device), begin.codec.to(device)
    average = copy_to_average(model)
    optimizer = make_optimizer(model, recipe.optim)
    start = restore(out, model, average, optimizer, begin.digest)
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
            save_result(out, recipe, average, codec)  # first: a run whose state says that it is over has its result
            save(out, step + 1, model, average, optimizer, begin.digest)
    return out / result_name(recipe)


def claim(out: Path, recipe: Recipe) -> None:
    """Write the recipe into a new run folder, or check that an old one is the same recipe's."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(recipe), indent=1)
    path = out / "recipe.json"
    if path.exists() and path.read_text() != text:
        raise UserError(f"{path}: this folder holds a run of another recipe; choose a new folder or delete it")
    path.write_text(text)


def result_name(recipe: Recipe) -> str:
    """The folder that a run is for."""
    return "checkpoint" if recipe.start is None or recipe.start.lora_rank is None else "adapter"


def copy_to_average(model: Transformer) -> Transformer:
    """A copy whose trained parameters are its own; frozen ones are shared, since they may be most of the memory."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    average = deepcopy(model, shared)
    average.eval().requires_grad_(False)
    return average


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over what is trained; weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 3]
    others = [parameter for parameter in trained if parameter.ndim < 3]
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
    """Exponential moving average of what is trained."""
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    mine, theirs = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
    torch._foreach_lerp_(list(mine), list(theirs), 1 - keep)


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
    out: Path, step: int, model: Transformer, average: Transformer, optimizer: torch.optim.Optimizer, digest: str
) -> None:
    """Write the resumable state by renaming a finished file."""
    state = {
        "step": step,
        "model": trained_state(model),
        "average": trained_state(average),
        "optim": optimizer.state_dict(),
        "digest": digest,
    }
    torch.save(state, out / "state.tmp")
    os.replace(out / "state.tmp", out / "state.pt")


def save_result(out: Path, recipe: Recipe, average: Transformer, codec: TinyCodec) -> None:
    """Write the checkpoint or the adapter by renaming a finished folder."""
    folder = out / result_name(recipe)
    if recipe.start is not None and recipe.start.lora_rank is not None:
        save_lora(average, folder, base=recipe.start.checkpoint)
    else:
        save_checkpoint(folder, average, codec, torch.bfloat16)


def trained_state(model: Transformer) -> dict[str, Tensor]:
    """The adapters, where there are some: the rest comes from the checkpoint. Otherwise the whole state."""
    adapters = {name: parameter.detach() for name, parameter in lora_parameters(model).items()}
    return adapters or model.state_dict()


def restore(out: Path, model: Transformer, average: Transformer, optimizer: torch.optim.Optimizer, digest: str) -> int:
    """Load the state that `out` holds, if any; returns the step to go on from. The log is cut back to that step.

    Raises:
        UserError: the state is damaged, or the checkpoint that the run began with has changed.
    """
    path = out / "state.pt"
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(f"{path}: damaged, so this run can't go on: {error}; delete it to start again") from error
    if state.get("digest", "") != digest:
        raise UserError(
            f"{path}: the checkpoint that this run began with (see {out / 'recipe.json'}) holds other weights now, so "
            "it can't go on; bring the old ones back, or choose a new folder"
        )
    for module, part in ((model, "model"), (average, "average")):
        module.load_state_dict({**module.state_dict(), **state[part]})
    optimizer.load_state_dict(state["optim"])
    step = int(state["step"])
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < step))
    return step
