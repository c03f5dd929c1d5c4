"""A batch of clips as tensors: what a renderer makes, what training reads and what sampling returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clips:
    """A batch of clips with everything that is known of them; what is not known is None.

    Attributes:
        rgb: `[B,N,3,H,W]` in [0,1].
        depth: `[B,N,H,W]`, any unit; 0, NaN and infinity are invalid.
        intrinsics: `[B,N,3,3]` in pixels.
        cam_to_world: `[B,N,4,4]`, OpenCV, the unit of depth.
    """

    rgb: Tensor | None = None
    depth: Tensor | None = None
    intrinsics: Tensor | None = None
    cam_to_world: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are; the CPU if there are none."""
        return next((part.device for part in vars(self).values() if part is not None), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Clips:
        """The same on another device."""
        return self.map(lambda part: part.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Clips:
        """Change every tensor that is known."""
        return Clips(**{name: None if part is None else change(part) for name, part in vars(self).items()})

    def everything(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """rgb, depth, intrinsics, cam_to_world of clips of which all is known.

        Raises:
            ValueError: something is not known.
        """
        if self.rgb is None or self.depth is None or self.intrinsics is None or self.cam_to_world is None:
            missing = [name for name, part in vars(self).items() if part is None]
            raise ValueError(f"clips: expected all of rgb, depth and cameras, got no {', '.join(missing)}")
        return self.rgb, self.depth, self.intrinsics, self.cam_to_world


def join(parts: Sequence[Clips]) -> Clips:
    """Fully known clips as one batch."""
    return Clips(*map(torch.cat, zip(*(part.everything() for part in parts), strict=True)))
