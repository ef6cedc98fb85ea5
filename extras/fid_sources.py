"""Where the images of a FID come from: files as they are, arrays, a training set, samples of a checkpoint.

A source has n, chunk (images to read at a time) and read(i, j) -> the images i ... j - 1, a uint8 tensor
(j - i, 3, H, W) or a list of (3, H, W), fewer if some cannot be used. It is read forwards only.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from engine.build import load_checkpoint
from engine.distributed import barrier, broadcast, rank_and_world
from engine.process import write_json
from engine.status import append_row, format_metrics, trim_rows
from engine.validate import UserError, check_file, check_unpacked, printable, read_json, reading, reason_of
from extras.data_arrays import IMAGES
from extras.datasets import DATASETS, find
from extras.inception import load_inception
from extras.sampling_options import class_labels
from fid import MIN_IMAGES, REAL_KEPT, Statistics, compute_scores, measure, print_scores
from sample import sample_images

FEW = MIN_IMAGES  # samples of an evaluation during training


# ----------------------------------------------------------------------------
# Sources.

class Pictures:
    """All images of a source of data.py, as they are (size None) or cropped and resized as for training.

    as_trained: the training images alone, without those that cannot be used, which are an error otherwise.
    """

    def __init__(self, source, size=None, as_trained=False):
        self.source, self.size, self.as_trained = source, size, as_trained
        self.items = source.train if as_trained else np.sort(np.concatenate([source.train, source.test]))
        self.n, self.chunk = len(self.items), 256 if as_trained else 64

    def load(self, item):
        try:
            return torch.from_numpy(data.load_image(self.source.read(item), self.size))
        except Exception as error:  # load_image's, or the form's own on the way to the bytes
            if self.as_trained:
                return None
            what = f"{self.source.title(item)} cannot be used ({reason_of(error)})"
            raise UserError(f"{what}: repair it or take it out") from error

    def read(self, i, j):
        images = data.decoders().map(self.load, self.items[i:j])
        return [image for image in images if image is not None]


class Array:
    """arr_0 of an .npz, uint8 (n, H, W, 3), streamed: it may be larger than the memory."""

    chunk = 64

    def __init__(self, path):
        self.path = path
        with reading(path):
            self.file = zipfile.ZipFile(path).open("arr_0.npy")
            np.lib.format.read_magic(self.file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
                raise ValueError(f"arr_0 must be uint8 of shape (n, H, W, 3), is {dtype} {shape}")
        self.n, self.shape, self.start = shape[0], shape[1:], self.file.tell()

    def read(self, i, j):
        size = int(np.prod(self.shape))
        with reading(self.path):
            self.file.seek(self.start + i * size)
            pixels = np.frombuffer(self.file.read((j - i) * size), np.uint8).reshape(j - i, *self.shape)
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)


class Decoded:
    """A data.ImageSet that all processes have."""

    def __init__(self, dataset, chunk=256):
        self.dataset, self.n, self.chunk = dataset, len(dataset), chunk

    def read(self, i, j):
        return self.dataset.batch(range(i, j))


class Samples:
    """Images of labels (n,) that a pipeline of load_checkpoint draws: image i is sample.py's image i.

    chunk: images at a time. settings: of sample_images.
    """

    def __init__(self, pipeline, labels, seed=0, chunk=256, **settings):
        self.pipeline, self.labels, self.seed, self.settings = pipeline, labels, seed, settings
        self.n, self.chunk = len(labels), chunk

    def read(self, i, j):
        return sample_images(self.pipeline, self.labels[i:j], seed=self.seed, first=i, batch=self.chunk,
                             show_progress=False, **self.settings)


# ----------------------------------------------------------------------------
# Files of statistics, and what a word of the command line is.

def open_npz(path):
    """np.load of an .npz that does not unpack to a full memory."""
    with reading(path):
        with zipfile.ZipFile(check_file(path)) as archive:
            unpacked = sum(m.file_size for m in archive.infolist() if m.compress_type != zipfile.ZIP_STORED)
        check_unpacked(path, unpacked, path.stat().st_size)
        return np.load(path, allow_pickle=False)


def load_statistics(path):
    """Statistics from a file of fid.py, pytorch-fid, clean-fid or ADM; what it does not hold is None."""
    with open_npz(path) as file, reading(path):
        known = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "features", "n", "resize")
                 if name in file}
        mean, cov, features = {"2048": known["mu"]}, {"2048": known["sigma"]}, known.get("features")
        if "mu_s" in known:
            mean["spatial"], cov["spatial"] = known["mu_s"], known["sigma_s"]
        for mu, sigma in zip(mean.values(), cov.values(), strict=True):
            if sigma.shape != mu.shape * 2 or not np.allclose(sigma, sigma.T, 1e-4, 1e-6) or mu.ndim != 1:
                raise ValueError("mu must be (d,), and sigma (d, d), finite and symmetric")
        if features is not None:
            if features.shape[1:] != mean["2048"].shape or not np.isfinite(features).all():
                raise ValueError("features must be finite, and as wide as mu")
            features = torch.from_numpy(features.astype(np.float32))
        n, resize = (known[name].item() if name in known else None for name in ("n", "resize"))
        return Statistics(n, mean, cov, resize, features)


def open_side(word, root, size, as_trained):
    """A word of the command line -> (Statistics or None, source or None, a few words on it).

    size: None for images as they are. as_trained: read them as training does, without the held-out part.
    """
    path = Path(word).expanduser()
    if path.suffix == ".npz" and path.is_file():
        with open_npz(path) as file:
            names = set(file.files)
        if {"mu", "sigma"} <= names:
            return load_statistics(path), Array(path) if "arr_0" in names else None, "statistics"
        if not names & set(IMAGES):
            held = printable(", ".join(sorted(names)))[:200]
            raise UserError(f"{path} holds {held}: expected arr_0 (images), or mu and sigma (statistics)")
        if "arr_0" in names and size in (None, (source := Array(path)).shape[0]):
            return None, source, f"{source.n:,} images, {source.shape[0]} px"
    source, as_trained = find(word, root), as_trained or word in ("toy", *DATASETS)
    if as_trained:
        size = size or source.sizes()[1]
    images = Pictures(source, size, as_trained) if hasattr(source, "train") else Decoded(source.load(size)[0])
    what = f"{images.n:,} {'training ' if as_trained else ''}images"
    return None, images, f"{what}, {f'cropped and resized to {size} px' if size else 'as they are'}"


# ----------------------------------------------------------------------------
# FID of a run.

def score_samples(run, pipeline, n):
    """Scores of n samples against a run's training images, as by `fid.py DATA CKPT`; None but on process 0.

    Statistics of the training images are measured once and kept in the run directory, in a file that is named
    by what they are of.
    """
    is_main = rank_and_world()[0] == 0
    network = load_inception(run.inception, run.device)
    path = run.out / f"{run.source.name}_{run.source.counts()[0]}_images_{run.config['size']}px.npz"
    if not broadcast(path.exists()):
        train, _ = run.load_images()
        real = measure(Decoded(train), network, keep=REAL_KEPT, name="FID, training images")
        if is_main:
            real.save(path)
    labels = class_labels(n, list(range(len(run.source.class_names))) or [0])
    samples = Samples(pipeline, labels, chunk=run.eval_batch, **pipeline.sampling)
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
    """--fid-every: the scores of 2,048 samples of the averaged weights, a row of fid.csv.

    With so few samples FID is too high to be published: it is called FID-2k, and shows the course.
    """
    pipeline.model.eval()
    scores = score_samples(run, pipeline, FEW)
    if scores:
        trim_rows(run.out / "fid.csv", step - 1)  # a run that was killed may come to this step once more
        row = {f"{name}_2k": value for name, value in scores.items()}
        append_row(run.out / "fid.csv", {"step": step} | row)
        tqdm.write(f"FID-2k at step {step:,}: {format_metrics(scores)}")
