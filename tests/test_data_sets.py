"""Data: every form gives the same pixels; damaged files, layouts, names, downloads."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine.process import UserError
from engine.stored import read_skipped
from extras.archives import open_image
from extras.data_forms import Folder
from extras.datasets import DATASETS, find
from extras.downloads import DownloadError
from extras.toy import Toy, draw_toy
from tests.common import (
    TINY,
    call,
    contents,
    flags,
    make_folder,
    noise,
    pixels_of,
    png,
    spoil,
    write_cifar,
    write_idx,
    write_images,
    write_lmdb,
    write_zip,
)

URLOPEN = urllib.request.urlopen


def test_toy():
    """The same images for the same seed, twelve classes in six colours, train and test apart, made in seconds."""
    images, labels = draw_toy(240, seed=0)
    again, _ = draw_toy(120, seed=0)
    other, _ = draw_toy(240, seed=1)
    assert images.shape == (240, 3, 20, 20) and torch.equal(images[:120], again)
    assert not any((other == image).flatten(1).all(1).any() for image in images)
    assert labels.tolist() == [i % 12 for i in range(240)] and len(Toy.class_names) == 12
    assert len({image.numpy().tobytes() for image in images}) == 240
    assert Toy().counts() == (18000, 1800)


def test_load_image(tmp_path):
    """Centre square, antialiased; transparent over white; grey, 16 bits, rotated by EXIF: all become RGB."""
    def pixels(image, size, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return data.load_image(tmp_path / name, size).astype(int)

    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, :4], wide[:, 4:8], wide[:, 8:] = 10, 200, 90
    assert (pixels(Image.fromarray(wide), 4) == 200).all()  # the middle third, nothing of its neighbours
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255  # nearest or plain bilinear sampling would give 0 or 255
    assert np.abs(pixels(Image.fromarray(stripes), 8) - 127.5).max() < 14
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (pixels(clear, 4) == 255).all()
    assert (pixels(Image.fromarray(np.full((8, 8), 25700, np.uint16)), 4) == 100).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    upright = pixels(Image.fromarray(half), 8, "a.jpg", exif=exif, quality=100)
    assert upright[:, :3].max() < 10 and upright[:, 5:].min() > 245


def test_folder(tmp_path, monkeypatch):
    """Classes are the immediate sub-folders; every image is in one split; decoding ahead or on demand is the same."""
    source = find(str(make_folder(tmp_path / "a")))
    train_set, test_set = source.load(8)
    assert source.class_names == ["cat", "dog"] and source.counts() == (38, 2) == (len(train_set), len(test_set))
    assert sorted([*source.train, *source.test]) == list(range(40)) and len(set(source.names)) == 40
    assert torch.bincount(train_set.labels).tolist() == [19, 19] and test_set.labels.tolist() == [0, 1]
    assert "38 images + 2 held out, 2 classes: cat (20), dog (20), shorter side 10 px" in source.describe()
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    on_demand, _ = source.load(8)
    assert on_demand.pixels is None and torch.equal(on_demand.batch([5, 0, 37]), train_set.pixels[[5, 0, 37]])
    flat = find(str(make_folder(tmp_path / "b", classes=())))
    assert flat.class_names == [] and flat.counts() == (19, 1)
    make_folder(tmp_path / "c" / "train")
    make_folder(tmp_path / "c" / "val", each=4)
    split = find(str(tmp_path / "c"))
    assert split.counts() == (40, 8) and split.class_names == ["cat", "dog"]
    trains = find(str(make_folder(tmp_path / "d", classes=("bus", "train"))))  # "train" is a class here
    assert trains.counts() == (38, 2) and trains.class_names == ["bus", "train"]


def test_forms(tmp_path):
    """Folder, zip, LMDB, arrays, idx, CIFAR-10's batches: the same images are the same pixels, labels and splits."""
    images = noise(44, 32, 32)
    names = [f"{'ab'[i // 22]}/{i:02d}.png" for i in range(44)]
    folder = find(str(write_images(tmp_path / "folder", names, images)))
    pixels, labels = pixels_of(folder, 32)
    assert torch.equal(pixels, torch.from_numpy(images).permute(0, 3, 1, 2)) and labels.tolist() == [0] * 22 + [1] * 22
    pixels, _ = pixels_of(folder, 8)
    assert torch.equal(pixels[7], torch.from_numpy(data.load_image(images[7], 8)))
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "b.npy", images.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "c.npz", images=images, labels=labels)
    medical = dict(train_images=images[:30], train_labels=labels[:30, None], val_images=images[30:40],
                   test_images=images[40:], test_labels=labels[40:, None])  # as MedMNIST names them
    np.savez(tmp_path / "d.npz", **medical)
    assert find(str(tmp_path / "d.npz")).counts() == (30, 4)
    np.savez(tmp_path / "e.npz", **{name: medical[name] for name in ("test_images", "test_labels")})
    with pytest.raises(data.DataError, match="e.npz holds test_images, test_labels: expected images"):
        find(str(tmp_path / "e.npz"))
    for path, classes in [(write_zip(tmp_path / "a.zip", files), ["a", "b"]), (tmp_path / "c.npz", ["0", "1"]),
                          (write_zip(tmp_path / "around.zip", {f"all/{k}": v for k, v in files.items()}), ["a", "b"]),
                          (write_lmdb(tmp_path / "x_lmdb", images), []),
                          (tmp_path / "a.npy", []), (tmp_path / "b.npy", [])]:
        source = find(str(path))
        assert source.class_names == classes and source.counts() == folder.counts(), path
        found, numbers = pixels_of(source, 8)
        assert torch.equal(found, pixels) and torch.equal(numbers, labels * bool(classes)), path
        assert source.sizes() == (32, 32, 32) and "first: " in source.describe()
    assert [path.name for path in (tmp_path / "x_lmdb").iterdir()] == ["data.mdb"]  # read-only, without a lock
    for i, (kind, ending) in enumerate([("py", ""), ("bin", ".bin")]):
        cifar = write_cifar(tmp_path / str(i) / f"cifar-10-batches-{kind}", images[:42], ending)
        archive = tmp_path / str(i + 2) / f"cifar-10-{('python', 'binary')[i]}.tar.gz"
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(cifar, cifar.name)
        for path in (cifar, cifar.parent, archive, archive.parent):
            source = find(str(path))
            assert source.counts() == (35, 7) and source.class_names[3] == "cat"
            found, numbers = pixels_of(source, 32)
            assert torch.equal(found, torch.from_numpy(images[:42]).permute(0, 3, 1, 2)), path
            assert numbers.tolist() == [i % 10 for i in range(42)]
    grey = images[:, :28, :28, 0]
    for gzipped in (False, True):
        source = find(str(write_idx(tmp_path / f"idx{gzipped}" / "MNIST" / "raw", grey[:40], grey[40:], gzipped)))
        found, numbers = pixels_of(source, 28)
        assert source.counts() == (40, 4) and torch.equal(found, torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))
        assert numbers.tolist() == [i % 10 for i in range(40)] + [0, 1, 2, 3]


def test_layouts(tmp_path):
    """FFHQ's folders are no classes; ImageNet's are, a flat val/ is left alone; StyleGAN's labels; LSUN's splits."""
    images = noise(6)
    ffhq = find(str(write_images(tmp_path / "f", [f"{i // 3 * 1000:05d}/{i:05d}.png" for i in range(6)], images)))
    assert ffhq.class_names == [] and ffhq.counts() == (5, 1)
    names = [f"train/n0144{i % 3}/n0144{i % 3}_{i}.png" for i in range(6)]
    root = write_images(tmp_path / "i", names, images)
    write_images(root, ["val/ILSVRC2012_val_00000001.png"], images[:1])
    imagenet = find("imagenet", root)
    assert imagenet.class_names == ["n01440", "n01441", "n01442"] and imagenet.counts() == (5, 1)
    for says in ("val/ has no class sub-folders", "6 images, but 1,281,167 are published: is it complete?"):
        assert says in imagenet.describe()
    write_images(root, ["val/n01441/x.png"], images[:1])
    with pytest.raises(data.DataError, match="both must have the same sub-folders"):
        find("imagenet", root)
    (root / "val" / "ILSVRC2012_val_00000001.png").unlink()
    split = find("imagenet", root)
    assert split.counts() == (6, 1) and split.load(8)[1].labels.tolist() == [1]
    names = [f"00000/img{i:08d}.png" for i in range(6)]
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    labels = [[name, i % 4] for i, name in enumerate(names)]
    labelled = find(str(write_zip(tmp_path / "l.zip", files | {"dataset.json": json.dumps({"labels": labels})})))
    assert labelled.class_names == list("0123") and pixels_of(labelled, 8)[1].tolist() == [0, 1, 2, 3, 0, 1]
    plain = find(str(write_zip(tmp_path / "p.zip", files | {"dataset.json": json.dumps({"labels": None})})))
    assert plain.class_names == []
    with pytest.raises(data.DataError, match="has no whole-number label for every image"):
        find(str(write_zip(tmp_path / "q.zip", files | {"dataset.json": json.dumps({"labels": labels[:4]})})))
    write_lmdb(tmp_path / "lsun" / "church_outdoor_val_lmdb", images[:2])
    write_lmdb(tmp_path / "lsun" / "church_outdoor_train_lmdb", images)
    lsun = find("lsun-churches", tmp_path)
    assert lsun.counts() == (6, 2) and torch.equal(lsun.load(10)[1].pixels, lsun.load(10)[0].pixels[:2])
    (tmp_path / "f" / "00000" / "up").symlink_to(tmp_path / "f")  # a loop ends
    assert find(str(tmp_path / "f")).counts() == (5, 1)


def test_damaged_forms(tmp_path):
    """Archives and arrays that are not what they seem: one line says what to do, and no program in a pickle runs."""
    images = noise(6, 32, 32)
    archive = write_zip(tmp_path / "a.zip", {f"{i}.png": png(image) for i, image in enumerate(images)})
    (tmp_path / "half.zip").write_bytes(archive.read_bytes()[:2000])
    write_zip(tmp_path / "text.zip", {"a.txt": "a"})
    np.save(tmp_path / "float.npy", images / 255)
    np.save(tmp_path / "thin.npy", images[..., :2])
    np.save(tmp_path / "object.npy", np.array([{}]))
    np.savez(tmp_path / "other.npz", weights=images)
    np.savez(tmp_path / "labels.npz", images=images, labels=[1, 2])
    idx = write_idx(tmp_path / "idx", images[..., 0], images[..., 0], True)
    (idx / "t10k-labels-idx1-ubyte.gz").unlink()
    cut = write_idx(tmp_path / "cut", images[..., 0], images[..., 0], False)
    (cut / "train-images-idx3-ubyte").write_bytes((cut / "train-images-idx3-ubyte").read_bytes()[:-1])
    evil = write_cifar(tmp_path / "evil", images)
    (evil / "test_batch").write_bytes(pickle.dumps(Path(tmp_path), protocol=2))
    for name, says in [("half.zip", "cannot be read as a zip"), ("text.zip", "it holds only files like .txt"),
                       ("float.npy", "of float64: expected uint8"), ("thin.npy", "none of its axes is 1, 3 or 4"),
                       ("object.npy", "cannot be read as an array"), ("other.npz", "holds weights: expected images"),
                       ("labels.npz", "2 labels for 6 images"), ("idx", "lacks t10k-labels-idx1-ubyte"),
                       ("cut", "is no complete idx file"), ("evil", "it wants pathlib")]:
        with pytest.raises(UserError, match=says) as caught:
            find(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    content = bytearray(archive.read_bytes())
    content[200] ^= 1  # inside the first image
    (tmp_path / "flip.zip").write_bytes(content)
    source = find(str(tmp_path / "flip.zip"))
    source.load(8)
    assert source.skipped == {"0.png": "its checksum in the zip differs"}


@pytest.mark.parametrize("name", DATASETS)
def test_a_name_without_its_data(name, tmp_path, capsys, monkeypatch):
    """What it is, its licence, where it is published, how to get it, the layout; exit status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    assert call("train.py", "--data", name, "--root", tmp_path / "nowhere") == 2
    error, facts = capsys.readouterr().err, DATASETS[name]
    for what in ("what", "licence", "where", "layout", "command"):
        assert facts.get(what, "downloads it") in error
    assert str(tmp_path / "nowhere" / name) in error and f"or data/{name}" in error
    assert f"{facts['count']:,}" in facts["what"] and not list(tmp_path.iterdir())


def test_where_names_are_looked_for(tmp_path, monkeypatch):
    """--root, itself or a folder of sets; $VQLCMD_DATA; data/ here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    grey = noise(12, 28, 28)[..., 0]
    for parent in ("data", "env", "root"):
        write_idx(tmp_path / parent / "fashion-mnist", grey, grey[:len(parent)], False)
    assert find("fashion-mnist").counts() == (12, 4)
    monkeypatch.setenv("VQLCMD_DATA", str(tmp_path / "env"))
    assert find("fashion-mnist").counts() == (12, 3)
    for root in ("root", "root/fashion-mnist"):
        source = find("fashion-mnist", tmp_path / root)
        assert source.counts() == (12, 4) and source.name == "fashion-mnist" and source.class_names[9] == "boot"
    write_idx(tmp_path / "sets" / "MNIST" / "raw", grey, grey, False)
    for name in "fashion-mnist", "ffhq":  # another set that lies below --root is not taken for it
        with pytest.raises(data.DataError, match=f"{name}: not found in"):
            find(name, tmp_path / "sets")


def test_what_can_be_converted(tmp_path):
    """CMYK, palette, first frame of an animation, damaged EXIF, a JPEG of 60 megapixels; from a file or from bytes."""
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    image = Image.fromarray(red)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    image.convert("P").save(tmp_path / "palette.png")
    image.save(tmp_path / "frames.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    image.save(tmp_path / "exif.png", exif=b"Exif\0\0no directory of tags")
    Image.new("RGB", (7752, 7752), (255, 0, 0)).save(tmp_path / "large.jpg")  # 60 megapixels
    for path in tmp_path.iterdir():
        pixels = data.load_image(path, 8)
        assert np.abs(pixels.astype(int) - red.transpose(2, 0, 1)).max() < 4, path
        assert np.array_equal(pixels, data.load_image(path.read_bytes(), 8))


@pytest.mark.parametrize("memory", [2 << 30, 0])
def test_bad_files(memory, tmp_path, capsys, monkeypatch):
    """1,510 entries, 15 of them bad, less than 1 %: the run finishes, skipped.txt names all 15, and none is opened
    again. With --allow-bad so of 150."""
    total, share, allow = (1510, "0.99%", []) if memory else (150, "10.00%", ["--allow-bad"])
    sound = total - 15
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", memory)
    root = tmp_path / "mixed"
    images = noise(sound)
    write_images(root, [f"{i:04d}.png" for i in range(sound - 1)], images[:-1])
    with open(os.fsencode(root) + b"/caf\xe9.png", "wb") as file:  # a name that is no UTF-8
        file.write(png(images[-1]))
    expected = spoil(root, images[0])
    words = ["--data", root, "--out", tmp_path / "out", *allow, *flags(TINY)]
    with mock.patch.object(data, "load_image", side_effect=data.load_image) as opened:
        assert call("train.py", *words, "--no-cache") == 0
    text = capsys.readouterr().out
    where = tmp_path / "out" / "skipped.txt"
    assert f"15 of {total:,} images ({share}) cannot be used and are left out: {where}" in text
    skipped = read_skipped(tmp_path / "out" / "skipped.txt")
    assert set(skipped) == set(expected)
    for title, reason in skipped.items():
        assert expected[title] in reason and len(reason) > 4, title
    assert memory == 0 or opened.call_count == total  # each was decoded once
    assert (tmp_path / "out" / "data.png").exists()
    assert len(np.load(tmp_path / "out" / "tokens.npy", mmap_mode="r")) == sound
    complete = contents(tmp_path / "out")
    for name in ("tokens.npy", "ckpt.pt", "evaluation.csv", "diffusion.csv", "metrics.json"):
        (tmp_path / "out" / name).unlink()
    (root / "0007.png").write_bytes(b"")  # after the check: that stops nothing
    words[1] = os.path.relpath(root)  # the list holds wherever the set is looked at from
    with mock.patch.object(data, "load_image", side_effect=data.load_image) as opened:
        assert call("train.py", *words) == 0
    assert len(np.load(tmp_path / "out" / "tokens.npy", mmap_mode="r")) == sound and opened.call_count < sound + 5
    assert "0007.png: empty, 0 bytes; it was sound before. Its neighbour takes its place" in capsys.readouterr().out
    assert contents(tmp_path / "out")["skipped.txt"] == complete["skipped.txt"]
    with mock.patch.object(Image, "open", side_effect=AssertionError):  # with the tokens there, none is opened again
        assert call("train.py", *words[:-2], "--save-every", 4, "--steps", 9) == 0


def test_too_many_bad_files(tmp_path, capsys, monkeypatch):
    """More than 1 %: status 2 before training, with the list; --allow-bad trains; repaired, it trains without."""
    root, out = make_folder(tmp_path / "pets"), tmp_path / "out"
    locked = root / "cat" / "00.png"
    if os.geteuid():
        locked.chmod(0)
    else:  # for root there is no file that may not be read
        read = Folder.read

        def refuse(self, i):
            if self.names[i] == "cat/00.png":
                raise PermissionError(13, "Permission denied")
            return read(self, i)
        monkeypatch.setattr(Folder, "read", refuse)
    words = ["--data", root, "--out", out, *flags(TINY)]
    assert call("train.py", *words) == 2
    error = capsys.readouterr().err
    assert "1 of 40 images cannot be used, more than 1 %" in error and error.count("\n") == 1
    assert (out / "skipped.txt").read_text() == "cat/00.png\tPermission denied\n"
    assert {path.name for path in out.iterdir()} == {"skipped.txt", ".lock", "images.npy"}
    assert call("train.py", *words, "--allow-bad") == 0
    assert len(np.load(out / "tokens.npy")) == 39
    monkeypatch.undo()
    locked.chmod(0o644)
    shutil.rmtree(out)
    out.mkdir()
    (out / "skipped.txt").write_text("cat/00.png\tPermission denied\n")  # as the refused start left it
    assert call("train.py", *words) == 0
    assert (out / "skipped.txt").read_text() == "" and len(np.load(out / "tokens.npy")) == 40


def test_download(server, tmp_path, monkeypatch, capsys):
    """Resumed where it broke off, checked, and there only when it is right; offline and damaged say what to do."""
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)  # in case that the fixture `weights` is about
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    grey = noise(24, 28, 28)[..., 0]
    made = write_idx(tmp_path / "made", grey[:20], grey[20:], True)
    server.files = {path.name: path.read_bytes() for path in made.iterdir()}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in server.files.items()}
    monkeypatch.setitem(DATASETS, "mnist", DATASETS["mnist"] | {"files": sums, "urls": [server.url]})
    target, first = tmp_path / "data" / "mnist", next(iter(sums))
    server.breaks = [100, 50, 7]  # all three tries of the first file break off
    with pytest.raises(DownloadError, match="the connection broke.*put it into data/mnist, or name.*--root"):
        find("mnist")
    assert [path.name for path in target.iterdir()] == [first + ".part"]
    assert server.asked == [(first, None), (first, "bytes=100-"), (first, "bytes=150-")]
    source = find("mnist")
    assert server.asked[3] == (first, "bytes=157-") and len(server.asked) == 7
    assert source.counts() == (20, 4) and source.name == "mnist" and not list(target.glob("*.part"))
    assert torch.equal(source.load(28)[0].pixels[:, 0], torch.from_numpy(grey[:20]))
    assert find("mnist").counts() == (20, 4) and len(server.asked) == 7  # it is there now
    (target / first).rename(target / (first + ".part"))  # complete, but killed before its name
    find("mnist")
    assert server.asked[7:] == [(first, f"bytes={len(server.files[first])}-")] and (target / first).exists()
    (target / first).unlink()
    server.files[first] = b"a login page"
    assert call("train.py", "--data", "mnist", "--dry-run") == 2
    assert "it was damaged on the way, or changed" in capsys.readouterr().err
    assert first not in {path.name.removesuffix(".part") for path in target.iterdir()}
    server.files.clear()
    with pytest.raises(DownloadError, match="HTTP 404"):
        find("mnist")
    with pytest.raises(data.DataError, match="the same command without --root downloads it"):
        find("mnist", tmp_path / "elsewhere")


def test_what_a_picture_is_cropped_and_laid_over():
    """The middle of tall and of wide ones; palettes with a clear colour, grey with alpha, over white; large JPEGs are
    decoded no smaller than twice the size."""
    def load(array, size, form="png", mode=None, **options):
        file = io.BytesIO()
        Image.fromarray(array, mode).save(file, form, **options)
        return data.load_image(file.getvalue(), size).astype(int)

    bands = np.repeat(np.array([10, 60, 200, 120, 30], np.uint8), 8)
    for turned in (False, True):
        found = load(np.tile(bands[:, None] if not turned else bands, (1, 8) if not turned else (8, 1)), 8)
        assert (found == 200).all() and found.shape == (3, 8, 8)  # 8 of 40 rows, or columns
    assert (load(np.tile(np.array([9, 50, 90, 130], np.uint8).repeat(2), (4, 1)), 4)[0, 0] == [50, 50, 90, 90]).all()
    grey = np.stack([np.full((8, 8), 40), np.repeat([[0], [255]], 4, 0).repeat(8, 1)], -1).astype(np.uint8)
    found = load(grey, 8)  # LA: above clear, below opaque
    assert (found[:, :3] == 255).all() and (found[:, 5:] == 40).all()
    palette = Image.fromarray(np.repeat([[0], [1]], 4, 0).repeat(8, 1).astype(np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 100, 0])
    file = io.BytesIO()
    palette.save(file, "png", transparency=0)
    found = data.load_image(file.getvalue(), 8).astype(int)
    assert (found[:, :3] == 255).all() and (found[:, 5:] == np.array([0, 100, 0])[:, None, None]).all()
    half = np.zeros((8, 8, 4), np.uint8)
    half[..., 3] = 51  # a fifth of black over white
    assert (load(half, 8) == 204).all()
    y, x = np.mgrid[:512, :512] / 512  # fine enough that a JPEG decoded at 1/16 or 1/32 is another picture
    waves = np.uint8(127.5 + 100 * np.sin(2 * np.pi * 14 * x) * np.cos(2 * np.pi * 11 * y))
    exact = np.asarray(Image.fromarray(waves).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(load(waves, 32, "jpeg", quality=98)[0] - exact).mean() < 4
    stream = io.BytesIO()
    Image.fromarray(waves[:256, :256]).save(stream, "jpeg")  # for 32 pixels 64 are enough
    assert open_image(stream.getvalue(), 32).size == (64, 64)
    assert [data.load_image(waves[:n, :n, None].repeat(c, 2), None).shape for n, c in ((5, 1), (6, 3), (7, 4))] == [
        (3, 5, 5), (3, 6, 6), (3, 7, 7)]
