"""How fast are images read, beside a plain loop, and does memory stay flat when there are many?

    python experiments/loader.py                          speed, about two minutes
    python experiments/loader.py --memory 60000           peak memory of reading 1,000 and 60,000 images

Speed: JPEG files of 256 x 256 pixels, made here, are read in four ways, in turn, several times over; the best time of
each counts. The plain loop is what one writes without thinking about speed: open, convert to RGB, crop, resize with
LANCZOS, numpy array, in one process. The end of a line says how many cores data.py really had. Memory:
each count in a process of its own, by the largest resident set.
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
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from extras.datasets import find


def make_jpegs(n, side=256, seed=0):
    """Bytes of n JPEG files: smooth noise with some grain, 34 kB each, about as a photograph of that size."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).resize((side, side))
        grain = np.asarray(coarse) + rng.normal(0, 8, (side, side, 3))
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


def main():
    parser = argparse.ArgumentParser(description="Speed and memory of reading images.")
    parser.add_argument("--n", type=int, default=1000, help="JPEG files (default: 1000)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256], help="default: 32 64 128 256")
    parser.add_argument("--repeat", type=int, default=5, help="times each way is timed (default: 5)")
    parser.add_argument("--memory", type=int, metavar="N", help="measure memory instead, with 1,000 and N images")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.read)
    elif args.memory:
        memory(args)
    else:
        speed(args)


if __name__ == "__main__":
    main()
