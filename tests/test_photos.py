"""What a user with own photos needs: bad files, a cache of decoded images, a budget in minutes."""

import json
import os
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import budget
from extras import image_cache
from extras.datasets import find
from tests import common
from tests.common import TINY, call, contents, flags, make_folder, noise, train_tiny, write_images


def same_sets(a, b):
    return all(torch.equal(x.labels, y.labels) and x.class_names == y.class_names and torch.equal(
        x.batch(range(len(x))), y.batch(range(len(y)))) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("memory", [2 << 30, 0])
def test_cache_of_decoded_images(memory, tmp_path, monkeypatch):
    """The pixels, labels and bad files of decoding at every step; a cache of other images is left alone."""
    root, path = make_folder(tmp_path / "pets"), tmp_path / "images.npy"
    (root / "cat" / "bad.png").write_bytes(b"")
    plain, source = find(root), find(root)
    expected = plain.load(8)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", memory)
    assert same_sets(image_cache.load_through_cache(source, 8, None, path, make=True), expected)
    assert source.skipped == plain.skipped == {"cat/bad.png": "empty, 0 bytes"}
    with mock.patch.object(Image, "open", side_effect=AssertionError):  # no image file is opened again
        again = image_cache.load_through_cache(find(root), 8, source.skipped, path, make=False)
        assert same_sets(again, expected) and (again[0].pixels is None) == (memory == 0)
    moved = find(root)
    moved.labels = 1 - moved.labels  # the same files, sorted otherwise
    assert same_sets(image_cache.load_through_cache(moved, 8, None, path, make=False), moved.load(8))
    write_images(root, ["cat/new.png"], noise(1))
    found = image_cache.load_through_cache(find(root), 8, None, path, make=False)
    assert same_sets(found, find(root).load(8))


def test_runs_with_and_without_cache(folder, run, tmp_path):
    """The same files; the cache is gone when the tokens are there."""
    expected = contents(run)
    for more in ([], ["--no-cache"]):
        out = tmp_path / f"run{len(more)}"
        out.mkdir()
        (out / "images.part.npy").write_bytes(b"")  # of a start that was killed
        assert train_tiny(folder, out, *more, stage="tokenizer") == 0
        assert (out / "images.npy").exists() == (more == [])
        assert train_tiny(folder, out, stage="tokens") == 0
        assert not list(out.glob("images*"))
        assert all(contents(out)[file] == expected[file] for file in ("tokenizer.pt", "tokens.npy"))


def test_photos_saved_for_many_runs(folder, tmp_path, capsys):
    """data.py --save: pixels, classes and splits as from the folder; other images are not written over."""
    photos = tmp_path / "photos.npy"
    words = ["data.py", folder, "--out", tmp_path / "page.png", "--save", photos]
    for _ in range(2):
        assert call(*words, "--size", 8) == 0
        assert same_sets(find(photos).load(8), find(folder).load(8))
    assert call(*words, "--size", 6) == 2 and "holds something else" in capsys.readouterr().err


@pytest.mark.parametrize("memory", [2 << 30, 0])
def test_bad_files(memory, tmp_path, capsys, monkeypatch):
    """All 15 are named before training; a file that breaks later is replaced."""
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", memory)
    root, out, images = tmp_path / "mixed", tmp_path / "out", noise(30)
    write_images(root, [f"{i:04d}.png" for i in range(29)], images[:-1])
    with open(os.fsencode(root) + b"/caf\xe9.png", "wb") as file:  # a name that is no UTF-8
        file.write(common.encode(images[-1]))
    expected = common.spoil(root, images[0])
    assert train_tiny(root, out, "--no-cache", stage="tokenizer") == 2
    assert "15 of 45 images cannot be used, more than 1 %" in capsys.readouterr().err
    skipped = dict(line.split("\t") for line in (out / "skipped.txt").read_text().splitlines())
    assert skipped.keys() == expected.keys() and not (out / "config.json").exists()
    assert all(expected[title] in reason and len(reason) > 4 for title, reason in skipped.items())
    assert train_tiny(root, out, "--no-cache", "--allow-bad", stage="tokenizer") == 0
    (root / "0007.png").write_bytes(b"")  # after the check: that stops nothing
    assert train_tiny(root, out, "--no-cache", stage="tokens") == 0 and len(np.load(out / "tokens.npy")) == 30
    assert "0007.png: empty, 0 bytes; it was sound before" in capsys.readouterr().out


def test_a_run_with_a_budget(folder, tmp_path, capsys):
    """Its steps are chosen once: the next start measures nothing, and may ask for more of them."""
    options = {name: value for name, value in TINY.items() if name not in ("steps", "tokenizer_steps")}
    words = ["train.py", "--data", folder, *flags(options), "--stage", "tokenizer", "--out"]
    chosen = {"tokenizer_steps": 7, "steps": 9}, "chosen"
    with mock.patch.object(budget, "plan", return_value=chosen) as plan:
        for more in (["--minutes", 0.05], ["--minutes", 0.05], ["--steps", 10]):
            assert call(*words, tmp_path, *more) == 0
    plan.assert_called_once()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["tokenizer_steps"], stored["steps"]) == (7, 10)
    assert call(*words, tmp_path, "--minutes", 1) == 2
    assert "was planned for --minutes 0.05" in capsys.readouterr().err
