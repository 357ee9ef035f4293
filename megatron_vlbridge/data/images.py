"""An image file or a PIL image as RGB. What would lose content on the way is rejected."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from megatron_vlbridge.errors import VLBridgeError

# They have at most 8 bits a channel. Others (I, F, I;16, ...) are clipped by `convert("RGB")`, or it rejects them.
MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa"})
# What follows the first frame of these is no image of its own: other views or a depth map of the photo, the layers.
FORMATS_SHOWN_BY_THE_FIRST_FRAME = ("MPO", "PSD")
WHITE = (255, 255, 255)
URL = re.compile(r"(data|file):|[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_settings_lock = Lock()
# A child forked while another thread holds the lock would wait for it forever.
os.register_at_fork(
    before=_settings_lock.acquire, after_in_parent=_settings_lock.release, after_in_child=_settings_lock.release
)


@dataclass(frozen=True)
class MediaOptions:
    """How images and frames are read.

    Attributes:
        max_image_pixels: a larger image is rejected before it is decoded. The default is Pillow's.
    """

    max_image_pixels: int = 178_956_970

    def __post_init__(self) -> None:
        if self.max_image_pixels < 1:
            raise VLBridgeError(f"max_image_pixels: expected a positive number, found {self.max_image_pixels}")


def is_url(source: object) -> bool:
    """Whether a source is a URL (`http:`, `https:`, `data:`, `file:`, `s3:`, ...), which `read_image` rejects."""
    return isinstance(source, str) and URL.match(source) is not None


def read_image(source: str | Path | Image.Image, name: str, options: MediaOptions) -> Image.Image:
    """The RGB image of a file or a PIL image, upright (EXIF orientation applied), transparency composited on white.

    `name` says what the image is in an error ("image", "video frame 3").

    Raises:
        VLBridgeError: the source is a URL; there is no such file; it cannot be decoded, or not completely; it has no
        pixels, more than `max_image_pixels`, more than 8 bits a channel, or several frames.

    Example:
        >>> read_image(Image.new("LA", (4, 2), (0, 128)), "image", MediaOptions()).getpixel((0, 0))
        (127, 127, 127)
    """
    where = f"{name}: {_shown(source)}"
    if is_url(source):
        raise VLBridgeError(
            f"{where} is a URL, which is not supported; download it first and give the path of the file"
        )
    try:
        with _pillow_settings(options.max_image_pixels):
            source = _by_path_if_lazy_tiff(source)
            if isinstance(source, Image.Image):
                return _to_rgb(source, options.max_image_pixels)
            # Given the path, Pillow 13 maps an uncompressed TIFF, and scrambles it if it has to be turned.
            with Path(source).open("rb") as file, Image.open(file) as opened:
                return _to_rgb(opened, options.max_image_pixels)
    except VLBridgeError as error:
        raise VLBridgeError(f"{where} {error}") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise VLBridgeError(f"{name}: no file {_shown(source)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise VLBridgeError(f"{where} {_too_large(options.max_image_pixels, str(error))}") from error
    except Exception as error:
        # On a damaged file Pillow's decoders raise errors of any type.
        raise VLBridgeError(f"{where} cannot be decoded as an image ({type(error).__name__}: {error})") from error


def _by_path_if_lazy_tiff(source: str | Path | Image.Image) -> str | Path | Image.Image:
    """The path in place of a TIFF image that was opened by it and is not loaded yet."""
    if isinstance(source, TiffImagePlugin.TiffImageFile) and source.tile and source.filename:
        return Path(os.fsdecode(source.filename))
    return source


def _to_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise VLBridgeError(_too_large(max_pixels, f"{width} x {height}"))
    if width * height == 0:
        raise VLBridgeError(f"has no pixels ({width} x {height})")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in FORMATS_SHOWN_BY_THE_FIRST_FRAME:
        raise VLBridgeError(
            f"has {frames} frames or pages, of which an image would keep one: give them as a video or as several "
            "images, or save the one that is meant as a file of its own"
        )
    image.load()
    if image.mode not in MODES:
        raise VLBridgeError(
            f"has the mode {image.mode}: expected an image of at most 8 bits a channel that Pillow converts to RGB; "
            "scale its values to 0..255 (others would be clipped) and save it as 8-bit greyscale or RGB"
        )
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        return _on_white(upright.convert("RGBA"))
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _on_white(rgba: Image.Image) -> Image.Image:
    white = Image.new("RGB", rgba.size, WHITE)
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _too_large(max_pixels: int, found: str) -> str:
    return f"is too large: expected at most {max_pixels} pixels (max_image_pixels), found {found}"


@contextmanager
def _pillow_settings(max_pixels: int) -> Iterator[None]:
    """Pillow's settings, which are global: the limit of pixels is ours, and a truncated file is an error."""
    with _settings_lock:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _shown(source: str | Path | Image.Image) -> str:
    if isinstance(source, Image.Image):
        return f"PIL image {source.width} x {source.height} {getattr(source, 'filename', '')!s}".strip()
    text = str(source)
    return repr(text if len(text) <= 300 else f"{text[:300]}...")
