"""Wan2.1 checkpoints to four-stream ones and back, tensor by tensor."""

from __future__ import annotations

from u4d.convert.conversion import Conversion
from u4d.convert.extract import extract_stream
from u4d.convert.from_wan import init_from_wan

__all__ = ["Conversion", "extract_stream", "init_from_wan"]
