"""Put a trained checkpoint into the package, so that `Pipeline.from_pretrained(NAME)` finds it.

    python scripts/ship_checkpoint.py runs/tiny/checkpoint tiny [--dense-steps 1 --dense-guidance 1]
                                                                [--camera-smoothing 2]

The folder is checked as any checkpoint is, then copied; paths of this machine are left out of its configuration files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from u4d.checkpoint import SETTINGS, SHIPPED, check_folder

MOST_BYTES = 48_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    parser.add_argument("--dense-steps", type=int, default=40, help="recommended steps where all RGB is observed")
    parser.add_argument("--dense-guidance", type=float, default=2.0, help="recommended guidance there")
    parser.add_argument("--camera-smoothing", type=float, default=0.0, help="of predicted cameras, in frames")
    options = parser.parse_args()
    check_folder(options.checkpoint)
    size = sum(path.stat().st_size for path in options.checkpoint.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{options.checkpoint}: {size / 1e6:.1f} MB; the package takes {MOST_BYTES / 1e6:.0f} MB")
    target = SHIPPED / options.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(options.checkpoint, target)
    for path in target.rglob("*"):
        if path.suffix == ".json":
            content = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
            if path.name == "model_index.json":
                content |= {name: getattr(options, name) for name in SETTINGS}
            path.write_text(json.dumps(content, indent=2) + "\n")
        if path.is_file():
            path.chmod(0o644)
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
