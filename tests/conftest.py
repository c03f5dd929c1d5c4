"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; none is visible")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep embeddings of prompts out of the user's cache."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("U4D_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings beside the project; never part of it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real recordings are not here: {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def debug_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the `debug` preset: random weights, latents taken as they are."""
    from dataclasses import asdict, replace

    from u4d import presets
    from u4d.checkpoint import save_checkpoint
    from u4d.model.codec import TinyCodec
    from u4d.model.transformer import Transformer

    preset = presets.debug()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = replace(preset.transformer, latents_mean=((0.0,) * 16,) * 4, latents_std=((1.0,) * 16,) * 4)
        transformer, codec = Transformer(config), TinyCodec(**asdict(preset.codec))
    folder = tmp_path_factory.mktemp("checkpoints") / "debug"
    save_checkpoint(folder, transformer.eval(), codec.eval(), torch.float32)
    return folder
