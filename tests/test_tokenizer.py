"""The tokenizer: its codebook, the losses of VQGAN, published ones, and how it is measured."""

import hashlib
import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from engine.build import load_checkpoint, read_tokenizer
from engine.published_vqgan import PublishedVQGAN
from engine.validate import UserError
from extras import vqgan_losses
from extras.datasets import find
from extras.vqgan_losses import LPIPS, PatchDiscriminator, adaptive_weight, find_lpips, read_lpips
from tests.common import TINY, call, close, flags, seeded
from vqvae import VQVAE, ResBlock, evaluate_tokenizer, ssim, to_float, to_uint8


def layout(channels, multiples, attended, z, code_dim, K):
    """{name: shape} of the weights of a published VQGAN. attended: levels with attention."""
    w, shapes = [channels * m for m in multiples], {"quantize.embedding.weight": [K, code_dim]}

    def put(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = list(shape), [shape[0]]

    def block(name, before, c, attention):
        for i, c_in in (("1", before), ("2", c)):
            put(f"{name}.norm{i}", c_in)
            put(f"{name}.conv{i}", c, c_in, 3, 3)
        if before != c:
            put(name + ".nin_shortcut", c, before, 1, 1)
        if attention:
            put(f"{attention}.norm", c)
            for part in ("q", "k", "v", "proj_out"):
                put(f"{attention}.{part}", c, c, 1, 1)

    for side, blocks, before in (("encoder.down", 2, [channels, *w]), ("decoder.up", 3, [*w[1:], w[-1]])):
        for i, c in enumerate(w):
            for j in range(blocks):
                attention = f"{side}.{i}.attn.{j}" if i in attended else None
                block(f"{side}.{i}.block.{j}", c if j else before[i], c, attention)
    for i in range(len(w) - 1):
        put(f"encoder.down.{i}.downsample.conv", w[i], w[i], 3, 3)
        put(f"decoder.up.{i + 1}.upsample.conv", w[i + 1], w[i + 1], 3, 3)
    for side, first, c_in, last, c_out in (
            ("encoder", channels, 3, w[-1], z), ("decoder", w[-1], z, w[0], 3)):
        block(f"{side}.mid.block_1", w[-1], w[-1], f"{side}.mid.attn_1")
        block(f"{side}.mid.block_2", w[-1], w[-1], None)
        put(f"{side}.conv_in", first, c_in, 3, 3)
        put(f"{side}.norm_out", last)
        put(f"{side}.conv_out", c_out, last, 3, 3)
    put("quant_conv", code_dim, z, 1, 1)
    put("post_quant_conv", z, code_dim, 1, 1)
    return shapes


def random_weights(shapes):
    """From NumPy's generator, the same everywhere; each layer keeps the scale of what it reads."""
    rng, state = np.random.default_rng(0), {}
    for name, shape in sorted(shapes.items()):
        value = rng.standard_normal(shape) * (np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2)
        state[name] = torch.from_numpy(value + ("norm" in name and name.endswith("weight"))).float()
    return state


SMALL_VQGAN = layout(32, (1, 2), set(), 4, 3, 16)


def test_pixels_come_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels) and to_uint8(torch.zeros(1)).item() == 128


def test_residual_blocks_start_as_the_identity():
    h = torch.randn(2, 32, 4, 4, generator=seeded(0))
    assert torch.equal(ResBlock(32)(h), h)


def test_vqvae_shapes():
    """Image -> tokens -> image; forward, encode and decode lay tokens out alike."""
    torch.manual_seed(0)
    model = VQVAE(16, f=8, K=10, code_dim=3, width=16).eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    out, tokens = model(images), model.encode(images)
    assert tokens.shape == (2, 4) and torch.equal(tokens, out["tokens"])
    decoded = model.decode(tokens)
    again = model.decode_continuous(model.quantizer(out["z_e"])[0])
    assert decoded.shape == images.shape and torch.equal(decoded, to_uint8(again))


def test_lpips():
    """The formula, in float64; 0, not NaN, where every feature is 0."""
    torch.manual_seed(0)
    lpips, (x, y) = LPIPS(), (torch.rand(2, 2, 3, 24, 20) * 2 - 1).unbind()
    state = {name: value.double() for name, value in lpips.state_dict().items()}
    ends, expected = (2, 7, 14, 21, 28), 0  # torchvision's numbers of convolutions
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    h = (torch.cat([x, y]).double() - mean) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        if number in (5, 10, 17, 24):
            h = F.max_pool2d(h, 2)
        weight, bias = (state[f"features.{number}.{name}"] for name in ("weight", "bias"))
        h = F.conv2d(h, weight, bias, padding=1).relu()
        if number in ends:
            f, g = (h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            weight = state[f"lin.{ends.index(number)}"].view(-1, 1, 1)
            expected = expected + (weight * (f - g) ** 2).sum(1).mean((1, 2))
    close(lpips(x, y), expected.float(), rtol=1e-4, atol=0)  # 13 layers of up to 4,608 float32 products each
    for weight in lpips.features.parameters():
        weight.zero_()
    assert not lpips(x, y).any()


def test_lpips_weights(small_lpips, tmp_path, monkeypatch):
    """Read from a VQGAN's checkpoint or from the two published files, in torch's old format too."""
    torch.manual_seed(0)
    weights = LPIPS().state_dict()
    network = {name: value for name, value in weights.items() if name.startswith("features")}
    linear = {f"lin{i}.model.1.weight": weights[f"lin.{i}"].view(1, -1, 1, 1) for i in range(3)}
    cache = tmp_path / "no cache" / "checkpoints"
    cache.mkdir(parents=True)
    files = [cache / name for name in vqgan_losses.LPIPS_FILES]
    torch.save(network, files[0], _use_new_zipfile_serialization=False)
    torch.save(linear, files[1])
    with pytest.raises(UserError, match="not the published"):
        find_lpips()
    digests = {file.name: ("", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}
    monkeypatch.setattr(vqgan_losses, "LPIPS_FILES", digests)
    for paths in find_lpips(), find_lpips([small_lpips]):
        close(read_lpips(paths), dict(weights), rtol=0, atol=0)


def test_discriminator():
    """No image's logits depend on another's; the adaptive weight (tests/test_by_hand.py) is clamped."""
    torch.manual_seed(0)
    last = torch.randn(4, 3, requires_grad=True)
    assert adaptive_weight(last.square().mean(), 0 * last.sum(), last) == 100
    model, x = PatchDiscriminator(64, width=16), torch.rand(3, 3, 64, 64)
    logits = model(x)
    assert logits.shape[:2] == (3, 1) and logits[0].numel() > 1
    close(model(x[1:2]), logits[1:2])


@pytest.mark.parametrize("arguments, digest", [  # of the original models' own state dicts, by SHA-256
    ((128, (1, 1, 2, 2, 4), {4}, 256, 256, 1024), "4a7b1dafb1593e7d"),  # taming f16
    ((128, (1, 2, 4), set(), 3, 3, 8192), "b22ff62b5d160fdf"),  # latent-diffusion vq-f4
    ((128, (1, 2, 2, 4), {3}, 4, 4, 16384), "04568b6c2a1f761a")])  # vq-f8
def test_published_layouts(arguments, digest):
    """The weights of the original models, name by name, and what is read off them."""
    shapes = layout(*arguments)
    assert hashlib.sha256(str(sorted(shapes.items())).encode()).hexdigest()[:16] == digest
    with torch.device("meta"):
        model = PublishedVQGAN(shapes, 256)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    f = 2 ** (len(arguments[1]) - 1)
    assert (model.K, model.f, model.grid) == (arguments[-1], f, (256 // f, 256 // f))


@pytest.mark.parametrize("prefix, zipped", [("", True), ("first_stage_model.", False)])
def test_published_tokenizer(prefix, zipped, tmp_path, monkeypatch):
    """Tokens and images are those of the original code in float64, whatever of Lightning's the file holds."""
    weights = random_weights(layout(32, (1, 2), {1}, 4, 3, 16))
    others = {"loss.discriminator.main.0.weight": torch.zeros(2)}
    content = {"state_dict": {prefix + key: value for key, value in weights.items()} | others}
    if zipped:
        Callback = type("Callback", (), {"__module__": "pytorch_lightning"})
        monkeypatch.setitem(sys.modules, "pytorch_lightning", SimpleNamespace(Callback=Callback))
        content["callbacks"] = {Callback: Callback()}
    torch.save(content, tmp_path / "vqgan.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    read = read_tokenizer(tmp_path / "vqgan.ckpt")["tokenizer"]
    close(read, weights, rtol=0, atol=0)
    model = PublishedVQGAN({key: value.shape for key, value in read.items()}, 16)
    model.load_state_dict(read)
    images = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).mul(37).remainder(256).to(torch.uint8)
    tokens = model.encode(images)
    assert tokens[0].tolist() == [
        5, 7, 7, 1, 7, 4, 13, 13, 7, 5, 1, 1, 5, 1, 4, 5, 5, 1, 1, 5, 1, 1, 7, 4, 5, 1, 5, 1, 7, 4, 7, 7,
        1, 1, 5, 15, 9, 5, 7, 4, 15, 5, 1, 9, 4, 5, 7, 1, 7, 7, 4, 5, 1, 1, 4, 2, 5, 1, 1, 1, 7, 5, 1, 7]
    codes = F.embedding(tokens, model.codebook).view(2, 8, 8, 3)
    decoded = model.decode_continuous(codes.permute(0, 3, 1, 2))
    expected = torch.tensor([0.2534359, 0.2012962, 0.2843292, 0.7612908, 0.49224, 0.0105155])
    close(decoded[1, 0, 0, :6], expected, rtol=0, atol=1e-5)  # of about 1, through some 40 float32 layers
    assert torch.equal(model.decode(tokens), to_uint8(decoded))


def test_a_published_tokenizer_from_images_to_samples(folder, tmp_path, capsys):
    """--tokenizer takes a VQGAN's checkpoint: it decides f and K, encodes, and lies in ckpt.pt."""
    vqgan, checkpoint = tmp_path / "vqgan.ckpt", tmp_path / "a" / "ckpt.pt"
    torch.save({"state_dict": random_weights(SMALL_VQGAN)}, vqgan)
    options = flags({name: value for name, value in TINY.items() if name not in ("f", "K", "code_dim")})
    words = ["--data", folder, "--tokenizer", vqgan, *options]
    assert call("train.py", *words, "--out", tmp_path / "a") == 0
    assert "16 tokens of 16 codes per image" in capsys.readouterr().out
    pipeline = load_checkpoint(checkpoint, torch.device("cpu"))
    assert isinstance(pipeline.tokenizer, PublishedVQGAN) and pipeline.model.K == 16
    tokens = torch.from_numpy(np.load(tmp_path / "a" / "tokens.npy")["x"][:5].astype("i8"))
    images, _ = find(folder).load(8)
    assert torch.equal(pipeline.tokenizer.encode(images.batch(range(5))), tokens)
    assert call("sample.py", checkpoint, "--n", 2, "--out", tmp_path / "s.png") == 0


def test_ssim():
    a, b = (torch.randint(256, (2, 3, 13, 12), dtype=torch.uint8, generator=seeded(i)) for i in (0, 1))
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    w, values = np.outer(g, g) / g.sum() ** 2, []
    for x, y in zip(a[1].double().numpy() / 255, b[1].double().numpy() / 255, strict=True):
        for i, j in itertools.product(range(3), range(2)):
            p, q = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            variances = (w * (p - mp) ** 2).sum() + (w * (q - mq) ** 2).sum()
            cov = (w * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                          / ((mp ** 2 + mq ** 2 + 1e-4) * (variances + 9e-4)))
    # float32 sums of numbers below 1, differences of some 2^-23 beside 9e-4 in the denominator
    assert float(ssim(a, b)[1]) == pytest.approx(np.mean(values), abs=20 * 2 ** -23 / 9e-4)


def test_evaluate():
    """PSNR over all pixels of the set, in batches: 10 log10(255^2 / MSE); perplexity e^H of all tokens."""
    images = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8, generator=seeded(0))
    half = SimpleNamespace(K=4, size=4, eval=lambda: None, encode=lambda x: x[:, 0].flatten(1).long() // 128,
                           decode=lambda tokens: torch.full((len(tokens), 3, 4, 4), 100, dtype=torch.uint8))
    metrics = evaluate_tokenizer(half, data.ImageSet([0] * 10, [], 4, pixels=images), "cpu", batch=4)
    mse = (images.double() - 100).square().mean()
    high = float((images[:, 0] >= 128).double().mean())
    entropy = -high * math.log(high) - (1 - high) * math.log(1 - high)
    assert metrics == pytest.approx({
        "psnr": float(10 * (255 ** 2 / mse).log10()), "usage": 0.5, "perplexity": math.exp(entropy),
        "ssim": float(ssim(images, torch.full_like(images, 100)).mean())})


def test_report(fast, small_lpips, run, folder, tmp_path, capsys):
    """python vqvae.py report: the figures that training found, rFID where the weights are, a picture."""
    page, metrics = tmp_path / "r.png", torch.load(run / "tokenizer.pt", weights_only=True)["metrics"]
    torch.save({"state_dict": random_weights(SMALL_VQGAN)}, tmp_path / "vqgan.ckpt")
    figures = [f"{name} {metrics[name]:.4g}" for name in ("psnr", "ssim", "usage", "perplexity")]
    for tokenizer, more, says in (
            (run / "tokenizer.pt", ["--lpips-weights", small_lpips], [*figures, "rfid ", "lpips 0."]),
            (tmp_path / "vqgan.ckpt", ["--size", 6], ["9 tokens of 6 x 6 pixels", "no LPIPS"])):
        assert call("vqvae.py", "report", tokenizer, "--data", folder, "--out", page, *more) == 0
        text = capsys.readouterr().out
        assert all(word in text for word in says)
    assert len(np.unique(np.asarray(Image.open(page)))) > 10
