"""What a user with own photos and an evening needs: a cache of decoded images, a budget in minutes, the time left."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import arrays, budget, status
from engine.process import UserError
from engine.stored import require_same_run
from extras import image_cache
from extras.data_forms import Folder, Zip
from extras.datasets import find
from extras.run_facts import read_columns, seconds_per_step
from tests.common import TINY, call, contents, flags, make_folder, noise, png, write_zip


def read_once(sets):
    """The same sets with their pixels in memory."""
    return [data.ImageSet(s.labels, s.class_names, s.size, s.batch(range(len(s)))) for s in sets]


def same_sets(a, b):
    return all(torch.equal(x.labels, y.labels) and x.class_names == y.class_names
               and torch.equal(x.batch(range(len(x))), y.batch(range(len(y)))) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("memory", [2 << 30, 0])
def test_cache_of_decoded_images(memory, tmp_path, monkeypatch):
    """The pixels, labels and bad files of decoding at every step, from a file that is written once, over a stop."""
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", memory)
    root = make_folder(tmp_path / "pets")
    (root / "cat" / "bad.png").write_bytes(b"")
    plain, path = find(root), tmp_path / "images.npy"
    expected = read_once(plain.load(8))
    monkeypatch.setattr(image_cache, "BLOCK_BYTES", 1)  # blocks of 16 images
    source, read = find(root), Folder.read

    def stopped(self, i, seen=[]):  # noqa: B006
        seen.append(i)
        if len(seen) > 20:
            raise KeyboardInterrupt
        return read(self, i)

    with mock.patch.object(Folder, "read", stopped), pytest.raises(KeyboardInterrupt):
        image_cache.save_images(source, 8, path)
    assert not path.exists() and path.with_suffix(".part.npy").exists()
    with mock.patch.object(data, "load_image", side_effect=data.load_image) as opened:
        sets = image_cache.load_through_cache(source, 8, None, path, make=True)
    assert opened.call_count - (memory > 0) * 40 == 41 - 16  # the first block was there; into memory from the file
    assert same_sets(sets, expected) and source.skipped == plain.skipped == {"cat/bad.png": "empty, 0 bytes"}
    assert (sets[0].pixels is None) == (memory == 0)
    with mock.patch.object(Image, "open", side_effect=AssertionError):  # no image file is opened again
        assert same_sets(image_cache.load_through_cache(find(root), 8, source.skipped, path, make=False), expected)
    # Another size, or a picture that has changed: the cache is not of these images.
    assert same_sets(image_cache.load_through_cache(find(root), 9, None, path, False), plain.load(9))
    (root / "dog" / "00.png").write_bytes(png(noise(1, 11, 11)[0]))
    (root / "cat" / "bad.png").write_bytes(png(noise(1, 10, 10)[0]))
    assert same_sets(image_cache.load_through_cache(find(root), 8, None, path, False), find(root).load(8))
    assert same_sets(image_cache.load_through_cache(find(root), 8, None, path, True), find(root).load(8))


def test_runs_with_and_without_cache(folder, run, tmp_path, capsys):
    """The same files; the cache is gone when the tokens are there; the dry run says what it takes."""
    words = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]
    assert call("train.py", *words, "--dry-run") == 0
    assert re.search(r"decoded once into .*pets/images.npy, 0.00 GB of .* deleted when the tokens are written",
                     capsys.readouterr().out)
    assert call("train.py", *words, "--stage", "tokenizer") == 0
    assert (tmp_path / "pets" / "images.npy").exists()
    assert call("train.py", *words, "--stage", "tokens") == 0
    assert not list(tmp_path.glob("pets/images*"))
    words[3] = tmp_path / "plain"
    assert call("train.py", *words, "--stage", "tokenizer", "--no-cache") == 0
    assert not list(tmp_path.glob("plain/images*"))
    found = [contents(tmp_path / name) for name in ("pets", "plain")]
    assert found[0]["tokenizer.pt"] == found[1]["tokenizer.pt"] == contents(run)["tokenizer.pt"]
    assert found[0]["tokens.npy"] == contents(run)["tokens.npy"] and not (run / "images.npy").exists()


def test_no_room_for_a_cache(folder, run, tmp_path, monkeypatch, capsys):
    """At most half of the free space; a disk that fills up all the same costs the cache, and not the run."""
    source, out = find(folder), tmp_path / "out"
    needed = image_cache.bytes_needed(source, 8)
    assert needed == 40 * (3 * 8 * 8 + 5)
    for free, enough in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert image_cache.plan_cache(source, 8, out)[0] == enough
    monkeypatch.setattr(arrays, "reserve", mock.Mock(side_effect=OSError(28, "No space left on device")))
    sets = image_cache.load_through_cache(source, 8, None, tmp_path / "images.npy", make=True)
    assert same_sets(sets, find(folder).load(8)) and not list(tmp_path.glob("images*"))
    assert "No space left on device" in capsys.readouterr().out
    np.save(tmp_path / "a.npy", noise(20, 8, 8))  # pixels that are ready
    assert [image_cache.bytes_needed(find(tmp_path / "a.npy"), size) for size in (8, 4)] == [0, 20 * (3 * 16 + 5)]
    assert image_cache.bytes_needed(find("toy"), 20) == image_cache.bytes_needed(find(run / "tokens.npy"), 8) == 0


def test_photos_saved_for_many_runs(folder, tmp_path, capsys):
    """data.py --save: pixels, classes and splits as from the folder; train.py takes them; what is wrong is one line."""
    photos = tmp_path / "photos.npy"
    assert call("data.py", folder, "--size", 8, "--save", photos, "--out", tmp_path / "page.png") == 0
    assert "38 images + 2 held out" in capsys.readouterr().out and (tmp_path / "page.png").exists()
    assert same_sets(find(photos).load(8), find(folder).load(8)) and find(photos).class_names == ["cat", "dog"]
    assert same_sets(find(photos).load(6), image_cache.SavedImages(photos, np.load(photos)).load(6))
    assert np.load(photos)["image"].shape == (40, 3, 8, 8)
    assert call("train.py", "--data", photos, "--out", tmp_path / "out", "--dry-run", *flags(TINY)) == 0
    assert "2 classes: cat (20), dog (20)" in (text := capsys.readouterr().out) and "decoded" not in text
    photos.with_suffix(".json").write_text('{"classes": ["cat"]}')
    rows = np.load(photos)
    np.save(tmp_path / "other.npy", rows.astype([("image", "f4", (3, 8, 8)), ("label", "i4"), ("split", "u1")]))
    rows["split"] = 1
    np.save(tmp_path / "half.npy", rows)
    for words, says in ((["train.py", "--data", photos], "does not name the 2 classes"),
                        (["train.py", "--data", tmp_path / "other.npy"], "no file that data.py --save wrote"),
                        (["train.py", "--data", tmp_path / "half.npy"], "is not complete"),
                        (["data.py", folder, "--save", photos], "--size"),
                        (["data.py", folder, "--size", 6, "--save", photos], "is there and holds something else"),
                        (["data.py", folder, "--size", 8, "--save", tmp_path / "other.npy"], "holds something else"),
                        (["data.py", folder, "--size", 8, "--save", tmp_path / "photos.npz"], "ends in .npy"),
                        (["data.py", "toy", "--size", 8, "--save", photos], "images that lie in files")):
        assert call(*words) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert np.load(photos)["image"].shape == (40, 3, 8, 8)  # and is as it was
    assert call("data.py", folder, "--size", 8, "--save", photos, "--out", tmp_path / "page.png") == 0  # once more


def test_pictures_of_other_kinds_in_a_zip(tmp_path):
    path = write_zip(tmp_path / "a.zip", {**{f"{i}.png": png(noise(1)[0]) for i in range(2)}, "c.HEIC": b"?"})
    assert "left out: 1 .heic (convert them to .jpg" in Zip(path).describe()
    with pytest.raises(data.DataError, match="left out: 1 .heic .convert them to .jpg"):
        Zip(write_zip(tmp_path / "b.zip", {"c.HEIC": b"?"}))


# ----------------------------------------------------------------------------
# Time.

def test_steps_of_a_budget():
    """They fill the time, 95 % of it, and share it as the preset's steps do; too little is said, or refused."""
    config, per_step = {"tokenizer_steps": 4000, "steps": 10000}, {"tokenizer_steps": 0.3, "steps": 0.12}
    chosen, message = budget.plan(1000, 100, 250, per_step, config)
    assert chosen == {"tokenizer_steps": 1000, "steps": 2500}  # (950 - 100 - 250) / 2400 of them
    assert sum(per_step[name] * n for name, n in chosen.items()) + 350 == pytest.approx(950)
    assert "1,000 steps of the tokenizer (300 ms each) and 2,500" in message and "0.25 times" in message
    assert "too little" not in message and "--fid-every" not in message
    assert "--fid-every is not in this plan" in budget.plan(1000, 100, 250, per_step, config | {"fid_every": 5})[1]
    assert "too little to mean much" in budget.plan(900, 100, 250, per_step, config)[1]
    assert budget.plan(1000, 100, 250, {"tokenizer_steps": 0, "steps": 0.12}, config)[0] == {"steps": 5000}
    with pytest.raises(UserError, match="alone take 5.8 minutes; give at least 8.2"):
        budget.plan(360, 100, 250, per_step, config)


def test_a_run_with_a_budget(folder, tmp_path, capsys, monkeypatch):
    """Its steps are fixed once they are chosen: the next start measures nothing, and may ask for more of them."""
    monkeypatch.setattr(budget, "DRAWS", 256)
    monkeypatch.setattr(budget, "FINAL_DRAWS", 256)
    options = {name: value for name, value in TINY.items() if name not in ("steps", "tokenizer_steps")}
    out = tmp_path / "pets"
    words = ["--data", folder, "--out", out, *flags(options | {"sample_every": 1000}), "--stage", "tokenizer"]

    def few(seconds, spent, fixed, per_step, config, real=budget.plan):
        assert 0 <= spent < 60 and fixed > 0 and set(per_step) == {"tokenizer_steps", "steps"}
        assert all(0 < each < 1 for each in per_step.values())
        total = spent + fixed + sum(each * config[name] for name, each in per_step.items())
        real(total / budget.MARGIN + 1, spent, fixed, per_step, config)
        return {"tokenizer_steps": 7, "steps": 9}, "chosen"

    with mock.patch.object(budget, "plan", side_effect=few) as planned:
        assert call("train.py", *words, "--minutes", 0.05) == 0
    stored = json.loads((out / "config.json").read_text())
    assert planned.call_count == 1
    assert [stored[name] for name in ("minutes", "tokenizer_steps", "steps")] == [0.05, 7, 9]
    assert torch.load(out / "tokenizer.pt", weights_only=True)["step"] == 7
    plain = tmp_path / "plain"  # what is timed leaves no trace in what is trained
    assert call("train.py", *words[:3], plain, *words[4:], "--tokenizer-steps", 7, "--steps", 9) == 0
    assert contents(plain)["tokenizer.pt"] == contents(out)["tokenizer.pt"]
    with mock.patch.object(budget, "plan", side_effect=AssertionError):
        for more in (["--minutes", 0.05], [], ["--steps", 10]):
            assert call("train.py", *words, *more) == 0
    assert json.loads((out / "config.json").read_text())["steps"] == 10
    capsys.readouterr()
    for words_of, more, says in ((words, ["--minutes", 1], "was planned for --minutes 0.05"),
                                 (["--data", folder, "--out", plain], ["--minutes", 1], "is for a new run"),
                                 (["--out", tmp_path / "x"], ["--minutes", 1, "--steps", 5], "chooses --steps"),
                                 (["--out", tmp_path / "x"], ["--minutes", -1], "must be more than 0")):
        assert call("train.py", *words_of, *more) == 2
        assert says in capsys.readouterr().err


def test_time_gone_and_left(tmp_path, capsys):
    """Every status line says both; they go on over a pause, and the page's own figure is the same."""
    clock = [1000.0]

    def steps_of(log, seconds):
        for step in log.loop():
            clock[0] += seconds
            log.add({"loss": torch.tensor(1.0)})
            if log.due("log_every"):
                log.line()
            if step == 39:
                return

    config = {"log_every": 10, "save_every": 1000}
    with mock.patch.object(status.time, "time", lambda: clock[0]), mock.patch.object(status.StatusLog, "show"):
        log = status.StatusLog("diffusion", tmp_path, ["loss"], config, 4000, 8, torch.device("cpu"))
        steps_of(log, 3.0)
        lines = [line for line in capsys.readouterr().out.splitlines() if " left" in line]
        assert lines[0].endswith("00:30 gone, 3:19:30 left") and lines[3].endswith("02:00 gone, 3:18:00 left")
        clock[0] += 5000  # a pause
        state = {"step": 40, "history": []}
        log = status.StatusLog("diffusion", tmp_path, ["loss"], config, 60, 8, torch.device("cpu"), state)
        steps_of(log, 1.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if " left" in line]
    assert lines[0].endswith("02:10 gone, 00:26 left")  # 130 s of 50 steps
    columns = read_columns(tmp_path / "diffusion.csv")
    assert columns["seconds"][:, 1].tolist() == [30, 60, 90, 120, 130, 140]
    assert seconds_per_step(columns, 8) == (140 - 30) / 50
    del columns["seconds"]  # of an earlier version
    columns["img/s"] = np.array([[10, 4.0], [20, 0.0], [30, 2.0]])
    assert seconds_per_step(columns, 8) == 8 * (1 / 4 + 1 / 2) / 2
    assert seconds_per_step({}, 8) is None


@pytest.mark.parametrize("name, before, now, says", [
    ("train_images", 384, 479, "--init runs/a to start from its weights; or the images that it was begun with"),
    ("classes", [], ["b"], "--init runs/a to start from its weights; or the images or --no-classes that"),
    ("classes", [str(i) for i in range(1000)], ["b"], r"now classes is .*--init runs/a .*the images that"),
    ("K", 8, 9, "or the old setting to continue it")])
def test_a_run_that_has_become_another(name, before, now, says):
    """What can be done when photos were added, in one line, however many classes there are."""
    with pytest.raises(UserError, match=says) as error:
        require_same_run(Path("runs/a"), {name: before}, {name: now})
    assert len(str(error.value)) < 250 and f"was made with {name} " in str(error.value)


def test_init_need_not_be_said_again(folder, run, tmp_path, capsys):
    """The plain command goes on with a run that was begun with --init, and trains what the whole command would."""
    shutil.copytree(run, tmp_path / "start")
    words = ["--data", folder, *flags(TINY)]
    for name in ("whole", "parts"):
        stage = [] if name == "whole" else ["--stage", "tokenizer"]
        assert call("train.py", *words, "--out", tmp_path / name, "--init", tmp_path / "start", *stage) == 0
    plain = [*words, "--out", tmp_path / "parts"]
    shutil.move(tmp_path / "start", tmp_path / "away")
    capsys.readouterr()
    assert call("train.py", *plain) == 2  # the denoiser's weights are still needed
    assert re.search("was begun with --init .*start, whose weights it needs until .* put them back",
                     capsys.readouterr().err)
    shutil.move(tmp_path / "away", tmp_path / "start")
    assert call("train.py", *plain) == 0
    found = [contents(tmp_path / name) for name in ("whole", "parts")]
    assert found[0]["ckpt.pt"] == found[1]["ckpt.pt"]
    shutil.rmtree(tmp_path / "start")
    assert call("train.py", *plain) == 0  # complete
    assert call("train.py", *plain, "--init", run) == 2  # of another start
    assert "give another --out" in capsys.readouterr().err
