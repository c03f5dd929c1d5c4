"""The script that trains on a lent GPU: stopped by its clock, brought back in pieces, put together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import u4d

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_on_lent_gpu.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_is_stopped_and_brought_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--recipe", "debug", "--run", tmp_path / "run", "--device", "cpu", "--workers", 0, "--clips", 1]
    settings = ["--set", "phases.0.steps=100000", "watch.save_every=2"]
    done = run(*common, "--out", out, "--minutes", 0.5, "--score-minutes", 0.1, "--every", 8, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"checkpoint.tar.0", "log.jsonl", "eval.md"} == {path.name for path in out.iterdir()}
    assert "AbsRel" in (out / "eval.md").read_text()
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(steps) > 2 and steps == list(range(len(steps)))

    done = run("--join", out, "--out", tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    assert u4d.Pipeline.from_pretrained(tmp_path / "checkpoint").transformer.config.num_layers == 2
