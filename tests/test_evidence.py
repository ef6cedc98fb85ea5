"""The experiments: baselines by enumeration, the Markov chain, the comparison, the speed program."""

import contextlib
import csv
import functools
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import baselines
import collapse
import compare
import excess
import first_hour
import in_parts
import markov_chain
import noise_levels
import numpy as np
import pytest
import speed
import tables
import torch
import torch.nn.functional as F
import tuned
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
from embedding_diffusion import EmbeddingDiffusion
from engine.config import PRESETS
from schedule import ShiftedCosine
from tests.common import TINY, call, close, flags, forkserver, parser_flags, seeded
from tests.exact import chi_square
from vqvae import VQVAE

compare.DRAWS = 64  # of the bound: tests of the programs need no precision


def test_speed_program(capsys, monkeypatch):
    """experiments/speed.py with all it can do at tiny sizes, compilers left out; FLOPs by PyTorch's own counter."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    options = dict(size=8, f=4, K=8, D=4, width=16, depth=1, heads=2, batch=6, micro_batch=3, repeat=1, inner=1,
                   sample_steps=2, threads=1, preset="toy", device="cpu", compile=True, measures=True, profile=True)
    assert parser_flags(speed) == sorted(options)
    assert call(speed, *flags(options)) == 0
    text = capsys.readouterr().out
    ways = dict(re.findall(r"^\| ([^|]+) \| [\d.e-]+ \| ([\d.]+) \|", text, re.M))
    assert len(ways) == 8 + 5 + 4 and ways["denoiser"] == "1.00" and "aten::" in text
    model = EmbeddingDiffusion(8, (4, 4), 4, 16, 3, 2)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(1, 16, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    small = 2 * (128 * 16 + 16 * 16 + 2 * 16 * 16)  # conditioning and last modulation, which it leaves out
    assert counter.get_total_flops() - small == speed.forward_flops(model)


def test_noise_levels(folder, run, capsys):
    """Before training p_theta is the closed-form posterior, so CE is the token's own; the bound's integrand by hand.

    For independent tokens it is the true posterior: CE(t) + the integral of L_diff from t to 1 is log K for every t.
    """
    torch.manual_seed(0)
    model, schedule = EmbeddingDiffusion(6, (2, 2), 3, 8, 1, 2), ShiftedCosine(0.7, -10, 7)
    x, labels, t = torch.randint(6, (50, 4)), torch.zeros(50, dtype=torch.long), 0.2
    own, ce, H, exact, clipped = noise_levels.known_at(model, schedule, x, labels, t, 0.5, seeded(0))
    close(own, ce, rtol=1e-6, atol=0)
    log_snr, e = schedule.log_snr(torch.tensor(t)), model.table()[x]
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    z = alpha * e + sigma * torch.randn(e.shape, generator=seeded(0))
    p = (-(z[:, :, None] - alpha * model.table()).square().sum(-1) / (2 * sigma ** 2)).softmax(-1)       # (B, N, K)
    close(H, -(p * p.log()).sum(-1).mean().double(), rtol=1e-5, atol=0)
    weight = -schedule.d_log_snr(torch.tensor(t)) / 2
    close(exact, (weight * log_snr.exp() * (e - p @ model.table()).square().sum(-1).mean()).double(), rtol=1e-5, atol=0)
    close(clipped / exact, (0.5 / log_snr.exp()).double(), rtol=1e-6, atol=0)

    x, labels = torch.randint(6, (16000, 4)), torch.zeros(16000, dtype=torch.long)
    times, values = noise_levels.integrand(model, schedule, x, labels, seeded(1))
    for t in (0.02, 0.3, 0.8):
        ce, rest = noise_levels.known_at(model, schedule, x, labels, t, 1, seeded(2))[1], values * (times >= t)
        error = (rest.std() + torch.tensor(6).log()) / len(x) ** 0.5  # the second part: more than CE's own
        assert abs(ce + rest.mean() - torch.tensor(6).log()) < 3 * error < 0.15

    options = dict(data="toy", n=40, steps=3, sampler="ddim", temperature=0.8, seed=1, device="cpu")
    assert parser_flags(noise_levels) == sorted([*options, "root"])
    assert call(noise_levels, run / "ckpt.pt", *flags(options)) == 2 and "other classes" in capsys.readouterr().err
    assert call(noise_levels, run / "ckpt.pt", *flags(options | {"data": folder})) == 0
    assert len(re.findall(r"^\| [\d.]+ \| -?[\d.]+ \|( [\d.]+ \|){7}$", capsys.readouterr().out, re.M)) == 3


PART = """
import json, sys, time
out, part = sys.argv[2], sys.argv[6]
if part == "slow":
    time.sleep(60)
rows = [{"what": "error", "found": "0.5", "predicted": "at most 1", "good": part == "fine"}]
json.dump({"findings": rows}, open(f"{out}/{part}.json", "w"))
if part == "wrong":
    sys.exit("first\\nno disk")
"""


def test_in_parts(monkeypatch, tmp_path, capsys):
    """Each part in a process of its own: one is as predicted, one fails, one takes too long. The same command tries
    again what was not complete; what was not as predicted stands at the top of the report."""
    def started(*words):
        again.reset_mock()
        program = [tmp_path / "parts.py", "--out", tmp_path, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*map(str, program), *words])
        in_parts.main("Hours on", dict.fromkeys(("fine", "wrong", "slow")), "")
        return [call.args[1] for call in again.mock_calls], (tmp_path / "report.md").read_text()

    (tmp_path / "parts.py").write_text(PART)
    with mock.patch.object(in_parts, "run_part", side_effect=in_parts.run_part) as again:
        tried, text = started("--skip", "slow")
        top, parts = text.split("## fine")
        assert tried == ["fine", "wrong"] and "# Hours on a CPU\n\n**This is a CPU: everything is tiny" in top
        assert ("## Not as predicted: 2\n\n* wrong: error: **0.5**, predicted at most 1\n* wrong ended early: no disk\n"
                "\nAs predicted: 1 of 2. Not run: slow.\n") in top and "| error | 0.5 | at most 1 | yes |" in parts
        tried, text = started("--limit", "0.1", "--only", "fine", "slow")
        assert tried == ["slow"] and "* slow ended early: it took more than --limit 0.1 seconds" in text
        assert started("--only", "fine", "--again")[0] == ["fine"]


def test_first_hour_part(monkeypatch):
    """Tokens of a GPU that rounds wrongly are found out."""
    here = SimpleNamespace(device=torch.device("cpu"), tiny=True)
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"] | {"tokenizer_width": 16, "K": 9})
    assert [row["good"] for row in first_hour.tokens(here)] == [True, True]
    real = VQVAE.encode
    monkeypatch.setattr(VQVAE, "encode", lambda model, x: real(model, x) // (1 + model.bf16))
    assert [row["good"] for row in first_hour.tokens(here)] == [True, False]


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
    monkeypatch.setattr(baselines, "predict", lambda model, schedule, x_t, t, *_, **__: torch.stack(
        [posterior_of(time)[i] for i, time in zip(x_t.tolist(), t.tolist(), strict=True)]).clamp(min=1e-30).log())
    model, x = SimpleNamespace(K=3, N=1), torch.multinomial(p_0, 1500, replacement=True, generator=seeded(0))[:, None]
    draws = baselines.loss(kind, model, None, x, seeded(1))
    assert abs(float(draws.mean()) - entropy) < 4 * float(draws.std()) / 1500 ** 0.5 + 1e-9
    drawn = baselines.sample(kind, model, None, 1500, 5, seeded(2))
    assert chi_square(torch.bincount(drawn.flatten(), minlength=3), 1500 * p_0) > 1e-3
    if kind == "absorbing":
        drawn = baselines.sample_by_confidence(model, None, 1500, 1, seeded(3))
        assert chi_square(torch.bincount(drawn.flatten(), minlength=3), 1500 * p_0) > 1e-3


@pytest.mark.parametrize("kind", ["uniform", "mask-and-replace"])
def test_the_closed_form_term_of_discrete_states(kind, monkeypatch):
    """With log q(x_t | x_0) in the logits an untrained network is the exact denoiser of independent uniform tokens:
    Bayes' rule for each state, and a bound of log K, by enumeration of all states and intervals."""
    model = EmbeddingDiffusion(5, (1, 2), 4, 16, 1, 2, output_prior=False, posterior_input=False)
    schedule, K = ShiftedCosine(1, -10, 10), 5
    x_t, t = torch.tensor([[0, 3], [5, 5], [2, 5]]), torch.tensor([0.1, 0.5, 1.0])
    p = baselines.predict(model, schedule, x_t, t, kind=kind).exp()
    for row, time in enumerate(t):
        a, b, _ = baselines.rates(kind, time)
        for i in range(2):
            q = a * (torch.arange(K) == x_t[row, i]) + b / K
            exact = torch.full((K,), 1 / K) if x_t[row, i] == K else q / q.sum()
            close(p[row, i], exact, rtol=1e-5, atol=1e-6)
    plain = baselines.predict(model, schedule, x_t, t).exp()
    close(plain, torch.full_like(plain, 1 / K), rtol=1e-6, atol=0)  # without it: it knows nothing
    monkeypatch.setattr(baselines, "T", 4)
    total, states = 0.0, torch.arange(K + 1)
    for i in range(1, 5):
        t, s = torch.full((K + 1,), i / 4), torch.full((K + 1,), (i - 1) / 4)
        a, b, c = (float(rate) for rate in baselines.rates(kind, torch.tensor(i / 4)))
        x_t = torch.stack([states, states], 1)
        p = baselines.predict(model, schedule, x_t, t, kind=kind).exp()
        ours = baselines.reverse(kind, p, x_t, t[:, None], s[:, None])[:, 0].double()              # (K + 1, K + 1)
        truth = baselines.reverse(kind, torch.eye(K)[0].expand(K + 1, K), states, t, s).double()
        kl = (torch.xlogy(truth, truth) - torch.xlogy(truth, ours.clamp(min=1e-30))).sum(1)
        probability = torch.full((K + 1,), b / K)  # of x_t, for x_0 = 0
        probability[0] += a
        probability[K] = c
        total += float(probability.double() @ kl.detach())
    assert total == pytest.approx(np.log(K), rel=1e-5)  # float32


def test_auxiliary_loss():
    """VQ-Diffusion's auxiliary term adds its weight times T times the cross-entropy, with the same draws."""
    torch.manual_seed(0)
    model = EmbeddingDiffusion(5, (1, 2), 4, 16, 1, 2, output_prior=False, posterior_input=False)
    schedule = ShiftedCosine(1, -10, 10)
    x = torch.randint(5, (64, 2))
    plain, more = (baselines.loss("uniform", model, schedule, x, seeded(0), analytic=False, auxiliary=weight)
                   for weight in (0.0, 0.01))
    close(more - plain, torch.full_like(plain, 0.01 * baselines.T * float(np.log(5))), rtol=1e-3, atol=1e-3)


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
    assert chi_square(counts, 20000 * p) > 1e-3
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


def test_markov_chain_side_by_side(tmp_path, monkeypatch):
    """Two processes: every line is there once, with the figures of one process."""
    monkeypatch.setattr(markov_chain.multiprocessing, "get_context", lambda _: forkserver())  # quicker than spawn
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
        returncode=call("train.py", *words[2:]) if words[1].endswith("train.py") else 0, stdout="abc\n")))
    monkeypatch.setattr(compare, "kernel_distance", functools.partial(compare.kernel_distance, subsets=2))
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
    assert 0 < float(lines[0]["bound"]) < 2 * metrics["vlb"]["total"]  # other draws of few images
    # two numbers of steps, and for the first two another sampler; five omegas for each of the methods
    assert [sum(line["row"] == name for line in lines) for name in rows] == [9, 9, 7, 2, 2]
    assert all(0 <= float(line["precision"]) <= 1 and float(line["distance"]) >= 0 for line in lines)
    before = (tmp_path / "c" / "results.csv").read_text()
    with mock.patch.object(compare, "plots"):  # the pictures of before
        assert call(compare, *words) == 0 and (tmp_path / "c" / "results.csv").read_text() == before
    assert "Guidance" in (tmp_path / "c" / "results.md").read_text()
    assert {"VQ-LCMD-8-ancestral-2.png", "absorbing-8-confidence-1.png", "steps.png", "collapse.png", "guidance.png",
            "samples.png"} < set(os.listdir(tmp_path / "c"))
    assert call(compare, "--n", 3) == 2 and call(compare, "--only", "nothing") == 2
    monkeypatch.setattr(compare, "HELD_OUT", 2)
    shared = compare.prepare(SimpleNamespace(out=tmp_path / "c", data=str(folder), root=None, device="cpu"),
                             flags(TINY))
    assert shared.held_out[1].tolist() == [0, 1]  # the first and the last of a set that is sorted by class
    name, objective, seen = "gap at most 0.1", compare.baselines.objective, []
    path = compare.weights_of(shared.out, name, 0, TINY["steps"])
    whole = torch.load(path, weights_only=True)
    path.unlink()

    def stop_at_the_sixth(*args):
        seen.append(args)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return objective(*args)

    monkeypatch.setattr(compare, "SAVE_EVERY", 3)
    monkeypatch.setattr(compare.baselines, "objective", stop_at_the_sixth)
    for _ in range(2):  # stopped in the sixth step; then it goes on after the third
        with contextlib.suppress(KeyboardInterrupt):
            _, _, state = compare.train_row(name, 0, TINY["steps"], shared)
    assert len(seen) == 6 + TINY["steps"] - 3 and state["curve"] == whole["curve"]
    assert all(torch.equal(state["ema"][key], value) for key, value in whole["ema"].items())
    assert path.exists() and not list(shared.out.glob("*.partial.pt"))
    shared.config["clip"] = 2.0
    with pytest.raises(SystemExit):
        compare.train_row(name, 0, TINY["steps"], shared)
    assert "--clip 1.0, not 2.0" in capsys.readouterr().err
    images = data.ImageSet([0] * 3, [], 4, pixels=torch.arange(3 * 48).view(3, 3, 4, 4).to(torch.uint8))
    turned = compare.Rotated(images).batch([4, 5, 7])
    assert torch.equal(turned[0], images.batch([1])[0]) and torch.equal(turned[1], turned[0].rot90(1, (1, 2)))
    assert torch.equal(turned[2].rot90(1, (1, 2)), turned[0]) and len(compare.Rotated(images)) == 12


class Oracle(EmbeddingDiffusion):
    """Answers with the true posterior, of noise or of masks."""

    def __init__(self, chain):
        super().__init__(10, (1, 6), 8, width=8, depth=1, heads=1)
        self.chain = chain

    def forward(self, z, log_snr, labels, mask=None, table=None):
        own = self.log_likelihood(z, log_snr, self.table()).double()
        if mask is not None:  # what is not masked is known
            own = torch.where(mask[..., None], 0.0, 100.0 * F.one_hot(own.argmax(-1), self.K))
        return excess.true_posterior(self.chain, own)[0].float()


def test_excess(tmp_path, capsys):
    """The true posterior by enumeration; with it nothing is lost, and the bounds are as tight as they can be."""
    chain = markov_chain.Chain()
    own = 2 * torch.randn(2, 3, 10, generator=seeded(3), dtype=torch.float64)
    x = torch.cartesian_prod(*[torch.arange(10)] * 3)                                              # all (1000, 3)
    joint = excess.log_prior(chain, x) + own.gather(2, x.T.expand(2, 3, 1000)).sum(1)              # (2, 1000)
    close(joint.exp().sum(1).log(), excess.true_posterior(chain, own)[1])
    marginals = torch.stack([joint.softmax(1) @ F.one_hot(x[:, i], 10).double() for i in range(3)], 1)
    close(excess.true_posterior(chain, own)[0].exp(), marginals)
    torch.manual_seed(0)
    for options, log_snr_max, least in (({}, 7.0, 0.0), ({}, -1.0, 0.01), ({"loss": "absorbing"}, 7.0, 0.0)):
        schedule = ShiftedCosine(1.0, -10.0, log_snr_max)
        found = excess.measure(options, Oracle(chain), schedule, chain, 4000)
        assert max(abs(found[name]) for name in ("KL", "excess", *excess.QUARTERS)) < 1e-5  # rounding of float32
        assert least <= found["TC"] + 1e-6 and (least > 0) == (found["TC"] > 1e-3)
        untrained = excess.measure(options, EmbeddingDiffusion(10, (1, 6), 8, 8, 1, 1), schedule, chain, 4000)
        assert untrained["excess"] > 0.1
        for measured in (found, untrained):  # the parts add up to the bound
            assert abs(measured["check"]) < 4 * measured["error"] < 0.2
    words = ["--steps", 1, "--samples", 50, "--out", tmp_path]
    assert call(excess, *words) == 0
    lines, before = compare.read(tmp_path / "excess.csv"), (tmp_path / "excess.csv").read_text()
    assert [line["row"] for line in lines] == ["train.py's defaults", "discrete: absorbing"]
    for line in lines:
        close(float(line["excess"]), sum(float(line[name]) for name in excess.QUARTERS), rtol=0, atol=1e-4)
    assert call(excess, *words) == 0 and (tmp_path / "excess.csv").read_text() == before
    assert "| discrete: absorbing | 1 |" in capsys.readouterr().out and call(excess, "--steps", 0) == 2


def test_collapse(tmp_path, monkeypatch, capsys):
    """All start from one table and see the same noise; figures, film and numbers agree."""
    monkeypatch.setattr(collapse, "FRAMES", 2)
    monkeypatch.setattr(collapse, "SAMPLES", 20)
    assert parser_flags(collapse) == ["out", "seed", "steps"] and call(collapse, "--steps", 1) == 2
    capsys.readouterr()
    assert call(collapse, "--steps", 4, "--seed", 3, "--out", tmp_path) == 0
    text, lines = capsys.readouterr().out, compare.read(tmp_path / "results.csv")
    assert [(line["row"], line["step"]) for line in lines] == [(name, n) for name in collapse.ROWS for n in "024"]
    first, last = ([line for line in lines if line["step"] == n] for n in "04")
    assert len({line["mean_distance"] for line in first}) == 1 and len({line["mean_distance"] for line in last}) == 4
    for line in last:
        assert f"-> {float(line['mean_distance']):.2f}, smallest {float(line['smallest_distance']):.2f}" in text
    with Image.open(tmp_path / "collapse.gif") as film:
        assert film.n_frames == 3 and (tmp_path / "collapse.png").exists()


def test_tuned(folder, tmp_path, monkeypatch, capsys):
    """The least bound chooses the rate, the least distance of the first seed the setting; nothing is computed twice."""
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=lambda words, **_: SimpleNamespace(
        returncode=call("train.py", *words[2:]) if words[1].endswith("train.py") else 0, stdout="abc\n")))
    monkeypatch.setattr(compare, "kernel_distance", functools.partial(compare.kernel_distance, subsets=2))
    some = tuned.settings("absorbing", 4, True)
    assert len(some) == 102 and {(s["steps"], s["guided_below"]) for s in some if s["guidance"]} == {(2, 1.0), (3, 0.5)}
    assert {(s["steps"], s["guided_below"]) for s in some if not s["guidance"]} == {(4, 1.0)}
    assert all(not s["guidance"] for s in tuned.settings(None, 1, True)) and len(tuned.settings(None, 1, False)) == 7
    ends = [{s["end"] for s in tuned.settings(*of, False)} for of in ((None, 4), ("uniform", 8), (None, 16), (None, 2))]
    assert ends == [{0.05, 0.3, 0.45, 0.6}, {"", 0.3, 0.45, 0.6}, {0.0, 0.3}, {0.2, 0.3, 0.45, 0.6}]
    assert {s["end"] for s in some if s["sampler"] == "confidence"} == {""}
    monkeypatch.setattr(tuned, "settings", lambda kind, calls, *_: [
        dict(sampler="ancestral", steps=calls, guidance=0.0, guided_below=1.0, temperature=t, gumbel=1.0, end=0.3)
        for t in (0.5, 1.0)])
    words = ["--data", folder, "--features-of", folder, "--budget", 2, "--short", 1, "--rates", 1e-2, 2e-2, "--seeds",
             0, 1, "--calls", 2, "--n", 4, "--tune-n", 5, "--rows", "VQ-LCMD", "--classifier-steps", 2, "--out",
             tmp_path / "c", *flags(TINY)]
    monkeypatch.setattr(compare, "bound", lambda name, *_: abs(math.log2(compare.ROWS[name]["lr"] / 4e-2)))
    assert call(tuned, *words) == 0
    rates, lines = (compare.read(tmp_path / "c" / name) for name in ("rates.csv", "tuned.csv"))
    assert [r["lr"] for r in rates] == ["0.01", "0.02", "0.04", "0.08"] and {line["lr"] for line in lines} == {"0.04"}
    tried, result = lines[:2], lines[2:]
    chosen = min(tried, key=lambda line: float(line["distance"]))["temperature"]
    assert [(r["purpose"], r["seed"], r["n"], r["temperature"]) for r in result] == [
        ("result", "1", "4", chosen), ("untuned", "1", "4", "1.0")] and (tmp_path / "c" / "tuned.png").exists()
    assert not any(line["kid"] for line in tried) and all(line["kid"] and line["precision"] for line in result)
    before = (tmp_path / "c" / "tuned.csv").read_text()
    assert call(tuned, *words) == 0 and (tmp_path / "c" / "tuned.csv").read_text() == before
    assert "| VQ-LCMD |" in (tmp_path / "c" / "tuned.md").read_text()
    assert f"{folder.name}'s classes" in lines[0]["features"] and not lines[0]["agreement"]
    assert call(tuned, *words, "--budget", 3, "--tuned-at", 2) == 0  # longer, settings of the shorter one
    more = compare.read(tmp_path / "c" / "tuned.csv")[len(lines):]
    assert [(m["purpose"], m["budget"], m["seed"], m["temperature"]) for m in more] == [
        ("result", "3", "1", chosen), ("untuned", "3", "1", "1.0")]
    assert call(tuned, *words, "--tuned-at", 0) == 2
    assert call(tuned, *words, "--features-of", folder / os.listdir(folder)[0]) == 2
    (tmp_path / "c" / "tuned.csv").write_text(before.replace("guided_below,", "").replace(",1.0,", ",", 1))
    assert call(tuned, *words) == 2
    said = capsys.readouterr().err
    assert "is of an earlier version" in said and "has no classes" in said and call(tuned, "--seeds", 0) == 2


@pytest.mark.parametrize("calls, most, end, omega, taken", [
    (4, 64.0, 0.75, 8.0, (0.75, 8.0)), (4, 2.0, 0.99, 8.0, (0.9, 2.0)), (8, 64.0, 0.3, 0.5, (0.3, 0.5)),
    (16, 64.0, 0.45, 0.0, (0.45, 0.0)), (50, 64.0, 0.0, 4.0, (0.0, 4.0))])
def test_while_the_largest_is_best_a_larger_one_is_tried(calls, most, end, omega, taken, monkeypatch):
    """... of guidance and of the time of the last call, up to a limit."""
    monkeypatch.setattr(tuned, "measure", lambda name, lr, seed, at, calls, setting, *_: {
        "distance": abs(setting["end"] - end) + abs(setting["guidance"] - omega)})
    args = SimpleNamespace(most_guidance=most, seeds=[0], tuned_at=1, tune_n=4)
    best = tuned.best_setting("VQ-LCMD", 0.1, args, calls, SimpleNamespace(classes=2))
    assert (best["end"], best["guidance"]) == taken


def test_the_tables_of_the_experiments(tmp_path, capsys):
    """Every line of the tables that the CSV files give stands in the README, and none of them is empty."""
    text = (Path(tables.__file__).parent / "README.md").read_text()
    assert call(tables) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 30 and [line for line in lines if line not in text] == []
    assert all(re.fullmatch(r"\d\.\d\d( ± 0\.\d\d)?", line.split(" | ")[1]) for line in lines
               if not line.startswith(("| ---", "| at its best", "| settings", "| untuned", "| tuned on")))
    tables.draw(tmp_path / "tuned.png")
    with Image.open(tmp_path / "tuned.png") as picture:
        assert picture.width > 2 * picture.height


def test_the_words_of_a_setting():
    """An end is named where sample.py would take another; discrete diffusion, whose own has no number, names any."""
    line = dict(steps="4", guidance="0.0", guided_below="1.0", temperature="1.0", sampler="ancestral", end="0.05")
    assert tuned.words(line, False) == "4 steps, τ 1" and tuned.words(line, True) == "4 steps, τ 1, end 0.05"
    assert tuned.words(line | {"end": "0.0"}, False) == "4 steps, τ 1, end 0"
    guided = line | {"guidance": "2.0", "guided_below": "0.5"}
    assert tuned.words(guided | {"end": "0.3"}, False) == "4 steps, ω 2 at t ≤ 0.5, τ 1"
    assert tuned.words(guided, False) == "4 steps, ω 2 at t ≤ 0.5, τ 1, end 0.05"
    assert tuned.words(line | {"sampler": "confidence", "end": ""}, True) == "4 steps, τ 1, by confidence"
