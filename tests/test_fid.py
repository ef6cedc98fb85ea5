"""FID: the network against figures of the reference tool, the formulas against exact answers, the program."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import fid
from engine.build import load_checkpoint
from engine.validate import UserError
from extras import fid_sources, inception
from extras.datasets import find
from fid import inception_score, kernel_distance, precision_recall
from sample import sample_images
from tests import common
from tests.common import call, close, make_folder, noise, rows_of, seeded, train_tiny
from tests.fixtures import Pixels

PINNED = {  # size of pixels: first three features of image 1, from torch-fidelity 0.4.0
    32: {"2048": [1.8494594, 33.8222351, 18.4372501],
         "logits_unbiased": [-43.5916061, 11.0495071, 0.6460724]},
    320: {"2048": [2.0481808, 36.1634178, 19.9357338],
          "logits_unbiased": [-47.9658051, 12.9529419, -0.7635937]}}


def smooth_and_noisy(size):
    """(2, 3, size, size) uint8, from NumPy's generator."""
    rng = np.random.default_rng(size)
    y, x = np.mgrid[:size, :size] / size
    smooth = 128 + 100 * np.sin(np.stack([3 * x + i * y for i in range(6)]) * 4)
    noisy = smooth.reshape(2, 3, size, size) + 40 * rng.standard_normal((2, 3, size, size)) * (x > 0.5)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


def test_inception(weights):
    """Layout of the published file; features of the reference tool."""
    network, state = inception.InceptionV3(), torch.load(weights)
    assert len(state) == 472
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    network.load_state_dict(state, strict=True)
    seen = []
    network.eval().Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[-1]))
    plain = network(smooth_and_noisy(32))
    assert torch.equal(plain["spatial"].view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))
    folded = inception.load_inception(weights, "cpu")
    pairs = [smooth_and_noisy(size)[1] for size in PINNED]
    taps = folded(pairs)  # images of several sizes
    for row, pinned in enumerate(PINNED.values()):
        for name, values in pinned.items():
            # float32 through 94 layers, in another order of summation: some 2^-24 each, 5e-6 of the scale
            scale = float(taps[name].square().mean().sqrt())
            close(taps[name][row, :3], torch.tensor(values), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("size", [8, 299, 640])
def test_resizing(size):
    """TensorFlow's bilinear takes a ramp to a ramp from pixel 0 on; the clean one is Pillow's bicubic."""
    at = torch.minimum(torch.arange(299, dtype=torch.float64) * size / 299, common.f64(size - 1))
    i, j = torch.arange(size)[:, None], torch.arange(size)
    ramp = (0.1 * i + 0.2 * j).float().expand(1, 3, size, size)
    expected = 0.1 * at[:, None] + 0.2 * at
    # positions and values are float32, below 640 and 192: a rounding of 2^-24 each, in a few operations
    close(inception.resize_tf1(ramp)[0, 0].double(), expected, rtol=0, atol=8 * 640 * 2 ** -24)
    images = torch.randint(256, (1, 3, size, size), generator=seeded(size)).float()
    pillow = [np.asarray(Image.fromarray(channel.numpy()).resize((299, 299), Image.Resampling.BICUBIC))
              for channel in images[0]]
    expected = (torch.from_numpy(np.stack(pillow)).clip(0, 255) - 128) / 128
    # float32 after each of two passes
    close(inception.PREPROCESS["clean"](images)[0], expected, rtol=0, atol=4 * 2 ** -23)


def test_frechet_distance():
    """Gaussians whose distance is known: commuting covariances, any rank; and itself."""
    rng = np.random.default_rng(0)
    d, zero = 12, np.zeros(12)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    for low in (1e-8, 1.0):  # condition number 1e9, and below 10
        a = low + rng.uniform(0, 9, d) * (rng.uniform(size=d) < 0.6)
        b = low + rng.uniform(0, 9, d)
        mean = rng.standard_normal(d)
        expected = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
        s1, s2 = turn * a @ turn.T, turn * b @ turn.T
        # eigvalsh is exact to some 2^-52 of the largest; its square root to the root of that
        near = pytest.approx(expected, abs=1e-6 if low < 1 else 1e-12)
        assert fid.frechet_distance(mean, s1, zero, s2) == near == fid.frechet_distance(mean, s2, zero, s1)
        assert fid.frechet_distance(mean, s1, mean, s1) < 1e-12 * np.trace(s1)
    # Fewer images than features: Tr (S1 S2)^(1/2) is the nuclear norm of X Y^T, from the centred features.
    x, y = rng.standard_normal((5, d)), rng.standard_normal((4, d)) + 1
    x0, y0 = x - x.mean(0), y - y.mean(0)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = (np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s1) + np.trace(s2)
                - 2 * np.linalg.svd(x0 @ y0.T / np.sqrt(4 * 3), compute_uv=False).sum())
    assert fid.frechet_distance(x.mean(0), s1, y.mean(0), s2) == pytest.approx(expected, abs=1e-12)
    assert fid.frechet_distance(zero, 0 * s1, zero + 1, s2) == pytest.approx(12 + np.trace(s2), abs=1e-12)
    with pytest.raises(UserError, match="at least two images"):
        fid.frechet_distance(zero, s1 * np.nan, zero, s2)


def test_kernel_distance():
    x, y = torch.randn(7, 3, generator=seeded(0)), torch.randn(7, 3, generator=seeded(1)) + 1
    pairs = [(i, j) for i in range(7) for j in range(7)]

    def k(a, b):
        return float(a.double() @ b.double() / 3 + 1) ** 3

    expected = (sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 42
                - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 49)
    mean, deviation = kernel_distance(x, y, subsets=3)  # every subset is the whole set
    assert mean == pytest.approx(expected, rel=1e-12) and deviation < 1e-12 * mean
    small = kernel_distance(x, y, subsets=500, size=3)[0]
    assert small == pytest.approx(expected, rel=0.2)  # unbiased for every size


def test_inception_score():
    certain = 100 * F.one_hot(torch.arange(40) % 4, 9).float()
    assert inception_score(certain, splits=1) == pytest.approx((4, 0))  # four certain classes
    assert inception_score(torch.ones(40, 9)) == pytest.approx((1, 0))  # always the same answer


def test_precision_recall():
    real, fake = torch.randn(40, 2, generator=seeded(2)), torch.randn(50, 2, generator=seeded(3)) * 2

    def covered(points, centres):
        radii = [sorted(float((c - o).norm()) for o in centres)[3] for c in centres]
        return sum(any(float((p - c).norm()) <= r for c, r in zip(centres, radii, strict=True))
                   for p in points) / len(points)

    assert precision_recall(real, fake, tile=7) == pytest.approx((covered(fake, real), covered(real, fake)))


IMAGES = torch.randint(256, (100, 3, 8, 8), dtype=torch.uint8, generator=seeded(0))


def source_of(images):
    return fid_sources.from_dataset(data.ImageSet([0] * 100, [], 8, pixels=images), chunk=30)


def test_which_score_is_which(capsys):
    """sFID is of the other features, precision of the generated images, recall of the real ones."""
    real = fid.measure(source_of(IMAGES), Pixels(), 7, keep=50)
    fake = fid.measure(source_of(IMAGES // 4 + 96), Pixels(), 7, keep=50)  # precise, and covers little
    found = fid.compute_scores(real, fake)
    for key, tap in (("fid", "2048"), ("sfid", "spatial")):
        both = real.mean[tap], real.cov[tap], fake.mean[tap], fake.cov[tap]
        assert found[key] == fid.frechet_distance(*both)
    assert (found["precision"], found["recall"]) == precision_recall(real.features, fake.features)
    assert found["precision"] > found["recall"] + 0.3
    assert (found["kid"], found["kid_std"]) == kernel_distance(real.features, fake.features)
    assert (found["is"], found["is_std"]) == inception_score(fake.logits)
    fid.print_scores(found, None, None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {name.lower(): float(score) for name, score, *_ in lines}
    assert printed == pytest.approx({key: found[key] for key in printed}, abs=1e-4) and len(printed) == 6


def test_measure(monkeypatch):
    """Mean and covariance are NumPy's; kept features are spread evenly. Sums of two processes add up."""
    source, taps = source_of(IMAGES), Pixels()(IMAGES)
    found = fid.measure(source, Pixels(), 7, keep=4)
    for tap in ("2048", "spatial"):
        features = taps[tap].double().numpy()
        np.testing.assert_allclose(found.mean[tap], features.mean(0), atol=1e-14)  # 100 numbers below 1
        np.testing.assert_allclose(found.cov[tap], np.cov(features, rowvar=False), atol=1e-13)
    assert torch.equal(found.features, taps["2048"][[0, 33, 66, 99]])
    assert torch.equal(found.logits, taps["logits_unbiased"][[0, 33, 66, 99]])
    sums = {}
    for process in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(fid, "rank_and_world", lambda process=process: process)
        monkeypatch.setattr(fid, "all_reduce_sum", functools.partial(sums.__setitem__, process))
        fid.measure(source, Pixels(), 7, keep=4)
    for one, *halves in zip(*sums.values(), strict=True):
        close(sum(halves), one)


@pytest.fixture
def score(fast, tmp_path, monkeypatch):
    """fid.py's scores of the words of its command line, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def scores(*words):
        assert call("fid.py", *words, "--json", "scores.json") == 0, words
        found = json.loads(Path("scores.json").read_text())
        return {key: value for key, value in found.items() if isinstance(value, float)}

    return scores


def test_fid_program(score, fast, capsys):
    """The same images give the same scores as a folder, zip, array or statistics of any tool."""
    arrays = {"real": noise(9, 12, 12), "fake": noise(7, 12, 12, seed=1) // 4 * 3}
    for name, pixels in arrays.items():
        common.write_images(Path(name), [f"{i}.png" for i in range(len(pixels))], pixels)
        np.savez(f"{name}.npz", pixels)
        common.write_zip(f"{name}.zip", {f"in/{i}.PNG": common.encode(x) for i, x in enumerate(pixels)})
    baseline, printed = score("real", "fake"), capsys.readouterr().out
    assert set(baseline) == {"fid", "sfid", "kid", "kid_std", "is", "is_std", "precision", "recall"}
    assert f"FID-7            {baseline['fid']:.4f}" in printed and "has not full rank" in printed
    near = pytest.approx(baseline, rel=1e-9)
    assert score("real.zip", "fake.npz", "--batch", 3, "--device", "cpu", "--weights", fast) == near
    assert score("real.npz", "fake.zip") == near
    assert score("real", "real")["fid"] == 0
    for more in (["--resize", "pytorch-fid"], ["--size", 6]):
        assert score("real", "fake", *more) != near

    assert call("fid.py", "real", "--save-stats", "stats.npz") == 0
    assert score("stats.npz", "fake") == near
    assert call("fid.py", "stats.npz", "fake", "--resize", "clean") == 2
    assert "made with --resize tf, not clean" in capsys.readouterr().err
    stats = dict(np.load("stats.npz"))
    del stats["features"], stats["resize"]
    np.savez("adm.npz", arr_0=arrays["real"], **stats)
    assert score("adm.npz", "fake") == near and "do not say how images" in capsys.readouterr().out
    np.savez("pytorch-fid.npz", mu=stats["mu"], sigma=stats["sigma"])
    found = score("pytorch-fid.npz", "fake", "--save-stats", "copy.npz")
    assert found == pytest.approx({key: baseline[key] for key in ("fid", "is", "is_std")}, rel=1e-9)
    assert dict(np.load("copy.npz")).keys() == {"mu", "sigma"}
    assert call("fid.py", "real", "--save-stats", "small.npz", "--features", 0) == 0
    assert score("small.npz", "fake").keys() == {"fid", "sfid", "is", "is_std"}


def test_fid_of_a_checkpoint(score, run, capsys):
    """Samples are those of sample.py's flags; the real side is what training reads, if it can be used."""
    images = make_folder(Path("pets"))
    (images / "cat" / "00.png").write_bytes(b"no image")
    pipeline = load_checkpoint(run / "ckpt.pt", torch.device("cpu"))
    settings = dict(steps=2, guidance=2.0, interval=(0.1, 0.9), temperature=0.7, end=0.2, sampler="ddim")
    drawn = sample_images(pipeline, torch.tensor([1, 0, 1, 1, 0, 1]), seed=5, **settings)
    np.savez("fake.npz", drawn.permute(0, 2, 3, 1).numpy())
    np.savez("real.npz", find(images).load(8)[0].pixels.permute(0, 2, 3, 1).numpy())
    words = ["--n", 6, "--batch", 4, "--seed", 5, "--steps", 2, "--guidance", 2, "--guidance-interval", 0.1,
             0.9, "--temperature", 0.7, "--end", 0.2, "--sampler", "ddim", "--class", "dog,cat,dog"]
    drawn = score("pets", run / "ckpt.pt", *words)
    assert "38 training images, cropped and resized to 8" in capsys.readouterr().out
    assert drawn == pytest.approx(score("real.npz", "fake.npz"), rel=1e-9)
    assert call("fid.py", "pets", "pets") == 2  # as they are
    assert "cat/00.png cannot be used" in capsys.readouterr().err


def test_train_evaluates_fid(score, folder, run, tmp_path, capsys, monkeypatch):
    """--eval-fid and --fid-every give fid.py's scores; real images are measured once; no weights, no run."""
    out = shutil.copytree(run, tmp_path / "run")
    measured = []
    monkeypatch.setattr(fid_sources, "measure", lambda *args, measure=fid.measure, **more:
                        measured.append(more["name"]) or measure(*args, **more))
    for _ in range(2):  # the second time it is there
        assert train_tiny(folder, out, eval_fid=6) == 0
    assert measured == ["FID, training images", "FID, 6 samples"]
    found = json.loads((out / "metrics.json").read_text())["fid"]
    assert found == pytest.approx(score(folder, run / "ckpt.pt", "--n", 6) | {"n": 6})
    monkeypatch.setattr(fid_sources, "MIN_IMAGES", 6)
    assert train_tiny(folder, tmp_path / "every", fid_every=3) == 0
    assert common.contents(tmp_path / "every")["ckpt.pt"] == common.contents(run)["ckpt.pt"]
    rows = rows_of(tmp_path / "every" / "fid.csv")
    assert [row["step"] for row in rows] == ["3", "6", "8"]
    last = {name.removesuffix("_2k"): float(value) for name, value in rows[-1].items() if name != "step"}
    assert last | {"n": 6} == pytest.approx(found)
    tables = [rows_of(tmp_path / "every" / name) for name in ("fid.csv", "evaluation.csv")]
    (tmp_path / "every" / "ckpt.pt").unlink()  # as after a kill: no row comes twice
    assert train_tiny(folder, tmp_path / "every", fid_every=3) == 0
    assert tables == [rows_of(tmp_path / "every" / name) for name in ("fid.csv", "evaluation.csv")]
    monkeypatch.delenv("FID_WEIGHTS")
    assert train_tiny(folder, tmp_path / "new", eval_fid=5) == 2
    assert inception.WEIGHTS_URL in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("entries", [
    dict(sigma=np.eye(5)), dict(sigma=np.eye(4) * np.nan), dict(sigma=np.triu(np.ones((4, 4)))),
    dict(mu=np.array([{}] * 4)), dict(n=[1, 2]), dict(mu_s=np.zeros(4)), dict(arr_0=np.zeros((4, 8, 8, 3))),
    dict(features=np.full((5, 4), np.inf)), dict(arr_0=np.zeros(20_000_000, np.uint8))], ids=range(9))
def test_statistics_that_lie(entries, tmp_path, monkeypatch):
    """What no other program would write is refused, with the name of the file; nothing is unpickled."""
    monkeypatch.setattr("engine.validate.MAX_UNPACKED", 1 << 20)
    honest = dict(mu=np.zeros(4), sigma=np.eye(4), n=9)
    np.savez_compressed(tmp_path / "a.npz", **honest)
    assert fid_sources.open_side(tmp_path / "a.npz", None, None, False)[0].n == 9
    np.savez_compressed(tmp_path / "a.npz", **honest | entries)
    with pytest.raises(UserError, match="a.npz"):
        fid_sources.open_side(tmp_path / "a.npz", None, None, False)
