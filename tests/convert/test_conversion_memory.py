"""Memory of a conversion: a tensor at a time, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from convert.wan_folders import SIZES, write_wan_folder

MIB = 1 << 20
SHARD = 32 * MIB
PROGRAM = """
import sys
from pathlib import Path
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel  # what a conversion imports anyway
from u4d.convert import extract_stream, init_from_wan

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

def measured(convert, *arguments):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    done = convert(*arguments)
    print(peak() - before, done.num_bytes)

source, out, back, shard = *sys.argv[1:4], int(sys.argv[4])
measured(lambda: init_from_wan(source, out, shard_bytes=shard))
measured(lambda: extract_stream(out, back, shard_bytes=shard))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure a peak")
def test_the_peak_is_less_than_a_shard_however_large_the_model(tmp_path: Path) -> None:
    """A model of 300 MiB through less than a 32 MiB shard: no shard is ever in memory as a whole, and no model."""
    source = write_wan_folder(tmp_path / "wan", text=False, vae=False)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 128, "num_layers": 8, "ffn_dim": 2304}
    with torch.device("meta"):
        large = WanTransformer3DModel(**SIZES | sizes)
    tensors = {name: torch.ones(tensor.shape) for name, tensor in large.state_dict().items()}
    save_file(tensors, source / "transformer/diffusion_pytorch_model.safetensors")
    large.save_config(source / "transformer")
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "out"), str(tmp_path / "back"), str(SHARD)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (grown, written), (grown_back, written_back) = (map(int, line.split()) for line in done.stdout.split("\n")[:2])
    assert written > 300 * 10**6 and written_back > 75 * 10**6
    assert grown < SHARD and grown_back < SHARD, (grown / MIB, grown_back / MIB)
    assert len(list((tmp_path / "out/transformer").glob("*.safetensors"))) >= 9
