"""Videos decode back to the frames that went in."""

import imageio_ffmpeg
import numpy as np
import pytest

from common.video import annotate, write_video


def decode(path) -> tuple[dict, np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


@pytest.mark.parametrize("height, width", [(64, 96), (61, 95)])
def test_mp4_decodes_back_with_number_size_and_colours(tmp_path, height, width):
    frames = [np.full((height, width, 3), 20 * i + 30, np.uint8) for i in range(9)]
    write_video(tmp_path / "videos" / "a.mp4", frames, fps=10)
    meta, decoded = decode(tmp_path / "videos" / "a.mp4")
    assert decoded.shape == (9, height + height % 2, width + width % 2, 3)
    assert meta["fps"] == 10 and meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")
    centre = decoded[:, height // 2, width // 2].astype(int)
    assert np.abs(centre - np.array([20 * i + 30 for i in range(9)])[:, None]).max() <= 8
    assert [p.name for p in (tmp_path / "videos").iterdir()] == ["a.mp4"]


def test_text_that_grows_by_a_row_does_not_lose_the_video(tmp_path):
    frame = np.full((40, 128, 3), 200, np.uint8)
    frames = [annotate(frame, [text]) for text in ("step 100 value -0.12", "step 100 value -0.12 failure")]
    assert len(frames[0]) < len(frames[1])
    write_video(tmp_path / "a.mp4", frames, fps=10)
    _, decoded = decode(tmp_path / "a.mp4")
    assert decoded.shape[:2] == (2, len(frames[1])) and decoded[0, len(frames[0]) + 2 :].max() < 30


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)],
        [np.zeros((8, 8, 3), np.float32)],
        [np.zeros((8, 8), np.uint8)],
    ],
)
def test_bad_frames_are_refused_in_one_sentence(tmp_path, frames):
    with pytest.raises(RuntimeError) as error:
        write_video(tmp_path / "a.mp4", frames, fps=10)
    assert "a.mp4" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_encoder_leaves_the_old_video(tmp_path, monkeypatch):
    path, frames = tmp_path / "a.mp4", [np.zeros((16, 16, 3), np.uint8)] * 3
    write_video(path, frames, fps=5)
    before = path.read_bytes()
    monkeypatch.setattr(imageio_ffmpeg, "write_frames", _broken_writer)
    with pytest.raises(RuntimeError) as error:
        write_video(path, frames, fps=5)
    assert "0 of 3" in str(error.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def _broken_writer(path, *args, **kwargs):
    with open(path, "wb") as file:
        file.write(b"no index")
    while True:
        yield


def test_annotate_puts_wrapped_white_text_below_an_untouched_picture():
    frame = np.random.default_rng(0).integers(0, 255, (40, 100, 3), np.uint8)
    short = annotate(frame, ["step 3"])
    assert short.dtype == np.uint8 and short.shape[1:] == (100, 3) and np.array_equal(short[:40], frame)
    strip = short[40:]
    assert strip.max() > 200 and strip[:, -1].max() == 0 and strip[-1].max() == 0
    row = len(strip)
    two = annotate(frame, ["step 3", "reward 1"])
    assert len(two) == 40 + 2 * row and np.array_equal(two[40 : 40 + row], strip)
    long = annotate(frame, ["pick up the black bowl and place it on the plate"])
    rows = (len(long) - 40) // row
    assert rows >= 3 and all(long[40 + i * row : 40 + (i + 1) * row].max() > 200 for i in range(rows))
    assert long[40:, -1].max() == 0  # nothing is cut off at the right
    assert len(annotate(frame, ["x" * 60])) >= 40 + 3 * row  # one long word
    assert annotate(frame[:, :3], ["wide"]).shape == (40 + 4 * row, 3, 3)  # narrower than any letter
    assert np.array_equal(annotate(frame, []), frame)
    assert len(annotate(frame, [""])) == 40 + row  # an empty line keeps its row
