"""Our own ray-traced training scenes, with exact depth and cameras."""

from u4d.data.procedural.dataset import ProceduralScenes
from u4d.data.procedural.render import describe_clips, render_clips

__all__ = ["ProceduralScenes", "describe_clips", "render_clips"]
