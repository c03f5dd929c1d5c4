"""Reading and making scenes."""

from u4d.data.procedural import ProceduralScenes

__all__ = ["ProceduralScenes"]
