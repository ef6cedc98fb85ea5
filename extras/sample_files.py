"""Samples one by one, for measuring: as a folder or a .zip of PNGs, or as an .npz in ADM's layout. Resumable.

Called by extras/sample_command.py for --out FOLDER, .zip and .npz.
"""

import io
import zipfile

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine.checkpoint import digest
from engine.distributed import barrier, rank_and_world
from engine.run import resumable_array, write_atomically
from sample import sample_images


def sample_files(pipeline, labels, out, batch, seed, **settings):
    """Image i of labels (n,) as it is, for measuring: a folder or .zip of 000000.png ..., or an .npz as ADM's.

    The .npz holds arr_0 (n, H, W, 3) uint8 and arr_1 (n,), the labels. Till all is done the images lie in OUT.part.npy,
    with a mark for each, so that the same command goes on where it was stopped; processes share out the batches.
    """
    (rank, world), n, (h, w) = rank_and_world(), len(labels), (pipeline.tokenizer.size,) * 2
    part = out.with_name(out.name + ".part.npy")
    made = digest(pipeline.model.state_dict() | {"labels": labels}) + f" seed {seed} {settings}"
    dtype = [((made, "image"), np.uint8, (h, w, 3)), ("drawn", bool)]
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        resumable_array(part, dtype, n)  # zeros: nothing is drawn yet
    barrier()
    rows = resumable_array(part, dtype, n)
    with tqdm(total=n, initial=int(rows["drawn"].sum()), desc="sampling", unit="img",
              disable=True if rank else None) as bar:
        for start in range(rank * batch, n, world * batch):
            here = slice(start, min(start + batch, n))
            if rows["drawn"][here].all():
                continue
            images = sample_images(pipeline, labels[here], seed=seed, first=start, batch=batch, show_progress=False,
                                   **settings)
            rows["image"][here] = images.permute(0, 2, 3, 1).numpy()
            rows.flush()  # the images are on the disk before the marks say so
            rows["drawn"][here] = True
            bar.update(len(images) * world)
    rows.flush()
    barrier()
    if rank == 0:
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
