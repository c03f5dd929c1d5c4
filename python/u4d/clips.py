"""A batch of clips as tensors: what a renderer makes, what training reads and what sampling returns."""

from __future__ import annotations

from dataclasses import dataclass

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
