"""Parsing, help, exit codes and the one line that an error becomes."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import Command

import u4d as package
from u4d import cli
from u4d.commands import info
from u4d.errors import UserError
from u4d.sample.observation import TASKS
from u4d.train.recipe import RECIPES

VERBS = ("complete", "demo", "eval", "train", "init", "info", "bench")


def test_help_names_every_verb_and_needs_nothing_heavy() -> None:
    program = "import sys; from u4d.cli import main; code = main(['--help']); print(code, sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *text, last = result.stdout.strip().splitlines()
    assert last.startswith("0 ")
    assert not [name for name in ("torch", "numpy", "diffusers", "av", "matplotlib") if f"'{name}'" in last]
    assert all(any(line.split()[:1] == [verb] for line in text) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(u4d: Command, verb: str) -> None:
    shown = u4d(verb, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"usage: u4d {verb}")


def test_the_help_of_complete_is_enough_to_use_it(u4d: Command) -> None:
    text = u4d("complete", "--help").out
    for name, task in TASKS.items():
        assert name in text and task.observe in text and task.description in text
    options = "--observe --task --cameras --steps --guidance --candidates --halving --seed --frames --prompt"
    options += " --checkpoint --device --precision"
    for option in (*options.split(), "--original-size", "--lossless", "--overwrite", "INPUT", "-o OUT"):
        assert option in text
    assert "u4d complete clip.mp4 -o out/clip" in text
    assert "camera-to-world" in text and "transforms.json" in text


def test_the_help_of_train_lists_the_recipes(u4d: Command) -> None:
    text = u4d("train", "--help").out
    assert all(name in text for name in RECIPES)


def test_version(u4d: Command) -> None:
    assert u4d("--version").out == f"u4d {package.__version__}\n"


def test_info_tells_versions_threads_and_what_runs_each_op(u4d: Command) -> None:
    import torch

    from u4d_fast.info import OPS

    shown = u4d("info")
    lines = {line.split("  ")[0].strip() or line.split()[0]: line for line in shown.out.splitlines()}
    assert shown.code == 0
    assert package.__version__ in lines["u4d"] and torch.__version__.partition("+")[0] in lines["torch"]
    assert f"{torch.get_num_threads()} threads" in lines["cpu"]
    assert all(any(line.split()[0] == op for line in shown.out.splitlines()) for op in OPS)
    assert any(line.startswith("checkpoint") for line in shown.out.splitlines())


def test_info_says_when_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {
        "kernels": {"built": False, "reason": "not built here", "cuda_arch": None, "openmp": False},
        "ops": {"warp_frames": {"cpu": {"backend": "reference", "reason": "not built here"}}},
        "backend": "auto",
    }
    monkeypatch.setattr("u4d_fast.info", lambda: state)
    facts = info.kernel_facts()
    assert "not built here" in facts[0][1]
    assert facts[1][1] == "cpu: reference (not built here)"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "VERB"),
        (["compleat"], "compleat"),
        (["complete"], "INPUT"),
        (["complete", "clip.mp4"], "-o"),
        (["complete", "clip.mp4", "-o", "out", "--step", "3"], "--step"),
        (["complete", "clip.mp4", "-o", "out", "--steps", "0"], "--steps"),
        (["complete", "clip.mp4", "-o", "out", "--steps", "many"], "many"),
        (["complete", "clip.mp4", "-o", "out", "--seed", "-1"], "--seed"),
        (["complete", "clip.mp4", "-o", "out", "--candidates", "0"], "--candidates"),
        (["complete", "clip.mp4", "-o", "out", "--frames", "0"], "--frames"),
        (["complete", "clip.mp4", "-o", "out", "--guidance", "nan"], "--guidance"),
        (["complete", "clip.mp4", "-o", "out", "--guidance", "-1"], "--guidance"),
        (["complete", "clip.mp4", "-o", "out", "--device", "tpu"], "tpu"),
        (["complete", "clip.mp4", "-o", "out", "--task", "pose", "--observe", "rgb:0"], "--observe"),
        (["train", "debug", "-o", "run", "--workers", "-1"], "--workers"),
        (["eval", "--split", "all"], "--split"),
        (["eval", "--clips", "0"], "--clips"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(u4d: Command, arguments: list[str], named: str) -> None:
    outcome = u4d(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("u4d: error: ") and named in line


def run_raising(error: BaseException, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    def fail(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr("u4d.commands.demo.run", fail)
    return cli.main(["demo", *arguments])


def test_an_error_in_several_lines_is_printed_in_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(UserError("clip.mp4: expected\n  a video"), monkeypatch) == 2
    assert capsys.readouterr().err == "u4d: error: clip.mp4: expected a video\n"


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), OSError("ours"), KeyError("ours")])
def test_an_unexpected_error_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error), match="ours"):
        run_raising(error, monkeypatch)


def test_an_os_error_is_the_users_when_it_is_about_the_users_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "mine" / "rgb.mp4"))
    assert run_raising(denied, monkeypatch, "--clip", str(tmp_path / "mine")) == 2
    assert capsys.readouterr().err == f"u4d: error: {tmp_path / 'mine' / 'rgb.mp4'}: permission denied\n"
    with pytest.raises(PermissionError):
        run_raising(denied, monkeypatch, "--clip", str(tmp_path / "other"))
    full = OSError(errno.ENOSPC, "No space left on device")
    assert run_raising(full, monkeypatch) == 2
    assert "no space is left" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err.strip() == "u4d: interrupted; older results are as they were"


def test_the_installed_program_exits_with_these_codes() -> None:
    program = [sys.executable, "-m", "u4d.cli"]
    wrong = subprocess.run([*program, "complete", "--nonsense"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    closed = subprocess.run(f"{sys.executable} -m u4d.cli --help | true", shell=True, capture_output=True, check=False)
    assert closed.stderr == b""
