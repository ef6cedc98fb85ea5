"""The exact denoiser: for tokens of known probabilities the true posterior is Bayes' rule, and an expectation
under it has one right value, found by quadrature. And the small models that tests take apart."""

import itertools
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

import losses
from data import ImageSet
from embedding_diffusion import EmbeddingDiffusion
from schedule import add_noise, alpha_sigma
from tests.common import f64, seeded
from vqvae import VectorQuantizer


class ExactPosterior:
    """The best denoiser there is: p(x_i | z_t) by Bayes' rule, for one or two tokens of known probabilities.

    p: (C + 1, K) or (C + 1, K, K), a joint table of n = 1 or 2 tokens per class, the null class last.
    embedding: (K, D). An image is `copies` independent groups of n tokens: thousands of samples in one image.
    """
    guided = EmbeddingDiffusion.guided

    def __init__(self, p, embedding, copies=1):
        self.p, self.log_p, self.embedding, self.copies = p, p.log(), embedding, copies
        self.n, self.num_classes, (self.K, self.D) = p.dim() - 1, len(p) - 1, embedding.shape
        self.N = self.n * copies

    def table(self):
        return self.embedding

    def __call__(self, z, log_snr, labels, mask=None, table=None):
        table = self.embedding if table is None else table
        alpha, sigma = (a[:, None, None] for a in alpha_sigma(log_snr))
        # -|z - alpha E_k|^2 / (2 sigma^2), less |z|^2 / (2 sigma^2), which is the same for all k
        evidence = F.linear(z / alpha, table, -table.square().sum(1) / 2) * (alpha / sigma) ** 2  # (B, N, K)
        if self.n == 1:
            return self.log_p[labels][:, None] + evidence
        likelihood = (evidence - evidence.amax(-1, keepdim=True)).exp()
        first, second = likelihood.view(len(z), self.copies, 2, self.K).unbind(2)  # (B, copies, K)
        p = self.p[labels]  # (B, K, K)
        sums_over_the_other = torch.stack([second @ p.mT, first @ p], 2)
        return evidence + sums_over_the_other.log().view_as(evidence)


BPSK = ExactPosterior(f64([0.5, 0.5]), f64([-1], [1]))
PAIR = ExactPosterior(f64([[0.45, 0.05], [0.1, 0.4]]), f64([-1], [1]))
TRIANGLE = f64([1, 0.4], [-1, 0.8], [0.2, -1.3])  # K = 3, D = 2
THREE = f64([[0.20, 0.05, 0.10], [0.02, 0.25, 0.03], [0.15, 0.05, 0.15]])  # one class, two tokens
NOISE = dict(rec_fraction=0.25, max_drop_rate=0.0, label_drop=0.1, max_gap=1.0)
WEIGHTS = dict(w_rec=1.0, w_diff=1.0, w_cm=1.0, weight_clip=math.inf, cm_pairs="markov")


def noise_grid(n):
    """Noise (Q, n, 1) and weights (Q,): trapezoid rule; half the step changes results by < 1e-12."""
    step = {1: 0.05, 2: 0.2}[n]
    points = torch.arange(-8.5, 8.5 + step, step, dtype=torch.float64)
    weights = torch.cartesian_prod(*[(-points.square() / 2).softmax(0)] * n).view(-1, n).prod(1)
    return torch.cartesian_prod(*[points] * n).view(-1, n, 1), weights


def rec_and_diff(exact, log_snr, d_log_snr):
    """E of L_rec and of L_diff's integrand over x, z and positions, at one noise level (D = 1)."""
    eps, weights = noise_grid(exact.n)
    level, slope, total = log_snr.expand(len(eps)), d_log_snr.expand(len(eps)), 0
    for tokens in itertools.product(range(exact.K), repeat=exact.n):
        x = torch.tensor(tokens).expand(len(eps), -1)
        e = F.embedding(x, exact.embedding)
        logits = exact(add_noise(e, level, eps), level, 0 * x[:, 0])
        e_hat = logits.softmax(-1) @ exact.embedding
        terms = losses.reconstruction_loss(logits, x), losses.diffusion_loss(e, e_hat, level, slope, math.inf)
        total = total + exact.p[0][tokens] * torch.stack([weights @ term.mean(1) for term in terms])
    return total


def integral(f, low, high, nodes):
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points = f64(*((high - low) / 2 * points + (high + low) / 2))
    return sum(w * float(f(p)) for p, w in zip(points, weights, strict=True)) * (high - low) / 2


def exact_rec_and_diff(exact, schedule, nodes):
    """L_rec and L_diff by quadrature."""
    def at(t):
        return rec_and_diff(exact, schedule.log_snr(t), schedule.d_log_snr(t))

    return float(at(f64(0)[0])[0]), integral(lambda t: at(t)[1], 0, 1, nodes)


def objective(model, teacher, schedule, x, labels, generator, **options):
    """(loss, terms) of one step. options: of NOISE or WEIGHTS, the exact objective without dropping."""
    noise = {name: options.pop(name, value) for name, value in NOISE.items()}
    weights = WEIGHTS | options
    noisy = losses.sample_noise(model, x, labels, generator, **noise)
    return losses.training_loss(model, teacher, schedule, *noisy, **weights)


def small_model(**settings):
    """A real denoiser in float64 whose weights are all random: no path through it is closed by a zero."""
    model = EmbeddingDiffusion(**dict(K=6, grid=(2, 2), D=4, width=8, depth=4, heads=2) | settings)
    generator = seeded(0)
    for parameter in model.double().parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model


def chi_square(counts, expected):
    """p-value of Pearson's test: are counts draws of these expected numbers? (scipy.stats is slow)."""
    counts = np.asarray(counts, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert counts.sum() == pytest.approx(expected.sum())
    return float(scipy.special.chdtrc(len(counts) - 1, ((counts - expected) ** 2 / expected).sum()))


def quantizer(update):
    """Eight random codes that stay as they are, and encoder outputs (4, 3, 5, 6)."""
    torch.manual_seed(0)
    vq = VectorQuantizer(8, 3, update)
    z_e = torch.randn(4, 3, 5, 6).requires_grad_()
    vq.initialised.fill_(True)
    return vq, z_e, vectors(z_e)


def vectors(z):
    """(B, C, h, w) -> (M, C), row by row as the tokens go."""
    return z.detach().permute(0, 2, 3, 1).flatten(0, 2)


class Steps:
    """In a StatusLog's place: these steps, and what the last one reports."""

    check = due = mock.Mock(return_value=False)

    def __init__(self, *steps):
        self.steps, self.step = steps, steps[0]

    def loop(self):
        yield from self.steps

    def add(self, losses, tokens=None):
        self.losses, self.tokens = losses, tokens


def run_of(config, images=None, models=None, lpips=None):
    """What the loops of train.py read of a run. images: uint8 (n, 3, size, size)."""
    return SimpleNamespace(config=config, models=models, seed=5, lpips=lpips, init={}, out=None,
                           device=torch.device("cpu"), micro_batch=0, tokenizer_is_published=False,
                           load_images=lambda: [ImageSet(len(images) * [0], [], 8, images)])
