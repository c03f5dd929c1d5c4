"""Small Wan checkpoints, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.wan_folders import write_wan_folder


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Wan pipeline in float32; do not change it."""
    return write_wan_folder(tmp_path_factory.mktemp("wan") / "wan")
