"""Opens images and archives that somebody else made, within bounds: a small file must not unpack to a full memory.

Nothing is unpacked to the disk, links are not followed, pickles in arrays are refused, and nothing waits for a pipe.
The bounds are those of engine/read_back.LIMITS. Called by data.py and extras/data_*.py, and by fid.py.
"""

import contextlib
import gzip
import io
import math
import os
import tarfile
import threading
import zipfile

import numpy as np
from PIL import Image

from engine.read_back import (
    ReadError,
    UserError,
    at_most,
    check_unpacked,
    expect,
    limit,
    no_file,
    read_npy_header,
    reason_of,
    regular_file,
    shown,
)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS and the like, which start other programs
LARGE, ONE_LARGE = 8_000_000, threading.Lock()  # images of more pixels are decoded one at a time
WIDEST = 4096  # features of a network, whose covariance is the square of it
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit counts a JPEG before it is reduced; ours replaces it


# ----------------------------------------------------------------------------
# Images.

def open_image(source, size=None):
    """Path, bytes or uint8 array -> a Pillow image, of which only the header is read, of not too many pixels.

    size: a JPEG may be decoded smaller, never below twice so many pixels. ValueError or OSError says why not.
    """
    most = limit("VQLCMD_MAX_PIXELS")
    if isinstance(source, np.ndarray):
        check_pixels(source.shape[1], source.shape[0], most)  # it is copied next
        image = Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source)
    else:
        if not isinstance(source, bytes):
            if reason := no_file(source):
                raise ValueError(reason)
            at_most("the file", os.path.getsize(source), "VQLCMD_MAX_IMAGE_BYTES")
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    # Of a progressive JPEG the decoder keeps all, however little of it is asked for.
    if size and image.width * image.height <= (1 if image.info.get("progressive") else 10) * most:
        image.draft("RGB", (2 * size, 2 * size))
    check_pixels(image.width, image.height, most)
    return image


def check_pixels(width, height, most):
    if width * height > most:
        raise ValueError(f"{width} x {height} pixels, more than {most:,} (VQLCMD_MAX_PIXELS)")


def one_large_at_a_time(image):
    """A context in which an image is decoded: of large ones only one, so that many threads need no more memory."""
    return ONE_LARGE if image.width * image.height > LARGE else contextlib.nullcontext()


# ----------------------------------------------------------------------------
# Arrays.

def open_npz(path):
    """np.load of an .npz whose arrays, unpacked, are within bounds or, if stored, no larger than the file."""
    packed = regular_file(path).stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type == zipfile.ZIP_STORED and member.file_size > packed:
            raise ReadError(f"{path}: {shown(member.filename)} claims to be larger than the file")
    check_unpacked(path, sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED), packed)
    return np.load(path, allow_pickle=False)


def read_npz_array(npz, name):
    """npz[name] after a look at its header: the shape that it claims is not allocated unless the bytes are there."""
    where = f"{npz.zip.filename}: {shown(name)}"
    if name + ".npy" not in npz.zip.namelist():
        raise ReadError(f"{where} is no array")
    member = npz.zip.getinfo(name + ".npy")
    with npz.zip.open(member) as file:
        read_npy_header(where, file, member.file_size)
    try:
        return npz[name]
    except Exception as error:  # of a damaged stream: half a dozen types
        raise ReadError(f"{where} cannot be read as an array ({reason_of(error)}): make it again") from error


def read_statistics(path):
    """{"mu", "sigma", perhaps "mu_s", "sigma_s", "n", "resize", "features"} of an .npz of statistics, checked."""
    found = {}
    try:
        with open_npz(path) as file:
            for name in ("mu", "sigma", "mu_s", "sigma_s", "n", "resize", "features"):
                if name in file or name in ("mu", "sigma"):
                    found[name] = read_npz_array(file, name)
    except UserError:
        raise
    except Exception as error:  # of a damaged archive: half a dozen types
        raise ReadError(f"{path} cannot be read as an .npz ({reason_of(error)}): make it again") from error
    for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s")):
        for name, rank in ((mean, 1), (cov, 2)) if mean in found or cov in found else ():
            value, d = found.get(name), len(found[mean]) if mean in found and found[mean].ndim else -1
            if value is None or value.dtype.kind not in "fiu" or value.shape != (d,) * rank or not 1 <= d <= WIDEST:
                raise ReadError(f"{path}: {name} must be numbers of shape {(d,) * rank}, with at most {WIDEST} "
                                f"features, is {shown(value)}")
            if not np.isfinite(value).all():
                raise ReadError(f"{path}: {name} is not finite; a covariance needs at least two images")
            if rank == 2 and not (value.diagonal().min() > -1e-6 and np.allclose(value, value.T, 1e-4, 1e-6)):
                raise ReadError(f"{path}: {name} must be a covariance, symmetric, with no variance below 0")
    for name, kind, bounds in (("n", int, (2, 1 << 40)), ("resize", ("tf", "pytorch-fid", "clean"), ())):
        if name in found:
            value = found[name].item() if found[name].size == 1 else found[name]
            found[name] = expect(f"{path}: {name}", value, kind, *bounds)
    if "features" in found:
        found["features"] = check_features(path, found["features"], len(found["mu"]), found.get("n", limit(
            "VQLCMD_MAX_IMAGES")))
    return found


def check_features(path, features, width, most):
    """Features of 2 to `most` images, a row each, as float32; else ReadError."""
    what = f"{path}: features must be finite numbers of shape (2 to {most:,} images, {width})"
    if features.dtype.kind != "f" or features.shape[1:] != (width,) or not 2 <= len(features) <= most:
        raise ReadError(f"{what}, are {shown(features)}")
    with np.errstate(over="ignore"):
        features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise ReadError(f"{what}, some are not finite in float32")
    return features


# ----------------------------------------------------------------------------
# Archives.

def read_gzip(path):
    """The content of a .gz, or of a plain file, within bounds."""
    packed = regular_file(path).stat().st_size
    most = max(limit("VQLCMD_MAX_UNPACKED_BYTES"), 8 * packed)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        content = file.read(most + 1)
    check_unpacked(path, len(content), packed)
    return content


def read_idx_array(path, rank):
    """The uint8 array in an idx file, gzipped or not: two zeros, type 8 (uint8), the rank and the sizes; then bytes."""
    packed = regular_file(path).stat().st_size
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        if file.read(4) != bytes([0, 0, 8, rank]):
            raise ValueError("its header is another's")
        shape = np.frombuffer(file.read(4 * rank), ">u4").tolist()
        if len(shape) != rank:
            raise ValueError("it ends in its header")
        size = math.prod(shape)
        check_unpacked(path, size, packed)
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"it announces {size:,} bytes and has {'more' if len(content) > size else len(content)}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_tar(path, wanted):
    """{base name: bytes} of the regular files in a tar, gzipped or not, whose base name satisfies `wanted`."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(read_gzip(path)), mode="r:") as archive:
        for member in archive:
            if member.isreg() and not member.issparse() and wanted(os.path.basename(member.name)):
                found[os.path.basename(member.name)] = archive.extractfile(member).read()
    return found
