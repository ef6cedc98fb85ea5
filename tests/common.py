"""Helpers of the tests: command lines in this process, made-up images in every form, the contents of a run."""

import argparse
import contextlib
import csv
import gc
import gzip
import io
import json
import multiprocessing.forkserver
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
from engine import prepare
from engine import process as engine_process
from engine.status import TIMES

close = torch.testing.assert_close
PROGRAMS = {"train.py": train, "sample.py": extras.sample_command, "fid.py": extras.fid_command,
            "data.py": extras.datasets, "vqvae.py": extras.tokenizer_report,
            "losses.py": extras.two_tokens, "schedule.py": extras.schedule_plot}

os.environ["OMP_NUM_THREADS"] = "1"  # programs that tests start round as those that call() runs
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # pytest -n 2: two processes of one each
train.DRAWS = train.FINAL_DRAWS = 256  # one batch: tests of the programs need no precision
gc.collect()
gc.freeze()  # a million objects that stay: Python need not look through them again and again
FIND_PRICE = prepare.find_price  # a second per run: tests/prices.py is about it, the others do without
prepare.find_price = lambda args, source, config, *_: SimpleNamespace(**{
    name: config[name] for name in ("micro_batch", "eval_batch")})


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


HERE = Path(__file__).resolve().parent.parent


TINY = dict(size=8, f=4, K=8, code_dim=4, tokenizer_width=16, tokenizer_steps=8, tokenizer_batch=4, gan=0.5,
            gan_start=0.1, D=4, width=16, depth=1, heads=2, steps=8, batch=6, lr=1e-2, warmup=1, sample_steps=3,
            shift=0.4, rec_fraction=0.25, log_every=2, sample_every=4, save_every=4)


SMALL = dict(tokenizer_width=16, tokenizer_steps=2, tokenizer_batch=2, steps=2, batch=2, width=32, depth=1, heads=2,
             sample_steps=1)


def flags(options):
    """Dict -> command line."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def call(program, *words):
    """main() of a program, in this process, with a command line. Returns its exit status.

    program: its file, such as "train.py"; of an experiment the module.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    engine_process.SIGNALS.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are tiny: threads would wait for each other
    try:
        with mock.patch.object(sys, "argv", [str(program), *map(str, words)]), mock.patch.object(os, "fsync"):
            PROGRAMS.get(program, program).main()
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


PROCESSES = multiprocessing.get_context("forkserver")  # one process imports torch; the others are forked from it
PROCESSES.set_forkserver_preload(["tests.common"])


def forkserver():
    """What starts processes in a moment."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):  # where the first of them finds what to import
        multiprocessing.forkserver.ensure_running()
    return PROCESSES


def start_processes(function, *args, n=1, wait=None):
    """function(*args), or function(rank, *args) for n > 1, in processes of their own -> those processes.

    wait: seconds to wait for them, all of which must end well.
    """
    processes = [forkserver().Process(target=function, args=args if n == 1 else (rank, *args)) for rank in range(n)]
    for process in processes:
        process.start()
    if wait is not None:
        for process in processes:
            process.join(wait)
        assert [process.exitcode for process in processes] == [0] * n
    return processes


def free_ports(n):
    """n ports that processes may listen on later. Not from those that the system gives away meanwhile, to outgoing
    connections and to servers that ask for any: on Linux these begin at 32768, elsewhere higher up."""
    ports = []
    while len(ports) < n:
        port = random.SystemRandom().randrange(20000, 32000)  # not by a seed, which two processes may share
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports += [port] * (port not in ports)
    return ports


def join_processes(rank, port):
    """In one of two processes: what torchrun tells it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    deadline = time.monotonic() + 20
    while rank and time.monotonic() < deadline:  # PyTorch would try again after half a second
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), 1).close()
        time.sleep(0.005)


def write_to(connection, errors, buffered, function, *args):
    """function(*args) in a process whose output goes into a pipe, and what it says elsewhere into a file."""
    os.dup2(connection.fileno(), 1)
    connection.close()
    sys.stdout, sys.stderr = open(1, "w", -1 if buffered else 1, closefd=False), open(errors, "w", 1)
    status = function(*args)
    sys.stdout.close()  # as Python does at its end
    sys.exit(status)


@contextlib.contextmanager
def piped(errors, function, *args, buffered=False):
    """(process, its output as an open file); at the end of the block the process is killed if it still lives."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process, = start_processes(write_to, writer, errors, buffered, function, *args)
    writer.close()
    with open(os.dup(reader.fileno()), encoding="utf-8") as output:
        reader.close()
        try:
            yield process, output
        finally:
            process.kill()
            process.join()


def contents(out):
    """What a run computed: {file: content}, without speeds, times and its page, checkpoints as bytes of tensors."""
    def tensors(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: tensors(v) for key, v in value.items() if key not in ("config", "optimizer")}
        return [tensors(v) for v in value] if isinstance(value, (list, tuple)) else value

    found = {}
    for path in sorted(out.iterdir()):
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                found[path.name] = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
        elif path.suffix == ".pt":
            found[path.name] = tensors(torch.load(path, weights_only=False))  # our own; and faster
        elif path.name not in ("config.json", "index.html", "run.js", "state.json"):
            found[path.name] = path.read_bytes()
    return found


def weights_of(out):
    """All weights of a run's checkpoint in one vector: the model's, the EMA's, the optimizer's."""
    content = torch.load(out / "ckpt.pt", weights_only=True)
    moments = [value.flatten() for state in content["optimizer"]["state"].values() for value in state.values()]
    return torch.cat([*(v.flatten() for name in ("model", "ema") for v in content[name].values()), *moments])


def scores_of(path):
    return {key: value for key, value in json.loads(path.read_text()).items() if isinstance(value, float)}


def parser_flags(program):
    """All long flags of a program, from its own parser."""
    def caught(parser, *_):
        raise InterruptedError(sorted(a.dest for a in parser._actions if a.option_strings and a.dest != "help"))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", caught), pytest.raises(InterruptedError) as caught:
        PROGRAMS.get(program, program).main()
    return caught.value.args[0]


def make_folder(root, classes=("cat", "dog"), each=20, side=10):
    """A folder of coloured noise: a sub-folder per class, endings in any case, a stray text file."""
    rng = np.random.default_rng(0)
    for name in classes or [""]:
        (root / name / "deep").mkdir(parents=True)
        for i in range(each):
            image = Image.fromarray(rng.integers(0, 256, (side, side + i % 3, 3)).astype(np.uint8))
            image.save(root / name / ("deep" if i % 2 else "") / f"{i:02d}.{('png', 'PNG', 'jpg', 'Bmp')[i % 4]}")
    (root / "notes.txt").write_text("no image")
    return root


def noise(n, height=10, width=10, seed=0):
    """uint8 images (n, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def write_images(root, names, images):
    for name, image in zip(names, images, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(image))
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
            transaction.put(f"{i:040x}".encode(), png(image))
    (path / "lock.mdb").unlink()
    return path


def write_idx(folder, train, test, gzipped):
    """Grey images (n, H, W) as MNIST's four files; image i has the label i mod 10."""
    folder.mkdir(parents=True)
    for stem, images in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(len(images), dtype=np.uint8) % 10)):
            content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            file = folder / f"{stem}-{kind}-ubyte"
            file.with_suffix(".gz" * gzipped).write_bytes(gzip.compress(content) if gzipped else content)
    return folder


def write_cifar(folder, images, ending=""):
    """(6 n, 32, 32, 3) images as CIFAR-10's batches, python or binary (.bin); image i has the label i mod 10."""
    folder.mkdir(parents=True)
    labels = np.arange(len(images)) % 10
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, x, y in zip(names, np.split(rows, 6), np.split(labels, 6), strict=True):
        packed = np.concatenate([y[:, None].astype(np.uint8), x], 1).tobytes()
        (folder / (name + ending)).write_bytes(packed if ending else pickle.dumps({b"data": x, b"labels": y.tolist()},
                                                                                 protocol=2))
    return folder


def pixels_of(source, size):
    """All of a source's pixels and labels in the order of its images."""
    order = np.argsort(np.concatenate([source.train, source.test]))
    sets = source.load(size)
    return torch.cat([s.pixels for s in sets])[order], torch.cat([s.labels for s in sets])[order]


def spoil(root, good):
    """Fifteen entries in root that no image comes of: {name: a word of the reason}."""
    def damaged(form, cut=slice(None), flip=None):
        file = io.BytesIO()
        Image.fromarray(noise(1, 40, 40)[0]).save(file, form)
        content = bytearray(file.getvalue()[cut])
        if flip:
            content[flip] ^= 255
        return bytes(content)

    files = {"truncated.jpg": (damaged("jpeg", slice(900)), "truncated"),
             "truncated.png": (png(good)[:200], "truncated"),
             "truncated.gif": (damaged("gif", slice(1000)), "truncated"),
             "half.webp": (damaged("webp", slice(300)), ""),
             "header.bmp": (damaged("bmp", slice(30)), ""), "checksum.png": (damaged("png", flip=900), ""),
             "empty.png": (b"", "empty"), "empty.jpg": (b"", "empty"), "text.jpg": (b"not an image\n", "no image of"),
             "page.png": (b"<html>404</html>", "no image of"), "dot.png": (png(good[:1, :1]), "1 x 1 pixels, a side"),
             "line.png": (png(noise(1, 300, 2)[0]), "2 x 300 pixels, a side of less than 4")}
    for name, (content, _) in files.items():
        (root / name).write_bytes(content)
    Image.new("1", (10000, 10000)).save(root / "bomb.png")
    (root / "link.png").symlink_to("nowhere.png")
    (root / "x.png").mkdir()
    return {name: reason for name, (_, reason) in files.items()} | {
        "bomb.png": "10000 x 10000 pixels, more than 50,000,000", "link.png": "a link to nothing", "x.png": "directory"}
