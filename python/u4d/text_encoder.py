"""Prompts to UMT5 embeddings, as Wan makes them: the encoder is loaded for a prompt, freed after it, and its answers
are kept on disk, so that nobody waits for 11 GB of encoder twice for the same words.

Source: Wan2.1 (its T5 text path); diffusers' `WanPipeline._get_t5_prompt_embeds`, which the tests compare with.
"""

from __future__ import annotations

import hashlib
import html
import logging
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u4d.errors import UserError

CACHE_VARIABLE = "U4D_CACHE"
MAX_TOKENS = 512
SAMPLE = 1 << 20  # bytes at either end of a weight file that stand for its content


def encode_prompt(
    folder: Path,
    prompt: str,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    max_tokens: int = MAX_TOKENS,
    cache: Path | None = None,
) -> Tensor:
    """Embeddings of a prompt's tokens, its end token included, without any padding.

    Args:
        folder: a checkpoint with `text_encoder/` and `tokenizer/`.
        prompt: any words; "" is Wan's null prompt.
        dtype: that the encoder runs in.
        device: where it runs; it is freed afterwards.
        max_tokens: a longer prompt is cut.
        cache: folder of earlier answers, by default `$U4D_CACHE/text` or `~/.cache/u4d/text`.
    Returns:
        `[T,dim]` on the CPU, T <= max_tokens.
    Raises:
        UserError: transformers is not installed, or the folder's files can't be read.
    """
    words = clean_prompt(prompt)
    file = (cache or cache_folder()) / f"{content_key(folder, words, dtype, max_tokens)}.safetensors"
    known = read_cached(file)
    if known is not None:
        return known
    tokenizer, encoder = load_text_encoder(folder, dtype)
    embeddings = embed(tokenizer, encoder.to(device), words, max_tokens)
    del encoder
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    write_cached(file, embeddings)
    return embeddings


@torch.no_grad()
def embed(tokenizer: Any, encoder: Any, words: str, max_tokens: int = MAX_TOKENS) -> Tensor:
    """Embeddings `[T,dim]` of cleaned words, on the CPU."""
    tokens = tokenizer([clean_prompt(words)], truncation=True, max_length=max_tokens, return_tensors="pt")
    ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
    embeddings: Tensor = encoder(ids, mask).last_hidden_state[0]
    return embeddings.cpu()


def clean_prompt(prompt: str) -> str:
    """As Wan cleans it: HTML entities decoded, white space collapsed."""
    return " ".join(html.unescape(html.unescape(prompt)).split())


def load_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and encoder of a checkpoint.

    Raises:
        UserError: see `encode_prompt`.
    """
    if find_spec("transformers") is None:
        raise UserError("prompt: expected the package transformers to encode it, found none: pip install 'u4d[text]'")
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, UMT5EncoderModel

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder: Any = UMT5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"checkpoint {folder}: its text encoder can't be loaded: {reason}") from error
    return tokenizer, encoder.eval()


# --- answers on disk -------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where earlier answers lie."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named) / "text"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "u4d" / "text"


def content_key(folder: Path, words: str, dtype: torch.dtype, max_tokens: int) -> str:
    """Hash of the words and of everything that decides their embeddings.

    Weight files are hashed by size, header and end: reading 11 GB would take longer than the encoder does.
    """
    digest = hashlib.sha256(repr((words, str(dtype), max_tokens)).encode())
    for part in ("tokenizer", "text_encoder"):
        for file in sorted((folder / part).glob("*")):
            size = file.stat().st_size
            digest.update(repr((part, file.name, size)).encode())
            with open(file, "rb") as content:
                digest.update(content.read(SAMPLE))
                content.seek(max(0, size - SAMPLE))
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()


def read_cached(file: Path) -> Tensor | None:
    """An earlier answer; None where there is none, or a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            embeddings: Tensor = tensors.get_tensor("embeddings")
            return embeddings
    except (OSError, SafetensorError):
        return None


def write_cached(file: Path, embeddings: Tensor) -> None:
    """Keep an answer; where the cache can't be written, the prompt is encoded again next time."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": embeddings.contiguous()}, partial)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        logging.getLogger(__name__).warning("%s: the prompt's embedding is not kept: %s", file.parent, error)
        with suppress(OSError):
            partial.unlink()
