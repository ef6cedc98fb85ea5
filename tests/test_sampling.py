"""sample.py as users run it: every flag, special pictures, files of samples."""

import io
import shutil
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from data import load_image
from engine.build import load_checkpoint
from engine.randomness import image_generators
from engine.validate import UserError
from extras import export as export_module
from extras import sample_command, sample_files
from extras.datasets import find
from extras.sampling_options import class_labels, parse_classes
from sample import sample_images
from tests.common import HERE, TINY, call, flags, noise, parser_flags, seeded, write_images


def test_every_flag_of_sample_does_something(run, tmp_path, capsys):
    """Each changes the picture, but --batch and --device do not; --n adds images after the others."""
    def picture(**options):
        words = {"n": 9, "out": tmp_path / "a.png"} | options
        capsys.readouterr()
        assert call("sample.py", run / "ckpt.pt", *flags(words)) == 0
        with Image.open(words["out"]) as image:
            return np.asarray(image)

    baseline = picture()
    changed = {"steps": 1, "guidance": 1e4, "class": "dog", "sampler": "ddim", "seed": 1, "n": 20, "end": 0.9,
               "temperature": 1e-3}
    assert parser_flags("sample.py") == sorted(["classes" if f == "class" else f for f in changed] + [
        "batch", "compile", "device", "out", "interval",
        "class_counts", "list_classes", "export",  # below
        "grid_of", "trajectory", "inpaint", "mask", "vary", "strength", "interpolate", "serve"])
    for name, value in changed.items():
        assert not np.array_equal(picture(**{name: value}), baseline), name
    assert np.array_equal(picture(batch=2, device="cpu", out=tmp_path / "sub" / "b.png"), baseline)
    with mock.patch.object(torch, "compile", side_effect=lambda f, **_: f) as compiled:
        assert np.array_equal(picture(compile=True), baseline) and compiled.call_count == 1
    assert np.array_equal(picture(**{"class": "1"}), picture(**{"class": "dog"}))
    assert np.array_equal(picture(n=20)[:len(baseline) // 2], baseline[:len(baseline) // 2])


def test_special_pictures(one_thread, run, tmp_path):
    """Each is made of the right images, tile by tile: those of the plain grid, or of sample_images."""
    pipeline, side = load_checkpoint(run / "ckpt.pt", torch.device("cpu")), 66  # 8 pixels, 8 times, and 2
    settings = pipeline.sampling | {"guidance": 1e4}  # the model is hardly trained: less is hardly seen

    def tiles(columns, *words, rows=1):
        """[row][column] -> the pixels of a tile, without the words at the left and above."""
        assert call("sample.py", run / "ckpt.pt", "--guidance", 1e4, *words, "--out", tmp_path / "a.png") == 0
        page = np.asarray(Image.open(tmp_path / "a.png"))[-side * rows:, -side * columns:]
        return [[page[side * i:side * i + 64:8, side * j:side * j + 64:8].transpose(2, 0, 1)
                 for j in range(columns)] for i in range(rows)]

    def same(found, images):
        return all(np.array_equal(tile, image) for tile, image in zip(found, images, strict=True))

    [plain] = tiles(8, "--n", 8)
    for values in ("guidance=0,1e4", "steps=3,1", "temperature=1,1e4", "end=0.3,0.9"):
        found = [same(row, plain) for row in tiles(8, "--grid-of", values, rows=2)]
        assert found == ([False, True] if values.startswith("guidance") else [True, False]), values
    [guided], [unguided] = tiles(8, "--n", 8, "--end", 0), tiles(8, "--n", 8, "--guidance", 0, "--end", 0)
    part = ["--n", 8, "--end", 0, "--guidance-interval"]  # t = 1, 0.5 and 0 alone are visited
    assert same(tiles(8, *part, 0.6, 0.7)[0], unguided)
    assert not any(same(tiles(8, *part, 0.4, 0.7)[0], row) for row in (guided, unguided))

    # over time: the last column is the argmax of the last p; the film has all steps, and the same last image
    seen, labels = [], torch.zeros(4, dtype=torch.int64)
    sample_images(pipeline, labels, **settings, callback=lambda t, p: seen.append((t, p.argmax(-1))))
    found = tiles(3, "--n", 4, "--trajectory", "--batch", 3, rows=4)
    for column, (_, tokens) in enumerate(seen):
        assert same([row[column] for row in found], pipeline.tokenizer.decode(tokens).numpy())
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
    [found] = tiles(10, "--n", 1, "--trajectory", "--steps", 12)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 12
        film.seek(11)  # one image of 64 pixels: the 256 colours of a GIF are enough
        last = np.asarray(film.convert("RGB"))[-side:-2:8, -side:-2:8].transpose(2, 0, 1)
        assert np.array_equal(last, found[-1])

    # made from an image
    pixels = torch.randint(256, (10, 14, 3), generator=seeded(0), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = np.zeros((20, 28), np.uint8)
    mask[18, 5] = 255  # its centre square is columns 4 to 23: this is the cell at the lower left
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = load_image(tmp_path / "image.png", 8)
    tokens = pipeline.tokenizer.encode(torch.from_numpy(image)[None])
    known = tokens.masked_fill(torch.tensor([False, False, True, False]), -1)
    grey = image.copy()
    grey[:, 4:, :4] = 128
    words = ["--inpaint", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--n", 3]
    for names, labels, omega in (([], [2], 0.0), (["--class", "dog,cat"], [1, 0], 1e4)):  # 2: the null class
        for row, label in zip(tiles(5, *words, *names, rows=len(labels)), labels, strict=True):
            images = sample_images(pipeline, torch.full((3,), label), inpaint=known,
                                          **settings | {"guidance": omega})
            assert same(row, [image, grey, *images.numpy()])
    words = ["--vary", tmp_path / "image.png", "--n", 3, "--class", "dog"]
    for strength, more in ((0.6, []), (0.9, ["--strength", 0.9])):
        labels = torch.ones(3, dtype=torch.int64)
        images = sample_images(pipeline, labels, init=(tokens, strength), **settings)
        assert same(tiles(4, *words, *more)[0], [image, *images.numpy()])

    # between two seeds
    found = tiles(4, "--interpolate", "0,1", "--n", 4, rows=2)
    assert np.array_equal(found[0][0], plain[0])
    noise = torch.randn(4, 4, generator=image_generators(1, [0])[0])[None]
    for row, label in zip(found, (0, 1), strict=True):
        images = [sample_images(pipeline, torch.tensor([label]), noise=z, **settings)[0]
                  for z in (None, noise)]
        assert same([row[0], row[3]], images)


@pytest.mark.parametrize("words, says", [
    (["--trajectory", "--interpolate", "0,1"], "not allowed with argument --trajectory"),
    (["--out", "a.jpg"], "must end in .png, .npz or .zip"),
    (["--out", "a.npz", "--trajectory"], "writes no files of samples"),
    (["--class-counts", "even"], "a grid has rows of one class"),
    (["--mask", "a.png"], "belong together"),
    (["--strength", 0.5], "belongs to --vary"),
    (["--grid-of", "width=1,2"], "guidance, steps, temperature, end"),
    (["--interpolate", "1,1"], "two different seeds"),
    (["--n", 0], "--n must be at least 1"),
    (["--seed", -1], "--seed must be at least 0"),
    (["--class", "horse"], "no class"),
    (["--end", 1.5], "time goes down"),
])
def test_wrong_use_of_sample(words, says, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("sample.py", run / "ckpt.pt", *words) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_special_pictures_are_for_one_process_and_known_classes(run, tmp_path, capsys):
    words = ["--out", tmp_path / "a.png"]
    with mock.patch.object(sample_command, "rank_and_world", lambda: (0, 2)):
        assert call("sample.py", run / "ckpt.pt", *words, "--grid-of", "steps=1,2") == 2
    assert "--grid-of is for one process" in capsys.readouterr().err
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    checkpoint["config"]["training"]["label_drop"] = 0.0
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for more in (["--vary", tmp_path / "image.png"], ["--guidance", 2]):
        assert call("sample.py", tmp_path / "ckpt.pt", *words, *more) == 2
        assert "trained with --label-drop 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a", "a.zip", "a.npz"])
def test_sample_files(name, run, tmp_path, capsys):
    """All forms hold the pixels of one batch, interrupted and continued; other settings begin anew."""
    words, out = ["--n", 21, "--seed", 3, "--out", tmp_path / name], tmp_path / name
    pipeline = load_checkpoint(run / "ckpt.pt", torch.device("cpu"))
    labels, drawn = torch.arange(21) % 2, []
    expected = sample_images(pipeline, labels, seed=3, **pipeline.sampling).permute(0, 2, 3, 1).numpy()

    def stopped(*args, **options):
        drawn.append(options["first"])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return sample_images(*args, **options)

    with mock.patch.object(sample_files, "sample_images", stopped):
        assert call("sample.py", run / "ckpt.pt", *words, "--batch", 8) == 130
        assert "the same command goes on" in capsys.readouterr().err and not out.exists()
        [parts] = tmp_path.iterdir()
        assert call("sample.py", run / "ckpt.pt", *words, "--batch", 6) == 0 and drawn == [0, 8, 16, 12, 18]
        assert [path.name for path in tmp_path.iterdir()] == [name]
        if name == "a.npz":
            with np.load(out) as file:
                images, found = file["arr_0"], file["arr_1"]
            assert np.array_equal(found, labels) and found.dtype == np.int64
        else:
            files = sorted((out if name == "a" else zipfile.Path(out)).iterdir(), key=lambda file: file.name)
            assert [file.name for file in files] == [f"{i:06d}.png" for i in range(21)]
            images = np.stack([np.asarray(Image.open(io.BytesIO(file.read_bytes()))) for file in files])
        assert np.array_equal(images, expected) and images.dtype == np.uint8
        assert call("sample.py", run / "ckpt.pt", *words) == 2
        assert "is there already" in capsys.readouterr().err
        out.rename(tmp_path / "complete")
        parts.mkdir()  # of a command that was stopped: its images are not taken for those of other settings
        for i in range(21):
            (parts / f"{i:06d}.png").touch()
        assert call("sample.py", run / "ckpt.pt", *words, "--steps", 1) == 0 and drawn[5:] == [0]


def test_classes_are_spread_evenly():
    """For any n, and a larger n begins with the smaller one; or classes come as often as in training."""
    assert np.bincount(class_labels(5000, list(range(1000)))).tolist() == [5] * 1000
    for n, C in ((1, 3), (7, 12), (500, 1000), (2048, 1000), (50000, 7)):
        labels = class_labels(n, list(range(C)))
        counts = np.bincount(labels, minlength=C)
        assert counts.max() - counts.min() <= 1
        assert torch.equal(class_labels(n + 5, list(range(C)))[:n], labels)
    assert class_labels(5, [4, 1]).tolist() == [4, 1, 4, 1, 4]
    counts = [30, 0, 5, 65]
    for n in (1, 20, 99, 100, 1000):  # each count is met but for one image
        found = np.bincount(class_labels(n, [0, 1, 2, 3], counts), minlength=4)
        assert (abs(found - n * np.array(counts) / 100) < 1).all() and found.sum() == n
    assert class_labels(4, [3, 0], [10, 99, 99, 30]).tolist() == [3, 3, 3, 0]
    with pytest.raises(UserError, match="no training image of these classes"):
        class_labels(4, [1], counts)


def test_names_of_classes(run, tmp_path, capsys):
    """--list-classes; of ImageNet's names either word will do, if it is one class's."""
    assert call("sample.py", run / "ckpt.pt", "--list-classes") == 0
    assert capsys.readouterr().out == "   0  cat\n   1  dog\n"
    names = ["n02012849 crane", "n01440764 tench", "n03126707 crane", "a tench"]
    assert parse_classes("tench,n01440764, n01440764 tench,a tench,2", names) == [1, 1, 1, 3, 2]
    for word, says in (("crane", r"ambiguous: 0 .*, 2"), ("a", "no class"), ("", "no class")):
        with pytest.raises(UserError, match=says):
            parse_classes(word, names)
    files = [f"{name[:9]}/{i}.png" for name in names[:2] for i in range(3)]
    write_images(tmp_path / "d" / "train", files, noise(6))
    assert find(str(tmp_path / "d")).class_names == ["n01440764", "n02012849"]
    for file, text in (("words.txt", "n01440764\ttench, Tinca tinca\nn02012849\tcrane\nn9\tx\n"),
                       ("LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn02012849 a crane\n")):
        (tmp_path / file).write_text(text)
        expected = ["n01440764 tench", "n02012849 crane" if file == "words.txt" else "n02012849 a crane"]
        for folder in (tmp_path / "d", tmp_path / "d" / "train"):
            assert find(str(folder)).class_names == expected
    words = ["--data", tmp_path / "d", "--out", tmp_path / "run", "--stage", "tokenizer", *flags(TINY)]
    assert call("train.py", *words) == 0 and "tench" in (tmp_path / "run" / "config.json").read_text()
    for file in ("words.txt", "LOC_synset_mapping.txt"):  # a run goes on with its names
        (tmp_path / file).unlink()
    assert call("train.py", *words) == 0 and "tench" in (tmp_path / "run" / "config.json").read_text()


def test_export(run, folder, tmp_path, capsys):
    """A small file that draws the same but for float16's rounding, and starts other runs."""
    assert call("sample.py", run / "ckpt.pt", "--export", tmp_path / "a.pt") == 0
    size = (tmp_path / "a.pt").stat().st_size
    said = capsys.readouterr().out
    assert f"{size / 1e6:.2f} MB" in said and size < 0.5 * (run / "ckpt.pt").stat().st_size
    whole, small = (load_checkpoint(path, torch.device("cpu"))
                    for path in (run / "ckpt.pt", tmp_path / "a.pt"))
    for part in ("model", "tokenizer"):
        before, after = (getattr(pipeline, part).state_dict() for pipeline in (whole, small))
        assert all(after[name].dtype == value.dtype for name, value in before.items())
        assert all(torch.equal(after[name], value.half().float() if value.is_floating_point() else value)
                   for name, value in before.items())
    assert whole.class_names == small.class_names and whole.class_counts == small.class_counts == [19, 19]
    assert whole.sampling == small.sampling and whole.step == small.step and whole.config == small.config
    large = export_module.to_half({"a": torch.tensor([1e6]), "b": torch.tensor([1.0]), "n": torch.tensor(3)})
    assert [value.dtype for value in large.values()] == [torch.float32, torch.float16, torch.int64]
    assert call("sample.py", tmp_path / "a.pt", "--out", tmp_path / "a.png", "--n", 8) == 0
    words = ["--data", folder, "--stage", "tokenizer", *flags(TINY)]
    assert call("train.py", *words, "--out", tmp_path / "b", "--init", tmp_path / "a.pt") == 0
    assert call("train.py", *words, "--out", tmp_path / "c", "--tokenizer", tmp_path / "a.pt") == 0
    shutil.copytree(run, tmp_path / "pets")
    shutil.copy(tmp_path / "a.pt", tmp_path / "pets" / "ckpt.pt")
    capsys.readouterr()
    longer = ["train.py", "--data", folder, "--out", tmp_path / "pets", *flags(TINY | {"steps": 10})]
    for words, says in ((longer, "made by --export"),
                        (["sample.py", run / "ckpt.pt", "--export", tmp_path / "a.pt"], "is there already"),
                        (["sample.py", run / "tokenizer.pt", "--export", tmp_path / "d.pt"], "ckpt.pt"),
                        (["sample.py", run / "ckpt.pt", "--export", tmp_path / "d.zip"], "must end in .pt")):
        assert call(*words) == 2 and says in capsys.readouterr().err
    example = HERE / "examples" / "toy.pt"
    assert call("sample.py", example, "--n", 1, "--steps", 1, "--out", tmp_path / "t.png") == 0
    assert example.stat().st_size < 3e6
