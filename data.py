"""Data: every image collection becomes the same thing, uint8 tensors (B, 3, S, S) with integer labels.

    python data.py FOLDER --size 64            prints what is there, and draws a page of it
    python data.py ffhq --root /datasets       a published set, or how to get it

Here are the path from a file to pixels, the same for training and evaluation (load_image), sets of images
to take batches from (ImageSet), and what every form of data provides (Source). A new form is a class like Zip
in extras/data_forms.py, which detect_format in extras/datasets.py has to recognise.
"""

import contextlib
import functools
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from engine.distributed import rank_and_world
from engine.process import look_ahead
from engine.randomness import batch_indices, generator_for
from engine.validate import UserError, printable, reason_of

IN_MEMORY_BYTES = 2 << 30  # a smaller set is decoded once; a larger one image by image, each time
WORKERS = min(16, os.cpu_count() or 4)
MIN_SIDE = 4  # a 1x1 file is a tracking pixel or a placeholder, not a picture
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, which starts another program
MAX_PIXELS = int(os.environ.get("VQLCMD_MAX_PIXELS", 50_000_000))  # of an image when it is decoded
Image.MAX_IMAGE_PIXELS = 5 * MAX_PIXELS  # Pillow refuses twice this; a large JPEG is decoded smaller
ONE_LARGE = threading.Lock()  # above 8 megapixels images are decoded one at a time: threads share the memory


def open_image(source, size=None):
    """Path, bytes of an image file, or uint8 array (H, W[, C]) -> a Pillow image of at most MAX_PIXELS.

    Only the header is read. size: a JPEG may be decoded smaller, but no smaller than twice this.
    """
    if isinstance(source, np.ndarray):
        check_pixels(source.shape[1], source.shape[0])  # it is copied next
        return Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source)
    in_memory = isinstance(source, bytes)
    n_bytes = len(source) if in_memory else os.path.getsize(source)
    if not in_memory and not os.path.isfile(source):  # a pipe would keep the program waiting
        raise ValueError(f"a {'directory' if os.path.isdir(source) else 'pipe or a device'}, no file")
    if not 0 < n_bytes <= 256 << 20:
        raise ValueError("too large, 256 MB or more" if n_bytes else "empty, 0 bytes")
    image = Image.open(io.BytesIO(source) if in_memory else source, formats=FORMATS)
    # The decoder keeps all of a progressive JPEG, however small the result.
    if size and not (image.info.get("progressive") and image.width * image.height > MAX_PIXELS):
        image.draft("RGB", (2 * size, 2 * size))
    check_pixels(image.width, image.height)
    return image


def check_pixels(width, height):
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,} (VQLCMD_MAX_PIXELS)")


def load_image(source, size=None):
    """Path, bytes of an image file, or uint8 array (H, W[, 1, 3 or 4]) -> (3, size, size) uint8 array.

    Upright (EXIF), RGB, over white, first frame, centre square, antialiased resize (ours). With size None it
    keeps its own size, (3, H, W). UserError says why not.
    """
    if isinstance(source, np.ndarray) and source.shape == (size, size, 3):
        return source.transpose(2, 0, 1)
    try:
        with open_image(source, size) as image:
            large = image.width * image.height > 8_000_000
            with ONE_LARGE if large else contextlib.nullcontext():
                return to_pixels(image, size)
    except Exception as error:  # decoders raise a dozen types on damaged files; all mean the same
        raise UserError(why_not(error)) from error


def to_pixels(image, size):
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels, a side of less than {MIN_SIDE}")
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data, of whatever kind, beside sound pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
        grey = np.asarray(image, dtype=np.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        resample = Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC
        image = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.array(image).transpose(2, 0, 1)


def why_not(error):
    """A few words for skipped.txt, without the path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a format that is known"
    if isinstance(error, FileNotFoundError) and os.path.islink(error.filename or ""):
        return "a link to nothing"
    return getattr(error, "strerror", None) or reason_of(error)


@functools.cache
def decoders():
    return ThreadPoolExecutor(WORKERS, "decode")  # threads: Pillow works outside Python's lock


def decode_all(read, items, size, store, progress=False):
    """Decodes read(i) for each i of items, and calls store(position, pixels). -> {position: why not}."""
    bad = {}

    def decode(positions):
        for at in positions:
            try:
                store(at, load_image(read(items[at]), size))
            except Exception as error:  # load_image's, or the form's own on the way to the bytes
                bad[at] = why_not(error)
        return len(positions)

    n = len(items)
    chunk = max(1, min(16, n // (4 * WORKERS)), n // 10_000)  # images a job: a million jobs would fill memory
    jobs = [range(i, min(i + chunk, n)) for i in range(0, n, chunk)]
    with tqdm(total=n, desc="decoding", unit="img", leave=False, disable=None if progress else True) as bar:
        for done in decoders().map(decode, jobs):
            bar.update(done)
    return dict(sorted(bad.items()))


class ImageSet:
    """N labelled images of S x S pixels.

    labels: (N,) int64. class_names: empty where there are none, and then all labels are 0. pixels: uint8
    tensor (N, 3, S, S), or None, and then source.read(items[i]) is decoded when a batch needs it.
    """

    def __init__(self, labels, class_names, size, pixels=None, source=None, items=None):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names, self.size = class_names, size
        self.pixels, self.source, self.items = pixels, source, items

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """Sequence of indices -> images (B, 3, S, S) uint8."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(indices)]
        indices = [int(i) for i in indices]
        pixels = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        bad = decode_all(self.source.read, self.items[indices], self.size, pixels.__setitem__)
        for at, reason in bad.items():
            pixels[at] = self.replacement(indices[at], reason)
        return torch.from_numpy(pixels)

    def replacement(self, i, reason):
        """Pixels (3, S, S) for image i, which was sound before: the next of its class that can be read."""
        title = self.source.title(self.items[i])
        tqdm.write(f"{title}: {reason}; it was sound before. Its neighbour takes its place")
        alike = torch.nonzero(self.labels == self.labels[i]).flatten().tolist()
        for other in np.roll(alike, -alike.index(i))[1:100]:
            with contextlib.suppress(Exception):  # whatever keeps this one from being read
                return load_image(self.source.read(self.items[other]), self.size)
        raise UserError(f"{title} and its neighbours can no longer be read ({reason}): is the disk there?")


def image_batches(images, config, seed, first_step, steps, device):
    """This rank's uint8 images (B / world, 3, H, W) of an ImageSet for each step; a thread reads ahead.

    For a GPU they lie in pinned memory, from which they are copied without waiting.
    """
    (rank, world), B = rank_and_world(), config["tokenizer_batch"]
    mine = slice(rank * B // world, (rank + 1) * B // world)

    def read(step):
        batch = images.batch(batch_indices(len(images), B, seed, "tokenizer", step)[mine])
        if config["flip"]:
            flips = torch.rand(B, 1, 1, 1, generator=generator_for(seed, "flips", step))[mine] < 0.5
            batch = torch.where(flips, batch.flip(3), batch)
        return batch.pin_memory() if device.type == "cuda" else batch

    return look_ahead(read, range(first_step, steps))


class Source:
    """A collection of images, listed but not decoded.

    A subclass lists the images in self.names, and has read(i): image number i as load_image takes it, a path,
    bytes or an array. Several threads call it. labels: (n,) of all images. train, test: (n,) numbers of the
    images of each split; without test some are held out. skipped: {title: why not}, after load.
    """

    note = ""
    dataset = names = sides = None
    skipped = {}  # replaced, never filled

    def __init__(self, path, class_names, labels, train, test=None):
        self.path, self.class_names, self.labels = Path(path), class_names, np.asarray(labels, np.int64)
        self.name = printable(self.path.resolve().stem if self.path.is_file() else self.path.resolve().name)
        self.total = len(train)  # as publishers count them
        if test is None or not len(test):
            if len(train) < 2:
                raise UserError(f"{len(train)} image in {self.path}: two are needed, one of them to hold out")
            every = max(20, len(train) // 2000)  # where images are sorted by class, every 20th of a class too
            held_out = np.arange(min(every, len(train)) // 2, len(train), every)
            train, test = np.delete(train, held_out), np.asarray(train)[held_out]
        self.train, self.test = np.asarray(train, np.int64), np.asarray(test, np.int64)

    def title(self, i):
        """Name of image number i within the set, for lists and messages; the same wherever the set lies."""
        return printable(self.names[i]) if self.names else f"image {i}"

    def counts(self):
        return len(self.train), len(self.test)

    def sizes(self, at_most=200):
        """(smallest, median, largest) shorter side in pixels, from the headers of some images."""
        if self.sides is None:
            sides, reason = [], None
            for i in self.train[::max(1, len(self.train) // at_most)][:at_most]:
                try:
                    with open_image(self.read(i)) as image:
                        sides.append(min(image.size))
                except Exception as error:  # it will be on the list of bad files
                    reason = f"{self.title(i)} ({why_not(error)})"
            if not sides:
                raise UserError(f"no image in {self.path} can be read, e.g. {reason}: repair them")
            self.sides = min(sides), int(np.median(sides)), max(sides)
        return self.sides

    def describe(self):
        """What was found, in a few lines."""
        (n_train, n_test), (low, median, high) = self.counts(), self.sizes()
        used = self.labels[np.concatenate([self.train, self.test])]
        counts = np.bincount(used, minlength=len(self.class_names))
        some = [f"{name} ({count:,})" for name, count in zip(self.class_names, counts, strict=False)]
        some[8:] = ["..."] if len(some) > 8 else []
        classes = f"{len(self.class_names)} classes: {', '.join(some)}" if some else "no classes"
        pixels = f"{low} px" if low == high else f"{low} to {high} px, median {median}"
        where = printable(self.path)
        return (f"{where}: {n_train:,} images + {n_test:,} held out, {classes}, shorter side {pixels}\n"
                f"  first: {where}/{self.title(self.train[0])}\n  {self.note}").rstrip()

    def load(self, size, skipped=None):
        """-> (train, test) ImageSets of the images that can be decoded.

        skipped: {title: why not} of an earlier load, perhaps empty; None: find out, by decoding every image.
        """
        self.skipped, sets = dict(skipped or {}), []
        for split in (self.train, self.test):
            if skipped:
                split = np.array([i for i in split if self.title(i) not in skipped], dtype=np.int64)
            in_memory = len(split) * 3 * size ** 2 <= IN_MEMORY_BYTES
            pixels = np.empty((len(split), 3, size, size) if in_memory else 0, np.uint8)
            bad = {}
            if in_memory or skipped is None:
                store = pixels.__setitem__ if in_memory else lambda at, image: None
                bad = decode_all(self.read, split, size, store, progress=True)
            if bad and skipped is None:
                self.skipped |= {self.title(split[at]): reason for at, reason in bad.items()}
                good = np.delete(np.arange(len(split)), list(bad))
                split, pixels, bad = split[good], pixels[good] if in_memory else pixels, {}
            tensor = torch.from_numpy(pixels) if in_memory else None
            images = ImageSet(self.labels[split], self.class_names, size, tensor, self, split)
            for at, reason in bad.items():
                pixels[at] = images.replacement(at, reason)
            sets.append(images)
        if not all(map(len, sets)):
            example = next(iter(self.skipped.items()))
            raise UserError(f"{self.path}: too few images are left, {len(self.skipped):,} cannot be used, "
                            f"e.g. {': '.join(example)}: repair them or take them out")
        return tuple(sets)


if __name__ == "__main__":
    from extras.datasets import main
    main()
