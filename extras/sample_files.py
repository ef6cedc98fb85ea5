"""Samples one by one, for measuring: as a folder or a .zip of PNGs, or as an .npz in ADM's layout. Resumable.

Called by extras/sample_command.py for --out FOLDER, .zip and .npz.
"""

import io
import zipfile

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine.arrays import resumable_array
from engine.checkpoint import digest
from engine.distributed import broadcast
from engine.process import main_process_first, shared_work, write_atomically
from sample import sample_images


def sample_files(pipeline, labels, out, batch, seed, **settings):
    """Image i of labels (n,) as it is, for measuring: a folder or .zip of 000000.png ..., or an .npz as ADM's.

    The .npz holds arr_0 (n, H, W, 3) uint8 and arr_1 (n,), the labels. Till all is done the images lie in OUT.part.npy,
    with a mark for each, so that the same command goes on where it was stopped. Processes share out the batches, and
    process 0 writes what all of them drew.
    """
    n, (h, w) = len(labels), (pipeline.tokenizer.size,) * 2
    part = out.with_name(out.name + ".part.npy")
    made = digest(pipeline.model.state_dict() | {"labels": labels}) + f" seed {seed} {settings}"
    dtype = [((made, "image"), np.uint8, (h, w, 3)), ("drawn", bool)]

    def begin():
        out.parent.mkdir(parents=True, exist_ok=True)
        return resumable_array(part, dtype, n)  # zeros: nothing is drawn yet

    def draw(starts):
        for start in starts:
            yield sample_images(pipeline, labels[start:start + batch], seed=seed, first=start, batch=batch,
                                show_progress=False, **settings).permute(0, 2, 3, 1).numpy()

    rows = main_process_first(begin)
    drawn = broadcast(None if rows is None else np.array(rows["drawn"]))
    todo = [start for start in range(0, n, batch) if not drawn[start:start + batch].all()]
    with tqdm(total=n, initial=int(drawn.sum()), desc="sampling", unit="img", disable=None if rows is not None else
              True) as bar:
        for start, images in shared_work(todo, draw):
            rows["image"][start:start + batch] = images
            rows.flush()  # the images are on the disk before the marks say so
            rows["drawn"][start:start + batch] = True
            bar.update(len(images))
    if rows is not None:
        rows.flush()
        pack(rows["image"], labels.numpy(), out)
        part.unlink()


def pack(images, labels, out):
    """images (n, H, W, 3) uint8 into a folder, a .zip or an .npz, which appears when it is complete."""
    def png(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        return file.getvalue()

    def write(partial):
        if out.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez(file, arr_0=images, arr_1=labels)
        elif out.suffix == ".zip":
            with zipfile.ZipFile(partial, "w") as file:
                for i, image in enumerate(images):
                    file.writestr(f"{i:06d}.png", png(image))
        else:
            partial.mkdir(exist_ok=True)
            for i, image in enumerate(images):
                (partial / f"{i:06d}.png").write_bytes(png(image))

    write_atomically(out, write)
