"""Files of strangers: none is executed, none takes much memory, and each that is wrong is one line."""

import contextlib
import copy
import os
import re
import shutil
import signal
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from embedding_diffusion import EmbeddingDiffusion
from engine.build import load_checkpoint, load_tokenizer, read_tokenizer, restore
from engine.checkpoint import CHECKPOINT_FORMAT, TOKENIZER_FORMAT, read_checkpoint, read_newest
from engine.validate import UserError, read_array, read_json
from extras.vqgan_losses import read_lpips
from tests.common import TINY, call, flags
from tests.test_tokenizer import layout, random_weights
from vqvae import VQVAE

CPU = torch.device("cpu")
SIZES = dict(tokenizer=dict(size=8, f=4, K=8, code_dim=4, width=16),
             denoiser=dict(K=8, grid=(2, 2), D=4, width=16, depth=1, heads=2, num_classes=2),
             schedule=dict(shift=1.0, log_snr_min=-10.0, log_snr_max=7.0))
NASTY = "a\x1b[31m\u202eb\n\t<i>"  # what a name may try
GONE = object()  # in place of a value: the entry is not there


@contextlib.contextmanager
def bounded(seconds=20, memory=600 << 20):
    """In this block what waits is killed by an alarm, and MemoryError comes beyond so many bytes more."""
    resource = pytest.importorskip("resource")
    with open("/proc/self/status") as file:
        now = int(re.search(r"VmData:\s+(\d+)", file.read())[1]) << 10
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + memory, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def refused(read, path):
    """The one line in which read(path) refuses a file."""
    with bounded(), pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).isprintable() and 20 < len(str(caught.value)) < 700
    error = caught.value
    while error is not None:
        assert not isinstance(error, MemoryError)  # refused in time, not because memory was short
        error = error.__cause__ or error.__context__
    return str(caught.value)


def edited(state, entry, value):
    """A copy of nested dicts in which an entry, "a/b/c", is another, or GONE, or a function of what it was."""
    state, (*path, last) = copy.copy(state), entry.split("/")
    inner = state
    for part in path:
        inner[part] = copy.copy(inner[part])
        inner = inner[part]
    inner[last] = value(inner[last]) if callable(value) else value
    if value is GONE:
        del inner[last]
    return state


@pytest.fixture(scope="module")
def honest():
    """The state of an honest ckpt.pt, with an optimizer that did one step."""
    torch.manual_seed(0)
    tokenizer, model = VQVAE(**SIZES["tokenizer"]), EmbeddingDiffusion(**SIZES["denoiser"])
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    sum(p.square().sum() for p in model.parameters()).backward()
    adam.step()
    return {"format": CHECKPOINT_FORMAT, "config": SIZES | {"training": {"label_drop": 0.1, "tokenizer_steps": 8}},
            "tokenizer": tokenizer.state_dict(), "model": model.state_dict(), "ema": model.state_dict(),
            "optimizer": adam.state_dict(), "class_names": ["cat", NASTY], "class_counts": [3, 5], "begin": 0,
            "step": 8, "history": [], "sampling": {"steps": 3, "guidance": 1.0, "sampler": "ddim"},
            "metrics": {"vlb": {"total": 3.0}, "collapse": {}, "tokenizer": {"psnr": 20.0}}}


def resume(path):
    model = EmbeddingDiffusion(**SIZES["denoiser"])
    restore({"model": model, "optimizer": torch.optim.AdamW(model.parameters())},
            read_newest(path, CHECKPOINT_FORMAT), {})


READERS = {  # name: (function of a path, file, the weight that is spoiled)
    "sample": (lambda path: load_checkpoint(path, CPU), "ckpt.pt", "ema/embedding"),
    "resume": (resume, "ckpt.pt", "model/head.weight"),
    "optimizer": (resume, "ckpt.pt", "optimizer/state/0/exp_avg"),
    "run": (lambda path: load_tokenizer(SIZES["tokenizer"], path.parent, CPU), "tokenizer.pt",
            "tokenizer/quantizer.codebook"),
    "--tokenizer": (read_tokenizer, "tokenizer.pt", "tokenizer/encoder.0.weight"),
    "published": (read_tokenizer, "vqgan.ckpt", "state_dict/quantize.embedding.weight"),
    "--lpips-weights": (lambda path: read_lpips([path]), "lpips.ckpt",
                        "state_dict/loss.perceptual_loss.net.slice1.0.weight")}


class Hostile:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def deflated(state, path):
    torch.save({"more": torch.zeros(1 << 18)}, path.with_name("plain"))
    with zipfile.ZipFile(path.with_name("plain")) as plain, \
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))


WRITERS = {  # kind of file: function of an honest state and a path
    "runs a program": lambda state, path: torch.save(state | {"more": Hostile(os.system, "touch ran")}, path),
    "evaluates": lambda state, path: torch.save(state | {"more": Hostile(eval, "open('ran', 'w')")}, path),
    "calls": lambda state, path: torch.save(state | {"more": Hostile(getattr, "a", "upper")}, path),
    "runs, old format": lambda state, path: torch.save(
        state | {"more": Hostile(subprocess.Popen, ["touch", "ran"])}, path, _use_new_zipfile_serialization=False),
    "text": lambda state, path: path.write_text("hello"),
    "empty": lambda state, path: path.write_text(""),
    "pipe": lambda state, path: os.mkfifo(path),
    "too large when unpacked": deflated}
for name in ("write", "overwrite", "loop", "hard", "symbolic"):  # TorchScript, and tar archives of links
    WRITERS[name] = lambda state, path, name=name: shutil.copyfile(path.parent / "programs" / f"{name}.ckpt", path)
for name, end in (("half", 0.5), ("all but the end", 0.99)):
    WRITERS[name] = lambda state, path, end=end: (torch.save(state, path), os.truncate(
        path, int(path.stat().st_size * end)))
WEIGHTS = {  # kind of weight: function of an honest one
    "gone": GONE, "text": lambda w: "text", "other shape": lambda w: w[..., :-1].clone(),
    "larger than the file": lambda w: torch.zeros(1).expand(1 << 40),
    "NaN": lambda w: w * float("nan"), "infinite": lambda w: torch.full_like(w, float("inf")),
    "sparse": lambda w: w.to_sparse(), "a part": lambda w: torch.zeros(1).expand(w.shape)}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("reader", READERS)
def test_files_that_lie(reader, honest, small_lpips, hostile_files, tmp_path, monkeypatch):
    """Each reader takes the honest file, and refuses each kind of another in one line that names it."""
    read, name, entry = READERS[reader]
    vqgan = {"state_dict": random_weights(layout(32, (1,), set(), 4, 3, 16))}
    tokenizer = {"format": TOKENIZER_FORMAT, "config": SIZES["tokenizer"], "metrics": {"psnr": 20.0}, "step": 8,
                 "tokenizer": honest["tokenizer"]}
    state = {"ckpt.pt": honest, "tokenizer.pt": tokenizer, "vqgan.ckpt": vqgan,
             "lpips.ckpt": torch.load(small_lpips, weights_only=True)}[name]
    path = tmp_path / name
    torch.save(state, path)
    read(path)
    (tmp_path / "programs").symlink_to(hostile_files["write"].parent)
    monkeypatch.setattr("engine.validate.MAX_UNPACKED", 1000)
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in hostile_files["write"].parent.iterdir()}
    for kind, write in WRITERS.items():
        path.unlink()
        write(state, path)
        print(kind)
        assert name in refused(read, path), kind
    for kind, value in WEIGHTS.items():
        if reader == "optimizer" and kind in ("NaN", "infinite", "a part"):
            continue  # training stops at the first step with them
        path.unlink()
        torch.save(edited(state, entry, value), path)
        assert name in refused(read, path), kind
    assert not (tmp_path / "ran").exists()
    assert {file: file.read_bytes() for file in hostile_files["write"].parent.iterdir()} == before


@pytest.mark.parametrize("entry, values", [
    ("format", [GONE, torch.zeros(2), "vq-lcmd checkpoint 2"]), ("config", [GONE, [1], torch.zeros(2)]),
    *((f"config/{size}", [0, 10 ** 9, 10 ** 30, "2", 2.5, None]) for size in (
        "denoiser/K", "denoiser/width", "denoiser/depth", "denoiser/heads", "tokenizer/K", "tokenizer/f",
        "tokenizer/blocks", "tokenizer/size")),
    ("config/denoiser/grid", ["22", (10 ** 9, 10 ** 9), (2, 1)]), ("config/denoiser/num_classes", [3, 10 ** 9]),
    ("config/denoiser/more", [1]), ("config/tokenizer/published", [[1], {"encoder.x": [10 ** 9, 10 ** 9]}]),
    ("config/schedule/shift", [0.0, float("nan"), "a"]), ("config/training", [GONE, {"label_drop": 2.0}]),
    ("class_names", ["cats", [1, 2], ["cat"]]), ("class_counts", [GONE, [1, -1], [1] * 9, [True, 1], {"cat": 1}]),
    ("sampling/steps", [GONE, 0, 10 ** 12, 2.5, torch.ones(1)]), ("sampling/guidance", ["1", float("nan")]),
    ("sampling/sampler", ["x", ["ddim"]]), ("step", [-1, "8", 10 ** 40, True]),
    ("metrics/vlb", [3, {"total": "\x1b[31m"}]), ("ema/\x1b\n", [torch.zeros(2)])], ids=str)
def test_entries_that_lie(entry, values, honest, tmp_path):
    """ckpt.pt, as sample.py opens it: no entry is believed, and no model made of sizes that make no sense."""
    for value in values:
        torch.save(edited(honest, entry, value), tmp_path / "ckpt.pt")
        assert "ckpt.pt" in refused(lambda path: load_checkpoint(path, CPU), tmp_path / "ckpt.pt"), value


def test_names_are_printable(honest, tmp_path):
    torch.save(honest, tmp_path / "ckpt.pt")
    assert read_checkpoint(tmp_path / "ckpt.pt", CHECKPOINT_FORMAT)["class_names"][1].isprintable()
    assert str(UserError(NASTY)) == "a\\x1b[31m\\u202eb\\n\\t<i>"


def test_arrays_and_json_that_lie(hostile_files, tmp_path):
    """.npy with objects, cut short, of a size that it lacks; JSON that is half, nested, or of another kind."""
    np.save(tmp_path / "runs.npy", np.array([Hostile(os.system, f"touch {tmp_path / 'ran'}")]), allow_pickle=True)
    np.save(tmp_path / "whole.npy", np.arange(99))
    assert read_array(tmp_path / "whole.npy").sum() == 99 * 49
    whole = (tmp_path / "whole.npy").read_bytes()
    for name, content in {"cut": whole[:-9], "header": whole[:60], "claims": whole.replace(b"(99,), }  ", b"(9 ** 9,)}"),
                          "huge": whole.replace(b"(99,), }     ", b"(999999999,)}"), "text": b"hello"}.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
    np.savez(tmp_path / "zip", np.arange(9))
    os.mkfifo(tmp_path / "pipe.npy")
    for path in [*tmp_path.glob("*.np[yz]"), *hostile_files.values()]:
        if path.name != "whole.npy":
            assert path.name in refused(read_array, path)
    for content in ("[" * 10 ** 5, '{"a":', "[]", "\udcff"):
        (tmp_path / "a.json").write_text(content, errors="surrogateescape")
        assert "a.json" in refused(read_json, tmp_path / "a.json")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("program, words", [
    ("train.py", ["--data", "FOLDER", "--out", "new", *flags(TINY), "--tokenizer"]),
    ("train.py", ["--data", "FOLDER", "--out", "new", *flags(TINY), "--init"]),
    ("train.py", ["--data", "FOLDER", "--out", "new", "--perceptual", 1, "--lpips-weights"]),
    ("vqvae.py", ["report"]), ("vqvae.py", ["report", "RUN/tokenizer.pt", "--data", "FOLDER", "--lpips-weights"]),
    ("sample.py", []), ("fid.py", ["FOLDER", "FOLDER", "--weights"])], ids=str)
def test_programs_execute_nothing(program, words, hostile_files, folder, run, tmp_path, monkeypatch, capsys):
    """Wherever a file is given: status 2, one line, and nothing written."""
    words = [str(word).replace("FOLDER", str(folder)).replace("RUN", str(run)) for word in words]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert call(program, *words, hostile_files["write"]) == 2
    error = capsys.readouterr().err
    assert "write.ckpt" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
