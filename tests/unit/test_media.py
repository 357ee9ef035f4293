"""Images and frames are read as in transformers where that is lossless, and rejected by name where it is not.

The exception is transparency: transformers drops the alpha channel, so that transparent pixels show the hidden color.
"""

import io
import random
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFile, PngImagePlugin
from transformers.image_utils import load_image as reference_load_image

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.dataset import read_conversations
from megatron_vlbridge.data.images import MediaOptions, read_image_size
from megatron_vlbridge.data.media import DEFAULTS, load_image, load_video, media_shape
from megatron_vlbridge.demo.tiny_processor import build_processor
from megatron_vlbridge.errors import VLBridgeError
from tests.errors import rejects

ROOT = Path(__file__).parents[2]

type Source = str | Path | bytes | Image.Image


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image of random values in a mode of 8 bits per channel."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    data = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), data.tobytes())


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def with_orientation(path: Path, orientation: int) -> Path:
    """A file of 30 x 20 stored pixels with an EXIF orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(noise(30, 20), path, exif=exif)


def image_of(source: Source, options: MediaOptions = DEFAULTS) -> Image.Image:
    return load_image({"type": "image", "image": source}, options)


def frames_of(sources: list[Source]) -> torch.Tensor:
    return load_video({"type": "video", "video": sources, "fps": 2}).frames


def size_of(source: Source, options: MediaOptions = DEFAULTS) -> tuple[int, int]:
    return read_image_size(source, "image", options)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- orientation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_by_transformers(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = with_orientation(tmp_path / f"photo.{suffix}", orientation)
    expected = pixels(reference_load_image(str(path)))
    assert expected.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    np.testing.assert_array_equal(pixels(image_of(path)), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(pixels(image_of(opened)), pixels(reference_load_image(opened)))
    for frame in frames_of([path, str(path)]):
        np.testing.assert_array_equal(frame.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_uncompressed_tiff_is_rotated_and_not_scrambled(tmp_path: Path, orientation: int, mode: str) -> None:
    """Pillow 13 memory-maps these with the rotated size when given a path, also in transformers' `load_image`."""
    image = noise(30, 20).convert("P") if mode == "P" else noise(30, 20, mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = saved(image, tmp_path / "scan.tiff", exif=exif)
    upright = pixels(image_of(image))
    columns = upright.swapaxes(0, 1)
    expected = [
        *(upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]),
        *(columns, columns[:, ::-1], columns[::-1, ::-1], columns[::-1]),
    ][orientation - 1]
    np.testing.assert_array_equal(pixels(image_of(path)), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(pixels(image_of(opened)), expected)


def test_an_image_that_was_read_is_not_rotated_again(tmp_path: Path) -> None:
    once = image_of(with_orientation(tmp_path / "photo.jpg", 6))
    np.testing.assert_array_equal(pixels(image_of(once)), pixels(once))


def test_a_rotated_photo_gives_the_grid_of_transformers(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = saved(noise(96, 32), tmp_path / "photo.jpg", exif=exif)
    processor = build_processor(["seven"], patch_size=16, merge_size=2, min_pixels=1024, max_pixels=65536)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": str(path)}]},
        {"role": "assistant", "content": "seven"},
    ]
    sample = encode_conversation(messages, processor)
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert sample.image_grid_thw.tolist() == expected["image_grid_thw"].tolist() == [[1, 6, 2]]
    assert torch.equal(sample.pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp", "gif"])
def test_the_size_is_read_without_decoding(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [with_orientation(tmp_path / f"{orientation}.{suffix}", orientation) for orientation in range(1, 9)]
    xmp = '<x xmlns:tiff="t" tiff:Orientation="6"/>'
    if suffix in ("jpg", "webp"):
        paths.append(saved(noise(30, 20), tmp_path / f"xmp.{suffix}", xmp=xmp.encode()))
    if suffix == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp)
        paths.append(saved(noise(30, 20), tmp_path / "xmp.png", pnginfo=info))
    expected = [image_of(path).size for path in paths]
    assert set(expected) == ({(30, 20)} if suffix in ("bmp", "gif") else {(30, 20), (20, 30)})
    for path, size in zip(paths, expected, strict=True):
        with Image.open(path) as opened, Image.open(path) as loaded:
            loaded.load()
            assert size_of(opened) == size_of(loaded) == size
            assert image_of(opened).size == size
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert [size_of(path) for path in paths] == expected


def png_with_late_orientation(path: Path, early: bytes = b"") -> Path:
    """A file whose last chunk is an EXIF orientation of 6, and whose first chunk is perhaps another."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = saved(noise(30, 20), path).read_bytes()
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:33] + early + data[33:-12] + chunk + data[-12:])
    return path


def test_an_orientation_after_the_pixels_of_a_png_is_applied(tmp_path: Path) -> None:
    upright = with_orientation(tmp_path / "upright.png", 1).read_bytes()
    start = upright.index(b"eXIf") - 4
    early = upright[start : start + 12 + struct.unpack(">I", upright[start : start + 4])[0]]
    for path in (
        png_with_late_orientation(tmp_path / "late.png"),
        png_with_late_orientation(tmp_path / "both.png", early),
    ):
        assert image_of(path).size == size_of(path) == (20, 30)
        with Image.open(path) as opened:
            assert size_of(opened) == image_of(opened).size == (20, 30)


def test_a_size_is_rejected_where_the_header_shows_that_the_image_is(tmp_path: Path) -> None:
    path = saved(noise(30, 20), tmp_path / "a.png")
    assert size_of(path, MediaOptions(600)) == (30, 20)
    with rejects("a.png' is too large", "299 pixels"):
        size_of(path, MediaOptions(299))
    with rejects("image: no file"):
        size_of(tmp_path / "b.png")
    with rejects("image: 'http://a/b.png' is a URL"):
        size_of("http://a/b.png")
    frames = saved(noise(30, 20), tmp_path / "a.gif", save_all=True, append_images=[noise(30, 20, seed=1)])
    with rejects("has 2 frames or pages"):
        size_of(frames)
    path.write_bytes(path.read_bytes()[:500])
    assert size_of(path) == (30, 20)
    path.write_bytes(path.read_bytes()[:20])
    with rejects("cannot be decoded as an image"):
        size_of(path)


def test_frame_sizes_are_compared_after_rotation(tmp_path: Path) -> None:
    upright, lying = with_orientation(tmp_path / "upright.jpg", 1), with_orientation(tmp_path / "lying.jpg", 8)
    assert frames_of([lying, lying]).shape == (2, 3, 30, 20)
    with rejects("frames of the same size", "[(20, 30), (30, 20)]"):
        frames_of([upright, lying])


# ---- content that a conversion to RGB would lose --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_a_mode_without_transparency_is_converted_as_by_transformers(mode: str) -> None:
    image = noise(9, 7).convert(mode) if mode in ("1", "P") else noise(9, 7, mode)
    np.testing.assert_array_equal(pixels(image_of(image)), pixels(reference_load_image(image)))


FILES: dict[str, tuple[Image.Image, str]] = {
    "CMYK JPEG": (noise(9, 7, "CMYK"), "jpg"),
    "CMYK TIFF": (noise(9, 7, "CMYK"), "tiff"),
    "YCbCr TIFF": (noise(9, 7, "YCbCr"), "tiff"),
    "one bit": (noise(9, 7).convert("1"), "png"),
    "palette": (noise(9, 7).convert("P"), "png"),
    "GIF": (noise(9, 7).convert("P"), "gif"),
    "BMP": (noise(9, 7), "bmp"),
    "color profile": (noise(9, 7), "png"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_transparency_is_read_as_by_transformers(tmp_path: Path, name: str) -> None:
    image, suffix = FILES[name]
    path = saved(image, tmp_path / f"image.{suffix}")
    np.testing.assert_array_equal(pixels(image_of(path)), pixels(reference_load_image(str(path))))


def png(width: int, height: int, depth: int, *chunks: tuple[bytes, bytes], color_type: int = 2) -> bytes:
    """A PNG file with these chunks: a name and data; the color type 2 is RGB, 0 gray."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )


def test_a_png_with_16_bits_per_channel_keeps_the_upper_8(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (7, 9, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path = tmp_path / "deep.png"
    path.write_bytes(png(9, 7, 16, (b"IDAT", zlib.compress(rows))))
    np.testing.assert_array_equal(pixels(image_of(path)), values >> 8)


def grayscale(kind: type, top: int) -> Image.Image:
    return Image.fromarray(np.linspace(0, top, 63).reshape(7, 9).astype(kind))


DEEP: dict[str, tuple[Image.Image, str]] = {
    "16 bits PNG": (grayscale(np.uint16, 65535), "png"),
    "16 bits TIFF": (grayscale(np.uint16, 65535), "tiff"),
    "32 bits TIFF": (grayscale(np.int32, 2**31 - 1), "tiff"),
    "float TIFF": (grayscale(np.float32, 1), "tiff"),
    "16 bits PGM": (grayscale(np.uint16, 65535), "pgm"),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_per_channel_are_rejected_with_the_remedy(tmp_path: Path, name: str) -> None:
    image, suffix = DEEP[name]
    path = saved(image, tmp_path / f"deep.{suffix}")
    for source in (path, image):
        with rejects(
            f"has the mode {image.mode[0]}", "at most 8 bits per channel", "scale the values", start="image: "
        ):
            image_of(source)
    with rejects(start=f"video frame 1: '{path}' has the mode {image.mode[0]}"):
        frames_of([noise(9, 7), path])


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B", "I;16L", "LAB", "La"])
def test_a_mode_that_does_not_convert_is_rejected(mode: str) -> None:
    with rejects(f"has the mode {mode}: expected"):
        image_of(Image.new(mode, (4, 3)))


# ---- transparency ---------------------------------------------------------------------------------------------------


def drawing(mode: str) -> Image.Image:
    """A black cross, half of it opaque, on a transparent black background."""
    image = Image.new("LA", (24, 16))
    draw = ImageDraw.Draw(image)
    draw.line((2, 2, 22, 14), fill=(0, 255), width=3)
    draw.line((2, 14, 22, 2), fill=(0, 128), width=3)
    return (image.convert("RGBA") if mode == "RGBa" else image).convert(mode)


def on_white(image: Image.Image) -> np.ndarray:
    """An RGBA image as converted by qwen-vl-utils."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.int64)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    return (color * alpha + 255 * (255 - alpha) + 127) // 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_a_black_drawing_on_a_transparent_background_stays_visible(mode: str) -> None:
    found = pixels(image_of(drawing(mode)))
    assert np.unique(found).tolist() == [0, 127, 255]
    np.testing.assert_array_equal(found, on_white(drawing(mode)))
    assert not np.asarray(reference_load_image(drawing("RGBA"))).any(), "transformers makes it all black"


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_any_alpha_value_is_composited_on_white(tmp_path: Path, suffix: str) -> None:
    image = noise(33, 21, "RGBA")
    path = saved(image, tmp_path / f"image.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    expected = on_white(image)
    for found in (pixels(image_of(path)), pixels(image_of(image))):
        assert np.abs(found.astype(int) - expected).max() <= 1  # rounding differs
        np.testing.assert_array_equal(found, pasted_on_white(image))


def pasted_on_white(image: Image.Image) -> np.ndarray:
    """Bit-identical to qwen-vl-utils."""
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.split()[3])
    return np.asarray(white)


def with_transparent_color(mode: str, path: Path) -> Path:
    """A PNG or GIF file in which one color (index 0, or black) is transparent."""
    ground: Any = {"P": 0, "L": 0, "1": 0, "RGB": (0, 0, 0)}[mode]
    drawn: Any = {"P": 1, "L": 9, "1": 1, "RGB": (9, 9, 9)}[mode]
    image = Image.new(mode, (8, 6), ground)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.paste(drawn, (2, 2, 5, 4))
    return saved(image, path, transparency=ground)


@pytest.mark.parametrize(("mode", "suffix"), [("P", "png"), ("P", "gif"), ("L", "png"), ("1", "png"), ("RGB", "png")])
def test_the_transparent_color_of_a_file_becomes_white(tmp_path: Path, mode: str, suffix: str) -> None:
    found = pixels(image_of(with_transparent_color(mode, tmp_path / f"image.{suffix}")))
    inside = np.zeros((6, 8), dtype=bool)
    inside[2:4, 2:5] = True
    assert np.unique(found[~inside]).tolist() == [255]
    assert np.unique(found[inside]).tolist() == [255 if mode == "1" else 9]


def png_row(bits: int, values: Sequence[int], transparent: Sequence[int]) -> bytes:
    """A PNG file of one row of gray or RGB values, and the one that is transparent."""
    row = "".join(f"{value:0{bits}b}" for value in values)
    row += "0" * (-len(row) % 8)
    pixels = zlib.compress(b"\0" + int(row, 2).to_bytes(len(row) // 8))
    chunks = (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)), (b"IDAT", pixels)
    return png(len(values) // len(transparent), 1, bits, *chunks, color_type=2 if len(transparent) == 3 else 0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_gray_is_that_of_the_file(bits: int) -> None:
    """Of every number of bits, each gray by itself."""
    top = 2**bits - 1
    for transparent in range(top + 1):
        found = pixels(image_of(png_row(bits, range(top + 1), [transparent])))
        expected = [255 if value == transparent else value * 255 // top for value in range(top + 1)]
        assert found[0, :, 0].tolist() == expected, transparent


def test_a_pil_image_has_the_same_transparency_at_every_read() -> None:
    with Image.open(io.BytesIO(png_row(4, [0, 5, 10, 15], [5]))) as image:
        for _ in range(3):
            assert pixels(image_of(image))[0, :, 0].tolist() == [0, 255, 170, 255]
    # What comes after the pixels is read for the orientation, and decodes the image.
    late = png_row(2, [0, 1, 2, 3], [1])[:-12] + png(1, 1, 8, (b"tEXt", b"a\0b"))[33:]
    with Image.open(io.BytesIO(late)) as image:
        assert size_of(image) == (4, 1)
        assert pixels(image_of(image))[0, :, 0].tolist() == [0, 255, 170, 255]
    with Image.open(io.BytesIO(png_row(16, [1, 2, 3], [256, 2, 3]))) as image:
        image.load()
        with rejects("has a transparent color of 16 bits per channel"):
            image_of(image)


def test_the_transparent_color_is_that_of_the_file() -> None:
    """With 16 bits it cannot be told from others, whose lower 8 bits are lost."""
    colors = [1, 2, 3, 1, 2, 4]
    for red in (1, 257):  # of which the lower 8 bits count
        assert pixels(image_of(png_row(8, colors, [red, 2, 3]))).tolist() == [[[255, 255, 255], [1, 2, 4]]]
    for transparent in ([256, 512, 768], [0, 0, 0]):
        with rejects("has a transparent color of 16 bits per channel", "save the image with 8 bits"):
            image_of(png_row(16, colors, transparent))


def test_a_palette_with_alpha_is_composited() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 0, 10, 20, 30, 255], "RGBA")
    image.putpixel((0, 0), 0)
    found = pixels(image_of(image))
    assert (found[0, 0].tolist(), found[1, 1].tolist()) == ([255] * 3, [10, 20, 30])


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    image = noise(9, 7)
    np.testing.assert_array_equal(pixels(image_of(image.convert("RGBA"))), pixels(image))


def test_transparency_is_rotated_with_the_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = saved(drawing("RGBA"), tmp_path / "drawing.png", exif=exif)
    np.testing.assert_array_equal(pixels(image_of(path)), np.rot90(pixels(image_of(drawing("RGBA"))), -1))


# ---- several images in a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_a_file_of_several_frames_is_rejected(tmp_path: Path, suffix: str) -> None:
    frames = [noise(9, 7, seed=seed) for seed in range(3)]
    path = saved(frames[0], tmp_path / f"several.{suffix}", save_all=True, append_images=frames[1:])
    with rejects(f"several.{suffix}' has 3 frames or pages", "pass them as a video"):
        image_of(path)
    with Image.open(path) as opened:
        with rejects("PIL image 9 x 7", "has 3 frames or pages"):
            image_of(opened)
        opened.seek(2)
        chosen = opened.copy()
        np.testing.assert_array_equal(pixels(image_of(chosen)), np.asarray(chosen.convert("RGB")))


def test_the_main_photo_of_an_mpo_file_is_read(tmp_path: Path) -> None:
    path = saved(noise(16, 16), tmp_path / "phone.mpo", save_all=True, append_images=[noise(16, 16, seed=1)])
    with Image.open(path) as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
    np.testing.assert_array_equal(pixels(image_of(path)), pixels(reference_load_image(str(path))))


# ---- files that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_rejected(size: tuple[int, int]) -> None:
    with rejects("has no pixels", start="image: PIL image"):
        image_of(Image.new("RGB", size))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_above_the_limit_is_rejected_and_pillow_keeps_its_own_limit(tmp_path: Path) -> None:
    path = saved(noise(30, 20), tmp_path / "image.png")
    before = Image.MAX_IMAGE_PIXELS
    assert image_of(path, MediaOptions(max_image_pixels=600)).size == (30, 20)
    for limit in (599, 299, 1):  # Pillow itself rejects above twice its limit
        options = MediaOptions(max_image_pixels=limit)
        with rejects(f"expected at most {limit} pixels", start=f"image: '{path}' is too large"):
            image_of(path, options)
        with rejects(start=f"video frame 1: '{path}' is too large"):
            load_video({"video": [noise(1, 1), path], "fps": 2}, options)
        assert before == Image.MAX_IMAGE_PIXELS
    with rejects("max_image_pixels", "found 0"):
        MediaOptions(max_image_pixels=0)


def bmp_header(path: Path, width: int, height: int) -> Path:
    """A BMP file whose header declares many pixels, without pixel data."""
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    path.write_bytes(header + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0))
    return path


@pytest.mark.filterwarnings("error")
def test_the_default_limit_is_that_of_pillow_without_its_warning(tmp_path: Path) -> None:
    limit = MediaOptions().max_image_pixels
    assert limit == 2 * Image.MAX_IMAGE_PIXELS
    with rejects("is too large", f"at most {limit} pixels"):
        image_of(bmp_header(tmp_path / "bomb.bmp", 20_000, 10_000))
    with rejects("cannot be decoded"):
        image_of(bmp_header(tmp_path / "below.bmp", 1_000_000, 100))  # 100 megapixels, above Pillow's warning threshold


def test_a_limit_above_that_of_pillow_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert image_of(saved(noise(30, 20), tmp_path / "image.png")).size == (30, 20)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tiff"])
def test_a_truncated_file_is_rejected_also_with_pillows_tolerant_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    whole = saved(noise(64, 48), tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for tolerant in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
        for share in (0.05, 0.5, 0.9):
            path.write_bytes(whole[: int(share * len(whole))])
            with rejects(start=f"image: '{path}' cannot be decoded as an image"):
                image_of(path)
        assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES


def corrupt(whole: bytes, draw: random.Random) -> bytes:
    """The bytes truncated, or some of them changed, most often in the header."""
    data = bytearray(whole)
    if draw.random() < 0.2:
        return bytes(data[: draw.randrange(len(data))])
    end = min(len(data), draw.choice([40, 200, len(data)]))
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(end)] = draw.randrange(256)
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about some of the corruption that it tolerates
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tiff", "ico", "ppm", "tga", "jp2"])
def test_a_corrupt_file_is_read_or_rejected_by_name(tmp_path: Path, suffix: str) -> None:
    image = noise(12, 10, seed=1).convert("P" if suffix == "gif" else "RGB")
    whole = saved(image, tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"corrupt.{suffix}"
    options, draw, rejected = MediaOptions(max_image_pixels=20_000), random.Random(suffix), []
    for _ in range(100):
        path.write_bytes(corrupt(whole, draw))
        try:
            found = image_of(path, options)
        except VLBridgeError as error:
            rejected.append(str(error))
        else:
            assert found.mode == "RGB"
            assert 0 < found.width * found.height <= options.max_image_pixels
    assert rejected
    for message in rejected:
        assert message.startswith(f"image: '{path}' "), message


ROWS = zlib.compress(b"".join(b"\0" + bytes(range(36)) for _ in range(10)))
RAW = {
    "SyntaxError": png(12, 10, 8, (b"IDAT", ROWS[:20]), (b"(\xbeT1", b""), (b"IDAT", ROWS[20:])),
    "ValueError": b"P6 k5 10 255\n",
    "UnidentifiedImageError": b"",
    "OSError": struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack("<I", 40) + b"\xff" * 36,
}


@pytest.mark.parametrize("name", RAW)
def test_the_error_of_pillow_is_in_the_message(tmp_path: Path, name: str) -> None:
    path = tmp_path / "raw.png"
    path.write_bytes(RAW[name])
    with rejects(f"({name}: ", start=f"image: '{path}' cannot be decoded as an image"):
        image_of(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere.png", tmp_path / "folder", saved(noise(4, 4), tmp_path / "a.png") / "b.png"):
        with rejects(start=f"image: no file '{path}'"):
            image_of(path)
    for path in ("a\0b.png", "x" * 5000):
        with pytest.raises(
            VLBridgeError, match=r"^image: '.{1,400} cannot be read \((embedded null|File name too long)"
        ):
            image_of(path)


def test_a_pil_image_whose_file_was_closed_is_rejected(tmp_path: Path) -> None:
    with Image.open(saved(noise(4, 4), tmp_path / "gone.png")) as image:
        pass
    with rejects("gone.png cannot be decoded", start="image: PIL image 4 x 4"):
        image_of(image)


# ---- sources that are not files -------------------------------------------------------------------------------------

URLS = [
    "http://host/a.png",
    "HTTPS://host/a.png",
    "data:image/png;base64,iVBORw0KGgo=",
    "file:///tmp/a.png",
    "file:a.png",
    "s3://bucket/a.png",
    "gs://bucket/a.png",
]


@pytest.mark.parametrize("source", [None, [], 3, {"path": "a.mp4"}])
def test_what_is_no_video_is_named(source: Any) -> None:
    """With and without the `fps` that frames need."""
    processor = build_processor(["seven"], patch_size=16, merge_size=2, min_pixels=1024, max_pixels=65536)
    for part in ({"type": "video", "video": source}, {"type": "video", "video": source, "fps": 2}):
        with rejects("video: expected a file or frames under the key 'video'"):
            load_video(part)
        with rejects("video: expected a file or frames under the key 'video'"):
            media_shape(part, processor)


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_not_supported(tmp_path: Path, url: str) -> None:
    with rejects("download it first", start=f"image: '{url}' is a URL"):
        image_of(url)
    with rejects(start=f"video frame 1: '{url}' is a URL"):
        frames_of([noise(4, 4), url])
    for part in ({"video": url, "fps": 2}, {"video": url}):
        with rejects("download it first", start=f"video: str '{url}' is a URL"):
            load_video(part)
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"messages": [{{"role": "user", "content": [{{"type": "image", "image": "{url}"}}]}}]}}\n')
    [[message]] = read_conversations(path)
    assert message["content"][0]["image"] == url  # not resolved as a path


@pytest.mark.parametrize("name", ["a:b.png", "c-12:30.png", "http.png", "data.png"])
def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(noise(4, 4), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert image_of(name).size == (4, 4)


def test_the_bytes_of_a_file_are_read_as_the_file(tmp_path: Path) -> None:
    path = saved(noise(6, 4), tmp_path / "a.png")
    content = path.read_bytes()
    assert np.array_equal(np.array(image_of(content)), np.array(image_of(str(path))))
    assert torch.equal(frames_of([content, content]), frames_of([str(path)] * 2))
    with rejects("cannot be decoded as an image", start=f"image: {len(content) - 30} bytes, b'\\x89PNG"):
        image_of(content[:-30])


@pytest.mark.parametrize("source", [None, 3, bytearray(b"bytes"), np.zeros((4, 4, 3), dtype=np.uint8)], ids=type)
def test_another_type_is_rejected_with_the_name_of_the_part(source: Any) -> None:
    with rejects("under the key 'image'", start="image: expected a path or a PIL image"):
        image_of(source)
    with rejects(start="video frame 0: expected a path or a PIL image"):
        frames_of([source])


@pytest.mark.parametrize("fps", [None, 0, -1, float("nan"), float("inf"), True, "2"])
def test_a_frame_rate_that_is_not_a_positive_number_is_rejected(fps: Any) -> None:
    with rejects("under the key 'fps'", "a positive number"):
        load_video({"video": [noise(4, 4)] * 2, "fps": fps})


@pytest.mark.parametrize("fps", [2, 0.5, np.int64(2), np.float32(29.97)])
def test_the_timestamp_of_a_frame_is_its_index_divided_by_the_rate(fps: Any) -> None:
    metadata = load_video({"video": [noise(4, 4)] * 3, "fps": fps}).metadata
    assert (metadata.fps, metadata.frames_indices, metadata.total_num_frames) == (float(fps), [0, 1, 2], 3)
    assert metadata.duration == 3 / float(fps)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 4, 4, 3), (3, 4, 4)])
def test_a_tensor_that_is_not_a_video_is_rejected(shape: tuple[int, ...]) -> None:
    with rejects("expected frames uint8 [F, 3, H, W]"):
        load_video({"video": torch.zeros(shape, dtype=torch.uint8), "fps": 2})


# ---- Pillow's settings are global -----------------------------------------------------------------------------------


def test_threads_with_different_limits_restore_the_limit_of_pillow() -> None:
    before = Image.MAX_IMAGE_PIXELS
    data = io.BytesIO()
    noise(64, 48).save(data, format="PNG")
    errors: list[Exception] = []

    def read(limit: int) -> None:
        for _ in range(50):
            try:
                with Image.open(io.BytesIO(data.getvalue())) as opened:
                    image_of(opened, MediaOptions(max_image_pixels=limit))
            except VLBridgeError as error:
                errors.append(error)

    threads = [threading.Thread(target=read, args=(limit,)) for limit in (10_000, 20_000, 30_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert before == Image.MAX_IMAGE_PIXELS


FORK = """
import os, signal, threading, time
from PIL import Image
from megatron_vlbridge.data.images import MediaOptions, read_image

class Slow(Image.Image):
    def load(self):
        reading.set()
        time.sleep(0.3)
        return super().load()

reading = threading.Event()
image = Image.new("RGB", (4, 4))
slow = Slow()
slow._im, slow._mode, slow._size = image.im, image.mode, image.size
reader = threading.Thread(target=read_image, args=(slow, "image", MediaOptions()))
reader.start()
reading.wait()
child = os.fork()
if child == 0:
    signal.alarm(10)
    read_image(image, "image", MediaOptions())
    os._exit(0)
reader.join()
raise SystemExit(os.waitpid(child, 0)[1])
"""


def test_a_child_forked_while_another_thread_reads_can_read() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, cwd=ROOT, timeout=60)
