"""Videos: every frame, the right frames, upright, and no damaged file taken for a whole one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from u4d.data.video import read_video, write_video
from u4d.errors import UserError
from u4d.scene import Scene

FRAMES, HEIGHT, WIDTH = 30, 48, 64


def numbered_frames(count: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """Smooth pictures whose green tells the frame's number, brighter to the right and (in blue) to the bottom."""
    y, x = np.mgrid[0:height, 0:width]
    red, blue = 40 + 160 * x / width, 40 + 160 * y / height
    return [np.stack([red, np.full_like(red, 20 + 7 * n), blue], -1).round().astype(np.uint8) for n in range(count)]


def frame_numbers(rgb: torch.Tensor) -> list[int]:
    return [round((float(green) * 255 - 20) / 7) for green in rgb[:, 1].mean((1, 2))]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, numbered_frames(), fps=12.5)
    return path


def encode(path: Path, codec: str, count: int = FRAMES, **options: str) -> Path:
    """Write with another codec, as other programs would: no colour tags, default options."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for picture in numbered_frames(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_every_frame_comes_back(clip: Path) -> None:
    footage = read_video(clip)
    assert footage.rgb.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert (footage.total, footage.fps, footage.kept) == (FRAMES, 12.5, tuple(range(FRAMES)))
    truth = torch.from_numpy(np.stack(numbered_frames())).permute(0, 3, 1, 2) / 255
    assert float((footage.rgb - truth).abs().mean()) < 0.006
    np.testing.assert_allclose(footage.stamps, np.arange(FRAMES) / 12.5, atol=1e-3)


@pytest.mark.parametrize(("most", "expected"), [(1, [0]), (2, [0, 29]), (4, [0, 10, 19, 29]), (30, None), (99, None)])
def test_max_frames_keeps_the_first_the_last_and_even_steps(clip: Path, most: int, expected: list[int] | None) -> None:
    scene = Scene.load(clip, max_frames=most)
    wanted = expected or list(range(FRAMES))
    assert frame_numbers(scene.rgb) == wanted
    assert scene.report["source"] == {"path": str(clip), "frames": FRAMES, "kept": wanted}
    seconds = (FRAMES - 1) / 12.5
    if most > 1:
        assert (scene.num_frames - 1) / scene.fps == pytest.approx(seconds), "the clip lasts as long as before"


def test_only_the_kept_frames_are_held(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from u4d.data import video

    held = []
    stack = video.stack_frames
    monkeypatch.setattr(video, "stack_frames", lambda frames: held.append(len(frames)) or stack(frames))
    read_video(clip, max_frames=3)
    assert held == [3]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.webm", "libvpx"), ("b.webm", "libvpx-vp9"), ("c.mkv", "libx264"), ("d.mov", "libx264"), ("e.avi", "mpeg4")],
)
def test_other_containers_and_codecs(tmp_path: Path, name: str, codec: str) -> None:
    path = encode(tmp_path / name, codec, count=12, b="4M")
    assert frame_numbers(read_video(path).rgb) == list(range(12))
    assert frame_numbers(read_video(path, max_frames=3).rgb) == [0, 6, 11]


def test_hidden_frames_do_not_count(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some codecs (VP8) have packets that show nothing: a first count of packets is then too high."""
    from u4d.data import video

    monkeypatch.setattr(video, "_count_packets", lambda path: FRAMES + 4)
    footage = read_video(clip, max_frames=4)
    assert (frame_numbers(footage.rgb), footage.kept, footage.total) == ([0, 10, 19, 29], (0, 10, 19, 29), FRAMES)


@pytest.mark.parametrize("size", [(47, 64), (48, 63), (47, 63)])
def test_odd_sizes_are_padded_to_even_ones(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "odd.mp4"
    write_video(path, numbered_frames(3, *size), fps=24)
    footage = read_video(path)
    assert footage.rgb.shape == (3, 3, 48, 64)
    truth = torch.from_numpy(np.stack(numbered_frames(3, *size))).permute(0, 3, 1, 2) / 255
    assert float((footage.rgb[..., : size[0], : size[1]] - truth).abs().mean()) < 0.006


def test_colours_survive(tmp_path: Path) -> None:
    """Saturated colours shift by 10 and more levels where BT.601 and BT.709 are mixed up."""
    path = tmp_path / "colours.mp4"
    colours = [(255, 0, 0), (0, 200, 30), (20, 40, 250), (250, 250, 250), (3, 3, 3)]
    write_video(path, [np.full((32, 32, 3), colour, np.uint8) for colour in colours], fps=5)
    middle = read_video(path).rgb[:, :, 16, 16] * 255
    assert float((middle - torch.tensor(colours)).abs().max()) <= 4


# ISO/IEC 14496-12: x' = a x + c y + tx, y' = b x + d y + ty; stored as a b u c d v tx ty w in 16.16 (u v w in 2.30)
TURNS = {
    "clockwise": ((0, 1, -1, 0, HEIGHT, 0), -1),
    "anticlockwise": ((0, -1, 1, 0, 0, WIDTH), 1),
    "upside down": ((-1, 0, 0, -1, WIDTH, HEIGHT), 2),
}


@pytest.mark.parametrize("turn", TURNS)
def test_rotation_metadata_is_honoured(clip: Path, tmp_path: Path, turn: str) -> None:
    (a, b, c, d, tx, ty), quarter_turns = TURNS[turn]
    data = bytearray(clip.read_bytes())
    matrix = data.index(b"tkhd") - 4 + 48
    fixed = [a << 16, b << 16, 0, c << 16, d << 16, 0, tx << 16, ty << 16, 1 << 30]
    data[matrix : matrix + 36] = struct.pack(">9i", *fixed)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    expected = torch.rot90(read_video(clip, max_frames=2).rgb, quarter_turns, (2, 3))
    assert torch.equal(Scene.load(path, max_frames=2).rgb, expected)


@pytest.mark.parametrize("share", [0.4, 0.97])
def test_truncated_mp4(clip: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.mp4"
    data = clip.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    for most in (None, 5):
        with pytest.raises(UserError, match=r"cut\.mp4: the video is damaged or cut off.* \d+ of 30 frames could be"):
            Scene.load(path, max_frames=most)


@pytest.mark.parametrize(("name", "codec"), [("cut.webm", "libvpx-vp9"), ("cut.mkv", "libx264"), ("cut.avi", "mpeg4")])
def test_truncated_in_other_containers(tmp_path: Path, name: str, codec: str) -> None:
    path = encode(tmp_path / name, codec)
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    damaged = r"the video is damaged or cut off.*\d+ (of 30 )?frames could be decoded"
    with pytest.raises(UserError, match=rf"{name}: ({damaged}|expected a video .* is the file whole\?)"):
        Scene.load(path)


def test_damage_in_the_middle(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.mp4"
    data = bytearray(clip.read_bytes())
    middle = (data.index(b"mdat") + len(data)) // 2
    data[middle : middle + 60] = b"\xa5" * 60
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged\.mp4: the video is damaged.*frames could be decoded"):
        Scene.load(path)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\x00\x00\x00\x18ftypisom" + b"\x00" * 200])
def test_not_a_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"clip\.mp4: expected a video"):
        Scene.load(path)


def test_no_video_stream(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match=r"sound\.mp4: expected a file with a video stream, got none"):
        Scene.load(path)


def test_a_playlist_reaches_no_network(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(UserError, match="expected a video"):
        Scene.load(path)


def test_missing_file_and_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.mp4: expected a video"):
        Scene.load(tmp_path / "nowhere.mp4")
    (tmp_path / "path.txt").write_text("0 0 0 0 0 0 0 1\n")
    with pytest.raises(UserError, match=r"got a \.txt file .*cameras="):
        Scene.load(tmp_path / "path.txt")


def test_max_frames_must_be_positive(clip: Path) -> None:
    with pytest.raises(UserError, match="max_frames: expected at least 1, got 0"):
        Scene.load(clip, max_frames=0)


def test_real_videos_load(shared_data: Path) -> None:
    counts = {"cotracker_bear": 82, "davis_drift-straight": 50, "tokyo_walk": 195, "vipe_dog": 122}
    for name, count in counts.items():
        scene = Scene.load(shared_data / "videos" / f"{name}.mp4", max_frames=3)
        assert scene.report["source"]["frames"] == count
        assert scene.report["source"]["kept"] == [0, (count - 1 + 1) // 2, count - 1]
        assert scene.image_size in ((480, 854), (720, 1280))
        assert float(scene.rgb.std()) > 0.02 and 0.1 < float(scene.rgb.mean()) < 0.9
