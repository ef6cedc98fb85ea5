"""The programs, run as their users do: images in, images out, every flag, runs that go on."""

import csv
import json
import math
import re
import runpy
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import train
from engine import config
from engine.config import DEFAULTS, ELSEWHERE, OPTIONS, PRESETS, TOKENIZER_OPTIONS, resolve
from engine.presets import SMALL_SETS
from engine.tokens import load_tokenizer
from extras import foreign_checkpoint, run_page
from extras.datasets import find
from extras.grids import save_pairs
from extras.toy import Toy
from tests.common import (
    HERE,
    PROGRAMS,
    SMALL,
    TINY,
    call,
    contents,
    flags,
    make_folder,
    noise,
    parser_flags,
    write_cifar,
    write_idx,
    write_images,
    write_lmdb,
)


def test_commands(folder, tmp_path, monkeypatch, capsys):
    """As typed: train; then train again (complete, nothing touched), sample; all from another directory."""
    def command(program, *words):
        assert call(program, *words) == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    once = ["train.py", "--data", folder, *flags(TINY)]
    as_typed = SimpleNamespace(main=lambda: runpy.run_path(str(HERE / "train.py"), run_name="__main__"))
    with mock.patch.dict(PROGRAMS, {"train.py": as_typed}):  # in a process of its own: see test_closed_pipe
        text = command(*once)
    assert "38 images + 2 held out, 2 classes: cat (20), dog (20)" in text
    assert "python sample.py runs/pets/ckpt.pt" in text
    out = tmp_path / "runs" / "pets"
    assert (out / "index.html").exists()
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()
             if path.name not in ("config.json", "index.html", "state.json")}
    assert {path.name for path in times} == {
        "tokenizer.pt", "tokenizer.csv", "reconstructions_000004.png", "reconstructions_000008.png", "tokens.npy",
        "ckpt.pt", "best.pt", "diffusion.csv", "evaluation.csv", "metrics.json", "samples_000004.png",
        "samples_000008.png", "data.png", "skipped.txt", ".lock"}
    again = command(*once)
    assert again.count("complete") == 4 and times == {path: path.stat().st_mtime_ns for path in times}
    text = command("sample.py", "runs/pets/ckpt.pt", "--class", "dog")
    assert "step 8, 8 images" in text and Image.open(tmp_path / "samples.png").width > 8 * 8
    rows = np.load(out / "tokens.npy")
    assert len(rows) == 40 and rows["test"].sum() == 2 and rows["x"].max() < 8 and rows["x"].shape == (40, 4)
    metrics = json.loads((out / "metrics.json").read_text())
    bound = metrics["vlb"]
    assert bound["total"] == pytest.approx(bound["prior"] + bound["rec"] + bound["diff"])
    with (out / "evaluation.csv").open() as file:
        untrained = next(csv.DictReader(file))
    # At step 0 it is the exact denoiser of uniform tokens: log2 K bits, up to the error of the estimate.
    assert abs(float(untrained["total"]) - 3) < 4 * float(untrained["standard_error"]) < 1


def test_the_checkpoint_is_what_training_drew(run, tmp_path):
    """sample.py, at its defaults, draws the very picture that train.py drew last."""
    assert call("sample.py", run / "ckpt.pt", "--out", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (run / "samples_000008.png").read_bytes()


def test_flip(folder, run, tmp_path):
    """--flip: the training images once more, mirrored, with their labels; held-out images only as they are."""
    out = tmp_path / "flip"
    assert call("train.py", "--data", folder, "--out", out, "--flip", "--tokenizer", run / "tokenizer.pt",
                "--stage", "tokens", *flags(TINY)) == 0
    plain, both = np.load(run / "tokens.npy"), np.load(out / "tokens.npy")
    assert len(both) == 2 * 38 + 2 and np.array_equal(both[:38], plain[:38]) and np.array_equal(both[-2:], plain[-2:])
    labels = [image.labels.tolist() for image in find(str(folder)).load(8)]
    assert both["label"].tolist() == 2 * labels[0] + labels[1] and not both["test"][:76].any()
    config = json.loads(json.dumps(torch.load(run / "tokenizer.pt", weights_only=True)["config"]))
    tokenizer, _ = load_tokenizer(config, run, torch.device("cpu"))
    mirrored = find(str(folder)).load(8)[0].pixels.flip(3)
    assert np.array_equal(both["x"][38:76], tokenizer.encode(mirrored).numpy())


def test_tokens_of_another_run(folder, run, tmp_path, capsys):
    """--data RUN/tokens.npy trains the same denoiser without images; the tokenizer lies beside it or is named."""
    settings = {k: v for k, v in TINY.items() if k not in TOKENIZER_OPTIONS.values()}
    assert call("train.py", "--data", run / "tokens.npy", "--out", tmp_path / "a", *flags(settings)) == 0
    assert contents(tmp_path / "a")["ckpt.pt"] == contents(run)["ckpt.pt"]
    shutil.copy(run / "tokens.npy", tmp_path / "tokens.npy")
    words = ["--data", tmp_path / "tokens.npy", "--out", tmp_path / "b"]
    assert call("train.py", *words, *flags(settings)) == 2 and "no checkpoint at" in capsys.readouterr().err
    assert call("train.py", *words, "--tokenizer", run / "tokenizer.pt", "--stage", "tokens", *flags(settings)) == 0
    assert (tmp_path / "b" / "tokens.npy").read_bytes() == (run / "tokens.npy").read_bytes()
    other = torch.load(run / "tokenizer.pt", weights_only=True)
    other["tokenizer"]["decoder.0.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    shutil.copytree(run, tmp_path / "d")
    (tmp_path / "d" / "ckpt.pt").unlink()
    shutil.copy(tmp_path / "other.pt", tmp_path / "d" / "tokenizer.pt")
    for again in ([*words[:3], tmp_path / "c", "--tokenizer", tmp_path / "other.pt", *flags(settings)],
                  ["--out", tmp_path / "d", "--stage", "diffusion", "--data", folder, *flags(TINY)]):
        assert call("train.py", *again) == 2
        assert re.search("was made by tokenizer [0-9a-f]{16}, this one is [0-9a-f]{16}", capsys.readouterr().err)
    shutil.rmtree(tmp_path / "c")
    rows = np.load(run / "tokens.npy")
    rows["x"][0] = 8
    np.save(tmp_path / "tokens.npy", rows)
    words[-1] = tmp_path / "c"
    assert call("train.py", *words, "--tokenizer", run / "tokenizer.pt", *flags(settings)) == 2
    assert "they do not belong together" in capsys.readouterr().err


def test_tokenizer_of_a_checkpoint(folder, run, tmp_path, capsys):
    """--tokenizer takes it out of a ckpt.pt, a finished one or not: the same tokens, and the same denoiser."""
    unfinished = torch.load(run / "ckpt.pt", weights_only=True) | {"metrics": {}}
    torch.save(unfinished, tmp_path / "unfinished.pt")
    for name, file in (("a", run / "ckpt.pt"), ("b", tmp_path / "unfinished.pt")):
        words = ["--data", folder, "--out", tmp_path / name, "--tokenizer", file, *flags(TINY)]
        assert call("train.py", *words) == 0
        found, expected = contents(tmp_path / name), contents(run)
        assert found["tokens.npy"] == expected["tokens.npy"]
        assert found["tokenizer.pt"]["tokenizer"] == expected["tokenizer.pt"]["tokenizer"]
        assert found["ckpt.pt"]["ema"] == expected["ckpt.pt"]["ema"] and "tokenizer.csv" not in found
        assert call("train.py", *words) == 0 and "tokenizer: complete (8 steps)" in capsys.readouterr().out
    words[5] = run / "tokenizer.pt"  # it is the same one
    assert call("train.py", *words) == 0
    assert call("train.py", *words[:2], "--out", tmp_path / "c", *words[4:], "--K", 9) == 2
    assert "has K 8, this run 9: leave --K away" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, tmp_path, monkeypatch, capsys):
    """Each preset takes two steps on made-up data of its form; by name or size it is the one that is chosen."""
    monkeypatch.setattr(train, "held_out_bits", lambda *args, f=train.held_out_bits: f(*args[:5], 4, *args[6:]))
    monkeypatch.setattr(train, "COLUMNS", 2)  # smaller pictures
    monkeypatch.setattr(Toy, "n_train", 24)
    monkeypatch.setattr(Toy, "n_test", 2)
    images, side, root = noise(6, 40, 44), PRESETS[preset]["size"], tmp_path
    if preset in ("mnist", "fashion-mnist"):
        write_idx(tmp_path / preset, images[:4, :28, :28, 0], images[4:, :28, :28, 0], True)
    elif preset == "cifar10":
        write_cifar(tmp_path / "cifar-10-batches-py", images[:, :32, :32])
    elif preset.startswith("lsun"):
        write_lmdb(tmp_path / {"lsun-churches": "church_outdoor_train_lmdb"}.get(preset, "bedroom_train_lmdb"), images)
    elif preset == "imagenet":
        write_images(tmp_path / preset / "train", [f"n0144{i % 2}/{i}.png" for i in range(6)], images)
    elif preset == "ffhq":
        write_images(tmp_path / preset, [f"00000/{i:05d}.png" for i in range(6)], images)
    elif preset != "toy":
        root = write_images(tmp_path / "images", [f"{i}.png" for i in range(6)], noise(6, side, side))
    name = root if root != tmp_path else preset
    words = ["--data", name, "--root", tmp_path, "--preset", preset, "--out", tmp_path / "run", *flags(SMALL),
             "--perceptual", 0]  # whose weights are not here
    assert call("train.py", *words, "--dry-run") == 0
    expected = {"toy": 25, "mnist": 49, "fashion-mnist": 49}.get(preset, 256 if side == 256 else 64)
    assert f"{expected} tokens of {PRESETS[preset].get('K', DEFAULTS['K'])} codes" in capsys.readouterr().out
    size = side if side < 256 else 64  # 256 pixels take as long as all else together, and no other path
    assert call("train.py", *words, "--size", size) == 0
    assert np.load(tmp_path / "run" / "tokens.npy")["x"].shape[1] == expected * size ** 2 // side ** 2
    source, args = find(str(name), tmp_path), SimpleNamespace(preset=None, gpus_like=1, **dict.fromkeys(OPTIONS))
    for device in ("cpu", "cuda"):
        by_size = "32-cpu" if device == "cpu" else preset
        chosen = by_size if root != tmp_path or preset in SMALL_SETS else preset
        if device == "cpu" or preset != "32-cpu":  # which no GPU gets
            config = resolve(args, source, torch.device(device), {})
            assert f"preset {chosen}: chosen for" in capsys.readouterr().out
            assert config["size"] == PRESETS[chosen]["size"]


def test_raising_the_steps_goes_on(folder, run, tmp_path):
    """A complete run continues with more --steps; the tokenizer and the tokens stay."""
    shutil.copytree(run, tmp_path / "pets")
    assert call("train.py", "--data", folder, "--out", tmp_path / "pets", *flags(TINY | {"steps": 10})) == 0
    before, after = contents(run), contents(tmp_path / "pets")
    assert after["ckpt.pt"]["step"] == 10 and [r["step"] for r in after["diffusion.csv"]] == list("2468") + ["10"]
    assert after["tokenizer.pt"] == before["tokenizer.pt"] and after["tokens.npy"] == before["tokens.npy"]
    # Its learning rate begins anew: two steps, of which the second is at half the peak, as in a run of two steps.
    assert after["ckpt.pt"]["begin"] == 8 and float(after["diffusion.csv"][-1]["lr"]) == pytest.approx(TINY["lr"] / 2)


def test_from_the_weights_of_another_run(folder, run, tmp_path, capsys):
    """--init: tokenizer, discriminator and averaged weights of another run are the start, and are trained further."""
    still = TINY | {"lr": 0.0, "tokenizer_lr": 0.0, "gan_lr": 0.0, "codebook_update": "gradient"}
    make_folder(tmp_path / "birds", classes=("a", "b", "c"))
    start = torch.load(run / "ckpt.pt", weights_only=True)["ema"]
    for data, out, init in ((folder, "a", run), (folder, "b", run / "ckpt.pt"), (tmp_path / "birds", "c", run)):
        words = ["--data", data, "--out", tmp_path / out, "--init", init, *flags(TINY | {"lr": 0.0})]
        assert call("train.py", *words) == 0
        says = f"--init {init}: this run starts from the weights of its tokenizer and denoiser"
        assert f"{says}{', but for its classes' * (out == 'c')}\n" in capsys.readouterr().out
        found = torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
        same = {name for name, value in start.items() if found["ema"][name].shape == value.shape
                and torch.allclose(found["ema"][name], value, rtol=0, atol=1e-6)}
        assert set(start) - same == ({"class_embedding.weight"} if out == "c" else set())
        assert call("train.py", *words) == 0  # the same command goes on, or says that it is complete
    parts = torch.load(run / "tokenizer.pt", weights_only=True)
    words = ["--data", folder, "--stage", "tokenizer", "--codebook-update", "ema"]
    assert call("train.py", *words, "--out", tmp_path / "d", "--init", run / "tokenizer.pt", *flags(
        {name: value for name, value in still.items() if name != "codebook_update"})) == 0
    for part in ("tokenizer", "discriminator"):
        found = torch.load(tmp_path / "d" / "tokenizer.pt", weights_only=True)[part]
        assert all(torch.equal(value, found[name]) for name, value in parts[part].items() if "quantizer" not in name)
    capsys.readouterr()
    for init, more, says in ((tmp_path / "none", [], "no checkpoint at"),
                             (tmp_path, [], "no tokenizer.pt and no ckpt.pt"),
                             (run, ["--width", 32], "the model there has other sizes")):
        assert call("train.py", "--data", folder, "--out", tmp_path / "e", "--init", init, *flags(TINY), *more) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "e").exists()


def test_folders_that_are_no_classes(folder, run, tmp_path, capsys):
    """--no-classes: albums, say. Pictures of other kinds that are left out are counted."""
    shutil.copytree(folder, tmp_path / "albums")
    for name in ("a.HEIC", "b.heic", "c.mov", "notes.txt"):
        (tmp_path / "albums" / "cat" / name).write_bytes(b"?")
    out = tmp_path / "run"
    assert call("train.py", "--data", tmp_path / "albums", "--out", out, "--no-classes", *flags(TINY)) == 0
    text = capsys.readouterr().out
    assert "no classes" in text and "left out: 2 .heic, 1 .mov (convert them" in text
    assert (np.load(out / "tokens.npy")["label"] == 0).all()
    assert torch.load(out / "ckpt.pt", weights_only=True)["class_names"] == []
    for more, status, says in ((["--guidance", 2], 2, "nothing to guide to"), ([], 0, "guidance 0.0"),
                               (["--grid-of", "guidance=0,1"], 2, "nothing to guide to"), (["--guidance", 0], 0, "")):
        assert call("sample.py", out / "ckpt.pt", "--n", 1, "--steps", 1, "--out", tmp_path / "a.png", *more) == status
        assert says in "".join(capsys.readouterr())
    assert call("train.py", "--data", tmp_path / "albums", "--out", out, *flags(TINY)) == 2
    assert "was made with classes []" in capsys.readouterr().err
    assert call("train.py", "--data", run / "tokens.npy", "--out", tmp_path / "t", "--no-classes") == 2
    assert "--no-classes is for images" in capsys.readouterr().err


def test_a_null_class_that_was_never_trained(run, folder, tmp_path, capsys):
    """--label-drop 0: nothing is guided away from it, neither by train.py nor by sample.py."""
    words = ["--data", folder, "--out", tmp_path / "a", "--label-drop", 0, *flags(TINY)]
    assert call("train.py", *words, "--guidance", 2) == 2 and "give --guidance 0" in capsys.readouterr().err
    assert call("train.py", *words, "--stage", "tokenizer") == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["guidance"] == 0
    state = torch.load(run / "ckpt.pt", weights_only=True)
    state["config"]["training"]["label_drop"] = 0.0
    torch.save(state, tmp_path / "ckpt.pt")  # of an earlier version: it would be guided by default
    for more, status, says in (["--guidance", 2], 2, "nothing to guide away from"), ([], 0, "guidance 0.0"):
        assert call("sample.py", tmp_path / "ckpt.pt", "--n", 1, "--steps", 1, "--out", tmp_path / "a.png",
                    *more) == status
        assert says in "".join(capsys.readouterr())


def test_pairs_of_pictures(tmp_path):
    """Originals over reconstructions, also in a last row that is not full."""
    above = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 64, 64)
    save_pairs(above, above + 100, tmp_path / "a.png", 8)
    page = np.asarray(Image.open(tmp_path / "a.png"))[32::66, 32::66, 0]
    white = [255] * 6
    assert page.tolist() == [[*range(8)], [*range(100, 108)], [8, 9, *white], [108, 109, *white]]


def test_names_of_other_programs(capsys):
    """Flags that other programs have are answered by ours, each of which is there."""
    for flag, answer in ELSEWHERE.items():
        for words in ([flag, "3"], [flag + "=3"]):
            assert call("train.py", *words) == 2
            error = capsys.readouterr().err
            assert f"{flag}: {answer}" in error
    assert call("train.py", "pets", "--dry-run") == 2 and "to train on it, give --data pets" in capsys.readouterr().err
    known = {"--" + name.replace("_", "-") for name in parser_flags("train.py")} | {"--nproc-per-node"}
    assert {word for answer in ELSEWHERE.values() for word in re.findall(r"--[a-z-]+", answer)} <= known


def test_help_of_every_program(capsys, monkeypatch):
    """Each ends in examples, whose flags are there; train.py's shows the defaults of the preset that would be taken."""
    monkeypatch.setenv("COLUMNS", "200")
    for program in ("train.py", "sample.py", "fid.py", "data.py", "vqvae.py"):
        assert call(program, "--help") == 0
        text = capsys.readouterr().out
        examples = text.split("examples:\n")[1].splitlines()
        assert len(examples) >= 2 and all(line.startswith("  ") for line in examples), program
        for line in (line for line in examples if f" {program} " in line):
            for flag in re.findall(r" (--[a-z-]+)", line.split(program)[1]):
                assert f"  {flag}" in text or f", {flag}" in text, line
    for words, preset in (([], "toy"), (["--preset", "64"], "64"), (["--data", "ffhq", "--device", "cpu"], "ffhq"),
                          (["--data", "x", "--device", "cpu"], "32-cpu"),
                          (["--data", "mnist", "--device", "cuda"], "mnist"),
                          (["--data", "x", "--device", "cuda"], None)):
        assert call("train.py", *words, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert (f"those of preset {preset}, which" if preset else "those without a preset:") in text
        steps = (DEFAULTS | PRESETS.get(preset, {}))["steps"]
        assert f"training steps of the denoiser; may be raised later (default: {steps})" in text


def test_what_may_change_when_a_run_goes_on(folder, run, tmp_path, capsys):
    """Learning rates, the largest gradient and the seed: it goes on, says so, and computes something else."""
    changed = {"lr": 2e-2, "tokenizer_lr": 1e-3, "gan_lr": 1e-3, "clip": 0.5, "seed": 3, "eval_batch": 5}
    ends, before = {}, {"lr": 1e-2, "tokenizer_lr": 4e-3, "gan_lr": 2e-4, "clip": 1.0, "seed": 0, "eval_batch": 256}
    before["tokenizer_lr"] = json.loads((run / "config.json").read_text())["tokenizer_lr"]  # of the preset
    for name, value in {"steps": 10, **changed}.items():
        out = tmp_path / name
        shutil.copytree(run, out)
        capsys.readouterr()
        assert call("train.py", "--data", folder, "--out", out, *flags(TINY | {"steps": 10, name: value})) == 0
        said = capsys.readouterr().out
        assert name == "steps" or f"{name} was {before[name]}, from here on it is {value}\n" in said
        assert "steps was 8, from here on it is 10\n" in said and "diffusion: continuing at step 8" in said
        assert json.loads((out / "config.json").read_text())[name] == value
        ends[name] = contents(out)["ckpt.pt"]
        assert ends[name]["step"] == 10
        same = ends[name]["model"] == ends["steps"]["model"]
        assert same == (name not in ("lr", "clip", "seed")), f"--{name}"


def test_eval_batch(folder, run, tmp_path):
    """--eval-batch changes nothing that is computed but the noise of the held-out bound."""
    assert call("train.py", "--data", folder, "--out", tmp_path / "a", *flags(TINY), "--eval-batch", 3) == 0
    found, expected = contents(tmp_path / "a"), contents(run)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"ckpt.pt", "tokenizer.pt", "best.pt", "evaluation.csv", "metrics.json"}:
        assert found[name] == expected[name], name
    for name in ("tokenizer.pt", "ckpt.pt"):  # best.pt is of the step at which the bound was least: the noise decides
        a, b = ({k: v for k, v in content[name].items() if k != "metrics"} for content in (found, expected))
        assert a == b, name
    a, b = (json.loads(content["metrics.json"]) for content in (found, expected))
    assert a.keys() == b.keys() and all(a[part] == pytest.approx(b[part], rel=1e-5) for part in a if part != "vlb")
    for a, b in zip(found["evaluation.csv"], expected["evaluation.csv"], strict=True):
        a, b = ({k: float(v) for k, v in row.items()} for row in (a, b))
        assert abs(a["total"] - b["total"]) < 4 * math.hypot(a["standard_error"], b["standard_error"])
        assert all(a[name] == pytest.approx(b[name], rel=1e-5) for name in ("effective_rank", "smallest_distance"))


def test_gpus_like(folder, capsys, monkeypatch):
    """--gpus-like changes the preset, not what was given; many processes alone change nothing, but say what would."""
    def resolved(*words):
        capsys.readouterr()
        assert call("train.py", "--data", folder, "--preset", "ffhq", "--dry-run", *words) == 0
        text = capsys.readouterr().out
        return dict(re.findall(r"^  --(\S+) (.*)$", text, re.M)), text

    one, said = resolved()
    eight, _ = resolved("--gpus-like", 8, "--gan-lr", 3e-4)
    assert {name: value for name, value in eight.items() if value != one[name]} == {
        "tokenizer-steps": "50000", "tokenizer-batch": "256", "tokenizer-lr": "0.0008", "gan-lr": "0.0003",
        "steps": "75000", "batch": "1024", "lr": "0.0004"}
    two, _ = resolved("--gpus-like", 2)
    assert (two["batch"], two["steps"], two["lr"]) == ("256", "188988", "0.000252")
    assert "processes share" not in said and call("train.py", "--data", folder, "--gpus-like", 0) == 2
    monkeypatch.setattr(config, "rank_and_world", lambda: (0, 8))
    same, said = resolved()
    assert same == one and "8 processes share the batch of one GPU" in said
    assert "in another training: --gan-lr 0.0004 --tokenizer-steps 50000 --tokenizer-batch 256" in said
    assert "processes share" not in resolved("--lr", 1e-4)[1] + resolved("--gpus-like", 4)[1]
    says = "--batch 16 is less than this preset's 128: a lower --lr suits it better, 0.0001"  # an eighth: half the rate
    assert says in resolved("--batch", 16)[1] and "suits it better" not in said
    assert "suits it better" not in resolved("--batch", 16, "--lr", 1e-4)[1] + resolved("--batch", 256)[1]


CHANGED = dict(
    size=16, f=2, K=7, code_dim=3, tokenizer_width=32, tokenizer_blocks=2, codebook_update="gradient", beta=3.0,
    codebook_distance="cosine", pixel_loss="l1", perceptual=0.5, gan=0.0, gan_lr=1e-2, gan_start=0.5,
    tokenizer_steps=5, tokenizer_batch=5, tokenizer_lr=1e-2, D=5, norm="layer", embedding_init="random", width=32,
    depth=2, heads=4, output_prior=False, posterior_input=False, shift=1.0, log_snr_min=-8.0, log_snr_max=5.0,
    w_rec=0.5, w_diff=0.5, w_cm=0.0, weight_clip=1.0, rec_fraction=0.5, cm_pairs="shared", max_gap=0.5,
    teacher="current", max_drop_rate=0.9, label_drop=0.9, steps=5, batch=7, lr=2e-2, warmup=3, weight_decay=5.0,
    clip=1e-3, ema_decay=0.05, sample_steps=4, guidance=40.0,
    sampler="ddim", log_every=3, sample_every=3, save_every=1, flip=True)


def test_every_flag_of_train_does_something(small_lpips, folder, tmp_path, capsys):
    """Each flag alone changes what a tiny run computes; the resolved configuration shows it."""
    others = ["activation_checkpointing", "compile", "fsdp", "micro_batch",  # see engine_room.py
              "eval_batch",  # see test_eval_batch
              "fid_every",  # see test_train_evaluates_fid
              "allow_bad", "data", "device", "dry_run", "eval_fid", "lpips_weights", "out", "preset", "root", "seed",
              "stage", "tokenizer", "init", "no_classes", "no_cache", "minutes", "chip",
              "gpus_like"]  # see test_gpus_like
    assert set(parser_flags("train.py")) == {*CHANGED, *others}  # old flags share the names of the new ones
    names, short, run = list(CHANGED), TINY | {"tokenizer_steps": 4, "steps": 4}, tmp_path / "run"
    early, late = names[:names.index("D")], names[names.index("D"):-1]  # only one stage needs them; flip needs both
    assert names[-1] == "flip"
    images, tokens = ["--data", folder], ["--data", run / "tokens.npy"]  # no image is read for those
    assert call("train.py", *images, "--out", run, *flags(short)) == 0
    assert call("train.py", *tokens, "--out", tmp_path / "u", *flags(short)) == 0
    baseline, adopted = contents(run), contents(tmp_path / "u")
    assert "tokenizer.csv" not in adopted and adopted["ckpt.pt"] == baseline["ckpt.pt"]
    capsys.readouterr()
    assert call("train.py", *images, "--dry-run", *flags(CHANGED)) == 0
    resolved = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} {value}\n" in resolved for name, value in CHANGED.items())
    for name, value in CHANGED.items():
        options = (tokens if name in late else images) + flags(short | {name: value})
        options += ["--lpips-weights", small_lpips] if name == "perceptual" else []
        options += ["--stage", "tokenizer"] if name in early else []
        out = tmp_path / name
        with (mock.patch.object(torch, "save", wraps=torch.save) as saves, mock.patch.object(run_page, "write_page"),
              mock.patch.object(foreign_checkpoint, "check_pickle")):  # our own, and it takes a tenth of the time
            assert call("train.py", "--out", out, *options) == 0
        if name == "save_every":
            # The tokenizer; each step; and once more, measured. (best.pt comes when it comes.)
            assert sum("best" not in str(saved.args[1]) for saved in saves.call_args_list) == 1 + 4 + 1
        else:
            found, expected = contents(out), adopted if name in late else baseline
            expected = {file: expected.get(file) for file in found} if name in early else expected
            assert found != expected, f"--{name} changes nothing"
    assert call("train.py", "--data", folder, "--out", tmp_path / "s", "--seed", 1, *flags(short)) == 0
    seeded_run = contents(tmp_path / "s")
    assert seeded_run["tokenizer.pt"] != baseline["tokenizer.pt"] and seeded_run["ckpt.pt"] != baseline["ckpt.pt"]
    for stage in ("tokenizer", "tokens", "diffusion"):  # --stage, --device
        assert call("train.py", "--data", folder, "--out", tmp_path / "t", "--stage", stage, "--device", "cpu",
                    *flags(short)) == 0
        assert (tmp_path / "t" / "tokens.npy").exists() == (stage != "tokenizer")
        assert (tmp_path / "t" / "ckpt.pt").exists() == (stage == "diffusion")
    assert contents(tmp_path / "t") == baseline
    for preset, settings in PRESETS.items():  # a preset fills only what was not given
        capsys.readouterr()
        assert call("train.py", "--dry-run", "--preset", preset, "--K", 99) == 0
        text = capsys.readouterr().out
        assert "--K 99\n" in text and all(f"--{name.replace('_', '-')} {value}\n" in text
                                          for name, value in settings.items() if name != "K")
    assert not (tmp_path / "runs").exists()


def test_the_other_programs(run, folder, tmp_path, capsys):
    """schedule.py and data.py draw their pages."""
    assert call("schedule.py", "--shifts", 1, 0.4, "--log-snr-min", -8, "--log-snr-max", 7.5,
                "--out", tmp_path / "s.png") == 0
    assert call("data.py", folder, "--size", 8, "--out", tmp_path / "d.png") == 0
    for name in ("s.png", "d.png"):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("RGB"))
            assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
        assert name == "d.png" or (pixels[:25] == 255).all()  # no tick above the frame
