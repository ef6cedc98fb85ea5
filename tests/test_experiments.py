"""The experiments: discrete diffusion by enumeration of all states, and each program with tiny settings."""

import functools
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import baselines
import collapse
import common
import compare
import first_hour
import markov_chain
import noise_levels
import numpy as np
import pytest
import speed
import torch
import tuned
from PIL import Image

from embedding_diffusion import EmbeddingDiffusion
from engine.config import DEFAULTS, PRESETS
from schedule import ShiftedCosine
from tests.common import TINY, call, close, flags, seeded
from tests.exact import chi_square, small_model

LEVELS = ShiftedCosine(0.4, -10, 7)
SHARES = {"absorbing": lambda t: (1 - t, 0, t), "uniform": lambda t: (1 - t, t, 0),
          "mask-and-replace": lambda t: (1 - t, 0.1 * t, 0.9 * t)}  # still itself, any code, masked


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


def predicted(model, x_t, t, kind):
    """p(x_0 | x_t) (B, N, K) of states (B, N), class 1, guided by 0.7 below t = 0.7, temperature 1.6."""
    masked, omega = x_t == model.K, 0.7 * (t < 0.7)
    rows = torch.cat([model.table(), torch.zeros(1, model.D)])
    log_snr, one = LEVELS.log_snr(torch.full((len(x_t),), t)), torch.ones(len(x_t)).long()
    conditional, null = (model(rows[x_t], log_snr, label, mask=masked) for label in (one, 2 * one))
    logits = (1 + omega) * conditional - omega * null
    if kind != "absorbing":
        evidence = torch.from_numpy(corruption(kind, model.K, t)[:-1].T)[x_t].log()
        logits = torch.where(masked[..., None], logits, logits + evidence)
    return (logits.double() / 1.6).softmax(-1).detach().numpy()


@pytest.mark.parametrize("kind", SHARES)
def test_bound_of_an_exact_network(kind, monkeypatch):
    """An untrained one with the closed form: the bound is the entropy. The auxiliary loss is -log p(x_0)."""
    monkeypatch.setattr(baselines, "T", 5)
    model = EmbeddingDiffusion(3, (1, 2), 3, 8, 1, 2, output_prior=False)
    x = torch.arange(60000).view(-1, 2) % 3
    found = baselines.loss(kind, model, LEVELS, x, seeded(2), analytic=kind != "absorbing").detach()
    assert abs(found.mean() - math.log(3)) < 3 * found.std() / len(x) ** 0.5 < 0.03
    plain, more = (baselines.loss(kind, model, LEVELS, x, seeded(2), None, False, a) for a in (0, 0.3))
    close(more - plain, torch.full((len(x),), 5 * 0.3 * math.log(3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("end", [None, 0.55])
@pytest.mark.parametrize("kind", SHARES)
def test_samples_by_enumeration(kind, end):
    """Two tokens in three steps, some guided: 4,000 samples follow the product of three matrices."""
    model = small_model(num_classes=2, output_prior=False, depth=1, K=3, grid=(1, 2)).float()
    K, n, states = 3, 4000, list(itertools.product(range(4), repeat=2))
    _, b, c = SHARES[kind](1)
    one = np.array([b / K] * K + [c])
    now = np.outer(one, one).ravel()
    for t, s in ((1, 0.775), (0.775, 0.55), (0.55, 0)) if end else ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        back, matrix = steps_back(kind, K, t, s), np.zeros((len(states), len(states)))
        p = predicted(model, torch.tensor(states), t, kind)
        for row, state in enumerate(states):
            if now[row]:
                codes = [np.nansum(p[row, j, :, None] * back[:, state[j]], axis=0) for j in (0, 1)]
                matrix[row] = np.outer(*(code / code.sum() for code in codes)).ravel()
        now = now @ matrix
    assert now.sum() == pytest.approx(1)
    drawn = baselines.sample(kind, model, LEVELS, n, 3, seeded(0), torch.ones(n).long(), 0.7,
                             kind != "absorbing", 1.6, 0.7, end)
    counts = torch.bincount(drawn @ torch.tensor([K + 1, 1]), minlength=(K + 1) ** 2).numpy()
    assert not counts[now < 1e-9].any() and (now > 1e-9).sum() == K * K
    assert chi_square(counts[now > 1e-9], n * now[now > 1e-9]) > 1e-3


def test_most_confident_tokens_are_kept(monkeypatch):
    """The surest position is decoded first; what is left follows a cosine, at least one less a step."""
    log_p, seen = torch.tensor([3.0, 1.0, 6.0, 2.0, 5.0, 4.0])[:, None] - 7 + torch.zeros(2, 6, 5), []

    def predict(model, schedule, x, t, *_, **__):
        assert torch.equal(t, (x == 5).float().mean(1))
        was = before.pop() if (x < 5).any() else x  # what was drawn stays
        assert torch.equal(x[was < 5], was[was < 5])
        before.append(x)
        seen.append((x == 5)[1].nonzero().ravel().tolist())
        return log_p

    monkeypatch.setattr(baselines, "predict", predict)
    model, before = SimpleNamespace(N=6, K=5), []
    found = baselines.sample_by_confidence(model, LEVELS, 2, 4, seeded(3), gumbel=0.0)
    assert seen == [[0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 3, 5], [1, 3]] and found.max() < 5
    baselines.sample_by_confidence(model, LEVELS, 2, 7, seeded(3))
    assert [len(masks) for masks in seen[4:]] == [6, 5, 4, 3, 2, 1, 0]


def test_noise_of_the_confidence_falls(monkeypatch):
    """Of four steps the first two are noisy enough to turn the order round, the third is not."""
    log_p, seen = torch.tensor([3.0, 1.0, 6.0, 2.0, 5.0, 4.0])[:, None] - 7 + torch.zeros(1, 6, 5), []
    monkeypatch.setattr(baselines, "predict", lambda model, schedule, x, *_, **__: (
        seen.append((x == 5)[0].nonzero().ravel().tolist()), log_p)[1])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: (2 * log_p[..., 0]).exp())
    baselines.sample_by_confidence(SimpleNamespace(N=6, K=5), LEVELS, 1, 4, seeded(3), gumbel=1.2)
    assert seen == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 2, 4, 5], [0, 5]]


def test_objectives(monkeypatch):
    """Labels are dropped; cross-entropy takes t = 0 as often as VQ-LCMD."""
    model, seen = EmbeddingDiffusion(6, (2, 2), 3, 8, 1, 2, num_classes=2), []
    monkeypatch.setattr(model, "forward", lambda z, log_snr, labels, **_: (
        seen.append((log_snr, labels)), torch.zeros(8, 4, 6))[1])
    for kind in ("absorbing", "cross-entropy"):
        options = DEFAULTS | dict(loss=kind, label_drop=1.0, rec_fraction=0.25)
        baselines.objective(options, model, model, LEVELS, torch.zeros(8, 4).long(), torch.ones(8).long(),
                            seeded(0))
    assert all((labels == 2).all() for _, labels in seen)
    assert (seen[1][0] == LEVELS.log_snr(torch.zeros(1))).sum() == 2


def test_guidance_up_to_a_time(monkeypatch):
    """Both samplers. Strong guidance may leave no probability for a code that is there: it stays."""
    seen = []

    def predict(model, schedule, x, t, labels, guidance, *_, **__):
        seen.append(guidance)
        return torch.where(torch.arange(5) == int(guidance == 0), 0.0, -1000.0).expand(3, 6, 5)

    monkeypatch.setattr(baselines, "predict", predict)
    words = SimpleNamespace(N=6, K=5), LEVELS, 3, 4, seeded(0), torch.zeros(3).long(), 2.0
    drawn = [baselines.sample("absorbing", *words, guided_below=0.5),
             baselines.sample_by_confidence(*words, guided_below=0.5)]
    assert seen == [0, 0, 2, 2] * 2 and all({0, 1} == set(x.flatten().tolist()) for x in drawn)


@pytest.mark.parametrize("calls, below, discrete, end, steps", [
    (2, 1.0, True, None, (1, 1)), (13, 1.0, True, None, (6, 6)), (4, 0.5, True, None, (3, 1)),
    (4, 0.5, True, 0.3, (3, 1)), (4, 0.5, False, None, (3, 1)), (4, 0.2, True, 0.3, (4, 0)),
    (4, 0.5, True, 0.6, (4, 0))])
def test_guided_steps_are_two_calls(calls, below, discrete, end, steps):
    assert tuned.most_steps(calls, below, discrete, end) == steps


@pytest.fixture
def tiny(folder, tmp_path, monkeypatch):
    """A command line for compare.py and tuned.py, with train.py in this process."""
    def run(words, **_):
        status = call("train.py", *words[2:]) if "train.py" in words[1] else 0
        return SimpleNamespace(returncode=status, stdout="abc")

    monkeypatch.delenv("FID_WEIGHTS", raising=False)  # test_fid.py's: the classifier measures here
    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "DRAWS", 64)
    kernel_distance = functools.partial(compare.Evaluator.__call__.__globals__["kernel_distance"], subsets=2)
    monkeypatch.setitem(compare.Evaluator.__call__.__globals__, "kernel_distance", kernel_distance)
    return ["--data", folder, "--out", tmp_path / "c", "--classifier-steps", 2, *flags(TINY)]


def test_compare(tiny, run, tmp_path, monkeypatch):
    """VQ-LCMD is train.py bit for bit; a second command computes nothing; other settings are refused."""
    monkeypatch.setattr(compare, "spread_out", lambda n, most: np.arange(n)[::-1].copy())
    real_bound, held_out = compare.bound, []
    monkeypatch.setattr(compare, "bound", lambda name, model, schedule, shared, seed: held_out.append(
        shared.held_out[1].tolist()) or real_bound(name, model, schedule, shared, seed))
    rows = ["VQ-LCMD", "absorbing", "cross-entropy", "frozen random table"]
    path = tmp_path / "c" / "results.csv"
    words = [*tiny, "--budget", TINY["steps"], "--n", 4, "--sampling-steps", 2, "--only", *rows]
    assert call(compare, *words) == 0
    ours = torch.load(compare.weights_of(tmp_path / "c", "VQ-LCMD", 0, TINY["steps"]))["ema"]
    expected = torch.load(run / "ckpt.pt", weights_only=True)["ema"]
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    lines, before = common.read(path), path.read_text()
    assert [len(common.select(lines, row=name)) for name in rows] == [7, 7, 6, 1]  # with 5 omegas
    assert all(0 <= float(line["recall"]) <= 1 and 0 < float(line["bound"]) for line in lines)
    assert held_out == [[1, 0]] * 4
    assert call(compare, *words) == 0 and path.read_text() == before
    assert "| frozen random table | ancestral |" in (tmp_path / "c" / "results.md").read_text()
    path.unlink()
    assert "other settings" in call(compare, *words, "--clip", 2.0)


def test_tuned(tiny, folder, tmp_path, monkeypatch):
    """The least distance of the first seed chooses the setting; the other seeds are measured with it."""
    monkeypatch.setattr(tuned, "settings", lambda kind, calls, *_: [
        compare.plain("VQ-LCMD", calls) | {"temperature": t, "end": 0.3} for t in (0.5, 1.0)])
    words = [*tiny, "--features-of", folder, "--budget", 3, "--seeds", 0, 1, "--calls", 2, "--n", 4,
             "--tune-n", 5, "--rows", "VQ-LCMD"]
    assert call(tuned, *words) == 0
    lines = common.read(tmp_path / "c" / "tuned.csv")
    tried = common.select(lines, purpose="tried", seed=0)
    chosen = min(tried, key=lambda line: float(line["distance"]))["temperature"]
    results = [(r["purpose"], r["seed"], r["n"], r["temperature"]) for r in lines[2:]]
    assert results == [("result", "1", "4", chosen), ("untuned", "1", "4", "1.0")]
    assert not any(line["kid"] for line in tried) and all(line["kid"] for line in lines[2:])
    assert f"{folder.name}'s classes" in lines[0]["features"]


def test_while_the_largest_is_best_a_larger_one_is_tried(monkeypatch):
    """... of guidance and of the time of the last call, up to a limit."""
    monkeypatch.setattr(compare, "measure", lambda path, name, seed, at, purpose, calls, setting, *_: {
        "distance": abs(setting["end"] - 0.75) + abs(setting["guidance"] - 8)})
    for most, omega in (64.0, 8.0), (2.0, 2.0):
        args = SimpleNamespace(most_guidance=most, seeds=[0], budget=1, tune_n=4)
        best = tuned.best_setting("VQ-LCMD", args, 4, SimpleNamespace(classes=2, out=Path()))
        assert (best["end"], best["guidance"]) == (0.75, omega)


def test_the_tables_of_the_readme(tmp_path):
    text = (common.HERE / "README.md").read_text()
    lines = [line for _, _, table in tuned.page_tables() for line in table.splitlines()]
    assert len(lines) > 35 and [line for line in lines if line not in text] == []
    tuned.draw(tmp_path / "tuned.png")
    assert (tmp_path / "tuned.png").stat().st_size > 10_000


def test_markov_chain(tmp_path, monkeypatch):
    """Entropy and score by enumeration; rows of every kind run; the same command again computes nothing."""
    for name, value in dict(K=4, N=3, BATCH=8, SAMPLES=20).items():
        monkeypatch.setattr(markov_chain, name, value)
    chain, every = markov_chain.Chain(), np.array(list(itertools.product(range(4), repeat=3)))
    p = chain.start[every[:, 0]] * (chain.transition[every[:, :-1], every[:, 1:]]).prod(1)
    assert p.sum() == pytest.approx(1, abs=1e-12) and chain.bigrams.sum(0) == pytest.approx(chain.start)
    assert chain.entropy() == pytest.approx(-(p * np.log(p)).sum() / 3, abs=1e-12)
    drawn = chain.draw(20000, np.random.default_rng(0))
    assert chi_square(np.bincount(drawn @ [16, 4, 1], minlength=64), 20000 * p) > 1e-3
    nll, distance = chain.score(every[:1])  # 0, 0, 0: all bigrams are (0, 0)
    assert nll == pytest.approx(-np.log(p[0]) / 3) and distance == pytest.approx(1 - chain.bigrams[0, 0])
    rows, path = ["rec + diff", "plain cross-entropy", "discrete: absorbing"], tmp_path / "results.csv"
    words = ["--seeds", 1, "--steps", 2, "--out", tmp_path, "--only", *rows]
    assert call(markov_chain, *words) == 0
    lines = common.read(path)
    assert [line["row"] for line in lines] == rows and all(float(line["NLL 50"]) > 0 for line in lines)
    assert call(markov_chain, *words) == 0 and common.read(path) == lines


def test_collapse(tmp_path, monkeypatch):
    """All start from one table and end elsewhere; the film has a frame for each measurement."""
    monkeypatch.setattr(collapse, "FRAMES", 2)
    monkeypatch.setattr(collapse, "SAMPLES", 20)
    assert call(collapse, "--steps", 4, "--seed", 3, "--out", tmp_path) == 0
    lines = common.read(tmp_path / "results.csv")
    found = [len({line["mean_distance"] for line in common.select(lines, step=n)}) for n in (0, 4)]
    assert found == [1, 4] and (tmp_path / "collapse.png").exists()
    with Image.open(tmp_path / "collapse.gif") as film:
        assert film.n_frames > 2


def test_noise_levels(folder, run, capsys):
    """An untrained network is the exact denoiser of independent tokens: CE is the token's own, and CE(t) +
    the integral of L_diff from t to 1 is log K for every t."""
    torch.manual_seed(0)
    model, schedule = EmbeddingDiffusion(6, (2, 2), 3, 8, 1, 2), ShiftedCosine(0.7, -10, 7)
    x, labels = torch.randint(6, (16000, 4)), torch.zeros(16000, dtype=torch.long)
    times, values = noise_levels.integrand(model, schedule, x, labels, seeded(1))
    for t in (0.02, 0.3, 0.8):
        own, ce, H, *_ = noise_levels.known_at(model, schedule, x, labels, t, 0.5, seeded(2))
        assert own == pytest.approx(float(ce)) and abs(H - ce) < 0.05
        rest = values * (times >= t)
        error = (rest.std() + math.log(6)) / len(x) ** 0.5  # the second part: more than CE's own
        assert abs(ce + rest.mean() - math.log(6)) < 3 * error < 0.15
    words = [run / "ckpt.pt", "--n", 40, "--steps", 3, "--data"]
    assert call(noise_levels, *words, "toy") == 2 and "other classes" in capsys.readouterr().err
    assert call(noise_levels, *words, folder) == 0
    assert len(re.findall(r"^\| [\d.]+ \| -?[\d.]+ \|( [\d.]+ \|){7}$", capsys.readouterr().out, re.M)) == 3


def test_speed(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(speed, "STEPS", 2)
    monkeypatch.setitem(PRESETS, "toy", TINY | {"micro_batch": 3})
    assert call(speed, "--preset", "toy", "--repeat", 1, "--compile") == 0
    assert len(re.findall(r"^\| .* [\d.e+]+ \|$", capsys.readouterr().out, re.M)) == 8 + 4


def test_first_hour(monkeypatch, tmp_path):
    """A part that fails says why, and the next one goes on."""
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"] | dict(width=24, batch=4))
    monkeypatch.setattr(first_hour.subprocess, "run", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(first_hour, "choose_device", lambda _: torch.device("cpu"))
    assert call(first_hour, "--out", tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert "toy: time of a step" in text and text.count("| ended early | ZeroDivisionError") == 2
    assert first_hour.finding("bits", 2, 0, 1) == ["bits", "2", "0 to 1", "**no**"]
