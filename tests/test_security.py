"""Files of strangers: none is executed, none takes much memory, and each that is wrong is one line."""

import os
import re
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from embedding_diffusion import EmbeddingDiffusion
from engine.build import load_checkpoint, read_tokenizer, restore
from engine.checkpoint import CHECKPOINT_FORMAT, TOKENIZER_FORMAT, read_newest
from engine.validate import UserError
from extras.vqgan_losses import read_lpips
from tests.common import call, write_zip
from tests.test_tokenizer import layout, random_weights
from vqvae import VQVAE

CPU = torch.device("cpu")
SIZES = dict(tokenizer=dict(size=8, f=4, K=8, code_dim=4, width=16),
             denoiser=dict(K=8, grid=(2, 2), D=4, width=16, depth=1, heads=2, num_classes=2),
             schedule=dict(shift=1.0, log_snr_min=-10.0, log_snr_max=7.0))
NASTY = "a\x1b[31m\u202eb\n\t<i>"  # what a name may try
GONE = "(gone)"  # in place of a value: the entry is not there


def refused(read, path):
    """Does read(path) refuse the file in one line that names it, in 20 seconds and 600 MB more memory?"""
    now = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + (600 << 20), limits[1]))
    signal.alarm(20)
    try:
        with pytest.raises(UserError) as caught:
            read(path)
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    text, cause = str(caught.value), caught.value.__cause__
    return path.name in text and text.isprintable() and len(text) < 700 and not isinstance(cause, MemoryError)


def edited(state, entry, value):
    """Nested dicts in which an entry, "a/b/c", is another, or GONE, or a function of what it was."""
    name, _, rest = entry.partition("/")
    name = int(name) if name.isdigit() else name
    if rest:
        return state | {name: edited(state[name], rest, value)}
    new = value(state[name]) if callable(value) else value
    return {key: v for key, v in (state | {name: new}).items() if v is not GONE}


@pytest.fixture(scope="module")
def honest():
    """The state of an honest ckpt.pt, with an optimizer that did one step."""
    torch.manual_seed(0)
    tokenizer, model = VQVAE(**SIZES["tokenizer"]), EmbeddingDiffusion(**SIZES["denoiser"])
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    sum(p.square().sum() for p in model.parameters()).backward()
    adam.step()
    training = {"label_drop": 0.1, "tokenizer_steps": 8}
    return {"format": CHECKPOINT_FORMAT, "config": SIZES | {"training": training}, "step": 8,
            "tokenizer": tokenizer.state_dict(), "model": model.state_dict(), "ema": model.state_dict(),
            "optimizer": adam.state_dict(), "class_names": ["cat", NASTY], "class_counts": [3, 5],
            "sampling": {"steps": 3, "guidance": 1.0, "sampler": "ddim"},
            "metrics": {"vlb": {"total": 3.0}, "tokenizer": {"psnr": 20.0}}}


def resume(path):
    model = EmbeddingDiffusion(**SIZES["denoiser"])
    parts = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    restore(parts, read_newest(path, CHECKPOINT_FORMAT), {})


READERS = {  # name: (function of a path, file, the weight that is spoiled)
    "sample": (lambda path: load_checkpoint(path, CPU), "ckpt.pt", "ema/embedding"),
    "resume": (resume, "ckpt.pt", "model/head.weight"),
    "optimizer": (resume, "ckpt.pt", "optimizer/state/0/exp_avg"),
    "--tokenizer": (read_tokenizer, "tokenizer.pt", "tokenizer/encoder.0.weight"),
    "published": (read_tokenizer, "vqgan.ckpt", "state_dict/quantize.embedding.weight"),
    "--lpips-weights": (lambda path: read_lpips([path]), "lpips.ckpt",
                        "state_dict/loss.perceptual_loss.net.slice1.0.weight")}


class Hostile:
    """Unpickling it runs a program."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def save_packed(state, path):
    """Honest, but for 16 MB of zeros in 16 kB."""
    torch.save(state | {"more": torch.zeros(1 << 22)}, path)
    with zipfile.ZipFile(path) as plain:
        files = {name: plain.read(name) for name in plain.namelist()}
    write_zip(path, files)


def save_cut(state, path):
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)


WRITERS = {  # kind of file: function of an honest state and a path
    "runs a program": lambda state, path: torch.save(state | {"more": Hostile()}, path),
    "old format": lambda state, path: torch.save(state | {"more": Hostile()}, path,
                                                 _use_new_zipfile_serialization=False),
    "pipe": lambda state, path: os.mkfifo(path), "too large when unpacked": save_packed, "cut": save_cut}
WEIGHTS = {  # kind of weight: function of an honest one
    "gone": GONE, "text": lambda w: "text", "other shape": lambda w: w[..., :-1].clone(),
    "larger than the file": lambda w: torch.zeros(1).expand(1 << 40), "sparse": lambda w: w.to_sparse(),
    "NaN": lambda w: w * float("nan")}


@pytest.mark.parametrize("reader", READERS)
def test_files_that_lie(reader, honest, small_lpips, hostile_files, tmp_path, monkeypatch):
    """Each reader takes the honest file, and refuses each kind of another in one line."""
    read, name, entry = READERS[reader]
    tokenizer = {"format": TOKENIZER_FORMAT, "config": SIZES["tokenizer"], "metrics": {"psnr": 20.0},
                 "step": 8, "tokenizer": honest["tokenizer"]}
    state = {"ckpt.pt": honest, "tokenizer.pt": tokenizer,
             "vqgan.ckpt": {"state_dict": random_weights(layout(32, (1,), set(), 4, 3, 16))},
             "lpips.ckpt": torch.load(small_lpips, weights_only=True)}[name]
    path = tmp_path / name
    torch.save(state, path)
    read(path)
    monkeypatch.setattr("engine.validate.MAX_UNPACKED", 1000)
    monkeypatch.chdir(tmp_path)
    for kind, write in WRITERS.items():
        path.unlink()
        write(state, path)
        assert refused(read, path), kind
    for kind, program in hostile_files.items():  # TorchScript, tar
        path.unlink()
        shutil.copyfile(program, path)
        assert refused(read, path), kind
    for kind, value in WEIGHTS.items():
        torch.save(edited(state, entry, value), path)
        assert refused(read, path), kind
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry, value", [
    ("format", GONE), ("config", [1]), ("config/denoiser/K", 10 ** 9), ("config/denoiser/width", 10 ** 30),
    ("config/tokenizer/f", None), ("config/denoiser/grid", (10 ** 9, 10 ** 9)), ("config/denoiser/more", 1),
    ("config/denoiser/num_classes", 3), ("config/tokenizer/published", {"encoder.forward": [1]}),
    ("config/schedule/shift", float("nan")), ("config/training", {"label_drop": 2.0}),
    ("class_names", ["cat"]), ("class_counts", [1, -1]), ("class_counts", torch.tensor(3)),
    ("sampling/steps", 0), ("sampling/guidance", "1"), ("sampling/sampler", "x"), ("step", -1),
    ("ema/embedding", GONE)], ids=str)
def test_entries_that_lie(entry, value, honest, tmp_path):
    """ckpt.pt, as sample.py opens it: no entry is believed, and no model is made of wild sizes."""
    path = tmp_path / "ckpt.pt"
    torch.save(honest, path)
    assert load_checkpoint(path, CPU).class_names == ["cat", ascii(NASTY)[1:-1]]
    torch.save(edited(honest, entry, value), path)
    assert refused(lambda path: load_checkpoint(path, CPU), path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("command", [
    "train.py --data FOLDER --out new --init", "fid.py FOLDER FOLDER --weights", "vqvae.py report"])
def test_programs_execute_nothing(command, hostile_files, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*command.replace("FOLDER", str(folder)).split(), hostile_files["write"]) == 2
    error = capsys.readouterr().err
    assert "write.ckpt" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
