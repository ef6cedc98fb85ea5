"""The programs, run as their users do: images in, images out, every flag, runs that go on."""

import json
import runpy
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from engine.build import load_tokenizer
from engine.config import TOKENIZER_OPTIONS, choose_preset
from extras.datasets import find
from tests import common
from tests.common import TINY, call, contents, flags, make_folder, parser_flags, rows_of, train_tiny

LATE = {name: value for name, value in TINY.items() if name not in TOKENIZER_OPTIONS.values()}


def load(path):
    return torch.load(path, weights_only=True)


def test_commands(folder, tmp_path, monkeypatch, capsys):
    """As typed: train; then train again (complete, nothing touched), sample; all from another directory."""
    monkeypatch.chdir(tmp_path)
    words = ["train.py", "--data", folder, *flags(TINY)]
    as_typed = SimpleNamespace(main=lambda: runpy.run_path(common.HERE / "train.py", run_name="__main__"))
    with mock.patch.dict(common.PROGRAMS, {"train.py": as_typed}):
        assert call(*words) == 0
    text = capsys.readouterr().out
    assert "38 images + 2 held out, 2 classes: cat (20), dog (20)" in text
    assert "python sample.py runs/pets/ckpt.pt" in text
    out = tmp_path / "runs" / "pets"
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()
             if path.name not in ("config.json", "index.html", "run.js", "state.json")}
    assert {path.name for path in files} >= {
        "tokenizer.pt", "tokenizer.csv", "reconstructions_000008.png", "tokens.npy", "ckpt.pt", "best.pt",
        "diffusion.csv", "evaluation.csv", "metrics.json", "samples_000008.png", "data.png", "skipped.txt"}
    assert call(*words) == 0 and capsys.readouterr().out.count("complete") == 4
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert call("sample.py", "runs/pets/ckpt.pt") == 0  # at its defaults, the picture that train.py drew last
    assert (tmp_path / "samples.png").read_bytes() == (out / "samples_000008.png").read_bytes()
    bound = json.loads((out / "metrics.json").read_text())["vlb"]
    assert bound["total"] == pytest.approx(bound["prior"] + bound["rec"] + bound["diff"])
    untrained = rows_of(out / "evaluation.csv")[0]
    # At step 0 it is the exact denoiser of uniform tokens: log2 K bits, up to the error of the estimate.
    assert abs(float(untrained["total"]) - 3) < 4 * float(untrained["standard_error"]) < 1


def test_flip(folder, run, tmp_path):
    """--flip: the training images once more, mirrored, with their labels; held-out images as they are.
    --tokenizer takes it out of a ckpt.pt."""
    out = tmp_path / "flip"
    assert train_tiny(folder, out, "--flip", "--tokenizer", run / "ckpt.pt", "--stage", "tokens") == 0
    assert not (out / "tokenizer.csv").exists()
    plain, both = np.load(run / "tokens.npy"), np.load(out / "tokens.npy")
    assert np.array_equal(both[:38], plain[:38]) and np.array_equal(both[-2:], plain[-2:])
    train_set, test_set = find(str(folder)).load(8)
    assert both["label"].tolist() == 2 * train_set.labels.tolist() + test_set.labels.tolist()
    assert not both["test"][:76].any()
    tokenizer, _ = load_tokenizer(load(run / "tokenizer.pt")["config"], run, torch.device("cpu"))
    assert np.array_equal(both["x"][38:76], tokenizer.encode(train_set.pixels.flip(3)).numpy())


def test_tokens_of_another_run(run, tmp_path, capsys):
    """--data RUN/tokens.npy trains the same denoiser; the tokenizer lies beside it or is named."""
    late, other = flags(LATE), load(run / "tokenizer.pt")
    assert call("train.py", "--data", run / "tokens.npy", "--out", tmp_path / "a", *late) == 0
    assert contents(tmp_path / "a")["ckpt.pt"] == contents(run)["ckpt.pt"]
    alone = ["--data", shutil.copy(run / "tokens.npy", tmp_path), *late, "--out", tmp_path / "b"]
    assert call("train.py", *alone) == 2 and "no such file" in capsys.readouterr().err
    assert call("train.py", *alone, "--tokenizer", run / "tokenizer.pt", "--stage", "tokens") == 0
    assert (tmp_path / "b" / "tokens.npy").read_bytes() == (run / "tokens.npy").read_bytes()
    other["tokenizer"]["decoder.0.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    alone[-1] = tmp_path / "c"
    assert call("train.py", *alone, "--tokenizer", tmp_path / "other.pt") == 2
    assert "was made by tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("name, pixels, on_cpu, preset", [
    (None, 999, True, "32-cpu"), (None, 40, False, "32"), (None, 41, False, "64"), (None, 129, False, "256"),
    ("mnist", 28, True, "32-cpu"), ("mnist", 28, False, "mnist"), ("ffhq", 1024, True, "ffhq")])
def test_presets(name, pixels, on_cpu, preset):
    """A preset is chosen by the name of a set or the size of its images; a CPU gets the small one."""
    assert choose_preset(name, pixels, on_cpu)[0] == preset


def test_raising_the_steps_goes_on(folder, run, tmp_path):
    """A complete run continues with more --steps; the tokenizer and the tokens stay."""
    shutil.copytree(run, tmp_path / "pets")
    assert train_tiny(folder, tmp_path / "pets", steps=10) == 0
    before, after = contents(run), contents(tmp_path / "pets")
    assert after["ckpt.pt"]["step"] == 10 and [r["step"] for r in after["diffusion.csv"]] == [*"2468", "10"]
    assert after["tokenizer.pt"] == before["tokenizer.pt"] and after["tokens.npy"] == before["tokens.npy"]
    # Its learning rate begins anew: of two steps the second is at half the peak.
    assert float(after["diffusion.csv"][-1]["lr"]) == TINY["lr"] / 2


@pytest.mark.parametrize("classes, init", [(2, ""), (2, "ckpt.pt"), (3, "")])
def test_from_the_weights_of_another_run(classes, init, folder, run, tmp_path):
    """--init: the weights of another run are the start of this one, but for those of other classes."""
    if classes == 3:
        folder = make_folder(tmp_path / "birds", classes=("a", "b", "c"), each=5)
    assert train_tiny(folder, tmp_path / "a", "--init", run / init, lr=0.0) == 0
    start, found = load(run / "ckpt.pt")["ema"], load(tmp_path / "a" / "ckpt.pt")["ema"]
    other = {name for name, value in start.items()
             if found[name].shape != value.shape or (found[name] - value).abs().max() > 1e-6}
    assert other == ({"class_embedding.weight"} if classes == 3 else set())


def test_from_the_tokenizer_of_another_run(folder, run, tmp_path, capsys):
    """--init: its discriminator, too. Other sizes are refused."""
    still = dict(tokenizer_lr=0.0, gan_lr=0.0, stage="tokenizer")
    assert train_tiny(folder, tmp_path / "a", "--init", run, **still) == 0
    start, found = load(run / "tokenizer.pt"), load(tmp_path / "a" / "tokenizer.pt")
    for part in ("tokenizer", "discriminator"):
        assert all(torch.equal(value, found[part][name]) for name, value in start[part].items()
                   if "quantizer" not in name)
    assert train_tiny(folder, tmp_path / "b", "--init", run, width=32) == 2
    assert "take its --preset and sizes" in capsys.readouterr().err


def test_folders_that_are_no_classes(folder, tmp_path, capsys):
    """--no-classes: albums, say."""
    assert train_tiny(folder, tmp_path, "--no-classes") == 0 and "no classes" in capsys.readouterr().out
    assert (np.load(tmp_path / "tokens.npy")["label"] == 0).all()
    assert load(tmp_path / "ckpt.pt")["class_names"] == []
    assert call("sample.py", tmp_path / "ckpt.pt", "--n", 1, "--steps", 1, "--out", tmp_path / "a.png") == 0
    assert "guidance 0.0" in capsys.readouterr().out


OF_IMAGES = dict(
    size=16, f=2, K=7, code_dim=3, tokenizer_width=32, tokenizer_blocks=2, codebook_update="gradient",
    beta=3.0, pixel_loss="l1", perceptual=0.5, gan=0.0, gan_lr=1e-2, gan_start=0.5, tokenizer_steps=5,
    tokenizer_batch=5, tokenizer_lr=1e-2, flip=True, seed=1)
OF_TOKENS = dict(
    D=5, norm="layer", embedding_init="random", width=32, depth=2, heads=4, output_prior=False,
    posterior_input=False, shift=1.0, log_snr_min=-8.0, log_snr_max=5.0, w_rec=0.5, w_diff=0.5, w_cm=0.0,
    weight_clip=1.0, rec_fraction=0.5, cm_pairs="shared", max_gap=0.5, teacher="current", max_drop_rate=0.9,
    label_drop=0.9, steps=5, batch=7, lr=2e-2, warmup=3, weight_decay=5.0, clip=1e-3, ema_decay=0.05,
    sample_steps=4, guidance=40.0, sampler="ddim", log_every=3, sample_every=3, save_every=1, eval_batch=128)
TESTED_ELSEWHERE = {
    "activation_checkpointing", "allow_bad", "chip", "compile", "data", "device", "dry_run", "eval_fid",
    "fid_every", "init", "lpips_weights", "micro_batch", "minutes", "no_cache", "no_classes", "out", "preset",
    "root", "stage", "tokenizer"}
SHORT = TINY | {"tokenizer_steps": 4, "steps": 4}


@pytest.fixture(scope="module")
def baselines(folder, tmp_path_factory):
    """{option: (what to train on, what a short run computed)}: from images, and from its tokens."""
    out = tmp_path_factory.mktemp("baselines")
    assert call("train.py", "--data", folder, "--out", out / "a", *flags(SHORT)) == 0
    by_images, tokens = contents(out / "a"), out / "b" / "tokens.npy"
    for data, name in (folder, "b"), (tokens, "c"):  # quicker without a discriminator
        assert call("train.py", "--data", data, "--out", out / name, *flags(SHORT), "--gan", 0) == 0
    by_tokens = contents(out / "c")
    assert by_tokens["ckpt.pt"] == contents(out / "b")["ckpt.pt"] and "tokenizer.csv" not in by_tokens
    return dict.fromkeys(OF_IMAGES, (folder, by_images)) | dict.fromkeys(OF_TOKENS, (tokens, by_tokens))


def test_every_flag_of_train_is_tested():
    assert set(parser_flags("train.py")) - TESTED_ELSEWHERE == {*OF_IMAGES, *OF_TOKENS}


@pytest.mark.parametrize("name", [*OF_IMAGES, *OF_TOKENS])
def test_every_flag_of_train_does_something(name, baselines, small_lpips, tmp_path, capsys):
    """Each flag alone changes what a tiny run computes; the resolved configuration shows it."""
    value = (OF_IMAGES | OF_TOKENS)[name]
    data, expected = baselines[name]
    options = {"stage": "tokenizer" if name in OF_IMAGES else "all", "data": data, "out": tmp_path / "run"}
    if name == "perceptual":
        options["lpips_weights"] = small_lpips
    with mock.patch.object(torch, "save", wraps=torch.save) as saves:
        assert call("train.py", *flags(SHORT | options | {name: value})) == 0
    found = contents(tmp_path / "run")
    if name == "save_every":  # the tokenizer, each of four steps, and once more with metrics
        assert sum("best" not in str(saved.args[1]) for saved in saves.call_args_list) == 1 + 4 + 1
    else:
        assert any(found[file] != expected.get(file) for file in found)
    assert json.loads((tmp_path / "run" / "config.json").read_text()).get(name, value) == value


@pytest.mark.parametrize("program, changed, others", [
    ("schedule.py", {"shifts": 0.4, "log_snr_min": -8, "log_snr_max": 7.5}, {"out"}),
    ("data.py", {"size": 8}, {"out", "root", "save"})])  # test_data.py has these
def test_programs_that_draw(program, changed, others, folder, tmp_path):
    """schedule.py and data.py: every flag changes the page."""
    assert set(parser_flags(program)) == {*changed, *others}
    words, pages = [folder] if program == "data.py" else [], set()
    for name, value in ({"out": "page.png"} | changed).items():
        out = tmp_path / f"{name}.png"
        assert call(program, *words, *flags({name: value}), "--out", out) == 0
        assert len(Image.open(out).convert("RGB").getcolors(1 << 20)) > 10
        pages.add(out.read_bytes())
    assert len(pages) == 1 + len(changed)
