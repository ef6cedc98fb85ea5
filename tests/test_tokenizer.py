"""The tokenizer: its codebook, the losses of VQGAN, published ones, and how it is measured."""

import csv
import hashlib
import itertools
import json
import math
import re
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import published_tokenizers
import pytest
import tokenizer_peer
import torch
import torch.nn.functional as F
from PIL import Image

import data
import sample
from engine.checkpoint import CheckpointError
from engine.validate import UserError
from engine.distributed import init_distributed
from extras import downloads, inception, vqgan_losses
from extras.datasets import find
from extras.published_vqgan import PublishedVQGAN, read_published
from extras.tokenizer_metrics import evaluate_tokenizer, ssim, usage_and_perplexity
from extras.vqgan_losses import LPIPS, PatchDiscriminator, adaptive_weight, find_lpips, hinge_loss, read_lpips
from tests.common import (
    TINY,
    call,
    close,
    contents,
    flags,
    free_ports,
    join_processes,
    noise,
    parser_flags,
    seeded,
    start_processes,
)
from tests.exact import quantizer, vectors
from vqvae import VQVAE, VectorQuantizer, to_uint8


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_restart(update):
    """Unused codes become encoder outputs of the batch and live at the next look and step; used ones stay."""
    vq, z_e, z = quantizer(update)
    before, dead = vq.codebook.detach().clone(), torch.tensor([1, 0, 0, 1, 0, 0, 1, 0]).bool()
    vq.running_count.copy_(torch.where(dead, 0.1, 9.0))
    assert vq.restart_dead_codes(z_e, seeded(0)) == 3 and vq.restart_dead_codes(z_e, seeded(0)) == 0
    assert (vq.codebook[dead][:, None] == z).all(-1).any(1).all()
    assert torch.equal(vq.codebook[~dead], before[~dead])
    if update == "ema":
        close(vq.running_sum[dead] / vq.running_count[dead, None], vq.codebook[dead])


def test_cosine_codes():
    """Only directions count: tokens stay as lengths change, codes lie on the sphere |c|^2 = C, ema keeps the mean's
    direction, and the commitment loss is 2 - 2 cos per component."""
    for update in ("ema", "gradient"):
        torch.manual_seed(0)
        vq, z_e = VectorQuantizer(8, 3, update, "cosine"), torch.randn(4, 3, 5, 6)
        vq.initialised.fill_(True)
        close(vq.codes.norm(dim=1), torch.full((8,), 3 ** 0.5))
        lengths = torch.rand(4, 1, 5, 6) * 9 + 0.1
        cosine = F.normalize(vectors(z_e), dim=1) @ F.normalize(vq.codebook, dim=1).T
        z_q, tokens, commitment, _ = vq.eval()(z_e)
        assert torch.equal(tokens.flatten(), cosine.argmax(1)) and torch.equal(vq(z_e * lengths)[1], tokens)
        close(vectors(z_q), vq.codes[tokens.flatten()])
        close(commitment, (2 - 2 * cosine.amax(1)).mean())
    vq = VectorQuantizer(8, 3, "ema", "cosine", decay=0.0)
    vq.codebook.copy_(torch.randn(8, 3))
    vq.initialised.fill_(True)
    assigned = F.one_hot(vq.eval()(z_e)[1].flatten(), 8).float()
    vq.train()(z_e)
    used = assigned.any(0)
    close(vq.codes[used], 3 ** 0.5 * F.normalize(assigned.T @ F.normalize(vectors(z_e), dim=1), dim=1)[used])
    with pytest.raises(ValueError, match="must be euclidean or cosine"):
        VectorQuantizer(8, 3, "ema", "manhattan")


@pytest.mark.parametrize("f", [2, 4, 8])
def test_vqvae_shapes(f):
    """Image -> tokens -> image; forward, encode and decode lay tokens out alike; a bad f is refused."""
    torch.manual_seed(0)
    model = VQVAE(16, f=f, K=10, code_dim=3, width=16).eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    out, tokens = model(images), model.encode(images)
    assert tokens.shape == (2, (16 // f) ** 2) and torch.equal(tokens, out["tokens"])
    decoded = model.decode(tokens)
    again = 127.5 * (1 + model.decode_continuous(model.quantizer(out["z_e"])[0]))
    assert decoded.shape == images.shape and decoded.dtype == torch.uint8
    assert (decoded - again.clamp(0, 255)).abs().max() < 0.51  # rounded to uint8
    for size, bad in (16, 0), (16, 1), (16, 3), (48, 6), (16, 32):
        with pytest.raises(ValueError, match=f"f = {bad} "):
            VQVAE(size, f=bad, K=10, code_dim=3, width=16)


def move_a_codebook(rank, world, port, folder):
    """Twenty batches, of which this process sees its share; codes die and restart."""
    torch.set_num_threads(1)
    if world > 1:
        join_processes(rank, port)
        init_distributed()
        add = torch.Tensor.index_add_  # on GPUs these sums differ in their last bits
        torch.Tensor.index_add_ = lambda *a: add(*a).mul_(1 + rank * 2e-7)
    torch.manual_seed(0)
    for update in ("ema", "gradient"):
        vq, z_e = VectorQuantizer(16, 3, update), torch.randn(20, 8, 3, 4, 4)
        dead, first = [], None
        for step in range(20):
            z = z_e[step] + (step > 9)  # the data moves, and codes die
            z = z[rank * 8 // world:(rank + 1) * 8 // world]
            vq(z, torch.Generator().manual_seed(0))
            first = first if step else vq.codebook.detach().clone()
            vq.running_count[step % 16] *= 0
            vq.running_count.mul_(1 + rank * 2e-7)
            dead.append(int(vq.restart_dead_codes(z, torch.Generator().manual_seed(step))))
        torch.save(vq.state_dict() | {"first": first, "dead": dead}, folder / f"{update}{rank}of{world}.pt")
    if world > 1:  # without it gloo's threads may still run when Python ends, and abort it
        torch.distributed.destroy_process_group()


def test_one_codebook_in_two_processes(one_thread, tmp_path):
    """Start, running means and restarts see the whole batch: two processes (gloo) hold bit for bit the same codebook,
    and one process with the whole batch the same up to the order of its sums."""
    start_processes(move_a_codebook, 2, *free_ports(1), tmp_path, n=2, wait=60)
    move_a_codebook(0, 1, None, tmp_path)
    for update in ("ema", "gradient"):
        one, first, second = (torch.load(tmp_path / f"{update}{name}.pt", weights_only=True)
                              for name in ("0of1", "0of2", "1of2"))
        assert sum(one["dead"]) >= 20 and one["dead"] == first["dead"] == second["dead"]
        for name in set(one) - {"dead"}:
            assert torch.equal(first[name], second[name])
            close(first[name], one[name])


def test_lpips():
    """The distance is its formula, worked out in float64 from the weights by name; 0 for equal images; its gradient is
    finite even where every feature is 0."""
    torch.manual_seed(0)
    lpips, (x, y) = LPIPS(), (torch.rand(2, 2, 3, 24, 20) * 2 - 1).unbind()
    state, expected = {name: value.double() for name, value in lpips.state_dict().items()}, 0
    pooled_before, ends = (5, 10, 17, 24), (2, 7, 14, 21, 28)  # torchvision's numbers of convolutions
    h = (torch.cat([x, y]).double() - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
        [0.458, 0.448, 0.450]).view(3, 1, 1)
    for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        h = F.max_pool2d(h, 2) if number in pooled_before else h
        h = F.conv2d(h, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1).relu()
        if number in ends:
            f, g = (h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            weight = state[f"lin.{ends.index(number)}"].view(-1, 1, 1)
            expected = expected + (weight * (f - g) ** 2).sum(1).mean((1, 2))
    close(lpips(x, y), expected.float(), rtol=1e-4, atol=0)  # 13 layers of up to 4,608 float32 products each
    assert not lpips(x, x).any() and not list(p for p in lpips.parameters() if p.requires_grad)
    lpips.features[0].bias.fill_(-1e3)  # nothing passes the first ReLU
    for layer in lpips.features[1:]:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.zero_()
    y.requires_grad_(True)
    lpips(x, y).sum().backward()
    assert y.grad.isfinite().all()


def test_lpips_weights(small_lpips, tmp_path, monkeypatch):
    """Read from a VQGAN's checkpoint or from the two published files, in torch's old format too; a wrong one is
    refused with what to do."""
    torch.manual_seed(0)
    weights = LPIPS().state_dict()
    network = {name: value for name, value in weights.items() if name.startswith("features")}
    network["classifier.0.weight"] = torch.zeros(1)
    linear = {f"lin{i}.model.1.weight": weights[f"lin.{i}"].view(1, -1, 1, 1) for i in range(3)}
    cache = tmp_path / "no cache" / "checkpoints"
    cache.mkdir(parents=True)
    files = [cache / name for name in vqgan_losses.LPIPS_FILES]
    torch.save(network, files[0], _use_new_zipfile_serialization=False)
    torch.save(linear, files[1])
    with pytest.raises(UserError, match="cut short or altered; delete it, and fetch https"):
        find_lpips()
    digests = {file.name: ("", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}
    monkeypatch.setattr(vqgan_losses, "LPIPS_FILES", digests)
    for found in find_lpips(), find_lpips([small_lpips]):
        read = read_lpips(found)
        assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in read)
    with pytest.raises(UserError, match="3 of LPIPS' 17 weights are not there, lin.0 for one"):
        read_lpips(files[:1])
    with pytest.raises(UserError, match="no such file"):
        find_lpips(["nowhere"])


def test_discriminator():
    """Hinge loss and adaptive weight by their formulas; no image's logits depend on another's."""
    assert hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])) == 0.5 * (0.25 + 0.75)
    torch.manual_seed(0)
    last, h = torch.randn(4, 3, requires_grad=True), torch.randn(5, 4)
    target, critic = torch.randn(5, 3), torch.randn(3)
    x_hat = h @ last
    weight = adaptive_weight((x_hat - target).square().mean(), -(x_hat @ critic).mean(), last)
    by_hand = (h.T @ (x_hat - target) * 2 / 15).norm() / torch.outer(h.mean(0), -critic).norm()
    close(weight, by_hand.detach(), rtol=1e-5, atol=0)
    assert adaptive_weight(x_hat.square().mean(), 0 * x_hat.sum(), last) == 100 and not weight.requires_grad
    for size in (8, 20, 32, 64):
        model, x = PatchDiscriminator(size, width=16), torch.rand(3, 3, size, size)
        logits = model(x)
        assert logits.shape[:2] == (3, 1) and logits[0].numel() > 1
        close(model(x[1:2]), logits[1:2])
    with pytest.raises(ValueError, match="at least 8 pixels, not 6"):
        PatchDiscriminator(6)


def test_perceptual_loss(small_lpips, folder, tmp_path, capsys):
    """Without weights a run does not begin; with weights it must keep them. L1, no discriminator.

    A run that an earlier version began without them goes on without, and says so.
    """
    settings = flags(TINY | {"perceptual": 1.0, "gan": 0.0, "pixel_loss": "l1"})
    words = ["--data", folder, "--stage", "tokenizer", *settings]
    with mock.patch.object(downloads, "fetch", side_effect=UserError("cannot download")) as fetched:
        assert call("train.py", *words, "--out", tmp_path / "a") == 2 and not (tmp_path / "a").exists()
        error = capsys.readouterr().err
        assert "cannot download" in error and "`python -m extras.downloads`" in error and "--perceptual 0" in error
        assert call("train.py", *words, "--out", tmp_path / "a", "--perceptual", 0) == 0 and fetched.call_count == 1
        stored = json.loads((tmp_path / "a" / "config.json").read_text())
        (tmp_path / "a" / "config.json").write_text(json.dumps(stored | {"perceptual": 1.0}))
        assert call("train.py", *words, "--out", tmp_path / "a") == 0 and fetched.call_count == 1
        assert "begun without the weights of its perceptual loss" in capsys.readouterr().out
    assert call("train.py", *words, "--out", tmp_path / "a", "--lpips-weights", small_lpips) == 2
    assert re.search("was made with lpips none, now lpips is [0-9a-f]{16}", capsys.readouterr().err)
    assert call("train.py", *words, "--out", tmp_path / "b", "--lpips-weights", small_lpips) == 0
    with (tmp_path / "b" / "tokenizer.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["lpips"]) > 0 for row in rows) and "adversarial" not in rows[0]
    assert torch.load(tmp_path / "b" / "tokenizer.pt", weights_only=True)["metrics"]["lpips"] > 0
    capsys.readouterr()
    for wrong, says in ((["--perceptual", 0], "no tokenizer is trained here that uses them"),
                        (["--size", 2, "--f", 2, "--gan", 0], "at least 4 pixels, not 2: --perceptual 0"),
                        (["--size", 4, "--gan", 1], "at least 8 pixels, not 4: --gan 0")):
        assert call("train.py", *words, "--out", tmp_path / "c", "--lpips-weights", small_lpips, *wrong) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_published_layouts():
    """The weights of the original models, name by name, and what is read off them; experiments/published_tokenizers.py
    has run the original code beside ours."""
    digests = {}
    for name, arguments in published_tokenizers.LAYOUTS.items():
        shapes = published_tokenizers.layout(*arguments)
        digests[name] = published_tokenizers.digest(shapes)
        with torch.device("meta"):
            model = PublishedVQGAN(shapes, 256)
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
        f = 2 ** (len(arguments[1]) - 1)
        assert (model.K, model.f, model.grid) == (arguments[-1], f, (256 // f, 256 // f))
    assert digests == {"taming f16, K = 1024": "4a7b1dafb1593e7d", "latent-diffusion vq-f4": "b22ff62b5d160fdf",
                       "latent-diffusion vq-f8": "04568b6c2a1f761a"}  # of the original models' own state dicts
    with pytest.raises(CheckpointError, match="reduces by 8, and 20 pixels are no multiple of it"):
        PublishedVQGAN(shapes, 20)


def test_published_tokenizer(tmp_path):
    """Tokens and images of a small model are those of the original code in float64; its checkpoint is read safely."""
    shapes = published_tokenizers.layout(32, (1, 2), {1}, 4, 3, 16)
    weights = published_tokenizers.random_weights(shapes)
    extra = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.perceptual_loss.lin0.weight": torch.zeros(2)}
    with mock.patch.dict(sys.modules):
        published_tokenizers.stand_in(published_tokenizers.Callback.__module__, Callback=published_tokenizers.Callback)
        callback = published_tokenizers.Callback
        for name, prefix, zipped in (("taming.ckpt", "", True), ("whole.ckpt", "first_stage_model.", False)):
            state = {prefix + key: value for key, value in (weights | extra).items()}
            torch.save({"state_dict": state, "epoch": 3, "lr": np.float64(1), "callbacks": {callback: callback()}},
                       tmp_path / name, _use_new_zipfile_serialization=zipped)
            read = read_published(tmp_path / name)
            assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in weights)
    model = PublishedVQGAN({key: value.shape for key, value in read.items()}, 16)
    model.load_state_dict(read)
    images = published_tokenizers.test_images(16)
    tokens = model.encode(images)
    assert tokens[0].tolist() == [
        5, 7, 7, 1, 7, 4, 13, 13, 7, 5, 1, 1, 5, 1, 4, 5, 5, 1, 1, 5, 1, 1, 7, 4, 5, 1, 5, 1, 7, 4, 7, 7,
        1, 1, 5, 15, 9, 5, 7, 4, 15, 5, 1, 9, 4, 5, 7, 1, 7, 7, 4, 5, 1, 1, 4, 2, 5, 1, 1, 1, 7, 5, 1, 7]
    decoded = model.decode_continuous(F.embedding(tokens, model.codebook).view(2, 8, 8, 3).permute(0, 3, 1, 2))
    # Values of about 1 through some 40 float32 layers: a few 2^-24 each.
    close(decoded[1, 0, 0, :6], torch.tensor([0.2534359, 0.2012962, 0.2843292, 0.7612908, 0.49224, 0.0105155]),
          rtol=0, atol=1e-5)
    close(decoded[1, 2, 15, :4], torch.tensor([0.4759835, 0.0624962, 0.1495462, 0.5250455]), rtol=0, atol=1e-5)
    assert torch.equal(model.decode(tokens), to_uint8(decoded))


def test_a_published_tokenizer_from_images_to_samples(folder, tmp_path, capsys):
    """--tokenizer takes a VQGAN's checkpoint: it decides f and K, is measured, encodes, and lies in ckpt.pt."""
    weights = published_tokenizers.random_weights(published_tokenizers.layout(32, (1, 2), set(), 4, 3, 16))
    torch.save({"state_dict": weights}, tmp_path / "vqgan.ckpt")
    options = flags({name: value for name, value in TINY.items() if name not in ("f", "K", "code_dim")})
    words = ["--data", folder, "--out", tmp_path / "a", "--tokenizer", tmp_path / "vqgan.ckpt", *options]
    assert call("train.py", *words) == 0
    text = capsys.readouterr().out
    assert "16 tokens of 16 codes per image" in text and "tokenizer: psnr" in text
    again = contents(tmp_path / "a")
    assert call("train.py", *words) == 0 and contents(tmp_path / "a") == again
    pipeline = sample.load_checkpoint(tmp_path / "a" / "ckpt.pt", torch.device("cpu"))
    assert isinstance(pipeline.tokenizer, PublishedVQGAN) and pipeline.model.K == 16
    tokens = np.load(tmp_path / "a" / "tokens.npy")
    images, _ = find(str(folder)).load(8)
    expected = torch.from_numpy(tokens["x"][:5].astype("i8"))
    assert torch.equal(pipeline.tokenizer.encode(images.batch(range(5))), expected)
    assert call("sample.py", tmp_path / "a" / "ckpt.pt", "--n", 2, "--out", tmp_path / "s.png") == 0
    capsys.readouterr()
    assert call("train.py", *words[:4], *flags(TINY | {"f": 2, "K": 16, "code_dim": 3})) == 2
    assert re.search(r"was made with tokenizer [0-9a-f]{16}, now tokenizer is own", capsys.readouterr().err)
    weights["quant_conv.bias"] += 1
    torch.save({"state_dict": weights}, tmp_path / "vqgan.ckpt")
    assert call("train.py", *words) == 2
    assert re.search(r"made with tokenizer [0-9a-f]{16}, now tokenizer is [0-9a-f]{16}", capsys.readouterr().err)
    assert call("train.py", *words[:3], tmp_path / "b", *words[4:], "--K", 9) == 2
    assert "has K 16, this run 9: leave --K away" in capsys.readouterr().err


def test_usage_and_perplexity():
    """K when all K codes are used equally, 1 for a single one, e^H in between."""
    for counts, expected in ((7, 7, 7), (1, 3)), ((0, 9, 0, 0), (0.25, 1)), ((2, 1, 1, 0), (0.75, 2 ** 1.5)):
        assert usage_and_perplexity(torch.tensor(counts)) == pytest.approx(expected)


def test_ssim():
    """Against its definition, window by window; 1 for equal images, and a closed form where both are constant."""
    a, b = (torch.randint(256, (2, 3, 13, 12), dtype=torch.uint8, generator=seeded(i)) for i in (0, 1))
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    w, values = np.outer(g, g) / g.sum() ** 2, []
    for x, y in zip(a[1].double().numpy() / 255, b[1].double().numpy() / 255, strict=True):
        for i, j in itertools.product(range(3), range(2)):
            p, q = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, cov = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    # float32 sums of numbers below 1, differences of some 2^-23 beside 9e-4 in the denominator
    assert float(ssim(a, b)[1]) == pytest.approx(np.mean(values), abs=20 * 2 ** -23 / 9e-4)
    close(ssim(a, a), torch.ones(2), rtol=0, atol=1e-6)
    grey = [torch.full((1, 3, 6, 6), v, dtype=torch.uint8) for v in (51, 102)]  # 0.2 and 0.4
    assert float(ssim(*grey)) == pytest.approx((0.16 + 1e-4) / (0.2 + 1e-4), abs=1e-3)


def test_evaluate():
    """PSNR over all pixels of the set, in batches: 10 log10(255^2 / MSE), with the codes counted over all tokens."""
    images = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8, generator=seeded(0))
    half = SimpleNamespace(K=4, size=4, eval=lambda: None, encode=lambda x: x[:, 0].flatten(1).long() // 128,
                           decode=lambda tokens: torch.full((len(tokens), 3, 4, 4), 100, dtype=torch.uint8))
    metrics = evaluate_tokenizer(half, data.ImageSet([0] * 10, [], 4, pixels=images), "cpu", batch=4)
    assert metrics.pop("ssim") == pytest.approx(float(ssim(images, torch.full_like(images, 100)).mean()))
    mse = (images.double() - 100).square().mean()
    high = float((images[:, 0] >= 128).double().mean())
    entropy = -high * math.log(high) - (1 - high) * math.log(1 - high)
    assert metrics == pytest.approx({"psnr": float(10 * (255 ** 2 / mse).log10()), "usage": 0.5,
                                     "perplexity": math.exp(entropy)})


def test_report(fast, small_lpips, run, folder, tmp_path, capsys, monkeypatch):
    """python vqvae.py report: the figures that training found, rFID where the weights are, a picture."""
    words = ["report", run / "tokenizer.pt", "--data", folder, "--device", "cpu", "--out", tmp_path / "a" / "r.png"]
    assert parser_flags("vqvae.py") == sorted(["data", "root", "size", "weights", "lpips_weights", "batch", "device",
                                                  "out"])
    assert call("vqvae.py", *words) == 0
    text = capsys.readouterr().out
    metrics = torch.load(run / "tokenizer.pt", weights_only=True)["metrics"]
    assert all(f"{name} {metrics[name]:.4g}" in text for name in ("psnr", "ssim", "usage", "perplexity"))
    assert "2 held-out images" in text and re.search(r"rfid \d", text) and "no LPIPS: no vgg16-397923af.pth" in text
    assert call("vqvae.py", *words, "--lpips-weights", small_lpips) == 0
    assert re.search(r"lpips 0\.\d", capsys.readouterr().out)
    with Image.open(tmp_path / "a" / "r.png") as picture:
        assert picture.width > 2 * 8 and len(np.unique(np.asarray(picture))) > 10
    published = published_tokenizers.random_weights(published_tokenizers.layout(32, (1, 2), set(), 4, 3, 16))
    torch.save({"state_dict": published}, tmp_path / "vqgan.ckpt")
    assert call("vqvae.py", "report", tmp_path / "vqgan.ckpt", "--size", 6, *words[2:]) == 0
    assert "16 codes, f = 2, 9 tokens of 6 x 6 pixels" in capsys.readouterr().out
    monkeypatch.delenv("FID_WEIGHTS")
    assert call("vqvae.py", *words) == 0 and f"no rFID: no {inception.WEIGHTS} at" in capsys.readouterr().out
    for wrong, says in ((["--size", 9], "made for images of 8 pixels"), (["--weights", "none"], None),
                        (["--batch", 0], "--batch must be at least 1"), (["--batch", 1], None),
                        (["--root", tmp_path, "--data", "nowhere"], "no such folder")):
        assert call("vqvae.py", *words, *wrong) == (2 if says else 0)
        assert says is None or says in capsys.readouterr().err


NOTEBOOK = """
class Quantizer(nn.Module):
    def forward(self, z):
        return 0 * z.sum(), z, None, F.one_hot(z.sum(1).long().clamp(0, 511), 512).permute(0, 3, 1, 2)
class Model(nn.Module):
    def __init__(self, *settings):
        super().__init__()
        self._encoder, self._pre_vq_conv, self._vq_vae = nn.AvgPool2d(4), nn.Conv2d(3, 3, 1), Quantizer()
        self._decoder = nn.Upsample(scale_factor=4)
    def forward(self, x):
        z = self._pre_vq_conv(self._encoder(x))
        return self._vq_vae(z)[0], self._decoder(z), None
"""


def test_tokenizer_peer(tmp_path, monkeypatch, capsys):
    """The race runs to its end, goes on where it stopped, and its figures are those of evaluate_tokenizer. By a clock
    that goes on by 0.05 s whenever it is looked at, two steps fill 0.06 s."""
    monkeypatch.setattr(tokenizer_peer, "time", SimpleNamespace(perf_counter=itertools.count(0, 0.05).__next__))
    cells = [{"cell_type": "code", "source": [f"class {cell}"]} for cell in NOTEBOOK.split("class ")[1:]]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["VQ"]}, *cells]}))
    np.savez(tmp_path / "a.npz", images=noise(256, 32, 32), test_images=noise(16, 32, 32))
    words = [tmp_path / "a.ipynb", "--data", "a.npz", "--root", tmp_path, "--out", tmp_path / "a", "--device", "cpu",
             "--seed", 1, "--minutes", 0.001]
    assert call(tokenizer_peer, *words) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    theirs, timed, counted = (results[name] for name in ("theirs", "ours, same time", "ours, same steps"))
    assert [found["steps"] for found in (theirs, timed, counted)] == [2, 2, 2]
    assert theirs["seconds"] == timed["seconds"] == 0.1
    assert call(tokenizer_peer, *words) == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == results
    state = torch.load(tmp_path / "a" / "state.pt", weights_only=True)["ours, same steps"]
    model = VQVAE(32, f=4, K=512, code_dim=16, width=32)
    model.load_state_dict(state[1])
    expected = evaluate_tokenizer(model, find("a.npz", tmp_path).load(32)[1], "cpu")
    assert counted["psnr"] == pytest.approx(expected["psnr"]) and counted["usage"] == expected["usage"]
