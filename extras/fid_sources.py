"""Where the images of a FID come from: files as they are, arrays, a training set, samples of a checkpoint, or their
statistics. A source has n, chunk (images to read at a time) and read(i, j) -> the images i ... j - 1, a uint8 tensor
(j - i, 3, H, W) or a list of (3, H, W); it is read forwards only. Called by fid.py's command line and train.py.
"""

import copy
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from engine.build import load_checkpoint
from engine.distributed import barrier, broadcast, gather, rank_and_world
from engine.read_back import UserError, at_most, expect, printable, read_json, read_npy_header, reason_of, shown
from engine.process import main_process_first, write_json
from engine.status import append_row, format_metrics, trim_rows
from extras.archives import open_npz
from extras.data_arrays import IMAGES
from extras.datasets import DATASETS, find
from extras.inception import WEIGHTS_SHA256, load_inception
from extras.sampling_options import class_labels
from fid import MIN_IMAGES, REAL_KEPT, FIDError, Statistics, compute_scores, measure, print_scores
from sample import sample_images

FEW = MIN_IMAGES  # samples of an evaluation during training


class Pictures:
    """All images of a source of data.py, as they are (size None) or centre-cropped and resized as for training."""

    chunk = 64

    def __init__(self, source, size=None):
        self.source, self.size, self.items = source, size, np.sort(np.concatenate([source.train, source.test]))
        self.n = len(self.items)

    def load(self, item):
        try:
            return torch.from_numpy(data.load_image(self.source.read(item), self.size))
        except UserError as error:
            raise FIDError(f"{self.source.title(item)} cannot be used ({error}): repair it or take it out") from error

    def read(self, i, j):
        return list(data.decoders().map(self.load, self.items[i:j]))


class Array:
    """arr_0 of an .npz, uint8 (n, H, W, 3), streamed: it may be larger than the memory."""

    chunk = 64

    def __init__(self, path):
        archive, self.path = zipfile.ZipFile(path), path
        self.file, member = archive.open("arr_0.npy"), archive.getinfo("arr_0.npy")
        shape, fortran, dtype = read_npy_header(f"{path}: arr_0", self.file, member.file_size)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
            raise FIDError(f"{path}: arr_0 must be uint8 of shape (n, H, W, 3), is {dtype} {shape}")
        at_most(f"{path}: arr_0, {self.chunk} images at a time", self.chunk * int(np.prod(shape[1:])),
                "VQLCMD_MAX_UNPACKED_BYTES")
        self.n, self.shape, self.at = shape[0], shape[1:], 0

    def read(self, i, j):
        size = int(np.prod(self.shape))
        try:
            while self.at < i:  # another process has these
                self.file.read(size)
                self.at += 1
            content, self.at = bytearray(self.file.read((j - i) * size)), j
        except Exception as error:  # a damaged stream: half a dozen types
            raise FIDError(f"{self.path}: arr_0 is damaged ({reason_of(error)}): make it again") from error
        if len(content) < (j - i) * size:
            raise FIDError(f"{self.path}: arr_0 ends before image {j:,}: make it again")
        return torch.frombuffer(content, dtype=torch.uint8).view(j - i, *self.shape).permute(0, 3, 1, 2)


class Decoded:
    """A data.ImageSet that all processes have."""

    def __init__(self, dataset, chunk=256):
        self.dataset, self.n, self.labels, self.chunk = dataset, len(dataset), dataset.labels, chunk

    def read(self, i, j):
        return self.dataset.batch(range(i, j))


class Training(Decoded):
    """The training images of a source of data.py, as training reads them. Processes share out the decoding: each has a
    part of them, the images share[0] ... share[1] - 1 of n, and the labels of all."""

    def __init__(self, source, size):
        rank, world = rank_and_world()
        if world > 1:  # a part of the source: every image is looked at once
            source = copy.copy(source)
            source.train, source.test = np.array_split(source.train, world)[rank], source.test[:64]
        super().__init__(source.load(size)[0])
        labels = broadcast(gather(self.labels))
        ends = np.cumsum([0, *map(len, labels)]).tolist()
        self.share, self.n, self.labels = (ends[rank], ends[rank + 1]), ends[-1], torch.cat(labels)

    def read(self, i, j):
        return super().read(i - self.share[0], j - self.share[0])


class Samples:
    """Images of labels (n,) that a pipeline (engine.build.load_checkpoint) draws: image i is sample.py's image i.

    chunk: images at a time. settings: of sample_images.
    """

    def __init__(self, pipeline, labels, seed=0, chunk=256, **settings):
        self.pipeline, self.n, self.labels, self.seed = pipeline, len(labels), labels, seed
        self.chunk, self.settings = chunk, settings

    def read(self, i, j):
        return sample_images(self.pipeline, self.labels[i:j], seed=self.seed, first=i, batch=self.chunk,
                             show_progress=False, **self.settings)


def cached_statistics(dataset, network, batch=None, keep=REAL_KEPT):
    """Statistics of a data.ImageSet, measured once and then found again in torch's cache; and in which file, a Path.

    What they are of is recognised by the pixels of all images, or of 4,096 where the set is decoded as it is read.
    keep: so many features are kept, for KID, precision and recall. Process 0 looks for them, for all: machines may have
    caches of their own.
    """
    path = main_process_first(lambda: cache_of(dataset, network, keep))
    there = rank_and_world()[0] == 0 and path.exists()
    found = broadcast(read_cached(path, len(dataset), network) if there else None)
    if found is None:
        found = measure(Decoded(dataset), network, batch, keep, name="FID, training images")
        if rank_and_world()[0] == 0:
            found.save(path)
    return found, path


def read_cached(path, n, network):
    """The Statistics in a file of the cache; None, and a line, if they are not of these images, or damaged."""
    try:
        found = Statistics.load(path)
    except UserError as error:
        return print(f"{error}: measured anew")
    if found.n == n and found.resize == network.resize and {
            tap: len(mean) for tap, mean in found.mean.items()} == network.widths:
        return found
    print(f"{path} is of other images, or of another network: measured anew")


def cache_of(dataset, network, keep):
    """The file for cached_statistics."""
    some = range(len(dataset)) if dataset.pixels is not None else np.linspace(0, len(dataset) - 1, 4096).astype(int)
    digest = hashlib.sha256(f"{WEIGHTS_SHA256} {network.resize} {len(dataset)} {keep}".encode())
    for i in range(0, len(some), 256):
        digest.update(dataset.batch(some[i:i + 256]).numpy().tobytes())
    return Path(torch.hub.get_dir()).parent / "vq-lcmd" / f"fid-{digest.hexdigest()[:16]}.npz"


def score_samples(run, pipeline, n):
    """Scores of n samples against the training images of a run, at the run's sampling settings; None but on process 0.

    The classes are those of `fid.py DATA CKPT --n N`.
    """
    network = load_inception(run.inception, run.device)
    train, _ = run.load_images()
    real, _ = cached_statistics(train, network)
    labels = class_labels(n, list(range(len(run.source.class_names))) or [0])
    samples = Samples(pipeline, labels, chunk=run.eval_batch, **pipeline.sampling)
    fake = measure(samples, network, name=f"FID, {n:,} samples")
    return compute_scores(real, fake, "cpu" if run.device.type == "mps" else run.device) if rank_and_world()[0] == 0 \
        else None


def evaluate_run(run, n):
    """--eval-fid: scores of n samples of a run's ckpt.pt, at its defaults; they join metrics.json."""
    barrier()  # it is written
    path = run.out / "metrics.json"
    metrics = read_json(path)
    for name, value in expect(f"{path}: fid", metrics.get("fid", {}), dict).items():
        expect(f"{path}: fid: {shown(name)}", value, float)
    if metrics.get("fid", {}).get("n") == n:
        return print(f"fid: complete ({n:,} samples), {format_metrics(metrics['fid'])}")
    scores = score_samples(run, load_checkpoint(run.out / "ckpt.pt", run.device), n)
    if scores:
        print_scores(scores, run.source.counts()[0], n)
        write_json(path, metrics | {"fid": scores | {"n": n}})


def evaluate_during(run, pipeline, step):
    """--fid-every: FID and its relatives of 2,048 samples of the averaged weights, a row of fid.csv.

    So few samples give a number that is too high, and not one to publish: it is called FID-2k, and shows the course.
    """
    pipeline.model.eval()
    with run.eval_memory():
        scores = score_samples(run, pipeline, FEW)
    if scores:
        trim_rows(run.out / "fid.csv", step - 1)  # as in log_bound
        append_row(run.out / "fid.csv", {"step": step} | {f"{name}_2k": value for name, value in scores.items()})
        tqdm.write(f"FID-2k at step {step:,}: {format_metrics(scores)}")


def open_side(word, root, size, trained_on):
    """A word of the command line -> (Statistics or None, source of images or None, a few words on it).

    size: None for images as they are. trained_on: read them as training did, without its held-out part.
    """
    path = Path(word).expanduser()
    if path.suffix == ".npz" and path.is_file():
        try:
            with open_npz(path) as file:
                names = set(file.files)
            if not names & set(IMAGES) and not {"mu", "sigma"} <= names:
                held = printable(", ".join(sorted(names)))[:200] or "nothing"
                raise FIDError(f"{path} holds {held}: expected arr_0 (images), or mu and sigma (statistics)")
            statistics = Statistics.load(path) if {"mu", "sigma"} <= names else None
            source = Array(path) if "arr_0" in names else None
        except UserError:
            raise
        except Exception as error:  # of a damaged archive: half a dozen types
            raise FIDError(f"{path} cannot be read as an .npz ({reason_of(error)}): make it again") from error
        if statistics or source and size in (None, *source.shape[:1]):
            return statistics, source, "statistics" if statistics else f"{source.n:,} images, {source.shape[0]} px"
    source = find(word, root)
    if trained_on or word in ("toy", *DATASETS):
        size = size or source.sizes()[1]
        source = Training(source, size) if hasattr(source, "train") else Decoded(source.load(size)[0])
        return None, source, f"{source.n:,} training images, cropped and resized to {size} px"
    source = Pictures(source, size)
    return None, source, f"{source.n:,} images, " + (f"cropped and resized to {size} px" if size else "as they are")
