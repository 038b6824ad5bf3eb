"""Annotated mp4 videos from frames."""

import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.checkpoint import atomic_path


def annotate(frame: np.ndarray, lines: list[str]) -> np.ndarray:
    """Write `lines` in white on a black strip below the frame: (H, W, 3) uint8 -> (H', W, 3) uint8, H' >= H.

    Text is wrapped to the width, between words where it can, so that H' grows with it.
    """
    font = ImageFont.load_default()
    width = frame.shape[1] - 4
    rows = []
    for line in lines:
        row = ""
        for word in line.split():
            if row and font.getlength(f"{row} {word}") <= width:
                row += f" {word}"
                continue
            rows += [row] if row else []
            row = word
            while len(row) > 1 and font.getlength(row) > width:  # a word longer than the frame
                cut = max(n for n in range(1, len(row)) if n == 1 or font.getlength(row[:n]) <= width)
                rows.append(row[:cut])
                row = row[cut:]
        rows.append(row)
    step = sum(font.getmetrics()) + 1  # ascent + descent, pixels
    strip = Image.new("RGB", (frame.shape[1], step * len(rows)))
    for i, row in enumerate(rows):
        ImageDraw.Draw(strip).text((2, i * step), row, font=font, fill="white")
    return np.concatenate([frame, np.asarray(strip)])


def write_video(path: str | os.PathLike, frames: list[np.ndarray], fps: float) -> None:
    """Write frames (H, W, 3) uint8 as H.264 mp4, atomically, padded with black to even sizes.

    RuntimeError if there are no frames, if they differ in more than their height, or if the disk or ffmpeg
    refuses.
    """
    import imageio_ffmpeg  # here, so that runs without videos need no ffmpeg

    shapes = {(frame.shape[1:], frame.dtype.name) for frame in frames}
    if len(shapes) != 1 or frames[0].shape[2:] != (3,) or frames[0].dtype != np.uint8:
        raise RuntimeError(
            f"{path} needs frames that are all uint8 (H, W, 3) of one width; got {sorted(shapes) or 'none'}."
        )
    # heights may differ: the text of `annotate` may need one row more in the last frame
    height, width = max(len(frame) for frame in frames), frames[0].shape[1]
    size = (width + width % 2, height + height % 2)  # yuv420p halves both
    with atomic_path(path) as temporary:
        # macro_block_size 1: the default 16 would rescale the picture
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            size,
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            macro_block_size=1,
            ffmpeg_log_level="error",
        )
        writer.send(None)
        for frame in frames:
            padding = ((0, size[1] - len(frame)), (0, width % 2), (0, 0))
            writer.send(np.ascontiguousarray(np.pad(frame, padding)))
        writer.close()
        try:  # write_frames hides ffmpeg's exit status, and a full disk leaves a file without an index
            written, _ = imageio_ffmpeg.count_frames_and_secs(str(temporary))
        except RuntimeError:
            written = 0
        if written != len(frames):
            raise RuntimeError(f"{path} holds {written} of {len(frames)} frames; free some space.")
