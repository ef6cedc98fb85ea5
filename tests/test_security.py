"""Files that somebody else made run nothing, wait for nothing and take no memory."""

import io
import os
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine.checkpoint import CHECKPOINT_FORMAT, CheckpointError, read_checkpoint
from engine.validate import UserError
from extras import foreign_checkpoint
from extras.published_vqgan import read_published
from tests.common import TINY, call, flags, piped


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_hostile_checkpoints(tmp_path):
    """A pickle that would run something is refused, and runs nothing."""
    for i, hostile in enumerate([Hostile(os.system, f"touch {tmp_path / 'ran'}"), Hostile(eval, "1 + 1"),
                                 Hostile(getattr, "a", "upper"), Hostile(subprocess.Popen, ["true"])]):
        for zipped in (True, False):
            path = tmp_path / f"{i}.ckpt"
            torch.save({"state_dict": {}, "callbacks": hostile}, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match=r"is refused: it names \w+\.\w+, which has no place"):
                read_published(path)
            with pytest.raises(CheckpointError, match=r"it names \w+\.\w+, .*: it is no file of train.py"):
                read_checkpoint(path, CHECKPOINT_FORMAT)
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(2)}}, tmp_path / "part.ckpt")
    torch.save({"state_dict": {"quantize.embed.weight": torch.zeros(2)}}, tmp_path / "gumbel.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    for name, says in (("part", "it has no decoder"), ("gumbel", "Gumbel quantiser"), ("text", "cannot be read")):
        with pytest.raises(ValueError, match=says):
            read_published(tmp_path / f"{name}.ckpt")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_file_of_others_runs_nothing(hostile_files, small_lpips, weights, folder, run, tmp_path, capsys):
    """TorchScript and tar archives, given wherever a file is taken: one line, status 2, nothing written, no waiting.

    torch.load hands the first to TorchScript, which runs what it says, and unpacks the second.
    """
    precious = next(iter(hostile_files.values())).parent / "precious"
    before = {path: path.read_bytes() for path in precious.parent.iterdir()}
    commands = {
        "--tokenizer": ("train.py", ["--data", folder, "--out", tmp_path / "a", "--tokenizer"], "is refused: it is"),
        "--lpips-weights": ("train.py", ["--data", folder, "--out", tmp_path / "b", *flags(TINY), "--perceptual", 1,
                                         "--lpips-weights"], "is refused: it is"),
        "report": ("vqvae.py", ["report"], "is refused: it is"),
        "report --lpips-weights": ("vqvae.py", ["report", run / "tokenizer.pt", "--data", folder, "--lpips-weights"],
                                   "is refused: it is"),
        "ckpt.pt": ("sample.py", [], "is refused: it is"),
        "--weights": ("fid.py", [folder, folder, "--weights"], "is not the published pt_inception-2015-12-05"),
    }
    for name, file in hostile_files.items():
        for where, (program, words, says) in commands.items():
            if name == "loop" and where != "--tokenizer":
                continue  # a guard that fails would wait for ever: once is enough, below by a process of its own
            capsys.readouterr()
            if name == "loop":
                with piped(tmp_path / "errors", call, program, *words, file) as (process, _):
                    process.join(60)
                    status, error = process.exitcode, (tmp_path / "errors").read_text()
            else:
                status, error = call(program, *words, file), capsys.readouterr().err
            assert status == 2 and error.count("\n") == 1 and says in error, (name, where, error)
        if name == "loop":
            continue
        for ending, program in ((".pt", "sample.py"), (".npz", "fid.py"), (".npz", "data.py")):
            pose = tmp_path / ("pose" + ending)  # posing as what it is not
            shutil.copyfile(file, pose)
            words = [folder, pose, "--weights", weights] if program == "fid.py" else [pose]
            capsys.readouterr()
            assert call(program, *words) == 2 and capsys.readouterr().err.count("\n") == 1, (name, ending)
        for part in ("tokenizer.pt", "ckpt.pt"):  # in a run directory that somebody passed on
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(run, tmp_path / "run")
            shutil.copyfile(file, tmp_path / "run" / part)
            capsys.readouterr()
            assert call("train.py", "--data", folder, "--out", tmp_path / "run", *flags(TINY)) == 2
            error = capsys.readouterr().err
            assert "is refused: it is" in error and error.count("\n") == 1, (name, part, error)
    assert {path: path.read_bytes() for path in precious.parent.iterdir()} == before


def test_small_files_that_claim_much(tmp_path, folder, run, capsys, monkeypatch):
    """Archives that unpack to more than they hold, sizes that are not there, a pipe: refused, and no memory taken."""
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:  # a header of 4 TB
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                      "shape": (1 << 20, 1024, 1024, 3)})
        archive.writestr("images.npy", header.getvalue())
    monkeypatch.setenv("VQLCMD_MAX_UNPACKED_BYTES", str(1 << 20))
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((2, 1 << 20, 1, 3), np.uint8))
    pickled = np.empty(2, object)
    np.savez(tmp_path / "pickled.npz", images=pickled)
    np.save(tmp_path / "pickled.npy", pickled)
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "b.png")
    (tmp_path / "deep" / "dataset.json").write_text("[" * 100000)
    for name, says in (("huge.npz", "more than it holds"), ("bomb.npz", "VQLCMD_MAX_UNPACKED_BYTES"),
                       ("pickled.npz", "Python objects"),
                       ("pickled.npy", "Python objects"), ("deep", "no whole-number label")):
        capsys.readouterr()
        assert call("train.py", "--data", tmp_path / name, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (name, error)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("[" * 100000)
    assert call("train.py", "--data", folder, "--out", tmp_path / "run", *flags(TINY)) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
    os.mkfifo(tmp_path / "deep" / "c.png")
    with pytest.raises(UserError, match="a pipe, no file"):  # opening it would wait for a writer
        data.load_image(str(tmp_path / "deep" / "c.png"), 8)
    # Tensors and archives of checkpoints.
    storage = torch.arange(4.0)
    for size, stride in (((1 << 40,), (0,)), ((2, 4), (4, 1)), ((3,), (2,))):
        with pytest.raises((ValueError, RuntimeError)):
            foreign_checkpoint.rebuild_tensor(storage, 0, size, stride)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, \
            zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    assert foreign_checkpoint.read_state(tmp_path / "plain.pt")["a"].shape == (1000,)
    with pytest.raises(ValueError, match="unpacks to more than the file holds"):
        foreign_checkpoint.read_state(tmp_path / "packed.pt")
