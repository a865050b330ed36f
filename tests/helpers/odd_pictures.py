"""Pictures as users have them: odd ones, each with its right pixels, and files that are not pictures."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vqa_embeddings.app.demo import DATA

CAT = np.asarray(Image.open(DATA / "cat.jpg").convert("RGB"))[:96, :128]
GREY = CAT.mean(axis=2).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(stream, kind, **settings)
    return stream.getvalue()


def seen(data: bytes) -> np.ndarray:
    """The pixels of a lossy file, as its plain decoder gives them."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, valid or not."""
    made = b"".join(
        struct.pack("!I", len(data)) + name + data + struct.pack("!I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + made


def odd() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files that are pictures, by name, with their pixels as uint8 `[height, width, 3]`."""
    jpeg = encoded(CAT, "JPEG", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    rgba = np.dstack([CAT, np.full(CAT.shape[:2], 7, np.uint8)])
    palette = Image.fromarray(CAT).quantize(16)
    deep = (GREY.astype(np.uint16) << 8) | 0x5A
    cmyk = Image.fromarray(CAT).convert("CMYK")
    other = Image.fromarray(CAT[::-1].copy())
    frames = [Image.fromarray(CAT).quantize(16), other.quantize(16)]
    bits = Image.fromarray(np.where(GREY > 99, np.uint8(255), np.uint8(0))).convert("1", dither=Image.Dither.NONE)
    progressive = encoded(CAT, "JPEG", quality=90, progressive=True)
    huge = np.zeros((6000, 8000, 3), np.uint8)
    huge[:3000] = 200
    return {
        "cmyk.tif": (encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        "palette.png": (encoded(palette, "PNG", transparency=3), np.asarray(palette.convert("RGB"))),
        "palette_bytes.png": (
            encoded(palette, "PNG", transparency=bytes(range(16))),
            np.asarray(palette.convert("RGB")),
        ),
        "one_bit.png": (encoded(bits, "PNG"), three(np.where(GREY > 99, np.uint8(255), np.uint8(0)))),
        "sixteen_bits.png": (encoded(deep, "PNG"), three(GREY)),
        "sixteen_bits.tif": (encoded(deep, "TIFF"), three(GREY)),
        "rgba.png": (encoded(rgba, "PNG"), CAT),
        "rgba.webp": (encoded(rgba, "WEBP", lossless=True, exact=True), CAT),
        "grey_alpha.png": (encoded(Image.fromarray(GREY).convert("LA"), "PNG"), three(GREY)),
        "animated.gif": (
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            np.asarray(frames[0].convert("RGB")),
        ),
        "animated.webp": (encoded(CAT, "WEBP", save_all=True, append_images=[other], lossless=True), CAT),
        "turned.png": (encoded(CAT, "PNG", exif=turned), np.rot90(CAT, -1)),
        "progressive.jpg": (progressive, seen(progressive)),
        "huge.jpg": (encoded(huge, "JPEG"), seen(encoded(huge, "JPEG"))),
        "broken_profile.png": (encoded(CAT, "PNG", icc_profile=b"no profile"), CAT),
        "broken_exif.jpg": (encoded(CAT, "JPEG", quality=90, exif=b"Exif\0\0MM\0*\0\0\xff\xff"), seen(jpeg)),
        "one_pixel.png": (encoded(CAT[:1, :1], "PNG"), CAT[:1, :1]),
        "bitmap.bmp": (encoded(CAT, "BMP"), CAT),
        "a name with spaces.png": (encoded(CAT, "PNG"), CAT),
        "größe 图片 🐈.png": (encoded(CAT, "PNG"), CAT),
        "deep/er/folder.png": (encoded(CAT, "PNG"), CAT),
        "no suffix": (jpeg, seen(jpeg)),
        "wrong_suffix.gif": (jpeg, seen(jpeg)),
    }


def bad() -> dict[str, tuple[bytes | Callable[[Path], object], str]]:
    """Names that are not pictures: the file's content, or what makes the file, and the expected error."""
    jpeg, lossless = encoded(CAT, "JPEG"), encoded(CAT, "PNG")
    gif, webp, tiff = encoded(GREY, "GIF"), encoded(CAT, "WEBP"), encoded(CAT, "TIFF", compression="tiff_deflate")
    noise = random.Random(5).randbytes(4000)
    header = struct.pack("!IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    deflated = zlib.compress(bytes(100_000_000), 9)
    half = {
        f"half.{name}": data[: len(data) // 2]
        for name, data in [("jpg", jpeg), ("png", lossless), ("gif", gif), ("webp", webp), ("tif", tiff)]
    }
    unreadable = {
        **half,
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "magic.jpg": b"\xff\xd8\xff\xe0",
        "magic.png": b"\x89PNG\r\n\x1a\n",
        "magic.gif": b"GIF89a",
        "magic.webp": b"RIFF\0\0\0\0WEBP",
        "magic.tif": b"II*\0\x08\0\0\0",
        "magic.bmp": b"BM",
        "layers.psd": b"8BPS\0\1" + bytes(20),
        "film.mp4": b"\0\0\0\x18ftypmp42" + bytes(40),
        "text.jpg": b"no picture",
        "not_found.html.jpg": b"<!DOCTYPE html><title>404 Not Found</title>",
        "noise.jpg": noise,
        "noise_behind_magic.jpg": b"\xff\xd8\xff" + noise,
        "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file closefile\n",
        "paper.pdf": b"%PDF-1.4\n%%EOF\n",
        "archive.zip": b"PK\x03\x04" + bytes(100),
        "pickle.jpg": b"cos\nsystem\n(S'touch ran_code'\ntR.",
        "floats.tif": encoded(CAT[..., 0].astype(np.float32) / 255, "TIFF"),
        "whole_numbers.tif": encoded(CAT[..., 0].astype(np.int32) << 16, "TIFF"),
        "bomb.png": png((b"IHDR", header), (b"IDAT", deflated), (b"IEND", b"")),
        "text_bomb.png": png(
            (b"IHDR", struct.pack("!IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), (b"zTXt", b"k\0\0" + deflated), (b"IEND", b"")
        ),
        "no_pixels.png": png((b"IHDR", struct.pack("!IIBBBBB", 0, 0, 8, 2, 0, 0, 0)), (b"IEND", b"")),
        "no_data.png": png((b"IHDR", struct.pack("!IIBBBBB", 9, 9, 8, 2, 0, 0, 0)), (b"IEND", b"")),
        "wrong_sum.png": lossless[:60] + bytes([lossless[60] ^ 1]) + lossless[61:],
        "strip.png": encoded(np.zeros((2, 4000, 3), np.uint8), "PNG"),
        "column.png": encoded(np.zeros((9000, 1), np.uint8), "PNG"),
        "crash.jpg": jpeg + b"crash",  # behind the picture; only the decoder that the test patches reads it
        "hang.jpg": jpeg + b"hang",
    }
    absent: dict[str, Callable[[Path], object] | None] = {
        "missing.jpg": None,
        "no/such/folder.jpg": None,
        "long" * 80 + ".jpg": None,
        "": None,
        "  ": None,
        ".": None,
        "folder.jpg": Path.mkdir,
        "dangling.jpg": lambda path: path.symlink_to("nowhere.jpg"),
        "round.jpg": lambda path: path.symlink_to(path.name),
        "pipe.jpg": os.mkfifo,
        "device.jpg": lambda path: path.symlink_to("/dev/zero"),
        "text.jpg/below.jpg": None,
    }
    outside = ["../secret.jpg", "a/../../secret.jpg", "/etc/hostname", ".."]
    return {
        **{name: (data, "PictureUnreadable") for name, data in unreadable.items()},
        **{name: (lay or (lambda path: None), "PictureNotFound") for name, lay in absent.items()},
        **{name: (lambda path: None, "PictureOutsideFolder") for name in outside},
    }


def lay(folder: Path, name: str, content: bytes | Callable[[Path], object]) -> None:
    """Put a picture, or what is not one, into the folder."""
    path = folder / name
    if isinstance(content, bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    else:
        content(path)
