"""Data: every form gives the same pixels; layouts, names, downloads; files that are damaged, or lie."""

import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine.validate import UserError
from extras.datasets import DATASETS, find
from extras.toy import Toy, draw_toy
from tests import common
from tests.common import call, encode, noise, pixels_of, write_idx, write_images, write_lmdb, write_zip


def test_toy():
    images, labels = draw_toy(240, seed=0)
    assert torch.equal(images[:120], draw_toy(120, seed=0)[0])
    assert len({image.numpy().tobytes() for image in (*images, *draw_toy(240, seed=1)[0])}) == 480
    assert labels.tolist() == [i % len(Toy.class_names) for i in range(240)]
    toy = Toy()
    toy.n_train = toy.n_test = 12
    train, test = toy.load(8)
    assert not torch.equal(train.pixels, test.pixels)


def grey(values, height=8):
    """Columns of these values, an image (height, n)."""
    return np.tile(np.array(values, np.uint8), (height, 1))


RED, HALF = Image.new("RGB", (8, 8), (255, 0, 0)), np.repeat(np.uint8([0, 1]), 4)[:, None].repeat(8, 1)
UPSIDE_DOWN, PALETTE = Image.Exif(), Image.fromarray(HALF, "P")
UPSIDE_DOWN[0x0112] = 3
PALETTE.putpalette([200, 0, 0, 0, 100, 0])


@pytest.mark.parametrize("source, size, top, bottom", [
    (encode(grey([10] * 4 + [200] * 4 + [90] * 4, 4)), 4, 200, 200),  # the middle third of a wide image
    (encode(grey([10] * 4 + [200] * 4 + [90] * 4, 4).T), 4, 200, 200),  # and of a tall one
    (encode(Image.new("RGBA", (8, 8), (0, 0, 0, 51))), 8, 204, 204),  # a fifth of black over white
    (encode(Image.fromarray(np.full((8, 8), 25700, np.uint16))), 4, 100, 100),  # 16 bits
    (encode(np.stack([40 + 0 * HALF, 255 * HALF], -1)), 8, 255, 40),  # grey with alpha
    (encode(PALETTE, transparency=0), 8, 255, (0, 100, 0)),
    (encode(255 - 255 * HALF, "jpeg", exif=UPSIDE_DOWN, quality=100), 8, 0, 255),
    (encode(RED, "gif", save_all=True, append_images=[PALETTE]), 8, (255, 0, 0), (255, 0, 0)),
    (encode(RED, exif=b"Exif\0\0no directory of tags"), 8, (255, 0, 0), (255, 0, 0)),
    (grey([7] * 5, 5)[:, :, None], None, 7, 7)], ids=range(10))
def test_load_image(source, size, top, bottom):
    pixels = data.load_image(source, size).astype(int)
    assert pixels.shape == (3, size or 5, size or 5)
    for row, colour in ((0, top), (-1, bottom)):
        assert np.abs(pixels[:, row] - np.broadcast_to(colour, 3)[:, None]).max() < 14


def test_large_jpegs_are_decoded_smaller():
    y, x = np.mgrid[:512, :512] / 512
    waves = np.uint8(127.5 + 100 * np.sin(2 * np.pi * 14 * x) * np.cos(2 * np.pi * 11 * y))
    exact = np.asarray(Image.fromarray(waves).resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(data.load_image(encode(waves, "jpeg", quality=98), 64)[0] - exact).mean() < 4
    assert data.open_image(encode(waves, "jpeg"), 64).size == (128, 128)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    images, names = noise(44, 32, 32), [f"{'ab'[i // 22]}/{i:02d}.png" for i in range(44)]
    return images, names, write_images(tmp_path_factory.mktemp("data") / "folder", names, images)


def pngs(names, images):
    return {name: encode(image) for name, image in zip(names, images, strict=True)}


def labels_file(names, labels):
    """StyleGAN's dataset.json."""
    return json.dumps({"labels": list(zip(names, labels, strict=True))}).encode()


def pack_cifar(path, images):
    folder = common.write_cifar(path.parent.parent / "cifar-10-batches", images)
    shutil.make_archive(path.parent / "cifar-10-python", "gztar", folder.parent, folder.name)


LABELS = [0] * 22 + [1] * 22
COLUMN = np.array(LABELS)[:, None]
FORMS = {  # file: (what writes it, its classes, does it say what is held out?)
    "a.zip": (lambda p, x, n: write_zip(p, pngs([f"all/{m}" for m in n], x)), ["a", "b"], False),
    "stylegan.zip": (lambda p, x, n: write_zip(p, pngs(n, x) | {"dataset.json": labels_file(n, LABELS)}),
                     ["0", "1"], False),
    "x_lmdb": (lambda p, x, n: write_lmdb(p, x), [], False),
    "hwc.npy": (lambda p, x, n: np.save(p, x), [], False),
    "chw.npy": (lambda p, x, n: np.save(p, x.transpose(0, 3, 1, 2)), [], False),
    "a.npz": (lambda p, x, n: np.savez(p, images=x, labels=LABELS), ["0", "1"], False),
    "splits.npz": (lambda p, x, n: np.savez(p, train_images=x[:42], train_labels=COLUMN[:42],  # as MedMNIST
                                            test_images=x[42:], test_labels=COLUMN[42:]), ["0", "1"], True)}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name, folder_of, tmp_path):
    """The same images are the same pixels, labels and splits in every form."""
    images, names, root = folder_of
    write, classes, splits = FORMS[name]
    write(tmp_path / name, images, names)
    folder, source = find(root), find(tmp_path / name)
    assert source.class_names == classes and source.counts() == folder.counts() == (42, 2)
    assert source.test.tolist() == ([42, 43] if splits else folder.test.tolist())
    assert source.sizes() == (32, 32, 32)
    pixels, labels = pixels_of(source, 32)
    assert torch.equal(pixels, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert labels.tolist() == (LABELS if classes else [0] * 44)


@pytest.mark.parametrize("name, write", [
    ("cifar-10-batches-py", lambda path, x: common.write_cifar(path, x)),
    ("cifar-10-batches-bin", lambda path, x: common.write_cifar(path, x, ".bin")),
    ("cifar-10-python.tar.gz", lambda path, x: pack_cifar(path, x)),
    ("MNIST/raw", lambda path, x: write_idx(path, x[:35, ..., 0], x[35:, ..., 0], False))])
def test_cifar_and_idx(name, write, folder_of, tmp_path):
    """CIFAR-10's batches and archive, MNIST's files; their path, or what is around it."""
    images = folder_of[0][:42]
    if name == "MNIST/raw":
        images = images[..., :1].repeat(3, -1)
    write(tmp_path / "x" / name, images)
    for path in (tmp_path / "x" / name, tmp_path / "x"):
        source = find(path)
        pixels, labels = pixels_of(source, 32)
        assert source.counts() == (35, 7) and source.class_names[3] in ("3", "cat")
        assert torch.equal(pixels, torch.from_numpy(images).permute(0, 3, 1, 2))
        assert labels[:35].tolist() == [i % 10 for i in range(35)] and len(set(labels[35:].tolist())) == 7


IMAGENET = [f"train/n0144{i % 3}/{i}.png" for i in range(6)], ["n01440", "n01441", "n01442"]


@pytest.mark.parametrize("names, classes, counts, note", [
    ([f"{i // 3 * 1000:05d}/{i:05d}.png" for i in range(6)], [], (5, 1), ""),  # FFHQ
    (IMAGENET[0] + ["val/n01441/x.png"], IMAGENET[1], (6, 1), ""),
    (["train/1.png", "train/2.png", "ship/3.png"], ["ship", "train"], (2, 1), ""),  # a class of trains
    (["a/1.png", "a/2.png", "b/3.png", "c.HEIC"], ["a", "b"], (2, 1), "left out: 1 .heic (convert them"),
    (["._a/1.png", ".b/2.png", "__MACOSX/3.png", "c/4.png", "c/5.png"], [], (1, 1), "")])
def test_layouts(names, classes, counts, note, tmp_path):
    write_images(tmp_path / "x", names, noise(len(names)))
    (tmp_path / "x" / "up").symlink_to(tmp_path / "x")  # a link back ends
    source = find(tmp_path / "x")
    assert source.class_names == classes and source.counts() == counts and note in source.note


def test_classes_of_the_test_folder(tmp_path):
    write_images(tmp_path / "x", ["train/a/1.png", "train/b/2.png", "test/c/3.png"], noise(3))
    with pytest.raises(UserError, match="has the class 'c'"):
        find(tmp_path / "x")


def test_lsun_by_name(tmp_path):
    write_lmdb(tmp_path / "lsun" / "church_outdoor_val_lmdb", noise(2))
    write_lmdb(tmp_path / "lsun" / "church_outdoor_train_lmdb", noise(6))
    source = find("lsun-churches", tmp_path)
    train_set, test_set = source.load(10)
    assert source.counts() == (6, 2) and torch.equal(test_set.pixels, train_set.pixels[:2])


@pytest.mark.parametrize("name", DATASETS)
def test_a_name_without_its_data(name, tmp_path, capsys, monkeypatch):
    """What it is, its licence, where and how to get it; status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert call("data.py", name, "--root", tmp_path / "nowhere") == 2
    error, facts = capsys.readouterr().err, DATASETS[name]
    assert all(facts.get(what, "downloads it") in error for what in ("what", "licence", "where", "command"))
    assert not list(tmp_path.iterdir())


def test_where_names_are_looked_for(tmp_path, monkeypatch):
    """--root, itself or a folder of sets; $VQLCMD_DATA."""
    monkeypatch.chdir(tmp_path)
    images = noise(12, 28, 28)[..., 0]
    for n, folder in enumerate(("data/fashion-mnist", "env/fashion-mnist", "sets/MNIST/raw"), 2):
        write_idx(tmp_path / folder, images, images[:n], False)
    monkeypatch.setenv("VQLCMD_DATA", "env")
    for root, count in ((None, 3), ("data", 2), ("data/fashion-mnist", 2)):
        assert find("fashion-mnist", root).counts() == (12, count)
    with pytest.raises(UserError, match="fashion-mnist: not found in"):
        find("fashion-mnist", "sets")  # another set that lies there is not taken for it


def test_download(server, tmp_path, monkeypatch, capsys):
    """From the first address that has the right file; else a line says what to do."""
    monkeypatch.setattr(torch.hub, "urlopen", urllib.request.urlopen)  # which a fixture took away
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    images = noise(24, 28, 28)[..., 0]
    made = write_idx(tmp_path / "made", images[:20], images[20:], True)
    honest = {path.name: path.read_bytes() for path in made.iterdir()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in honest.items()}
    facts = {"files": sums, "urls": [server.url + "gone/", server.url]}
    monkeypatch.setitem(DATASETS, "mnist", DATASETS["mnist"] | facts)
    for server.files in ({}, dict.fromkeys(sums, b"a login page")):
        assert call("data.py", "mnist") == 2
        assert "put it into data/mnist, or name their folder with --root" in capsys.readouterr().err
        assert not list((tmp_path / "data" / "mnist").iterdir())
    for server.files in (honest, {}):  # the second time it is there
        assert torch.equal(find("mnist").load(28)[0].pixels[:, 0], torch.from_numpy(images[:20]))


IMAGES, ROWS = noise(6, 8, 8), noise(12, 32, 32)
GREY, NAMES = IMAGES[..., 0], [f"{i}.png" for i in range(6)]


def claims(shape):
    """The header of a .npy file of this shape."""
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), {
        "descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def idx(*shape, body=b""):
    return gzip.compress(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + body)


FILE, ZEROS = pngs(NAMES, IMAGES), np.zeros((1 << 20, 4, 4), np.uint8)
FILES = {  # form: what writes an honest one, and gives the file of it that lies
    "folder": lambda root: write_images(root, NAMES, IMAGES) / "dataset.json",
    "zip": lambda root: write_zip(root / "a.zip", FILE),
    "npz": lambda root: root / "a.npz",
    "npy": lambda root: root / "a.npy",
    "idx": lambda root: write_idx(root / "i", GREY, GREY, True) / "train-images-idx3-ubyte.gz",
    "cifar": lambda root: common.write_cifar(root / "c", ROWS) / "data_batch_2",
    "cifar binary": lambda root: common.write_cifar(root / "c", ROWS, ".bin") / "data_batch_2.bin",
    "lmdb": lambda root: write_lmdb(root / "l", noise(9, 40, 40)) / "data.mdb"}
LIES = {
    "folder": [b"[" * 10 ** 5, *(labels_file(NAMES, [label] * 6) for label in (-1, 10 ** 12, "1", 0.5))],
    "zip": [partial(write_zip, files=FILE | {"dataset.json": bytes(2 << 20)})],
    "npz": [partial(write_zip, files={"images.npy": claims((1 << 40, 8, 8))}),
            partial(np.savez_compressed, images=ZEROS), partial(np.savez, images=np.array([{}])),
            partial(np.savez, images=IMAGES, labels=[0.5] * 6),
            partial(np.savez, images=IMAGES, labels=[0] * 5)],
    "npy": [claims((1 << 40, 8, 8)), partial(np.save, arr=IMAGES[:0]), partial(np.save, arr=IMAGES / 255)],
    "idx": [idx(1 << 31, 28, 28), idx(6, 8), idx(6, 8, 8, body=bytes(383)), idx(6, 8, 8, body=bytes(385))],
    "cifar": [pickle.dumps(Path("x"), 2), b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R."],
    "cifar binary": [b"\xc8" + bytes(3072), bytes(3072)]}


@pytest.mark.parametrize("form", FILES)
def test_files_that_lie(form, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.validate.MAX_UNPACKED", 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, lie in enumerate([b"", b"text" * 999, "cut", os.mkfifo, *LIES.get(form, [])]):
        root = tmp_path / f"lie{number}"
        root.mkdir()
        path = FILES[form](root)
        honest = path.read_bytes() if path.exists() else claims((6, 8, 8)) + IMAGES.tobytes()
        path.unlink(missing_ok=True)
        if callable(lie):
            lie(path)
        else:
            path.write_bytes(honest[:len(honest) // 3] if lie == "cut" else lie)
        with pytest.raises(UserError) as caught:
            find(path if path.suffix in (".zip", ".npz", ".npy") else path.parent)
            pytest.fail(f"{form} {number}: {lie!r:.200}")
        text = str(caught.value)
        assert str(root) in text and text.isprintable() and len(text) < 700
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # kB


def test_images_that_lie(tmp_path):
    """What cannot be used is left out; nothing waits or takes memory."""
    content = bytearray(write_zip(tmp_path / "a.zip", FILE | {"bomb.png": bytes(40 << 20)}).read_bytes())
    content[60] ^= 1  # inside the first image
    (tmp_path / "a.zip").write_bytes(content)
    source = find(tmp_path / "a.zip")
    source.load(8)
    assert list(source.skipped) == ["0.png", "bomb.png"]
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "canvas.webp").write_bytes(b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xff" * 6)
    for path in tmp_path.iterdir():
        with pytest.raises(UserError):
            data.load_image(path, 8)
    with pytest.raises(UserError, match="pixels, more than"):  # before it is copied
        data.load_image(np.broadcast_to(np.uint8(0), (1 << 20, 1 << 20, 3)), 8)
