"""Read an image file or a PIL image as RGB. Images that would lose content in the conversion are rejected."""

import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO, cast

from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from megatron_vlbridge.errors import VLBridgeError

# At most 8 bits per channel. `convert("RGB")` clips or rejects other modes (I, F, I;16, ...).
MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa"})
# Further frames of these formats are not separate images: other views or a depth map of the photo, or layers.
FIRST_FRAME_FORMATS = ("MPO", "PSD")
WHITE = (255, 255, 255)
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Chunks of a PNG file that can hold an EXIF orientation.
PNG_TEXT = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
# How Pillow names what is in PNG files, and its bits per channel. It scales values to 255, but not the transparent
# color, which has 16 bits of which the lower ones count.
PNG_BITS = {"L;2": 2, "L;4": 4, "L": 8, "RGB": 8}
URL = re.compile(r"(data|file):|[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_ORIENTATION = ExifTags.Base.Orientation
_settings_lock = Lock()
# Otherwise a child forked while another thread holds the lock would deadlock.
os.register_at_fork(
    before=_settings_lock.acquire, after_in_parent=_settings_lock.release, after_in_child=_settings_lock.release
)


@dataclass(frozen=True)
class MediaOptions:
    """How images and videos are read and resized.

    Images and frames of more than `max_image_pixels` are rejected before they are decoded (default: Pillow's limit).
    The others are settings of the processor, by default its own: `min_pixels` and `max_pixels` of images, and those of
    videos, of which `video_fps` and the limits of frames are for video files. A part can have its own values.
    Sources that are URLs of http or https are fetched into the folder `url_cache` (see `url_cache.fetch`); without one
    they are rejected.
    """

    max_image_pixels: int = 178_956_970
    min_pixels: int | None = None
    max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    video_total_pixels: int | None = None
    video_fps: float | None = None
    video_min_frames: int | None = None
    video_max_frames: int | None = None
    url_cache: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "url_cache" and value is not None and not 0 < value < math.inf:
                raise VLBridgeError(f"{field.name}: expected a positive number, found {value}")
        for kind in ("{}_pixels", "video_{}_pixels", "video_{}_frames"):
            low, high = (getattr(self, kind.format(end)) for end in ("min", "max"))
            if low is not None and high is not None and low > high:
                raise VLBridgeError(f"{kind.format('min')}: expected at most {kind.format('max')} {high}, found {low}")


def is_url(source: object) -> bool:
    """Whether a source is a URL (`http:`, `https:`, `data:`, `file:`, `s3:`, ...), which `read_image` rejects."""
    return isinstance(source, str) and URL.match(source) is not None


def is_image_file(path: Path) -> bool:
    """Whether a file is an image in a format that Pillow knows; it may still be damaged, or too large."""
    try:
        with Image.open(path):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # noqa: BLE001  `read_image` names it
        return True


def read_image(source: str | Path | bytes | Image.Image, name: str, options: MediaOptions) -> Image.Image:
    """Read a file, its bytes or a PIL image as RGB, with EXIF orientation applied and transparency on white.

    `name` describes the image in errors ("image", "video frame 3").

    Raises VLBridgeError: the source is a URL; the file does not exist; it cannot be decoded completely; it has no
    pixels, more than `max_image_pixels`, more than 8 bits per channel, or several frames.
    Example: `read_image(Image.new("LA", (4, 2), (0, 128)), "image", MediaOptions()).getpixel((0, 0))` is
    `(127, 127, 127)`.
    """
    return _read(source, name, options, _to_rgb)


def read_image_size(source: str | Path | bytes | Image.Image, name: str, options: MediaOptions) -> tuple[int, int]:
    """The width and height of `read_image(...)`, from the header: the pixels are not decoded.

    Raises VLBridgeError: as `read_image`, except for what only decoding shows (a truncated file, a mode).
    Example: `read_image_size(Image.new("RGB", (4, 2)), "image", MediaOptions())` is `(4, 2)`.
    """
    return _read(source, name, options, _upright_size)


def _read[T](
    source: str | Path | bytes | Image.Image, name: str, options: MediaOptions, read: Callable[[Image.Image, int], T]
) -> T:
    """Open a file or PIL image and `read` it, with errors that name it."""
    where = f"{name}: {_shown(source)}"
    if is_url(source):
        raise VLBridgeError(
            f"{where} is a URL, which is not supported; download it first and pass the path of the file, or give "
            "--url-cache DIR, into which http and https URLs are fetched"
        )
    try:
        with _pillow_settings(options.max_image_pixels):
            if isinstance(source, TiffImagePlugin.TiffImageFile) and source.tile and source.filename:
                source = Path(os.fsdecode(source.filename))  # opened by path, and not loaded yet
            if isinstance(source, Image.Image):
                return read(source, options.max_image_pixels)
            # Given a path, Pillow 13 memory-maps an uncompressed TIFF and scrambles it if it has to be rotated.
            with _opened(source) as file, Image.open(file) as opened:
                return read(opened, options.max_image_pixels)
    except VLBridgeError as error:
        raise VLBridgeError(f"{where} {error}") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise VLBridgeError(f"{name}: no file {_shown(source)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise VLBridgeError(f"{where} {_too_large(options.max_image_pixels, str(error))}") from error
    except Exception as error:
        # On a corrupt file Pillow's decoders raise errors of any type, some with the address of an object.
        text = re.sub(" object at 0x[0-9a-f]+", "", str(error))
        raise VLBridgeError(f"{where} cannot be decoded as an image ({type(error).__name__}: {text})") from error


def _opened(source: str | Path | bytes) -> BinaryIO:
    try:
        return BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise VLBridgeError(f"cannot be read ({getattr(error, 'strerror', error)})") from error


def _to_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    _check_header(image, max_pixels)
    _load(image)
    if image.mode not in MODES:
        raise VLBridgeError(
            f"has the mode {image.mode}: expected at most 8 bits per channel, in a mode that Pillow converts to RGB; "
            "scale the values to 0..255 (others would be clipped) and save the image as 8-bit grayscale or RGB"
        )
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        rgba, white = upright.convert("RGBA"), Image.new("RGB", upright.size, WHITE)
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _load(image: Image.Image) -> None:
    """Decode an image, with a transparent color that is scaled as its pixels are; it stays so at later reads.

    Of a PNG file that its owner has decoded before, the number of bits is not known any more.
    """
    packing = str(image.tile[0].args) if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else ""
    image.load()
    color = image.info.get("transparency")
    if packing in PNG_BITS:
        top = 2 ** PNG_BITS[packing] - 1
        if isinstance(color, int):
            image.info["transparency"] = (color & top) * 255 // top
        elif isinstance(color, tuple):
            image.info["transparency"] = tuple(value & top for value in color)
    elif isinstance(color, tuple) and (packing == "RGB;16B" or max(color) > 255):
        raise VLBridgeError(
            "has a transparent color of 16 bits per channel, but its pixels are read with 8; save the image with 8 "
            "bits per channel, or with an alpha channel"
        )


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise VLBridgeError(_too_large(max_pixels, f"{width} x {height}"))
    if width * height == 0:
        raise VLBridgeError(f"has no pixels ({width} x {height})")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in FIRST_FRAME_FORMATS:
        raise VLBridgeError(
            f"has {frames} frames or pages, of which only one would be used: pass them as a video or as several "
            "images, or save the intended one to a separate file"
        )


def _upright_size(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    _check_header(image, max_pixels)
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile and _ORIENTATION in image.tag_v2:
        # Whether `size` is swapped already depends on the version of Pillow.
        width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    return (height, width) if _orientation(image) in SWAPPED else (width, height)


def _orientation(image: Image.Image) -> int:
    if not (isinstance(image, PngImagePlugin.PngImageFile) and image.tile):
        return image.getexif().get(_ORIENTATION, 1)
    if _has_text_after_pixels(image):
        _load(image)
    # Its own `getexif` decodes the image to find such chunks.
    return super(PngImagePlugin.PngImageFile, image).getexif().get(_ORIENTATION, 1)


def _has_text_after_pixels(image: PngImagePlugin.PngImageFile) -> bool:
    """Whether chunks after the pixels of a PNG file can hold an EXIF orientation."""
    file, after = cast(BinaryIO, image.fp), False
    start = file.tell()
    file.seek(8)  # the signature
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        after |= kind == b"IDAT"
        if after and kind in PNG_TEXT:
            break
        file.seek(length + 4, os.SEEK_CUR)  # data and checksum
    file.seek(start)
    return len(head) == 8


def _too_large(max_pixels: int, found: str) -> str:
    return f"is too large: expected at most {max_pixels} pixels (max_image_pixels), found {found}"


@contextmanager
def _pillow_settings(max_pixels: int) -> Iterator[None]:
    """Set Pillow's global settings while reading: our pixel limit, and an error for a truncated file."""
    with _settings_lock:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _shown(source: str | Path | bytes | Image.Image) -> str:
    if isinstance(source, Image.Image):
        return f"PIL image {source.width} x {source.height} {getattr(source, 'filename', '')!s}".strip()
    if isinstance(source, bytes):
        return f"{len(source)} bytes, {source[:16]!r}..."
    text = str(source)
    return repr(text if len(text) <= 300 else f"{text[:300]}...")
