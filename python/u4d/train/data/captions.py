"""Captions of clips as the model takes them: embeddings that the start checkpoint's frozen encoder made before the run.

They lie in the cache of `u4d.text_encoder`, a file for each caption. So no step waits for an encoder, none is in memory
while a run trains, and a run that goes on meets the same numbers.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from u4d.checkpoint_files import file_tensors
from u4d.data.scene_folder import MARKER
from u4d.errors import UserError
from u4d.model.text import Prompt, split_log
from u4d.text_encoder import (
    CACHE_VARIABLE,
    cache_folder,
    clean_prompt,
    content_key,
    embed,
    load_text_encoder,
    read_cached,
    write_cached,
)
from u4d.train.world import World

DTYPE = torch.bfloat16  # of the encoder, as when a prompt is given for completing a scene
TOKENS = 32  # prompts of a batch are filled up to a multiple of it: few shapes for torch.compile to know


@dataclass(frozen=True)
class Captions:
    """Embeddings of a run's captions, on disk.

    Attributes:
        cache: their folder.
        encoder: hash of the encoder and of all else that decides its answers.
    """

    cache: Path
    encoder: str

    def file(self, caption: str) -> Path:
        """Where a caption's embeddings are."""
        digest = hashlib.sha256(repr((self.encoder, clean_prompt(caption))).encode())
        return self.cache / f"{digest.hexdigest()}.safetensors"

    def embeddings(self, caption: str) -> Tensor:
        """`[T,text_dim]` on the CPU.

        Raises:
            UserError: the file is gone.
        """
        known = read_cached(self.file(caption))
        if known is None:
            raise UserError(
                f"{self.file(caption)}: expected the embeddings of {caption[:60]!r}, which were there when the run "
                "began; the same command makes them again and goes on"
            )
        return known


def caption_of(path: Path) -> str:
    """What is said of a clip: by a saved scene itself, else by a text file beside it (clip.mp4 and clip.txt), or ""."""
    beside = path.with_name(f"{path.name}.txt") if path.is_dir() else path.with_suffix(".txt")
    try:
        if (path / MARKER).is_file():
            return clean_prompt(json.loads((path / MARKER).read_text(encoding="utf-8"))["caption"])
        return clean_prompt(beside.read_text(encoding="utf-8")) if beside.is_file() else ""
    except (OSError, ValueError, TypeError, KeyError):  # whoever reads the clip names what is wrong with it
        return ""


def prepare_captions(
    clips: Sequence[Path], checkpoint: Path | None, length: int, text_dim: int, world: World, progress: bool
) -> Captions | None:
    """Encode the captions of these clips that never were, each process its share; the encoder is freed afterwards.

    Args:
        clips: files and folders.
        checkpoint: a folder with `text_encoder/` and `tokenizer/`; None where there is none.
        length: most tokens of a prompt.
        text_dim: width of the embeddings that the model takes.
        world: the processes; the encoder works on their devices.
        progress: show a bar.
    Returns:
        None without an encoder or without any caption: then all clips have the null text.
    Raises:
        UserError: the encoder can't be loaded or is another model's, or embeddings can't be kept where all find them.
    """
    captions = [] if checkpoint is None else sorted({caption_of(clip) for clip in clips} - {""})
    if checkpoint is None or not captions:
        return None
    known = Captions(cache_folder(), content_key(checkpoint, "", DTYPE, length))
    missing = [caption for caption in captions if not is_whole(known.file(caption))]
    world.wait()  # all have looked, so that all share out the same ones
    if mine := missing[world.rank :: world.size]:
        encode_captions(known, checkpoint, mine, length, world.device, progress and world.main)
    world.wait()
    lost = sum(not is_whole(known.file(caption)) for caption in missing)
    if lost:
        raise UserError(
            f"{known.cache}: expected the embeddings of {len(captions)} captions, {lost} of them are not there; "
            f"set {CACHE_VARIABLE} to a folder that can be written and that all machines see"
        )
    width = known.embeddings(captions[0]).shape[1]
    if width != text_dim:
        raise UserError(f"checkpoint {checkpoint}: text_encoder: expected embeddings of width {text_dim}, got {width}")
    return known


def encode_captions(
    known: Captions, checkpoint: Path, captions: Sequence[str], length: int, device: torch.device, progress: bool
) -> None:
    """Write the embeddings of these captions; one by one, since padding to a common length changes last bits."""
    tokenizer, encoder = load_text_encoder(checkpoint, DTYPE)
    encoder.to(device)
    for caption in tqdm(captions, disable=not progress, unit="caption", desc="captions"):
        write_cached(known.file(caption), embed(tokenizer, encoder, caption, length))
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_whole(file: Path) -> bool:
    """Whether a file of embeddings is there and as long as its header says."""
    try:
        return bool(file_tensors(file))
    except UserError:
        return False


def join_prompts(texts: Sequence[Tensor | None], null_text: Tensor, length: int, dtype: torch.dtype) -> Prompt | None:
    """Texts of different lengths as one batch, the padding of each collapsed (see `collapse_padding`).

    What a text lacks to the longest one is hidden by a score of minus infinity.

    Args:
        texts: `[T,text_dim]` each; None stands for the null text.
        null_text: `[1,text_dim]`, on the device where the prompt is wanted.
        length: tokens that a prompt was filled up to when the weights were trained.
        dtype: of the attention's scores.
    Returns:
        None where all have the null text: the model knows it by itself.
    """
    if all(text is None for text in texts):
        return None
    rows = [null_text if text is None else text.to(null_text) for text in texts]
    scores = [[0.0] * len(row) + split_log(length - len(row), dtype) for row in rows]
    longest = -(-max(map(len, scores)) // TOKENS) * TOKENS
    embeddings = torch.stack([pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    hidden = [row + [-math.inf] * (longest - len(row)) for row in scores]
    return Prompt(embeddings, torch.tensor(hidden, device=null_text.device))
