"""Clips of any length: where the windows stand, and what each of them is given.

    window 0    0 ................. 17
    window 1            8 ................. 25        `overlap` frames are shared, here 10
                        given   compared  anew
                        8 - 12   13 - 16   17

The first frame of a window stands alone in its latent frame, then come groups of four, and the last frame stands alone
again (u4d_fast/time_layout.py). So of the shared frames

* the first 1 + 4 m are **kept** from the earlier window, m as large as leaves one frame over. Their images are given
  to the later window as if observed, and so are the depth and cameras of all but the last four;
* these last four are **compared**: the later window answers their depth and cameras, too. The offset between both
  answers is taken out of all that is new (see chaining.py);
* the up to four frames that are left over are answered anew. The earlier window's last frame is always among them: it
  was alone in its latent frame, with nothing after it, and is clearly the worst of its window.

That depth and cameras are not given up to the border has a reason: where a model does not quite follow what it is
given, the offset shows at the border and nowhere else, so that nothing could tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.geometry.depth import STATIC_EXTENT
from u4d.sample.observation import MODALITIES, Observation, usable_frames
from u4d.scene import Scene
from u4d_fast.time_layout import FRAMES_PER_GROUP

LEAST_WINDOW = 2
USUAL_OVERLAP = 10  # of a window of 18 or more: one frame and one group are given, one group is compared


@dataclass(frozen=True)
class Window:
    """Frames `start` to `stop - 1` of a clip.

    Attributes:
        kept: of the first frames how many keep the earlier window's result; their images are given.
        given: of these how many have their depth and cameras given, too; the others are compared.
    """

    start: int
    stop: int
    kept: int = 0
    given: int = 0

    @property
    def frames(self) -> range:
        """Their numbers in the clip."""
        return range(self.start, self.stop)


def check_window(window: int, overlap: int | None, most: int, frames: int | None = None) -> int:
    """The overlap that a clip in windows of `window` frames gets; `most` is what the checkpoint can take.

    Raises:
        UserError: a window that is too small or too large, an overlap that leaves nothing new, or a number of frames
            beside it.
    """
    if frames is not None:
        raise UserError(f"frames: expected none with window, which completes every frame of the scene, got {frames}")
    if not LEAST_WINDOW <= window <= most:
        raise UserError(f"window: expected {LEAST_WINDOW} to {most} frames for this checkpoint, got {window}")
    if overlap is None:
        return usual_overlap(window)
    if not 1 <= overlap < window:
        raise UserError(f"overlap: expected 1 to {window - 1} frames for windows of {window}, got {overlap}")
    return overlap


def usual_overlap(window: int) -> int:
    """10 frames from windows of 18 on, 6 from 10 on, else 2: what of 2 + 4 m leaves about half of the window new."""
    groups = min((window - 2) // (2 * FRAMES_PER_GROUP), (USUAL_OVERLAP - 2) // FRAMES_PER_GROUP)
    return min(2 + FRAMES_PER_GROUP * groups, window - 1)


def plan_windows(num_frames: int, window: int, overlap: int) -> list[Window]:
    """Windows over a clip: each starts `window - overlap` frames after the one before.

    The last one is shifted back until it is full, so its overlap may be larger. A clip that fits is one window.

    Raises:
        ValueError: no frames, no overlap, or one that leaves nothing new.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
    if not 1 <= overlap < window:
        raise ValueError(f"overlap: expected 1..{window - 1} for windows of {window}, got {overlap}")
    if num_frames <= window:
        return [Window(0, num_frames)]
    last = num_frames - window
    windows = [Window(0, window)]
    for start in [*range(window - overlap, last, window - overlap), last]:
        shared = windows[-1].stop - start
        kept = 1 + max(0, shared - 2) // FRAMES_PER_GROUP * FRAMES_PER_GROUP
        windows.append(Window(start, start + window, kept, max(1, kept - FRAMES_PER_GROUP)))
    return windows


def window_seed(seed: int, number: int) -> int:
    """Window 0 has the clip's seed, so that one window alone is no different from no windows."""
    return seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


# --- what is observed -----------------------------------------------------------------------------------------------


def window_observation(asked: Observation, window: Window) -> Observation:
    """What a window sees of its frames: what the user gives, and the earlier window's result.

    Frames of latent frames that are not observed as a whole are left out.
    """
    masks = {name: getattr(asked, name)[window.start : window.stop].clone() for name in MODALITIES}
    masks["rgb"][: window.kept] = True
    for name in ("depth", "camera"):
        masks[name][: window.given] = True
    return usable_frames(Observation(**masks))


def from_user(asked: Observation, window: Window) -> Observation:
    """What a window sees that is the user's own: nothing of the frames that carry over the earlier result."""
    seen = window_observation(asked, window)
    masks = {name: getattr(seen, name) & getattr(asked, name)[window.start : window.stop] for name in MODALITIES}
    masks["rgb"][: window.kept] = False
    for name in ("depth", "camera"):
        masks[name][: window.given] = False
    return Observation(**masks)


def used_observation(asked: Observation, windows: Sequence[Window]) -> Observation:
    """What of the user's own is in the result: what each window sees in the frames that it adds for good."""
    used = {name: torch.zeros_like(getattr(asked, name)) for name in MODALITIES}
    for window in windows:
        seen = from_user(asked, window)
        for name in MODALITIES:
            used[name][window.start + window.kept : window.stop] = getattr(seen, name)[window.kept :]
    return Observation(**used)


def unused_notes(asked: Observation, used: Observation, window: int) -> list[str]:
    """One line for each modality of which the user gives frames that no window can use."""
    notes = []
    for name in MODALITIES:
        lost: list[int] = (getattr(asked, name) & ~getattr(used, name)).nonzero()[:, 0].tolist()
        if lost:
            shown = ", ".join(map(str, lost[:8])) + (", ..." if len(lost) > 8 else "")
            notes.append(
                f"{name}: {len(lost)} of {int(getattr(asked, name).sum())} observed frames are completed as if "
                f"unobserved ({shown}): in windows of {window} frames they share a latent frame with others "
                "that are not observed"
            )
    return notes


def check_first_window(asked: Observation, windows: Sequence[Window], scene: Scene) -> None:
    """Raise UserError unless the first window can tell the world frame and the unit of all that is observed.

    Later windows go on in the frame and unit of the first one's result. Where that is relative, no camera and no depth
    that are observed later could agree with it.
    """
    used, early = used_observation(asked, windows), from_user(asked, windows[0])
    where = f"among frames 0 to {windows[0].stop - 1}, the first window, because it sets"
    todo = "only later: observe them earlier too, cut the input to begin there, or leave them out"
    if bool(used.camera.any()) and not bool(early.camera.any()):
        raise UserError(
            f"observe: expected an observed camera {where} the world frame of all windows, got cameras {todo}"
        )
    if tells_length(used, scene.cam_to_world) and not tells_length(early, scene.cam_to_world):
        raise UserError(
            f"observe: expected observed depth, or observed cameras at different places, {where} the unit of length of "
            f"all windows, got these {todo}"
        )


def tells_length(observation: Observation, cam_to_world: Tensor | None) -> bool:
    """Whether what is observed of the first frames has a unit of length: depth, or cameras that move."""
    if bool(observation.depth.any()):
        return True
    if cam_to_world is None or not bool(observation.camera.any()):
        return False
    seen = observation.camera.nonzero()[:, 0].to(cam_to_world.device)
    centres: Tensor = cam_to_world[seen, :3, 3].double()
    return float((centres - centres[:1]).norm(dim=-1).max()) > STATIC_EXTENT
