"""What a SOURCE is: a hub id, a folder in diffusers' layout, its transformer/ alone, or the original release."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u4d.checkpoint import INDEX, download_checkpoint, is_hub_id
from u4d.checkpoint_files import PICKLES, TEXT_WEIGHTS, pickle_error, read_json, stored_tensors
from u4d.convert.wan_transformer import ORIGINAL, WanTransformer, read_file, read_folder
from u4d.convert.wan_vae import WanVae, read_original_vae, read_vae
from u4d.errors import UserError

WANTED = (
    "a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, a folder in diffusers' layout, a transformer's folder with "
    "config.json, or an original safetensors file"
)
TOKENIZER = ("transformers", "T5TokenizerFast")
TEXT_ENCODER = ("transformers", "UMT5EncoderModel")
KNOWN_PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class WanSource:
    """A Wan2.1 checkpoint whose headers and configurations were checked.

    Attributes:
        name: as it was given.
        place: its local file or folder.
        transformer, vae: what is known of them; not every source has a VAE.
        text: the folder that holds text_encoder/ and tokenizer/, where both are there.
        tokenizer: [library, class] of the tokenizer.
        left_out: (what, why) of parts that no u4d checkpoint takes.
    """

    name: str
    place: Path
    transformer: WanTransformer
    vae: WanVae | None
    text: Path | None
    tokenizer: tuple[str, str]
    left_out: tuple[tuple[str, str], ...]


def open_source(source: str | Path) -> WanSource:
    """Find the parts of a Wan2.1 checkpoint and check them; no weights are read.

    Raises:
        UserError: nothing there, not a text-to-video Wan2.1, a pickle, or damaged. What is wrong is named.
    """
    place = download_checkpoint(str(source)) if is_hub_id(source) else Path(source)
    if place.is_file():
        if place.suffix not in (".safetensors", *PICKLES):
            raise UserError(f"{place}: expected {WANTED}")
        return WanSource(str(source), place, read_file(place), None, None, TOKENIZER, no_text(ORIGINAL))
    if not place.is_dir():
        raise UserError(f"{source}: no such file or folder; expected {WANTED}")
    if (place / INDEX).exists() or (place / "transformer").is_dir():
        return open_pipeline(str(source), place)
    if (place / "config.json").exists():
        transformer = read_folder(place)
        vae = read_original_vae(place) if transformer.layout == ORIGINAL else None
        return WanSource(str(source), place, transformer, vae, None, TOKENIZER, no_text(transformer.layout))
    pickles = sorted(file for file in place.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise pickle_error(pickles[0])
    raise UserError(f"{place}: expected {WANTED}, got a folder with none of {INDEX}, config.json and transformer/")


def open_pipeline(name: str, folder: Path) -> WanSource:
    """A folder in diffusers' layout, which may lack everything but transformer/."""
    index = read_index(folder)
    for part in (part for part in index if not (folder / part).is_dir()):
        raise UserError(f"checkpoint {folder / INDEX}: expected a folder {part}/ beside it, found none")
    if index.get("transformer_2"):
        raise UserError(
            f"checkpoint {folder / INDEX}: transformer_2: expected none, got {index['transformer_2']}: this is the "
            "two-stage Wan2.2; take a Wan2.1 such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    transformer = read_folder(folder / "transformer")
    vae = read_vae(folder / "vae") if (folder / "vae").is_dir() else None
    text = folder if (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir() else None
    if text is not None:
        check_text_encoder(folder / "text_encoder", transformer.config["text_dim"])
    left_out = [
        (part, "no part of a u4d checkpoint") for part in index if part not in KNOWN_PARTS and part != "transformer_2"
    ]
    if "scheduler" in index:
        left_out.append(("scheduler", "u4d's own is written: UniPC of order 2, flow shift 3"))
    left_out.extend(() if text is not None else no_text(transformer.layout))
    library, class_name = index.get("tokenizer", TOKENIZER)
    return WanSource(name, folder, transformer, vae, text, (str(library), str(class_name)), tuple(left_out))


def read_index(folder: Path) -> dict[str, Any]:
    """Name -> [library, class] of the parts that `model_index.json` lists; nothing where there is no such file.

    Raises:
        UserError: it describes a u4d checkpoint.
    """
    if not (folder / INDEX).exists():
        return {}
    index = read_json(folder / INDEX)
    if index.get("_class_name") == "Pipeline":
        raise UserError(
            f"checkpoint {folder / INDEX}: expected a Wan pipeline, got a u4d Pipeline; "
            "to get a Wan checkpoint out of it, use --extract"
        )
    pairs = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: entry for name, entry in pairs.items() if all(isinstance(word, str) for word in entry)}


def check_text_encoder(folder: Path, text_dim: int) -> None:
    """Raise UserError unless the encoder's files are whole and it gives embeddings of the transformer's width."""
    config_file = folder / "config.json"
    width = read_json(config_file).get("d_model")
    if width != text_dim:
        raise UserError(f"checkpoint {config_file}: d_model: expected the transformer's {text_dim}, got {width!r}")
    stored_tensors(folder, TEXT_WEIGHTS)


def no_text(layout: str) -> tuple[tuple[str, str], ...]:
    """Why there is no text encoder."""
    if layout != ORIGINAL:
        return (("text_encoder, tokenizer", "SOURCE has none"),)
    why = "not taken from an original release; copy them from Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    return (("text_encoder, tokenizer", why),)
