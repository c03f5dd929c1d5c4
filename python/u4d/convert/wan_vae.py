"""Wan2.1's VAE: diffusers' folder, or the original release's file once it is safetensors."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u4d.checkpoint import check_tensors, check_weights, described_shapes
from u4d.checkpoint_files import StoredTensor, file_tensors, read_json, require_safetensors
from u4d.convert.wan_transformer import check_dtypes, public, require_values
from u4d.diffusion.flow import LATENT_CHANNELS
from u4d.errors import UserError

ORIGINAL_FILE = "Wan2.1_VAE.safetensors"
VALUES: dict[str, Any] = {
    "z_dim": LATENT_CHANNELS,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "is_residual": False,
    "temperal_downsample": (False, True, True),
}


@dataclass(frozen=True)
class WanVae:
    """A VAE on disk.

    Attributes:
        config: all fields of diffusers' `AutoencoderKLWan`.
        tensors: by diffusers' names.
        folder: to be copied as it is; None where the tensors are written under their new names.
    """

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    folder: Path | None


def vae_defaults() -> dict[str, Any]:
    """Fields of diffusers' class and their default values: those of Wan2.1."""
    from diffusers import AutoencoderKLWan

    return {name: parameter.default for name, parameter in inspect.signature(AutoencoderKLWan).parameters.items()}


def read_vae(folder: Path) -> WanVae:
    """The VAE of a folder in diffusers' layout.

    Raises:
        UserError: another VAE than Wan2.1's, or a damaged one.
    """
    from diffusers import AutoencoderKLWan

    config_file = folder / "config.json"
    config = read_json(config_file)
    if config.get("_class_name") != "AutoencoderKLWan":
        raise UserError(
            f"checkpoint {config_file}: _class_name: expected AutoencoderKLWan, got {config.get('_class_name')!r}"
        )
    complete = vae_defaults() | public(config)
    require_values(config_file, complete, VALUES)
    check_statistics(config_file, complete)
    return WanVae(complete, check_weights(folder, AutoencoderKLWan), folder)


def read_original_vae(folder: Path) -> WanVae | None:
    """The VAE of an original release; None where there is none.

    Raises:
        UserError: it is still a pickle, or damaged.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    file = require_safetensors(folder / ORIGINAL_FILE)
    if not file.exists():
        return None
    # diffusers renames a state dictionary and never looks at its values: ours are where to find them.
    tensors: dict[str, StoredTensor] = convert_wan_vae_to_diffusers(file_tensors(file))
    first = tensors.get("encoder.conv_in.weight")
    if first is None:
        raise UserError(f"checkpoint {file}: tensor 'encoder.conv1.weight' is missing; this is not Wan2.1's VAE")
    config = vae_defaults() | {"base_dim": first.shape[0]}
    check_tensors(tensors, described_shapes(file, config, AutoencoderKLWan), "AutoencoderKLWan", file)
    check_dtypes(tensors)
    return WanVae(config, tensors, None)


def check_statistics(config_file: Path, config: dict[str, Any]) -> None:
    """Raise UserError unless the latent statistics are a number per channel."""
    for name in ("latents_mean", "latents_std"):
        values = config[name]
        numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if not numbers or len(values) != LATENT_CHANNELS:
            raise UserError(f"checkpoint {config_file}: {name}: expected {LATENT_CHANNELS} numbers, got {values!r}")
