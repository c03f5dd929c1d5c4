"""Videos in and out, through PyAV (FFmpeg)."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from u4d.data.footage import DEFAULT_FPS, Footage, even_indices, fit_picture, kept_fps, stack_frames
from u4d.errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MIN_FPS, MAX_FPS = Fraction(1, 1000), Fraction(1000)  # what mp4 and its players take
# SWS_BILINEAR, FULL_CHR_H_INT, FULL_CHR_H_INP and ACCURATE_RND of libswscale/swscale.h, which PyAV names only
# from 18 on. The default way between RGB and YUV rounds down and darkens a picture by 1 to 2 levels.
EXACT_COLOURS = 0x2 | 0x2000 | 0x4000 | 0x40000


def read_video(path: Path, max_frames: int | None = None, image_size: tuple[int, int] | None = None) -> Footage:
    """Decode a video file; rotation metadata is applied.

    Args:
        path: any container and codec that FFmpeg reads.
        max_frames: keep at most so many frames, evenly spaced, first and last among them; only these are held.
        image_size: (H, W) to which every picture is resized as soon as it is decoded.
    Raises:
        UserError: not a video, damaged or cut off (the number of frames that could be decoded is told), or a frame
            size that changes.
    """
    expected = None if max_frames is None else _count_packets(path)
    wanted = None if expected is None else even_indices(expected, max_frames)
    reader = _Reader(path, wanted, image_size)
    if wanted is not None and reader.seen != expected:
        # Some codecs have packets without a picture (VP8's hidden frames): now the true count is known.
        wanted = even_indices(reader.seen, max_frames)
        reader = _Reader(path, wanted, image_size)
    kept = tuple(range(reader.seen)) if wanted is None else tuple(wanted)
    return Footage(
        rgb=stack_frames(reader.pictures),
        fps=kept_fps(reader.fps, reader.seen, len(kept)),
        total=reader.seen,
        kept=kept,
        stamps=None if None in reader.times else tuple(t - reader.times[0] for t in reader.times),
        stored_size=None if image_size is None else (reader.stored[0], reader.stored[1]),
    )


class _Reader:
    """One pass over a video: the wanted pictures, the number of frames, and every sign of damage."""

    def __init__(self, path: Path, wanted: list[int] | None, image_size: tuple[int, int] | None) -> None:
        from av.error import FFmpegError

        self.path = path
        self.wanted = None if wanted is None else set(wanted)
        self.image_size = image_size
        self.pictures: list[np.ndarray] = []
        self.stored: tuple[int, ...] = ()  # shape of the pictures before they were resized
        self.times: list[Any] = []
        self.seen = 0
        packets = 0
        with _open(path) as container:
            stream = _video_stream(container, path)
            self.fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
            self.promised = stream.frames or None
            try:
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        raise self._damaged("a packet is cut off")
                    packets += packet.size > 0 or packet.dts is not None  # not the one that only flushes the decoder
                    for frame in packet.decode():
                        self._take(frame)
            except FFmpegError as error:
                raise self._damaged(error.strerror or str(error)) from error
            indexed = "mp4" in container.format.name  # of the formats that tell a number, this one keeps its word
        if (indexed and packets < (self.promised or 0)) or _missing_bytes(path):
            raise self._damaged("the file ends early")
        if not self.seen:
            raise UserError(f"{path}: expected a video with at least one frame, got none")

    def _take(self, frame: VideoFrame) -> None:
        if frame.is_corrupt:
            raise self._damaged(f"frame {self.seen} holds errors")
        if self.wanted is None or self.seen in self.wanted:
            # FFmpeg tells the anticlockwise turn that shows the picture upright.
            stored = frame.to_ndarray(format="rgb24", interpolation=EXACT_COLOURS)
            picture = np.rot90(stored, k=round(frame.rotation / 90) % 4)
            self.stored = self.stored or picture.shape
            if picture.shape != self.stored:
                (h0, w0, _), (h, w, _) = self.stored, picture.shape
                raise UserError(
                    f"{self.path}: expected frames of one size, got {w}x{h} in frame {self.seen} after {w0}x{h0}"
                )
            self.pictures.append(fit_picture(picture, self.image_size))
            self.times.append(frame.time)
        self.seen += 1

    def _damaged(self, why: str) -> UserError:
        of = f" of {self.promised}" if self.promised else ""
        return UserError(
            f"{self.path}: the video is damaged or cut off ({why}): {self.seen}{of} frames could be decoded; "
            "get a whole copy, or re-encode the good part"
        )


def _open(path: Path) -> InputContainer:
    import av
    from av.error import FFmpegError

    try:
        # The whitelist keeps a playlist that calls itself .mp4 from fetching other files over the network.
        return av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
    except (FFmpegError, OSError) as error:
        why = error.strerror or str(error)
        raise UserError(f"{path}: expected a video that FFmpeg can read, got {why}; is the file whole?") from error


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    if not container.streams.video:
        raise UserError(f"{path}: expected a file with a video stream, got none")
    return container.streams.video[0]


def _count_packets(path: Path) -> int:
    """Number of packets that will be shown: nearly always the number of frames, and far cheaper to find."""
    from av.error import FFmpegError

    with _open(path) as container:
        stream = _video_stream(container, path)
        try:
            return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
        except FFmpegError as error:
            raise UserError(f"{path}: the video is damaged or cut off ({error.strerror})") from error


def _missing_bytes(path: Path) -> int:
    """Bytes that a Matroska or WebM file's header promises and the file lacks; 0 for other files.

    FFmpeg takes the end of such a file for the end of the video. EBML (RFC 8794): an element is an id, a size whose
    leading zero bits tell its own length, and content; the second element of the file, the segment, holds all the rest.
    """
    with path.open("rb") as file:
        head = file.read(4)
        if head != bytes.fromhex("1a45dfa3"):
            return 0
        file.seek(_element_size(file) or 0, 1)
        if file.read(4) != bytes.fromhex("18538067"):
            return 0
        size = _element_size(file)
        return 0 if size is None else max(0, file.tell() + size - path.stat().st_size)


def _element_size(file: BinaryIO) -> int | None:
    """Read an EBML size; None where it says that it is unknown (a live recording)."""
    first = int.from_bytes(file.read(1))
    length = 9 - first.bit_length()
    value = int.from_bytes(bytes([first & ((1 << (8 - length)) - 1)]) + file.read(length - 1)) if first else 0
    return None if value == (1 << 7 * length) - 1 else value


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float, crf: int = 14) -> None:
    """Write an H.264 mp4 that every player shows (yuv420p, BT.709, limited range).

    Args:
        path: ends in .mp4.
        frames: [H,W,3] uint8 each, all of one size. An odd side is padded by repeating its last row or column, since
            4:2:0 needs even ones; whoever reads it back crops.
        fps: frames per second; kept between 0.001 and 1000.
        crf: libx264's quality; lower is better, 14 is hard to tell from the original.
    """
    import av

    with av.open(str(path.absolute()), "w", options={"movflags": "faststart"}) as container:
        stream = None
        for picture in frames:
            height, width, _ = picture.shape
            if height % 2 or width % 2:
                picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if stream is None:
                rate = min(max(Fraction(fps).limit_denominator(1000), MIN_FPS), MAX_FPS)
                stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
                context.color_range = 1  # limited
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", interpolation=EXACT_COLOURS, dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())
