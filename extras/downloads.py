"""Downloads that resume and are checked, and the weights that other people trained: Inception, VGG, LPIPS.

    python -m extras.downloads        fetches all of these weights, on the login node of a cluster, say

Called by extras/datasets.py, extras/inception.py and extras/vqgan_losses.py.
"""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from engine.process import UserError


class DownloadError(UserError):
    """One line: what could not be fetched or is damaged, and what to do."""


def hexdigest(path, kind):
    """The checksum of a file, which may be larger than the memory."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(urls, path, checksum, instead):
    """Downloads the first of some equal URLs that answers. What is there of path.part is not fetched again.

    path appears when it is complete and its checksum is right (MD5 or SHA-256, in hexadecimal). DownloadError
    otherwise, which ends with what to do instead; the part is kept unless it is wrong.
    """
    partial, tries = path.with_name(path.name + ".part"), 3
    for url in [url for url in urls for _ in range(tries)]:
        have = partial.stat().st_size if partial.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                if answer.status != 206:  # no part of it, but all
                    have = 0
                total = have + int(answer.headers.get("Content-Length", 0)) or None
                with open(partial, "ab" if have else "wb") as file, tqdm(
                        total=total, initial=have, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                    while block := answer.read(1 << 18):
                        file.write(block)
                        bar.update(len(block))
            if total is None or partial.stat().st_size >= total:
                break
            problem = "the connection broke"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing after the part: it is complete
                break
            problem = f"HTTP {error.code}"
        except (OSError, ValueError) as error:
            problem = str(error)
    else:
        raise DownloadError(f"cannot download {url} ({problem}): give the same command again, or fetch {path.name} "
                            f"elsewhere and put it into {path.parent}, or {instead}")
    found = hexdigest(partial, "md5" if len(checksum) == 32 else "sha256")
    if found != checksum:
        partial.unlink()
        raise DownloadError(f"{url} has the checksum {found}, not {checksum}: it was damaged on the way, "
                            f"or changed; give the same command again, or put the right file into {path.parent}")
    partial.replace(path)


def find_weights(name, url, sha256, instead, given=None, may_download=True):
    """Path of a published file of weights: the one given, else NAME in torch's cache, else a download to there.

    instead: what else the user may do. DownloadError if it is not there, or is another file than the published one.
    """
    path = Path(given).expanduser() if given else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        if given or not may_download:
            raise DownloadError(f"no {name} at {path}: fetch {url} to there, or {instead}")
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch([url], path, sha256, instead)
    elif hexdigest(path, "sha256") != sha256:
        raise DownloadError(f"{path} is not the published {name} (its SHA-256 does not begin with {sha256[:8]}): cut "
                            f"short or altered; delete it, and fetch {url}")
    return path


if __name__ == "__main__":
    from engine.process import report_errors
    from extras.inception import find_inception
    from extras.vqgan_losses import find_lpips
    with report_errors("downloads.py"):
        print("there are:", *[find_inception(), *find_lpips()], sep="\n  ")
