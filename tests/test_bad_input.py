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
from engine.distributed import choose_device
from engine.process import on_signal
from extras import fid_command, setup
from tests.common import TINY, call, contents, flags


def test_devices(folder, tmp_path, monkeypatch, capsys):
    """More processes than GPUs are refused; --device cuda:1 sets what "the" GPU is."""
    with mock.patch.object(torch, "empty"), mock.patch.object(torch.cuda, "set_device") as chosen:
        choose_device("cuda:1")
    chosen.assert_called_once_with(torch.device("cuda", 1))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(setup, "choose_device", lambda name: torch.device("cuda"))
    words = ["--data", folder, "--out", tmp_path / "a"]
    assert call("train.py", *words) == 2 and "more processes than GPUs" in capsys.readouterr().err


OUT_OF_MEMORY = [torch.OutOfMemoryError(), MemoryError(),
                 RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")]


def test_out_of_memory(fast, folder, run, tmp_path, capsys):
    """One line that names the flags to give, in whichever of three ways it is said."""
    errors = itertools.cycle(OUT_OF_MEMORY)
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


def test_full_disk(folder, run, tmp_path, capsys):
    """A checkpoint that cannot be written: one line; the one before is whole, and the run continues."""
    out, save = tmp_path / "pets", torch.save
    words = ["--data", folder, "--out", out, *flags(TINY)]

    def full(what, path, **options):
        if path.name == "ckpt.pt.part" and what["step"] > 4:
            path.write_bytes(b"half of it")
            raise RuntimeError("writing failed")
        return save(what, path, **options)

    with mock.patch.object(torch, "save", full):
        assert call("train.py", *words) == 1
    said = capsys.readouterr().err
    assert "ckpt.pt cannot be written" in said and "same command again" in said and said.count("\n") == 1
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 4 and not list(out.glob("*.part"))
    assert call("train.py", *words) == 0 and contents(out) == contents(run)


@pytest.mark.parametrize("program, buffering", [("data.py", -1), ("train.py", 1)])
def test_closed_pipe(program, buffering, folder, run, tmp_path, capsys):
    """`| head`: the program ends without a word, as the shell's own do. A run continues."""
    words = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]
    if program == "data.py":
        words = [folder, "--out", tmp_path / "data.png"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering) as closed, mock.patch.object(sys, "stdout", closed):
        assert call(program, *words) == 141
    assert capsys.readouterr().err == ""
    if program == "train.py":
        assert call(program, *words) == 0 and contents(tmp_path / "pets") == contents(run)


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
    (tmp_path / "hurt" / "0.png").write_bytes(b"\x89PNG, and then nothing")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    shutil.copytree(run, tmp_path / "run")

    def state():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    before, same, ckpt = state(), ["--data", str(folder), *flags(TINY), "--out"], "run/ckpt.pt"
    inpaint = ["sample.py", ckpt, "--inpaint"]
    for says, program, *words in [
        ("no such folder or file", "train.py", "--data", "nowhere"),
        ("no images in empty", "train.py", "--data", "empty"),
        ("only files like .tex", "train.py", "--data", "foreign"),
        ("no form that is known", "train.py", "--data", "text.pt"),
        ("no image in hurt can be read", "train.py", "--data", "hurt"),
        ("is no run of train.py", "train.py", *same, "foreign"),
        ("power of two", "train.py", *same, "new", "--f", 3),
        ("--lr must be", "train.py", *same, "new", "--lr", "nan"),
        ("--clip must be", "train.py", *same, "new", "--clip", 0),  # 0 would train nothing
        ("run --stage tokenizer", "train.py", *same, "new", "--stage", "tokens"),
        ("leave --K away", "train.py", *same, "new", "--tokenizer", "run/tokenizer.pt", "--K", 9),
        ("give the ckpt.pt", "sample.py", "run/tokenizer.pt"),
        ("must be a finite number", "sample.py", ckpt, "--guidance", "nan"),
        ("no white pixel", *inpaint, "good.png", "--mask", "black.png"),
        ("--mask text.pt", *inpaint, "good.png", "--mask", "text.pt"),
        ("--vary hurt/0.png", "sample.py", ckpt, "--vary", "hurt/0.png"),
        ("t = 1.1", "sample.py", ckpt, "--vary", "good.png", "--strength", 1.1),
    ]:
        capsys.readouterr()
        assert call(program, *words) == 2, words
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and "error: " in error, (words, error)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)  # --stage tokens makes its run directory
        assert state() == before, words
