"""Images and folders of images as clips."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from u4d.data.footage import DEFAULT_FPS, Footage, even_indices, fit_picture, kept_fps, stack_frames
from u4d.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorting key by which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def image_files(folder: Path) -> list[Path]:
    """The images of a folder (not of its sub-folders) in natural order; hidden files are no frames."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted((p for p in found if p.is_file()), key=lambda p: natural_key(p.name))


def read_image(path: Path) -> np.ndarray:
    """One colour or grey picture as [H,W,3] uint8, turned upright by its EXIF orientation.

    Raises:
        UserError: missing, damaged, or 16-bit (which nearly always is a depth map).
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise UserError(
                    f"{path}: expected an 8-bit colour image, got mode {image.mode}, which looks like a depth map; "
                    "keep the colour images in a folder of their own"
                )
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected a whole image, got one that can't be read ({error})") from error


def read_images(
    files: list[Path],
    max_frames: int | None = None,
    fps: float = DEFAULT_FPS,
    image_size: tuple[int, int] | None = None,
) -> Footage:
    """Read a clip from image files, in the order given.

    Args:
        files: at least one.
        max_frames: keep at most so many, evenly spaced, first and last among them; the others are not opened.
        fps: frame rate of the whole clip; images do not tell.
        image_size: (H, W) to which every picture is resized as soon as it is read.
    Raises:
        UserError: an image that can't be read, or that has another size than the first.
    """
    kept = even_indices(len(files), max_frames)
    pictures: list[np.ndarray] = []
    stored: tuple[int, ...] = ()
    for i in kept:
        picture = read_image(files[i])
        stored = stored or picture.shape
        if picture.shape != stored:
            (h0, w0, _), (h, w, _) = stored, picture.shape
            raise UserError(
                f"{files[i]}: expected {w0}x{h0} (width x height) like {files[kept[0]].name}, got {w}x{h}; "
                "all frames of a clip need one size"
            )
        pictures.append(fit_picture(picture, image_size))
    names = tuple(files[i].stem for i in kept)
    return Footage(
        rgb=stack_frames(pictures),
        fps=kept_fps(fps, len(files), len(kept)),
        total=len(files),
        kept=tuple(kept),
        stamps=_stamps(names),
        names=names,
        stored_size=None if image_size is None else (stored[0], stored[1]),
    )


def _stamps(names: tuple[str, ...]) -> tuple[float, ...] | None:
    """Time stamps, where every file is named by a number (TUM: seconds; RealEstate10K: microseconds)."""
    if not all(re.fullmatch(r"\d+(\.\d+)?", name) for name in names):
        return None
    stamps = tuple(float(name) for name in names)
    return stamps if all(a < b for a, b in pairwise(stamps)) else None


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write [H,W,3] uint8 without loss."""
    from PIL import Image

    Image.fromarray(picture).save(path, compress_level=3)
