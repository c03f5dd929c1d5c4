"""Presets: the sizes of a model and the clip it takes, as functions that return frozen dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from u4d.errors import UserError

RAY_BASES = ("frames", "dct")
Precision = Literal["exact", "fp8", "fp8-linear"]  # of a model's matrix products, see model/arithmetic.py
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Config = TypeVar("Config", "TransformerConfig", "CodecConfig")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `u4d.Transformer`; the defaults are those of Wan2.1-T2V-1.3B.

    Attributes:
        num_layers, num_attention_heads, attention_head_dim, ffn_dim: the body.
        text_dim: width of the text embeddings.
        freq_dim: width of the sinusoidal time embedding.
        num_frames, image_size: the clip that the weights were trained for; (height, width) in pixels.
        motion_features: feed local motion of observed RGB to its tokens (see model/motion.py).
        rgb_to_geometry: add the RGB token of the same place to every geometry token (see `StreamLink`).
        text_length: tokens that a prompt is filled up to with zeros (Wan: 512). The null text is one token and as many
            zeros; 1 means no padding.
        origin: where the weights came from, in words.
        ray_basis: "frames" or "dct": how a ray latent holds its four frames (see `ray_basis_matrix`).
        latents_mean, latents_std: `[4][16]` statistics that bring latents to unit variance (spec.md section 1).
        reference_fov_rad: horizontal field of view of the camera whose rays are subtracted from `ray_dir`.
    """

    num_layers: int = 30
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    text_dim: int = 4096
    freq_dim: int = 256
    num_frames: int = 50
    image_size: tuple[int, int] = (240, 320)
    motion_features: bool = False
    rgb_to_geometry: bool = False
    ray_basis: str = "frames"
    text_length: int = 1
    origin: str = ""
    latents_mean: tuple[tuple[float, ...], ...] | None = None
    latents_std: tuple[tuple[float, ...], ...] | None = None
    reference_fov_rad: float = math.pi / 3

    def __post_init__(self) -> None:
        positive = (
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "ffn_dim",
            "text_dim",
            "text_length",
            "num_frames",
        )
        require_positive(self, *positive)
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise UserError(f"{name}: expected an even number, got {getattr(self, name)!r}")
        if len(self.image_size) != 2 or any(not is_positive(size) or size % 16 for size in self.image_size):
            raise UserError(f"image_size: expected (height, width), multiples of 16, got {self.image_size!r}")
        for name in ("latents_mean", "latents_std"):
            rows = getattr(self, name)
            if rows is not None and not (len(rows) == 4 and all(len(row) == 16 for row in rows)):
                raise UserError(f"{name}: expected 4 rows of 16 numbers, got {len(rows)} rows")
            if rows is not None and not all(math.isfinite(value) for row in rows for value in row):
                raise UserError(f"{name}: expected finite numbers, got NaN or infinity")
        if self.latents_std is not None and min(map(min, self.latents_std)) <= 0:
            raise UserError(f"latents_std: expected positive numbers, got {min(map(min, self.latents_std))}")
        if self.ray_basis not in RAY_BASES:
            raise UserError(f"ray_basis: expected one of {', '.join(RAY_BASES)}, got {self.ray_basis!r}")
        if not 0 < self.reference_fov_rad < math.pi:
            raise UserError(f"reference_fov_rad: expected 0 to pi, got {self.reference_fov_rad!r}")


@dataclass(frozen=True)
class CodecConfig:
    """Arguments of `TinyCodec`."""

    latent_channels: int = 16
    hidden: int = 96
    decoder_hidden: int = 160
    depth: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "latent_channels", "hidden", "decoder_hidden", "depth")


def is_positive(value: Any) -> bool:
    """Whether that is a whole number above zero; what a file holds may be anything."""
    return isinstance(value, int) and value > 0


def require_positive(config: TransformerConfig | CodecConfig, *names: str) -> None:
    """Raise UserError unless those fields are positive whole numbers."""
    for name in names:
        if not is_positive(getattr(config, name)):
            raise UserError(f"{name}: expected a positive whole number, got {getattr(config, name)!r}")


def read_config(kind: type[Config], saved: Mapping[str, Any]) -> Config:
    """A configuration from the fields of a `config.json`; those that begin with an underscore are diffusers' own.

    Raises:
        UserError: a field that this version does not know, or a value that makes no sense.
    """
    fields = {name: as_tuple(value) for name, value in saved.items() if not name.startswith("_")}
    known = kind.__dataclass_fields__
    for name in fields:
        if name not in known:
            raise UserError(f"unknown field {name!r}; known are {', '.join(known)}")
    return kind(**fields)


def as_tuple(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Preset:
    """A model's name and sizes; `codec` is None where Wan's VAE is used."""

    name: str
    transformer: TransformerConfig
    codec: CodecConfig | None = field(default_factory=CodecConfig)


def wan_1_3b() -> Preset:
    """The seed's system: 30 layers, hidden 1536, 50 frames of 240x320, about 5.7 B parameters in four streams."""
    return Preset("wan-1.3b", TransformerConfig(text_length=512), codec=None)


def tiny() -> Preset:
    """Ships with trained weights and runs on a laptop's CPU: 18 frames of 96x128, 20 M parameters."""
    return Preset(
        "tiny",
        TransformerConfig(
            num_layers=8,
            num_attention_heads=3,
            attention_head_dim=64,
            ffn_dim=768,
            text_dim=64,
            num_frames=18,
            image_size=(96, 128),
            motion_features=True,
            rgb_to_geometry=True,
            ray_basis="dct",
        ),
    )


def debug() -> Preset:
    """Random weights, for tests: 6 frames of 32x48."""
    return Preset(
        "debug",
        TransformerConfig(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            ffn_dim=48,
            text_dim=8,
            freq_dim=16,
            num_frames=6,
            image_size=(32, 48),
            motion_features=True,
            rgb_to_geometry=True,
        ),
        CodecConfig(hidden=8, decoder_hidden=16, depth=1),
    )


PRESETS = {"wan-1.3b": wan_1_3b, "tiny": tiny, "debug": debug}
