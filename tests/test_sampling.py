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
from extras import sample_command
from extras.datasets import find
from extras.pictures import save_pairs
from extras.sampling_options import parse_classes
from sample import class_labels, sample_images
from tests.common import HERE, call, close, flags, noise, seeded, train_tiny, write_images

CPU = torch.device("cpu")


def test_pairs(tmp_path):
    """Ten originals over their reconstructions, in rows of eight; the last row is filled."""
    above = torch.full((10, 3, 64, 64), 50, dtype=torch.uint8)
    save_pairs(above, 4 * above, tmp_path / "a.png")
    tiles = np.asarray(Image.open(tmp_path / "a.png"))[34::66, 34::66, 0]
    assert tiles.tolist() == [[50] * 8, [200] * 8, [50] * 2 + [255] * 6, [200] * 2 + [255] * 6]


def test_every_flag_of_sample_does_something(run, tmp_path):
    """Each changes the picture, but --batch and --device do not; --n adds images after the others."""
    def picture(**options):
        words = {"n": 9, "out": tmp_path / "a.png"} | options
        assert call("sample.py", run / "ckpt.pt", *flags(words)) == 0
        return np.asarray(Image.open(words["out"]))

    changed = {"steps": 1, "guidance": 1e4, "class": "dog", "sampler": "ddim", "seed": 1, "n": 20, "end": 0.9,
               "temperature": 1e-3}
    baseline = picture()
    pictures = {name: picture(**{name: value}) for name, value in changed.items()}
    assert not [name for name, found in pictures.items() if np.array_equal(found, baseline)]
    assert np.array_equal(pictures["n"][:66], baseline[:66])
    assert np.array_equal(picture(batch=2, device="cpu", out=tmp_path / "sub" / "b.png"), baseline)
    with mock.patch.object(torch, "compile", side_effect=lambda f, **_: f) as compiled:
        assert np.array_equal(picture(compile=True), baseline) and compiled.call_count == 1


@pytest.fixture
def tiles(run, tmp_path):
    """Draws a picture -> [row][column] of the pixels of its tiles, without the words beside them."""
    def draw(columns, *words, rows=1):
        out, side = tmp_path / "a.png", 66  # 8 pixels, 8 times, and 2
        # the model is hardly trained: less guidance is hardly seen
        assert call("sample.py", run / "ckpt.pt", "--guidance", 1e4, *words, "--out", out) == 0
        page = np.asarray(Image.open(out))[-side * rows:, -side * columns:]
        page = page.reshape(rows, side, columns, side, 3)[:, :64:8, :, :64:8]
        return page.transpose(0, 2, 4, 1, 3)

    return draw


@pytest.fixture
def pipeline(run):
    loaded = load_checkpoint(run / "ckpt.pt", CPU)
    loaded.sampling["guidance"] = 1e4
    return loaded


def test_grids_of_settings(tiles):
    """A row is what the setting alone would draw."""
    [plain] = tiles(8, "--n", 8)
    for values, same in (("guidance=0,1e4", 1), ("steps=3,1", 0), ("temperature=1,9", 0), ("end=0.3,0.9", 0)):
        rows = tiles(8, "--grid-of", values, rows=2)
        assert [np.array_equal(row, plain) for row in rows] == [same == 0, same == 1], values


def test_trajectory(tiles, pipeline, tmp_path):
    """Columns are the argmax of p over time; the film has all steps."""
    seen = []
    sample_images(pipeline, torch.zeros(1, dtype=torch.int64), **pipeline.sampling | {"steps": 12},
                  callback=lambda t, p: seen.append(pipeline.tokenizer.decode(p.argmax(-1))))
    [found] = tiles(10, "--n", 1, "--trajectory", "--steps", 12)
    assert np.array_equal(found[[0, -1]], np.concatenate([seen[0], seen[-1]]))
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 12


def test_pictures_from_an_image(tiles, pipeline, tmp_path):
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
    for names, label, omega in (([], 2, 0.0), (["--class", "dog"], 1, 1e4)):  # 2: the null class
        settings = pipeline.sampling | {"guidance": omega}
        images = sample_images(pipeline, torch.full((3,), label), inpaint=known, **settings)
        assert np.array_equal(tiles(5, *words, *names)[0], np.stack([image, grey, *images]))
    words = ["--vary", tmp_path / "image.png", "--n", 3, "--class", "dog", "--strength", 0.9]
    images = sample_images(pipeline, torch.full((3,), 1), init=(tokens, 0.9), **pipeline.sampling)
    assert np.array_equal(tiles(4, *words)[0], np.stack([image, *images]))


def test_between_two_seeds(tiles, pipeline):
    z = torch.randn(4, 4, generator=image_generators(1, [0])[0])[None]
    for label, row in enumerate(tiles(4, "--interpolate", "0,1", "--n", 4, rows=2)):
        ends = [sample_images(pipeline, torch.tensor([label]), noise=noise, **pipeline.sampling)[0]
                for noise in (None, z)]
        assert np.array_equal(row[[0, 3]], np.stack(ends))


@pytest.mark.parametrize("words, says", [
    (["--out", "a.jpg"], "must end in .png"), (["--out", "a.npz", "--trajectory"], "no files of samples"),
    (["--class-counts", "even"], "a grid has rows of one class"), (["--class", "horse"], "no class"),
    (["--grid-of", "width=1,2"], "guidance, steps, temperature, end"), (["--grid-of", "steps=1.5"], "1.5"),
    (["--grid-of", "guidance="], "--grid-of guidance="), (["--vary", "a.png", "--strength", 0], "above 0"),
    (["--strength", 0.5], "for --vary")])
def test_wrong_use_of_sample(words, says, run, capsys):
    assert call("sample.py", run / "ckpt.pt", *words) == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a", "a.zip", "a.npz"])
def test_sample_files(name, run, tmp_path, capsys):
    """All forms hold the pixels of one batch, interrupted and continued; other settings begin anew."""
    out, drawn = tmp_path / name, []
    words = ["sample.py", run / "ckpt.pt", "--n", 21, "--seed", 3, "--out", out]
    pipeline, labels = load_checkpoint(run / "ckpt.pt", CPU), torch.arange(21) % 2
    expected = sample_images(pipeline, labels, seed=3, **pipeline.sampling).permute(0, 2, 3, 1).numpy()

    def stopped(*args, **options):
        drawn.append(options["first"])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return sample_images(*args, **options)

    with mock.patch.object(sample_command, "sample_images", stopped):
        assert call(*words, "--batch", 8) == 130 and "same command" in capsys.readouterr().err
        [parts] = tmp_path.iterdir()
        assert call(*words, "--batch", 6) == 0
        assert drawn == [0, 8, 16, 12, 18] and list(tmp_path.iterdir()) == [out]
        if name == "a.npz":
            images = np.load(out)["arr_0"]
            assert np.array_equal(np.load(out)["arr_1"], labels)
        else:
            folder = out if name == "a" else zipfile.Path(out)
            files = [(folder / f"{i:06d}.png").read_bytes() for i in range(21)]
            images = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
        assert np.array_equal(images, expected) and images.dtype == np.uint8
        assert call(*words) == 2 and "is there already" in capsys.readouterr().err
        out.rename(tmp_path / "complete")
        parts.mkdir()  # of a command that was stopped: its images are not taken for those of other settings
        (parts / "000000.png").touch()
        assert call(*words, "--steps", 1) == 0
        assert drawn[5:] == [0]


def test_classes_are_spread_evenly():
    """One after the other, or as often as in training."""
    assert class_labels(5, [4, 1]).tolist() == [4, 1, 4, 1, 4]
    counts = np.array([30, 0, 5, 65])
    for n in (1, 20, 99, 1000):  # each count is met but for one image
        found = np.bincount(class_labels(n, [0, 1, 2, 3], counts.tolist()), minlength=4)
        assert (abs(found - n * counts / 100) < 1).all() and found.sum() == n
    with pytest.raises(ValueError, match="no training image of these classes"):
        class_labels(4, [1], counts.tolist())


def test_names_of_classes(run, tmp_path, capsys):
    """--list-classes; of ImageNet's names either word will do, if it is one class's."""
    assert call("sample.py", run / "ckpt.pt", "--list-classes") == 0
    assert capsys.readouterr().out == "   0  cat\n   1  dog\n"
    names = ["n02012849 crane", "n01440764 tench", "n03126707 crane", "a tench"]
    assert parse_classes("tench,n01440764, n01440764 tench,a tench,2", names) == [1, 1, 1, 3, 2]
    with pytest.raises(UserError, match="ambiguous: 0 .*, 2"):
        parse_classes("crane", names)


@pytest.mark.parametrize("file, text, names", [
    ("words.txt", "n01440764\ttench, Tinca\nn9\tx\n", ["n01440764 tench", "n02012849"]),
    ("LOC_synset_mapping.txt", "n02012849 a crane\n", ["n01440764", "n02012849 a crane"])])
def test_names_of_imagenet(file, text, names, tmp_path):
    files = [f"{name[:9]}/{i}.png" for name in names for i in range(3)]
    write_images(tmp_path / "d" / "train", files, noise(6))
    (tmp_path / file).write_text(text)
    for folder in (tmp_path / "d", tmp_path / "d" / "train"):
        assert find(folder).class_names == names


def test_without_a_null_class(run, tmp_path, capsys):
    """A checkpoint of --label-drop 0 is drawn without guidance."""
    state = torch.load(run / "ckpt.pt", weights_only=True)
    state["config"]["training"]["label_drop"] = 0.0
    torch.save(state, tmp_path / "ckpt.pt")
    words = ["sample.py", tmp_path / "ckpt.pt", "--n", 1, "--steps", 1, "--out", tmp_path / "a.png"]
    assert call(*words) == 0 and "guidance 0.0" in capsys.readouterr().out
    assert call(*words, "--guidance", 1) == 2 and "without a null class" in capsys.readouterr().err


def test_export(run, folder, tmp_path, capsys):
    """A small file that draws the same but for float16's rounding, and starts other runs."""
    exported = tmp_path / "a.pt"
    assert call("sample.py", run / "ckpt.pt", "--export", exported) == 0
    assert exported.stat().st_size < 0.5 * (run / "ckpt.pt").stat().st_size
    before, after = load_checkpoint(run / "ckpt.pt", CPU), load_checkpoint(exported, CPU)
    for part in ("model", "tokenizer"):
        rounded = {name: value.half().to(value.dtype) if value.is_floating_point() else value
                   for name, value in getattr(before, part).state_dict().items()}
        close(getattr(after, part).state_dict(), rounded, rtol=0, atol=0)
    for name in ("class_names", "class_counts", "sampling", "step", "config"):
        assert getattr(before, name) == getattr(after, name)
    assert train_tiny(folder, tmp_path / "b", "--init", exported, "--stage", "tokenizer") == 0
    pets = shutil.copytree(run, tmp_path / "pets")
    shutil.copy(exported, pets / "ckpt.pt")
    assert train_tiny(folder, pets, steps=10) == 2 and "made by --export" in capsys.readouterr().err


def test_example(tmp_path):
    example = HERE / "examples" / "toy.pt"
    assert call("sample.py", example, "--n", 1, "--steps", 1, "--out", tmp_path / "t.png") == 0
