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
import tarfile
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import validate
from engine.validate import UserError
from extras import data_cifar
from extras.datasets import DATASETS, find
from extras.toy import Toy, draw_toy
from tests.common import (
    call,
    make_folder,
    noise,
    pixels_of,
    png,
    write_cifar,
    write_idx,
    write_images,
    write_lmdb,
    write_zip,
)

NAMES = [f"{i}.png" for i in range(6)]


def test_toy():
    """The same images for the same seed, twelve classes; train and test apart."""
    images, labels = draw_toy(240, seed=0)
    assert images.shape == (240, 3, 20, 20) and torch.equal(images[:120], draw_toy(120, seed=0)[0])
    assert len({image.numpy().tobytes() for image in (*images, *draw_toy(240, seed=1)[0])}) == 480
    assert labels.tolist() == [i % 12 for i in range(240)] and len(Toy.class_names) == 12
    assert Toy().counts() == (18000, 1800)


# ----------------------------------------------------------------------------
# From a file to pixels.

def encode(image, form="png", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


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
    (encode(grey([0, 255] * 32, 64)), 8, 127, 127),  # antialiased: no stripes
    (encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), 4, 255, 255),  # clear: white
    (encode(Image.new("RGBA", (8, 8), (0, 0, 0, 51))), 8, 204, 204),  # a fifth of black over white
    (encode(Image.fromarray(np.full((8, 8), 25700, np.uint16))), 4, 100, 100),  # 16 bits
    (encode(np.stack([40 + 0 * HALF, 255 * HALF], -1)), 8, 255, 40),  # grey with alpha
    (encode(PALETTE, transparency=0), 8, 255, (0, 100, 0)),
    (encode(255 - 255 * HALF, "jpeg", exif=UPSIDE_DOWN, quality=100), 8, 0, 255),
    (encode(RED.convert("CMYK"), "jpeg", quality=100), 8, (255, 0, 0), (255, 0, 0)),
    (encode(RED.convert("P")), 8, (255, 0, 0), (255, 0, 0)),
    (encode(RED, "gif", save_all=True, append_images=[PALETTE]), 8, (255, 0, 0), (255, 0, 0)),
    (encode(RED, exif=b"Exif\0\0no directory of tags"), 8, (255, 0, 0), (255, 0, 0)),
    (encode(RED.resize((7752, 7752)), "jpeg"), 8, (255, 0, 0), (255, 0, 0)),  # 60 megapixels
    (grey([7] * 5, 5)[:, :, None], None, 7, 7)], ids=range(15))
def test_load_image(source, size, top, bottom, tmp_path):
    pixels = data.load_image(source, size).astype(int)
    assert pixels.shape == (3, size or 5, size or 5)
    for row, colour in ((0, top), (-1, bottom)):
        assert np.abs(pixels[:, row] - np.broadcast_to(colour, 3)[:, None]).max() < 14
    if isinstance(source, bytes):
        (tmp_path / "a").write_bytes(source)
        assert np.array_equal(pixels, data.load_image(tmp_path / "a", size))


def test_large_jpegs_are_decoded_smaller():
    """No smaller than twice the size: a JPEG decoded at 1/16 would be another picture."""
    y, x = np.mgrid[:512, :512] / 512
    waves = np.uint8(127.5 + 100 * np.sin(2 * np.pi * 14 * x) * np.cos(2 * np.pi * 11 * y))
    exact = np.asarray(Image.fromarray(waves).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(data.load_image(encode(waves, "jpeg", quality=98), 32)[0] - exact).mean() < 4
    assert data.open_image(encode(waves, "jpeg"), 32).size == (64, 64)


# ----------------------------------------------------------------------------
# Forms and layouts.

@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    images, names = noise(44, 32, 32), [f"{'ab'[i // 22]}/{i:02d}.png" for i in range(44)]
    return images, names, write_images(tmp_path_factory.mktemp("data") / "folder", names, images)


def pngs(names, images):
    return {name: png(image) for name, image in zip(names, images, strict=True)}


LABELS = [0] * 22 + [1] * 22
FORMS = {
    "zip": (lambda p, x, n: write_zip(p / "a.zip", pngs(n, x)), ["a", "b"]),
    "around.zip": (lambda p, x, n: write_zip(p / "b.zip", pngs([f"all/{m}" for m in n], x)), ["a", "b"]),
    "stylegan.zip": (lambda p, x, n: write_zip(p / "c.zip", pngs(n, x) | {"dataset.json": json.dumps(
        {"labels": [[name, label] for name, label in zip(n, LABELS, strict=True)]})}), ["0", "1"]),
    "lmdb": (lambda p, x, n: write_lmdb(p / "x_lmdb", x), []),
    "hwc.npy": (lambda p, x, n: np.save(p / "a.npy", x) or p / "a.npy", []),
    "chw.npy": (lambda p, x, n: np.save(p / "b.npy", x.transpose(0, 3, 1, 2)) or p / "b.npy", []),
    "npz": (lambda p, x, n: np.savez(p / "c.npz", images=x, labels=LABELS) or p / "c.npz", ["0", "1"])}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, folder_of, tmp_path):
    """The same images are the same pixels, labels and splits in every form."""
    images, names, root = folder_of
    write, classes = FORMS[form]
    folder, source = find(root), find(write(tmp_path, images, names))
    pixels, labels = pixels_of(folder, 8)
    assert labels.tolist() == LABELS
    assert torch.equal(pixels_of(folder, 32)[0], torch.from_numpy(images).permute(0, 3, 1, 2))
    assert source.class_names == classes and source.counts() == folder.counts() == (42, 2)
    other_pixels, other_labels = pixels_of(source, 8)
    assert torch.equal(other_pixels, pixels) and torch.equal(other_labels, labels * bool(classes))
    assert source.sizes() == (32, 32, 32) and "first: " in source.describe()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind, ending", [("python", ""), ("binary", ".bin")])
def test_cifar(kind, ending, packed, folder_of, tmp_path):
    """Python and binary batches, in a folder or the archive; their path, or what is around it."""
    images = folder_of[0][:42]
    path = write_cifar(tmp_path / "x" / f"cifar-10-batches-{kind[:3].replace('pyt', 'py')}", images, ending)
    if packed:
        with tarfile.open(path.with_name(f"cifar-10-{kind}.tar.gz"), "w:gz") as archive:
            archive.add(path, path.name)
        shutil.rmtree(path)
    for source in find(next(path.parent.iterdir())), find(path.parent):
        pixels, labels = pixels_of(source, 32)
        assert source.counts() == (35, 7) and source.class_names[3] == "cat"
        assert torch.equal(pixels, torch.from_numpy(images).permute(0, 3, 1, 2))
        assert labels.tolist() == [i % 10 for i in range(42)]


@pytest.mark.parametrize("gzipped", [False, True])
def test_idx(gzipped, tmp_path):
    images = noise(44, 28, 28)[..., 0]
    source = find(write_idx(tmp_path / "MNIST" / "raw", images[:40], images[40:], gzipped))
    pixels, labels = pixels_of(source, 28)
    assert source.counts() == (40, 4) and labels.tolist() == [i % 10 for i in range(40)] + [0, 1, 2, 3]
    assert torch.equal(pixels, torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1))


def test_arrays_with_their_own_splits(folder_of, tmp_path):
    """As MedMNIST names them."""
    images, labels = folder_of[0], np.array(LABELS)[:, None]
    np.savez(tmp_path / "d.npz", train_images=images[:30], train_labels=labels[:30], val_images=images[30:40],
             test_images=images[40:], test_labels=labels[40:])
    source = find(tmp_path / "d.npz")
    assert source.counts() == (30, 4) and source.load(8)[1].labels.tolist() == [1] * 4


def test_folder(tmp_path, monkeypatch):
    """Classes are the immediate sub-folders; each image is in one split; decoding on demand is the same."""
    source = find(make_folder(tmp_path / "a"))
    train_set, test_set = source.load(8)
    assert source.counts() == (38, 2) == (len(train_set), len(test_set))
    assert sorted([*source.train, *source.test]) == list(range(40)) and len(set(source.names)) == 40
    assert train_set.labels.bincount().tolist() == [19, 19] and test_set.labels.tolist() == [0, 1]
    assert "38 images + 2 held out, 2 classes: cat (20), dog (20), shorter side 10 px" in source.describe()
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    on_demand, _ = source.load(8)
    assert torch.equal(on_demand.batch([5, 0, 37]), train_set.pixels[[5, 0, 37]])


IMAGENET = [f"train/n0144{i % 3}/{i}.png" for i in range(6)], ["n01440", "n01441", "n01442"]


@pytest.mark.parametrize("names, classes, counts, note", [
    ([f"{i // 3 * 1000:05d}/{i:05d}.png" for i in range(6)], [], (5, 1), ""),  # FFHQ
    ([f"{i}.png" for i in range(20)], [], (19, 1), ""),
    (IMAGENET[0] + ["val/1.png"], IMAGENET[1], (5, 1), "val/ has no class sub-folders"),
    (IMAGENET[0] + ["val/n01441/x.png"], IMAGENET[1], (6, 1), ""),
    ([f"{c}/{i}.png" for c in ("bus", "train") for i in range(20)], ["bus", "train"], (38, 2), ""),
    (["n00000001/1.png", "n00000002/2.png"], ["n00000001 tench", "n00000002"], (1, 1), ""),
    (["a/1.png", "a/2.png", "b/3.png", "c.HEIC"], ["a", "b"], (2, 1), "left out: 1 .heic (convert them"),
    (["._a/1.png", ".b/2.png", "__MACOSX/3.png", "c/4.png", "c/5.png"], [], (1, 1), "")])
def test_layouts(names, classes, counts, note, tmp_path):
    write_images(tmp_path / "x", names, noise(len(names)))
    (tmp_path / "words.txt").write_text("n00000001\ttench, Tinca tinca\nn00000003\tshark\n")
    (tmp_path / "x" / "up").symlink_to(tmp_path / "x")  # a link back ends
    source = find(tmp_path / "x")
    assert source.class_names == classes and source.counts() == counts and note in source.note


def test_lsun_by_name(tmp_path):
    write_lmdb(tmp_path / "lsun" / "church_outdoor_val_lmdb", noise(2))
    train = write_lmdb(tmp_path / "lsun" / "church_outdoor_train_lmdb", noise(6))
    source = find("lsun-churches", tmp_path)
    train_set, test_set = source.load(10)
    assert source.counts() == (6, 2) and torch.equal(test_set.pixels, train_set.pixels[:2])
    assert "6 images, but 126,227 are published: is it complete?" in source.describe()
    assert [path.name for path in train.iterdir()] == ["data.mdb"]  # read-only, without a lock
    other = write_lmdb(tmp_path / "other", noise(6))
    with mock.patch.dict("sys.modules", lmdb=None), pytest.raises(UserError, match="pip install lmdb"):
        find(other)


# ----------------------------------------------------------------------------
# Names and downloads.

@pytest.mark.parametrize("name", DATASETS)
def test_a_name_without_its_data(name, tmp_path, capsys, monkeypatch):
    """What it is, its licence, where and how to get it, the layout; status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert call("data.py", name, "--root", tmp_path / "nowhere") == 2
    error, facts = capsys.readouterr().err, DATASETS[name]
    for what in ("what", "licence", "where", "layout", "command"):
        assert facts.get(what, "downloads it") in error
    assert str(tmp_path / "nowhere" / name) in error and f"or data/{name}" in error
    assert f"{facts['count']:,}" in facts["what"] and not list(tmp_path.iterdir())


def test_where_names_are_looked_for(tmp_path, monkeypatch):
    """--root, itself or a folder of sets; $VQLCMD_DATA; data/ here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    images = noise(12, 28, 28)[..., 0]
    for parent in ("data", "env", "root"):
        write_idx(tmp_path / parent / "fashion-mnist", images, images[:len(parent)], False)
    assert find("fashion-mnist").counts() == (12, 4)
    monkeypatch.setenv("VQLCMD_DATA", str(tmp_path / "env"))
    assert find("fashion-mnist").counts() == (12, 3)
    for root in ("root", "root/fashion-mnist"):
        source = find("fashion-mnist", tmp_path / root)
        assert (source.counts(), source.name, source.class_names[9]) == ((12, 4), "fashion-mnist", "boot")
    write_idx(tmp_path / "sets" / "MNIST" / "raw", images, images, False)
    for name in "fashion-mnist", "ffhq":  # another set that lies below --root is not taken for it
        with pytest.raises(UserError, match=f"{name}: not found in"):
            find(name, tmp_path / "sets")
    with pytest.raises(UserError, match="Did you mean ffhq"):
        find("ffqh")


def test_download(server, tmp_path, monkeypatch, capsys):
    """There when it is right, from the first address that has it; else a line says what to do."""
    monkeypatch.setattr(torch.hub, "urlopen", urllib.request.urlopen)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    images = noise(24, 28, 28)[..., 0]
    made = write_idx(tmp_path / "made", images[:20], images[20:], True)
    server.files = {path.name: path.read_bytes() for path in made.iterdir()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in server.files.items()}
    facts = {"files": sums, "urls": [server.url + "gone/", server.url]}
    monkeypatch.setitem(DATASETS, "mnist", DATASETS["mnist"] | facts)
    target, first = tmp_path / "data" / "mnist", next(iter(sums))
    for content in (server.files[first][:100], b"a login page", None):
        honest = server.files.pop(first)
        if content is not None:
            server.files[first] = content
        assert call("data.py", "mnist") == 2
        assert "put it into data/mnist, or name their folder with --root" in capsys.readouterr().err
        assert not list(target.iterdir())
        server.files[first] = honest
    source = find("mnist")
    assert source.counts() == (20, 4) and source.name == "mnist" and len(list(target.iterdir())) == 4
    assert torch.equal(source.load(28)[0].pixels[:, 0], torch.from_numpy(images[:20]))
    server.files.clear()
    assert find("mnist").counts() == (20, 4)  # it is there now


# ----------------------------------------------------------------------------
# Files that lie: each is refused in a line that names it, and takes no memory.

IMAGES, ROWS, HUGE = noise(6, 8, 8), noise(12, 32, 32), 1 << 40
GREY = IMAGES[..., 0]
SAVED = [("image", np.uint8, (3, 8, 8)), ("label", np.int32), ("split", np.uint8)]


def header(shape, descr="|u1", body=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=shape))
    return file.getvalue() + body


def npy(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def npz(**arrays):
    np.savez_compressed(file := io.BytesIO(), **arrays)
    return file.getvalue()


def zipped(**files):
    return write_zip(io.BytesIO(), files).getvalue()


def labels_of(label):
    return json.dumps({"labels": [[name, label] for name in NAMES]}).encode()


def batch(**values):
    honest = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    return pickle.dumps(honest | {key.encode(): value for key, value in values.items()}, 2)


def tar(content, size=None, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo("data_batch_1")
    info.size, info.type = size or len(content), kind
    return gzip.compress(info.tobuf() + content, 1)


def saved(n=4, dtype=SAVED, **values):
    """Rows of data.py --save."""
    rows = np.zeros(n, dtype)
    for name, value in ({"split": np.arange(n) % 2 + 1} | values).items():
        rows[name] = value
    return npy(rows)


# What is written in each form, and the file of it that lies.
FILES = {
    "folder": lambda root: write_images(root, NAMES, IMAGES) / "dataset.json",
    "zip": lambda root: root / "a.zip",
    "npz": lambda root: root / "a.npz",
    "npy": lambda root: root / "a.npy",
    "tar": lambda root: root / "cifar-10-python.tar.gz",
    "idx": lambda root: write_idx(root / "i", GREY, GREY, True) / "train-images-idx3-ubyte.gz",
    "idx labels": lambda root: write_idx(root / "i", GREY, GREY, True) / "t10k-labels-idx1-ubyte.gz",
    "cifar": lambda root: write_cifar(root / "c", ROWS) / "data_batch_2",
    "cifar binary": lambda root: write_cifar(root / "c", ROWS, ".bin") / "data_batch_2.bin",
    "lmdb": lambda root: write_lmdb(root / "l", noise(9, 40, 40)) / "data.mdb"}
FILE = pngs(NAMES, IMAGES)
HONEST = {"zip": zipped(**FILE), "npz": npz(images=IMAGES), "npy": saved(), "folder": labels_of(0),
          "tar": tar(batch())}
SIZES = bytes([0, 0, 8, 3]) + struct.pack(">3I", 1 << 31, 28, 28)
IDX = bytes([0, 0, 8, 3]) + struct.pack(">3I", *GREY.shape) + GREY.tobytes()
LIES = {form: [b"", b"text" * 999, lambda old: old[:len(old) // 3]] for form in FILES}
LIES["folder"] += [b"[" * 10 ** 5, b"3", b"{}", b'{"labels": [["x.png", 1]]}', b"9" * 9999,
                   b'{"labels": [["0.png", 1, 2]]}']
LIES["folder"] += map(labels_of, (float("inf"), float("nan"), -1, HUGE, 10 ** 30, "1", 0.5))
LIES["zip"] += [lambda old: old[:-22], zipped(a="a"), zipped(**FILE, **{"dataset.json": b" " * (2 << 20)})]
LIES["npz"] += [zipped(**{"images.npy": content}) for content in (
    header((HUGE, 8, 8)), header((-6, 8, 8)), b"text", b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31))]
LIES["npz"] += [npz(**arrays) for arrays in (
    dict(images=np.zeros((1 << 20, 4, 4), np.uint8)), dict(images=np.array([{}])), dict(weights=IMAGES),
    dict(test_images=IMAGES), dict(images=IMAGES[:, :1, :1]))]
LIES["npz"] += [npz(images=IMAGES, labels=np.array(labels)) for labels in (
    [10 ** 8] * 6, [1e30] * 6, [-1] * 6, [0.5] * 6, [float("nan")] * 6, ["a"] * 6, [0] * 5, [], [1j] * 6)]
LIES["npy"] += [header((HUGE, 8, 8)), header((6, 8, 8), body=b"1" * 9), header((6,), "|O"), header((0, 8, 8)),
                b"\x93NUMPY\x01\x00\xff\x20" + b"(" * 0x20ff, npy(IMAGES / 255), npy(IMAGES[..., :2]),
                npy(np.uint8(1)), npy(np.zeros(4, [("x", np.uint16, (4,)), ("label", "i4"), ("test", bool)]))]
LIES["npy"] += [saved(label=-1), saved(label=2 ** 31 - 1), saved(split=1), saved(split=0), saved(0)]
LIES["npy"] += [saved(dtype=[("image", *image), *SAVED[1:]]) for image in (
    (np.uint8, (3, 8, 9)), (np.uint8, (3, 1, 1)), (np.float32, (3, 8, 8)))]
LIES["idx"] += [gzip.compress(content) for content in (
    SIZES, SIZES + b"\0" * (8 << 20), SIZES[:9], SIZES[:8], b"\1" + IDX[1:], IDX[:-1], IDX + b"\0")]
LIES["cifar"] += [pickle.dumps(Path("x"), 2), b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",
                  b"]" * 2000 + b".", b"\x80\x02]r" + struct.pack("<I", 2 ** 31) + b"."]
LIES["cifar"] += [batch(labels=["a", "b"]), batch(labels=[0]), batch(data=np.zeros((2, 3071), np.uint8)),
                  batch(data=[1, 2]), batch(data=np.zeros((2, 3072)))]
LIES["cifar binary"] += [lambda old: old[:-1], lambda old: b"\xc8" + old[1:]]
LIES["tar"] += [tar(b"x", HUGE), tar(b"\0" * 512, HUGE, tarfile.GNUTYPE_LONGNAME), tar(b"\0" * (8 << 20))]


@pytest.mark.parametrize("form", FILES)
def test_files_that_lie(form, tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "MAX_UNPACKED", 1 << 20)
    monkeypatch.setattr(data_cifar, "MAX_STEPS", 1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, lie in enumerate([*LIES[form], None]):
        root = tmp_path / f"lie{number}"
        root.mkdir()
        path = FILES[form](root)
        honest = HONEST.get(form) or path.read_bytes()
        path.unlink(missing_ok=True)
        if lie is None:
            os.mkfifo(path)
        else:
            path.write_bytes(lie(honest) if callable(lie) else lie)
        with pytest.raises(UserError) as caught:
            find(path if path.suffix in (".zip", ".npz", ".npy") else path.parent)
            pytest.fail(f"{form} {number} was taken for an honest file: {lie!r:.200}")
        assert str(caught.value).isprintable() and 20 < len(str(caught.value)) < 700
        assert str(root) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # kB


def test_images_that_lie(tmp_path):
    """What cannot be used is left out; nothing waits or takes memory."""
    content = bytearray(zipped(**pngs(NAMES, IMAGES), **{"bomb.png": b"\0" * (40 << 20)}))
    content[60] ^= 1  # inside the first image
    (tmp_path / "a.zip").write_bytes(content)
    source = find(tmp_path / "a.zip")
    source.load(8)
    assert list(source.skipped) == ["0.png", "bomb.png"] and "would unpack" in source.skipped["bomb.png"]
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "ring.png").symlink_to(tmp_path / "ring.png")
    (tmp_path / "canvas.webp").write_bytes(b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xff" * 6)
    with open(tmp_path / "sparse.webp", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(HUGE)
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="too large" if path.name == "sparse.webp" else None):
            data.load_image(path, 8)
    with pytest.raises(ValueError, match="16000 x 16000 pixels, more than 50,000,000"):
        data.open_image(np.broadcast_to(np.uint8(0), (16000, 16000, 3)))
