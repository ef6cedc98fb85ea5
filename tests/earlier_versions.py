"""What earlier versions left: their flags are understood, and their run directories go on."""

import csv
import json
import os
import signal

import pytest
import torch

import train
from engine.checkpoint import RENAMED, rename
from engine.config import OPTIONS
from engine.status import StatusLog
from tests.common import TINY, call, contents, flags
from vqvae import VQVAE

OLD_NAMES = {name: old for old, name in RENAMED.items()}
OLD_COLUMNS = {"tokenizer": ["step", "reconstruction", "commitment", "codebook", "adversarial", "weight",
                             "discriminator", "lr", "codes", "img/s"],
               "diffusion": ["step", "rec", "diff", "cm", "norm", "lr", "img/s", "rank", "min_dist"]}


def test_old_flags(folder, capsys):
    """They give the same configuration as the new ones, and --help does not show them."""
    def resolved(*words):
        assert call("train.py", "--data", folder, "--dry-run", *flags(TINY), *words) == 0
        return capsys.readouterr().out

    for old, new in (("--p-drop 0.9", "--max-drop-rate 0.9"), ("--max-snr 2", "--weight-clip 2"),
                     ("--coupling shared", "--cm-pairs shared"), ("--no-likelihood", "--no-output-prior"),
                     ("--likelihood", "--output-prior")):
        assert resolved(*old.split()) == resolved(*new.split())
        assert (resolved(*new.split()) == resolved()) == (new == "--output-prior")  # which is the default
    assert call("train.py", "--help") == 0
    shown = capsys.readouterr().out
    for name in OLD_NAMES.keys() & OPTIONS.keys():
        assert f"--{name.replace('_', '-')}" in shown and f"--{OLD_NAMES[name].replace('_', '-')}" not in shown


def make_old(out):
    """The files of a run directory as they were before options, entries and columns got the names of today."""
    def old(value):
        return {OLD_NAMES.get(k, k): old(v) for k, v in value.items()} if type(value) is dict else value

    (out / "config.json").write_text(json.dumps(old(json.loads((out / "config.json").read_text()))))
    for path in out.glob("*.pt"):
        state = old(torch.load(path, weights_only=True))
        if "used" in state:  # the codes in use stood beside the rows of losses, which had no norms of gradients
            state["history"] = [row[[0, 1, 2, 4, 5, 6]] for row in state["history"]], state.pop("used")
        torch.save(state, path)
    for name, columns in OLD_COLUMNS.items():
        if (path := out / f"{name}.csv").exists():
            with path.open(newline="") as file:
                rows = [row | {"rank": row.get("effective_rank"), "min_dist": row.get("smallest_distance")}
                        for row in csv.DictReader(file)]
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)


@pytest.mark.parametrize("stage", ["tokenizer", "diffusion"])
def test_old_run_directory_goes_on(stage, folder, run, tmp_path, monkeypatch):
    """One that stopped within a stage, and then one that is complete: the weights, and the last line, of a new one."""
    words, out = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)], tmp_path / "pets"
    owner, name = {"tokenizer": (VQVAE, "forward"), "diffusion": (train, "training_loss")}[stage]
    real, seen = getattr(owner, name), []

    def stopped(*args, **kwargs):
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        assert call("train.py", *words) == 143
    make_old(out)
    state = torch.load(out / ("tokenizer.pt" if stage == "tokenizer" else "ckpt.pt"), weights_only=True)
    assert state["step"] == 5 and "p_drop" in json.loads((out / "config.json").read_text())
    if stage == "tokenizer":
        assert {"judge", "judges"} <= state.keys()
    else:
        assert "likelihood" in state["config"]["denoiser"] and "max_snr" in state["config"]["training"]
    assert call("train.py", *words) == 0
    found, expected = contents(out), contents(run)
    for file, parts in (("tokenizer.pt", ("tokenizer", "discriminator")), ("ckpt.pt", ("model", "ema"))):
        assert all(rename(found[file])[part] == expected[file][part] for part in parts)
    assert found["tokens.npy"] == expected["tokens.npy"]
    last = expected[f"{stage}.csv"][-1]  # the columns of today
    assert {name: found[f"{stage}.csv"][-1].get(name) for name in last} == last
    make_old(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert call("train.py", *words) == 0 and {path: path.stat().st_mtime_ns for path in times} == times
    assert call("sample.py", out / "ckpt.pt", "--out", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (run / "samples_000008.png").read_bytes()


def test_old_rows_of_the_tokenizer(tmp_path):
    """They lay in a pair with the codes in use, and had no norm: a pair is not taken for rows, whatever its lengths."""
    names = ["reconstruction", "commitment", "codebook", "norm"]
    state = {"step": 4, "history": ([torch.ones(3) for _ in names], 2 * torch.ones(len(names)))}
    log = StatusLog("tokenizer", tmp_path, names, TINY, 8, 4, torch.device("cpu"), state, K=len(names))
    log.add({name: torch.tensor(2.0) for name in names}, torch.tensor([0]))
    log.line()
    with (tmp_path / "tokenizer.csv").open() as file:
        row, = csv.DictReader(file)
    assert [float(row[name]) for name in names] == [2, 2, 2, 2] and int(row["codes"]) <= len(names)
