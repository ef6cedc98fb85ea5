"""What goes wrong, and what is said of it: kills, full disks, too little memory, closed pipes, bugs, bad input."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from engine import tokens
from engine.process import RunError, on_out_of_memory
from extras import fid_command, fid_sources
from tests.common import HERE, TINY, call, contents, flags, piped, start_processes
from vqvae import VQVAE


def encode_by_two(*args, encode_sets=tokens.encode_sets):
    """tokens.encode_sets with two images at a time, so that there is something to be stopped in."""
    return encode_sets(*args[:5], 2, *args[6:])


@pytest.mark.parametrize("stage", ["tokenizer", "tokens", "diffusion"])
@pytest.mark.parametrize("how", ["Ctrl-C", "kill", "crash"])
def test_interrupted_and_continued(stage, how, folder, run, tmp_path, monkeypatch):
    """Stopped in any stage and started again: bit for bit what the uninterrupted run computed."""
    words = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]
    owner, name, calls = {"tokenizer": (VQVAE, "forward", 5), "tokens": (VQVAE, "encode", 12),
                          "diffusion": (train, "training_loss", 5)}[stage]
    real, seen = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == calls:
            if how == "crash":
                raise ArithmeticError
            os.kill(os.getpid(), signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(tokens, "encode_sets", encode_by_two)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        if how == "crash":
            with pytest.raises(ArithmeticError):
                call("train.py", *words)
        else:
            assert call("train.py", *words) == {"Ctrl-C": 130, "kill": 143}[how]
    assert not (tmp_path / "pets" / "metrics.json").exists()
    assert (tmp_path / "pets" / "tokens.npy").exists() == (stage == "diffusion")
    assert call("train.py", *words) == 0
    assert contents(tmp_path / "pets") == contents(run)


@pytest.mark.parametrize("file, error", [("tokenizer.pt", OSError(28, "No space left on device")),
                                         ("ckpt.pt", RuntimeError("writing failed"))])  # both: see test_atomic_writes
def test_full_disk(file, error, folder, run, tmp_path, capsys):
    """A checkpoint that cannot be written: one line, status 1; the one before is whole, and the run goes on from it."""
    out, saves, save = tmp_path / "pets", [], torch.save
    words = ["--data", folder, "--out", out, *flags(TINY)]

    def full(what, path, **options):
        saves.append(path.name == file + ".part")
        if sum(saves) == 2 and saves[-1]:
            path.write_bytes(b"half of it")
            raise error
        return save(what, path, **options)

    with mock.patch.object(torch, "save", full):
        assert call("train.py", *words) == 1
    said = capsys.readouterr().err
    assert f"{file} cannot be written" in said and "give the same command again" in said and said.count("\n") == 1
    assert torch.load(out / file, weights_only=True)["step"] == 4 and not list(out.glob("*.part"))
    assert call("train.py", *words) == 0 and contents(out) == contents(run)


OUT_OF_MEMORY = [torch.OutOfMemoryError(), MemoryError(),
                 RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you "
                              "tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)")]


def test_out_of_memory(fast, folder, run, tmp_path, capsys):
    """One line that names the flag to give, and its value; with it the run goes on to what it would have computed.

    Whichever of three ways it is said in.
    """
    errors = itertools.cycle(OUT_OF_MEMORY)
    for error in (*OUT_OF_MEMORY, RuntimeError("another"), ValueError("another")):
        with pytest.raises(RunError if error in OUT_OF_MEMORY else type(error), match="try|another"):
            with on_out_of_memory("try less"):
                raise error

    def runs_out(owner, name, says, program, *words):
        capsys.readouterr()
        with mock.patch.object(owner, name, side_effect=next(errors)) as called:
            assert call(program, *words) == 1 and called.called, name
        said = capsys.readouterr().err
        assert said.startswith(f"{program}: error: not enough memory: ") and said.count("\n") == 1, said
        assert says in said and len(set(re.findall(r"--[\w-]*batch", said))) == 1, said

    words = ["train.py", "--data", folder, "--out", tmp_path / "a", *flags(TINY)]
    eval_batch = "lower --eval-batch 256, and the run goes on"
    runs_out(VQVAE, "forward", "choose another --out and lower --tokenizer-batch", *words)
    runs_out(train, "evaluate_tokenizer", eval_batch, *words)
    assert call(*words, "--stage", "tokenizer") == 0
    runs_out(VQVAE, "encode", eval_batch, *words)
    assert call(*words, "--stage", "tokens") == 0
    runs_out(train, "held_out_bits", eval_batch, *words)
    runs_out(train, "training_loss", "6 images at once are too many for cpu: add --micro-batch 3 or "
             "--activation-checkpointing, and the run goes on", *words)
    runs_out(train, "training_loss", "3 images at once are too many for cpu: add --micro-batch 1 or", *words,
             "--micro-batch", 3)
    runs_out(train, "sample_together", eval_batch, *words)
    assert call(*words) == 0 and contents(tmp_path / "a") == contents(run)
    runs_out(fid_sources, "measure", eval_batch, *words, "--eval-fid", 9)
    words = "give --batch, or a lower one; the images stay", "sample.py", run / "ckpt.pt", "--batch", 5, "--out"
    runs_out(sample, "sample_tokens", *words, tmp_path / "a.png")
    runs_out(sample, "sample_tokens", *words, tmp_path / "a.npz")
    runs_out(fid_command, "measure", "lower --batch, and the score stays the same", "fid.py", folder, folder)


def crawl(*words):
    """train.py, encoding two images in a tenth of a second."""
    def encode(self, images, real=VQVAE.encode):
        time.sleep(0.1 if len(images) == 2 else 0)
        return real(self, images)

    tokens.encode_sets, VQVAE.encode = encode_by_two, encode
    return call("train.py", *words)


def test_killed_while_tokens_are_written(folder, run, tmp_path):
    """SIGKILL, then the same command: what was finished is kept, the rest is done, the file is the undisturbed one."""
    out, part = tmp_path / "pets", tmp_path / "pets" / "tokens.part.npy"
    words = [str(word) for word in ["--data", folder, "--out", out, *flags(TINY)]]
    process, = start_processes(crawl, *words)
    deadline = time.monotonic() + 60
    while not part.exists() or (np.load(part, mmap_mode="r")["label"] >= 0).sum() < 8:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    done = int((np.load(part, mmap_mode="r")["label"] >= 0).sum())
    assert 8 <= done < 40 and not (out / "tokens.npy").exists()
    encoded = []
    with mock.patch.object(tokens, "encode_sets", encode_by_two), mock.patch.object(
            VQVAE, "encode", lambda self, x, f=VQVAE.encode: encoded.append(len(x)) or f(self, x)):
        assert call("train.py", *words, "--stage", "tokens") == 0
    assert sum(encoded) == 40 - done and (out / "tokens.npy").read_bytes() == (run / "tokens.npy").read_bytes()


def pipe(directory, lines, program, *words):
    """A program whose reader closes the pipe after some lines: (exit status, what it said elsewhere)."""
    if not lines and program == "data.py":  # one of them as users type it, to the end of Python itself
        with subprocess.Popen([sys.executable, HERE / program, *map(str, words)], cwd=directory, stderr=subprocess.PIPE,
                              stdout=subprocess.PIPE) as process:
            process.stdout.close()
            error = process.stderr.read().decode()
            return process.wait(60), error
    with piped(directory / "errors", call, program, *words, buffered=not lines) as (process, output):
        for _ in range(lines):
            assert output.readline()
        output.close()
        process.join(60)
        return process.exitcode, (directory / "errors").read_text()


@pytest.mark.parametrize("program, lines", [("data.py", 0), ("data.py", 1), ("train.py", 1), ("sample.py", 0)])
def test_closed_pipe(program, lines, folder, run, tmp_path):
    """`python data.py toy | head -1`: it ends without a word, and as the shell's own programs do. A run goes on."""
    words = {"data.py": [folder, "--out", tmp_path / "data.png"], "sample.py": [run / "ckpt.pt", "--n", 1],
             "train.py": ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]}[program]
    status, error = pipe(tmp_path, lines, program, *words)
    assert status == 141, error
    for word in ("Broken pipe", "BrokenPipe", "room", "Traceback", "error"):
        assert word not in error, error
    if program == "train.py":
        assert not (tmp_path / "pets" / "metrics.json").exists()
        assert call(program, *words) == 0 and contents(tmp_path / "pets") == contents(run)


def test_a_bug_keeps_its_traceback(fast, folder, run, tmp_path, capsys):
    """A ValueError out of the network is not the user's: it is no line with status 2, in no program."""
    same = ["train.py", "--data", folder, *flags(TINY), "--out"]
    for owner, name, *words in ((VQVAE, "forward", *same, tmp_path / "a"),
                                (train, "training_loss", *same, tmp_path / "b", "--tokenizer", run / "tokenizer.pt"),
                                (sample, "sample_tokens", "sample.py", run / "ckpt.pt", "--out", tmp_path / "a.png"),
                                (fid_command, "measure", "fid.py", folder, folder),
                                (VQVAE, "encode", "vqvae.py", "report", run / "tokenizer.pt", "--data", folder)):
        with mock.patch.object(owner, name, side_effect=ValueError("inner")):
            with pytest.raises(ValueError, match="^inner$") as caught:
                call(*words)
        assert caught.type is ValueError and "error" not in capsys.readouterr().err, words


def test_bad_input(folder, run, tmp_path, capsys, monkeypatch):
    """One line that says what to do, exit status 2, before any work, nothing written and nothing written over."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    (tmp_path / "hurt").mkdir()
    for i in range(3):
        (tmp_path / "hurt" / f"{i}.png").write_bytes(b"\x89PNG, and then nothing")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save(Path("not weights only"), tmp_path / "pickle.pt")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    shutil.copytree(run, tmp_path / "run")

    def state():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}

    before = state()
    same = ["--data", folder, *flags(TINY), "--out"]
    for program, words, says in [
        ("train.py", ["--data", "nowhere"], "no such folder or file"),
        ("train.py", ["--data", "toyy"], "Did you mean toy?"),
        ("train.py", ["--data", "emty"], "Did you mean empty?"),
        ("train.py", ["--data", "empty"], "it holds no files; expected files that end in"),
        ("train.py", ["--data", "texts"], "it holds only files like .txt"),
        ("train.py", ["--data", "text.pt"], "is a file of no form that is known: give a folder"),
        ("train.py", ["--data", "hurt"], "no image in hurt can be read, e.g. 0.png"),
        ("train.py", [*same, "foreign"], "is no run of train.py: give another --out"),
        ("train.py", [*same, "run", "--K", 9], "was made with K 8, now K is 9"),
        ("train.py", [*same, "new", "--f", 3], "f = 3 must be a power of two that divides"),
        ("train.py", [*same, "new", "--heads", 3], "must be a multiple of heads"),
        ("train.py", [*same, "new", "--lr", "nan"], "--lr nan: must lie between"),
        ("train.py", [*same, "new", "--steps", 0], "--steps 0: must lie between 1"),
        ("train.py", [*same, "new", "--log-every", 20000], "--log-every 20000: must lie between 1 and 10000"),
        ("train.py", [*same, "new", "--clip", 0], "--clip 0.0: must lie between"),  # 0 would train nothing
        ("train.py", [*same, "new", "--shift", 0], "shift must be positive"),
        ("train.py", [*same, "new", "--device", "abacus"], "device 'abacus' is not available here"),
        ("train.py", [*same, "new", "--stage", "tokens"], "not there or not complete: run --stage tokenizer (or all)"),
        ("train.py", [*same, "new", "--tokenizer", "run/tokenizer.pt", "--K", 9],
         "has K 8, this run 9: leave --K away"),
        ("sample.py", ["nowhere.pt"], "no checkpoint at nowhere.pt: give a file that train.py wrote"),
        ("sample.py", ["run"], "run is a folder: give the file in it that train.py wrote, run/ckpt.pt"),
        ("train.py", [*same, "new", "--tokenizer", "run"], "that train.py wrote, run/tokenizer.pt"),
        ("sample.py", ["text.pt"], "cannot be read as a checkpoint"),
        ("sample.py", ["pickle.pt"], "is 'a file of another program', not 'vq-lcmd checkpoint 1'"),
        ("sample.py", ["other.pt"], "give the ckpt.pt that train.py wrote"),
        ("sample.py", ["run/tokenizer.pt"], "is 'vq-lcmd tokenizer 1', not 'vq-lcmd checkpoint 1'"),
        ("sample.py", ["run/ckpt.pt", "--class", "cow"], "no class 'cow'; there are 2: cat, dog"),
        ("sample.py", ["run/ckpt.pt", "--n", 0], "--n must be at least 1"),
        ("sample.py", ["run/ckpt.pt", "--device", "cuda:99"], "is not available here"),
        ("sample.py", ["run/ckpt.pt", "--temperature", 0], "temperature must be positive"),
        ("sample.py", ["run/ckpt.pt", "--guidance", "nan"], "guidance must be a finite number"),
        ("sample.py", ["run/ckpt.pt", "--guidance-interval", 0.5, 0.4], "must be 0 <= LOW <= HIGH <= 1"),
        ("sample.py", ["run/ckpt.pt", "--end", 1], "both must lie in [0, 1], the end lower"),
        ("sample.py", ["run/ckpt.pt", "--grid-of", "seed=1,2"], "of guidance, steps, temperature, end"),
        ("sample.py", ["run/ckpt.pt", "--grid-of", "steps=1,2.5"], "give NAME=VALUE,VALUE,..."),
        ("sample.py", ["run/ckpt.pt", "--grid-of", "steps=1,0"], "steps must be at least 1"),
        ("sample.py", ["run/ckpt.pt", "--trajectory", "--out", "a.npz"], "give a name that ends in .png"),
        ("sample.py", ["run/ckpt.pt", "--interpolate", "1,1"], "give two different seeds"),
        ("sample.py", ["run/ckpt.pt", "--inpaint", "hurt/0.png"], "belong together"),
        ("sample.py", ["run/ckpt.pt", "--mask", "hurt/0.png"], "belong together"),
        ("sample.py", ["run/ckpt.pt", "--inpaint", "good.png", "--mask", "black.png"], "black.png has no white pixel"),
        ("sample.py", ["run/ckpt.pt", "--inpaint", "good.png", "--mask", "text.pt"],
         "--mask text.pt: no image of a format"),
        ("sample.py", ["run/ckpt.pt", "--inpaint", "none.png", "--mask", "black.png"],
         "--inpaint none.png: No such file"),
        ("sample.py", ["run/ckpt.pt", "--vary", "hurt/0.png"], "--vary hurt/0.png: "),
        ("sample.py", ["run/ckpt.pt", "--vary", "good.png", "--strength", 1.1], "time goes down from t = 1.1"),
        ("sample.py", ["run/ckpt.pt", "--strength", 0.5], "and --strength to --vary: give both"),
        ("data.py", ["texts"], "it holds only files like .txt"),
    ]:
        capsys.readouterr()
        assert call(program, *words) == 2, words
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and "error: " in error, (words, error)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)  # --stage tokens makes its run directory
        assert state() == before, words
