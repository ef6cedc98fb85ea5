"""Helpers of the tests: programs in this process and in others, made-up images, the contents of a run."""

import argparse
import contextlib
import csv
import gc
import gzip
import io
import multiprocessing
import os
import pickle
import random
import signal
import socket
import struct
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo  # which the first step of an optimizer would import, in every process
from PIL import Image

import extras.datasets
import extras.fid_command
import extras.sample_command
import extras.schedule_plot
import extras.tokenizer_report
import extras.two_tokens
import train
from engine import process as engine_process
from engine.status import TIMES
from extras import setup

HERE = Path(__file__).resolve().parent.parent
PROGRAMS = {"train.py": train, "sample.py": extras.sample_command, "fid.py": extras.fid_command,
            "data.py": extras.datasets, "vqvae.py": extras.tokenizer_report, "losses.py": extras.two_tokens,
            "schedule.py": extras.schedule_plot}
TINY = dict(size=8, f=4, K=8, code_dim=4, tokenizer_width=16, tokenizer_steps=8, tokenizer_batch=4, gan=0.5,
            gan_start=0.1, D=4, width=16, depth=1, heads=2, steps=8, batch=6, lr=1e-2, warmup=1, shift=0.4,
            rec_fraction=0.25, sample_steps=3, log_every=2, sample_every=4, save_every=4)
close = torch.testing.assert_close

os.environ["PYTHONPATH"] = str(HERE)  # where processes find what they import
train.DRAWS = 256  # one batch: tests of the programs need no precision
train.FINAL_DRAWS = 256
gc.freeze()  # a million objects that stay: Python need not look through them again and again
ESTIMATE_COST = setup.estimate_cost  # a second per run: tests/test_cost.py is about it, the others do without
setup.estimate_cost = lambda args, source, config, *_: SimpleNamespace(
    micro_batch=config["micro_batch"], eval_batch=config["eval_batch"])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def flags(options):
    """Dict -> command line."""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def call(program, *words):
    """main() of a program, "train.py" or a module, in this process. Returns its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    engine_process.SIGNALS.clear()
    try:
        with mock.patch.object(sys, "argv", [str(program), *map(str, words)]), mock.patch.object(os, "fsync"):
            PROGRAMS.get(program, program).main()
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_tiny(data, out, *words, **options):
    """train.py at the sizes of TINY, in this process. Returns its exit status."""
    return call("train.py", "--data", data, "--out", out, *flags(TINY | options), *words)


def parser_flags(program):
    """Names of all options of a program, from its own parser."""
    parser = argparse.ArgumentParser
    with (mock.patch.object(parser, "parse_args", autospec=True, side_effect=InterruptedError) as spy,
          mock.patch.object(sys, "argv", [str(program)]), pytest.raises(InterruptedError)):
        PROGRAMS.get(program, program).main()
    return sorted(a.dest for a in spy.call_args.args[0]._actions if a.option_strings and a.dest != "help")


def start_processes(function, *args, n=1, wait=None):
    """function(*args), or function(rank, *args) for n > 1, in processes of their own -> those processes.

    wait: seconds to wait for them, all of which must end well.
    """
    context = multiprocessing.get_context("forkserver")  # one imports torch, the others are forked from it
    context.set_forkserver_preload(["tests.common"])
    ranks = [()] if n == 1 else [(rank,) for rank in range(n)]
    processes = [context.Process(target=function, args=(*rank, *args)) for rank in ranks]
    for process in processes:
        process.start()
    if wait is not None:
        for process in processes:
            process.join(wait)
        assert [process.exitcode for process in processes] == [0] * n
    return processes


def free_ports(n):
    """n ports to listen on later, below those that the system gives away meanwhile (from 32768)."""
    ports = set()
    while len(ports) < n:
        port = random.SystemRandom().randrange(20000, 32000)  # not by a seed, which two processes may share
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


def join_processes(rank, port):
    """In one of two processes: what torchrun tells it. The second waits here, half a second less long."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    for _ in range(4000 * rank):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), 1).close()
        time.sleep(0.005)


def rows_of(path):
    """A CSV file as a list of dicts."""
    return list(csv.DictReader(path.read_text().splitlines()))


def contents(out):
    """What a run computed: {file: content}, without speeds, times and its page; tensors as bytes."""
    def tensors(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: tensors(v) for key, v in value.items() if key not in ("config", "optimizer")}
        return [tensors(v) for v in value] if isinstance(value, (list, tuple)) else value

    found = {}
    for path in sorted(out.iterdir()):
        if path.suffix == ".csv":
            found[path.name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(path)]
        elif path.suffix == ".pt":
            found[path.name] = tensors(torch.load(path, weights_only=False))  # three times as fast
        elif path.name not in ("config.json", "index.html", "run.js", "state.json"):
            found[path.name] = path.read_bytes()
    return found


def weights_of(out):
    """All weights of a run's checkpoint in one vector: the model's, the EMA's, the optimizer's."""
    content = torch.load(out / "ckpt.pt", weights_only=True)
    parts = [content["model"], content["ema"], *content["optimizer"]["state"].values()]
    return torch.cat([value.flatten() for part in parts for value in part.values()])


def make_folder(root, classes=("cat", "dog"), each=20, side=10):
    """A folder of noise: a sub-folder per class, endings in any case, a stray text file."""
    rng = np.random.default_rng(0)
    for name in classes or [""]:
        (root / name / "deep").mkdir(parents=True)
        for i in range(each):
            image = Image.fromarray(rng.integers(0, 256, (side, side + i % 3, 3)).astype(np.uint8))
            ending = ("png", "PNG", "jpg", "Bmp")[i % 4]
            image.save(root / name / ("deep" if i % 2 else "") / f"{i:02d}.{ending}")
    (root / "notes.txt").write_text("no image")
    return root


def noise(n, height=10, width=10, seed=0):
    """uint8 images (n, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def encode(image, form="png", **options):
    """The bytes of a file of an image, or of an array."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def write_images(root, names, images):
    for name, image in zip(names, images, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(image))
    return root


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_lmdb(path, images):
    lmdb = pytest.importorskip("lmdb")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for i, image in enumerate(images):
            transaction.put(f"{i:040x}".encode(), encode(image))
    (path / "lock.mdb").unlink()
    return path


def write_idx(folder, train, test, gzipped):
    """Grey images (n, H, W) as MNIST's four files; image i has the label i mod 10."""
    folder.mkdir(parents=True)
    for stem, images in (("train", train), ("t10k", test)):
        labels = np.arange(len(images), dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
            name = f"{stem}-{kind}-ubyte{'.gz' * gzipped}"
            (folder / name).write_bytes(gzip.compress(content) if gzipped else content)
    return folder


def write_cifar(folder, images, ending=""):
    """(6 n, 32, 32, 3) images as CIFAR-10's batches, python or binary (.bin); image i has label i mod 10."""
    folder.mkdir(parents=True)
    labels = np.arange(len(images), dtype=np.uint8) % 10
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, x, y in zip(names, np.split(rows, 6), np.split(labels, 6), strict=True):
        packed = np.concatenate([y[:, None], x], 1).tobytes()
        pickled = pickle.dumps({b"data": x, b"labels": y.tolist()}, protocol=2)
        (folder / (name + ending)).write_bytes(packed if ending else pickled)
    return folder


def pixels_of(source, size):
    """All of a source's pixels and labels in the order of its images."""
    order = np.argsort(np.concatenate([source.train, source.test]))
    sets = source.load(size)
    return torch.cat([s.pixels for s in sets])[order], torch.cat([s.labels for s in sets])[order]


def spoil(root, good):
    """Fifteen entries in root that no image comes of: {name: a word of the reason}."""
    large = noise(1, 40, 40)[0]
    checksum = bytearray(encode(large))
    checksum[900] ^= 255
    files = {f"truncated.{form}": encode(large, form)[:900] for form in ("jpeg", "gif", "png")}
    files |= {"half.webp": encode(large, "webp")[:300], "header.bmp": encode(large, "bmp")[:30],
              "checksum.png": checksum, "empty.png": b"", "empty.jpg": b"", "text.jpg": b"not an image\n",
              "page.png": b"<html>404</html>", "dot.png": encode(good[:1, :1]),
              "line.png": encode(noise(1, 300, 2)[0])}
    for name, content in files.items():
        (root / name).write_bytes(content)
    Image.new("1", (10000, 10000)).save(root / "bomb.png")
    (root / "link.png").symlink_to("nowhere.png")
    (root / "x.png").mkdir()
    reasons = {"empty": "empty", "truncated": "truncated", "text": "no image of", "page": "no image of",
               "dot": "1 x 1 pixels", "line": "a side of less than 4", "bomb": "10000 x 10000 pixels",
               "link": "a link to nothing", "x": "directory"}
    names = [*files, "bomb.png", "link.png", "x.png"]
    return {name: reasons.get(name.partition(".")[0], "") for name in names}
