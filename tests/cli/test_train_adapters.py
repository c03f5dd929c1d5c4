"""`u4d train --from CHECKPOINT [--lora RANK]`."""

from __future__ import annotations

from pathlib import Path

from in_process import Command


def test_adapters_are_trained_and_the_next_step_is_told(u4d: Command, debug_checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = u4d("train", "debug", "--from", debug_checkpoint, "--lora", 2, "-o", run, "--workers", 0, "--device", "cpu")
    assert done.code == 0 and f"--checkpoint {debug_checkpoint} --lora {run / 'adapter'}" in done.out
    assert (run / "adapter" / "adapter_model.safetensors").exists() and not (run / "checkpoint").exists()


def test_mistakes_are_told_before_anything_is_written(u4d: Command, debug_checkpoint: Path, tmp_path: Path) -> None:
    for options, words in (
        (("--lora", 4), ("--lora", "--from")),
        (("--from", debug_checkpoint, "--lora", 0), ("--lora", "whole number from 1")),
        (("--from", "nothing", "--lora", 4), ("nothing", "hub id")),
        (("--from", "tiny"), ("tiny", "num_layers", "expected 2", "got 8")),
    ):
        outcome = u4d("train", "debug", *options, "-o", tmp_path / "run", "--workers", 0, "--device", "cpu")
        assert outcome.code == 2 and all(word in outcome.err for word in words), outcome.err
        assert not (tmp_path / "run").exists()
