"""The full-size model, really built: Wan2.1's sizes with random weights through `u4d init` and one completion.

    python scripts/full_size.py WORK_FOLDER        needs 18 GB of disk, 24 GB of memory, no GPU; some minutes

Every step is a process of its own, so that its peak memory is its own. Steps whose output is there are not repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

SOURCE = """
import sys, torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
torch.manual_seed(0)
vae = AutoencoderKLWan()
torch.set_default_dtype(torch.bfloat16)
transformer = WanTransformer3DModel(
    num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, text_dim=4096, freq_dim=256
)
scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
pipe.save_pretrained(sys.argv[1])
"""

FORWARD = """
import sys, time, torch
from diffusers import WanTransformer3DModel
from u4d.model.transformer import Transformer
torch.manual_seed(0)
latents, times = torch.randn(1, 4, 16, 2, 8, 8), torch.rand(1, 4, 2)
text = torch.randn(1, 12, 4096)
stream = torch.arange(4).repeat_interleave(2)
with torch.no_grad():
    wan = WanTransformer3DModel.from_pretrained(sys.argv[1], subfolder="transformer", torch_dtype=torch.bfloat16)
    steps = 1000 * times.repeat_interleave(16, 2)
    theirs = [wan(latents[:, s].bfloat16(), steps[:, s], text.bfloat16(), return_dict=False)[0] for s in range(4)]
    del wan
    ours = Transformer.from_pretrained(sys.argv[2], subfolder="transformer", dtype=torch.bfloat16)
    began = time.perf_counter()
    apart = ours(latents.bfloat16(), times, text.bfloat16(), (stream[:, None] == stream)[None])
    seconds = time.perf_counter() - began
worst = max(float((apart[:, s] - theirs[s]).float().norm() / theirs[s].float().norm()) for s in range(4))
print(f"30 layers, {sum(p.numel() for p in ours.parameters()):,} parameters, bfloat16: {seconds:.1f} s a forward; "
      f"largest relative difference of a stream to diffusers' Wan {worst:.2e}")
"""

COMPLETE = """
import sys, torch, u4d
pipe = u4d.Pipeline.from_pretrained(sys.argv[1])
scene = u4d.data.ProceduralScenes(split="test", frames=2, size=(240, 320))[0]
out = pipe.complete(scene, observe="rgb:all", steps=1, guidance=1.0)
assert all(bool(torch.isfinite(part).all()) for part in (out.rgb, out.depth, out.intrinsics, out.cam_to_world))
print(f"completed 2 frames of 240x320 in one step, {pipe.transformer.dtype}; seconds {out.report['timings_s']}")
"""


def main(folder: Path) -> None:
    """Run the steps and print time and peak memory of each."""
    source, result = folder / "wan", folder / "u4d"
    folder.mkdir(parents=True, exist_ok=True)
    if not (source / "model_index.json").exists():
        measured("write a Wan checkpoint with diffusers", "-c", SOURCE, source)
    if not (result / "model_index.json").exists():
        measured("u4d init", "-m", "u4d.cli", "init", "--from", source, "-o", result)
    index = json.loads(next((result / "transformer").glob("*.index.json")).read_text())
    print(f"  {index['metadata']['total_size'] / 1e9:.2f} GB in {len(set(index['weight_map'].values()))} shards")
    measured("one forward beside diffusers", "-c", FORWARD, source, result)
    measured("u4d complete", "-c", COMPLETE, result)


def measured(what: str, *arguments: object) -> None:
    """Run Python with these arguments; stop if it fails."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, arguments)])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{what}: failed with status {status}")
    print(f"{what}: {time.perf_counter() - began:.0f} s, at most {usage.ru_maxrss / 2**20:.1f} GiB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
