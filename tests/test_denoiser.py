"""The denoiser, its losses and its sampler, beyond the exact answers of test_all.py."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import losses
import sample
from embedding_diffusion import EmbeddingDiffusion
from engine.randomness import image_generators
from extras import two_tokens
from schedule import ShiftedCosine, add_noise
from tests.common import call, close, f64, seeded
from tests.exact import BPSK, NOISE, ExactPosterior, exact_rec_and_diff, small_model

SCHEDULE = ShiftedCosine(0.4, -10, 10)


def denoiser_by_hand(model, z, log_snr, labels, mask):
    """log p (B, N, K), position by position as the formulas say."""
    def normed(h):
        return F.layer_norm(h, h.shape[-1:], eps=1e-6)

    table = model.embedding / (model.embedding.square().mean(1, keepdim=True) + 1e-8).sqrt()
    alpha, variance = log_snr.sigmoid().sqrt()[:, None, None], (-log_snr).sigmoid()
    distance = (z[:, :, None] - (alpha * table)[:, None]).square().sum(-1)                     # (B, N, K)
    evidence = -distance / 2 / variance[:, None, None]
    h = model.input(torch.cat([z, evidence.softmax(-1) @ table], -1))
    h = torch.where(mask[..., None], model.mask_embedding, h) + model.position
    angles = log_snr[:, None] * torch.linspace(math.log(0.01), math.log(4), 64).exp()
    c = F.silu(model.log_snr_mlp[0](torch.cat([angles.sin(), angles.cos()], 1)))
    c = F.silu(model.log_snr_mlp[2](c) + model.class_embedding.weight[labels])
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)[:, None].chunk(6, -1)
        parts = block.qkv(normed(h) * (1 + scale1) + shift1).chunk(3, -1)
        heads = []
        for q, k, v in zip(*(part.chunk(block.heads, -1) for part in parts), strict=True):
            q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
                    for x, norm in ((q, block.q_norm), (k, block.k_norm)))
            heads.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        h = h + gate1 * block.proj(torch.cat(heads, -1))
        hidden = F.gelu(block.mlp[0](normed(h) * (1 + scale2) + shift2), approximate="tanh")
        h = h + gate2 * block.mlp[2](hidden)
    shift, scale = model.final_modulation(c)[:, None].chunk(2, -1)
    logits = model.head(normed(h) * (1 + scale) + shift)
    return (logits + evidence * ~mask[..., None]).log_softmax(-1)


def test_the_network_by_hand():
    """A denoiser with random weights, class, noise level, dropped positions and all, in float64."""
    model = small_model(num_classes=2, grid=(2, 3), depth=2)
    z, log_snr = torch.randn(4, 6, 4, dtype=torch.float64, generator=seeded(1)), f64(-6, -1, 0, 4)
    labels, mask = torch.tensor([0, 1, 2, 1]), torch.rand(4, 6, generator=seeded(2)) < 0.3
    found = model(z, log_snr, labels, mask=mask).log_softmax(-1)
    close(found, denoiser_by_hand(model, z, log_snr, labels, mask), rtol=0, atol=1e-9)


def test_a_new_denoiser():
    """Blocks are the identity, the output is uniform, positions are sines and cosines of row and column."""
    torch.manual_seed(0)
    model = EmbeddingDiffusion(6, (3, 5), D=4, width=16, depth=2, heads=2, num_classes=2, output_prior=False)
    h, c = torch.randn(2, 15, 16), torch.randn(2, 16)
    assert all(torch.equal(block(h, c), h) for block in model.blocks)
    assert not model(torch.randn(2, 15, 4), torch.zeros(2), torch.tensor([0, 1])).any()
    for row in range(3):
        for column in range(5):
            angles = [place / 100 ** (i / 4) for place in (row, column) for i in range(4)]
            expected = [f(angle) for f in (math.sin, math.cos) for angle in angles]
            close(model.position[5 * row + column].detach(), torch.tensor(expected))
    assert 0.8 < float(model.embedding.detach().std()) < 1.2 and not model.mask_embedding.any()


def test_init_from_codebook():
    """Centred principal components with the square root of their spread: C C^T's square root is E E^T."""
    codes = torch.randn(9, 3, dtype=torch.float64, generator=seeded(0)) * f64(9, 4, 1) + 5
    model = EmbeddingDiffusion(9, (2, 2), D=5, width=8, depth=1, heads=2).double()
    model.init_from_codebook(codes)
    start, centred = model.embedding.detach(), codes - codes.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # (U S^2 U^T); the start's is U S U^T, scaled
    expected = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    close(start @ start.T / (start @ start.T).trace(), expected / expected.trace(), rtol=0, atol=1e-7)
    close(start[:, :3].std(), f64(1)[0])
    assert not start[:, 3:].any()


@pytest.mark.parametrize("fraction, n_rec", [(0.0, 1), (1.0, 11)])
def test_a_row_for_each_kind_of_loss(fraction, n_rec):
    x = torch.zeros(12, 4, dtype=torch.int64)
    noise = NOISE | {"rec_fraction": fraction}
    assert losses.sample_noise(small_model(depth=1), x, x[:, 0], seeded(2), **noise)[1] == n_rec


def test_two_tokens(capsys):
    """Its quadrature gives the exact bound. A clipped weight rewards collapse, our schedule does not."""
    distances, long = (0.1, 0.5, 2.0), ShiftedCosine(1, -10, 10)
    rows = two_tokens.two_tokens(distances, long, 5.0)
    for d, row in zip(distances, rows, strict=True):
        exact = exact_rec_and_diff(ExactPosterior(BPSK.p, BPSK.embedding * d / 2), long, 60)
        close(row[:2], f64(*exact), rtol=0, atol=2e-5)
    clipped = rows[:, 0] + rows[:, 2]
    assert clipped[0] < clipped[1] < clipped[2]
    assert call("losses.py") == 0
    page = capsys.readouterr().out
    ours = [float(line.split()[-1]) for line in page.splitlines() if line.count("|") == 2 and "." in line[:8]]
    assert len(ours) == 6 and min(ours) / math.log(2) > 0.93  # the last column
    assert page.count("mean target 0.756761") == page.count("0.888983   over-confident") == 1
    assert call("losses.py", "--shift", 0) == 2 and "must be positive" in capsys.readouterr().err


def drawn(model, steps, guidance=0.0, sampler="ancestral", B=3, schedule=SCHEDULE, **options):
    """Tokens, the arguments of each call of the network, and (t, p) after each step."""
    seen = []
    with mock.patch.object(model, "forward", wraps=model.forward) as spy:
        tokens = sample.sample_tokens(
            model, schedule, torch.arange(B) % 2, image_generators(7, range(B)), steps, guidance, sampler,
            callback=lambda t, p: seen.append((t, p)), **options)
    return tokens, [call.args for call in spy.call_args_list], seen


def first_noise(model, seed=7):
    return torch.stack([torch.randn(model.N, model.D, generator=generator, dtype=torch.float64)
                        for generator in image_generators(seed, range(3))])


@pytest.fixture
def model():
    return small_model(num_classes=2, grid=(4, 4), depth=1)


@pytest.mark.parametrize("steps, guidance, options, end", [
    (1, 0.0, {}, 1), (4, 0.0, {}, 0.05), (16, 0.0, {}, 0),  # few steps end before 0
    (15, 0.1, {}, 0.3), (2, 1.0, {"init": 0.5}, 0.15), (5, 2.0, {"end": 0.1}, 0.1)])
def test_grid_of_times(model, steps, guidance, options, end):
    """Uniform from where sampling starts to its end, which lies in proportion to the start."""
    start = options.get("init", 1.0)
    if "init" in options:
        options = {"init": (torch.zeros(1, 16, dtype=torch.int64), start)}
    _, calls, seen = drawn(model, steps, guidance, **options)
    times = torch.linspace(start, end, steps, dtype=torch.float64) if steps > 1 else f64(1)
    assert [t for t, _ in seen] == pytest.approx(times.tolist(), abs=1e-15)
    assert [float(log_snr[0]) for _, log_snr, _ in calls] == pytest.approx(SCHEDULE.log_snr(times).tolist())


def test_guidance_interval(model):
    with mock.patch.object(model, "guided", wraps=model.guided) as spy:
        drawn(model, 5, 2.0, interval=(0.3, 0.6), end=0.0)
    assert [call.args[3] for call in spy.call_args_list] == [0, 0, 2, 0, 0]


def test_rows_of_the_second_process(monkeypatch):
    monkeypatch.setattr(sample, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(sample, "all_gather_cat", lambda images: images)
    monkeypatch.setattr(sample, "sample_images", lambda _, labels, first, **options: labels + 10 * first)
    assert sample.sample_together(None, torch.arange(5)).tolist() == [33, 34, 34]


def test_temperature(model):
    """One step is softmax(logits / T); T -> 0 is the argmax, at every step."""
    logits = model(first_noise(model), SCHEDULE.log_snr(f64(1, 1, 1)), torch.arange(3) % 2)
    close(drawn(model, 1, temperature=2.0)[2][0][1], (logits / 2).softmax(-1), rtol=0, atol=1e-15)
    assert torch.equal(drawn(model, 1, temperature=1e-9)[0], logits.argmax(-1))
    assert all(set(p.unique().tolist()) == {0, 1} for _, p in drawn(model, 4, temperature=1e-9)[2])


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_inpainted_tokens_come_out(model, sampler):
    """Exactly, and e_hat is their embedding at every step; the others vary from image to image."""
    inpaint = torch.where(torch.arange(16) % 3 == 0, torch.arange(16) % 6, -1)[None]  # one row for all images
    known, step = inpaint[0] >= 0, f"{sampler}_step"
    with mock.patch.object(sample, step, wraps=getattr(sample, step)) as spy:
        tokens, _, _ = drawn(model, 6, 1.0, sampler, inpaint=inpaint)
    assert (tokens[:, known] == inpaint[:, known]).all()
    assert all((tokens[i, ~known] != tokens[j, ~known]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    for move in spy.call_args_list:
        assert (move.args[1][:, known] == model.table()[inpaint[0, known]]).all()


def test_init_and_noise(model):
    """Init is noised as in training; little noise changes no token. noise: the first noise alone."""
    tokens, schedule = torch.arange(16) % 6, ShiftedCosine(1, -10, 20)
    assert torch.equal(drawn(model, 4, schedule=schedule, init=(tokens[None], 1e-4))[0], tokens.expand(3, 16))
    found, calls, _ = drawn(model, 3, schedule=schedule, init=(tokens[None], 0.8), end=0.2)
    log_snr = schedule.log_snr(f64(0.8, 0.8, 0.8))
    assert torch.equal(calls[0][0], add_noise(model.table()[tokens][None], log_snr, first_noise(model)))
    here, there = first_noise(model), first_noise(model, seed=8)
    assert torch.equal(drawn(model, 4, noise=here)[0], drawn(model, 4)[0])  # the later noise is the same
    assert torch.equal(drawn(model, 2, noise=there)[1][0][0], there)
