"""The release gate of the `tiny` weights: what ships is small, loads, and beats predictors that do not look."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

import u4d
from u4d import presets
from u4d.checkpoint import SHIPPED
from u4d.evaluate import EvaluationReport, evaluate, fit_priors
from u4d.sample.observation import parse_observation

CLIPS = 32
MODEL_CARD = Path(__file__).resolve().parents[1] / "docs" / "tiny.md"
SEARCH_COLUMNS = (
    "abs_rel",
    "delta_1_25",
    "translation_direction_deg",
    "rotation_first_to_last_deg",
    "rpe_r_deg",
    "ate_over_path",
)


@pytest.fixture(scope="module")
def pipe() -> u4d.Pipeline:
    return u4d.Pipeline.from_pretrained("tiny")


@pytest.fixture(scope="module")
def report(pipe: u4d.Pipeline) -> EvaluationReport:
    scenes = u4d.data.ProceduralScenes("test", frames=18, size=(96, 128))
    train = u4d.data.ProceduralScenes("train", frames=18, size=(24, 32))
    steps, guidance = pipe.recommended(parse_observation("rgb:all", 18))
    return evaluate(
        pipe,
        (scenes[index] for index in range(CLIPS)),
        steps=steps,
        guidance=guidance,
        priors=fit_priors(train[index] for index in range(64)),
    )


def test_the_package_stays_small() -> None:
    files = [path for path in (SHIPPED / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 48_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_the_weights_are_of_the_preset(pipe: u4d.Pipeline) -> None:
    config, wanted = pipe.transformer.config, presets.tiny().transformer
    for name in ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "num_frames"):
        assert config[name] == getattr(wanted, name), name
    assert tuple(config.image_size) == wanted.image_size
    assert all(bool(torch.isfinite(tensor).all()) for tensor in pipe.transformer.state_dict().values())


@pytest.mark.slow
def test_the_model_card_tells_the_truth(report: EvaluationReport) -> None:
    """Its row of the search over candidates with L = 1: these clips, these settings."""
    lines = MODEL_CARD.read_text().split("### Search over candidates")[1].splitlines()
    row = next(line for line in lines if line.startswith("| 1 |"))
    for name, cell in zip(SEARCH_COLUMNS, row.split("|")[2:-1], strict=True):
        mean, median = map(float, cell.split("/"))
        summary = report.row("model").summary(name)
        assert summary.mean == pytest.approx(mean, rel=0.02), name
        assert summary.median == pytest.approx(median, rel=0.03), name


@pytest.mark.slow
def test_depth_is_better_than_the_mean_map(report: EvaluationReport) -> None:
    model, trivial = (report.row(name).summary("abs_rel") for name in ("model", "mean depth map"))
    assert model.median < trivial.median and model.mean < trivial.mean


@pytest.mark.slow
def test_the_camera_moves_the_right_way(report: EvaluationReport) -> None:
    """Better than chance (90 degrees) and than the straight line that knows where cameras usually go."""
    direction = report.row("model").summary("translation_direction_deg").median
    assert direction < 45
    assert direction < report.row("straight line").summary("translation_direction_deg").median


@pytest.mark.slow
def test_rotation_follows_the_truth(report: EvaluationReport) -> None:
    for metric in ("rotation_first_to_last_deg", "rpe_r_deg"):
        model, static = (report.row(name).summary(metric) for name in ("model", "static camera"))
        assert model.mean < static.mean, metric


@pytest.mark.slow
def test_the_codec_keeps_images_and_depth(pipe: u4d.Pipeline) -> None:
    """Held-out PSNR of coding alone, over the clip: above 25 dB for RGB and 37 dB for the depth channel."""
    scenes = u4d.data.ProceduralScenes("test", frames=18, size=(96, 128))
    decibels: dict[str, list[float]] = {"rgb": [], "depth": []}
    for index in range(8):
        scene = scenes[index]
        scale = float(scene.depth.median())
        clips = {"rgb": scene.rgb * 2 - 1, "depth": (2 / (1 + scene.depth / scale) - 1)[:, None]}
        for stream, clip in clips.items():
            with torch.no_grad():
                decoded = pipe.vae.decode(pipe.vae.encode(clip[None], stream), stream, scene.num_frames)[0]
            decibels[stream].append(float(10 * torch.log10(4 / (decoded - clip).square().mean())))
    assert statistics.mean(decibels["rgb"]) > 25
    assert statistics.mean(decibels["depth"]) > 37
