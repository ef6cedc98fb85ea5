"""experiments/baselines.py through its public entries: bound, samples, labels, guidance and masks by enumeration.

The transition matrices are written out here, (K + 1, K + 1), and the steps between two times solved from them.
"""

import itertools
import math
from types import SimpleNamespace
from unittest import mock

import baselines
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
import tuned

import losses
from engine.config import DEFAULTS
from engine.randomness import image_generators
from sample import default_end, sample_tokens
from schedule import ShiftedCosine, alpha_sigma
from tests.common import close, seeded
from tests.exact import chi_square, small_model

LEVELS = ShiftedCosine(0.4, -10, 7)
SHARES = {"absorbing": lambda t: (1 - t, 0, t), "uniform": lambda t: (1 - t, t, 0),
          "mask-and-replace": lambda t: (1 - t, 0.1 * t, 0.9 * t)}  # still itself, any code, masked


def network(depth=1, **sizes):
    """A denoiser with random weights, two classes and no output prior, which has nothing to say of clean embeddings."""
    return small_model(num_classes=2, output_prior=False, depth=depth, **sizes).float()


def corruption(kind, K, t):
    """(K + 1, K + 1): probability of each state at t, given the state at 0; a mask stays one."""
    a, b, c = SHARES[kind](t)
    Q = np.zeros((K + 1, K + 1))
    Q[:K, :K] = a * np.eye(K) + b / K
    Q[:K, K], Q[K, K] = c, 1
    return Q


def steps_back(kind, K, t, s):
    """(K, K + 1, K + 1): q(x_s = j | x_t = i, x_0 = k) at [k, i, j]; NaN where x_t = i is impossible."""
    Q_s, Q_t = corruption(kind, K, s), corruption(kind, K, t)
    step = np.linalg.solve(Q_s, Q_t)  # from s to t
    with np.errstate(invalid="ignore", divide="ignore"):
        return (Q_s[:K, None, :] * step.T[None] / Q_t[:K, :, None]).clip(0)


def predicted(model, x_t, t, labels, omega=0.0, kind=None, temperature=1.0):
    """p(x_0 | x_t) (B, N, K) of states (B, N) at times (B,): what the network is to be told, and is not."""
    masked = x_t == model.K
    z = torch.stack([torch.zeros(model.D) if i == model.K else model.table()[i] for i in x_t.flatten().tolist()])
    z = z.view(*x_t.shape, model.D)
    conditional, null = (model(z, LEVELS.log_snr(t), c, mask=masked).double() for c in (labels, 0 * labels + 2))
    logits = (1 + omega) * conditional - omega * null
    if kind is not None:
        evidence = torch.stack([torch.from_numpy(corruption(kind, model.K, float(time))[:-1, row].T)
                                for row, time in zip(x_t, t, strict=True)])
        logits = torch.where(masked[..., None], logits, logits + evidence.log())
    return (logits / temperature).softmax(-1).detach().numpy()


def mixed(back, p, i):
    """sum_k p(k) q(x_s | x_t = i, x_0 = k), the impossible k left out and the rest normalised: (K + 1,)."""
    possible = ~np.isnan(back[:, i]).any(1)
    row = p[possible] @ back[possible, i]
    return row / row.sum()


@pytest.mark.parametrize("kind", SHARES)
def test_states_by_enumeration(kind):
    """60,000 corrupted tokens at three times have the shares of the definition."""
    K, n = 3, 20_000
    t = torch.tensor([0.25, 0.6, 1.0])
    x_t = baselines.corrupt(kind, torch.full((3, n), 1), K, t, seeded(0))
    for row, time in zip(x_t, t.tolist(), strict=True):
        expected = corruption(kind, K, time)[1]
        counts = torch.bincount(row, minlength=K + 1).numpy()
        assert not counts[expected < 1e-9].any()
        there = expected > 1e-9
        assert there.sum() == 1 or chi_square(counts[there], n * expected[there]) > 1e-3


@pytest.mark.parametrize("kind", SHARES)
def test_bound_by_enumeration(kind, monkeypatch):
    """loss() of given labels, plain, with the closed form, and with the auxiliary term: each image's value from the
    same random numbers, state by state."""
    monkeypatch.setattr(baselines, "T", 5)
    model, K, B = network(K=3, grid=(1, 2)), 3, 12
    x, labels = torch.randint(K, (B, 2), generator=seeded(1)), torch.arange(B) % 2
    for analytic, auxiliary in ((False, 0.0), (True, 0.0), (False, 0.3)):
        analytic = analytic and kind != "absorbing"
        found = baselines.loss(kind, model, LEVELS, x, seeded(2), labels, analytic, auxiliary)
        generator, expected = seeded(2), []
        numbers = ((torch.rand((), generator=generator) + torch.arange(B) / B) % 1 * 5).long()
        u, other = torch.rand(B, 2, generator=generator), torch.randint(K, (B, 2), generator=generator)
        t = (numbers[:, None] + 1) / 5
        a, b, _ = SHARES[kind](t)
        x_t = torch.where(u < a, x, torch.where(u < a + b, other, K))
        p = predicted(model, x_t, t[:, 0], labels, kind=kind if analytic else None)
        for i, number in enumerate(numbers.tolist()):
            back, total = steps_back(kind, K, (number + 1) / 5, number / 5), 0
            for position, state in enumerate(x_t[i].tolist()):
                truth, ours = back[x[i, position], state], mixed(back, p[i, position], state)
                total += scipy.special.rel_entr(truth, ours).sum() - auxiliary * np.log(p[i, position, x[i, position]])
            expected.append(5 * total / 2)
        close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=2e-5)  # float32
    assert len(set(numbers.tolist())) == 5


@pytest.mark.parametrize("end", [None, 0.55])
@pytest.mark.parametrize("kind", SHARES)
def test_samples_by_enumeration(kind, end):
    """Two tokens in three steps, the last one or two guided: 4,000 samples follow the product of three matrices."""
    model, K, steps, n = network(K=3, grid=(1, 2)), 3, 3, 4000
    kind_of, states = None if kind == "absorbing" else kind, list(itertools.product(range(K + 1), repeat=2))
    _, b, c = SHARES[kind](1)
    one = np.array([b / K] * K + [c])
    now = np.outer(one, one).ravel()
    for t, s in ((1, 0.775), (0.775, 0.55), (0.55, 0)) if end else ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        back, matrix = steps_back(kind, K, t, s), np.zeros((len(states), len(states)))
        p = predicted(model, torch.tensor(states), torch.full((len(states),), t), torch.ones(len(states)).long(),
                      0.7 * (t < 0.7), kind_of, 1.6)
        for row, state in enumerate(states):
            if now[row]:
                matrix[row] = np.outer(*(mixed(back, p[row, j], state[j]) for j in (0, 1))).ravel()
        now = now @ matrix
    assert now.sum() == pytest.approx(1)
    drawn = baselines.sample(kind, model, LEVELS, n, steps, seeded(0), torch.ones(n).long(), 0.7, kind_of is not None,
                             1.6, 0.7, end)
    counts = torch.bincount(drawn @ torch.tensor([K + 1, 1]), minlength=(K + 1) ** 2).numpy()
    assert not counts[now < 1e-9].any() and (now > 1e-9).sum() == K * K
    assert chi_square(counts[now > 1e-9], n * now[now > 1e-9]) > 1e-3


@pytest.mark.parametrize("kind", SHARES)
def test_strong_guidance(kind, monkeypatch):
    """Where all of p_theta underflows but for one code, a step is still a draw; what is no mask stays, if it must."""
    model, n, seen = network(K=5, grid=(2, 3)), 64, []
    monkeypatch.setattr(type(model), "forward", lambda self, z, log_snr, labels, **_: torch.where(
        torch.arange(5) == len(seen) % 5, 40.0, 0.0) * (labels < 2)[:, None, None] + torch.zeros(*z.shape[:2], 5))
    draw = baselines.draw
    monkeypatch.setattr(baselines, "draw", lambda p, generator: seen.append(draw(p, generator)) or seen[-1])
    found = baselines.sample(kind, model, LEVELS, n, 4, seeded(0), torch.zeros(n).long(), 8.0)
    assert found.min() >= 0 and found.max() < 5 and len(seen) == 5
    for before, after in itertools.pairwise(seen if kind == "absorbing" else []):
        assert torch.equal(after[before < 5], before[before < 5])


@pytest.mark.parametrize("temperature, gumbel, masks, below", [
    (1.0, 0.0, [6, 5, 4, 2], 1.0), (0.7, 2.0, [6, 5, 4, 2], 0.5), (1.0, 0.0, [6, 5, 4, 3, 2, 1, 0], 1.0)])
def test_most_confident_tokens_are_kept(temperature, gumbel, masks, below):
    """With the likeliest code in the place of the draw: which positions are decoded in which step, image by image.

    No call is for nothing while there are masks, though the cosine would have it.
    """
    model, n, steps = network(K=5, grid=(2, 3)), 4, len(masks)
    labels, visited = torch.tensor([0, 1, 1, 0]), []
    predict = baselines.predict

    def watched(*args, **options):
        visited.append(args[2].clone())
        return predict(*args, **options)

    with mock.patch.object(baselines, "draw", lambda p, generator: p.argmax(-1)), mock.patch.object(
            baselines, "predict", watched):
        found = baselines.sample_by_confidence(model, LEVELS, n, steps, seeded(3), labels, 1.5, temperature,
                                               gumbel, below)
    x, generator = torch.full((n, 6), 5), seeded(3)
    for i in range(steps):
        assert torch.equal(visited[i], x)
        t, noise = 1 - i / steps, torch.empty(n, 6).exponential_(generator=generator)
        left = (masks[1:] + [0])[i]
        every = predicted(model, x, torch.full((n,), masks[i] / 6), labels, 1.5 * (t <= below),
                          temperature=temperature)
        for row, p in enumerate(every):
            open_ = [j for j in range(6) if x[row, j] == 5]
            score = {j: np.log(p[j].max()) - gumbel * (t - 1 / steps) * float(noise[row, j].log()) for j in open_}
            for j in sorted(open_, key=score.get)[left:]:
                x[row, j] = int(p[j].argmax())
    assert torch.equal(found, x) and (found < 5).all()
    assert [int((v == 5).sum(1)[0]) for v in visited] == masks


def test_objective_of_every_row():
    """Label drop, the share at t = 0, options and teacher of each kind of row: the scalar by its own formula."""
    model, ema = network(K=6).double(), network(K=6).double()
    ema.head.weight.data[0] += 0.5
    x, labels = torch.randint(6, (16, 4), generator=seeded(0)), torch.arange(16) % 2
    generator = seeded(1)
    dropped = torch.where(torch.rand(16, generator=generator) < 0.5, 2, labels)
    assert (dropped == 2).any() and (dropped < 2).any()
    for kind, more in (("uniform", {"auxiliary": 0.1, "analytic": True}), ("absorbing", {})):
        after = torch.Generator()
        after.set_state(generator.get_state())
        expected = baselines.loss(kind, model, LEVELS, x, after, dropped, more.get("analytic", False),
                                  more.get("auxiliary", 0.0)).mean()
        assert torch.equal(baselines.objective({"loss": kind} | more, model, ema, LEVELS, x, labels, seeded(1), 0.5),
                           expected)
        assert not torch.equal(expected, baselines.objective({"loss": kind}, model, ema, LEVELS, x, labels, seeded(1)))
    # cross-entropy at stratified times, the first quarter at t = 0
    found = baselines.objective({"loss": "cross-entropy", "rec_fraction": 0.25}, model, ema, LEVELS, x, labels,
                                seeded(1), 0.5)
    t = torch.cat([torch.zeros(4), (torch.rand((), generator=generator) + torch.arange(12) / 12) % 1])
    alpha, sigma = (v[:, None, None] for v in alpha_sigma(LEVELS.log_snr(t)))
    z = alpha * model.table()[x] + sigma * torch.randn(16, 4, model.D, generator=generator, dtype=torch.float64)
    log_p = model(z, LEVELS.log_snr(t), dropped).log_softmax(-1)
    close(found, -(log_p * F.one_hot(x, 6)).sum(-1).mean())
    # VQ-LCMD: train.py's options, one by one
    for options in ({}, {"teacher": "current"}, {"w_rec": 3.0}, {"w_diff": 3.0}, {"w_cm": 0.0}, {"weight_clip": 0.5},
                    {"cm_pairs": "shared"}, {"rec_fraction": 0.5}, {"max_drop_rate": 0.9}, {"max_gap": 0.1}):
        o = DEFAULTS | options
        noisy = losses.sample_noise(model, x, labels, seeded(1), label_drop=0.5, rec_fraction=o["rec_fraction"],
                                    max_drop_rate=o["max_drop_rate"], max_gap=o["max_gap"])
        expected, _ = losses.training_loss(
            model, model if options.get("teacher") else ema, LEVELS, *noisy, w_rec=o["w_rec"], w_diff=o["w_diff"],
            w_cm=o["w_cm"], weight_clip=o["weight_clip"], cm_pairs=o["cm_pairs"])
        found = baselines.objective(options, model, ema, LEVELS, x, labels, seeded(1), 0.5)
        assert torch.equal(found, expected), options
        if options:
            assert not torch.equal(found, baselines.objective({}, model, ema, LEVELS, x, labels, seeded(1), 0.5))


@pytest.mark.parametrize("kind, most, found", [(None, math.inf, (8, 0.5, 16)), ("absorbing", 4, (4, 0.5, 4)),
                                               (None, 0.1, (0, 1, 0))])
def test_guided_steps_are_two_calls(kind, most, found, monkeypatch):
    """As many steps as calls allow, counted at the network; twice the guidance is tried while the strongest is best."""
    model, labels, n = network(), torch.tensor([0, 1]), []
    monkeypatch.setattr(type(model), "forward", lambda self, z, *_, **__: n.append(len(z)) or torch.zeros(
        *z.shape[:2], self.K))
    for calls, below, end in itertools.product((2, 4, 8, 13, 16, 50), (1.0, 0.5), (None, 0.3)):
        steps, guided = tuned.most_steps(calls, below, kind is not None, end)
        for count, more in ((steps, 0), (steps + 1, 1)):
            n.clear()
            if kind:
                baselines.sample(kind, model, LEVELS, 2, count, seeded(0), labels, 1.0, guided_below=below,
                                 end=end)
            else:
                sample_tokens(model, LEVELS, labels, image_generators(0, range(2)), count, 1.0, "ancestral",
                              interval=(0.0, below), end=default_end(count) if end is None else end)
            assert sum(n) / 2 > calls if more else sum(n) / 2 == steps + guided <= calls
    wanted = []
    monkeypatch.setattr(tuned, "measure", lambda *a: wanted.append(a[5]["guidance"]) or {"distance": abs(
        math.log2((a[5]["guidance"] + 0.01) / 7)) + (a[5]["guided_below"] == 1)})
    best = tuned.best_setting("VQ-LCMD", 1, SimpleNamespace(seeds=[0], tuned_at=1, tune_n=1, most_guidance=most), 8,
                              SimpleNamespace(classes=["a"]))
    assert (best["guidance"], best["guided_below"], max(wanted)) == found
