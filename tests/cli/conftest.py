"""The command line in-process, on tiny clips and a checkpoint of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_process import FRAMES, SIZE, Command, Outcome

from u4d.cli import main
from u4d.data.video import write_video
from u4d.scene import Scene


@pytest.fixture
def u4d(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `u4d ARGUMENTS...`; exceptions that are no expected errors come through."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def complete(u4d: Command, debug_checkpoint: Path) -> Command:
    """Run `u4d complete` with the debug checkpoint and two steps."""

    def run(*arguments: object) -> Outcome:
        return u4d("complete", *arguments, "--checkpoint", debug_checkpoint, "--device", "cpu", "--steps", 2)

    return run


@pytest.fixture
def plain_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave summary.png out: drawing it takes longer than the rest of a command."""
    monkeypatch.setattr("u4d.view.summary.write_summary", lambda path, *rest: path.write_bytes(b"not drawn"))


@pytest.fixture(scope="session")
def known() -> Scene:
    """A rendered clip of 6 frames with everything known."""
    from u4d.data import ProceduralScenes

    return ProceduralScenes("val", frames=FRAMES, size=SIZE)[0]


@pytest.fixture(scope="session")
def scene_folder(known: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a saved scene folder, with its pictures exactly."""
    return known.save(tmp_path_factory.mktemp("scenes") / "known", lossless=True)


@pytest.fixture(scope="session")
def video(known: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 10 frames, larger than what the checkpoint takes."""
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    shades = torch.linspace(0, 255, 10).to(torch.uint8)
    write_video(path, (shade.expand(64, 96, 3).numpy() for shade in shades), fps=20)
    return path
