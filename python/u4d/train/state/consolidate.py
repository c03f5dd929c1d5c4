"""From a run's saved state, in however many parts, to the checkpoint or adapter that others can load. One process."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from u4d.checkpoint import check_new_checkpoint, save_checkpoint
from u4d.checkpoint_files import first_line
from u4d.errors import UserError
from u4d.model.lora_folder import save_lora
from u4d.train.recipe import Recipe
from u4d.train.settings import from_json
from u4d.train.start import Start, fresh_start, start_from_checkpoint
from u4d.train.state.folder import Manifest, check_hashes, check_sizes, read_manifest, saved_states, state_name
from u4d.train.state.parts import load_weights
from u4d.train.world import World

logger = logging.getLogger(__name__)


def consolidate(run: Path, out: Path, *, average: bool = True, step: int | None = None) -> Path:
    """Write a run's weights as `u4d train` does at its end: a checkpoint in bfloat16, or an adapter.

    Args:
        run: the run's folder; nothing in it is changed.
        out: a new folder, or one with an older checkpoint or adapter, which stays until the new one is complete.
        average: the running average of the weights (EMA); otherwise the weights themselves.
        step: of the saved state to take; None for the newest that is whole.
    Returns:
        `out`: a diffusers folder, or for a run of adapters one in peft's layout.
    Raises:
        UserError: no such run or state, a damaged one, the checkpoint that the run began with has changed, or `out`
            holds something else.
    """
    recipe = read_recipe(run)
    lora = recipe.start is not None and recipe.start.lora_rank is not None
    if not lora:
        check_new_checkpoint(out, overwrite=True)
    path, manifest = whole_state(run / "state", step)
    begin = begin_again(recipe, run)
    if manifest.identity.get("checkpoint", begin.digest) != begin.digest:
        raise UserError(
            f"{path}: the checkpoint that this run began with (see {run / 'recipe.json'}) holds other weights now; "
            "bring the old ones back"
        )
    load_weights(path, begin.model, "average" if average else "model")
    if recipe.start is not None and lora:
        save_lora(begin.model, out, base=recipe.start.checkpoint)
    else:
        save_checkpoint(out, begin.model.eval(), begin.vae, torch.bfloat16, text_folder=begin.text_folder)
    return out


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run's folder.

    Raises:
        UserError: there is none, or one that this version does not know.
    """
    path = run / "recipe.json"
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{run}: expected the folder of a run, with recipe.json: {first_line(error)}") from error


def begin_again(recipe: Recipe, run: Path) -> Start:
    """The model as it was before its first step, to be filled, and the run's codec.

    Raises:
        UserError: the run's codec is not there, or see `start_from_checkpoint`.
    """
    if recipe.start is not None:
        return start_from_checkpoint(recipe)
    if not (run / "codec").is_dir():
        raise UserError(f"{run / 'codec'}: expected the run's codec, found none; bring it back")
    return fresh_start(recipe, run, World(torch.device("cpu")), progress=False)


def whole_state(folder: Path, step: int | None) -> tuple[Path, Manifest]:
    """A saved state, checked: of that step, or the newest that is whole. Damaged ones on the way are told.

    Raises:
        UserError: there is none, or that step's is damaged.
    """
    found = saved_states(folder)
    wanted = [path for path in found if step is None or path.name == state_name(step)]
    if not wanted:
        names = ", ".join(path.name for path in reversed(found)) or "none"
        raise UserError(
            f"{folder}: expected {'a saved state' if step is None else state_name(step)}, there are: {names}"
        )
    problems = []
    for path in wanted:
        try:
            manifest = read_manifest(path)
            check_sizes(path, manifest.files)
            check_hashes(path, manifest.files)
            return path, manifest
        except OSError as error:
            if step is None:
                logger.warning("damaged state, the one before it is tried: %s", error)
            problems.append(str(error))
    raise UserError(f"{folder}: no whole state: {'; '.join(problems)}; take another step, or bring a copy back")
