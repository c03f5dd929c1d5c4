"""Ctrl-C at any moment: exit code 130, one line, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from in_process import Command, tree

PLACES = {
    "while the checkpoint loads": "u4d.commands.completion.load_pipeline",
    "while it is denoised": "u4d.pipeline.draw_candidates",
    "while it is compared": "u4d.commands.completion.compare",
    "while it is saved": "u4d.view.summary.write_summary",
}


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_leaves_older_results_and_nothing_else(
    place: str, complete: Command, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("u4d.view.summary.write_summary", lambda path, *rest: path.write_bytes(b"not drawn"))
    assert complete(scene_folder, "-o", tmp_path / "out", "--frames", 1).code == 0
    before = tree(tmp_path)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PLACES[place], interrupt)
    outcome = complete(scene_folder, "-o", tmp_path / "out", "--overwrite")
    assert outcome.code == 130
    assert outcome.err.strip().splitlines() == ["u4d: interrupted; older results are as they were"]
    assert tree(tmp_path) == before
    fresh = complete(scene_folder, "-o", tmp_path / "new" / "out")
    assert fresh.code == 130
    assert tree(tmp_path) == before


def heed_interrupts() -> None:
    """A shell starts its background jobs deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_real_sigint_during_the_work(debug_checkpoint: Path, video: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "u4d.cli", "complete", str(video), "-o", str(tmp_path / "out")]
    command += ["--checkpoint", str(debug_checkpoint), "--device", "cpu", "--steps", "1000000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert "observed rgb:all" in process.stdout.readline()  # printed when the work begins
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(timeout=60) == 130
            assert process.stderr.read().strip() == "u4d: interrupted; older results are as they were"
        finally:
            process.kill()  # or a failure would wait for its end forever
    assert list(tmp_path.iterdir()) == []
