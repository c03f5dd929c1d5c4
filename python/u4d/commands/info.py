"""`u4d info`: what is installed, what runs where, which checkpoints ship; or what one checkpoint is."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from u4d import __version__
from u4d.commands.console import available_cores, format_facts, quiet_libraries, use_all_cores

SUMMARY = "show versions, devices, active kernels and shipped checkpoints, or what a checkpoint is"
PACKAGES = ("torch", "diffusers", "numpy", "av", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's argument."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="tell about this one instead: a shipped preset, a folder (u4d's or Wan's), or a downloaded hub id",
    )


def run(args: argparse.Namespace) -> None:
    """Print everything a bug report needs, or what a checkpoint is."""
    if args.checkpoint is not None:
        with quiet_libraries():
            from u4d.commands import checkpoint_facts as told

            print(format_facts(told.checkpoint_facts(args.checkpoint)))
        return
    use_all_cores()
    print(format_facts([*version_facts(), *device_facts(), *checkpoint_facts(), *kernel_facts()]))


def version_facts() -> list[tuple[str, str]]:
    """Of this package, Python and what it stands on."""
    facts = [("u4d", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in PACKAGES:
        try:
            facts.append((package, version(package)))
        except PackageNotFoundError:
            facts.append((package, "not installed"))
    return facts


def device_facts() -> list[tuple[str, str]]:
    """Threads, and the GPUs that torch sees."""
    import torch

    facts = [("cpu", f"{torch.get_num_threads()} threads, {available_cores()} cores available")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        facts.append((f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"))
    if not torch.cuda.is_available():
        facts.append(("cuda", "none (torch sees no CUDA GPU)"))
    return facts


def checkpoint_facts() -> list[tuple[str, str]]:
    """Checkpoints that came with this installation."""
    from u4d.checkpoint import SHIPPED

    folders = sorted(index.parent for index in SHIPPED.glob("*/model_index.json"))
    facts = []
    for folder in folders:
        megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        facts.append((f"checkpoint {folder.name}", f"{megabytes:.0f} MB in {folder}"))
    return facts or [("checkpoints", "none ship with this installation")]


def kernel_facts() -> list[tuple[str, str]]:
    """What was compiled, and what runs each op on each visible device, with the reason where it is no kernel."""
    import u4d_fast

    info = u4d_fast.info()
    kernels = info["kernels"]
    if kernels["built"]:
        parts = ["CPU" + (" with OpenMP" if kernels["openmp"] else ""), *filter(None, [kernels["cuda_arch"]])]
        facts = [("kernels", f"compiled for {' and '.join(parts)}; backend {info['backend']}")]
    else:
        facts = [("kernels", f"not compiled, plain torch runs: {kernels['reason']}")]
    for op, devices in info["ops"].items():
        facts.append((f"  {op}", ", ".join(active(device, state) for device, state in devices.items())))
    return facts


def active(device: str, state: dict[str, str]) -> str:
    """What runs an op on a device: "cpu: kernel", or "cuda: reference (no CUDA device is visible)"."""
    runs = "kernel" if state["backend"] == device else state["backend"]
    return f"{device}: {runs}" + (f" ({state['reason']})" if state["reason"] else "")
