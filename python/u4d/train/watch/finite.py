"""The stop at the first loss or gradient that is no number: it is never masked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.train.data.samples import Samples
from u4d.train.world import World


def require_finite(loss: Tensor, norm: Tensor, step: int, samples: Samples, out: Path, world: World) -> None:
    """Go on if all is well; else keep what this process worked on in `out`, and stop.

    Args:
        loss: `[4]` of the global batch; norm: of its gradient. Both are the same in all processes.
        step: that was computed; the weights have not changed yet.
        samples: of this process.
    Raises:
        UserError: one of them is not finite.
    """
    if bool(torch.isfinite(loss).all()) and bool(torch.isfinite(norm)):
        return
    rank = "" if world.size == 1 else f".rank{world.rank}"
    path = out / f"bad_step_{step:08d}{rank}.pt"
    torch.save(as_tensors(samples, step), path)
    raise UserError(
        f"step {step}: loss {[round(value, 5) for value in loss.tolist()]}, gradient norm {float(norm)}; "
        f"places {samples.places.start} to {samples.places.stop - 1}, clips {samples.clips.numbers.tolist()}: "
        f"saved in {path}; the last good state is in {out / 'state'}"
    )


def as_tensors(samples: Samples, step: int) -> dict[str, object]:
    """The samples as torch.load(weights_only=True) reads them."""
    return {
        "step": step,
        "places": list(samples.places),
        "numbers": samples.clips.numbers,
        "available": samples.clips.available,
        "noise": samples.noise,
        "captions": [
            "" if text is None else caption for text, caption in zip(samples.texts, samples.clips.captions, strict=True)
        ],
        **vars(samples.task),
        **vars(samples.clips.clips),
    }
