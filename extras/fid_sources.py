"""Where the images of a FID come from: files as they are, arrays, a training set, samples of a checkpoint."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
from engine.build import load_checkpoint
from engine.distributed import barrier, broadcast, rank_and_world
from engine.process import write_json
from engine.status import append_row, format_metrics, trim_rows
from engine.validate import UserError, read_json, reading, reason_of
from extras.data_arrays import open_npz
from extras.datasets import DATASETS, find
from extras.inception import load_inception
from fid import MIN_IMAGES, REAL_KEPT, Statistics, compute_scores, measure, print_scores
from sample import class_labels, sample_images


class Images(NamedTuple):
    """n images. read(i, j), called forwards only -> those of i ... j - 1 that can be used, uint8 (3, H, W).

    It is called for `chunk` images or more at a time.
    """

    n: int
    chunk: int
    read: Callable


def from_dataset(dataset, chunk=256):
    """The images of a data.ImageSet, which all processes have."""
    return Images(len(dataset), chunk, lambda i, j: dataset.batch(range(i, j)))


def from_source(source, size, as_trained):
    """All images of a data.Source, as they are (size None) or cropped and resized as for training.

    as_trained: the training images alone, without those that cannot be used, which are an error otherwise.
    """
    items = source.train if as_trained else np.sort(np.concatenate([source.train, source.test]))

    def load(item):
        try:
            return torch.from_numpy(data.load_image(source.read(item), size))
        except Exception as error:  # of whatever lies between a file and its pixels
            if as_trained:
                return None
            raise UserError(f"{source.title(item)} cannot be used ({reason_of(error)})") from error

    def read(i, j):
        return [image for image in data.decoders().map(load, items[i:j]) if image is not None]

    return Images(len(items), 256 if as_trained else 64, read)


def from_array(path):
    """(source, side in pixels) of an .npz's arr_0, uint8 (n, H, W, 3). It may be larger than the memory."""
    with reading(path):
        file = zipfile.ZipFile(path).open("arr_0.npy")
        np.lib.format.read_magic(file)
        (n, *shape), fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or fortran or min(n, *shape) < 1:
            raise ValueError(f"arr_0 must be uint8 of shape (n, H, W, 3), is {dtype} {(n, *shape)}")
    start, size = file.tell(), int(np.prod(shape))

    def read(i, j):
        with reading(path):
            file.seek(start + i * size)
            pixels = np.frombuffer(file.read((j - i) * size), np.uint8).reshape(j - i, *shape)
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)

    return Images(n, 64, read), shape[0]


def from_pipeline(pipeline, labels, seed=0, batch=256, **settings):
    """Images of labels (n,) that a pipeline draws: image i is sample.py's. settings: of sample_images."""
    return Images(len(labels), batch, lambda i, j: sample_images(
        pipeline, labels[i:j], seed=seed, first=i, batch=batch, show_progress=False, **settings))


def load_statistics(path):
    """Statistics from a file of fid.py, pytorch-fid, clean-fid or ADM; what it does not hold is None."""
    mean, cov = {}, {}
    with open_npz(path) as file:
        for tap, end in (("2048", ""), ("spatial", "_s")):
            if "mu" + end in file:
                mu, sigma = file["mu" + end], file["sigma" + end]
                if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not np.allclose(sigma, sigma.T, 1e-4, 1e-6):
                    raise ValueError("mu must be (d,), and sigma (d, d), finite and symmetric")
                mean[tap], cov[tap] = mu, sigma
        features = file.get("features")
        if features is not None:
            if features.shape[1:] != mean["2048"].shape or not np.isfinite(features).all():
                raise ValueError("features must be finite, and as wide as mu")
            features = torch.from_numpy(features.astype(np.float32))
        n = int(file["n"]) if "n" in file else None
        return Statistics(n, mean, cov, str(file["resize"]) if "resize" in file else None, features)


def open_side(word, root, size, as_trained):
    """A word of the command line -> (Statistics or None, source or None, a few words); see from_source."""
    path = Path(word).expanduser()
    if path.suffix == ".npz" and path.is_file():
        with open_npz(path) as file:
            names = file.files
        images, side = from_array(path) if "arr_0" in names else (None, None)
        if "mu" in names:
            return load_statistics(path), images, "statistics"
        if images and size in (None, side):
            return None, images, f"{images.n:,} images, {side} px"
    source, as_trained = find(word, root), as_trained or word in ("toy", *DATASETS)
    if as_trained:
        size = size or source.sizes()[1]
    listed = isinstance(source, data.Source)  # else the toy, which is drawn
    images = from_source(source, size, as_trained) if listed else from_dataset(source.load(size)[0])
    form = f"cropped and resized to {size} px" if size else "as they are"
    return None, images, f"{images.n:,} {'training ' if as_trained else ''}images, {form}"


def score_samples(run, pipeline, n):
    """Scores of n samples against the training images, as by `fid.py DATA CKPT`; None but on process 0."""
    is_main = rank_and_world()[0] == 0
    network = load_inception(run.inception, run.device)
    path = run.out / f"{run.source.name}_{run.source.counts()[0]}_images_{run.config['size']}px.npz"
    if not broadcast(path.exists()):
        images = from_dataset(run.load_images()[0])
        real = measure(images, network, keep=REAL_KEPT, name="FID, training images")
        if is_main:
            real.save(path)
    labels = class_labels(n, list(range(len(run.source.class_names))) or [0])
    samples = from_pipeline(pipeline, labels, batch=run.eval_batch, **pipeline.sampling)
    fake = measure(samples, network, name=f"FID, {n:,} samples")
    return compute_scores(load_statistics(path), fake, run.device) if is_main else None


def evaluate_run(run, n):
    """--eval-fid: scores of n samples of a run's ckpt.pt, at its defaults; they join metrics.json."""
    barrier()  # it is written
    path = run.out / "metrics.json"
    metrics = read_json(path)
    if metrics.get("fid", {}).get("n") == n:
        return print(f"fid: complete ({n:,} samples), {format_metrics(metrics['fid'])}")
    scores = score_samples(run, load_checkpoint(run.out / "ckpt.pt", run.device), n)
    if scores:
        print_scores(scores, run.source.counts()[0], n)
        write_json(path, metrics | {"fid": scores | {"n": n}})


def evaluate_during(run, pipeline, step):
    """--fid-every: the scores of MIN_IMAGES samples, too few to be published, as a row of fid.csv."""
    pipeline.model.eval()
    scores = score_samples(run, pipeline, MIN_IMAGES)
    if scores:
        trim_rows(run.out / "fid.csv", step - 1)  # a run that was killed may come to this step once more
        append_row(run.out / "fid.csv", {"step": step} | {f"{name}_2k": scores[name] for name in scores})
        tqdm.write(f"FID-2k at step {step:,}: {format_metrics(scores)}")
