"""What a user with own photos needs: bad files, a cache of decoded images, a budget in minutes."""

import json
import os
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import budget, status
from extras import image_cache
from extras.data_forms import Folder
from extras.datasets import find
from tests.common import TINY, call, contents, flags, make_folder, noise, png, spoil, write_images


def same_sets(a, b):
    return all(torch.equal(x.labels, y.labels) and x.class_names == y.class_names and torch.equal(
        x.batch(range(len(x))), y.batch(range(len(y)))) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("memory", [2 << 30, 0])
def test_cache_of_decoded_images(memory, tmp_path, monkeypatch):
    """The pixels, labels and bad files of decoding at every step, from a file written once, over a stop."""
    root, path = make_folder(tmp_path / "pets"), tmp_path / "images.npy"
    (root / "cat" / "bad.png").write_bytes(b"")
    plain, source, read = find(root), find(root), Folder.read
    expected = plain.load(8)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", memory)
    reads = []

    def stopped(self, i):
        reads.append(i)
        if len(reads) > 20:
            raise KeyboardInterrupt
        return read(self, i)

    with mock.patch.object(Folder, "read", stopped), pytest.raises(KeyboardInterrupt):
        image_cache.save_images(source, 8, path)
    assert not path.exists()
    with mock.patch.object(data, "load_image", side_effect=data.load_image) as opened:
        sets = image_cache.load_through_cache(source, 8, None, path, make=True)
    assert opened.call_count - (memory > 0) * 40 < 41  # what was decoded before the stop is kept
    assert same_sets(sets, expected) and source.skipped == plain.skipped == {"cat/bad.png": "empty, 0 bytes"}
    assert (sets[0].pixels is None) == (memory == 0)
    with mock.patch.object(Image, "open", side_effect=AssertionError):  # no image file is opened again
        again = image_cache.load_through_cache(find(root), 8, source.skipped, path, make=False)
    assert same_sets(again, expected)


@pytest.mark.parametrize("change", ["size", "images", "cut", "text", "link"])
def test_cache_of_other_images(change, tmp_path):
    """It is left alone, or made anew; nothing is written through a link."""
    root, path, precious = make_folder(tmp_path / "pets"), tmp_path / "images.npy", tmp_path / "precious"
    image_cache.save_images(find(root), 8, path)
    content = path.read_bytes()
    if change == "images":
        write_images(root, ["cat/new.png"], noise(1))
    elif change == "link":
        precious.write_text("years of work")
        path.unlink()
        path.symlink_to(precious)
    elif change != "size":
        path.write_bytes({"cut": content[:-1], "text": b"text"}[change])
    size = 9 if change == "size" else 8
    for make in (False, True):
        sets = image_cache.load_through_cache(find(root), size, None, path, make)
        assert same_sets(sets, find(root).load(size))
    assert len(image_cache.open_rows(find(root), size, path)) == len(find(root).names)
    assert change != "link" or precious.read_text() == "years of work"


def test_runs_with_and_without_cache(folder, run, tmp_path, capsys, monkeypatch):
    """The same files; the cache is gone when the tokens are there; the dry run says what it takes."""
    words = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]
    for free, says in ((1e12, "decoded once into"), (1, "decoded whenever they are needed")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert call("train.py", *words, "--dry-run") == 0
        assert re.search(f"images: {says}.*pets/images.npy.*0.00 GB of", capsys.readouterr().out)
    monkeypatch.undo()
    for out, more in (("pets", []), ("plain", ["--no-cache"])):
        words[3] = tmp_path / out
        assert call("train.py", *words, "--stage", "tokenizer", *more) == 0
        assert (tmp_path / out / "images.npy").exists() == (out == "pets")
        assert call("train.py", *words, "--stage", "tokens") == 0
        assert not list(tmp_path.glob(f"{out}/images*"))
        for name in ("tokenizer.pt", "tokens.npy"):
            assert contents(tmp_path / out)[name] == contents(run)[name]


def test_what_needs_no_cache(run, tmp_path):
    np.save(tmp_path / "a.npy", noise(20, 8, 8))
    assert image_cache.plan_cache(find(tmp_path / "a.npy"), 4, tmp_path)[0]
    for source, size in ((tmp_path / "a.npy", 8), ("toy", 20), (run / "tokens.npy", 8)):
        assert not image_cache.plan_cache(find(source), size, tmp_path)[0]


def test_photos_saved_for_many_runs(folder, tmp_path, capsys):
    """data.py --save: pixels, classes and splits as from the folder; what is wrong is one line."""
    photos, other = tmp_path / "photos.npy", tmp_path / "other.npy"
    np.save(other, noise(2))
    words = ["data.py", folder, "--size", 8, "--save", photos, "--out", tmp_path / "page.png"]
    assert call(*words) == 0
    assert (tmp_path / "page.png").exists() and find(photos).class_names == ["cat", "dog"]
    content = photos.read_bytes()
    assert same_sets(find(photos).load(8), find(folder).load(8))
    for wrong, says in (([folder, "--save", photos], "--size"),
                        ([folder, "--size", 6, "--save", photos], "holds something else"),
                        ([folder, "--size", 8, "--save", other], "holds something else"),
                        ([folder, "--size", 8, "--save", tmp_path / "photos.npz"], "ends in .npy"),
                        (["toy", "--size", 8, "--save", tmp_path / "toy.npy"], "images in files")):
        assert call("data.py", *wrong) == 2
        assert says in capsys.readouterr().err
    assert call(*words) == 0  # once more
    assert photos.read_bytes() == content


# ----------------------------------------------------------------------------
# Bad files.

@pytest.mark.parametrize("memory", [2 << 30, 0])
def test_bad_files(memory, tmp_path, capsys, monkeypatch):
    """skipped.txt names all 15, which are not opened again; a file that breaks later is replaced."""
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", memory)
    root, out, images = tmp_path / "mixed", tmp_path / "out", noise(30)
    write_images(root, [f"{i:04d}.png" for i in range(29)], images[:-1])
    with open(os.fsencode(root) + b"/caf\xe9.png", "wb") as file:  # a name that is no UTF-8
        file.write(png(images[-1]))
    expected = spoil(root, images[0])
    words = ["--data", root, "--out", out, *flags(TINY), "--allow-bad", "--stage"]
    assert call("train.py", *words, "tokenizer", "--no-cache") == 0
    assert "15 of 45 images (33.33%) cannot be used and are left out" in capsys.readouterr().out
    skipped = dict(line.split("\t") for line in (out / "skipped.txt").read_text().splitlines())
    assert skipped.keys() == expected.keys() and (out / "data.png").exists()
    for title, reason in skipped.items():
        assert expected[title] in reason and len(reason) > 4, title
    (root / "0007.png").write_bytes(b"")  # after the check: that stops nothing
    words[1] = os.path.relpath(root)  # the list holds wherever the set is looked at from
    with mock.patch.object(data, "load_image", side_effect=data.load_image) as opened:
        assert call("train.py", *words, "tokens") == 0
    assert len(np.load(out / "tokens.npy", mmap_mode="r")) == 30 and opened.call_count < 35
    assert "0007.png: empty, 0 bytes; it was sound before" in capsys.readouterr().out


def test_too_many_bad_files(tmp_path, capsys, monkeypatch):
    """More than 1 %: status 2 before training, with the list; 1 % is trained without."""
    root, out = make_folder(tmp_path / "pets", each=50), tmp_path / "out"
    read, bad = Folder.read, ["cat/00.png", "dog/00.png"]

    def refuse(self, i):
        if self.names[i] in bad:
            raise PermissionError(13, "Permission denied")
        return read(self, i)

    monkeypatch.setattr(Folder, "read", refuse)
    words = ["--data", root, "--out", out, *flags(TINY), "--stage", "tokenizer"]
    assert call("train.py", *words) == 2
    error = capsys.readouterr().err
    assert "2 of 100 images cannot be used, more than 1 %" in error and error.count("\n") == 1
    assert (out / "skipped.txt").read_text() == "".join(f"{name}\tPermission denied\n" for name in bad)
    assert not (out / "tokenizer.pt").exists()
    bad.pop()  # repaired
    assert call("train.py", *words) == 0
    assert (out / "skipped.txt").read_text() == "cat/00.png\tPermission denied\n"


# ----------------------------------------------------------------------------
# Time.

def test_a_run_with_a_budget(folder, tmp_path, capsys, monkeypatch):
    """Its steps are chosen once: the next start measures nothing, and may ask for more of them."""
    options = {name: value for name, value in TINY.items() if name not in ("steps", "tokenizer_steps")}
    out, plain = tmp_path / "pets", tmp_path / "plain"
    words = ["--data", folder, "--out", out, *flags(options | {"sample_every": 1000}), "--stage", "tokenizer"]
    chosen = {"tokenizer_steps": 7, "steps": 9}, "chosen"
    with mock.patch.object(budget, "plan", return_value=chosen) as plan:
        assert call("train.py", *words, "--minutes", 0.05) == 0
        for more in (["--minutes", 0.05], [], ["--steps", 10]):
            assert call("train.py", *words, *more) == 0
    assert plan.call_count == 1
    stored = json.loads((out / "config.json").read_text())
    assert [stored[name] for name in ("minutes", "tokenizer_steps", "steps")] == [0.05, 7, 10]
    # What is timed leaves no trace in what is trained.
    assert call("train.py", *words[:3], plain, *words[4:], "--tokenizer-steps", 7, "--steps", 9) == 0
    assert contents(plain)["tokenizer.pt"] == contents(out)["tokenizer.pt"]
    capsys.readouterr()
    for before, more, says in ((words, ["--minutes", 1], "was planned for --minutes 0.05"),
                               (["--data", folder, "--out", plain], ["--minutes", 1], "is for a new run"),
                               ([], ["--minutes", 1, "--steps", 5], "chooses --steps"),
                               ([], ["--minutes", -1], "must be more than 0")):
        assert call("train.py", *(before or ["--out", tmp_path / "x"]), *more) == 2
        assert says in capsys.readouterr().err


def test_time_gone_and_left(tmp_path, capsys):
    """Every status line says both; they go on over a pause."""
    clock = [1000.0]
    config = {"log_every": 10, "save_every": 1000}

    def lines_of(total, seconds, state=None):
        log = status.StatusLog("diffusion", tmp_path, ["loss"], config, total, 8, torch.device("cpu"), state)
        for step in log.loop():
            clock[0] += seconds
            log.add({"loss": torch.tensor(1.0)})
            if log.due("log_every"):
                log.line()
            if step == 39:
                break
        return [line for line in capsys.readouterr().out.splitlines() if " left" in line]

    with mock.patch.object(status.time, "time", lambda: clock[0]), mock.patch.object(
            status.StatusLog, "show"):
        lines = lines_of(4000, 3.0)
        assert lines[0].endswith("00:30 gone, 3:19:30 left") and lines[3].endswith("02:00 gone, 3:18:00 left")
        clock[0] += 5000  # a pause
        assert lines_of(60, 1.0, {"step": 40, "history": []})[0].endswith("02:10 gone, 00:26 left")


# ----------------------------------------------------------------------------
# A run that goes on.

def test_a_run_that_has_become_another(run, folder, tmp_path, capsys):
    """What can be done when photos were added, in one line."""
    out = shutil.copytree(run, tmp_path / "pets")
    images = shutil.copytree(folder, tmp_path / "images" / "pets")
    for change, says in ((["--K", 9], "was made with K 8.*or the old setting to continue it"),
                         ([], r"was made with train_images .*--init .*pets to start from its weights")):
        if not change:
            write_images(images, [f"cat/new{i}.png" for i in range(5)], noise(5))
        assert call("train.py", "--data", images, "--out", out, *flags(TINY), *change) == 2
        error = capsys.readouterr().err
        assert re.search(says, error) and error.count("\n") == 1


def test_init_need_not_be_said_again(folder, run, tmp_path, capsys):
    """The plain command goes on with a run begun with --init, and trains what the whole command would."""
    shutil.copytree(run, tmp_path / "start")
    words = ["--data", folder, *flags(TINY)]
    for name, stage in (("whole", []), ("parts", ["--stage", "tokenizer"])):
        assert call("train.py", *words, "--out", tmp_path / name, "--init", tmp_path / "start", *stage) == 0
    plain = [*words, "--out", tmp_path / "parts"]
    shutil.move(tmp_path / "start", tmp_path / "away")
    capsys.readouterr()
    assert call("train.py", *plain) == 2  # the denoiser's weights are still needed
    assert re.search("was begun with --init .*start, whose weights it needs", capsys.readouterr().err)
    shutil.move(tmp_path / "away", tmp_path / "start")
    assert call("train.py", *plain) == 0
    assert contents(tmp_path / "whole")["ckpt.pt"] == contents(tmp_path / "parts")["ckpt.pt"]
    assert call("train.py", *plain, "--init", run) == 2  # of another start
    assert "give another --out" in capsys.readouterr().err
