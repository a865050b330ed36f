"""Files that are not pictures of a format that is read: what they are instead, by their magic numbers."""

from __future__ import annotations

HEAD = 1024  # bytes in which the text of a page is searched
CONVERT = "convert it to JPEG or PNG"
AGAIN = "fetch the picture again"

# What a file begins with, and what it then is. If several match, the first counts.
MAGIC_NUMBERS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    (b"II\xbc", "a JPEG XR picture"),
    (b"MM\0\x2b", "a BigTIFF whose numbers begin with the higher byte"),
    (b"8BPS", "a Photoshop document"),
    (b"gimp xcf", "a GIMP document"),
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript document"),
    (b"AT&TFORM", "a DjVu document"),
    (b"P7", "a PAM picture"),
    (b"PF", "a PFM picture, whose pixels are floats"),
    (b"Pf", "a PFM picture, whose pixels are floats"),
    (b"v/1\x01", "an OpenEXR picture, whose pixels are floats"),
    (b"#?RADIANCE", "a Radiance picture, whose pixels are floats"),
    (b"SIMPLE  =", "a FITS file"),
    (b"DDS ", "a DirectDraw surface"),
    (b"qoif", "a QOI picture"),
    (b"BPG\xfb", "a BPG picture"),
    (b"FLIF", "a FLIF picture"),
    (b"icns", "a macOS icon"),
    (b"\0\0\2\0", "a Windows cursor"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"\x01\xda\0", "an SGI picture"),
    (b"\x01\xda\1", "an SGI picture"),
    (b"\x59\xa6\x6a\x95", "a Sun raster"),
    (b"FUJIFILMCCD-RAW", "a raw camera file"),
    (b"IIRO", "a raw camera file"),
    (b"IIRS", "a raw camera file"),
    (b"MMOR", "a raw camera file"),
    (b"IIU\0", "a raw camera file"),
    (b"FOVb", "a raw camera file"),
    (b"II\x1a\0\0\0HEAPCCDR", "a raw camera file"),
    (b"\x1a\x45\xdf\xa3", "a video"),
    (b"\0\0\1\xba", "a video"),
    (b"\0\0\1\xb3", "a video"),
    (b"OggS", "a video"),
    (b"FLV\1", "a video"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
)
# The same at another place in the file.
MAGIC_NUMBERS_AT: tuple[tuple[int, bytes, str], ...] = (
    (8, b"CR\2\0", "a raw camera file"),
    (8, b"AVI ", "a video"),
    (128, b"DICM", "a DICOM file"),
    (257, b"ustar", "a tar archive"),
)
# Brands of ISO base media files, by their first letters. AVIF is read.
BRANDS: tuple[tuple[bytes, str], ...] = (
    (b"crx", "a raw camera file"),
    (b"hei", "a HEIC picture"),
    (b"hev", "a HEIC picture"),
    (b"avif", ""),
    (b"avis", ""),
)
# What a server sends instead of a picture. XML may also be a drawing.
PAGES = {b"<!doctype html": "an HTML page", b"<html": "an HTML page", b"<?xml": "an XML document"}


def unsupported_kind(data: bytes) -> str | None:
    """What the file is instead of a picture that can be read, and what to do; None if it may be one."""
    if not data:
        return f"it is empty; {AGAIN}"
    if not any(data):
        return f"it holds nothing but zeros; {AGAIN}"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer and not the picture itself; fetch that with `git lfs pull`"
    kind = _by_magic_number(data) or _by_brand(data) or _by_text(data[:HEAD].lower())
    if kind in PAGES.values():
        return f"it is {kind} and not a picture; {AGAIN}"
    return f"it is {kind}, which is not read; {CONVERT}" if kind else None


def _by_magic_number(data: bytes) -> str | None:
    numbers = [*((0, number, kind) for number, kind in MAGIC_NUMBERS), *MAGIC_NUMBERS_AT]
    return next((kind for place, number, kind in numbers if data.startswith(number, place)), None)


def _by_brand(data: bytes) -> str | None:
    """By the brands in the `ftyp` box: the major brand, or the compatible ones if that one only says "still image"."""
    if data[4:8] != b"ftyp":
        return None
    length = int.from_bytes(data[:4], "big")
    major, compatible = data[8:12], [data[i : i + 4] for i in range(16, min(length, HEAD), 4)]
    brands = compatible if major in (b"mif1", b"msf1", b"miaf") else [major]
    found = [kind for brand in brands for start, kind in BRANDS if brand.startswith(start)]
    return found[0] if found else "a HEIF picture" if brands is compatible else "a video"


def _by_text(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    page = next((kind for beginning, kind in PAGES.items() if text.startswith(beginning)), None)
    drawing = text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text
    return "an SVG drawing" if drawing else page
