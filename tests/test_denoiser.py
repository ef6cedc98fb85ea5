"""The denoiser, its losses and its sampler, beyond the exact answers of test_all.py."""

import math
from unittest import mock

import pytest
import torch

import losses
import sample
from embedding_diffusion import EmbeddingDiffusion
from engine.config import DEFAULTS
from engine.distributed import shard
from engine.randomness import image_generators
from extras import two_tokens
from extras.pictures import slerp
from schedule import ShiftedCosine, add_noise
from tests.common import call, close, f64, parser_flags, seeded
from tests.exact import BPSK, ExactPosterior, exact_rec_and_diff, small_model

SCHEDULE = ShiftedCosine(0.4, -10, 10)


def test_losses_alone(capsys):
    """python losses.py shows what other quadratures give, and that a clipped weight rewards collapse."""
    distances = (0.1, 0.5, 2.0)
    rows = two_tokens.two_tokens(distances, ShiftedCosine(1, -10, 10), 5.0)
    for d, row in zip(distances, rows, strict=True):
        exact = exact_rec_and_diff(ExactPosterior(BPSK.p, BPSK.embedding * d / 2), ShiftedCosine(1, -10, 10), 240)
        close(row[:2], f64(*exact), rtol=0, atol=2e-5)
    assert rows[0, 0] + rows[0, 2] < rows[1, 0] + rows[1, 2] < rows[2, 0] + rows[2, 2]
    # A schedule that starts where the clip ends: the clipped bound is the exact one, log 2 at every distance.
    rows = two_tokens.two_tokens(distances, ShiftedCosine(1, -10, math.log(5)), 5.0)
    prior = f64(*distances).square() / 8 * math.exp(-10)  # of e = +- d / 2, to first order
    close(rows[:, 0] + rows[:, 2] + prior, torch.full((3,), math.log(2), dtype=torch.float64), rtol=0, atol=1e-6)
    schedule = ShiftedCosine(*(DEFAULTS[name] for name in ("shift", "log_snr_min", "log_snr_max")))
    rows = two_tokens.two_tokens((0.03, 0.3, 1.0, 2.0), schedule, DEFAULTS["weight_clip"])  # about there: README
    assert ((rows[:, 0] + rows[:, 2]) / math.log(2) > 0.93).all()
    assert two_tokens.mean_target("markov") == pytest.approx((0.756761, 0.756761), abs=1e-6)
    assert two_tokens.mean_target("shared") == pytest.approx((0.756761, 0.888983), abs=1e-6)
    assert parser_flags("losses.py") == ["log_snr_max", "shift", "weight_clip"] and call("losses.py") == 0
    default = capsys.readouterr().out
    assert f"{rows[2, 0] + rows[2, 2]:17.4f}\n    2.00" in default  # the last column, d = 1
    assert default.count("over-confident") == 1 and "shared: posterior 0.756761, mean target 0.888983" in default
    for words in (["--shift", 1], ["--weight-clip", 2], ["--log-snr-max", 5]):
        assert call("losses.py", *words) == 0 and capsys.readouterr().out != default
    assert call("losses.py", "--shift", 0, "--max-snr", 2) == 2  # the old name of --weight-clip
    assert "must be positive" in capsys.readouterr().err


def test_init_from_codebook():
    """Centred principal components with the square root of their spread: distances are those of C C^T's fourth root."""
    codes = torch.randn(9, 3, dtype=torch.float64, generator=seeded(0)) * f64(9, 4, 1) + 5
    model = EmbeddingDiffusion(9, (2, 2), D=5, width=8, depth=1, heads=2).double()
    model.init_from_codebook(codes)
    start, centred = model.embedding.detach(), codes - codes.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # (U S^2 U^T); the start's is U S U^T, scaled
    expected = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    close(start @ start.T / (start @ start.T).trace(), expected / expected.trace(), rtol=0, atol=1e-7)
    close(start[:, :3].std(), f64(1)[0])
    assert not start[:, 3:].any()


def test_posterior_input():
    """The first layer sees z and E[e(x_i) | z_ti], Bayes' rule for tokens that are uniform and independent."""
    model, seen = small_model(), []
    z, log_snr = torch.randn(3, 4, 4, dtype=torch.float64, generator=seeded(1)), f64(-3, 0, 4)
    labels, table = torch.zeros(3, dtype=torch.int64), model.table()
    model.input.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(z, log_snr, labels)
    uniform = ExactPosterior(torch.full((1, 6), 1 / 6, dtype=torch.float64), table, copies=4)
    close(seen[0], torch.cat([z, uniform(z, log_snr, labels).softmax(-1) @ table], -1))
    # It is the same in the unconditional pass, and differentiable: through it alone, the table has a gradient.
    assert torch.equal(model.guided(z, log_snr, labels, 1.0), logits) and seen[0].requires_grad
    assert small_model(posterior_input=False).input.in_features == 4


@pytest.mark.parametrize("parts", [2, 5, 12])
def test_shares_add_up(parts):
    """However the rows are divided, terms and gradient are those of the whole batch; all in float64."""
    model, schedule = small_model(num_classes=2), ShiftedCosine(0.4, -5, 5)
    x, options = torch.randint(6, (12, 4), generator=seeded(1)), dict(
        w_rec=0.7, w_diff=0.3, w_cm=0.9, weight_clip=3.0, cm_pairs="markov")
    noisy, (narrow, *_) = (losses.sample_noise(model, x, x[:, 0] % 2, seeded(2), rec_fraction=0.4, max_drop_rate=0.9,
                                               label_drop=0.1, max_gap=max_gap) for max_gap in (1.0, 0.01))
    assert all(torch.equal(noisy[0][name], narrow[name]) for name in narrow if name != "s")
    assert (narrow["s"] <= narrow["t"]).all() and (narrow["s"] >= narrow["t"] - 0.01001).all()
    loss, terms = losses.training_loss(model, model, schedule, *noisy, **options)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = [losses.training_loss(model, model, schedule, *shard(*noisy, i, parts), **options)
             for i in range(parts)]
    close(sum(t for _, t in found), terms, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(sum(part for part, _ in found), list(model.parameters()))
    for one, other in zip(gradient, expected, strict=True):
        close(one, other, rtol=1e-9, atol=1e-12)


def drawn(model, steps, guidance=0.0, sampler="ancestral", B=3, schedule=None, **options):
    """Tokens, and what was seen on the way: the arguments of each call of the network, (t, p) after each step."""
    seen = []
    with mock.patch.object(model, "forward", wraps=model.forward) as spy:
        tokens = sample.sample_tokens(model, schedule or SCHEDULE, torch.arange(B) % 2,
                                      image_generators(7, range(B)), steps, guidance, sampler,
                                      callback=lambda t, p: seen.append((t, p)), **options)
    return tokens, [call.args for call in spy.call_args_list], seen


def first_noise(model, B=3, seed=7):
    return torch.stack([torch.randn(model.N, model.D, generator=generator, dtype=torch.float64)
                        for generator in image_generators(seed, range(B))])


def test_sampling_options(one_thread):
    """temperature, interval and end: nothing at their defaults, else exactly what they say."""
    model = small_model(num_classes=2, grid=(4, 4))
    plain, calls, _ = drawn(model, 5, 2.0)
    assert torch.equal(plain, drawn(model, 5, 2.0, temperature=1.0, interval=(0.0, 1.0), end=0.3)[0])
    assert [len(z) for z, *_ in calls] == [6] * 5
    # few steps end before 0, in proportion to where they start; one step has nowhere to go, and many end at 0
    assert [drawn(model, steps)[2][-1][0] for steps in (1, 2, 4, 16)] == pytest.approx([1, 0.2, 0.05, 0], abs=1e-15)
    ends = [drawn(model, steps, 0.1)[2][-1][0] for steps in (1, 2, 15, 16)]
    assert ends == pytest.approx([1, 0.3, 0.3, 0], abs=1e-15)
    init = torch.zeros(1, 16, dtype=torch.int64), 0.5
    for omega, end in ((0, 0.1), (-0.5, 0.1), (1.0, 0.15)):
        assert drawn(model, 2, omega, init=init)[2][-1][0] == pytest.approx(end, abs=1e-15)
    # omega counts at t = 1, 3/4, 1/2, 1/4, 0 in the interval only; elsewhere there is one pass, not two
    tokens, calls, _ = drawn(model, 5, 2.0, interval=(0.3, 0.45), end=0.0)
    assert torch.equal(tokens, drawn(model, 5, 0.0, end=0.0)[0]) and [len(z) for z, *_ in calls] == [3] * 5
    assert [len(z) for z, *_ in drawn(model, 5, 2.0, interval=(0.25, 0.75), end=0.0)[1]] == [3, 6, 6, 6, 3]
    # one step is softmax(logits / T); T -> 0 is the argmax, at every step
    log_snr = SCHEDULE.log_snr(f64(1, 1, 1))
    logits = model(first_noise(model), log_snr, torch.arange(3) % 2)
    close(drawn(model, 1, temperature=2.0)[2][0][1], (logits / 2).softmax(-1), rtol=0, atol=1e-15)
    tokens, _, seen = drawn(model, 4, temperature=1e-9)
    assert torch.equal(drawn(model, 1, temperature=1e-9)[0], logits.argmax(-1))
    assert torch.equal(tokens, seen[-1][1].argmax(-1)) and all(set(p.unique().tolist()) == {0, 1} for _, p in seen)
    # the grid is uniform from 1 to end
    _, calls, seen = drawn(model, 3, end=0.5)
    assert [t for t, _ in seen] == [1, 0.75, 0.5]
    assert [float(log_snr[0]) for _, log_snr, _ in calls] == SCHEDULE.log_snr(f64(1, 0.75, 0.5)).tolist()


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_inpainted_tokens_come_out(one_thread, sampler):
    """Exactly, and e_hat is their embedding at every step; the others vary, and differ from image to image."""
    model = small_model(num_classes=2, grid=(4, 4))
    inpaint = torch.where(torch.arange(16) % 3 == 0, torch.arange(16) % 6, -1)[None]  # one row for all images
    kept, step = inpaint[0] >= 0, f"{sampler}_step"
    with mock.patch.object(sample, step, wraps=getattr(sample, step)) as spy:
        tokens, _, _ = drawn(model, 6, 1.0, sampler, inpaint=inpaint)
    assert (tokens[:, kept] == inpaint[:, kept]).all()
    assert all((tokens[i, ~kept] != tokens[j, ~kept]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    for move in spy.call_args_list:
        assert (move.args[1][:, kept] == model.table()[inpaint[0, kept]]).all()
    nothing = torch.full((3, 16), -1)
    assert torch.equal(drawn(model, 6, 1.0, sampler, inpaint=nothing)[0], drawn(model, 6, 1.0, sampler)[0])


def test_init_and_noise(one_thread):
    """Init is noised as in training, and little noise changes no token; other noise is the first noise alone."""
    model, tokens, schedule = small_model(grid=(4, 4), num_classes=2), torch.arange(16) % 6, ShiftedCosine(1, -10, 20)
    assert torch.equal(drawn(model, 4, schedule=schedule, init=(tokens[None], 1e-4))[0], tokens.expand(3, 16))
    found, calls, seen = drawn(model, 3, schedule=schedule, init=(tokens[None], 0.8), end=0.2)
    log_snr = schedule.log_snr(f64(0.8, 0.8, 0.8))
    assert torch.equal(calls[0][0], add_noise(model.table()[tokens][None], log_snr, first_noise(model)))
    assert [t for t, _ in seen] == pytest.approx([0.8, 0.5, 0.2], abs=1e-15) and (found != tokens).any()
    here, there = first_noise(model), first_noise(model, seed=8)
    assert torch.equal(drawn(model, 4, noise=here)[0], drawn(model, 4)[0])
    with mock.patch.object(sample, "ancestral_step", wraps=sample.ancestral_step) as spy:
        _, calls, _ = drawn(model, 2, noise=there)
        drawn(model, 2)
    assert torch.equal(calls[0][0], there)
    assert torch.equal(*(call.args[4] for call in spy.call_args_list))  # the later noise is the same
    path = slerp(here[0], there[0], 5)
    assert torch.equal(path[0], here[0]) and torch.equal(path[4], there[0]) and len(slerp(*here[:2], 1)) == 1
    path = slerp(f64([3, 0]), f64([0, 3]), 4)  # in steps of 30 degrees
    close(path, 3 * f64([[1, 0]], [[0.75 ** 0.5, 0.5]], [[0.5, 0.75 ** 0.5]], [[0, 1]]), rtol=0, atol=1e-12)
