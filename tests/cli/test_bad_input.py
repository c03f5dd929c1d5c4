"""Issue 2, section 6: every mistake ends in one clear line and exit code 2, and leaves older results as they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import Command, tree
from PIL import Image

from u4d.data.atomic import new_folder
from u4d.scene import Scene


@pytest.fixture
def older(known: Scene, tmp_path: Path) -> Path:
    """A folder with an older result in it, which --overwrite may replace."""
    folder = tmp_path / "out"
    with new_folder(folder, "scene.json", overwrite=False) as partial:
        (partial / "scene.json").write_text("{}")
        (partial / "rgb.mp4").write_bytes(b"older")
    return folder


def assert_refused(command: Command, older: Path, arguments: list[object], words: list[str]) -> None:
    before = tree(older.parent)
    outcome = command(*arguments, "-o", older, "--overwrite")
    assert outcome.code == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("u4d: error: ")
    assert not [word for word in words if word not in line], line
    assert tree(older.parent) == before


# --- inputs ----------------------------------------------------------------------------------------------------------


def missing_video(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [folder / "nothing.mp4"], ["nothing.mp4"]


def truncated_video(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    content = video.read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) * 2 // 3])
    return [folder / "cut.mp4"], ["cut.mp4", "damaged"]


def no_video(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    (folder / "text.mp4").write_text("not a video")
    return [folder / "text.mp4"], ["text.mp4", "expected a video"]


def other_size_in_the_middle(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    (folder / "frames").mkdir()
    for i in range(3):
        Image.new("RGB", (48, 32) if i != 1 else (40, 32)).save(folder / "frames" / f"{i}.png")
    return [folder / "frames"], ["1.png", "40x32"]


def empty_folder(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    (folder / "empty").mkdir()
    return [folder / "empty"], ["empty", "folder with images"]


def changed_scene(change: Callable[[dict], None]) -> Callable[[Path, Path, Path], list[object]]:
    def build(folder: Path, video: Path, scene: Path) -> list[object]:
        shutil.copytree(scene, folder / "changed")
        document = json.loads((folder / "changed" / "scene.json").read_text())
        change(document)
        (folder / "changed" / "scene.json").write_text(json.dumps(document))
        return [folder / "changed"]

    return build


def scale_rotation(document: dict) -> None:
    document["cam_to_world"][2][0][0] = 2.0


def nan_pose(document: dict) -> None:
    document["cam_to_world"][3][0][3] = float("nan")


def singular_intrinsics(document: dict) -> None:
    document["intrinsics"][1] = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def non_rigid_pose(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return changed_scene(scale_rotation)(folder, video, scene), ["scene.json", "cam_to_world", "frame 2"]


def nan_in_a_pose(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return changed_scene(nan_pose)(folder, video, scene), ["scene.json", "cam_to_world", "frame 3"]


def singular_camera(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return changed_scene(singular_intrinsics)(folder, video, scene), ["scene.json", "intrinsics", "frame 1"]


def depth_of_zeros(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    shutil.copytree(scene, folder / "flat")
    np.savez(folder / "flat" / "depth.npz", depth=np.zeros((6, 32, 48), np.float32))
    return [folder / "flat", "--observe", "depth:all"], ["depth", "none"]


def one_depth_of_zeros(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    depth = Scene.load(scene).depth.numpy().copy()
    depth[2] = 0
    shutil.copytree(scene, folder / "holed")
    np.savez(folder / "holed" / "depth.npz", depth=depth)
    return [folder / "holed", "--observe", "depth:all"], ["depth", "frame 2"]


def frame_outside(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [video, "--observe", "rgb:77"], ["'rgb:77'", "10 frames"]


def unknown_modality(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [video, "--observe", "pose:all"], ["observe", "'pose'", "camera"]


def nothing_to_observe(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [video, "--observe", "rgb:all,depth:0"], ["depth"]


def frame_not_taken(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [video, "--observe", "rgb:1"], ["rgb", "0, 2, 4, 5, 7, 9"]


def unknown_task(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [video, "--task", "slam"], ["--task", "'slam'", "pose"]


def too_many_frames(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [video, "--frames", 7], ["frames", "1 to 6", "7"]


def prompt_without_text_encoder(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [video, "--prompt", "a room"], ["prompt", "text encoder"]


def missing_cameras(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    return [video, "--cameras", folder / "cameras.json"], ["cameras.json"]


def cameras_of_another_clip(folder: Path, video: Path, scene: Path) -> tuple[list[object], list[str]]:
    pose = torch.eye(4).tolist()
    frames = [{"file_path": f"{i}.png", "transform_matrix": pose} for i in range(3)]
    lens = {"fl_x": 80, "fl_y": 80, "cx": 48, "cy": 32, "w": 96, "h": 64}
    (folder / "cameras.json").write_text(json.dumps({**lens, "frames": frames}))
    return [video, "--cameras", folder / "cameras.json"], ["cameras.json", "3"]


INPUTS = [
    missing_video,
    truncated_video,
    no_video,
    other_size_in_the_middle,
    empty_folder,
    non_rigid_pose,
    nan_in_a_pose,
    singular_camera,
    depth_of_zeros,
    one_depth_of_zeros,
    frame_outside,
    unknown_modality,
    nothing_to_observe,
    frame_not_taken,
    unknown_task,
    too_many_frames,
    prompt_without_text_encoder,
    missing_cameras,
    cameras_of_another_clip,
]


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
def test_a_bad_input_is_named(
    make: Callable[[Path, Path, Path], tuple[list[object], list[str]]],
    complete: Command,
    older: Path,
    video: Path,
    scene_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    arguments, words = make(tmp_path_factory.mktemp("inputs"), video, scene_folder)
    assert_refused(complete, older, arguments, words)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def truncate_weights(folder: Path) -> str:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "transformer"


def tamper_header(folder: Path) -> str:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"x" * 32
    file.write_bytes(content)
    return "vae"


def other_sizes(folder: Path) -> str:
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "ffn_dim": config["ffn_dim"] * 2}))
    return "checkpoint"


def missing_tensors(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "blocks.1" not in name}, file, {"format": "pt"})
    return "blocks.1"


def not_finite(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"][:] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    return ""


def broken_config(folder: Path) -> str:
    (folder / "transformer" / "config.json").write_text('{"num_layers": ')
    return "config.json"


def unknown_field(folder: Path) -> str:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_heads": 4}))
    return "num_heads"


def no_statistics(folder: Path) -> str:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_mean": None}))
    return "latents_mean"


def no_index(folder: Path) -> str:
    (folder / "model_index.json").unlink()
    return "model_index.json"


def missing_part(folder: Path) -> str:
    shutil.rmtree(folder / "vae")
    return "checkpoint"


def pickled_weights(folder: Path) -> str:
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    return "diffusion_pytorch_model.bin"


CHECKPOINTS = [
    truncate_weights,
    tamper_header,
    other_sizes,
    missing_tensors,
    not_finite,
    broken_config,
    unknown_field,
    no_statistics,
    no_index,
    missing_part,
    pickled_weights,
]


@pytest.mark.parametrize("damage", CHECKPOINTS, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named(
    damage: Callable[[Path], str],
    u4d: Command,
    older: Path,
    video: Path,
    debug_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "debug"
    shutil.copytree(debug_checkpoint, folder)
    word = damage(folder)
    command = [video, "--checkpoint", folder, "--steps", 1]
    assert_refused(lambda *arguments: u4d("complete", *arguments), older, command, [word])


def test_an_unknown_preset_is_named(u4d: Command, older: Path, video: Path) -> None:
    command = [video, "--checkpoint", "huge"]
    assert_refused(lambda *arguments: u4d("complete", *arguments), older, command, ["'huge'", "preset"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_missing_gpu_is_told(u4d: Command, older: Path, video: Path, debug_checkpoint: Path) -> None:
    command = [video, "--checkpoint", debug_checkpoint, "--device", "cuda"]
    assert_refused(lambda *arguments: u4d("complete", *arguments), older, command, ["--device", "CUDA"])


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["older result", "foreign folder", "file", "below a file", "read-only"])
def test_a_place_that_can_not_be_written_is_told_before_the_work(
    kind: str, complete: Command, video: Path, known: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("the long work began")

    monkeypatch.setattr("u4d.commands.completion.load_pipeline", never)
    options: list[object] = ["--overwrite"]
    out = tmp_path / "out"
    if kind == "older result":
        replace(known, depth=None, cam_to_world=None).save(out)
        options = []
    elif kind == "foreign folder":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    elif kind == "file":
        out.write_text("mine")
    elif kind == "below a file":
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
    else:
        out = Path("/proc/u4d/out")
    before = tree(tmp_path)
    outcome = complete(video, "-o", out, *options)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    named = out.parent if kind in ("below a file", "read-only") else out
    assert line.startswith("u4d: error: ") and str(named) in line
    assert tree(tmp_path) == before
