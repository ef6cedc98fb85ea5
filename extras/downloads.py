"""Downloads that are checked, and the weights that other people trained: Inception, VGG, LPIPS.

    python -m extras.downloads        fetches all of these weights
"""

import hashlib
from pathlib import Path

import torch

from engine.validate import UserError


def fetch(urls, path, sha256, instead):
    """Downloads a file from the first of some URLs that has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        try:
            return torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:  # RuntimeError: it has another checksum
            problem = f"cannot download {url} ({error})"
    raise UserError(f"{problem}: fetch {path.name} elsewhere and put it into {path.parent}, or {instead}")


def find_weights(name, url, sha256, instead, given=None, may_download=True):
    """Path of a published file of weights: the one given, or in torch's cache, or a download to there."""
    path = Path(given).expanduser() if given else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        if given or not may_download:
            raise UserError(f"no {name} at {path}: fetch {url} to there, or {instead}")
        fetch([url], path, sha256, instead)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path} is not the published {name}: delete it, and fetch {url}")
    return path


if __name__ == "__main__":
    from engine.process import report_errors
    from extras.inception import find_inception
    from extras.vqgan_losses import find_lpips
    with report_errors("downloads.py"):
        print("there are:", *[find_inception(), *find_lpips()], sep="\n  ")
