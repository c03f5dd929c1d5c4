"""Why a Wan VAE has to run as diffusers wrote it: what `wan_vae_pass` would not compute as its modules do."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import nn

from u4d_fast.wan_parts import is_changed

CONTAINERS = (wan.WanEncoder3d, wan.WanDecoder3d, wan.WanMidBlock, wan.WanUpBlock, nn.ModuleList, nn.Sequential)
BLOCKS = (wan.WanResidualBlock, wan.WanAttentionBlock, wan.WanResample)
LAYERS = (wan.WanCausalConv3d, wan.WanRMS_norm, wan.WanUpsample, nn.Conv2d, nn.ZeroPad2d, nn.SiLU, nn.Identity)
KNOWN = frozenset((*CONTAINERS, *BLOCKS, *LAYERS, nn.Dropout))
KERNELS = frozenset(((1, 1, 1), (3, 1, 1), (3, 3, 3)))
METHODS = ("encode", "decode", "_encode", "_decode")


def wan_vae_kept(vae: wan.AutoencoderKLWan) -> str:
    """Why diffusers' own passes run; the empty string where nothing is in the way of ours.

    Asked again at each call, since hooks, adapters and tiles come and go.
    """
    if vae.use_tiling:
        return "it works in tiles"
    # Hooks to the VAE's own forward are nobody's business here: its encode and decode don't call it, either.
    if type(vae) is not wan.AutoencoderKLWan or any(name in vars(vae) for name in METHODS):
        return "its encode or decode was replaced"
    if hasattr(vae, "_hf_hook"):
        return "accelerate moves its weights"
    weights = next(vae.parameters())
    if not weights.is_meta and torch.is_autocast_enabled(weights.device.type):
        return "autocast is on"
    for name, module in vae.named_modules():
        if module is not vae and (reason := module_kept(module)):
            return f"{name} {reason}"
    for name, weight in vae.named_parameters():
        if type(weight) is not nn.Parameter or (weight.dtype, weight.device) != (weights.dtype, weights.device):
            return f"{name} is of another kind, type or device than other weights"
    if any(type(block) not in (wan.WanResidualBlock, wan.WanResample) for block in vae.encoder.down_blocks):
        return "its encoder attends between its blocks"
    return "it cuts pictures into patches" if vae.config.patch_size is not None else ""


def module_kept(module: nn.Module) -> str:
    """What is unknown about one module."""
    if type(module) not in KNOWN:
        return f"is a {type(module).__name__}"
    if is_changed(module) or module._compiled_call_impl is not None:
        return "was hooked to, replaced or compiled"
    if isinstance(module, wan.WanCausalConv3d) and module.kernel_size not in KERNELS:
        return f"has a kernel of {module.kernel_size}"
    if isinstance(module, wan.WanRMS_norm) and (torch.is_tensor(module.bias) or not module.channel_first):
        return "has a bias, or channels in another place"
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        return "drops features"
    return ""
