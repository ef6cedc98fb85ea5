"""Files that lie, as data: folders, zips, arrays, the published sets' own forms, images; and the statistics of fid.py.

See tests/lying_files.py. To keep the bombs small, what may be unpacked is limited to a sixteenth here.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import read_back
from engine.process import UserError
from extras import archives, fid_sources, foreign_checkpoint, image_cache
from extras.datasets import find
from tests.common import noise, png, write_cifar, write_idx, write_images, write_zip
from tests.fixtures import Pixels
from tests.test_lying_files import DEEP_HEADER, NASTY, bounded, device, header, npy, pipe, put, refused

UNPACKED = 16 << 20


@pytest.fixture
def small_limit(monkeypatch):
    assert UNPACKED * 16 == read_back.LIMITS["VQLCMD_MAX_UNPACKED_BYTES"][0]
    monkeypatch.setenv("VQLCMD_MAX_UNPACKED_BYTES", str(UNPACKED))


def found(path):
    return find(str(path))


def npz(**arrays):
    def write(folder):
        np.savez_compressed(folder / "a.npz", **arrays)
        return folder / "a.npz"
    return write


def member(content, name="images.npy"):
    return lambda folder: write_zip(folder / "a.npz", {name: content})


def test_folders_and_zips_that_lie(small_limit, tmp_path):
    """A folder, a zip, and StyleGAN's dataset.json in either."""
    names = [f"{i}.png" for i in range(4)]
    files = {name: png(image) for name, image in zip(names, noise(4, 8, 8), strict=True)}

    def index(text):
        def write(folder):
            write_images(folder, names, noise(4, 8, 8))
            put("dataset.json", text)(folder)
        return write

    def labelled(label):
        return index(json.dumps({"labels": [[name, label] for name in names]}))

    def deep(folder):
        here = os.getcwd()
        for _ in range(300):  # the path is longer than a system call takes
            os.chdir(folder)
            os.mkdir(folder := "d" * 20)
        os.chdir(here)

    def ring(name):
        return lambda folder: (folder / name).symlink_to(folder)

    refused({
        "deep index": index("[" * 10 ** 5), "broken": index('{"labels": ['), "no labels": index("{}"),
        "a number": index("3"), "infinite": labelled(float("inf")), "not a number": labelled(float("nan")),
        "negative": labelled(-1), "huge": labelled(10 ** 12), "larger": labelled(10 ** 30), "text": labelled("1"),
        "half": labelled(0.5), "true": labelled(True), "others": index('{"labels": [["x.png", 1]]}'),
        "numbers": index('{"labels": [1, 2, 3, 4]}'), "triples": index('{"labels": [["0.png", 1, 2]]}'),
        "digits": index('{"labels": [["0.png", ' + "9" * 9999 + "]]}"),
        "lists": index('{"labels": [' + "[]," * 5_000_000 + "[]]}"),
        "pipe": lambda folder: index("")(folder) or (folder / "dataset.json").unlink() or (
            pipe("dataset.json")(folder) and None),
        "device": lambda folder: index("")(folder) or (folder / "dataset.json").unlink() or (
            device("dataset.json")(folder) and None),
        "deep": deep, "ring": ring("x_train_lmdb"), "another ring": ring("a.zip"), "a pipe": pipe("data"),
        "a device": device("data"), "empty": lambda folder: None}, found, tmp_path,
        {"deep": "VQLCMD_MAX_DEPTH", "ring": "a link that leads in a circle", "huge": "VQLCMD_MAX_CLASSES"})

    def zipped(change=lambda content: content, **more):
        def write(folder):
            write_zip(folder / "a.zip", files | more)
            return put("a.zip", change((folder / "a.zip").read_bytes()))(folder)
        return write

    def zip64(folder):
        """The first entry of the directory has its sizes in an extra field: 2^63 + 5."""
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        content = (folder / "a.zip").read_bytes()
        at, extra = content.index(b"PK\x01\x02"), struct.pack("<HHQQ", 1, 16, (1 << 63) + 5, (1 << 63) + 5)
        entry = bytearray(content[at:at + 46])
        entry[20:28], entry[30:32] = b"\xff" * 8, struct.pack("<H", len(extra))
        changed = content[:at] + entry + b"0.png" + extra + content[at + 46 + 5:]
        end = changed.index(b"PK\x05\x06")
        size, = struct.unpack_from("<I", changed, end + 12)
        return put("a.zip", changed[:end + 12] + struct.pack("<I", size + len(extra)) + changed[end + 16:])(folder)

    refused({
        "half": zipped(lambda content: content[:200]), "no end": zipped(lambda content: content[:-22]),
        "nothing": put("a.zip"), "zip64": zip64, "pipe": pipe("a.zip"),
        "index": zipped(**{"dataset.json": b" " * (UNPACKED + 1)}),
        "infinite": zipped(**{"dataset.json": '{"labels": [["0.png", 1e999]]}'})}, found, tmp_path)
    bomb = find(str(write_zip(tmp_path / "bomb.zip", files | {"4.png": b"\0" * (40 << 20)})))
    with bounded():
        bomb.load(8)  # of single images the others are trained on
    assert list(bomb.skipped) == ["4.png"] and "set VQLCMD_MAX_PACKED_IMAGE_BYTES=41943040" in bomb.skipped["4.png"]


def test_images_that_lie(tmp_path):
    """None waits, none takes memory; large ones are decoded one at a time, whatever the number of threads."""
    pipe("pipe.png")(tmp_path)
    device("device.png")(tmp_path)
    (tmp_path / "ring.png").symlink_to(tmp_path / "ring.png")
    Image.new("1", (10000, 10000)).save(tmp_path / "pixels.png")
    put("canvas.webp", b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xff")(tmp_path)
    with open(tmp_path / "sparse.webp", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(1 << 40)
    for path in sorted(tmp_path.iterdir()):
        with bounded(), pytest.raises(data.DataError) as caught:
            data.load_image(str(path), 8)
        assert str(caught.value).isprintable(), path
    small, large = archives.open_image(noise(1)[0]), archives.open_image(np.zeros((3000, 3000, 3), np.uint8))
    with archives.one_large_at_a_time(large):
        assert not archives.ONE_LARGE.acquire(blocking=False)
        with archives.one_large_at_a_time(small):
            pass
    assert archives.ONE_LARGE.acquire(blocking=False)
    archives.ONE_LARGE.release()


def test_arrays_that_lie(small_limit, tmp_path, monkeypatch):
    """.npy and .npz."""
    pictures, labels = noise(6, 8, 8), np.arange(6)

    def damaged(folder):
        content = bytearray(npz(images=pictures)(folder).read_bytes())
        content[150:170] = b"\xff" * 20
        return put("a.npz", content)(folder)

    def stored(folder):
        np.savez(folder / "a.npz", images=np.array([{}]))
        return folder / "a.npz"

    kinds = {
        "claims": member(header((1 << 40, 8, 8))), "negative": member(header((-6, 8, 8))), "deep": member(DEEP_HEADER),
        "long": member(b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31)), "no array": member(b"text", "images.txt"),
        "bomb": npz(images=np.zeros((UNPACKED // 16 + 1, 4, 4), np.uint8)), "text": member(b"text"),
        "nothing": member(b""), "damaged": damaged, "half": put("a.npz", b"PK\x03\x04" + b"\0" * 40),
        "dots": npz(images=np.zeros((6, 1, 1, 3), np.uint8)), "objects": stored, "pipe": pipe("a.npz"),
        "names": npz(**{NASTY: pictures})}
    kinds |= {f"labels {i}": npz(images=pictures, labels=np.array(lie)) for i, lie in enumerate((
        labels + 10 ** 8, labels * 1e30, labels - 1, labels + 0.5, labels * float("nan"), ["a"] * 6, labels[:5], [],
        labels + 1j, labels.astype("M8[s]")))}
    refused(kinds, found, tmp_path)
    refused({name: put("a.npy", content) for name, content in {
        "claims": header((1 << 40, 8, 8)), "negative": header((-6, 8, 8)), "cut": header((6, 8, 8), body=b"1" * 9),
        "deep": DEEP_HEADER, "complex": header((6, 8, 8), "<c16", b"1" * 6144), "empty": header((0, 8, 8)),
        "flat": header((64,), body=b"1" * 64), "none": header((), body=b"1"), "void": header((6, 8, 8), "|V0"),
        "nothing": b""}.items()}, found, tmp_path)
    # What is meant can be said.
    np.savez(tmp_path / "many.npz", images=pictures, labels=labels + 200_000)
    with pytest.raises(UserError, match="200,006 classes, more than 100,000; .* set VQLCMD_MAX_CLASSES=200006"):
        found(tmp_path / "many.npz")
    monkeypatch.setenv("VQLCMD_MAX_CLASSES", "200006")
    assert len(found(tmp_path / "many.npz").class_names) == 200_006
    monkeypatch.setenv("VQLCMD_MAX_CLASSES", "many")
    with pytest.raises(UserError, match="VQLCMD_MAX_CLASSES: must be a whole number, is 'many'"):
        found(tmp_path / "many.npz")


def test_idx_files_that_lie(small_limit, tmp_path):
    pictures = noise(6, 8, 8)[..., 0]

    def idx(change, name="train-images-idx3-ubyte.gz"):
        def write(folder):
            made = write_idx(folder / "idx", pictures, pictures, True)
            put(name, change(gzip.decompress((made / name).read_bytes())))(made)
            return made
        return write

    huge = bytes([0, 0, 8, 3]) + struct.pack(">3I", 1 << 31, 28, 28)
    refused({
        "claims": idx(lambda _: gzip.compress(huge)),
        "bomb": idx(lambda _: gzip.compress(huge + b"\0" * (64 << 20), 1)),
        "longer": idx(lambda old: gzip.compress(old + b"\0" * (64 << 20), 1)),
        "shorter": idx(lambda old: gzip.compress(old[:-1])), "header": idx(lambda old: gzip.compress(old[:9])),
        "rank": idx(lambda old: gzip.compress(old[:3] + b"\xff" + old[4:])), "empty": idx(lambda _: b""),
        "no gzip": idx(lambda old: old), "damaged": idx(lambda old: gzip.compress(old)[:-20]),
        "dots": idx(lambda _: gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 99, 1, 1) + b"1" * 99)),
        "labels": idx(lambda old: gzip.compress(old[:-1]), "train-labels-idx1-ubyte.gz")}, found, tmp_path,
        {"claims": "VQLCMD_MAX_UNPACKED_BYTES", "bomb": "VQLCMD_MAX_UNPACKED_BYTES"})


def test_cifar_that_lies(small_limit, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_checkpoint, "MOST_STEPS", 100_000)
    rows = noise(12, 32, 32)

    def cifar(change, ending=""):
        def write(folder):
            made = write_cifar(folder / "cifar", rows, ending)
            put("test_batch" + ending, change((made / ("test_batch" + ending)).read_bytes()))(made)
            return made
        return write

    def batch(**values):
        honest = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
        return cifar(lambda _: pickle.dumps(honest | {name.encode(): value for name, value in values.items()}, 2))

    def tar(name, content, size=None, kind=tarfile.REGTYPE):
        """One member, whose header may claim another size."""
        info = tarfile.TarInfo(name)
        info.size, info.type = size or len(content), kind
        return put("cifar-10-python.tar.gz", gzip.compress(info.tobuf() + content, 1))

    says = dict.fromkeys(("room", "lists"), "more than 100,000 objects")
    says["tar, bomb"] = "VQLCMD_MAX_UNPACKED_BYTES"
    most = b"J\xff\xff\xff\x7f"  # a number of a pickle: 2^31 - 1
    refused({
        "labels": batch(labels=[200, 1]), "negative": batch(labels=[-1, 0]), "text": batch(labels=["a", "b"]),
        "fewer": batch(labels=[0]), "short": batch(data=np.zeros((2, 3071), np.uint8)), "list": batch(data=[1, 2]),
        "float": batch(data=np.zeros((2, 3072))), "no dict": cifar(lambda _: pickle.dumps([1], 2)),
        "claims": cifar(lambda _: b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + (
            most + most + b"\x86U\x01b\x87R.")),
        "ndarray": cifar(lambda _: b"\x80\x02cnumpy\nndarray\n" + most + b"\x85R."),
        "room": cifar(lambda _: b"\x80\x02]r" + struct.pack("<I", 2 ** 31) + b"."),
        "lists": cifar(lambda _: b"]" * 100_009 + b"."), "half": cifar(lambda old: old[:500]),
        "empty": cifar(lambda _: b""), "rows": cifar(lambda old: old[:-1], ".bin"),
        "label": cifar(lambda old: b"\xc8" + old[1:], ".bin"), "tar, size": tar("data_batch_1", b"x", 1 << 40),
        "tar, header": tar("x", b"\0" * 512, 1 << 40, tarfile.XHDTYPE),
        "tar, name": tar("x", b"\0" * 512, 1 << 40, tarfile.GNUTYPE_LONGNAME),
        "tar, bomb": tar("x", b"\0" * (UNPACKED + 1)),
        "tar, cut": put("cifar-10-python.tar.gz", gzip.compress(b"\0" * 9000)[:-30])}, found, tmp_path, says)


def lmdb_of(images, path, page=4096):
    """data.mdb as LMDB writes it: two meta pages, a branch over leaves of two entries, values of many bytes apart."""
    leaves, pages, places = -(-len(images) // 2), {}, []
    following = 3 + leaves
    for content in images:
        places.append(following)
        need = -(-(16 + len(content)) // page)
        pages[following] = struct.pack("<QHHI", following, 0, 4, need) + content
        following += need

    def filled(number, flags, nodes):
        body, offsets, at = b"", [], page
        for node in nodes:
            node += b"\0" * (len(node) % 2)
            at -= len(node)
            offsets.append(at)
            body = node + body
        lower = 16 + 2 * len(nodes)
        return (struct.pack("<QHHHH", number, 0, flags, lower, at) + struct.pack(f"<{len(nodes)}H", *offsets)).ljust(
            at, b"\0") + body

    keys = [f"{i:08d}".encode() for i in range(len(images))]
    for i in range(leaves):
        pages[3 + i] = filled(3 + i, 2, [struct.pack("<HHHH", len(content) & 0xFFFF, len(content) >> 16, 1, 8) + key
                                         + struct.pack("<Q", place) for key, content, place in
                                         list(zip(keys, images, places, strict=True))[2 * i:2 * i + 2]])
    pages[2] = filled(2, 1, [struct.pack("<HHHH", 3 + i, 0, 0, 8 * (i > 0)) + (keys[2 * i] if i else b"")
                             for i in range(leaves)])
    for number in (0, 1):
        tables = struct.pack("<IHHQQQQQ", page, 8, 0, 0, 0, 0, 0, (1 << 64) - 1) + struct.pack(
            "<IHHQQQQQ", 0, 0, 2, 1, leaves, following - 3 - leaves, len(images), 2 if number else (1 << 64) - 1)
        pages[number] = struct.pack("<QHHI", number, 0, 8, 0) + struct.pack("<IIQQ", 0xBEEFC0DE, 1, 0, 1 << 30) + (
            tables + struct.pack("<QQ", following - 1, number))
    path.mkdir()
    content = bytearray(following * page)
    for number, part in pages.items():
        content[number * page:number * page + len(part)] = part
    (path / "data.mdb").write_bytes(content)
    return path


def test_lmdb_that_lies(tmp_path):
    """LSUN's LMDB, read without the library: the entries are right; cut at any page or damaged, it is one line."""
    images, page = [png(image) for image in noise(5, 40, 40)], 4096
    honest = (lmdb_of(images, tmp_path / "a") / "data.mdb").read_bytes()
    source = found(tmp_path / "a")
    assert [source.read(i) for i in range(5)] == images and source.title(3) == "00000003"

    def changed(content):
        return lambda folder: put("data.mdb", content)(folder) and None

    def at(where, new):
        return changed(honest[:where] + new + honest[where + len(new):])

    root, branch, leaf = page + 128, 2 * page, 3 * page
    node = leaf + page - 24  # the first of the leaf: length, flags, length of the key; the key; its value's page
    kinds = {f"cut at {n}": changed(honest[:n]) for n in (0, 9, 200, page, 5000, *range(2 * page, len(honest), page))}
    refused(kinds | {
        "magic": at(16, b"\0"), "version": at(20, b"\x02"), "page size": at(40, struct.pack("<I", 1 << 31)),
        "root": at(root, struct.pack("<Q", 1 << 60)), "root in a value": at(root, struct.pack("<Q", 7)),
        "circle": at(branch + page - 8, struct.pack("<H", 2)), "lower": at(branch + 12, b"\xff\xff"),
        "upper": at(branch + 14, b"\xff\xff"), "offset": at(branch + 16, b"\xff\xff"), "flags": at(leaf + 10, b"\x40"),
        "number": at(leaf, b"\x63"), "key": at(node + 6, b"\xff\xff"), "length": at(node, b"\xff" * 4),
        "value": at(node + 16, b"\xff" * 8), "table": at(node + 4, b"\x02"),
        "pipe": lambda folder: pipe("data.mdb")(folder) and None}, found, tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "random").mkdir()
    for number in range(150):  # whatever the damage: read or refused
        content = bytearray(honest)
        for where in rng.integers(2 * page * (number % 2), 6 * page, 8):
            content[where] = rng.integers(256)
        put("data.mdb", content)(tmp_path / "random")
        with bounded(), contextlib.suppress(UserError):
            source = found(tmp_path / "random")
            for i in range(len(source.names)):
                source.read(i)


def test_statistics_that_lie(small_limit, tmp_path, monkeypatch):
    """.npz files of fid.py: statistics, and arr_0."""
    honest = dict(mu=np.zeros(4), sigma=np.eye(4))
    monkeypatch.setattr(archives, "WIDEST", 49)
    np.savez(tmp_path / "a.npz", **honest, n=9, resize="tf")

    def side(path):
        return fid_sources.open_side(str(path), None, None, False)

    def stats(**entries):
        return npz(**{name: value for name, value in (honest | entries).items() if value is not None})

    def images(shape, body=b""):
        return member(header(shape, body=body), "arr_0.npy")

    assert side(tmp_path / "a.npz")[0].n == 9
    refused({
        "no sigma": stats(sigma=None), "width": stats(sigma=np.eye(5)), "square": stats(sigma=np.zeros((4, 5))),
        "rank": stats(mu=np.zeros((2, 2))), "nan": stats(mu=np.full(4, np.nan)),
        "inf": stats(sigma=np.full((4, 4), np.inf)), "text": stats(mu=np.array(["a"] * 4)),
        "complex": stats(sigma=np.eye(4) * 1j), "objects": stats(mu=np.array([{}] * 4)), "n": stats(n="many"),
        "n is 1": stats(n=1), "ns": stats(n=[1, 2]), "resize": stats(resize="\x1b[31m"),
        "scalar": stats(mu=np.zeros(())), "resizes": stats(resize=["tf", "tf"]), "half": stats(mu_s=np.zeros(4)),
        "below": stats(sigma=-np.eye(4)), "skew": stats(sigma=np.triu(np.ones((4, 4)))),
        "wide": stats(mu=np.zeros(50), sigma=np.eye(50)), "bomb": stats(mu=np.zeros(UNPACKED // 8 + 1)),
        "nothing": stats(mu=None, sigma=None), "claims": images((1 << 40, 8, 8, 3)), "negative": images((-1, 8, 8, 3)),
        "no image": images((0, 8, 8, 3)), "large": images((2, 1500, 1500, 3), b"\0" * (2 * 1500 * 1500 * 3)),
        "flat": images((64,), b"1" * 64), "pipe": pipe("a.npz")}, side, tmp_path)
    features, rows = [], np.ones((5, 4), np.float32)  # kept for KID, precision and recall

    def kept(value, **more):
        features.append(f"features {len(features)}")
        return stats(features=value, n=5, **more)

    def claim(shape, kind="<f4", body=b""):
        def write(folder):
            files = {}
            for name, value in honest.items():
                np.save(file := io.BytesIO(), value)
                files[f"{name}.npy"] = file.getvalue()
            return write_zip(folder / "a.npz", files | {"features.npy": header(shape, kind, body)})
        return write

    np.savez(tmp_path / "b.npz", **honest, n=5, features=rows.astype(">f8"))
    assert np.array_equal(side(tmp_path / "b.npz")[0].features, rows)
    kinds = {f"features {number}": kept(value) for number, value in enumerate((
        rows.astype(int), rows.astype(complex), rows > 0, rows.astype(str), np.array([["x"]], object), rows[:, :3],
        rows[:, 0], rows[None], np.float32(1), rows * np.nan, rows * np.inf, rows.astype(float) * 1e300, rows[:0],
        rows[:1], np.ones((6, 4), np.float32), rows.astype([("x", "f4")])))}
    kinds |= {"bomb": stats(features=np.zeros((UNPACKED // 8, 4), np.float32)),
              "bytes": claim((5, 4), body=b"1" * 79), "claim": claim((1 << 40, 4)), "less": claim((-5, 4)),
              "pickle": claim((5, 4), "|O", pickle.dumps([1] * 20)), "deep": member(DEEP_HEADER, "features.npy"),
              "cut": lambda folder: put("a.npz", (folder / kept(rows)(folder).name).read_bytes()[:-50])(folder),
              "folder": lambda folder: (folder / "a.npz").mkdir() or folder / "a.npz", "device": device("a.npz")}
    refused({name: kinds[name] for name in (*features, "bomb", "bytes", "claim", "less", "pickle")}, side, tmp_path,
            dict.fromkeys(features, "features"))
    refused(kinds | {"pipe": pipe("a.npz"), "nothing": put("a.npz"), "text": put("a.npz", "text")},
            archives.read_statistics, tmp_path)
    content = bytearray(npz(arr_0=noise(70, 8, 8))(tmp_path).read_bytes())
    content[9000:9100] = b"\xff" * 100
    with pytest.raises(UserError, match="arr_0 is damaged"):
        side(put("cut.npz", content)(tmp_path))[1].read(0, 70)


def test_caches_of_statistics_that_lie(tmp_path, monkeypatch, capsys):
    """fid-*.npz beside torch's own cache: what cannot be of these images is measured anew, in a line, and replaced."""
    monkeypatch.setattr(fid_sources, "cache_of", lambda *_: path)
    images, path = data.ImageSet([0] * 5, [], 8, pixels=torch.from_numpy(noise(5, 3, 8).reshape(5, 3, 8, 3)[
        :, :, :, [0] * 8].copy())), tmp_path / "fid.npz"
    honest, _ = fid_sources.cached_statistics(images, Pixels(), keep=4)
    content = path.read_bytes()
    with np.load(path) as file:
        entries = dict(file)
    other = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    assert "measured anew" not in capsys.readouterr().out
    for name, lie in {
            "n": {"n": 6}, "text": {"n": "five"}, "resize": {"resize": "clean"}, "nan": {"mu": entries["mu"] * np.nan},
            "widths": {**other, "features": np.zeros((4, 3), np.float32)}, "features": {"features": np.zeros((4, 3))},
            "images": {"features": np.zeros((6, 128), np.float32)}, "none": b"", "cut": content[:-99], "pipe": None,
            "tap": {"mu_s": None, "sigma_s": None}}.items():
        path.unlink()
        if lie is None:
            os.mkfifo(path)
        elif isinstance(lie, bytes):
            path.write_bytes(lie)
        else:
            np.savez(path, **{key: value for key, value in (entries | lie).items() if value is not None})
        with bounded():
            found, _ = fid_sources.cached_statistics(images, Pixels(), keep=4)
        assert np.array_equal(found.mean["2048"], honest.mean["2048"]) and torch.equal(found.features, honest.features)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "fid.npz" in said and said.endswith(": measured anew\n"), (name, said)
    assert fid_sources.cached_statistics(images, Pixels(), keep=4)[0].n == 5 and not capsys.readouterr().out


def image_rows(n=4, side=8, **values):
    """Rows of data.py --save, of black images; values: of fields."""
    made = np.zeros(n, [("image", np.uint8, (3, side, side)), ("label", np.int32), ("split", np.uint8)])
    made["split"] = [1, 1, 2] + [1] * (n - 3) if n >= 3 else 1
    for name, value in values.items():
        made[name] = value
    return made


def test_saved_images_that_lie(tmp_path, monkeypatch):
    """What data.py --save wrote, and photos.json beside it."""
    monkeypatch.setenv("VQLCMD_MAX_IMAGES", "1000")
    kind = image_rows().dtype

    def rows(*args, **values):
        return npy(image_rows(*args, **values), "a.npy")

    def of_type(*fields):
        return npy(np.ones(4, list(zip(("image", "label", "split"), fields, strict=True))), "a.npy")

    def claim(shape, there=0, kind=kind):
        """there: bytes that are, as holes."""
        def write(folder):
            put("a.npy", header(shape, np.lib.format.dtype_to_descr(np.dtype(kind))))(folder)
            with open(folder / "a.npy", "rb+") as file:
                file.truncate((folder / "a.npy").stat().st_size + there)
            return folder / "a.npy"
        return write

    def beside(content):
        def write(folder):
            (content if callable(content) else put("a.json", content))(folder)
            return rows(label=1)(folder)
        return write

    image, label, split = (3, 8, 8), np.int32, np.uint8
    kinds = {
        "label": rows(label=-1), "labels": rows(label=2 ** 31 - 1), "split": rows(split=3),
        "no held out": rows(split=1), "no training": rows(split=2),
        "none done": rows(split=0), "no rows": rows(0), "no pixels": rows(side=0),
        "a pixel": rows(side=1), "float": of_type((np.float32, image), label, split),
        "int64": of_type((np.uint8, image), np.int64, split), "float label": of_type((np.uint8, image), "f4", split),
        "big": of_type((np.uint8, image), ">i4", split), "signed": of_type((np.uint8, image), label, np.int8),
        "flat": of_type((np.uint8, (192,)), label, split), "grey": of_type((np.uint8, (1, 8, 8)), label, split),
        "oblong": of_type((np.uint8, (3, 8, 9)), label, split), "scalar": of_type(np.uint8, label, split),
        "pairs": of_type((np.uint8, image), (label, (2,)), split), "objects": npy(np.array([{}]), "a.npy"),
        "object labels": npy(np.zeros(4, [("image", np.uint8, image), ("label", object), ("split", split)]), "a.npy"),
        "two axes": npy(image_rows().reshape(2, 2), "a.npy"), "no axis": npy(image_rows()[0], "a.npy"),
        "name": npy(np.zeros(4, [((NASTY * 99, "image"), np.float32, image), ("label", label), ("split", split)])),
        "claim": claim((1 << 40,)), "negative": claim((-4,)), "many": claim((10 ** 8,), 10 ** 8 * kind.itemsize),
        "cut": lambda folder: put("a.npy", rows()(folder).read_bytes()[:-1])(folder), "deep": put("a.npy", DEEP_HEADER),
        "half made": lambda folder: rows()(folder).rename(folder / "a.part.npy"), "nothing": put("a.npy"),
        "pipe": pipe("a.npy"), "device": device("a.npy")}
    kinds |= {f"classes {number}": beside(content) for number, content in enumerate((
        "[]", "{}", "{", "[" * 10 ** 5, '{"classes": 3}', '{"classes": ["a"]}', '{"classes": []}',
        '{"classes": [1, 2]}', '{"classes": null}',
        json.dumps({"classes": ["x" * 9999] * 2}), json.dumps({"classes": ["x"] * 100_001}),
        pipe("a.json"), device("a.json"), lambda folder: (folder / "a.json").mkdir()))}
    refused(kinds, found, tmp_path, {"many": "100,000,000 images of an array, more than 1,000"})
    assert len(found(rows(label=1)(tmp_path)).train) == 3
    large = claim((4,), 4 * (3 * 16000 ** 2 + 5), [("image", np.uint8, (3, 16000, 16000)), ("label", label),
                                                   ("split", split)])
    array = np.load(large(tmp_path), mmap_mode="r")["image"][0].transpose(1, 2, 0)
    with bounded(), pytest.raises(ValueError, match="16000 x 16000 pixels, more than 50,000,000"):
        archives.open_image(array, 8)


def test_caches_of_images_that_lie(tmp_path, capsys):
    """images.npy of a run: what is not of these images, or says of them what is not so, is decoded anew."""
    root, out = write_images(tmp_path / "set", [f"{c}/{i}.png" for c in "ab" for i in range(6)], noise(12)), tmp_path
    source, path, part = found(root), out / "images.npy", out / "images.part.npy"
    kind, n = image_cache.row_type(source, 8), len(source.train)
    expected = [(images.batch(range(len(images))), images.labels) for images in found(root).load(8)]
    image_cache.save_images(source, 8, path)
    honest, content = np.load(path), path.read_bytes()

    def lie(name, value, at=slice(None)):
        made = honest.copy()
        made[name][at] = value
        return made

    kinds = {
        "label": lie("label", 1 - honest["label"]), "negative": lie("label", -1), "classes": lie("label", 2 ** 31 - 1),
        "split": lie("split", 1), "splits": lie("split", 2, slice(n)), "more splits": lie("split", 99, 0),
        "not done": lie("split", 0), "rows": honest[:-1], "more rows": np.concatenate([honest, honest]),
        "axes": honest.reshape(2, -1), "no rows": honest[:0], "other": image_rows(12), "objects": np.array([{}]),
        "cut": content[:-1], "header": content[:50], "nothing": b"", "deep": DEEP_HEADER,
        "claim": header((1 << 40,), np.lib.format.dtype_to_descr(kind)),
        "negative rows": content.replace(b"(12,), }  ", b"(-12,), } "), "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir,
        "link": lambda path: path.symlink_to(tmp_path / "precious")}
    (tmp_path / "precious").write_text("years of work")
    assert kinds["negative rows"] != content
    for name, write in kinds.items():
        for place, make in ((path, True), (path, False), (part, True)):
            for old in (path, part):
                old.rmdir() if old.is_dir() else old.unlink(missing_ok=True)
            if callable(write):
                write(place)
            else:
                np.save(place, write, allow_pickle=True) if isinstance(write, np.ndarray) else place.write_bytes(write)
            with bounded():
                sets = image_cache.load_through_cache(found(root), 8, None, path, make)
            for images, (pixels, labels) in zip(sets, expected, strict=True):
                assert torch.equal(images.batch(range(len(images))), pixels), (name, place, make)
                assert torch.equal(images.labels, labels) and images.class_names == ["a", "b"], (name, place, make)
            if make and name != "folder":
                assert path.read_bytes() == content and not part.exists(), (name, place)
    assert (tmp_path / "precious").read_text() == "years of work"
    assert "cannot be written" in capsys.readouterr().out  # in place of the folders
