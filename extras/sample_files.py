"""Samples one by one, for measuring: `python sample.py CKPT --out FOLDER`, .zip or .npz. Resumable."""

import shutil
import zipfile

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import decoders
from engine.checkpoint import digest
from engine.distributed import broadcast, rank_and_world
from engine.process import shared_work, write_atomically
from sample import sample_images


def sample_files(pipeline, labels, out, batch, seed, **settings):
    """Images of labels (n,): PNGs in a folder or .zip, or an .npz with arr_0 (n, H, W, 3) and arr_1, labels.

    PNGs are first written beside OUT, in a folder named by what makes them, where the same command goes on.
    """
    n, is_main = len(labels), rank_and_world()[0] == 0
    origin = digest(pipeline.model.state_dict() | {f"labels, seed {seed}, {settings}": labels})
    parts = out.with_name(f"{out.name}.{origin[:8]}.parts")
    files = [parts / f"{i:06d}.png" for i in range(n)]
    if is_main:
        parts.mkdir(parents=True, exist_ok=True)
    starts = broadcast([i for i in range(0, n, batch) if not all(f.exists() for f in files[i:i + batch])])

    def draw(starts):
        for i in starts:
            yield sample_images(pipeline, labels[i:i + batch], seed=seed, first=i, batch=batch,
                                show_progress=False, **settings).permute(0, 2, 3, 1).numpy()

    def write_png(image, path):
        write_atomically(path, lambda partial: Image.fromarray(image).save(partial, "png"))
    with tqdm(total=len(starts), desc="sampling", unit="batch", disable=None if is_main else True) as bar:
        for i, images in shared_work(starts, draw):  # all draw; process 0 writes
            list(decoders().map(write_png, images, files[i:i + batch]))
            bar.update()
    if is_main and not out.suffix:
        parts.replace(out)
    elif is_main:
        write_atomically(out, lambda partial: pack(partial, files, labels.numpy(), out.suffix))
        shutil.rmtree(parts)


def pack(path, files, labels, suffix):
    """PNG files into a .zip, or their pixels and the labels (n,) into an .npz, in ADM's layout."""
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.name)
    else:
        shape = len(files), *np.asarray(Image.open(files[0])).shape
        rows = np.lib.format.open_memmap(files[0].with_suffix(".npy"), "w+", np.uint8, shape)  # may be 10 GB
        for row, file in zip(rows, files, strict=True):
            row[:] = np.asarray(Image.open(file))
        with path.open("wb") as file:
            np.savez(file, arr_0=rows, arr_1=labels)
