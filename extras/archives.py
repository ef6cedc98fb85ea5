"""Opens images and archives that somebody else made, within bounds: a small file must not unpack to a full memory.

Nothing is unpacked to the disk, links are not followed, pickles in arrays are refused, and nothing waits for a pipe.
The bounds are those of engine/read_back.LIMITS. Called by data.py and extras/data_*.py, and by fid.py.
"""

import zipfile

import numpy as np

from engine.read_back import (
    ReadError,
    UserError,
    check_unpacked,
    expect,
    limit,
    read_npy_header,
    reason_of,
    regular_file,
    shown,
)

WIDEST = 4096  # features of a network, whose covariance is the square of it


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
