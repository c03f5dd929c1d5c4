"""The promise of resuming, between processes: a run that was killed ends like one that never was, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

KILLED = """
import os, sys
import u4d.train.loop as loop

real = loop.save

def save(*parts):
    real(*parts)
    os._exit(9)

loop.save = save
from u4d.cli import main
main(sys.argv[1:])
"""


def train(run: Path, *program: str) -> int:
    arguments = ("train", "debug", "-o", str(run), "--workers", "0", "--device", "cpu")
    return subprocess.run([sys.executable, *program, *arguments], capture_output=True, check=False).returncode


@pytest.mark.slow
def test_killed_and_resumed_is_as_never_killed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole, "-m", "u4d.cli") == 0
    assert train(killed, "-c", KILLED) == 9 and (killed / "state.pt").exists()
    first = torch.load(killed / "state.pt", weights_only=True)
    assert train(killed, "-m", "u4d.cli") == 0
    mine, theirs = (torch.load(run / "state.pt", weights_only=True) for run in (whole, killed))
    assert first["step"] < mine["step"] == theirs["step"]
    for part in ("model", "average"):
        for name, tensor in mine[part].items():
            assert torch.equal(tensor, theirs[part][name]), name
