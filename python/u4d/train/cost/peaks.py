"""What a device could do at best: the denominator of MFU (model FLOPs utilisation)."""

from __future__ import annotations

import re

import torch

# Dense bf16 products with float32 sums, FLOP/s, from the makers' data sheets. The first name that fits counts.
PEAKS = (
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH[18]00\b", 989e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 5090\b(?! [DL])", 209.5e12),
    (r"\bRTX 4090\b(?! [DL])", 165.2e12),
    (r"\bRTX 3090\b(?! [TL])", 71e12),
)


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None for CPUs and GPUs that are not in the table."""
    device = torch.device(device)
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """The same of a name like "NVIDIA H100 80GB HBM3"."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name, re.IGNORECASE)), None)
