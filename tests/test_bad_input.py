"""What a user does wrong, and what his machine does to him: one line that says what to do, and a status."""

import itertools
import os
import shutil
import signal
import sys
from unittest import mock

import pytest
import torch
from PIL import Image

import losses
import sample
import vqvae
from engine import process
from engine.process import on_signal
from extras import fid_command, setup
from tests.common import TINY, call, contents, flags, train_tiny


def test_devices(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(setup, "choose_device", lambda name: torch.device("cuda"))
    assert train_tiny(folder, tmp_path / "a") == 2 and "more processes than GPUs" in capsys.readouterr().err


def test_out_of_memory(fast, folder, run, tmp_path, capsys):
    """One line that names the flags to give, in whichever of three ways it is said."""
    errors = itertools.cycle([torch.OutOfMemoryError(), MemoryError(), RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")])
    words = ["train.py", "--data", folder, "--out", tmp_path / "a", *flags(TINY)]
    for owner, name, flag, given in (
            (vqvae.VQVAE, "forward", "--tokenizer-batch", words),
            (losses, "training_loss", "--micro-batch", words),
            (sample, "sample_tokens", "--batch", ["sample.py", run / "ckpt.pt", "--out", tmp_path / "a.png"]),
            (fid_command, "measure", "--batch", ["fid.py", folder, folder])):
        capsys.readouterr()
        with mock.patch.object(owner, name, side_effect=next(errors)):
            assert call(*given) == 1
        said = capsys.readouterr().err
        assert "error: not enough memory: " in said and flag in said and said.count("\n") == 1


def test_full_disk(folder, tmp_path, capsys):
    with mock.patch.object(torch, "save", side_effect=RuntimeError("writing failed")):
        assert train_tiny(folder, tmp_path) == 1
    said = capsys.readouterr().err
    assert "tokenizer.pt cannot be written" in said and said.count("\n") == 1


def test_closed_pipe(folder, run, tmp_path, capsys):
    """`| head`: the program ends without a word, as the shell's own do. A run continues."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", 1) as closed, mock.patch.object(sys, "stdout", closed):
        assert train_tiny(folder, tmp_path) == 141
    assert capsys.readouterr().err == ""
    assert train_tiny(folder, tmp_path) == 0 and contents(tmp_path) == contents(run)


def test_signals(monkeypatch):
    """A second Ctrl-C exits at once; a second kill, as schedulers send it, lets a run save all the same."""
    monkeypatch.setattr(process, "SIGNALS", [signal.SIGTERM])
    on_signal(signal.SIGTERM, None)
    on_signal(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        on_signal(signal.SIGINT, None)
    assert process.SIGNALS == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]


def test_bad_input(folder, run, tmp_path, capsys, monkeypatch):
    """One line that says what to do, status 2, before any work; no file is written or written over."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "foreign", "hurt"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    for name in ("0.png", "1.png"):
        (tmp_path / "hurt" / name).write_bytes(b"\x89PNG, and then nothing")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    shutil.copytree(run, tmp_path / "run")

    def state():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    before, same, ckpt = state(), ["--data", str(folder), *flags(TINY), "--out"], "run/ckpt.pt"
    for says, program, *words in [
        ("no such folder or file", "train.py", "--data", "nowhere"),
        ("no images in empty", "train.py", "--data", "empty"),
        ("no form that is known", "train.py", "--data", "text.pt"),
        ("no image in hurt can be read", "train.py", "--data", "hurt"),
        ("is no run of train.py", "train.py", *same, "foreign"),
        ("power of two", "train.py", *same, "new", "--f", 3),
        ("--lr must be", "train.py", *same, "new", "--lr", "nan"),
        ("--clip must be", "train.py", *same, "new", "--clip", 0),  # 0 would train nothing
        ("leave --K away", "train.py", *same, "new", "--tokenizer", "run/tokenizer.pt", "--K", 9),
        ("no vq-lcmd checkpoint", "sample.py", "run/tokenizer.pt"),
        ("must be a finite number", "sample.py", ckpt, "--guidance", "nan"),
        ("hurt/0.png: no image", "sample.py", ckpt, "--vary", "hurt/0.png"),
        ("give REAL and FAKE, or REAL and --save-stats", "fid.py", "hurt"),
        ("can only stand at FAKE", "fid.py", ckpt, "hurt"),
        ("at least 1", "fid.py", "hurt", "hurt", "--size", 0),
        ("--n is for a checkpoint at FAKE", "fid.py", "hurt", "hurt", "--n", 5)]:
        capsys.readouterr()
        assert call(program, *words) == 2, words
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and "error: " in error, (words, error)
        assert state() == before, words
