"""Tests with exact answers: schedule, bound, consistency loss, dropping, samplers, guidance, quantiser.

Most put an exact denoiser in the network's place (tests/exact.py): for tokens of known probabilities the true
posterior is Bayes' rule, so every expectation has one right value. tests/ has the rest.
"""

import copy
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
import sample
import vqvae
from embedding_diffusion import EmbeddingDiffusion, normalise
from engine.randomness import image_generators
from schedule import ShiftedCosine, add_noise, alpha_sigma, posterior
from tests.common import close, f64, seeded
from tests.exact import (
    BPSK,
    PAIR,
    THREE,
    TRIANGLE,
    ExactPosterior,
    chi_square,
    exact_rec_and_diff,
    integral,
    noise_grid,
    objective,
    quantizer,
    rec_and_diff,
    small_model,
    vectors,
)


@pytest.mark.parametrize("shift", [0.1, 0.4, 1.0, 2.0])
def test_schedule(shift):
    """lambda's derivative and ends; SNR(s) / SNR(1) = s^2 where both ends move by 2 log s."""
    moved = 2 * math.log(shift)
    t = torch.linspace(0, 1, 1001).double().requires_grad_()
    schedule = ShiftedCosine(shift, moved - 10, moved + 10)
    log_snr, unshifted = schedule.log_snr(t), ShiftedCosine(1, -10, 10).log_snr(t)
    close(schedule.d_log_snr(t), torch.autograd.grad(log_snr.sum(), t)[0], rtol=1e-12, atol=0)
    close((log_snr - unshifted).exp(), torch.full_like(t, shift ** 2), rtol=1e-12, atol=0)
    close(log_snr[[0, -1]], f64(10, -10) + moved, rtol=0, atol=1e-10)
    close(ShiftedCosine(shift, -3, 2).log_snr(f64(0, 1)), f64(2, -3), rtol=0, atol=1e-10)
    alpha, sigma = alpha_sigma(log_snr)
    close(alpha ** 2 + sigma ** 2, torch.ones_like(t), rtol=1e-14, atol=0)
    close(alpha ** 2 / sigma ** 2, log_snr.exp(), rtol=1e-12, atol=0)


def test_one_step_back():
    """Ancestral: q(z_s | z_t, e) ~ q(z_s | e) q(z_t | z_s), Gaussian. DDIM: e and eps are kept."""
    z_t, e, eps = torch.randn(3, 5, 2, 4, dtype=torch.float64, generator=seeded(0))
    times = f64(-9, -3, 0, 2, 3), f64(-8.9, -1, 4, 2.5, 9)
    (a_t, s_t), (a_s, s_s) = ([v[:, None, None] for v in alpha_sigma(log_snr)] for log_snr in times)
    added = s_t ** 2 - (a_t / a_s * s_s) ** 2  # z_t = (a_t / a_s) z_s + noise of this variance
    precision = 1 / s_s ** 2 + (a_t / a_s) ** 2 / added
    mean = (a_s * e / s_s ** 2 + a_t / a_s * z_t / added) / precision
    close(sample.ancestral_step(z_t, e, *times, eps), mean + eps / precision.sqrt(), rtol=0, atol=1e-12)
    moved = sample.ddim_step(add_noise(e, times[0], eps), e, *times)
    close(moved, add_noise(e, times[1], eps), rtol=0, atol=1e-12)
    assert not posterior(z_t, e, times[0], times[0] - 1e-7)[1].any()  # of two neighbours, swapped by rounding


def test_bpsk_entropy_and_mmse():
    """H(x | z), MMSE; L_diff between two levels, and L_CM (markov), are the entropy gained."""
    entropy = [float(rec_and_diff(BPSK, level, level)[0]) for level in f64(-1, 0, 1)]
    assert entropy == pytest.approx([0.537051, 0.356316, 0.126307], abs=1e-6)
    assert float(rec_and_diff(BPSK, *f64(0, -2))[1]) == pytest.approx(0.449600, abs=1e-6)  # weight 1
    between = integral(lambda level: rec_and_diff(BPSK, level, f64(-1)[0])[1], -1, 0, 12)
    noise, weights = noise_grid(2)  # one axis for z_t, the other for z_s given z_t
    t, s, labels = *(level.expand(len(noise)) for level in f64(-1, 0)), torch.zeros(len(noise)).long()
    e = torch.ones_like(noise[:, :1])  # by symmetry the other token gives the same
    z_t = add_noise(e, t, noise[:, :1])
    mean, std = posterior(z_t, e, t, s)
    teacher, student = BPSK(mean + std * noise[:, 1:], s, labels), BPSK(z_t, t, labels)
    cm = float(weights @ losses.consistency_loss(teacher, student)[:, 0])
    assert [between, cm, entropy[0] - entropy[1]] == pytest.approx([0.1807343] * 3, abs=1e-7)


def test_only_markov_pairs_keep_the_posterior():
    """At z_t = 0.8 the teacher's mean is .756761 (the posterior) or, with shared noise, .888983."""
    t, s, z_t, label = f64(-1), f64(0), f64([[0.8]]), torch.tensor([0])
    p, (alpha, sigma) = BPSK(z_t, t, label).softmax(-1)[0, 0], alpha_sigma(t)
    eps, weights = noise_grid(1)
    markov = shared = 0
    for k, e in enumerate(f64(-1, 1).view(2, 1, 1, 1)):
        mean, std = posterior(z_t, e, t, s)
        teacher = BPSK(mean + std * eps, s.expand(len(eps)), label.expand(len(eps))).softmax(-1)
        markov += float(p[k] * (weights @ teacher[:, 0, 1]))
        z_s = losses.sample_z_s("shared", z_t, e, (z_t - alpha * e) / sigma, t, s, None)
        shared += float(p[k] * BPSK(z_s, s, label).softmax(-1)[0, 0, 1])
    assert [float(p[1]), markov, shared] == pytest.approx([0.756761, 0.756761, 0.888983], abs=1e-6)


@pytest.mark.parametrize("shift, end, expected", [(1.0, 10, 0.552945), (0.1, 5, 0.568804)])
def test_bound_is_tight(shift, end, expected):
    """The terms sum to H(x), plus the total correlation left at t = 0, seen at low SNR only."""
    moved = 2 * math.log(shift)
    schedule = ShiftedCosine(shift, moved - end, moved + end)
    prior = float(losses.prior_loss(PAIR.embedding[None], schedule.log_snr(f64(1)[0])).mean())
    assert prior + sum(exact_rec_and_diff(PAIR, schedule, 80)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0])
def test_exact_bound_ignores_the_distance(distance):
    """L_rec + L_diff = ln 2 at any distance d, less I(x; z_1) = e^lambda(1) d^2 / 8."""
    exact = ExactPosterior(BPSK.p, BPSK.embedding * distance / 2)
    expected = math.log(2) - math.exp(-10) * distance ** 2 / 8  # next order e^(2 lambda(1)) d^4 < 1e-8
    assert sum(exact_rec_and_diff(exact, ShiftedCosine(1, -10, 10), 240)) == pytest.approx(expected, abs=1e-8)


def test_monte_carlo_bound():
    """vlb() is H(x) with the exact posterior, 600,000 samples; an untrained network is uniform."""
    generator, exact, bounds = seeded(0), ExactPosterior(THREE, 0.3 * TRIANGLE), []
    for _ in range(60):
        cell = torch.multinomial(THREE.flatten(), 10_000, replacement=True, generator=generator)
        x = torch.stack([cell // 3, cell % 3], 1)
        terms = losses.vlb(exact, ShiftedCosine(0.4, -10, 10), x, 0 * cell, generator)
        bounds.append(float(terms.sum(0).mean()))
    margin = 4 * np.std(bounds, ddof=1) / math.sqrt(60)  # four standard errors
    assert margin < 0.04
    assert np.mean(bounds) == pytest.approx(float(torch.special.entr(THREE).sum()) / 2, abs=margin)
    torch.manual_seed(0)
    model = EmbeddingDiffusion(24, (2, 2), D=16, width=8, depth=1, heads=1).double()
    uniform = ExactPosterior(torch.full((1, 24), 1 / 24).double(), model.table(), copies=4)
    inputs = torch.randn(3, 4, 16, generator=generator).double(), f64(-4, 0, 3), torch.zeros(3).long()
    close(model(*inputs).softmax(-1), uniform(*inputs).softmax(-1), rtol=1e-10, atol=1e-14)


def test_prior_loss():
    """L_prior is a KL of Gaussians; for a table of mean square 1 a constant without gradient."""
    e, log_snr = torch.randn(3, 2, 8, dtype=torch.float64, generator=seeded(0)), f64(-2)[0]
    alpha, sigma = alpha_sigma(log_snr)
    q, standard = torch.distributions.Normal(alpha * e, sigma), torch.distributions.Normal(0 * e, 1 + 0 * e)
    close(losses.prior_loss(e, log_snr), torch.distributions.kl_divergence(q, standard).sum(-1))
    raw = normalise(e, "rms").requires_grad_()  # mean square 1: eps = 1e-8 gives 5e-13 |e|
    loss = losses.prior_loss(normalise(raw, "rms"), f64(-10)[0])
    close(loss, torch.full_like(loss, 1.815956e-4), rtol=0, atol=1e-9)
    assert torch.autograd.grad(loss.sum(), raw)[0].norm(dim=-1).max() < 5e-12


def cm_z_scores(cm_pairs):
    """Of dL_CM at the exact posterior: by {1, z, sin 2z} added to the log-odds, and by growing the table."""
    tilt, table = f64(0, 0, 0).requires_grad_(), BPSK.embedding.clone().requires_grad_()

    def student(z, log_snr, labels, mask=None, table=None):
        change = torch.cat([torch.ones_like(z), z, (2 * z).sin()], -1) @ tilt              # (B, N)
        return BPSK(z, log_snr, labels, table=table) + torch.stack([0 * change, change], -1)

    student.table, student.num_classes = lambda: table, 0
    generator, gradients = seeded(0), []
    for _ in range(100):
        x = torch.randint(2, (2000, 1), generator=generator)
        loss, _ = objective(student, BPSK, ShiftedCosine(1, -10, 10), x, 0 * x[:, 0], generator,
                            w_rec=0, w_diff=0, cm_pairs=cm_pairs)
        by_tilt, by_table = torch.autograd.grad(loss, (tilt, table))
        gradients.append(torch.cat([by_tilt, (by_table * table.detach()).sum()[None]]))
    gradients = torch.stack(gradients)
    return 10 * gradients.mean(0) / gradients.std(0)


def test_cm_has_the_posterior_as_its_fixed_point():
    """Markov: no mean gradient in the logits, but the table is pushed apart. Shared: a plain one."""
    markov, shared = cm_z_scores("markov"), cm_z_scores("shared")
    assert markov[:3].abs().max() < 5 and shared[:3].abs().max() > 20 and markov[3] < -20


def test_gradients_of_the_objective():
    """The table's is that of finite differences: by z_t, e and e_hat. The teacher has none."""
    model, schedule, labels = small_model(num_classes=2), ShiftedCosine(0.4, -5, 5), torch.arange(12) % 2
    x, start = torch.randint(6, (12, 4), generator=seeded(1)), model.embedding.detach().clone()
    direction = torch.randn(start.shape, dtype=torch.float64, generator=seeded(3))

    def loss_at(step, teacher, **weights):
        model.embedding.data.copy_(start + step * direction)
        return objective(model, teacher, schedule, x, labels, seeded(2), max_drop_rate=0.5, **weights)[0]

    def constant(*_, **__):  # as the teacher should look to autograd
        return torch.arange(6.0).expand(9, 4, 6)

    for weights in {"w_rec": 0, "w_cm": 0}, {"w_diff": 0, "w_cm": 0}, {"w_rec": 0, "w_diff": 0}:
        gradient, = torch.autograd.grad(loss_at(0, constant, **weights), model.embedding)
        # Central differences: relative errors about h^2 = 1e-10 and 1e-16 / h = 1e-11, times curvature.
        slope = (loss_at(1e-5, constant, **weights) - loss_at(-1e-5, constant, **weights)) / 2e-5
        close((gradient * direction).sum(), slope.detach(), rtol=1e-6, atol=0)
    teacher = copy.deepcopy(model)
    loss_at(0, teacher).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_dropping():
    """A masked token's value changes no logit at all."""
    model, log_snr, labels = small_model(), f64(-1, 2), torch.tensor([0, 0])
    z = torch.randn(2, 4, 4, generator=seeded(0)).double()
    mask = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]]).bool()
    other = torch.where(mask[..., None], z + 3, z)
    assert torch.equal(model(z, log_snr, labels, mask=mask), model(other, log_snr, labels, mask=mask))
    assert not torch.equal(model(z, log_snr, labels), model(other, log_snr, labels))


def test_collapse_diagnostics_and_normalisation():
    """Effective rank, smallest and mean distance of tables done by hand; unit RMS and the ranks left."""
    def figures(table):
        return list(losses.collapse_diagnostics(table).values())

    line = torch.outer(f64(0, 1, 2), f64(3, 4))
    assert figures(line) == pytest.approx([1, 5, 20 / 3])
    axes = torch.cat([torch.eye(5), -torch.eye(5)])  # of 45 pairs 5 are opposite, 40 at right angles
    assert figures(axes + 3) == pytest.approx([5, math.sqrt(2), (5 * 2 + 40 * math.sqrt(2)) / 45])
    uneven = axes[[0, 1, 5, 6]] * torch.tensor([2, 1, 0, 0, 0])  # variances 4 : 1, so e^H(0.8, 0.2)
    assert figures(uneven)[0] == pytest.approx(5 / 4 ** 0.8)
    assert figures(axes[[0, 1, 2, 2]])[1] == 0  # two rows merged
    large = torch.randn(1100, 3, dtype=torch.float64, generator=seeded(0))  # two blocks
    large[3] = large[1090] + 1e-3
    assert figures(large)[1:] == pytest.approx([1e-3 * 3 ** 0.5, float(torch.pdist(large).mean())])
    table = torch.randn(50, 4, dtype=torch.float64, generator=seeded(0))
    for norm, rank in ("rms", 4), ("layer", 3):
        unit = normalise(table, norm)
        close(unit.square().mean(1), torch.ones(50).double(), rtol=1e-6, atol=0)  # eps = 1e-8
        assert torch.linalg.matrix_rank(unit) == rank


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_samples_follow_the_distribution(sampler):
    """20,000 pairs of tokens, 200 steps, exact posterior: chi-square against the probabilities."""
    exact, schedule = ExactPosterior(THREE, TRIANGLE, copies=5_000), ShiftedCosine(0.4, -10, 10)

    def draw(steps):
        labels, generators = torch.zeros(4).long(), image_generators(0, range(4))
        return sample.sample_tokens(exact, schedule, labels, generators, steps, 0.0, sampler).view(-1, 2).T

    first, second = draw(200)
    assert chi_square(torch.bincount(first * 3 + second), 20_000 * THREE.flatten()) > 1e-3
    # One step: a draw from p(x_i | noise).
    assert chi_square(torch.bincount(draw(1)[0]), 20_000 * THREE[0].sum(1)) > 1e-3


def test_guidance_samples():
    """omega = 1 samples p_c^2 / p_u, normalised; e_hat stays in the hull; logits of 1e4 pass."""
    exact = ExactPosterior(f64([0.5, 0.3, 0.2], [0.3, 0.3, 0.4]), TRIANGLE, copies=15_000)
    setting = exact, ShiftedCosine(1, -10, 10), torch.zeros(4).long(), image_generators(0, range(4))
    with mock.patch.object(sample, "ancestral_step", wraps=sample.ancestral_step) as spy:
        tokens = sample.sample_tokens(*setting, 100, 1.0, "ancestral")
    longest = max(call.args[1].norm(dim=-1).max() for call in spy.call_args_list)
    assert longest <= TRIANGLE.norm(dim=-1).max() + 1e-12
    share = torch.bincount(tokens.flatten(), minlength=3) / 60_000  # standard errors are about 0.002
    assert (share - f64(0.6757, 0.2432, 0.0811)).abs().sum() / 2 < 0.01
    exact.log_p = f64([1e4, 0, -1e4], [-1e4, 0, 1e4])
    assert not sample.sample_tokens(*setting, 5, 1.0, "ancestral").any()


def test_guidance_zero_is_the_conditional_model():
    """Bitwise, without a second pass; otherwise logits are (1 + omega) cond - omega uncond."""
    model, log_snr, labels = small_model(num_classes=2), f64(-3, 0, 2), torch.tensor([0, 1, 1])
    z = torch.randn(3, 4, 4, generator=seeded(0)).double()
    conditional, unconditional = model(z, log_snr, labels), model(z, log_snr, torch.full_like(labels, 2))
    with mock.patch.object(model, "forward", wraps=model.forward) as spy:
        assert torch.equal(model.guided(z, log_snr, labels, 0.0), conditional)
    assert [len(call.args[0]) for call in spy.call_args_list] == [3]
    close(model.guided(z, log_snr, labels, 2.5), 3.5 * conditional - 2.5 * unconditional)


def test_batch_size_never_changes_an_image():
    """Image i depends on (seed, i) alone: another seed or index gives another image."""
    model, labels = small_model(num_classes=2, grid=(4, 4)), torch.tensor([0, 1, 0, 1, 1])
    schedule = ShiftedCosine(0.4, -10, 10)

    def images(*cuts, seed=7):
        return torch.cat([sample.sample_tokens(
            model, schedule, labels[a:b], image_generators(seed, range(a, b)), 6, 1.0, "ancestral")
            for a, b in itertools.pairwise(cuts)])

    together = images(0, 5)
    assert torch.equal(together, images(0, 1, 2, 3, 4, 5)) and torch.equal(together, images(0, 2, 5))
    assert (together != images(0, 5, seed=8)).any(1).all() and not torch.equal(together[0], together[2])
    seeds = {g.initial_seed() for seed in range(12) for g in image_generators(seed, range(12))}
    assert len(seeds) == 144  # neighbouring seeds share no image


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_vq_gradients(update):
    """Straight-through; commitment moves the encoder only, the codebook loss the codes only."""
    vq, z_e, z = quantizer(update)
    codes, trained = vq.codebook.detach().clone(), [z_e, *vq.parameters()]
    z_q, tokens, commitment, codebook = vq(z_e)
    assigned, from_decoder = F.one_hot(tokens.flatten(), 8).float(), torch.randn(z_q.shape)
    close(vectors(z_q), codes[tokens.flatten()])

    def gradients(loss):
        return torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)

    by_decoder, by_commitment = gradients((z_q * from_decoder).sum()), gradients(commitment)
    assert torch.equal(by_decoder[0], from_decoder)
    assert not any(gradient.any() for gradient in by_decoder[1:] + by_commitment[1:])
    pull = 2 * (z - codes[tokens.flatten()]) / z.numel()
    close(vectors(by_commitment[0]), pull)
    assert codebook.requires_grad == (update == "gradient") == (len(trained) == 2)
    if update == "gradient":
        to_encoder, to_codes = gradients(codebook)
        assert not to_encoder.any()
        close(to_codes, -assigned.T @ pull)


def test_nearest_and_ema():
    """Nearest is brute force; c = (d n c + (1-d) sum) / (d n + (1-d) count)."""
    vq, z_e, z = quantizer("ema")
    distances = torch.cdist(z.double(), vq.codebook.double())
    assert torch.equal(vqvae.nearest_codes(z, vq.codebook), distances.argmin(1))
    vq.running_count.copy_(torch.arange(1.0, 9))
    vq.running_sum.copy_(vq.codebook * vq.running_count[:, None])
    assigned = F.one_hot(vqvae.nearest_codes(z, vq.codebook), 8).float()                   # (M, K)
    count = 0.99 * vq.running_count + 0.01 * assigned.sum(0)
    expected = (0.99 * vq.running_sum + 0.01 * assigned.T @ z) / count[:, None]
    vq(z_e)
    close(vq.codebook, expected)
    vq.eval()(z_e + 1)
    close(vq.codebook, expected)

