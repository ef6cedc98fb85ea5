"""How fast are images read, beside a plain loop, and does memory stay flat when there are many?

    python experiments/loader.py                          speed, about two minutes
    python experiments/loader.py --memory 60000           peak memory of reading 1,000 and 60,000 images
    python experiments/loader.py --photos 2000            steps/s of a tokenizer on JPEG files of 12 megapixels, with
                                                          and without the cache of decoded images

Speed: JPEG files of 256 x 256 pixels, made here, are read in four ways, in turn, several times over; the best time of
each counts. The plain loop is what one writes without thinking about speed: open, convert to RGB, crop, resize with
LANCZOS, numpy array, in one process. The end of a line says how many cores data.py really had. Memory:
each count in a process of its own, by the largest resident set. Photos: 20 files, linked as often as it takes; both
ways in turn, on a set that is kept out of memory, as one of more than 2 GB of pixels is. "batches alone" has no
network: what a GPU, whose step is short, would wait for. Processor time does not mind what else the machine does.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from engine.batches import image_batches
from engine.config import DEFAULTS, PRESETS, describe_models
from engine.randomness import generator_for
from extras.datasets import find
from extras.image_cache import load_through_cache
from extras.published_vqgan import make_tokenizer
from vqvae import tokenizer_step


def make_jpegs(n, sides=(256, 256), seed=0):
    """Bytes of n JPEG files: smooth noise with some grain; 34 kB each, about as a photograph of 256 x 256 pixels."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).resize(sides)
        grain = np.asarray(coarse) + rng.normal(0, 8, (sides[1], sides[0], 3))
        file = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
        yield file.getvalue()


def plain(path, size):
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def in_a_process(job):
    paths, size = job
    return np.stack([data.load_image(path, size) for path in paths])


def speed(args):
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(data.WORKERS) as processes:
        for i, content in enumerate(make_jpegs(args.n)):
            Path(folder, f"{i:05d}.jpg").write_bytes(content)
        source = find(folder)
        items = np.arange(args.n)
        paths = [source.read(i) for i in items]
        print(f"{args.n} JPEG files of 256 x 256 pixels, {os.cpu_count()} cores, milliseconds an image (speed relative "
              "to the plain loop)")
        for size in args.sizes:
            pixels = np.zeros((args.n, 3, size, size), np.uint8)
            jobs = [(paths[i:i + 16], size) for i in range(0, args.n, 16)]
            ways = {"plain loop": lambda s=size: [plain(path, s) for path in paths],
                    "load_image": lambda s=size: [data.load_image(path, s) for path in paths],
                    "processes": lambda j=jobs: list(processes.map(in_a_process, j)),
                    "data.py": lambda s=size, p=pixels: data.decode_all(source.read, items, s, p)}
            best = {name: (float("inf"), 0) for name in ways}
            for _ in range(args.repeat):
                for name, way in ways.items():
                    start, used = time.perf_counter(), time.process_time()
                    way()
                    seconds = time.perf_counter() - start
                    best[name] = min(best[name], (seconds, (time.process_time() - used) / seconds))
            print(f"to {size:3} pixels:  " + "   ".join(
                f"{name} {seconds / args.n * 1e3:.3f} ({best['plain loop'][0] / seconds:.2f}x)"
                for name, (seconds, _) in best.items()) + f"   on {best['data.py'][1]:.2f} cores")


def memory(args):
    """Files are links to, or copies of, 200 JPEG files; checked once and then read in batches, as training does."""
    contents = list(make_jpegs(200))
    with tempfile.TemporaryDirectory() as folder:
        originals = Path(folder, "originals")
        originals.mkdir()
        for i, content in enumerate(contents):
            (originals / f"{i}.jpg").write_bytes(content)
        for n in (1000, args.memory):
            linked, packed = Path(folder, f"{n}"), Path(folder, f"{n}.zip")
            linked.mkdir()
            with zipfile.ZipFile(packed, "w") as archive:
                for i in range(n):
                    os.link(originals / f"{i % 200}.jpg", linked / f"{i:07d}.jpg")
                    archive.writestr(f"{i:07d}.jpg", contents[i % 200])
            for path in (linked, packed):
                subprocess.run([sys.executable, __file__, "--read", path], check=True)


def read(path):
    """As a run reads a set that does not fit into memory: list, check every image, then batches from all over it."""
    data.IN_MEMORY_BYTES = 0
    listed = find(path)
    images, _ = listed.load(64)
    rng = np.random.default_rng(0)
    for _ in range(100):
        images.batch(rng.integers(len(images), size=64))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(images):6} images in a {'zip   ' if path.endswith('.zip') else 'folder'}: peak {peak:.0f} MB")


def photos(args):
    size, batch, device = args.sizes[0], args.batch, torch.device("cpu")
    config = DEFAULTS | PRESETS["32-cpu"] | {"size": size, "tokenizer_batch": batch}
    data.IN_MEMORY_BYTES = 0
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root = Path(folder, "photos")
        root.mkdir()
        for i, content in enumerate(make_jpegs(20, (4000, 3000))):
            (root / f"{i:06d}.jpg").write_bytes(content)
        for i in range(20, args.photos):
            os.link(root / f"{i % 20:06d}.jpg", root / f"{i:06d}.jpg")
        source, path = find(root), Path(folder, "images.npy")
        start = time.perf_counter()
        cached, _ = load_through_cache(source, size, None, path, make=True)
        seconds = time.perf_counter() - start
        print(f"{args.photos} JPEG files of 4000 x 3000 pixels to {size}: the cache takes {seconds:.1f} s to make and "
              f"{path.stat().st_size / 1e9:.2f} GB", flush=True)
        plain, _ = source.load(size, {})
        some = np.arange(0, len(plain), max(1, len(plain) // 40))
        assert torch.equal(plain.batch(some), cached.batch(some))
        torch.manual_seed(0)
        model = make_tokenizer(describe_models(config, 0)["tokenizer"])
        parts = {"tokenizer": model, "optimizer": torch.optim.AdamW(model.parameters())}

        def seconds_per_step(images, train, step):
            batches, times = image_batches(images, config, 0, step, step + args.steps + 1, device), []
            for i, pixels in enumerate(batches):
                if train:
                    tokenizer_step(config, parts, pixels, generator_for(0, "tokenizer", i), 0.5, 1e-4, 1e-4)
                times.append((time.perf_counter(), time.process_time()))
            return (np.array(times[-1]) - times[0]) / args.steps

        found = {}
        for turn in range(args.repeat):
            for train in (False, True):
                for name, images in (("decoded", plain), ("cache", cached)):
                    found.setdefault((train, name), []).append(
                        seconds_per_step(images, train, turn * (args.steps + 1)))
        for train, words in ((False, "batches alone"), (True, "with a tokenizer")):
            (before, used), (after, used_after) = (np.median(found[train, name], 0) for name in ("decoded", "cache"))
            print(f"  {words}: {1 / before:.2f} steps/s of {batch} images decoded each time, {1 / after:.2f} from the "
                  f"cache ({before / after:.1f}x); processor time of a step {1e3 * used:.1f} ms and "
                  f"{1e3 * used_after:.1f} ms ({used / used_after:.1f}x); medians of {args.repeat} turns of "
                  f"{args.steps} steps")


def main():
    parser = argparse.ArgumentParser(description="Speed and memory of reading images.")
    parser.add_argument("--n", type=int, default=1000, help="JPEG files (default: 1000)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256], help="default: 32 64 128 256")
    parser.add_argument("--repeat", type=int, default=5, help="times each way is timed (default: 5)")
    parser.add_argument("--memory", type=int, metavar="N", help="measure memory instead, with 1,000 and N images")
    parser.add_argument("--photos", type=int, metavar="N", help="measure the cache, with N photographs, at the first "
                        "of --sizes")
    parser.add_argument("--batch", type=int, default=32, help="of --photos: images a step (default: 32)")
    parser.add_argument("--steps", type=int, default=10, help="of --photos: steps a turn (default: 10)")
    parser.add_argument("--dir", help="of --photos: where the files are made (default: the system's place)")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.read)
    elif args.photos:
        photos(args)
    elif args.memory:
        memory(args)
    else:
        speed(args)


if __name__ == "__main__":
    main()
