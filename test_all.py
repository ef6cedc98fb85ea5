"""Tests with exact answers. First the maths: schedule, bound, coupling, sampler, tokenizer's quantiser. Most of it puts
an exact denoiser in the network's place: for tokens of known probabilities the true posterior is Bayes' rule, so every
expectation has one right value, found by quadrature or a chi-square test. Then the programs, run as their users do:
images in, images out, every flag, interrupted and continued, and what they say of bad input.
"""

import argparse
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import fid
import losses
import sample
import schedule
import train
import vqvae
from embedding_diffusion import EmbeddingDiffusion, normalise
from schedule import ShiftedCosine, add_noise, alpha_sigma, posterior
from vqvae import VQVAE, VectorQuantizer

sys.path.append(str(Path(__file__).resolve().parent / "experiments"))
import baselines  # noqa: E402
import compare  # noqa: E402
import fid_peers  # noqa: E402
import kills  # noqa: E402
import markov_chain  # noqa: E402
import published_tokenizers  # noqa: E402
import speed  # noqa: E402
import tokenizer_peer  # noqa: E402

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # pytest -n 2: two processes of one thread each
os.environ["OMP_NUM_THREADS"] = "1"  # programs that tests start round as those that call() runs
torch.set_num_threads(THREADS)
train.DRAWS = train.FINAL_DRAWS = 256  # one batch: tests of the programs need no precision
close = torch.testing.assert_close


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------
# The exact denoiser, and expectations under it by quadrature.

class ExactPosterior:
    """The best denoiser there is: p(x_i | z_t) by Bayes' rule, for n tokens of known joint probabilities.

    p: (C + 1, K, ..., K), a joint table of n tokens per class, the null class last. embedding: (K, D). An
    image is `copies` independent groups of n tokens, so that one image can hold thousands of samples.
    """
    guided = EmbeddingDiffusion.guided

    def __init__(self, p, embedding, copies=1):
        self.p, self.log_p, self.embedding, self.copies = p, p.log(), embedding, copies
        self.n, self.num_classes, (self.K, self.D) = p.dim() - 1, len(p) - 1, embedding.shape
        self.N = self.n * copies

    def table(self):
        return self.embedding

    def __call__(self, z, log_snr, labels, mask=None, table=None):
        table, groups = self.embedding if table is None else table, (len(z), self.copies)
        alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(log_snr))
        evidence = -((z[:, :, None] - alpha * table) / sigma).square().sum(-1) / 2  # (B, N, K)
        joint = self.log_p[labels][:, None]  # (B, 1, K, ..., K)
        for i, term in enumerate(evidence.view(*groups, self.n, self.K).unbind(2)):  # (B, copies, K)
            joint = joint + term.view(*groups, *[self.K if i == j else 1 for j in range(self.n)])
        marginals = [joint.movedim(2 + i, 2).flatten(3).logsumexp(-1) if self.n > 1 else joint
                     for i in range(self.n)]
        return torch.stack(marginals, 2).view(len(z), self.N, self.K)


BPSK = ExactPosterior(f64([0.5, 0.5]), f64([-1], [1]))
PAIR = ExactPosterior(f64([[0.45, 0.05], [0.1, 0.4]]), f64([-1], [1]))
TRIANGLE = f64([1, 0.4], [-1, 0.8], [0.2, -1.3])  # K = 3, D = 2
THREE = f64([[0.20, 0.05, 0.10], [0.02, 0.25, 0.03], [0.15, 0.05, 0.15]])  # one class, two tokens


def noise_grid(n, step):
    """Noise (Q, n, 1) and weights (Q,): trapezoid rule; half the step changes results by < 1e-12."""
    points = torch.arange(-8.5, 8.5 + step, step, dtype=torch.float64)
    weights = torch.cartesian_prod(*[(-points.square() / 2).softmax(0)] * n).view(-1, n).prod(1)
    return torch.cartesian_prod(*[points] * n).view(-1, n, 1), weights


def rec_and_diff(exact, log_snr, d_log_snr):
    """E of L_rec and of L_diff's integrand over x, z and positions, at one noise level (D = 1)."""
    eps, weights = noise_grid(exact.n, {1: 0.05, 2: 0.2}[exact.n])
    level, slope, total = log_snr.expand(len(eps)), d_log_snr.expand(len(eps)), 0
    for tokens in itertools.product(range(exact.K), repeat=exact.n):
        x = torch.tensor(tokens).expand(len(eps), -1)
        e = F.embedding(x, exact.embedding)
        logits = exact(add_noise(e, level, eps), level, 0 * x[:, 0])
        e_hat = logits.softmax(-1) @ exact.embedding
        terms = losses.reconstruction_loss(logits, x), losses.diffusion_loss(e, e_hat, level, slope)
        total = total + exact.p[0][tokens] * torch.stack([weights @ term.mean(1) for term in terms])
    return total


def integral(f, low, high, nodes):
    """Gauss-Legendre."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points = f64(*((high - low) / 2 * points + (high + low) / 2))
    return sum(w * float(f(p)) for p, w in zip(points, weights, strict=True)) * (high - low) / 2


def exact_rec_and_diff(exact, schedule, nodes):
    """L_rec and L_diff by quadrature."""
    def at(t):
        return rec_and_diff(exact, schedule.log_snr(t), schedule.d_log_snr(t))

    return float(at(f64(0)[0])[0]), integral(lambda t: at(t)[1], 0, 1, nodes)


def monte_carlo_bound(model, schedule, draw, chunks, generator):
    """losses.vlb summed: mean and four standard errors, over chunks (times within one are stratified)."""
    terms = [losses.vlb(model, schedule, x, 0 * x[:, 0], generator) for x in (draw() for _ in range(chunks))]
    sums = torch.stack([sum(values.mean() for values in term.values()) for term in terms])
    return float(sums.mean()), 4 * float(sums.std()) / math.sqrt(chunks)


def small_model(**settings):
    """A real denoiser in float64 whose weights are all random: no path through it is closed by a zero."""
    model = EmbeddingDiffusion(**{"K": 6, "grid": (2, 2), "D": 4, "width": 8, "heads": 2} | settings)
    generator = seeded(0)
    for parameter in model.double().parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model


# ----------------------------------------------------------------------------
# Schedule, bound and coupling.

@pytest.mark.parametrize("shift", [0.1, 0.4, 1.0, 2.0])
def test_schedule(shift):
    """lambda's derivative, SNR(s) / SNR(1) = s^2, ends +-10 + 2 log s, alpha^2 + sigma^2 = 1 (item 1)."""
    t, schedule = torch.linspace(0, 1, 1001).double().requires_grad_(), ShiftedCosine(shift)
    log_snr, unshifted = schedule.log_snr(t), ShiftedCosine().log_snr(t)
    close(schedule.d_log_snr(t), torch.autograd.grad(log_snr.sum(), t)[0], rtol=1e-12, atol=0)
    close((log_snr - unshifted).exp(), torch.full_like(t, shift ** 2), rtol=1e-12, atol=0)
    close(log_snr[[0, -1]], f64(10, -10) + 2 * math.log(shift), rtol=0, atol=1e-10)
    alpha, sigma = alpha_sigma(log_snr)
    close(alpha ** 2 + sigma ** 2, torch.ones_like(t), rtol=1e-14, atol=0)
    close(alpha ** 2 / sigma ** 2, log_snr.exp(), rtol=1e-12, atol=0)


def test_one_step_back():
    """Ancestral: q(z_s | z_t, e) ~ q(z_s | e) q(z_t | z_s), Gaussian. DDIM: e and eps are kept (item 10)."""
    z_t, e, eps = torch.randn(3, 5, 2, 4, dtype=torch.float64, generator=seeded(0))
    times = f64(-9, -3, 0, 2, 3), f64(-8.9, -1, 4, 2.5, 9)
    (a_t, s_t), (a_s, s_s) = ([v[:, None, None] for v in alpha_sigma(log_snr)] for log_snr in times)
    added = s_t ** 2 - (a_t / a_s * s_s) ** 2  # z_t = (a_t / a_s) z_s + noise of this variance
    precision = 1 / s_s ** 2 + (a_t / a_s) ** 2 / added
    mean = (a_s * e / s_s ** 2 + a_t / a_s * z_t / added) / precision
    close(sample.ancestral_step(z_t, e, *times, eps), mean + eps / precision.sqrt(), rtol=0, atol=1e-12)
    moved = sample.ddim_step(add_noise(e, times[0], eps), e, *times)
    close(moved, add_noise(e, times[1], eps), rtol=0, atol=1e-12)


def test_bpsk_entropy_and_mmse():
    """H(x | z), MMSE; L_diff between two levels, and L_CM (markov), are the entropy gained (items 2, 3)."""
    entropy = [float(rec_and_diff(BPSK, level, level)[0]) for level in f64(-1, 0, 1)]
    assert entropy == pytest.approx([0.537051, 0.356316, 0.126307], abs=1e-6)
    assert float(rec_and_diff(BPSK, *f64(0, -2))[1]) == pytest.approx(0.449600, abs=1e-6)  # weight 1
    between = integral(lambda level: rec_and_diff(BPSK, level, f64(-1)[0])[1], -1, 0, 12)
    noise, weights = noise_grid(2, step=0.2)  # one axis for z_t, the other for z_s given z_t
    t, s, labels = *(level.expand(len(noise)) for level in f64(-1, 0)), torch.zeros(len(noise)).long()
    e = torch.ones_like(noise[:, :1])  # by symmetry the other token gives the same
    z_t = add_noise(e, t, noise[:, :1])
    mean, std = posterior(z_t, e, t, s)
    teacher, log_p = BPSK(mean + std * noise[:, 1:], s, labels), BPSK(z_t, t, labels).log_softmax(-1)
    cm = float(weights @ losses.consistency_loss(teacher, log_p)[:, 0])
    assert [between, cm, entropy[0] - entropy[1]] == pytest.approx([0.1807343] * 3, abs=1e-7)


def test_only_markov_pairs_keep_the_posterior():
    """At z_t = 0.8 the teacher's mean is .756761 (the posterior) or, with shared noise, .888983 (item 4)."""
    t, s, z_t, label = f64(-1), f64(0), f64([[0.8]]), torch.tensor([0])
    p, (alpha, sigma) = BPSK(z_t, t, label).softmax(-1)[0, 0], alpha_sigma(t)
    eps, weights = noise_grid(1, step=0.05)
    markov = shared = 0
    for k, e in enumerate(f64(-1, 1).view(2, 1, 1, 1)):
        mean, std = posterior(z_t, e, t, s)
        teacher = BPSK(mean + std * eps, s.expand(len(eps)), label.expand(len(eps))).softmax(-1)
        markov += float(p[k] * (weights @ teacher[:, 0, 1]))
        z_s = losses.draw_earlier("shared", z_t, e, (z_t - alpha * e) / sigma, t, s, None)
        shared += float(p[k] * BPSK(z_s, s, label).softmax(-1)[0, 0, 1])
    assert [float(p[1]), markov, shared] == pytest.approx([0.756761, 0.756761, 0.888983], abs=1e-6)


@pytest.mark.parametrize("shift, end, expected", [(1.0, 10, 0.552945), (0.1, 5, 0.568804)])
def test_bound_is_tight(shift, end, expected):
    """The terms sum to H(x), plus the total correlation left at t = 0, seen at low SNR only (item 5)."""
    schedule = ShiftedCosine(shift, -end, end)
    prior = float(losses.prior_loss(PAIR.embedding[None], schedule.log_snr(f64(1)[0])).mean())
    assert prior + sum(exact_rec_and_diff(PAIR, schedule, 80)) == pytest.approx(expected, abs=1e-6)


def test_losses_alone(capsys):
    """python losses.py shows what other quadratures give (items 4, 9), and that a bounded weight rewards collapse."""
    distances = (0.1, 0.5, 2.0)
    rows = losses.two_tokens(distances, ShiftedCosine(), 5.0)
    for d, row in zip(distances, rows, strict=True):
        exact = exact_rec_and_diff(ExactPosterior(BPSK.p, BPSK.embedding * d / 2), ShiftedCosine(), 240)
        close(row[:2], f64(*exact), rtol=0, atol=2e-5)
    assert rows[0, 0] + rows[0, 2] < rows[1, 0] + rows[1, 2] < rows[2, 0] + rows[2, 2]
    assert losses.mean_target("markov") == pytest.approx((0.756761, 0.756761), abs=1e-6)
    assert losses.mean_target("shared") == pytest.approx((0.756761, 0.888983), abs=1e-6)
    assert parser_flags(losses) == ["max_snr", "shift"] and call(losses) == 0
    default = capsys.readouterr().out
    assert default.count("over-confident") == 1 and "shared: posterior 0.756761, mean target 0.888983" in default
    for words in (["--shift", 1], ["--max-snr", 2]):
        assert call(losses, *words) == 0 and capsys.readouterr().out != default
    assert call(losses, "--shift", 0) == 2 and "must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0])
def test_exact_bound_ignores_the_distance(distance):
    """L_rec + L_diff = ln 2 at any distance d, less I(x; z_1) = e^lambda(1) d^2 / 8 (item 9)."""
    exact = ExactPosterior(BPSK.p, BPSK.embedding * distance / 2)
    expected = math.log(2) - math.exp(-10) * distance ** 2 / 8  # next order e^(2 lambda(1)) d^4 < 1e-8
    assert sum(exact_rec_and_diff(exact, ShiftedCosine(), 240)) == pytest.approx(expected, abs=1e-8)


def test_monte_carlo_bound():
    """vlb() is H(x) with the exact posterior, a million samples (item 6); log K with an untrained network."""
    generator, exact = seeded(0), ExactPosterior(THREE, 0.3 * TRIANGLE)

    def pairs():
        cell = torch.multinomial(THREE.flatten(), 10_000, replacement=True, generator=generator)
        return torch.stack([cell // 3, cell % 3], 1)

    # What L_prior and t = 0 add, < 1e-4, is far below the margins.
    mean, margin = monte_carlo_bound(exact, ShiftedCosine(0.4), pairs, 100, generator)
    assert mean == pytest.approx(float(torch.special.entr(THREE).sum()) / 2, abs=margin) and margin < 0.03
    torch.manual_seed(0)
    model = EmbeddingDiffusion(24, (2, 2), D=16, width=16, depth=1).double()
    uniform = ExactPosterior(torch.full((1, 24), 1 / 24).double(), model.table(), copies=4)
    inputs = torch.randn(3, 4, 16, generator=generator).double(), f64(-4, 0, 3), torch.zeros(3).long()
    close(model(*inputs).softmax(-1), uniform(*inputs).softmax(-1), rtol=1e-10, atol=1e-14)
    mean, margin = monte_carlo_bound(
        model, ShiftedCosine(), lambda: torch.randint(24, (1000, 4), generator=generator), 60, generator)
    assert mean == pytest.approx(math.log(24), abs=margin) and margin < 0.06


def test_prior_loss():
    """L_prior is a KL of Gaussians; for a table of mean square 1 a constant without gradient (item 7)."""
    e, log_snr = torch.randn(3, 2, 8, dtype=torch.float64, generator=seeded(0)), f64(-2)[0]
    alpha, sigma = alpha_sigma(log_snr)
    q, standard = torch.distributions.Normal(alpha * e, sigma), torch.distributions.Normal(0 * e, 1 + 0 * e)
    close(losses.prior_loss(e, log_snr), torch.distributions.kl_divergence(q, standard).sum(-1))
    raw = normalise(e, "rms").requires_grad_()  # mean square 1: eps = 1e-8 gives 5e-13 |e|
    loss = losses.prior_loss(normalise(raw, "rms"), f64(-10)[0])
    close(loss, torch.full_like(loss, 1.815956e-4), rtol=0, atol=1e-9)
    assert torch.autograd.grad(loss.sum(), raw)[0].norm(dim=-1).max() < 5e-12


# ----------------------------------------------------------------------------
# Training.

def cm_z_scores(coupling):
    """Of dL_CM at the exact posterior: by {1, z, sin 2z} added to the log-odds, and by growing the table."""
    tilt, table = f64(0, 0, 0).requires_grad_(), BPSK.embedding.clone().requires_grad_()

    def student(z, log_snr, labels, mask=None, table=None):
        change = torch.cat([torch.ones_like(z), z, (2 * z).sin()], -1) @ tilt  # (B, N)
        return BPSK(z, log_snr, labels, table=table) + torch.stack([0 * change, change], -1)

    student.table, student.num_classes = lambda: table, 0
    generator, gradients = seeded(0), []
    for _ in range(100):
        x = torch.randint(2, (2000, 1), generator=generator)
        loss, _ = losses.training_loss(student, BPSK, ShiftedCosine(), x, 0 * x[:, 0], generator,
                                       w_rec=0, w_diff=0, coupling=coupling)
        by_tilt, by_table = torch.autograd.grad(loss, (tilt, table))
        gradients.append(torch.cat([by_tilt, (by_table * table.detach()).sum()[None]]))
    gradients = torch.stack(gradients)
    return 10 * gradients.mean(0) / gradients.std(0)


def test_cm_has_the_posterior_as_its_fixed_point():
    """Markov: no mean gradient in the logits, but the table is pushed apart. Shared: a plain one (item 8)."""
    markov, shared = cm_z_scores("markov"), cm_z_scores("shared")
    assert markov[:3].abs().max() < 5 and shared[:3].abs().max() > 20 and markov[3] < -20


def test_gradients_of_the_objective():
    """The table's is that of finite differences: by z_t, e and e_hat. The teacher has none (item 8)."""
    model, schedule, labels = small_model(num_classes=2), ShiftedCosine(0.4, -5, 5), torch.arange(12) % 2
    x, start = torch.randint(6, (12, 4), generator=seeded(1)), model.embedding.detach().clone()
    direction = torch.randn(start.shape, dtype=torch.float64, generator=seeded(3))

    def objective(step, teacher, **weights):
        model.embedding.data.copy_(start + step * direction)
        return losses.training_loss(model, teacher, schedule, x, labels, seeded(2), p_drop=0.5, **weights)[0]

    def constant(*_, **__):  # as the teacher should look to autograd
        return torch.arange(6.0).expand(9, 4, 6)

    for weights in {"w_rec": 0, "w_cm": 0}, {"w_diff": 0, "w_cm": 0}, {"w_rec": 0, "w_diff": 0}:
        gradient, = torch.autograd.grad(objective(0, constant, **weights), model.embedding)
        # Central differences: relative errors about h^2 = 1e-10 and 1e-16 / h = 1e-11, times curvature.
        slope = (objective(1e-5, constant, **weights) - objective(-1e-5, constant, **weights)) / 2e-5
        close((gradient * direction).sum(), slope.detach(), rtol=1e-6, atol=0)
    teacher = copy.deepcopy(model)
    objective(0, teacher).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_times_cover_evenly():
    """The times of L_diff's rows are 1 / B' apart: the rows at t = 0 do not delete an interval of them."""
    linear = SimpleNamespace(log_snr=lambda t: -8 * t, d_log_snr=lambda t: torch.full_like(t, -8))
    x = torch.zeros(16, 4, dtype=torch.int64)
    with mock.patch.object(losses, "add_noise", wraps=add_noise) as spy:
        losses.training_loss(small_model(), None, linear, x, x[:, 0], seeded(0), w_cm=0, rec_fraction=0.25)
    t = spy.call_args.args[1] / -8
    assert not t[:4].any() and 0 < t[4:].min() and t.max() < 1
    close(t[4:].sort().values.diff(), torch.full((11,), 1 / 12), rtol=0, atol=1e-6)  # float32


def test_dropping():
    """A masked token's value changes no logit at all, and L_diff leaves it out; L_rec does not (item 12)."""
    model, log_snr, labels = small_model(), f64(-1, 2), torch.tensor([0, 0])
    z = torch.randn(2, 4, 4, generator=seeded(0)).double()
    mask = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]]).bool()
    other = torch.where(mask[..., None], z + 3, z)
    assert torch.equal(model(z, log_snr, labels, mask=mask), model(other, log_snr, labels, mask=mask))
    assert not torch.equal(model(z, log_snr, labels), model(other, log_snr, labels))
    x, seen = torch.randint(2, (64, 4), generator=seeded(1)), []
    flat = SimpleNamespace(log_snr=lambda t: 0 * t, d_log_snr=lambda t: 0 * t - 2)  # weight 1 at every t

    def terms_if_wrong(kept):
        """Of a denoiser that is certain, and wrong at kept or at dropped positions; |1 - (-1)|^2 = 4."""
        def certain(z, log_snr, labels, mask=None, table=None):
            seen.append((mask, labels))
            truth = x[-len(z):]
            return 1e3 * F.one_hot(torch.where(mask ^ kept, 1 - truth, truth), 2).double()

        certain.table, certain.num_classes = BPSK.table, 3
        return losses.training_loss(certain, certain, flat, x, 0 * x[:, 0], seeded(2), p_drop=0.9)[1]

    wrong = terms_if_wrong(kept=False)
    assert wrong["diff"] == 0 and wrong["rec"] == pytest.approx(1e3 * float(seen[0][0][:16].double().mean()))
    assert terms_if_wrong(kept=True)["diff"] == 4
    (mask, labels), (teacher_mask, teacher_labels) = seen[:2]  # the teacher sees what the student sees
    assert torch.equal(mask[16:], teacher_mask) and torch.equal(labels[16:], teacher_labels)
    assert set(labels.tolist()) == {0, 3}  # some labels are dropped too: 3 is the null class


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
    table = torch.randn(50, 4, dtype=torch.float64, generator=seeded(0))
    for norm, rank in ("rms", 4), ("layer", 3):
        unit = normalise(table, norm)
        close(unit.square().mean(1), torch.ones(50).double(), rtol=1e-6, atol=0)  # eps = 1e-8
        assert torch.linalg.matrix_rank(unit) == rank
        with pytest.raises(ValueError, match="too small"):
            EmbeddingDiffusion(6, (2, 2), D=rank - 1 if norm == "layer" else 1, norm=norm)


def test_start_from_the_codebook():
    """Centred principal components with the square root of their spread: distances are those of C C^T's fourth root."""
    codes = torch.randn(9, 3, dtype=torch.float64, generator=seeded(0)) * f64(9, 4, 1) + 5
    model = EmbeddingDiffusion(9, (2, 2), D=5, width=8, heads=2).double()
    model.start_from(codes)
    start, centred = model.embedding.detach(), codes - codes.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # (U S^2 U^T); the start's is U S U^T, scaled
    expected = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    close(start @ start.T / (start @ start.T).trace(), expected / expected.trace(), rtol=0, atol=1e-7)
    close(start[:, :3].std(), f64(1)[0])
    assert not start[:, 3:].any()


# ----------------------------------------------------------------------------
# The sampler.

@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_samples_follow_the_distribution(sampler):
    """40,000 pairs of tokens, 300 steps, exact posterior: chi-square against the probabilities (item 10)."""
    exact, labels = ExactPosterior(THREE, TRIANGLE, copies=10_000), torch.zeros(4, dtype=torch.int64)

    def draw(steps):
        generators = sample.image_generators(0, range(4))
        return sample.sample_tokens(exact, ShiftedCosine(0.4), labels, generators, steps, sampler=sampler)

    def p_value(tokens, p):
        counts = torch.bincount(tokens, minlength=len(p))
        return scipy.stats.chisquare(counts.numpy(), len(tokens) * p.numpy()).pvalue

    first, second = draw(300).view(-1, 2).T
    assert p_value(first * 3 + second, THREE.flatten()) > 1e-3
    assert p_value(draw(1)[:, ::2].flatten(), THREE[0].sum(1)) > 1e-3  # one step: a draw from p(x_i | noise)


def test_guidance_samples():
    """omega = 1 samples p_c^2 / p_u, normalised; e_hat stays in the hull; logits of 1e4 pass (item 11)."""
    exact = ExactPosterior(f64([0.5, 0.3, 0.2], [0.3, 0.3, 0.4]), TRIANGLE, copies=25_000)
    labels, generators = torch.zeros(4, dtype=torch.int64), sample.image_generators(0, range(4))
    with mock.patch.object(sample, "ancestral_step", wraps=sample.ancestral_step) as spy:
        tokens = sample.sample_tokens(exact, ShiftedCosine(), labels, generators, 100, guidance=1.0)
    first, last = float(spy.call_args_list[0].args[2][0]), float(spy.call_args_list[-1].args[3][0])
    assert [spy.call_count, first, last] == pytest.approx([99, -10, 10])  # from lambda(1) to lambda(0)
    longest = max(call.args[1].norm(dim=-1).max() for call in spy.call_args_list)
    assert longest <= TRIANGLE.norm(dim=-1).max() + 1e-12
    share = torch.bincount(tokens.flatten(), minlength=3) / 100_000  # standard errors are about 0.0015
    assert (share - f64(0.6757, 0.2432, 0.0811)).abs().sum() / 2 < 0.01
    exact.log_p = f64([1e4, 0, -1e4], [-1e4, 0, 1e4])
    assert not sample.sample_tokens(exact, ShiftedCosine(), labels, generators, 5, guidance=1.0).any()


def test_guidance_zero_is_the_conditional_model():
    """Bitwise, without a second pass; otherwise logits are (1 + omega) cond - omega uncond (item 11)."""
    model, log_snr, labels = small_model(num_classes=2), f64(-3, 0, 2), torch.tensor([0, 1, 1])
    z = torch.randn(3, 4, 4, generator=seeded(0)).double()
    conditional, unconditional = model(z, log_snr, labels), model(z, log_snr, torch.full_like(labels, 2))
    with mock.patch.object(model, "forward", wraps=model.forward) as spy:
        assert torch.equal(model.guided(z, log_snr, labels, 0.0), conditional)
    assert [len(call.args[0]) for call in spy.call_args_list] == [3]
    close(model.guided(z, log_snr, labels, 2.5), 3.5 * conditional - 2.5 * unconditional)


def test_batch_size_never_changes_an_image():
    """Image i depends on (seed, i) alone: another seed or index gives another image (item 14)."""
    model, labels = small_model(num_classes=2, grid=(4, 4)), torch.tensor([0, 1, 0, 1, 1])

    def images(*cuts, seed=7):
        def batch(a, b):
            generators = sample.image_generators(seed, range(a, b))
            return sample.sample_tokens(model, ShiftedCosine(0.4), labels[a:b], generators, 6, guidance=1.0)

        return torch.cat([batch(a, b) for a, b in itertools.pairwise(cuts)])

    together = images(0, 5)
    assert torch.equal(together, images(0, 1, 2, 3, 4, 5)) and torch.equal(together, images(0, 2, 5))
    assert (together != images(0, 5, seed=8)).any(1).all() and not torch.equal(together[0], together[2])


@pytest.fixture
def one_thread():
    """For tiny networks, whose threads would wait for each other; call() keeps to it."""
    torch.set_num_threads(1)
    with mock.patch.object(sys.modules[__name__], "THREADS", 1):
        yield
    torch.set_num_threads(THREADS)


def drawn(model, *args, B=3, schedule=None, **options):
    """Tokens, and what was seen on the way: the arguments of each call of the network, (t, p) after each step."""
    seen = []
    with mock.patch.object(model, "forward", wraps=model.forward) as spy:
        tokens = sample.sample_tokens(model, schedule or ShiftedCosine(0.4), torch.arange(B) % 2,
                                      sample.image_generators(7, range(B)), *args,
                                      watch=lambda t, p: seen.append((t, p)), **options)
    return tokens, [call.args for call in spy.call_args_list], seen


def first_noise(model, B=3, seed=7):
    return torch.stack([torch.randn(model.N, model.D, generator=generator, dtype=torch.float64)
                        for generator in sample.image_generators(seed, range(B))])


def test_sampling_options(one_thread):
    """temperature, interval and end: nothing at their defaults, else exactly what they say."""
    model = small_model(num_classes=2, grid=(4, 4))
    plain, calls, _ = drawn(model, 5, 2.0)
    assert torch.equal(plain, drawn(model, 5, 2.0, temperature=1.0, interval=(0.0, 1.0), end=0.8 / 25)[0])
    assert [len(z) for z, *_ in calls] == [6] * 5
    # few steps end before 0, in proportion to where they start; one step has nowhere to go, and many end at 0
    assert [drawn(model, steps)[2][-1][0] for steps in (1, 2, 4, 16)] == pytest.approx([1, 0.2, 0.05, 0], abs=1e-15)
    start = torch.zeros(1, 16, dtype=torch.int64), 0.5
    assert drawn(model, 2, start=start)[2][-1][0] == pytest.approx(0.1, abs=1e-15)
    # omega counts at t = 1, 3/4, 1/2, 1/4, 0 in the interval only; elsewhere there is one pass, not two
    tokens, calls, _ = drawn(model, 5, 2.0, interval=(0.3, 0.45), end=0.0)
    assert torch.equal(tokens, drawn(model, 5, 0.0, end=0.0)[0]) and [len(z) for z, *_ in calls] == [3] * 5
    assert [len(z) for z, *_ in drawn(model, 5, 2.0, interval=(0.25, 0.75), end=0.0)[1]] == [3, 6, 6, 6, 3]
    # one step is softmax(logits / T); T -> 0 is the argmax, at every step
    log_snr = ShiftedCosine(0.4).log_snr(f64(1, 1, 1))
    logits = model(first_noise(model), log_snr, torch.arange(3) % 2)
    close(drawn(model, 1, temperature=2.0)[2][0][1], (logits / 2).softmax(-1), rtol=0, atol=1e-15)
    tokens, _, seen = drawn(model, 4, temperature=1e-9)
    assert torch.equal(drawn(model, 1, temperature=1e-9)[0], logits.argmax(-1))
    assert torch.equal(tokens, seen[-1][1].argmax(-1)) and all(set(p.unique().tolist()) == {0, 1} for _, p in seen)
    # the grid is uniform from 1 to end
    _, calls, seen = drawn(model, 3, end=0.5)
    assert [t for t, _ in seen] == [1, 0.75, 0.5]
    assert [float(log_snr[0]) for _, log_snr, _ in calls] == ShiftedCosine(0.4).log_snr(f64(1, 0.75, 0.5)).tolist()


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_known_tokens_come_out(one_thread, sampler):
    """Exactly, and e_hat is their embedding at every step; the others vary, and differ from image to image."""
    model = small_model(num_classes=2, grid=(4, 4))
    known = torch.where(torch.arange(16) % 3 == 0, torch.arange(16) % 6, -1)[None]  # one row for all images
    kept, step = known[0] >= 0, f"{sampler}_step"
    with mock.patch.object(sample, step, wraps=getattr(sample, step)) as spy:
        tokens, _, _ = drawn(model, 6, 1.0, sampler, known=known)
    assert (tokens[:, kept] == known[:, kept]).all()
    assert all((tokens[i, ~kept] != tokens[j, ~kept]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    for call in spy.call_args_list:
        assert (call.args[1][:, kept] == model.table()[known[0, kept]]).all()
    nothing = torch.full((3, 16), -1)
    assert torch.equal(drawn(model, 6, 1.0, sampler, known=nothing)[0], drawn(model, 6, 1.0, sampler)[0])


def test_start_and_noise(one_thread):
    """A start is noised as in training, and little noise changes no token; other noise is the first noise alone."""
    model, tokens, schedule = small_model(grid=(4, 4), num_classes=2), torch.arange(16) % 6, ShiftedCosine(1, -10, 20)
    assert torch.equal(drawn(model, 4, schedule=schedule, start=(tokens[None], 1e-4))[0], tokens.expand(3, 16))
    found, calls, seen = drawn(model, 3, schedule=schedule, start=(tokens[None], 0.8), end=0.2)
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
    path = sample.slerp(here[0], there[0], 5)
    assert torch.equal(path[0], here[0]) and torch.equal(path[4], there[0]) and len(sample.slerp(*here[:2], 1)) == 1
    path = sample.slerp(f64([3, 0]), f64([0, 3]), 4)  # in steps of 30 degrees
    close(path, 3 * f64([[1, 0]], [[0.75 ** 0.5, 0.5]], [[0.5, 0.75 ** 0.5]], [[0, 1]]), rtol=0, atol=1e-12)



# ----------------------------------------------------------------------------
# The tokenizer.

def quantizer(update):
    """Eight random codes that stay as they are, and encoder outputs (4, 3, 5, 6)."""
    torch.manual_seed(0)
    vq, z_e = VectorQuantizer(8, 3, update), torch.randn(4, 3, 5, 6).requires_grad_()
    vq.initialised.fill_(True)
    return vq, z_e, vectors(z_e)


def vectors(z):
    """(B, C, h, w) -> (M, C), row by row as the tokens go."""
    return z.detach().permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_vq_gradients(update):
    """Straight-through; commitment moves the encoder only, the codebook loss the codes only (item 13)."""
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
    """Nearest is brute force; c = (d n c + (1-d) sum) / (d n + (1-d) count), in the limit the mean."""
    vq, z_e, z = quantizer("ema")
    distances = torch.cdist(z.double(), vq.codebook.double())
    assert torch.equal(vqvae.nearest_codes(z, vq.codes), distances.argmin(1))
    vq.running_count.copy_(torch.arange(1.0, 9))
    vq.running_sum.copy_(vq.codebook * vq.running_count[:, None])
    assigned = F.one_hot(vqvae.nearest_codes(z, vq.codes), 8).float()  # (M, K)
    count = 0.99 * vq.running_count + 0.01 * assigned.sum(0)
    expected = (0.99 * vq.running_sum + 0.01 * assigned.T @ z) / count[:, None]
    vq(z_e)
    close(vq.codebook, expected)
    vq.decay = 0.5
    for _ in range(100):  # 2^-100 of the start is left
        vq(z_e)
    assigned = F.one_hot(vqvae.nearest_codes(z, vq.codes), 8).float()
    close(vq.codebook, assigned.T @ z / assigned.sum(0)[:, None])
    before = vq.codebook.clone()
    vq.eval()(z_e + 1)
    assert torch.equal(vq.codebook, before)


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


def test_lpips():
    """The distance is its formula, worked out in float64 from the weights by name; 0 for equal images; its gradient is
    finite even where every feature is 0."""
    torch.manual_seed(0)
    lpips, (x, y) = vqvae.LPIPS(), (torch.rand(2, 2, 3, 24, 20) * 2 - 1).unbind()
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


@pytest.fixture
def small_lpips(monkeypatch, tmp_path):
    """LPIPS of three narrow stages; the file of its weights, as a VQGAN's checkpoint has them."""
    monkeypatch.setattr(vqvae.LPIPS, "STAGES", ((2, 2), (3, 3), (4, 4, 4)))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "no cache"))
    torch.manual_seed(0)
    state = {}
    for name, value in vqvae.LPIPS().state_dict().items():
        kind, number, *rest = name.split(".")
        name = f"slice1.{number}.{rest[0]}" if kind == "features" else f"lin{number}.model.1.weight"
        state[f"loss.perceptual_loss.{'net.' if rest else ''}{name}"] = value if rest else value.view(1, -1, 1, 1)
    torch.save({"state_dict": state | {"encoder.conv_in.weight": torch.zeros(1)}}, tmp_path / "lpips.ckpt")
    return tmp_path / "lpips.ckpt"


def test_lpips_weights(small_lpips, tmp_path, monkeypatch):
    """Read from a VQGAN's checkpoint or from the two published files, in torch's old format too; a wrong one is
    refused with what to do."""
    torch.manual_seed(0)
    weights = vqvae.LPIPS().state_dict()
    network = {name: value for name, value in weights.items() if name.startswith("features")}
    network["classifier.0.weight"] = torch.zeros(1)
    linear = {f"lin{i}.model.1.weight": weights[f"lin.{i}"].view(1, -1, 1, 1) for i in range(3)}
    cache = tmp_path / "no cache" / "checkpoints"
    cache.mkdir(parents=True)
    files = [cache / name for name in vqvae.LPIPS_FILES]
    torch.save(network, files[0], _use_new_zipfile_serialization=False)
    torch.save(linear, files[1])
    with pytest.raises(vqvae.TokenizerError, match="is cut short or altered: delete it, and fetch https"):
        vqvae.find_lpips()
    digests = {file.name: ("", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}
    monkeypatch.setattr(vqvae, "LPIPS_FILES", digests)
    for read in vqvae.read_lpips(vqvae.find_lpips()), vqvae.read_lpips(vqvae.find_lpips([small_lpips])):
        assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in read)
    with pytest.raises(vqvae.TokenizerError, match="3 of LPIPS' 17 weights are not there, lin.0 for one"):
        vqvae.read_lpips(files[:1])
    with pytest.raises(vqvae.TokenizerError, match="no such file"):
        vqvae.find_lpips(["nowhere"])


def test_discriminator():
    """Hinge loss and adaptive weight by their formulas; no image's logits depend on another's."""
    assert vqvae.hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])) == 0.5 * (0.25 + 0.75)
    torch.manual_seed(0)
    last, h = torch.randn(4, 3, requires_grad=True), torch.randn(5, 4)
    target, judge = torch.randn(5, 3), torch.randn(3)
    x_hat = h @ last
    weight = vqvae.adaptive_weight((x_hat - target).square().mean(), -(x_hat @ judge).mean(), last)
    by_hand = (h.T @ (x_hat - target) * 2 / 15).norm() / torch.outer(h.mean(0), -judge).norm()
    close(weight, by_hand.detach(), rtol=1e-5, atol=0)
    assert vqvae.adaptive_weight(x_hat.square().mean(), 0 * x_hat.sum(), last) == 100 and not weight.requires_grad
    for size in (8, 20, 32, 64):
        model, x = vqvae.PatchDiscriminator(size, width=16), torch.rand(3, 3, size, size)
        logits = model(x)
        assert logits.shape[:2] == (3, 1) and logits[0].numel() > 1
        close(model(x[1:2]), logits[1:2])
    with pytest.raises(ValueError, match="at least 8 pixels, not 6"):
        vqvae.PatchDiscriminator(6)


def test_usage_and_perplexity():
    """K when all K codes are used equally, 1 for a single one, e^H in between."""
    for counts, expected in ((7, 7, 7), (1, 3)), ((0, 9, 0, 0), (0.25, 1)), ((2, 1, 1, 0), (0.75, 2 ** 1.5)):
        assert vqvae.usage_and_perplexity(torch.tensor(counts)) == pytest.approx(expected)


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, vqvae
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
torch.manual_seed(0)
for update in ("ema", "gradient"):
    vq, z_e = vqvae.VectorQuantizer(16, 3, update), torch.randn(20, 8, 3, 4, 4)
    dead = []
    for step in range(20):
        z = z_e[step] + (step > 9)  # the data moves, and codes die
        z = z[rank * 8 // world:(rank + 1) * 8 // world]
        vq(z, torch.Generator().manual_seed(0))
        vq.running_count[step % 16] *= 0
        dead.append(int(vq.restart_dead_codes(z, torch.Generator().manual_seed(step))))
    torch.save(vq.state_dict() | {"dead": dead}, f"{folder}/{update}{rank}of{world}.pt")
if world > 1:  # without it gloo's threads may still run when Python ends, and abort it
    dist.destroy_process_group()
"""


def test_one_codebook_in_two_processes(tmp_path):
    """Start, running means and restarts see the whole batch: two processes (gloo) hold bit for bit the same codebook,
    and one process with the whole batch the same up to the order of its sums."""
    started = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), str(world), str(tmp_path)], cwd=HERE)
               for rank, world in ((0, 2), (1, 2), (0, 1))]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    for update in ("ema", "gradient"):
        one, first, second = (torch.load(tmp_path / f"{update}{name}.pt", weights_only=True)
                              for name in ("0of1", "0of2", "1of2"))
        assert sum(one["dead"]) >= 20 and one["dead"] == first["dead"] == second["dead"]
        for name in set(one) - {"dead"}:
            assert torch.equal(first[name], second[name])
            close(first[name], one[name])


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
            VQVAE(size, f=bad)


def test_published_layouts():
    """The weights of the original models, name by name, and what is read off them; experiments/published_tokenizers.py
    has run the original code beside ours."""
    digests = {}
    for name, arguments in published_tokenizers.LAYOUTS.items():
        shapes = published_tokenizers.layout(*arguments)
        digests[name] = published_tokenizers.digest(shapes)
        with torch.device("meta"):
            model = vqvae.PublishedVQGAN(shapes, 256)
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
        f = 2 ** (len(arguments[1]) - 1)
        assert (model.K, model.f, model.grid) == (arguments[-1], f, (256 // f, 256 // f))
    assert digests == {"taming f16, K = 1024": "4a7b1dafb1593e7d", "latent-diffusion vq-f4": "b22ff62b5d160fdf",
                       "latent-diffusion vq-f8": "04568b6c2a1f761a"}  # of the original models' own state dicts
    with pytest.raises(vqvae.TokenizerError, match="reduces by 8, and 20 pixels are no multiple of it"):
        vqvae.PublishedVQGAN(shapes, 20)


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
            read = vqvae.read_published(tmp_path / name)
            assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in weights)
    model = vqvae.PublishedVQGAN({key: value.shape for key, value in read.items()}, 16)
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
    assert torch.equal(model.decode(tokens), vqvae.to_uint8(decoded))


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_hostile_checkpoints(tmp_path):
    """A pickle that would run something is refused, and runs nothing."""
    for i, hostile in enumerate([Hostile(os.system, f"touch {tmp_path / 'ran'}"), Hostile(eval, "1 + 1"),
                                 Hostile(getattr, "a", "upper"), Hostile(subprocess.Popen, ["true"])]):
        for zipped in (True, False):
            path = tmp_path / f"{i}.ckpt"
            torch.save({"state_dict": {}, "callbacks": hostile}, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(sample.CheckpointError, match=r"is refused: it names \w+\.\w+, which has no place"):
                vqvae.read_published(path)
            with pytest.raises(sample.CheckpointError, match="cannot be read as a checkpoint"):
                sample.read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(2)}}, tmp_path / "part.ckpt")
    torch.save({"state_dict": {"quantize.embed.weight": torch.zeros(2)}}, tmp_path / "gumbel.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    for name, says in (("part", "it has no decoder"), ("gumbel", "Gumbel quantiser"), ("text", "cannot be read")):
        with pytest.raises(ValueError, match=says):
            vqvae.read_published(tmp_path / f"{name}.ckpt")


# ----------------------------------------------------------------------------
# Data.

def test_toy():
    """The same images for the same seed, twelve classes in six colours, train and test apart, made in seconds."""
    images, labels = data.draw_toy(240, seed=0)
    again, _ = data.draw_toy(120, seed=0)
    other, _ = data.draw_toy(240, seed=1)
    assert images.shape == (240, 3, 20, 20) and torch.equal(images[:120], again)
    assert not any((other == image).flatten(1).all(1).any() for image in images)
    assert labels.tolist() == [i % 12 for i in range(240)] and len(data.Toy.class_names) == 12
    assert len({image.numpy().tobytes() for image in images}) == 240
    assert data.Toy().counts() == (18000, 1800)


def test_load_image(tmp_path):
    """Centre square, antialiased; transparent over white; grey, 16 bits, rotated by EXIF: all become RGB."""
    def pixels(image, size, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return data.load_image(tmp_path / name, size).astype(int)

    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, :4], wide[:, 4:8], wide[:, 8:] = 10, 200, 90
    assert (pixels(Image.fromarray(wide), 4) == 200).all()  # the middle third, nothing of its neighbours
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255  # nearest or plain bilinear sampling would give 0 or 255
    assert np.abs(pixels(Image.fromarray(stripes), 8) - 127.5).max() < 14
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (pixels(clear, 4) == 255).all()
    assert (pixels(Image.fromarray(np.full((8, 8), 25700, np.uint16)), 4) == 100).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    upright = pixels(Image.fromarray(half), 8, "a.jpg", exif=exif, quality=100)
    assert upright[:, :3].max() < 10 and upright[:, 5:].min() > 245


def make_folder(root, classes=("cat", "dog"), each=20, side=10):
    """A folder of coloured noise: a sub-folder per class, endings in any case, a stray text file."""
    rng = np.random.default_rng(0)
    for name in classes or [""]:
        (root / name / "deep").mkdir(parents=True)
        for i in range(each):
            image = Image.fromarray(rng.integers(0, 256, (side, side + i % 3, 3)).astype(np.uint8))
            image.save(root / name / ("deep" if i % 2 else "") / f"{i:02d}.{('png', 'PNG', 'jpg', 'Bmp')[i % 4]}")
    (root / "notes.txt").write_text("no image")
    return root


def test_folder(tmp_path, monkeypatch):
    """Classes are the immediate sub-folders; every image is in one split; decoding ahead or on demand is the same."""
    source = data.find(str(make_folder(tmp_path / "a")))
    train_set, test_set = source.load(8)
    assert source.class_names == ["cat", "dog"] and source.counts() == (38, 2) == (len(train_set), len(test_set))
    assert sorted([*source.train, *source.test]) == list(range(40)) and len(set(source.names)) == 40
    assert torch.bincount(train_set.labels).tolist() == [19, 19] and test_set.labels.tolist() == [0, 1]
    assert "38 images + 2 held out, 2 classes: cat (20), dog (20), shorter side 10 px" in source.describe()
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    on_demand, _ = source.load(8)
    assert on_demand.pixels is None and torch.equal(on_demand.batch([5, 0, 37]), train_set.pixels[[5, 0, 37]])
    flat = data.find(str(make_folder(tmp_path / "b", classes=())))
    assert flat.class_names == [] and flat.counts() == (19, 1)
    make_folder(tmp_path / "c" / "train")
    make_folder(tmp_path / "c" / "val", each=4)
    split = data.find(str(tmp_path / "c"))
    assert split.counts() == (40, 8) and split.class_names == ["cat", "dog"]


def noise(n, height=10, width=10, seed=0):
    """uint8 images (n, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def write_images(root, names, images):
    for name, image in zip(names, images, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(image))
    return root


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_lmdb(path, images):
    lmdb = pytest.importorskip("lmdb")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for i, image in enumerate(images):
            transaction.put(f"{i:040x}".encode(), png(image))
    (path / "lock.mdb").unlink()
    return path


def write_idx(folder, train, test, gzipped):
    """Grey images (n, H, W) as MNIST's four files; image i has the label i mod 10."""
    folder.mkdir(parents=True)
    for stem, images in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(len(images), dtype=np.uint8) % 10)):
            content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            file = folder / f"{stem}-{kind}-ubyte"
            file.with_suffix(".gz" * gzipped).write_bytes(gzip.compress(content) if gzipped else content)
    return folder


def write_cifar(folder, images, ending=""):
    """(6 n, 32, 32, 3) images as CIFAR-10's batches, python or binary (.bin); image i has the label i mod 10."""
    folder.mkdir(parents=True)
    labels = np.arange(len(images)) % 10
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, x, y in zip(names, np.split(rows, 6), np.split(labels, 6), strict=True):
        packed = np.concatenate([y[:, None].astype(np.uint8), x], 1).tobytes()
        (folder / (name + ending)).write_bytes(packed if ending else pickle.dumps({b"data": x, b"labels": y.tolist()},
                                                                                 protocol=2))
    return folder


def pixels_of(source, size):
    """All of a source's pixels and labels in the order of its images."""
    order = np.argsort(np.concatenate([source.train, source.test]))
    sets = source.load(size)
    return torch.cat([s.pixels for s in sets])[order], torch.cat([s.labels for s in sets])[order]


def test_forms(tmp_path):
    """Folder, zip, LMDB, arrays, idx, CIFAR-10's batches: the same images are the same pixels, labels and splits."""
    images = noise(44, 32, 32)
    names = [f"{'ab'[i // 22]}/{i:02d}.png" for i in range(44)]
    folder = data.find(str(write_images(tmp_path / "folder", names, images)))
    pixels, labels = pixels_of(folder, 32)
    assert torch.equal(pixels, torch.from_numpy(images).permute(0, 3, 1, 2)) and labels.tolist() == [0] * 22 + [1] * 22
    pixels, _ = pixels_of(folder, 8)
    assert torch.equal(pixels[7], torch.from_numpy(data.load_image(images[7], 8)))
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "b.npy", images.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "c.npz", images=images, labels=labels)
    for path, classes in [(write_zip(tmp_path / "a.zip", files), ["a", "b"]), (tmp_path / "c.npz", ["0", "1"]),
                          (write_zip(tmp_path / "around.zip", {f"all/{k}": v for k, v in files.items()}), ["a", "b"]),
                          (write_lmdb(tmp_path / "x_lmdb", images), []),
                          (tmp_path / "a.npy", []), (tmp_path / "b.npy", [])]:
        source = data.find(str(path))
        assert source.class_names == classes and source.counts() == folder.counts(), path
        found, numbers = pixels_of(source, 8)
        assert torch.equal(found, pixels) and torch.equal(numbers, labels * bool(classes)), path
        assert source.sizes() == (32, 32, 32) and "first: " in source.describe()
    assert [path.name for path in (tmp_path / "x_lmdb").iterdir()] == ["data.mdb"]  # read-only, without a lock
    for i, (kind, ending) in enumerate([("py", ""), ("bin", ".bin")]):
        cifar = write_cifar(tmp_path / str(i) / f"cifar-10-batches-{kind}", images[:42], ending)
        archive = tmp_path / str(i + 2) / f"cifar-10-{('python', 'binary')[i]}.tar.gz"
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(cifar, cifar.name)
        for path in (cifar, cifar.parent, archive, archive.parent):
            source = data.find(str(path))
            assert source.counts() == (35, 7) and source.class_names[3] == "cat"
            found, numbers = pixels_of(source, 32)
            assert torch.equal(found, torch.from_numpy(images[:42]).permute(0, 3, 1, 2)), path
            assert numbers.tolist() == [i % 10 for i in range(42)]
    grey = images[:, :28, :28, 0]
    for gzipped in (False, True):
        source = data.find(str(write_idx(tmp_path / f"idx{gzipped}" / "MNIST" / "raw", grey[:40], grey[40:], gzipped)))
        found, numbers = pixels_of(source, 28)
        assert source.counts() == (40, 4) and torch.equal(found, torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))
        assert numbers.tolist() == [i % 10 for i in range(40)] + [0, 1, 2, 3]


def test_layouts(tmp_path):
    """FFHQ's folders are no classes; ImageNet's are, a flat val/ is left alone; StyleGAN's labels; LSUN's splits."""
    images = noise(6)
    ffhq = data.find(str(write_images(tmp_path / "f", [f"{i // 3 * 1000:05d}/{i:05d}.png" for i in range(6)], images)))
    assert ffhq.class_names == [] and ffhq.counts() == (5, 1)
    names = [f"train/n0144{i % 3}/n0144{i % 3}_{i}.png" for i in range(6)]
    root = write_images(tmp_path / "i", names, images)
    write_images(root, ["val/ILSVRC2012_val_00000001.png"], images[:1])
    imagenet = data.find("imagenet", root)
    assert imagenet.class_names == ["n01440", "n01441", "n01442"] and imagenet.counts() == (5, 1)
    for says in ("val/ has no class sub-folders", "6 images, but 1,281,167 are published: is it complete?"):
        assert says in imagenet.describe()
    write_images(root, ["val/n01441/x.png"], images[:1])
    with pytest.raises(data.DataError, match="both must have the same sub-folders"):
        data.find("imagenet", root)
    (root / "val" / "ILSVRC2012_val_00000001.png").unlink()
    split = data.find("imagenet", root)
    assert split.counts() == (6, 1) and split.load(8)[1].labels.tolist() == [1]
    names = [f"00000/img{i:08d}.png" for i in range(6)]
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    labels = [[name, i % 4] for i, name in enumerate(names)]
    labelled = data.find(str(write_zip(tmp_path / "l.zip", files | {"dataset.json": json.dumps({"labels": labels})})))
    assert labelled.class_names == list("0123") and pixels_of(labelled, 8)[1].tolist() == [0, 1, 2, 3, 0, 1]
    plain = data.find(str(write_zip(tmp_path / "p.zip", files | {"dataset.json": json.dumps({"labels": None})})))
    assert plain.class_names == []
    with pytest.raises(data.DataError, match="has no whole-number label for every image"):
        data.find(str(write_zip(tmp_path / "q.zip", files | {"dataset.json": json.dumps({"labels": labels[:4]})})))
    write_lmdb(tmp_path / "lsun" / "church_outdoor_val_lmdb", images[:2])
    write_lmdb(tmp_path / "lsun" / "church_outdoor_train_lmdb", images)
    lsun = data.find("lsun-churches", tmp_path)
    assert lsun.counts() == (6, 2) and torch.equal(lsun.load(10)[1].pixels, lsun.load(10)[0].pixels[:2])
    (tmp_path / "f" / "00000" / "up").symlink_to(tmp_path / "f")  # a loop ends
    assert data.find(str(tmp_path / "f")).counts() == (5, 1)


def test_damaged_forms(tmp_path):
    """Archives and arrays that are not what they seem: one line says what to do, and no program in a pickle runs."""
    images = noise(6, 32, 32)
    archive = write_zip(tmp_path / "a.zip", {f"{i}.png": png(image) for i, image in enumerate(images)})
    (tmp_path / "half.zip").write_bytes(archive.read_bytes()[:2000])
    write_zip(tmp_path / "text.zip", {"a.txt": "a"})
    np.save(tmp_path / "float.npy", images / 255)
    np.save(tmp_path / "thin.npy", images[..., :2])
    np.save(tmp_path / "object.npy", np.array([{}]))
    np.savez(tmp_path / "other.npz", weights=images)
    np.savez(tmp_path / "labels.npz", images=images, labels=[1, 2])
    idx = write_idx(tmp_path / "idx", images[..., 0], images[..., 0], True)
    (idx / "t10k-labels-idx1-ubyte.gz").unlink()
    cut = write_idx(tmp_path / "cut", images[..., 0], images[..., 0], False)
    (cut / "train-images-idx3-ubyte").write_bytes((cut / "train-images-idx3-ubyte").read_bytes()[:-1])
    evil = write_cifar(tmp_path / "evil", images)
    (evil / "test_batch").write_bytes(pickle.dumps(Path(tmp_path), protocol=2))
    for name, says in [("half.zip", "cannot be read as a zip"), ("text.zip", "it holds only files like .txt"),
                       ("float.npy", "of float64: expected uint8"), ("thin.npy", "none of its axes is 1, 3 or 4"),
                       ("object.npy", "cannot be read as an array"), ("other.npz", "holds weights: expected images"),
                       ("labels.npz", "2 labels for 6 images"), ("idx", "lacks t10k-labels-idx1-ubyte"),
                       ("cut", "is no complete idx file"), ("evil", "it wants pathlib")]:
        with pytest.raises(data.DataError, match=says) as caught:
            data.find(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    content = bytearray(archive.read_bytes())
    content[200] ^= 1  # inside the first image
    (tmp_path / "flip.zip").write_bytes(content)
    source = data.find(str(tmp_path / "flip.zip"))
    source.load(8)
    assert source.skipped == {"0.png": "its checksum in the zip differs"}
    with mock.patch.dict(sys.modules, {"lmdb": None}), pytest.raises(data.DataError, match="pip install lmdb"):
        (tmp_path / "x_lmdb").mkdir()
        (tmp_path / "x_lmdb" / "data.mdb").touch()
        data.find(str(tmp_path / "x_lmdb"))


@pytest.mark.parametrize("name", data.DATASETS)
def test_a_name_without_its_data(name, tmp_path, capsys, monkeypatch):
    """What it is, its licence, where it is published, how to get it, the layout; exit status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    assert call(train, "--data", name, "--root", tmp_path / "nowhere") == 2
    error, facts = capsys.readouterr().err, data.DATASETS[name]
    for what in ("what", "licence", "where", "layout", "command"):
        assert facts.get(what, "downloads it") in error
    assert str(tmp_path / "nowhere" / name) in error and f"or data/{name}" in error
    assert f"{facts['count']:,}" in facts["what"] and not list(tmp_path.iterdir())


def test_where_names_are_looked_for(tmp_path, monkeypatch):
    """--root, itself or a folder of sets; $VQLCMD_DATA; data/ here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    grey = noise(12, 28, 28)[..., 0]
    for parent in ("data", "env", "root"):
        write_idx(tmp_path / parent / "fashion-mnist", grey, grey[:len(parent)], False)
    assert data.find("fashion-mnist").counts() == (12, 4)
    monkeypatch.setenv("VQLCMD_DATA", str(tmp_path / "env"))
    assert data.find("fashion-mnist").counts() == (12, 3)
    for root in ("root", "root/fashion-mnist"):
        source = data.find("fashion-mnist", tmp_path / root)
        assert source.counts() == (12, 4) and source.name == "fashion-mnist" and source.class_names[9] == "boot"


def test_what_can_be_converted(tmp_path):
    """CMYK, palette, first frame of an animation, damaged EXIF, a JPEG of 60 megapixels; from a file or from bytes."""
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    image = Image.fromarray(red)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    image.convert("P").save(tmp_path / "palette.png")
    image.save(tmp_path / "frames.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    image.save(tmp_path / "exif.png", exif=b"Exif\0\0no directory of tags")
    Image.new("RGB", (7752, 7752), (255, 0, 0)).save(tmp_path / "large.jpg")  # 60 megapixels
    for path in tmp_path.iterdir():
        pixels = data.load_image(path, 8)
        assert np.abs(pixels.astype(int) - red.transpose(2, 0, 1)).max() < 4, path
        assert np.array_equal(pixels, data.load_image(path.read_bytes(), 8))


def spoil(root, good):
    """Fifteen entries in root that no image comes of: {name: a word of the reason}."""
    def damaged(form, cut=slice(None), flip=None):
        file = io.BytesIO()
        Image.fromarray(noise(1, 40, 40)[0]).save(file, form)
        content = bytearray(file.getvalue()[cut])
        if flip:
            content[flip] ^= 255
        return bytes(content)

    files = {"truncated.jpg": (damaged("jpeg", slice(900)), "truncated"),
             "truncated.png": (png(good)[:200], "truncated"),
             "truncated.gif": (damaged("gif", slice(1000)), "truncated"),
             "half.webp": (damaged("webp", slice(300)), ""),
             "header.bmp": (damaged("bmp", slice(30)), ""), "checksum.png": (damaged("png", flip=900), ""),
             "empty.png": (b"", "empty"), "empty.jpg": (b"", "empty"), "text.jpg": (b"not an image\n", "no image of"),
             "page.png": (b"<html>404</html>", "no image of"), "dot.png": (png(good[:1, :1]), "1 x 1 pixels, a side"),
             "line.png": (png(noise(1, 300, 2)[0]), "2 x 300 pixels, a side of less than 4")}
    for name, (content, _) in files.items():
        (root / name).write_bytes(content)
    Image.new("1", (10000, 10000)).save(root / "bomb.png")
    (root / "link.png").symlink_to("nowhere.png")
    (root / "x.png").mkdir()
    return {name: reason for name, (_, reason) in files.items()} | {
        "bomb.png": "10000 x 10000 pixels, more than 50,000,000", "link.png": "a link to nothing", "x.png": "directory"}


@pytest.mark.parametrize("memory", [2 << 30, 0])
def test_bad_files(memory, tmp_path, capsys, monkeypatch):
    """2,000 entries, 15 of them bad: the run finishes, skipped.txt names all 15, and none is opened again."""
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", memory)
    root = tmp_path / "mixed"
    images = noise(1985)
    write_images(root, [f"{i:04d}.png" for i in range(1984)], images[:-1])
    with open(os.fsencode(root) + b"/caf\xe9.png", "wb") as file:  # a name that is no UTF-8
        file.write(png(images[-1]))
    expected = spoil(root, images[0])
    words = ["--data", root, "--out", tmp_path / "out", *flags(TINY)]
    with mock.patch.object(data, "load_image", side_effect=data.load_image) as opened:
        assert call(train, *words) == 0
    text = capsys.readouterr().out
    assert f"15 of 2,000 images (0.75%) cannot be used and are left out: {tmp_path / 'out' / 'skipped.txt'}" in text
    skipped = data.read_skipped(tmp_path / "out" / "skipped.txt")
    assert set(skipped) == set(expected)
    for title, reason in skipped.items():
        assert expected[title] in reason and len(reason) > 4, title
    assert memory == 0 or opened.call_count == 2000  # each was decoded once
    assert (tmp_path / "out" / "data.png").exists()
    assert len(np.load(tmp_path / "out" / "tokens.npy", mmap_mode="r")) == 1985
    complete = contents(tmp_path / "out")
    for name in ("tokens.npy", "ckpt.pt", "evaluation.csv", "diffusion.csv", "metrics.json"):
        (tmp_path / "out" / name).unlink()
    (root / "0007.png").write_bytes(b"")  # after the check: that stops nothing
    words[1] = os.path.relpath(root)  # the list holds wherever the set is looked at from
    with mock.patch.object(data, "load_image", side_effect=data.load_image) as opened:
        assert call(train, *words) == 0
    assert len(np.load(tmp_path / "out" / "tokens.npy", mmap_mode="r")) == 1985 and opened.call_count < 1990
    assert "0007.png: empty, 0 bytes; it was sound before. Its neighbour takes its place" in capsys.readouterr().out
    assert contents(tmp_path / "out")["skipped.txt"] == complete["skipped.txt"]
    with mock.patch.object(Image, "open", side_effect=AssertionError):  # with the tokens there, none is opened again
        assert call(train, *words[:-2], "--save-every", 4, "--steps", 9) == 0


def test_too_many_bad_files(tmp_path, capsys, monkeypatch):
    """More than 1 %: status 2 before training, with the list; --allow-bad trains; repaired, it trains without."""
    root, out = make_folder(tmp_path / "pets"), tmp_path / "out"
    locked = root / "cat" / "00.png"
    if os.geteuid():
        locked.chmod(0)
    else:  # for root there is no file that may not be read
        read = data.Folder.read

        def refuse(self, i):
            if self.names[i] == "cat/00.png":
                raise PermissionError(13, "Permission denied")
            return read(self, i)
        monkeypatch.setattr(data.Folder, "read", refuse)
    words = ["--data", root, "--out", out, *flags(TINY)]
    assert call(train, *words) == 2
    error = capsys.readouterr().err
    assert "1 of 40 images cannot be used, more than 1 %" in error and error.count("\n") == 1
    assert (out / "skipped.txt").read_text() == "cat/00.png\tPermission denied\n"
    assert {path.name for path in out.iterdir()} == {"skipped.txt", ".lock"}
    assert call(train, *words, "--allow-bad") == 0
    assert len(np.load(out / "tokens.npy")) == 39
    monkeypatch.undo()
    locked.chmod(0o644)
    shutil.rmtree(out)
    out.mkdir()
    (out / "skipped.txt").write_text("cat/00.png\tPermission denied\n")  # as the refused start left it
    assert call(train, *words) == 0
    assert (out / "skipped.txt").read_text() == "" and len(np.load(out / "tokens.npy")) == 40


@pytest.fixture
def server():
    """A web server that knows ranges, fails on request and remembers what it was asked for."""
    class Handler(http.server.BaseHTTPRequestHandler):
        files, asked, breaks = {}, [], []  # breaks: after how many bytes each next answer ends

        def do_GET(self):
            name, given = self.path.lstrip("/"), self.headers.get("Range")
            self.asked.append((name, given))
            if name not in self.files:
                return self.send_error(404)
            first = int(given[6:-1]) if given else 0
            content = self.files[name][first:]
            if given and not content:
                return self.send_error(416)
            self.send_response(206 if given else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:self.breaks.pop(0)] if self.breaks else content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        Handler.url = f"http://127.0.0.1:{web.server_port}/"
        yield Handler
        web.shutdown()


def test_download(server, tmp_path, monkeypatch, capsys):
    """Resumed where it broke off, checked, and there only when it is right; offline and damaged say what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQLCMD_DATA", raising=False)
    grey = noise(24, 28, 28)[..., 0]
    made = write_idx(tmp_path / "made", grey[:20], grey[20:], True)
    server.files = {path.name: path.read_bytes() for path in made.iterdir()}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in server.files.items()}
    monkeypatch.setitem(data.DATASETS, "mnist", data.DATASETS["mnist"] | {"files": sums, "urls": [server.url]})
    target, first = tmp_path / "data" / "mnist", next(iter(sums))
    server.breaks = [100, 50, 7]  # all three tries of the first file break off
    with pytest.raises(data.DataError, match="the connection broke.*put it into data/mnist, or name.*--root"):
        data.find("mnist")
    assert [path.name for path in target.iterdir()] == [first + ".part"]
    assert server.asked == [(first, None), (first, "bytes=100-"), (first, "bytes=150-")]
    source = data.find("mnist")
    assert server.asked[3] == (first, "bytes=157-") and len(server.asked) == 7
    assert source.counts() == (20, 4) and source.name == "mnist" and not list(target.glob("*.part"))
    assert torch.equal(source.load(28)[0].pixels[:, 0], torch.from_numpy(grey[:20]))
    assert data.find("mnist").counts() == (20, 4) and len(server.asked) == 7  # it is there now
    (target / first).rename(target / (first + ".part"))  # complete, but killed before its name
    data.find("mnist")
    assert server.asked[7:] == [(first, f"bytes={len(server.files[first])}-")] and (target / first).exists()
    (target / first).unlink()
    server.files[first] = b"a login page"
    assert call(train, "--data", "mnist", "--dry-run") == 2
    assert "it was damaged on the way, or changed" in capsys.readouterr().err
    assert first not in {path.name.removesuffix(".part") for path in target.iterdir()}
    server.files.clear()
    with pytest.raises(data.DataError, match="HTTP 404"):
        data.find("mnist")
    with pytest.raises(data.DataError, match="the same command without --root downloads it"):
        data.find("mnist", tmp_path / "elsewhere")


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
    assert float(vqvae.ssim(a, b)[1]) == pytest.approx(np.mean(values), abs=20 * 2 ** -23 / 9e-4)
    close(vqvae.ssim(a, a), torch.ones(2), rtol=0, atol=1e-6)
    grey = [torch.full((1, 3, 6, 6), v, dtype=torch.uint8) for v in (51, 102)]  # 0.2 and 0.4
    assert float(vqvae.ssim(*grey)) == pytest.approx((0.16 + 1e-4) / (0.2 + 1e-4), abs=1e-3)


def test_evaluate():
    """PSNR over all pixels of the set, in batches: 10 log10(255^2 / MSE), with the codes counted over all tokens."""
    images = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8, generator=seeded(0))
    half = SimpleNamespace(K=4, size=4, eval=lambda: None, encode=lambda x: x[:, 0].flatten(1).long() // 128,
                           decode=lambda tokens: torch.full((len(tokens), 3, 4, 4), 100, dtype=torch.uint8))
    metrics = vqvae.evaluate(half, data.ImageSet([0] * 10, [], 4, pixels=images), "cpu", batch=4)
    assert metrics.pop("ssim") == pytest.approx(float(vqvae.ssim(images, torch.full_like(images, 100)).mean()))
    mse = (images.double() - 100).square().mean()
    high = float((images[:, 0] >= 128).double().mean())
    entropy = -high * math.log(high) - (1 - high) * math.log(1 - high)
    assert metrics == pytest.approx({"psnr": float(10 * (255 ** 2 / mse).log10()), "usage": 0.5,
                                     "perplexity": math.exp(entropy)})


# ----------------------------------------------------------------------------
# The programs.

HERE = Path(__file__).resolve().parent
TINY = dict(size=8, f=4, K=8, code_dim=4, tokenizer_width=16, tokenizer_steps=8, tokenizer_batch=4, gan=0.5,
            gan_start=0.1, D=4, width=16, depth=1, heads=2, steps=8, batch=6, lr=1e-2, warmup=1, sample_steps=3,
            log_every=2, sample_every=4, save_every=4)


def flags(options):
    """Dict -> command line."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def call(program, *words):
    """main() of train, sample, ... in this process, with a command line. Returns its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.SIGNALS.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are tiny: threads would wait for each other
    try:
        with mock.patch.object(sys, "argv", [program.__name__, *map(str, words)]):
            program.main()
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "pets")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A complete tiny run: its directory."""
    out = tmp_path_factory.mktemp("run") / "pets"
    assert call(train, "--data", folder, "--out", out, *flags(TINY)) == 0
    return out


def contents(out):
    """What a run computed: {file: content}, without speeds and times, checkpoints as bytes of their tensors."""
    def tensors(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: tensors(v) for key, v in value.items() if key not in ("config", "optimizer")}
        return [tensors(v) for v in value] if isinstance(value, (list, tuple)) else value

    found = {}
    for path in sorted(out.iterdir()):
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                found[path.name] = [{k: v for k, v in row.items() if k != "img/s"} for row in csv.DictReader(file)]
        elif path.suffix == ".pt":
            found[path.name] = tensors(torch.load(path, weights_only=False))  # our own; and faster
        elif path.name != "config.json":
            found[path.name] = path.read_bytes()
    return found


def test_commands(folder, tmp_path):
    """As typed: train, train again (complete, nothing touched), sample; all from another directory."""
    def command(*words):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    once = [HERE / "train.py", "--data", folder, *flags(TINY)]
    text = command(*once)
    assert "38 images + 2 held out, 2 classes: cat (20), dog (20)" in text
    assert "python sample.py runs/pets/ckpt.pt" in text
    out = tmp_path / "runs" / "pets"
    times = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "config.json"}
    assert {path.name for path in times} == {
        "tokenizer.pt", "tokenizer.csv", "reconstructions_000004.png", "reconstructions_000008.png", "tokens.npy",
        "ckpt.pt", "diffusion.csv", "evaluation.csv", "metrics.json", "samples_000004.png", "samples_000008.png",
        "data.png", "skipped.txt", ".lock"}
    again = command(*once)
    assert again.count("complete") == 4 and times == {path: path.stat().st_mtime_ns for path in times}
    text = command(HERE / "sample.py", "runs/pets/ckpt.pt", "--class", "dog")
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
    assert call(sample, run / "ckpt.pt", "--out", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (run / "samples_000008.png").read_bytes()


@pytest.mark.parametrize("stage", ["tokenizer", "tokens", "diffusion"])
@pytest.mark.parametrize("how", ["Ctrl-C", "kill", "crash"])
def test_interrupted_and_continued(stage, how, folder, run, tmp_path, monkeypatch):
    """Stopped in any stage and started again: bit for bit what the uninterrupted run computed (item 15)."""
    words = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]
    owner, name, calls = {"tokenizer": (VQVAE, "forward", 5), "tokens": (VQVAE, "encode", 12),
                          "diffusion": (train, "partial_loss", 5)}[stage]
    real, seen = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == calls:
            if how == "crash":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        return real(*args, **kwargs)

    small = vqvae.encode_sets  # two images at a time, so that there is something to be stopped in
    monkeypatch.setattr(vqvae, "encode_sets", lambda *args, **kwargs: small(*args, **kwargs, batch=2))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        if how == "crash":
            with pytest.raises(MemoryError):
                call(train, *words)
        else:
            assert call(train, *words) == {"Ctrl-C": 130, "kill": 143}[how]
    assert not (tmp_path / "pets" / "metrics.json").exists()
    assert (tmp_path / "pets" / "tokens.npy").exists() == (stage == "diffusion")
    assert call(train, *words) == 0
    assert contents(tmp_path / "pets") == contents(run)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writing failed")])
@pytest.mark.parametrize("file", ["tokenizer.pt", "ckpt.pt"])
def test_full_disk(file, error, folder, run, tmp_path, capsys):
    """A checkpoint that cannot be written: one line, status 1; the one before is whole, and the run goes on from it."""
    out, saves, save = tmp_path / "pets", [], torch.save
    words = ["--data", folder, "--out", out, *flags(TINY)]

    def full(what, path, **options):
        saves.append(path.name == file + ".part")
        if sum(saves) == 2 and saves[-1]:
            path.write_bytes(b"half of it")
            raise error
        return save(what, path, **options)

    with mock.patch.object(torch, "save", full):
        assert call(train, *words) == 1
    said = capsys.readouterr().err
    assert f"{file} cannot be written" in said and "give the same command again" in said and said.count("\n") == 1
    assert torch.load(out / file, weights_only=True)["step"] == 4 and not list(out.glob("*.part"))
    assert call(train, *words) == 0 and contents(out) == contents(run)


def test_out_of_memory(folder, tmp_path, capsys):
    """It names the flags to give, and their values; with them the run goes on."""
    words = ["--data", folder, "--out", tmp_path / "a", *flags(TINY)]
    with mock.patch.object(VQVAE, "forward", side_effect=torch.OutOfMemoryError):
        assert call(train, *words) == 1 and "another --out and lower --tokenizer-batch" in capsys.readouterr().err
    with mock.patch.object(train, "partial_loss", side_effect=torch.OutOfMemoryError):
        assert call(train, *words) == 1
    assert "for 6 images at once: add --micro-batch 3, or --activation-checkpointing" in capsys.readouterr().err
    assert call(train, *words, "--micro-batch", 3) == 0


def test_killed_while_tokens_are_written(folder, run, tmp_path):
    """SIGKILL, then the same command: what was finished is kept, the rest is done, the file is the undisturbed one."""
    out, part = tmp_path / "pets", tmp_path / "pets" / "tokens.part.npy"
    words = [str(word) for word in ["--data", folder, "--out", out, *flags(TINY)]]
    slow = ("import sys, time, train, vqvae\n"
            "whole, encode = vqvae.encode_sets, vqvae.VQVAE.encode\n"
            "vqvae.encode_sets = lambda *args, **kwargs: whole(*args, **kwargs, batch=2)\n"
            "def crawl(self, images):\n"
            "    time.sleep(0.1 if len(images) == 2 else 0)\n"
            "    return encode(self, images)\n"
            "vqvae.VQVAE.encode = crawl\n"
            "train.main()\n")
    with subprocess.Popen([sys.executable, "-c", slow, *words], cwd=HERE, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not part.exists() or (np.load(part, mmap_mode="r")["label"] >= 0).sum() < 8:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    done = int((np.load(part, mmap_mode="r")["label"] >= 0).sum())
    assert 8 <= done < 40 and not (out / "tokens.npy").exists()
    small, encoded = vqvae.encode_sets, []
    with mock.patch.object(vqvae, "encode_sets", lambda *a, **k: small(*a, **k, batch=2)), mock.patch.object(
            VQVAE, "encode", lambda self, x, f=VQVAE.encode: encoded.append(len(x)) or f(self, x)):
        assert call(train, *words, "--stage", "tokens") == 0
    assert sum(encoded) == 40 - done and (out / "tokens.npy").read_bytes() == (run / "tokens.npy").read_bytes()


def test_perceptual_loss(small_lpips, folder, tmp_path, capsys):
    """Without weights a run says so, and stays without; with weights it must keep them. L1, no discriminator."""
    settings = flags(TINY | {"perceptual": 1.0, "gan": 0.0, "pixel_loss": "l1"})
    words = ["--data", folder, "--stage", "tokenizer", *settings]
    with mock.patch.object(vqvae, "fetch", side_effect=data.DataError("cannot download")) as fetched:
        assert call(train, *words, "--out", tmp_path / "a") == 0
        assert "trained without its perceptual loss: cannot download" in capsys.readouterr().out
        assert call(train, *words, "--out", tmp_path / "a") == 0 and fetched.call_count == 1
    assert call(train, *words, "--out", tmp_path / "a", "--lpips-weights", small_lpips) == 2
    assert re.search("was made with lpips none, now lpips is [0-9a-f]{16}", capsys.readouterr().err)
    assert call(train, *words, "--out", tmp_path / "b", "--lpips-weights", small_lpips) == 0
    with (tmp_path / "b" / "tokenizer.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["lpips"]) > 0 for row in rows) and "adversarial" not in rows[0]
    assert torch.load(tmp_path / "b" / "tokenizer.pt", weights_only=True)["metrics"]["lpips"] > 0
    capsys.readouterr()
    for wrong, says in ((["--perceptual", 0], "no tokenizer is trained here that uses them"),
                        (["--size", 2, "--f", 2, "--gan", 0], "at least 4 pixels, not 2: --perceptual 0"),
                        (["--size", 4, "--gan", 1], "at least 8 pixels, not 4: --gan 0")):
        assert call(train, *words, "--out", tmp_path / "c", "--lpips-weights", small_lpips, *wrong) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_flip(folder, run, tmp_path):
    """--flip: the training images once more, mirrored, with their labels; held-out images only as they are."""
    out = tmp_path / "flip"
    assert call(train, "--data", folder, "--out", out, "--flip", "--tokenizer", run / "tokenizer.pt",
                "--stage", "tokens", *flags(TINY)) == 0
    plain, both = np.load(run / "tokens.npy"), np.load(out / "tokens.npy")
    assert len(both) == 2 * 38 + 2 and np.array_equal(both[:38], plain[:38]) and np.array_equal(both[-2:], plain[-2:])
    labels = [image.labels.tolist() for image in data.find(str(folder)).load(8)]
    assert both["label"].tolist() == 2 * labels[0] + labels[1] and not both["test"][:76].any()
    tokenizer, _ = train.load_tokenizer({"tokenizer": json.loads(json.dumps(torch.load(
        run / "tokenizer.pt", weights_only=True)["config"]))}, run, torch.device("cpu"))
    mirrored = data.find(str(folder)).load(8)[0].pixels.flip(3)
    assert np.array_equal(both["x"][38:76], tokenizer.encode(mirrored).numpy())


def test_tokens_of_another_run(folder, run, tmp_path, capsys):
    """--data RUN/tokens.npy trains the same denoiser without images; the tokenizer lies beside it or is named."""
    settings = {k: v for k, v in TINY.items() if k not in train.TOKENIZER_OPTIONS.values()}
    assert call(train, "--data", run / "tokens.npy", "--out", tmp_path / "a", *flags(settings)) == 0
    assert contents(tmp_path / "a")["ckpt.pt"] == contents(run)["ckpt.pt"]
    shutil.copy(run / "tokens.npy", tmp_path / "tokens.npy")
    words = ["--data", tmp_path / "tokens.npy", "--out", tmp_path / "b"]
    assert call(train, *words, *flags(settings)) == 2 and "no checkpoint at" in capsys.readouterr().err
    assert call(train, *words, "--tokenizer", run / "tokenizer.pt", "--stage", "tokens", *flags(settings)) == 0
    assert (tmp_path / "b" / "tokens.npy").read_bytes() == (run / "tokens.npy").read_bytes()
    other = torch.load(run / "tokenizer.pt", weights_only=True)
    other["tokenizer"]["decoder.0.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    shutil.copytree(run, tmp_path / "d")
    (tmp_path / "d" / "ckpt.pt").unlink()
    shutil.copy(tmp_path / "other.pt", tmp_path / "d" / "tokenizer.pt")
    for again in ([*words[:3], tmp_path / "c", "--tokenizer", tmp_path / "other.pt"],
                  ["--out", tmp_path / "d", "--stage", "diffusion"]):
        assert call(train, *again, *(flags(settings) if "--data" in again else ["--data", folder, *flags(TINY)])) == 2
        assert re.search("was made by tokenizer [0-9a-f]{16}, this one is [0-9a-f]{16}", capsys.readouterr().err)
    shutil.rmtree(tmp_path / "c")
    rows = np.load(run / "tokens.npy")
    rows["x"][0] = 8
    np.save(tmp_path / "tokens.npy", rows)
    words[-1] = tmp_path / "c"
    assert call(train, *words, "--tokenizer", run / "tokenizer.pt", *flags(settings)) == 2
    assert "they do not belong together" in capsys.readouterr().err


# What a preset may be cut down to so that two steps of it are quick; sizes of images and token grids stay.
SMALL = dict(tokenizer_width=16, tokenizer_steps=2, tokenizer_batch=2, steps=2, batch=2, width=32, depth=1, heads=2,
             sample_steps=1)


@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets(preset, tmp_path, monkeypatch, capsys):
    """Each preset takes two steps on made-up data of its form; by name or size it is the one that is chosen."""
    monkeypatch.setattr(train, "held_out_bound", lambda *args, f=train.held_out_bound, **_: f(*args[:-1], 4))
    monkeypatch.setattr(train, "COLUMNS", 2)  # smaller pictures
    monkeypatch.setattr(vqvae, "fetch", mock.Mock(side_effect=data.DataError("no network")))
    monkeypatch.setattr(data.Toy, "n_train", 24)
    monkeypatch.setattr(data.Toy, "n_test", 2)
    images, side, root = noise(6, 40, 44), train.PRESETS[preset]["size"], tmp_path
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
    assert call(train, "--data", name, "--root", tmp_path, "--preset", preset, "--out", tmp_path / "run",
                *flags(SMALL)) == 0
    tokens = np.load(tmp_path / "run" / "tokens.npy")["x"].shape[1]
    assert tokens == {"toy": 25, "mnist": 49, "fashion-mnist": 49}.get(preset, 256 if side == 256 else 64)
    source, args = data.find(str(name), tmp_path), SimpleNamespace(preset=None, **dict.fromkeys(train.OPTIONS))
    for device in ("cpu", "cuda"):
        by_size = "32-cpu" if device == "cpu" else preset
        chosen = by_size if root != tmp_path or preset in train.SMALL_SETS else preset
        if device == "cpu" or preset != "32-cpu":  # which no GPU gets
            config = train.resolve(args, source, torch.device(device), {})
            assert f"preset {chosen}: chosen for" in capsys.readouterr().out
            assert config["size"] == train.PRESETS[chosen]["size"]


def test_raising_the_steps_goes_on(folder, run, tmp_path):
    """A complete run continues with more --steps; the tokenizer and the tokens stay."""
    shutil.copytree(run, tmp_path / "pets")
    assert call(train, "--data", folder, "--out", tmp_path / "pets", *flags(TINY | {"steps": 10})) == 0
    before, after = contents(run), contents(tmp_path / "pets")
    assert after["ckpt.pt"]["step"] == 10 and [r["step"] for r in after["diffusion.csv"]] == list("2468") + ["10"]
    assert after["tokenizer.pt"] == before["tokenizer.pt"] and after["tokens.npy"] == before["tokens.npy"]


# For each flag of train.py one value that is neither the default nor TINY's. The second run below must differ.
CHANGED = dict(
    size=16, f=2, K=7, code_dim=3, tokenizer_width=32, tokenizer_blocks=2, codebook_update="gradient", beta=3.0,
    codebook_distance="cosine", pixel_loss="l1", perceptual=0.5, gan=0.0, gan_lr=1e-2, gan_start=0.5,
    tokenizer_steps=9, tokenizer_batch=5, tokenizer_lr=1e-2, D=5, norm="layer", embedding_init="random", width=32,
    depth=2, heads=4, likelihood=False, shift=1.0, log_snr_min=-8.0, log_snr_max=5.0, w_rec=0.5, w_diff=0.5, w_cm=0.0,
    max_snr=1.0, rec_fraction=0.5, coupling="shared", max_gap=0.5, teacher="ema", p_drop=0.9, label_drop=0.9,
    steps=9, batch=7, lr=2e-2, warmup=3, weight_decay=5.0, clip=1e-3, ema_decay=0.05, sample_steps=4, guidance=40.0,
    sampler="ddim", log_every=3, sample_every=3, save_every=1, flip=True)


def parser_flags(program):
    """All long flags of a program, from its own parser."""
    def caught(parser, *_):
        raise InterruptedError(sorted(a.dest for a in parser._actions if a.option_strings and a.dest != "help"))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", caught), pytest.raises(InterruptedError) as caught:
        program.main()
    return caught.value.args[0]


def test_every_flag_of_train_does_something(small_lpips, folder, run, tmp_path, capsys):
    """Each flag alone changes what a tiny run computes; the resolved configuration shows it."""
    others = ["activation_checkpointing", "compile", "fsdp", "micro_batch",  # see "The engine"
              "allow_bad", "data", "device", "dry_run", "eval_fid", "lpips_weights", "out", "preset", "root", "seed",
              "stage", "tokenizer"]
    assert parser_flags(train) == sorted([*CHANGED, *others])
    baseline, given = contents(run), ["--tokenizer", run / "tokenizer.pt"]
    seldom = TINY | {"sample_every": 100, "save_every": 100}
    assert call(train, "--data", folder, "--out", tmp_path / "u", *given, *flags(seldom)) == 0
    adopted = contents(tmp_path / "u")
    assert "tokenizer.csv" not in adopted and adopted["ckpt.pt"] == baseline["ckpt.pt"]
    late = list(CHANGED)[list(CHANGED).index("D"):list(CHANGED).index("warmup")]  # they need no tokenizer of their own
    capsys.readouterr()
    assert call(train, "--data", folder, "--dry-run", *flags(CHANGED)) == 0
    resolved = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} {value}\n" in resolved for name, value in CHANGED.items())
    for name, value in CHANGED.items():
        options = given + flags(seldom | {name: value}) if name in late else flags(TINY | {name: value})
        options += ["--lpips-weights", small_lpips] if name == "perceptual" else []
        out, saves = tmp_path / name, []
        with mock.patch.object(torch, "save", lambda what, *a, s=saves, f=torch.save, **k: s.append(f(what, *a, **k))):
            assert call(train, "--data", folder, "--out", out, *options) == 0
        if name == "save_every":
            assert len(saves) == 2 * (8 + 1)  # after every step; after the last before and after measuring
        else:
            assert contents(out) != (adopted if name in late else baseline), f"--{name} changes nothing"
    assert call(train, "--data", folder, "--out", tmp_path / "s", "--seed", 1, *flags(TINY)) == 0
    seeded_run = contents(tmp_path / "s")
    assert seeded_run["tokenizer.pt"] != baseline["tokenizer.pt"] and seeded_run["ckpt.pt"] != baseline["ckpt.pt"]
    for stage in ("tokenizer", "tokens", "diffusion"):  # --stage, --device
        assert call(train, "--data", folder, "--out", tmp_path / "t", "--stage", stage, "--device", "cpu",
                    *flags(TINY)) == 0
        assert (tmp_path / "t" / "tokens.npy").exists() == (stage != "tokenizer")
        assert (tmp_path / "t" / "ckpt.pt").exists() == (stage == "diffusion")
    assert contents(tmp_path / "t") == baseline
    for preset, settings in train.PRESETS.items():  # a preset fills only what was not given
        capsys.readouterr()
        assert call(train, "--dry-run", "--preset", preset, "--K", 99) == 0
        text = capsys.readouterr().out
        assert "--K 99\n" in text and all(f"--{name.replace('_', '-')} {value}\n" in text
                                          for name, value in settings.items() if name != "K")
    assert not (tmp_path / "runs").exists()


def test_a_published_tokenizer_from_images_to_samples(folder, tmp_path, capsys):
    """--tokenizer takes a VQGAN's checkpoint: it decides f and K, is measured, encodes, and lies in ckpt.pt."""
    weights = published_tokenizers.random_weights(published_tokenizers.layout(32, (1, 2), set(), 4, 3, 16))
    torch.save({"state_dict": weights}, tmp_path / "vqgan.ckpt")
    options = flags({name: value for name, value in TINY.items() if name not in ("f", "K", "code_dim")})
    words = ["--data", folder, "--out", tmp_path / "a", "--tokenizer", tmp_path / "vqgan.ckpt", *options]
    assert call(train, *words) == 0
    text = capsys.readouterr().out
    assert "16 tokens of 16 codes per image" in text and "tokenizer: psnr" in text
    again = contents(tmp_path / "a")
    assert call(train, *words) == 0 and contents(tmp_path / "a") == again
    bundle = sample.load_checkpoint(tmp_path / "a" / "ckpt.pt", torch.device("cpu"))
    assert isinstance(bundle.tokenizer, vqvae.PublishedVQGAN) and bundle.model.K == 16
    tokens = np.load(tmp_path / "a" / "tokens.npy")
    images, _ = data.find(str(folder)).load(8)
    assert torch.equal(bundle.tokenizer.encode(images.batch(range(5))), torch.from_numpy(tokens["x"][:5].astype("i8")))
    assert call(sample, tmp_path / "a" / "ckpt.pt", "--n", 2, "--out", tmp_path / "s.png") == 0
    capsys.readouterr()
    assert call(train, *words[:4], *flags(TINY | {"f": 2, "K": 16, "code_dim": 3})) == 2
    assert re.search(r"was made with tokenizer [0-9a-f]{16}, now tokenizer is own", capsys.readouterr().err)
    weights["quant_conv.bias"] += 1
    torch.save({"state_dict": weights}, tmp_path / "vqgan.ckpt")
    assert call(train, *words) == 2
    assert re.search(r"made with tokenizer [0-9a-f]{16}, now tokenizer is [0-9a-f]{16}", capsys.readouterr().err)
    assert call(train, *words[:3], tmp_path / "b", *words[4:], "--K", 9) == 2
    assert "has K 16, this run 9: leave --K away" in capsys.readouterr().err


def test_every_flag_of_sample_does_something(run, tmp_path, capsys):
    """Each changes the picture, but --batch and --device do not (item 14); --n adds images after the others."""
    def picture(**options):
        words = {"n": 9, "out": tmp_path / "a.png"} | options
        capsys.readouterr()
        assert call(sample, run / "ckpt.pt", *flags(words)) == 0
        with Image.open(words["out"]) as image:
            return np.asarray(image)

    baseline = picture()
    changed = {"steps": 1, "guidance": 1e4, "class": "dog", "sampler": "ddim", "seed": 1, "n": 20, "temperature": 1e-3,
               "end": 0.9}
    assert parser_flags(sample) == sorted(["classes" if f == "class" else f for f in changed] + [
        "batch", "compile", "device", "out", "interval",
        "grid_of", "trajectory", "inpaint", "mask", "vary", "strength", "interpolate"])  # test_special_pictures
    for name, value in changed.items():
        assert not np.array_equal(picture(**{name: value}), baseline), name
    assert np.array_equal(picture(batch=2, device="cpu", out=tmp_path / "sub" / "b.png"), baseline)
    with mock.patch.object(torch, "compile", side_effect=lambda f, **_: f) as compiled:
        assert np.array_equal(picture(compile=True), baseline) and compiled.call_count == 1
    assert np.array_equal(picture(**{"class": "1"}), picture(**{"class": "dog"}))
    assert np.array_equal(picture(n=20)[:len(baseline) // 2], baseline[:len(baseline) // 2])


def test_special_pictures(one_thread, run, tmp_path):
    """Each is made of the right images, tile by tile: those of the plain grid, or of sample_images."""
    bundle, side = sample.load_checkpoint(run / "ckpt.pt", torch.device("cpu")), 66  # 8 pixels, 8 times, and 2 between
    settings = bundle.sampling | {"guidance": 1e4}  # the model is hardly trained: less is hardly seen

    def tiles(columns, *words, rows=1):
        """[row][column] -> the pixels of a tile, without the words at the left and above."""
        assert call(sample, run / "ckpt.pt", "--guidance", 1e4, *words, "--out", tmp_path / "a.png") == 0
        page = np.asarray(Image.open(tmp_path / "a.png"))[-side * rows:, -side * columns:]
        return [[page[side * i:side * i + 64:8, side * j:side * j + 64:8].transpose(2, 0, 1) for j in range(columns)]
                for i in range(rows)]

    def same(found, images):
        return all(np.array_equal(tile, image) for tile, image in zip(found, images, strict=True))

    [plain] = tiles(8, "--n", 8)
    for values, rows in (("guidance=0,1e4", 2), ("steps=3,1", 2), ("temperature=1,1e-3", 2), (f"end={0.8 / 9},0.9", 2)):
        found = tiles(8, "--grid-of", values, rows=rows)
        default = int(values.startswith("guidance"))
        assert [same(row, plain) for row in found] == [i == default for i in range(rows)], values
    [guided], [unguided] = tiles(8, "--n", 8, "--end", 0), tiles(8, "--n", 8, "--guidance", 0, "--end", 0)
    part = ["--n", 8, "--end", 0, "--guidance-interval"]  # t = 1, 0.5 and 0 alone are visited
    assert same(tiles(8, *part, 0.6, 0.7)[0], unguided)
    assert not any(same(tiles(8, *part, 0, 0.7)[0], row) for row in (guided, unguided))

    # over time: the last column is the argmax of the last p; the film has all steps, and the same last image
    seen, labels = [], torch.zeros(4, dtype=torch.int64)
    sample.sample_images(bundle, labels, **settings, watch=lambda t, p: seen.append((t, p.argmax(-1))))
    found = tiles(3, "--n", 4, "--trajectory", "--batch", 3, rows=4)
    for column, (_, tokens) in enumerate(seen):
        assert same([row[column] for row in found], bundle.tokenizer.decode(tokens).numpy())
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
    [found] = tiles(10, "--n", 1, "--trajectory", "--steps", 12)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 12
        film.seek(11)  # one image of 64 pixels: the 256 colours of a GIF are enough
        assert np.array_equal(np.asarray(film.convert("RGB"))[-side:-2:8, -side:-2:8].transpose(2, 0, 1), found[-1])

    # made from an image
    pixels = torch.randint(256, (10, 14, 3), generator=seeded(0), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = np.zeros((20, 28), np.uint8)
    mask[18, 5] = 255  # its centre square is columns 4 to 23: this is the cell at the lower left
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = data.load_image(tmp_path / "image.png", 8)
    tokens = bundle.tokenizer.encode(torch.from_numpy(image)[None])
    known = tokens.masked_fill(torch.tensor([False, False, True, False]), -1)
    grey = image.copy()
    grey[:, 4:, :4] = 128
    words = ["--inpaint", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--n", 3]
    for names, labels, omega in (([], [2], 0.0), (["--class", "dog,cat"], [1, 0], 1e4)):  # 2: the null class
        for row, label in zip(tiles(5, *words, *names, rows=len(labels)), labels, strict=True):
            images = sample.sample_images(bundle, torch.full((3,), label), known=known,
                                          **settings | {"guidance": omega})
            assert same(row, [image, grey, *images.numpy()])
    words = ["--vary", tmp_path / "image.png", "--n", 3, "--class", "dog"]
    for strength, more in ((0.6, []), (0.9, ["--strength", 0.9])):
        images = sample.sample_images(bundle, torch.ones(3, dtype=torch.int64), start=(tokens, strength), **settings)
        assert same(tiles(4, *words, *more)[0], [image, *images.numpy()])

    # between two seeds
    found = tiles(4, "--interpolate", "0,1", "--n", 4, rows=2)
    assert np.array_equal(found[0][0], plain[0])
    noise = torch.randn(4, 4, generator=sample.image_generators(1, [0])[0])[None]
    for row, label in zip(found, (0, 1), strict=True):
        images = [sample.sample_images(bundle, torch.tensor([label]), noise=z, **settings)[0] for z in (None, noise)]
        assert same([row[0], row[3]], images)


def test_special_pictures_alone(run, tmp_path, capsys, monkeypatch):
    """One at a time, in one process; and the process group ends when an error leaves early."""
    words = [run / "ckpt.pt", "--out", tmp_path / "a.png"]
    assert call(sample, *words, "--trajectory", "--interpolate", "0,1") == 2
    assert "--interpolate: not allowed with argument --trajectory" in capsys.readouterr().err
    with mock.patch.object(sample, "processes", lambda: (0, 2)):
        assert call(sample, *words, "--grid-of", "steps=1,2") == 2
    assert "--grid-of is for one process: start it with python" in capsys.readouterr().err
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    checkpoint["config"]["training"]["label_drop"] = 0.0
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert call(sample, tmp_path / "ckpt.pt", "--vary", tmp_path / "image.png") == 2
    assert "trained with --label-drop 0" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    with mock.patch.object(sample, "check_arguments", side_effect=lambda *_: 1 / 0) as early:
        with pytest.raises(ZeroDivisionError):
            call(sample, *words)
    assert early.called and not torch.distributed.is_initialized() and not (tmp_path / "a.png").exists()


def test_sample_files(run, tmp_path, capsys):
    """Folder, zip and npz hold the same pixels, those of one batch, interrupted and continued; wrong use is said."""
    words = ["--n", 21, "--batch", 8, "--seed", 3]
    bundle = sample.load_checkpoint(run / "ckpt.pt", torch.device("cpu"))
    labels = sample.default_labels(21, 2)
    expected = sample.sample_images(bundle, labels, seed=3, **bundle.sampling).permute(0, 2, 3, 1).numpy()
    for name in ("a", "a.zip", "a.npz"):
        real, seen = sample.sample_images, []

        def stopped(*args, seen=seen, real=real, **options):
            seen.append(options["first"])
            if len(seen) == 3:
                raise KeyboardInterrupt
            return real(*args, **options)

        with mock.patch.object(sample, "sample_images", stopped):
            assert call(sample, run / "ckpt.pt", *words, "--out", tmp_path / name) == 130
        assert "the same command goes on" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
        assert call(sample, run / "ckpt.pt", *words, "--out", tmp_path / name, "--steps", 1) == 2
        assert "holds images of another model, seed or setting" in capsys.readouterr().err
        with mock.patch.object(sample, "sample_images", stopped):
            assert call(sample, run / "ckpt.pt", *words, "--out", tmp_path / name) == 0 and seen == [0, 8, 16, 16]
        if name == "a.npz":
            with np.load(tmp_path / name) as found:
                images = found["arr_0"]
                assert np.array_equal(found["arr_1"], labels)
        else:
            folder = tmp_path / name if name == "a" else zipfile.Path(tmp_path / name)
            files = sorted(folder.iterdir(), key=lambda file: file.name)
            images = np.stack([np.asarray(Image.open(io.BytesIO(file.read_bytes()))) for file in files])
        assert np.array_equal(images, expected), name
        assert {path.name for path in tmp_path.iterdir()} <= {"a", "a.zip", "a.npz"}
        assert call(sample, run / "ckpt.pt", *words, "--out", tmp_path / name) == 2
        assert "is there already" in capsys.readouterr().err
    assert call(sample, run / "ckpt.pt", "--out", tmp_path / "a.jpg") == 2
    assert "must end in .png, .npz or .zip" in capsys.readouterr().err


def test_report(fast, small_lpips, run, folder, tmp_path, capsys, monkeypatch):
    """python vqvae.py report: the figures that training found, rFID where the weights are, a picture."""
    words = ["report", run / "tokenizer.pt", "--data", folder, "--device", "cpu", "--out", tmp_path / "a" / "r.png"]
    assert parser_flags(vqvae) == sorted(["data", "root", "size", "weights", "lpips_weights", "device", "out"])
    assert call(vqvae, *words) == 0
    text = capsys.readouterr().out
    metrics = torch.load(run / "tokenizer.pt", weights_only=True)["metrics"]
    assert all(f"{name} {metrics[name]:.4g}" in text for name in ("psnr", "ssim", "usage", "perplexity"))
    assert "2 held-out images" in text and re.search(r"rfid \d", text) and "no LPIPS: no vgg16-397923af.pth" in text
    assert call(vqvae, *words, "--lpips-weights", small_lpips) == 0
    assert re.search(r"lpips 0\.\d", capsys.readouterr().out)
    with Image.open(tmp_path / "a" / "r.png") as picture:
        assert picture.width > 2 * 8 and len(np.unique(np.asarray(picture))) > 10
    published = published_tokenizers.random_weights(published_tokenizers.layout(32, (1, 2), set(), 4, 3, 16))
    torch.save({"state_dict": published}, tmp_path / "vqgan.ckpt")
    assert call(vqvae, "report", tmp_path / "vqgan.ckpt", "--size", 6, *words[2:]) == 0
    assert "16 codes, f = 2, 9 tokens of 6 x 6 pixels" in capsys.readouterr().out
    monkeypatch.delenv("FID_WEIGHTS")
    assert call(vqvae, *words) == 0 and "no rFID: no Inception weights at" in capsys.readouterr().out
    for wrong, says in ((["--size", 9], "made for images of 8 pixels"), (["--weights", "none"], None),
                        (["--root", tmp_path, "--data", "nowhere"], "no such folder")):
        assert call(vqvae, *words, *wrong) == (2 if says else 0)
        assert says is None or says in capsys.readouterr().err


def test_the_other_programs(run, folder, tmp_path):
    """schedule.py and data.py draw their pages; experiments/agreement.py reads a checkpoint."""
    assert call(schedule, "--shifts", 1, 0.4, "--log-snr-min", -8, "--log-snr-max", 6, "--out", tmp_path / "s.png") == 0
    assert call(data, folder, "--size", 8, "--out", tmp_path / "d.png") == 0
    for name in ("s.png", "d.png"):
        with Image.open(tmp_path / name) as image:
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    done = subprocess.run([sys.executable, HERE / "experiments" / "agreement.py", run / "ckpt.pt",
                           "--data", folder.name, "--root", folder.parent, "--n", "6", "--classifier-steps", "2",
                           "--guidance", "0", "2", "--steps", "2", "--sampler", "ddim", "--seed", "1",
                           "--device", "cpu"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and len(re.findall(r"samples +[\d.]+% of 6", done.stdout)) == 2, done.stderr


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


def test_tokenizer_peer(tmp_path, capsys):
    """The race runs to its end, goes on where it stopped, and its figures are those of vqvae.evaluate."""
    cells = [{"cell_type": "code", "source": [f"class {cell}"]} for cell in NOTEBOOK.split("class ")[1:]]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["VQ"]}, *cells]}))
    np.savez(tmp_path / "a.npz", images=noise(256, 32, 32), test_images=noise(16, 32, 32))
    words = [tmp_path / "a.ipynb", "--data", "a.npz", "--root", tmp_path, "--out", tmp_path / "a", "--device", "cpu",
             "--seed", 1, "--minutes", 0.002]
    assert call(tokenizer_peer, *words) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    theirs, timed, counted = (results[name] for name in ("theirs", "ours, same time", "ours, same steps"))
    assert theirs["steps"] == counted["steps"] >= 1 and min(theirs["seconds"], timed["seconds"]) >= 0.1
    assert call(tokenizer_peer, *words) == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == results
    state = torch.load(tmp_path / "a" / "state.pt", weights_only=True)["ours, same steps"]
    model = vqvae.VQVAE(32, code_dim=16, width=32)
    model.load_state_dict(state[1])
    expected = vqvae.evaluate(model, data.find("a.npz", tmp_path).load(32)[1], "cpu")
    assert counted["psnr"] == pytest.approx(expected["psnr"]) and counted["usage"] == expected["usage"]


def test_bad_input(folder, run, tmp_path, capsys, monkeypatch):
    """One line that says what to do, exit status 2, before any work, nothing written and nothing written over."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    (tmp_path / "hurt").mkdir()
    for i in range(3):
        (tmp_path / "hurt" / f"{i}.png").write_bytes(b"\x89PNG, and then nothing")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save(Path("not weights only"), tmp_path / "pickle.pt")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    shutil.copytree(run, tmp_path / "run")

    def state():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}

    before = state()
    same = ["--data", folder, *flags(TINY), "--out"]
    for program, words, says in [
        (train, ["--data", "nowhere"], "no such folder or file"),
        (train, ["--data", "toyy"], "Did you mean toy?"),
        (train, ["--data", "emty"], "Did you mean empty?"),
        (train, ["--data", "empty"], "it holds no files; expected files that end in"),
        (train, ["--data", "texts"], "it holds only files like .txt"),
        (train, ["--data", "text.pt"], "is a file of no form that is known: give a folder"),
        (train, ["--data", "hurt"], "no image in hurt can be read, e.g. 0.png"),
        (train, [*same, "foreign"], "is no run of train.py: give another --out"),
        (train, [*same, "run", "--K", 9], "was made with K 8, now K is 9"),
        (train, [*same, "run", "--seed", 3], "was made with seed 0, now seed is 3"),
        (train, [*same, "new", "--f", 3], "f = 3 must be a power of two that divides"),
        (train, [*same, "new", "--heads", 3], "must be a multiple of heads"),
        (train, [*same, "new", "--lr", "nan"], "--lr nan: must lie between"),
        (train, [*same, "new", "--steps", 0], "--steps 0: must lie between 1"),
        (train, [*same, "new", "--shift", 0], "shift must be positive"),
        (train, [*same, "new", "--device", "abacus"], "device 'abacus' is not available here"),
        (train, [*same, "new", "--stage", "tokens"], "not there or not complete: run --stage tokenizer (or all)"),
        (train, [*same, "new", "--tokenizer", "run/ckpt.pt"], "not 'vq-lcmd tokenizer 1'"),
        (train, [*same, "new", "--tokenizer", "run/tokenizer.pt", "--K", 9], "has K 8, this run 9: leave --K away"),
        (sample, ["nowhere.pt"], "no checkpoint at nowhere.pt: give the ckpt.pt"),
        (sample, ["text.pt"], "cannot be read as a checkpoint"),
        (sample, ["pickle.pt"], "cannot be read as a checkpoint"),
        (sample, ["other.pt"], "give the ckpt.pt that train.py wrote"),
        (sample, ["run/tokenizer.pt"], "is 'vq-lcmd tokenizer 1', not 'vq-lcmd checkpoint 1'"),
        (sample, ["run/ckpt.pt", "--class", "cow"], "no class 'cow'; there are 2: cat, dog"),
        (sample, ["run/ckpt.pt", "--n", 0], "--n must be at least 1"),
        (sample, ["run/ckpt.pt", "--device", "cuda:99"], "is not available here"),
        (sample, ["run/ckpt.pt", "--temperature", 0], "temperature must be positive"),
        (sample, ["run/ckpt.pt", "--guidance", "nan"], "guidance must be a finite number"),
        (sample, ["run/ckpt.pt", "--guidance-interval", 0.5, 0.4], "must be 0 <= LOW <= HIGH <= 1"),
        (sample, ["run/ckpt.pt", "--end", 1], "both must lie in [0, 1], the end lower"),
        (sample, ["run/ckpt.pt", "--grid-of", "seed=1,2"], "of guidance, steps, temperature, end"),
        (sample, ["run/ckpt.pt", "--grid-of", "steps=1,2.5"], "give NAME=VALUE,VALUE,..."),
        (sample, ["run/ckpt.pt", "--grid-of", "steps=1,0"], "steps must be at least 1"),
        (sample, ["run/ckpt.pt", "--trajectory", "--out", "a.npz"], "give a name that ends in .png"),
        (sample, ["run/ckpt.pt", "--interpolate", "1,1"], "give two different seeds"),
        (sample, ["run/ckpt.pt", "--inpaint", "hurt/0.png"], "belong together"),
        (sample, ["run/ckpt.pt", "--mask", "hurt/0.png"], "belong together"),
        (sample, ["run/ckpt.pt", "--inpaint", "good.png", "--mask", "black.png"], "black.png has no white pixel"),
        (sample, ["run/ckpt.pt", "--inpaint", "good.png", "--mask", "text.pt"], "--mask text.pt: no image of a format"),
        (sample, ["run/ckpt.pt", "--inpaint", "none.png", "--mask", "black.png"], "--inpaint none.png: No such file"),
        (sample, ["run/ckpt.pt", "--vary", "hurt/0.png"], "--vary hurt/0.png: "),
        (sample, ["run/ckpt.pt", "--vary", "good.png", "--strength", 1.1], "time goes down from t = 1.1"),
        (sample, ["run/ckpt.pt", "--strength", 0.5], "and --strength to --vary: give both"),
        (data, ["texts"], "it holds only files like .txt"),
    ]:
        capsys.readouterr()
        assert call(program, *words) == 2, words
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and "error: " in error, (words, error)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)  # --stage tokens makes its run directory
        assert state() == before, words


class Program(torch.nn.Module):
    """TorchScript runs __setstate__ when it is loaded: "write" makes a file, "overwrite" changes one, "loop" waits."""

    def __init__(self, act: str, target: str):
        super().__init__()
        self.act, self.target = act, target

    def forward(self):
        return 0

    @torch.jit.export
    def __getstate__(self):
        return self.act, self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, str, bool]):
        self.act, self.target, self.training = state
        if self.act != "loop":
            self.training = bool(torch.from_file(self.target, True, 4, dtype=torch.uint8).fill_(65).all())
        while self.act == "loop":
            self.training = not self.training


@pytest.fixture(scope="module")
def hostile_files(tmp_path_factory):
    """{name: file} of programs that pose as checkpoints. Their targets lie beside them."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "precious").write_text("years of work")
    files = {act: folder / f"{act}.ckpt" for act in ("write", "overwrite", "loop")}
    for act, path in files.items():
        target = folder / {"write": "new", "overwrite": "precious", "loop": ""}[act]
        torch.jit.save(torch.jit.script(Program(act, str(target))), path)
    for kind, name in ((tarfile.LNKTYPE, "hard"), (tarfile.SYMTYPE, "symbolic")):
        files[name] = folder / f"{name}.ckpt"
        with tarfile.open(files[name], "w") as archive:
            for member in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(member)
                info.type, info.linkname = kind, str(folder / "precious")
                archive.addfile(info)
    return files


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_file_of_others_runs_nothing(hostile_files, small_lpips, weights, folder, run, tmp_path, capsys):
    """TorchScript and tar archives, given wherever a file is taken: one line, status 2, nothing written, no waiting.

    torch.load hands the first to TorchScript, which runs what it says, and unpacks the second.
    """
    precious = next(iter(hostile_files.values())).parent / "precious"
    before = {path: path.read_bytes() for path in precious.parent.iterdir()}
    commands = {
        "--tokenizer": (train, ["--data", folder, "--out", tmp_path / "a", "--tokenizer"], "is refused: it is"),
        "--lpips-weights": (train, ["--data", folder, "--out", tmp_path / "b", *flags(TINY), "--perceptual", 1,
                                    "--lpips-weights"], "is refused: it is"),
        "report": (vqvae, ["report"], "is refused: it is"),
        "report --lpips-weights": (vqvae, ["report", run / "tokenizer.pt", "--data", folder, "--lpips-weights"],
                                   "is refused: it is"),
        "ckpt.pt": (sample, [], "is refused: it is"),
        "--weights": (fid, [folder, folder, "--weights"], "is not the published file of Inception weights"),
    }
    for name, file in hostile_files.items():
        for where, (program, words, says) in commands.items():
            if name == "loop" and where != "--tokenizer":
                continue  # a guard that fails would wait for ever: once is enough, below by a process of its own
            capsys.readouterr()
            if name == "loop":
                done = subprocess.run([sys.executable, HERE / "train.py", *map(str, words), str(file)], timeout=60,
                                      capture_output=True, text=True)
                status, error = done.returncode, done.stderr
            else:
                status, error = call(program, *words, file), capsys.readouterr().err
            assert status == 2 and error.count("\n") == 1 and says in error, (name, where, error)
        if name == "loop":
            continue
        for ending, program in ((".pt", sample), (".npz", fid), (".npz", data)):  # posing as what it is not
            pose = tmp_path / ("pose" + ending)
            shutil.copyfile(file, pose)
            words = [folder, pose, "--weights", weights] if program is fid else [pose]
            capsys.readouterr()
            assert call(program, *words) == 2 and capsys.readouterr().err.count("\n") == 1, (name, ending)
        for part in ("tokenizer.pt", "ckpt.pt"):  # in a run directory that somebody passed on
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(run, tmp_path / "run")
            shutil.copyfile(file, tmp_path / "run" / part)
            capsys.readouterr()
            assert call(train, "--data", folder, "--out", tmp_path / "run", *flags(TINY)) == 2
            error = capsys.readouterr().err
            assert "is refused: it is" in error and error.count("\n") == 1, (name, part, error)
    assert {path: path.read_bytes() for path in precious.parent.iterdir()} == before


def test_small_files_that_claim_much(tmp_path, folder, run, capsys, monkeypatch):
    """Archives that unpack to more than they hold, sizes that are not there, a pipe: refused, and no memory taken."""
    from extras import archives, foreign_checkpoint
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:  # a header of 4 TB
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                      "shape": (1 << 20, 1024, 1024, 3)})
        archive.writestr("images.npy", header.getvalue())
    monkeypatch.setattr(archives, "LARGEST_ARRAY", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((2, 1 << 20, 1, 3), np.uint8))
    pickled = np.empty(2, object)
    np.savez(tmp_path / "pickled.npz", images=pickled)
    np.save(tmp_path / "pickled.npy", pickled)
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "b.png")
    (tmp_path / "deep" / "dataset.json").write_text("[" * 100000)
    for name, says in (("huge.npz", "more than it holds"), ("bomb.npz", "unpacks to"), ("pickled.npz", "llow_pickle"),
                       ("pickled.npy", "Python objects"), ("deep", "no whole-number label")):
        capsys.readouterr()
        assert call(train, "--data", tmp_path / name, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (name, error)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("[" * 100000)
    assert call(train, "--data", folder, "--out", tmp_path / "run", *flags(TINY)) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
    os.mkfifo(tmp_path / "deep" / "c.png")
    with pytest.raises(data.DataError, match="a pipe, no file"):  # opening it would wait for a writer
        data.load_image(str(tmp_path / "deep" / "c.png"), 8)
    # Tensors and archives of checkpoints.
    storage = torch.arange(4.0)
    for size, stride in (((1 << 40,), (0,)), ((2, 4), (4, 1)), ((3,), (2,))):
        with pytest.raises((ValueError, RuntimeError)):
            foreign_checkpoint.rebuild_tensor(storage, 0, size, stride)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, \
            zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    assert foreign_checkpoint.read_state(tmp_path / "plain.pt")["a"].shape == (1000,)
    with pytest.raises(ValueError, match="unpacks to more than the file holds"):
        foreign_checkpoint.read_state(tmp_path / "packed.pt")


# ----------------------------------------------------------------------------
# FID: the network against figures of the reference tool, the formulas against exact answers, the program.

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights in the published layout, taken for the published one, and no way to a network."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(fid_peers.random_weights(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with (mock.patch.object(fid, "WEIGHTS_SHA256", digest), mock.patch.dict(os.environ, FID_WEIGHTS=str(path)),
          mock.patch.object(torch.hub, "_hub_dir", str(path.parent / "hub" / "hub")),
          mock.patch("urllib.request.urlopen", side_effect=urllib.error.URLError("no network"))):
        yield path


URLOPEN = urllib.request.urlopen
PINNED = {  # by experiments/fid_peers.py --pin: the first three features of image 1, from torch-fidelity 0.4.0
    32: {"64": [0.0684317, 0.1240718, 0.0749409], "192": [1.7420932, 0.01508, 0.0087721],
         "768": [5.3412175, 0.0065379, 9.9729023], "2048": [1.8494594, 33.8222351, 18.4372501],
         "logits_unbiased": [-43.5916061, 11.0495071, 0.6460724], "logits": [-43.5444527, 10.9321156, 0.9105155]},
    320: {"64": [0.1625426, 0.1543232, 0.0932495], "192": [1.9205581, 0.010539, 0.0077472],
          "768": [5.8495312, 0.0069992, 10.7014875], "2048": [2.0481808, 36.1634178, 19.9357338],
          "logits_unbiased": [-47.9658051, 12.9529419, -0.7635937], "logits": [-47.9186516, 12.8355503, -0.4991505]},
}


def test_inception(weights):
    """Layout of the published file; features of the reference tool; folding, batching and sizes change nothing."""
    network, state = fid.InceptionV3(), torch.load(weights)
    assert len(state) == 472 and sum(p.numel() for p in network.parameters()) == 23_850_960
    network.load_state_dict(state, strict=True)
    counters = {name: torch.tensor(7) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    assert len(counters) == 94
    network.load_state_dict(state | counters, strict=True)
    seen = []
    network.eval().Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    plain = network(fid_peers.test_images(32))
    assert torch.equal(plain["spatial"].view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))
    folded = fid.load_inception(weights, "cpu")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    for size, pinned in PINNED.items():
        taps = folded(fid_peers.test_images(size))
        for name, values in pinned.items():
            # float32 through 94 layers, in another order of summation: some 2^-24 each, about 5e-6 of the scale.
            scale = float(taps[name].square().mean().sqrt())
            close(taps[name][1, :3], torch.tensor(values), rtol=0, atol=1e-5 * scale)
            if size == 32:
                close(taps[name], plain[name], rtol=0, atol=1e-5 * scale)
    images = [fid_peers.test_images(size)[1] for size in (32, 320)]
    mixed = folded(images)["2048"]
    close(mixed[1:], taps["2048"][1:], rtol=0, atol=1e-5 * float(mixed.square().mean().sqrt()))
    for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="must be uint8 of shape"):
            folded(wrong)
    with pytest.raises(ValueError, match="resize must be one of tf, pytorch-fid, clean"):
        fid.InceptionV3("bicubic")


@pytest.mark.parametrize("size", [8, 299, 640])
def test_resizing(size):
    """TensorFlow's bilinear takes a ramp to a ramp from pixel 0 on; the clean one is Pillow's bicubic in floats."""
    at = torch.minimum(torch.arange(299, dtype=torch.float64) * size / 299, f64(size - 1))
    i, j = torch.arange(size)[:, None], torch.arange(size)
    ramp = (0.1 * i + 0.2 * j).float().expand(1, 3, size, size)
    # Positions and values are float32, below 640 and 192: a rounding of 2^-24 each, in a handful of operations.
    close(fid.resize_tf1(ramp)[0, 0].double(), 0.1 * at[:, None] + 0.2 * at, rtol=0, atol=8 * 640 * 2 ** -24)
    noise = torch.randint(256, (1, 3, size, size), generator=seeded(size)).float()
    if size == 299:
        assert torch.equal(fid.resize_tf1(noise), noise)
    pillow = [np.asarray(Image.fromarray(c.numpy()).resize((299, 299), Image.Resampling.BICUBIC)) for c in noise[0]]
    expected = (torch.from_numpy(np.stack(pillow)).clip(0, 255) - 128) / 128
    close(fid.PREPROCESS["clean"](noise)[0], expected, rtol=0, atol=4 * 2 ** -23)  # float32 after each of two passes
    white = fid.PREPROCESS["pytorch-fid"](torch.full((1, 3, size, size), 255.0))
    close(white, torch.ones(1, 3, 299, 299), rtol=0, atol=8 * 2 ** -24)


def test_frechet_distance():
    """Gaussians whose distance is known: commuting covariances, any rank; and itself."""
    rng = np.random.default_rng(0)
    d, zero = 12, np.zeros(12)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    for low in (1e-8, 1.0):  # condition number 1e9, and below 10
        a, b = low + rng.uniform(0, 9, d) * (rng.uniform(size=d) < 0.6), low + rng.uniform(0, 9, d)
        mean = rng.standard_normal(d)
        expected = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
        s1, s2 = turn * a @ turn.T, turn * b @ turn.T
        # eigvalsh is exact to some 2^-52 of the largest; its square root to the root of that, for the smallest ones
        assert fid.frechet_distance(mean, s1, zero, s2) == pytest.approx(expected, abs=1e-6 if low < 1 else 1e-12)
        assert fid.frechet_distance(mean, s2, zero, s1) == pytest.approx(expected, abs=1e-6 if low < 1 else 1e-12)
        assert fid.frechet_distance(mean, s1, mean, s1) < 1e-12 * np.trace(s1)
    # Fewer images than features: Tr (S1 S2)^(1/2) is the nuclear norm of X Y^T, from the centred features themselves.
    x, y = rng.standard_normal((5, d)), rng.standard_normal((4, d)) + 1
    x0, y0 = x - x.mean(0), y - y.mean(0)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = (np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s1) + np.trace(s2)
                - 2 * np.linalg.svd(x0 @ y0.T / np.sqrt(4 * 3), compute_uv=False).sum())
    assert fid.frechet_distance(x.mean(0), s1, y.mean(0), s2) == pytest.approx(expected, abs=1e-12)
    assert fid.frechet_distance(zero, 0 * s1, zero + 1, s2) == pytest.approx(12 + np.trace(s2), abs=1e-12)
    with pytest.raises(fid.FIDError, match="different widths"):
        fid.frechet_distance(zero, s1, np.zeros(3), np.eye(3))
    with pytest.raises(fid.FIDError, match="at least two images"):
        fid.frechet_distance(zero, s1 * np.nan, zero, s2)


def test_kernel_distance_inception_score_precision_recall():
    """Against their definitions, written as loops over a few points."""
    x, y = torch.randn(7, 3, generator=seeded(0)), torch.randn(7, 3, generator=seeded(1)) + 1
    pairs = [(i, j) for i in range(7) for j in range(7)]

    def k(a, b):
        return float(a.double() @ b.double() / 3 + 1) ** 3

    expected = (sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 42
                - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 49)
    mean, deviation = fid.kernel_distance(x, y, subsets=3)  # every subset is the whole set
    assert mean == pytest.approx(expected, rel=1e-12) and deviation < 1e-12 * mean
    small = [fid.kernel_distance(x, y, subsets=500, size=m)[0] for m in (2, 3)]
    assert small == pytest.approx([expected] * 2, rel=0.2)  # unbiased for every size, within five standard errors
    certain = 100 * F.one_hot(torch.arange(40) % 4, 9).float()
    assert fid.inception_score(certain, splits=1) == pytest.approx((4, 0))  # four classes, equally often, each certain
    assert fid.inception_score(torch.randn(1, 9).expand(40, 9)) == pytest.approx((1, 0))  # always the same answer
    real, fake = torch.randn(40, 2, generator=seeded(2)), torch.randn(50, 2, generator=seeded(3)) * 2

    def covered(points, centres):
        inside = 0
        for p in points:
            radii = [sorted(float((c - o).norm()) for o in centres)[3] for c in centres]
            inside += any(float((p - c).norm()) <= r for c, r in zip(centres, radii, strict=True))
        return inside / len(points)

    assert fid.precision_recall(real, fake, tile=7) == pytest.approx((covered(fake, real), covered(real, fake)))
    assert fid.precision_recall(real, real) == (1, 1) and fid.precision_recall(real, real + 99) == (0, 0)
    for few in (fid.kernel_distance, fid.precision_recall):
        with pytest.raises(fid.FIDError, match="at least"):
            few(real[:1], fake)


class Pixels(torch.nn.Module):
    """In place of the network, and a thousand times faster: "features" are pixels of what it would read."""

    def __init__(self, resize="tf"):
        super().__init__()
        self.resize, self.fc = resize, torch.nn.Linear(1, 1)

    prepare = fid.InceptionV3.prepare

    def forward(self, images):
        f = self.prepare(images).flatten(1)[:, ::59]
        return {"2048": f[:, :2048], "spatial": f[:, -2023:], "logits_unbiased": f[:, 500:1508]}


def test_measure():
    """Sums that meet in float64 are NumPy's mean and covariance; kept features are spread evenly, in order."""
    images = torch.randint(256, (100, 3, 8, 8), dtype=torch.uint8, generator=seeded(0))
    source, taps = fid.Decoded(data.ImageSet([0] * 100, [], 8, pixels=images)), Pixels()(images)
    source.chunk = 30
    found = fid.measure(source, Pixels(), batch=7, keep=4)
    for tap in ("2048", "spatial"):
        np.testing.assert_allclose(found.mean[tap], taps[tap].double().mean(0), atol=1e-14)  # 100 numbers below 1
        np.testing.assert_allclose(found.cov[tap], np.cov(taps[tap].double().numpy(), rowvar=False), atol=1e-13)
    assert torch.equal(found.features, taps["2048"][[0, 33, 66, 99]]) and found.n == 100
    assert torch.equal(found.logits, taps["logits_unbiased"][[0, 33, 66, 99]])
    assert fid.measure(source, Pixels(), keep=0).features is None
    source.n = 1
    with pytest.raises(fid.FIDError, match="1 image; a covariance needs at least two"):
        fid.measure(source, Pixels())


def scores_of(path):
    return {key: value for key, value in json.loads(path.read_text()).items() if isinstance(value, float)}


@pytest.fixture
def fast(weights):
    with mock.patch.object(fid, "load_inception", lambda path, device, resize="tf": Pixels(resize)):
        yield


def test_fid_program(fast, weights, folder, run, tmp_path, capsys):
    """The same images as folder, zip, array or statistics give the same scores; a checkpoint's are those it draws."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, high, (n, 12, 12, 3), np.uint8)
              for name, n, high in (("real", 9, 256), ("fake", 7, 200))}
    for name, pixels in arrays.items():
        (tmp_path / name).mkdir()
        np.savez(tmp_path / f"{name}.npz", pixels)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for i, image in enumerate(pixels):
                Image.fromarray(image).save(tmp_path / name / f"{i}.png")
                archive.write(tmp_path / name / f"{i}.png", f"in/{i}.PNG")

    def score(*words, status=0):
        capsys.readouterr()
        assert call(fid, *[tmp_path / w if Path(str(w)).stem in ("real", "fake", "stats") else w for w in words],
                    *(["--json", tmp_path / "scores.json"] if status == 0 else [])) == status, words
        return scores_of(tmp_path / "scores.json") if status == 0 else capsys.readouterr().err

    baseline = score("real", "fake")
    printed = capsys.readouterr().out
    assert set(baseline) == {"fid", "sfid", "kid", "kid_std", "is", "is_std", "precision", "recall"}
    assert f"FID-7            {baseline['fid']:.4f}" in printed and "not full rank" in printed and "9 images" in printed
    near = pytest.approx(baseline, rel=1e-9)
    assert score("real.zip", "fake.npz", "--batch", 3, "--device", "cpu") == near
    assert score("real.npz", "fake.zip", "--weights", weights) == near
    assert score("real", "real")["fid"] == 0
    # statistics: written once, of one side or of two; FID and sFID need no more
    capsys.readouterr()
    assert call(fid, tmp_path / "real", "--save-stats", tmp_path / "stats.npz") == 0
    by_file = score("stats.npz", "fake")
    assert by_file == pytest.approx({key: baseline[key] for key in by_file}, rel=1e-9)
    assert set(baseline) - set(by_file) == {"kid", "kid_std", "precision", "recall"}
    adm = dict(np.load(tmp_path / "stats.npz"))
    np.savez(tmp_path / "real.npz", arr_0=arrays["real"], **{k: adm[k] for k in ("mu", "sigma", "mu_s", "sigma_s")})
    assert score("real.npz", "fake") == near and "does not say how images were resized" in capsys.readouterr().out
    np.savez(tmp_path / "real.npz", mu=adm["mu"], sigma=adm["sigma"])  # pytorch-fid's
    assert score("real.npz", "fake", "--save-stats", tmp_path / "deep" / "copy.npz").keys() == {"fid", "is", "is_std"}
    assert dict(np.load(tmp_path / "deep" / "copy.npz")).keys() == {"mu", "sigma"}
    assert "made with --resize tf, not clean" in score("stats.npz", "fake", "--resize", "clean", status=2)
    for mode in ("pytorch-fid", "clean"):
        assert score("real", "fake", "--resize", mode) != near
    assert score("real", "fake", "--size", 6) != near
    # a checkpoint: samples like those of sample.py, the real side read as for training
    bundle = sample.load_checkpoint(run / "ckpt.pt", torch.device("cpu"))
    drawn = sample.sample_images(bundle, torch.arange(6) // 3, seed=5, steps=2, guidance=2.0, sampler="ancestral")
    later = sample.sample_images(bundle, torch.ones(2, dtype=torch.int64), seed=5, first=4, **bundle.sampling | {
        "steps": 2, "guidance": 2.0})
    assert torch.equal(later, drawn[4:])
    np.savez(tmp_path / "fake.npz", drawn.permute(0, 2, 3, 1).numpy())
    train_set, _ = data.find(str(folder)).load(8)
    np.savez(tmp_path / "real.npz", train_set.pixels.permute(0, 2, 3, 1).numpy())
    drawn = score(folder, run / "ckpt.pt", "--n", 6, "--steps", 2, "--guidance", 2, "--seed", 5)
    printed = capsys.readouterr().out
    assert "38 training images, cropped and resized to 8 px" in printed and "6 samples of step 8" in printed
    assert drawn == pytest.approx(score("real.npz", "fake.npz"), rel=1e-9)
    assert parser_flags(fid) == sorted(["n", "steps", "guidance", "seed", "size", "root", "resize", "weights",
                                        "save_stats", "json", "batch", "device"])


def test_two_processes_share_the_work(weights, tmp_path):
    """torchrun: each process measures a share, and the scores are those of one process. With the real network."""
    for name, n in (("real", 5), ("fake", 4)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(fid_peers.test_images(40 + n, n).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image[:40 + i]).save(tmp_path / name / f"{i}.png")
    words = [tmp_path / "real", tmp_path / "fake", "--json"]
    assert call(fid, *words, tmp_path / "one.json") == 0
    (tmp_path / "two.py").write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport fid\n"
                                     f"fid.WEIGHTS_SHA256 = {fid.WEIGHTS_SHA256!r}\nfid.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               tmp_path / "two.py", *words, tmp_path / "two.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert scores_of(tmp_path / "two.json") == pytest.approx(scores_of(tmp_path / "one.json"), rel=1e-4)
    assert done.stdout.count("FID-4 ") == 2  # FID and sFID, printed once


def test_train_evaluates_fid(fast, weights, folder, run, tmp_path, capsys, monkeypatch):
    """--eval-fid: the scores of fid.py join metrics.json; training statistics are measured once; no weights, no run."""
    shutil.copytree(run, tmp_path / "run")
    words = ["--data", folder, "--out", tmp_path / "run", *flags(TINY), "--eval-fid"]
    assert call(train, *words, 5) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads((run / "metrics.json").read_text()).items() <= found.items() and found["fid"]["n"] == 5
    assert call(fid, folder, tmp_path / "run" / "ckpt.pt", "--n", 5, "--json", tmp_path / "scores.json") == 0
    expected = scores_of(tmp_path / "scores.json")
    assert found["fid"] == pytest.approx({key: expected[key] for key in ("fid", "sfid", "is", "is_std")} | {"n": 5})
    assert len(list((weights.parent / "hub" / "vq-lcmd").glob("fid-*.npz"))) == 1
    measured = []
    monkeypatch.setattr(fid, "measure", lambda *a, f=fid.measure, **k: measured.append(k["name"]) or f(*a, **k))
    assert call(train, *words, 6) == 0 and measured == ["FID, samples"]
    capsys.readouterr()
    assert call(train, *words, 6) == 0 and "fid: complete (6 samples)" in capsys.readouterr().out
    monkeypatch.delenv("FID_WEIGHTS")
    assert call(train, "--data", folder, "--out", tmp_path / "new", "--eval-fid", 5) == 2
    error = capsys.readouterr().err
    assert "no network" in error and fid.WEIGHTS_URL in error and error.count("\n") == 1
    assert "give --weights PATH or set $FID_WEIGHTS" in error
    assert not (tmp_path / "new").exists()


def test_bad_input_of_fid(fast, weights, folder, run, tmp_path, capsys, monkeypatch):
    """One line, exit status 2; a download goes on where it stopped, and a damaged file is refused by name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "hurt")
    (tmp_path / "hurt" / "cat" / "x.png").write_bytes(b"\x89PNG, and then nothing")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save("one/1.png")
    (tmp_path / "text.zip").write_text("no archive")
    np.savez("float.npz", np.zeros((4, 8, 8, 3)))
    np.savez("other.npz", weights=np.zeros(3))
    np.savez("narrow.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez("wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for words, says in [
        ([folder, folder, "--weights", "cut.pth"], "cut.pth is not the published file of Inception weights"),
        ([folder, folder, "--weights", "none.pth"], "no Inception weights at none.pth: download https://"),
        ([folder, "nowhere"], "no such folder"),
        ([folder, "empty"], "no images in empty"),
        ([folder, "hurt"], "cat/x.png cannot be used (no image of a format that is known): repair it"),
        ([folder, "one"], "one image in one: at least two are needed"),
        ([folder, "text.zip"], "text.zip cannot be read as a zip"),
        ([folder, "float.npz"], "arr_0 must be uint8 of shape (n, H, W, 3), is float64 (4, 8, 8, 3)"),
        ([folder, "other.npz"], "other.npz holds weights: expected arr_0 (images), or mu and sigma"),
        (["narrow.npz", "wide.npz"], "statistics of different widths"),
        ([folder], "give REAL and FAKE, or one of them and --save-stats"),
        ([folder, "--save-stats", "stats"], "--save-stats stats: the name must end in .npz"),
        ([run / "ckpt.pt", folder], "a checkpoint can only stand at FAKE"),
        ([folder, run / "tokenizer.pt"], "not 'vq-lcmd checkpoint 1'"),
        ([folder, folder, "--n", 5], "--n, --steps and --guidance are for a checkpoint"),
        ([folder, folder, "--batch", 0], "--batch must be at least 1"),
        ([folder, folder, "--device", "cuda:99"], "is not available here"),
    ]:
        capsys.readouterr()
        assert call(fid, *words) == 2, words
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (words, error)


def test_weights_download(tmp_path, monkeypatch):
    """A download that breaks off goes on from there; the file is refused if it is altered afterwards."""
    content, asked = np.random.default_rng(0).bytes(3 << 20), []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            first = int(re.findall(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
            asked.append(first)
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            self.wfile.write(content[first:] if first else content[:2 << 20])  # the first time, it breaks off

        def log_message(self, *words):
            pass

    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest())
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(fid, "WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/inception.pth")
        path = tmp_path / "checkpoints" / "inception.pth"
        assert fid.find_weights() == path and path.read_bytes() == content and asked == [0, 2 << 20]
        assert fid.find_weights() == path and len(asked) == 2  # it is there
        server.shutdown()
    path.write_bytes(content[:-1])
    with pytest.raises(fid.FIDError, match=r"inception.pth is not the published file"):
        fid.find_weights()


# ----------------------------------------------------------------------------
# The engine: passes, processes, kills.

LATE = ["--stage", "diffusion", *flags(TINY)]  # what a copy of `run` without its checkpoint still has to do


@pytest.fixture
def undone(run, tmp_path):
    """A run whose tokens are there and whose denoiser is not: its directory."""
    shutil.copytree(run, tmp_path / "pets", ignore=lambda *_: ["ckpt.pt", "diffusion.csv", "evaluation.csv",
                                                               "metrics.json"])
    return tmp_path / "pets"


def weights_of(out):
    """All weights of a run's checkpoint in one vector: the model's, the EMA's, the optimizer's."""
    content = torch.load(out / "ckpt.pt", weights_only=True)
    moments = [value.flatten() for state in content["optimizer"]["state"].values() for value in state.values()]
    return torch.cat([*(v.flatten() for name in ("model", "ema") for v in content[name].values()), *moments])


@pytest.mark.parametrize("parts", [2, 5, 12])
def test_shares_add_up(parts):
    """However the rows are divided, terms and gradient are those of the whole batch; all in float64."""
    model, schedule = small_model(num_classes=2), ShiftedCosine(0.4, -5, 5)
    x, options = torch.randint(6, (12, 4), generator=seeded(1)), dict(w_rec=0.7, w_diff=0.3, w_cm=0.9, max_snr=3.0)
    drawn = losses.draw(model, x, x[:, 0] % 2, seeded(2), p_drop=0.9, rec_fraction=0.4)
    narrow = losses.draw(model, x, x[:, 0] % 2, seeded(2), p_drop=0.9, rec_fraction=0.4, max_gap=0.01)[0]
    assert all(torch.equal(drawn[0][name], narrow[name]) for name in narrow if name != "s")
    assert (narrow["s"] <= narrow["t"]).all() and (narrow["s"] >= narrow["t"] - 0.01001).all()
    loss, terms = losses.partial_loss(model, model, schedule, *drawn, **options)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = [losses.partial_loss(model, model, schedule, *losses.share(*drawn, i, parts), **options)
             for i in range(parts)]
    close(sum(t for _, t in found), terms, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(sum(part for part, _ in found), list(model.parameters()))
    for one, other in zip(gradient, expected, strict=True):
        close(one, other, rtol=1e-9, atol=1e-12)


def test_batches_walk_through_epochs():
    """Every item once per epoch, in another order each time, whatever the batch; a batch may span several."""
    walk = np.concatenate([train.batch_indices(7, 5, 0, "diffusion", step) for step in range(7)]).reshape(5, 7)
    assert (np.sort(walk) == np.arange(7)).all() and len({tuple(epoch) for epoch in walk.tolist()}) == 5
    assert np.array_equal(train.batch_indices(7, 35, 0, "diffusion", 0), walk.flatten())


def test_passes_and_recomputation(undone, run, folder, capsys):
    """--micro-batch changes nothing but rounding, --activation-checkpointing not even that; --compile compiles."""
    words = ["--data", folder, "--out", undone, *LATE]
    expected = weights_of(run)
    compiled = []
    for flag in ["--micro-batch", 1], ["--micro-batch", 4], ["--activation-checkpointing"], ["--compile"]:
        with mock.patch.object(torch, "compile", lambda f: compiled.append(f) or f), mock.patch.object(
                train, "partial_loss", wraps=train.partial_loss) as passes:
            assert call(train, *words, *flag) == 0
        assert passes.call_count == 8 * (2 if flag[0] == "--micro-batch" else 1) * (1 + (flag[-1] == 1))
        if flag[0] == "--micro-batch":  # AdamW divides by gradients that may be tiny: rounding times some hundred
            close(weights_of(undone), expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(weights_of(undone), expected)
        (undone / "ckpt.pt").unlink()
    assert len(compiled) == 1
    with mock.patch.object(torch, "compile", side_effect=torch._dynamo.exc.TorchDynamoException("no compiler")):
        assert call(train, *words, "--compile") == 1
    assert "torch.compile does not work here (no compiler): leave --compile away" in capsys.readouterr().err
    assert call(train, *words, "--fsdp") == 2 and "start them by torchrun" in capsys.readouterr().err


def one_of_two(rank, jobs):
    """What torchrun starts twice: train.py, or sample.py, with each of some command lines."""
    train.DRAWS = train.FINAL_DRAWS = 256
    for port, words in jobs:
        program = train if str(words[0]).startswith("--") else sample
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        assert call(program, *words) == 0


def test_two_processes_train_as_one(run, folder, tmp_path):
    """Global batch 64, 20 steps: the weights of one process to 1e-5. So with --fsdp, which goes on from those; and the
    tokenizer, its discriminator and flips included."""
    settings = {k: v for k, v in TINY.items() if k not in train.TOKENIZER_OPTIONS.values()}
    settings |= dict(steps=20, batch=64, depth=2, teacher="ema", save_every=10, sample_every=10)
    words, (one, two, split) = ["--data", run / "tokens.npy", *flags(settings)], (tmp_path / name for name in "abc")
    assert call(train, *words, "--out", one) == 0
    expected = weights_of(one)
    shutil.copytree(one, split)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        ports = [server.getsockname()[1] for server in servers]
    images = ["--data", folder, *flags(TINY | {"flip": True, "tokenizer_steps": 6, "log_every": 1})]
    options = ["--fsdp", "--activation-checkpointing", "--micro-batch", 20, "--steps", 25, "--out", split]
    drawing = [run / "ckpt.pt", "--n", 21, "--batch", 4, "--out"]
    jobs = zip(ports, ([*words, "--out", two], words + options, [*images, "--out", tmp_path / "e"],
                       [*drawing, tmp_path / "e.npz"]), strict=True)
    torch.multiprocessing.spawn(one_of_two, (list(jobs),), 2)
    assert call(train, *images, "--stage", "tokenizer", "--out", tmp_path / "d") == 0
    assert call(sample, *drawing, tmp_path / "d.npz") == 0
    assert np.array_equal(*(np.load(tmp_path / name)["arr_0"] for name in ("d.npz", "e.npz")))
    by_one, by_two = (contents(tmp_path / name)["tokenizer.csv"] for name in "de")
    for a, b in zip(by_one, by_two, strict=True):  # five decimals of each term
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()}, abs=2e-5)
    assert float(by_one[-1]["adversarial"]) and (tmp_path / "e" / "ckpt.pt").exists()
    close(weights_of(two), expected, rtol=0, atol=1e-5)
    assert contents(two)["samples_000010.png"] == contents(one)["samples_000010.png"]
    for steps in (25, 26):  # what FSDP2 wrote is a checkpoint like any other
        assert call(train, *words, "--out", one, "--steps", steps) == 0
        close(weights_of(split), weights_of(one), rtol=0, atol=1e-5)
        assert {path.name for path in split.iterdir()} == {path.name for path in one.iterdir()}
        assert steps == 26 or call(train, *words, "--out", split, "--steps", 26) == 0


def test_two_kills(folder, run, tmp_path):
    """SIGKILL at two random moments, then the same command: every file is the undisturbed run's."""
    out, moments = tmp_path / "pets", random.Random()
    words = ["--data", folder, "--out", out, *flags(TINY)]
    for _ in range(2):
        kills.start(words, moments.uniform(0, 0.6))
    assert call(train, *words) == 0 and contents(out) == contents(run)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_the_checkpoint_before(damage, undone, run, folder, capsys):
    """A last checkpoint that is truncated, or was being renamed: the run goes on from the one before, and says so."""
    words, path = ["--data", folder, "--out", undone, *LATE, "--save-every", 2], undone / "ckpt.pt"
    real = train.write_atomically

    def stop_after(file, write, **options):
        real(file, write, **options)
        if file == path and torch.load(path, weights_only=True)["step"] == 6:
            raise MemoryError

    with mock.patch.object(train, "write_atomically", stop_after), pytest.raises(MemoryError):
        call(train, *words)
    assert torch.load(sample.previous(path), weights_only=True)["step"] == 4
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
        assert call(sample, path) == 2 and "ckpt.previous.pt is the one before" in capsys.readouterr().err
    else:
        path.unlink()
    assert call(train, *words) == 0
    said = capsys.readouterr().out
    assert "going on from there, step 4" in said and "continuing at step 4" in said
    assert contents(undone) == contents(run)


def test_half_a_line(tmp_path):
    """What a kill leaves of a table: rows after the checkpoint, half a row, half a header, an empty file."""
    path = tmp_path / "a.csv"
    for text, left in (("step,loss\n2,5\n4,6\n6,7\n", "step,loss\n2,5\n4,6\n"),
                       ("step,loss\n2,5\n4", "step,loss\n2,5\n"), ("step,lo", None), ("", None)):
        path.write_text(text)
        train.trim_rows(path, 4)
        assert (path.read_text() if path.exists() else None) == left


def test_one_process_per_run(folder, run, tmp_path, capsys):
    """A run directory that another process works in is refused, until that process dies, however it dies."""
    shutil.copytree(run, tmp_path / "pets")
    words = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]
    hold = "import pathlib, sys, time, train; x = train.lock(pathlib.Path(sys.argv[1])); print('held'); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-uc", hold, tmp_path / "pets"], stdout=subprocess.PIPE, cwd=HERE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert call(train, *words) == 2 and "is in use by another process" in capsys.readouterr().err
        holder.kill()
    assert call(train, *words) == 0
    with mock.patch.object(train, "fcntl", None):  # Windows: no lock, but it works
        assert call(train, *words) == 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite(what, undone, run, folder, capsys):
    """The step, its terms, and the checkpoint before it, unharmed; nothing is replaced by a zero in silence."""
    words, real, calls = ["--data", folder, "--out", undone, *LATE, "--log-every", 4], train.partial_loss, []

    def broken(*args, **options):
        loss, terms = real(*args, **options)
        calls.append(1)
        if len(calls) != 6:
            return loss, terms
        # A square root at 0: the value is finite, its slope is not.
        return (loss * math.nan, terms * math.nan) if what == "loss" else (loss + (loss - loss).abs().sqrt(), terms)

    with mock.patch.object(train, "partial_loss", broken):
        assert call(train, *words) == 1
    said = capsys.readouterr().err
    assert "loss or its gradient is not finite at step 6 (rec " in said and said.count("\n") == 1
    assert "norm nan" in said and ("rec nan" in said) == (what == "loss") and "last checkpoint is kept" in said
    assert torch.load(undone / "ckpt.pt", weights_only=True)["step"] == 4
    assert call(train, *words) == 0 and torch.equal(weights_of(undone), weights_of(run))


def test_stopping_twice(folder, tmp_path):
    """A second Ctrl-C ends a run at once; a second kill, as schedulers send it, does not keep it from saving."""
    with mock.patch.object(train, "SIGNALS", [signal.SIGTERM]) as received:
        train.on_signal(signal.SIGTERM, None)
        train.on_signal(signal.SIGINT, None)
        with pytest.raises(KeyboardInterrupt):
            train.on_signal(signal.SIGINT, None)
        assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]


def test_speed_program(capsys, monkeypatch):
    """experiments/speed.py with all it can do at tiny sizes, compilers left out; FLOPs by PyTorch's own counter."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    options = dict(size=8, f=4, K=8, D=4, width=16, depth=1, heads=2, batch=6, micro_batch=3, repeat=1, inner=1,
                   sample_steps=2, threads=1, preset="toy", device="cpu", compile=True, measures=True, profile=True)
    assert parser_flags(speed) == sorted(options)
    assert call(speed, *flags(options)) == 0
    text = capsys.readouterr().out
    ways = dict(re.findall(r"^\| ([^|]+) \| [\d.e-]+ \| ([\d.]+) \|", text, re.M))
    assert len(ways) == 8 + 5 + 4 and ways["denoiser"] == "1.00" and "aten::addmm" in text
    model = EmbeddingDiffusion(8, (4, 4), 4, 16, 3, 2)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(1, 16, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    small = 2 * (128 * 16 + 16 * 16 + 2 * 16 * 16)  # conditioning and last modulation, which it leaves out
    likelihood = 2 * 16 * (4 + 1) * 8  # an in-place product, which PyTorch does not count
    assert counter.get_total_flops() - small + likelihood == speed.forward_flops(model)


# ----------------------------------------------------------------------------
# Evidence: experiments/baselines.py and markov_chain.py.

@pytest.mark.parametrize("kind", baselines.KINDS)
def test_discrete_baselines(kind, monkeypatch):
    """One token of known probabilities, the exact posterior as the network: the bound is the entropy and the samples'
    distribution the right one, to the last digit for any number of steps; the estimator agrees within 4 errors."""
    monkeypatch.setattr(baselines, "T", 7)
    p_0, eye = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    entropy, (b, c) = float(-(p_0 * p_0.log()).sum()), baselines.KINDS[kind]
    state = torch.tensor([b / 3] * 3 + [c], dtype=torch.float64)  # of a token at t = 1

    def corrupted(t):
        a, b, c = baselines.rates(kind, torch.as_tensor(t, dtype=torch.float64))
        return p_0[:, None] * torch.cat([a * eye + b / 3, c.expand(3, 1)], 1)                      # p(x_0 = k, x_t = i)

    def posterior_of(t):
        joint = corrupted(t)
        return (joint / joint.sum(0).clamp(min=1e-300)).T                                          # (4, 3)

    bound, states = 0.0, torch.arange(4)
    for i in range(7, 0, -1):
        t, s = (torch.tensor(n / 7, dtype=torch.float64) for n in (i, i - 1))
        ours = baselines.reverse(kind, posterior_of(t), states, t, s)
        state = state @ ours
        for k in range(3):
            truth = baselines.reverse(kind, eye[k].expand(4, 3), states, t, s)
            kl = torch.xlogy(truth, truth) - torch.xlogy(truth, ours.clamp(min=1e-300))
            bound += float(corrupted(t)[k] @ kl.sum(1))
    assert bound == pytest.approx(entropy, abs=1e-12)
    close(state, torch.cat([p_0, torch.zeros(1)]).double(), rtol=0, atol=1e-12)
    monkeypatch.setattr(baselines, "predict", lambda model, schedule, x_t, t, *_: torch.stack(
        [posterior_of(time)[i] for i, time in zip(x_t.tolist(), t.tolist(), strict=True)]).clamp(min=1e-30).log())
    model, x = SimpleNamespace(K=3, N=1), torch.multinomial(p_0, 1500, replacement=True, generator=seeded(0))[:, None]
    draws = baselines.loss(kind, model, None, x, seeded(1))
    assert abs(float(draws.mean()) - entropy) < 4 * float(draws.std()) / 1500 ** 0.5 + 1e-9
    drawn = baselines.sample(kind, model, None, 1500, 5, seeded(2))
    assert scipy.stats.chisquare(torch.bincount(drawn.flatten(), minlength=3), 1500 * p_0).pvalue > 1e-3
    if kind == "absorbing":
        drawn = baselines.sample_by_confidence(model, None, 1500, 1, seeded(3))
        assert scipy.stats.chisquare(torch.bincount(drawn.flatten(), minlength=3), 1500 * p_0).pvalue > 1e-3


def test_markov_chain(tmp_path, monkeypatch, capsys):
    """Entropy and score by enumeration; rows of every kind run, and the same command again computes nothing."""
    monkeypatch.setattr(markov_chain, "K", 4)
    monkeypatch.setattr(markov_chain, "N", 3)
    monkeypatch.setattr(markov_chain, "BATCH", 8)
    chain = markov_chain.Chain()
    every = np.array(list(itertools.product(range(4), repeat=3)))
    p = chain.start[every[:, 0]] * chain.transition[every[:, 0], every[:, 1]] * chain.transition[
        every[:, 1], every[:, 2]]
    assert p.sum() == pytest.approx(1, abs=1e-12) and chain.bigrams.sum(0) == pytest.approx(chain.start)
    assert chain.entropy() == pytest.approx(-(p * np.log(p)).sum() / 3, abs=1e-12)
    drawn = chain.draw(20000, np.random.default_rng(0))
    counts = np.bincount(drawn @ [16, 4, 1], minlength=64)
    assert scipy.stats.chisquare(counts, 20000 * p).pvalue > 1e-3
    nll, distance = chain.score(every[:1])  # 0, 0, 0: all bigrams are (0, 0)
    assert nll == pytest.approx(-np.log(p[0]) / 3) and distance == pytest.approx(1 - chain.bigrams[0, 0])
    rows = ["rec + diff + CM, frozen table", "plain cross-entropy", "discrete: absorbing", "train.py's defaults"]
    words = ["--seeds", 1, "--steps", 2, "--samples", 20, "--out", tmp_path / "m", "--only", *rows]
    assert call(markov_chain, *words[:-1]) == 0
    first = (tmp_path / "m" / "results.csv").read_text()
    assert call(markov_chain, *words) == 0
    lines = list(csv.DictReader((tmp_path / "m" / "results.csv").open()))
    assert (tmp_path / "m" / "results.csv").read_text().startswith(first) and [d["row"] for d in lines] == rows
    assert all(float(line["bound"]) > 0 and float(line["NLL 50"]) > 0 for line in lines)
    words[words.index("--samples") + 1] = 10  # another number of samples is another run, and a table of its own
    assert call(markov_chain, *words[:-len(rows)], rows[1]) == 0
    assert "| 1 |" in (tmp_path / "m" / "results.md").read_text() and rows[0] not in (
        tmp_path / "m" / "results.md").read_text()
    words[words.index("--samples") + 1] = 20
    assert call(markov_chain, *words) == 0
    text = (tmp_path / "m" / "results.md").read_text()
    assert all(f"| {row} | 1 |" in text for row in rows) and text in capsys.readouterr().out


def test_markov_chain_side_by_side(tmp_path):
    """Two processes: every line is there once, with the figures of one process."""
    words = ["--seeds", 2, "--steps", 1, "--samples", 10, "--only", "plain cross-entropy"]
    found = []
    for jobs in (1, 2):
        assert call(markov_chain, *words, "--jobs", jobs, "--out", tmp_path / str(jobs)) == 0
        lines = list(csv.DictReader((tmp_path / str(jobs) / "results.csv").open()))
        found.append(sorted([line[c] for c in markov_chain.COLUMNS[:-4]] for line in lines))
    assert found[0] == found[1] and len(found[0]) == 2


def test_compare(folder, run, tmp_path, monkeypatch, capsys):
    """Rows of every kind; VQ-LCMD's is train.py bit for bit; the same command again computes nothing."""
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=lambda words, **_: SimpleNamespace(
        returncode=call(train, *words[2:]) if words[1].endswith("train.py") else 0, stdout="abc\n")))
    monkeypatch.setattr(fid, "kernel_distance", functools.partial(fid.kernel_distance, subsets=2))
    rows = ["VQ-LCMD", "absorbing", "cross-entropy", "frozen random table", "gap at most 0.1"]
    words = ["--data", folder, "--budget", TINY["steps"], "--n", 4, "--sampling-steps", 1, 2, "--classifier-steps", 2,
             "--out", tmp_path / "c", "--only", *rows, *flags(TINY)]
    assert call(compare, *words) == 0
    found, lines = torch.load(run / "ckpt.pt", weights_only=True)["ema"], compare.read(tmp_path / "c" / "results.csv")
    state = torch.load(tmp_path / "c" / f"VQ-LCMD-0-{TINY['steps']}.pt", weights_only=True)
    assert all(torch.equal(state["ema"][name], value) for name, value in found.items())
    frozen = [torch.load(tmp_path / "c" / f"{name}-0-8.pt", weights_only=True)["curve"]
              for name in ("frozen_random_table", "gap_at_most_0.1")]
    assert frozen[0][0][1:] == frozen[0][-1][1:] and frozen[1][0][1:] != frozen[1][-1][1:]
    metrics = json.loads((run / "metrics.json").read_text())
    assert float(lines[0]["bound"]) == pytest.approx(metrics["vlb"]["total"], rel=0.5)  # other draws of few images
    # two numbers of steps, and for the first two another sampler; five omegas for each of the methods
    assert [sum(line["row"] == name for line in lines) for name in rows] == [9, 9, 7, 2, 2]
    assert all(0 <= float(line["precision"]) <= 1 and float(line["distance"]) >= 0 for line in lines)
    before = (tmp_path / "c" / "results.csv").read_text()
    assert call(compare, *words) == 0 and (tmp_path / "c" / "results.csv").read_text() == before
    assert "Guidance" in (tmp_path / "c" / "results.md").read_text()
    assert {"VQ-LCMD-8-ancestral-2.png", "absorbing-8-confidence-1.png", "steps.png", "collapse.png", "guidance.png",
            "samples.png"} < set(os.listdir(tmp_path / "c"))
    assert call(compare, "--n", 3) == 2 and call(compare, "--only", "nothing") == 2
    images = data.ImageSet([0] * 3, [], 4, pixels=torch.arange(3 * 48).view(3, 3, 4, 4).to(torch.uint8))
    turned = compare.Rotated(images).batch([4, 5, 7])
    assert torch.equal(turned[0], images.batch([1])[0]) and torch.equal(turned[1], turned[0].rot90(1, (1, 2)))
    assert torch.equal(turned[2].rot90(1, (1, 2)), turned[0]) and len(compare.Rotated(images)) == 12
