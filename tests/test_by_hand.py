"""Steps of training computed a second way: of the code only a network's forward pass is used; formulas,
optimizer, averages, order and noise are here again. So are the codebook's start and splits.
"""

import copy
import math

import numpy as np
import pytest
import torch

import losses
import train
from data import ImageSet, Source
from embedding_diffusion import EmbeddingDiffusion
from engine.config import DEFAULTS
from engine.tokens import TokenDataset
from extras.vqgan_losses import PatchDiscriminator
from schedule import ShiftedCosine
from tests.common import call, close, flags, rows_of, seeded
from tests.exact import Steps, run_of, small_model
from vqvae import VQVAE, VectorQuantizer

STAGE = {"tokenizer": 0, "diffusion": 1, "evaluation": 2, "weights": 3, "flips": 4}
TOKENS = [("x", np.uint16, (4,)), ("label", np.int32), ("test", bool)]  # rows of tokens.npy


def seed_of(*key):
    """Half of the first 64 bits that NumPy makes of the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) // 2


def walk(n, batch, seed, stage, step):
    """Items of a step: epoch after epoch, each in its own order."""
    epochs = [np.random.default_rng(np.random.SeedSequence((seed, STAGE[stage], 1 << 40, e))).permutation(n)
              for e in range((step + 1) * batch // n + 1)]
    return np.concatenate(epochs)[step * batch:(step + 1) * batch]


# ----------------------------------------------------------------------------
# The denoiser: three steps of train.py.

ROWS = dict(D=4, width=16, depth=1, heads=2, embedding_init="random", steps=3, batch=8, lr=0.05, warmup=1,
            clip=0.5, weight_decay=0.1, ema_decay=0.9, w_rec=0.7, w_diff=1.3, w_cm=2.0, weight_clip=0.5,
            rec_fraction=0.34, max_drop_rate=0.8, label_drop=0.5, max_gap=0.5, teacher="ema", shift=0.4,
            log_snr_min=-4.0, log_snr_max=2.0, log_every=3, sample_every=100, save_every=100, sample_steps=1,
            eval_batch=128, micro_batch=3, seed=5)


def levels(t):
    """lambda(t) and -lambda'(t) / 2."""
    t0, t1 = (2 / math.pi * math.atan(0.4 * math.exp(-end / 2)) for end in (2, -4))
    angle = math.pi * (t0 + (t1 - t0) * t)
    return -2 * (angle / 2).tan().log() + 2 * math.log(0.4), math.pi * (t1 - t0) / angle.sin()


def table_of(model):
    return model.embedding / (model.embedding.square().mean(1, keepdim=True) + 1e-8).sqrt()


def noised(e, log_snr, eps):
    snr = log_snr.exp()[:, None, None]
    return (e * snr.sqrt() + eps) / (1 + snr).sqrt()


def terms_by_hand(model, teacher, x, labels, generator):
    """L_rec, L_diff and L_CM of a batch of ROWS."""
    (B, N), n, D = x.shape, 3, 4
    t = torch.cat([torch.zeros(n), (torch.rand((), generator=generator) + torch.arange(B - n) / (B - n)) % 1])
    s = (t - 0.5).clamp(min=0)
    s = s + (t - s) * torch.rand(B, generator=generator)
    eps = torch.randn(B, N, D, generator=generator)
    mask = 0.8 * torch.rand(B, 1, generator=generator) > torch.rand(B, N, generator=generator)
    labels = torch.where(torch.rand(B, generator=generator) < 0.5, 2, labels)
    eps_s = torch.randn(B, N, D, generator=generator)
    table = table_of(model)
    e, (lam, half) = table[x], levels(t)
    z = noised(e, lam, eps)
    log_p = model(z, lam, labels, mask=mask).log_softmax(-1)
    rec = -log_p[:n].gather(-1, x[:n, :, None]).mean()
    e_hat = log_p[n:].exp() @ table
    weight = half[n:] * lam[n:].exp().clamp(max=0.5)
    diff = (weight[:, None] * (e[n:] - e_hat).square().sum(-1))[~mask[n:]].mean()
    # q(z_s | z_t, x): what lies at alpha_s e with precision 1 / sigma_s^2, seen once more through z_t
    lam_s = levels(s[n:])[0]
    a_t, a_s, v_t, v_s = (v[:, None, None] for v in (
        lam[n:].sigmoid().sqrt(), lam_s.sigmoid().sqrt(), (-lam[n:]).sigmoid(), (-lam_s).sigmoid()))
    ratio = a_t / a_s
    added = v_t - ratio ** 2 * v_s
    precision = 1 / v_s + ratio ** 2 / added
    with torch.no_grad():
        z_s = (a_s * e[n:] / v_s + ratio * z[n:] / added) / precision + eps_s[n:] / precision.sqrt()
        q = teacher(z_s, lam_s, labels[n:], mask=mask[n:], table=table).softmax(-1)
    cm = (torch.xlogy(q, q) - q * log_p[n:]).sum(-1).mean()
    return torch.stack([rec, diff, cm])


def bound_by_hand(model, x, labels, seed):
    """Bits per token of each image, (3, M): prior, rec, diff, in batches of 128."""
    parts, table = [], table_of(model)
    for i in range(0, len(x), 128):
        x_i, labels_i = x[i:i + 128], labels[i:i + 128]
        generator = seeded(seed_of(seed, STAGE["evaluation"], i // 128))
        t = (torch.rand((), generator=generator) + torch.arange(len(x_i)) / len(x_i)) % 1
        (first, _), (last, _), (lam, half) = (levels(time) for time in (0 * t, torch.ones(1), t))
        p_0, p_t = (model(noised(table[x_i], at, torch.randn(*x_i.shape, 4, generator=generator)), at,
                          labels_i).softmax(-1) for at in (first, lam))
        rec = -p_0.gather(-1, x_i[..., None])[..., 0].log()
        diff = (half * lam.exp())[:, None] * (table[x_i] - p_t @ table).square().sum(-1)
        prior = torch.full_like(rec, 2 * math.log1p(math.exp(last)))  # D / 2 log(1 + e^lambda(1))
        parts.append(torch.stack([prior.mean(1), rec.mean(1), diff.mean(1)]))
    return torch.cat(parts, 1).detach().double() / math.log(2)


def summary(bits):
    """Means of the three parts, of their total, and its standard error."""
    total = bits.sum(0)
    return [*bits.mean(1).tolist(), float(total.mean()), float(total.std()) / len(total) ** 0.5]


def test_three_steps_of_the_denoiser(run, tmp_path):
    """Weights, averaged weights, status line and bound of a run, from its settings and its tokens alone."""
    rng, rows = np.random.default_rng(0), np.zeros(170, TOKENS)
    rows["test"][20:] = True
    rows["x"][:20] = rng.integers(0, 5, (20, 4))
    rows["x"][20:] = rng.integers(3, 8, (150, 4))  # another distribution
    rows["label"] = rng.integers(0, 2, 170)
    np.save(tmp_path / "tokens.npy", rows)
    words = ["--data", tmp_path / "tokens.npy", "--tokenizer", run / "tokenizer.pt", *flags(ROWS)]
    assert call("train.py", *words, "--out", tmp_path / "a") == 0

    x, labels = (torch.from_numpy(rows[name].astype(np.int64)) for name in ("x", "label"))
    held_out = x[20:].repeat(2, 1)[:256], labels[20:].repeat(2)[:256]  # more draws than images
    torch.manual_seed(seed_of(5, STAGE["weights"], 1))
    model = EmbeddingDiffusion(8, (2, 2), 4, 16, 1, 2, num_classes=2)
    ema = copy.deepcopy(model)
    untrained, logged = bound_by_hand(ema, *held_out, 5), []
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(3):
        rate = 0.05 * min(1, (step + 1) / 2) * (0.5 + 0.5 * math.cos(math.pi * step / 3))
        items = walk(20, 8, 5, "diffusion", step)
        noise = seeded(seed_of(5, STAGE["diffusion"], step))
        terms = terms_by_hand(model, ema, x[items], labels[items], noise)
        gradient = torch.autograd.grad(terms @ torch.tensor([0.7, 1.3, 2.0]), list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        assert norm > 0.5  # it is clipped
        for (name, p), g, q in zip(model.named_parameters(), gradient, ema.parameters(), strict=True):
            g, (m, v), k = g * 0.5 / norm, moments[name], step + 1
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g ** 2)
            p.data -= rate * (0.1 * p.data + m / (1 - 0.9 ** k) / ((v / (1 - 0.99 ** k)).sqrt() + 1e-8))
            decay = (1 / 10, 2 / 11, 3 / 12)[step]
            q.data.copy_(decay * q.data + (1 - decay) * p.data)
        logged.append([*terms.detach().tolist(), float(norm)])
    trained = bound_by_hand(ema, *held_out, 5)

    found = torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)
    for part, expected in (("model", model), ("ema", ema)):
        for name, value in expected.state_dict().items():
            close(found[part][name], value, rtol=0, atol=3e-4)  # of 0.05, where a gradient is about 0
            assert (found[part][name] - value).abs().mean() < 1e-5
    row, = rows_of(tmp_path / "a" / "diffusion.csv")
    assert [float(row[name]) for name in ("rec", "diff", "cm", "norm")] == pytest.approx(
        np.mean(logged, 0).tolist(), rel=1e-3, abs=2e-5)
    assert float(row["lr"]) == pytest.approx(rate, rel=1e-2)
    evaluations = rows_of(tmp_path / "a" / "evaluation.csv")
    for row, bits, step in zip(evaluations, (untrained, trained), "03", strict=True):
        figures = [float(row[name]) for name in ("prior", "rec", "diff", "total", "standard_error")]
        assert row["step"] == step and figures == pytest.approx(summary(bits), rel=5e-4, abs=1e-5)


def test_bound_by_hand():
    """Of a network with random weights, classes included; draws in batches, twice around."""
    model = small_model(K=8, num_classes=2, depth=1).float()
    x, labels = torch.randint(8, (300, 4), generator=seeded(0)), torch.arange(300) % 2
    found = losses.held_out_bits(model, ShiftedCosine(0.4, -4, 2), x, labels,
                                 lambda i: seeded(seed_of(9, STAGE["evaluation"], i)), 400, 128)
    expected = bound_by_hand(model, x.repeat(2, 1)[:400], labels.repeat(2)[:400], 9)
    close(found, expected, rtol=1e-3, atol=1e-4)


def test_z_s_has_no_gradient():
    """What the target is made of is no way to the table."""
    e, level = torch.ones(1, 2, 3, requires_grad=True), torch.ones(1)
    for pairs in ("markov", "shared"):
        assert not losses.sample_z_s(pairs, 2 * e, e, e.detach(), -level, level, e.detach()).requires_grad


# ----------------------------------------------------------------------------
# The tokenizer.

SHORT = DEFAULTS | dict(tokenizer_steps=100, tokenizer_batch=4, warmup=40, flip=True)


def perceptual(x, x_hat):
    """A distance of images in LPIPS' place."""
    return (x.mean(2) - x_hat.mean(2)).abs().mean((1, 2))


def clipped(loss, network, clip):
    """(gradient of the loss, clipped, its norm before)."""
    gradient = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert norm > clip
    return [g * clip / norm for g in gradient], norm


@pytest.mark.parametrize("update, pixels, lpips", [("ema", "l2", None), ("gradient", "l1", perceptual)])
def test_steps_of_the_tokenizer(update, pixels, lpips):
    """Both networks after one step of plain descent, in the four parts of training: the discriminator absent,
    alone, half ramped up, in full. The images are mirrored by chance."""
    config = SHORT | dict(gan=0.5, gan_start=0.3, beta=0.4, perceptual=0.6, pixel_loss=pixels, clip=0.05,
                          codebook_update=update, tokenizer_lr=0.7, gan_lr=0.3)
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=seeded(0))
    for step, ramp in ((29, 0), (34, 0), (40, 0.5), (90, 1.0)):
        torch.manual_seed(1)
        model, critic = VQVAE(8, 4, 6, 3, 16, update=update), PatchDiscriminator(8, 16)
        model.quantizer.initialised.fill_(True)
        before, critic_before = copy.deepcopy(model).double(), copy.deepcopy(critic).double()
        parts = {"tokenizer": model, "optimizer": torch.optim.SGD(model.parameters()),
                 "discriminator": critic, "discriminator_optimizer": torch.optim.SGD(critic.parameters())}
        log = Steps(step)
        train.optimize_tokenizer(run_of(config, images, lpips=lpips), parts, log)

        rate = min(1, (step + 1) / 41) * (0.5 + 0.5 * math.cos(math.pi * step / 100))
        turned = torch.rand(4, 1, 1, 1, generator=seeded(seed_of(5, STAGE["flips"], step))) < 0.5
        x = images[walk(6, 4, 5, "tokenizer", step)].double() / 127.5 - 1
        x = torch.where(turned, x.flip(3), x)
        codes = before.quantizer.codebook
        flat = before.encoder(x).permute(0, 2, 3, 1).reshape(-1, 3)
        tokens = torch.cdist(flat, codes).argmin(1)
        chosen = codes[tokens]
        through = (flat + (chosen - flat).detach()).view(4, 2, 2, 3).permute(0, 3, 1, 2)
        x_hat = before.decoder(through)
        loss = (x - x_hat).square().mean() if pixels == "l2" else (x - x_hat).abs().mean()
        absent = ("adversarial", "weight", "discriminator", "discriminator_norm")
        expected = dict.fromkeys(absent, torch.tensor(0.0))
        expected |= {"reconstruction": loss, "commitment": (flat - chosen.detach()).square().mean(),
                     "codebook": (flat.detach() - chosen).square().mean()}
        if lpips:
            expected["lpips"] = lpips(x, x_hat).mean()
            loss = loss + 0.6 * expected["lpips"]
        if ramp:
            adversarial = -critic_before(x_hat).mean()
            last = before.decoder[-2].weight
            a = torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            b = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
            expected |= {"adversarial": adversarial, "weight": a / b}
            loss = loss + 0.5 * ramp * expected["weight"] * adversarial
        loss = loss + 0.4 * expected["commitment"]
        if update == "gradient":
            loss = loss + expected["codebook"]
        gradient, expected["norm"] = clipped(loss, before, 0.05)
        for p, old, g in zip(model.parameters(), before.parameters(), gradient, strict=True):
            close(p.double(), old - 0.7 * rate * g, rtol=0, atol=1e-5)
        critic_gradient = [0] * len(list(critic.parameters()))
        if step > 30:
            real, fake = critic_before(x), critic_before(x_hat.detach())
            hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
            critic_gradient, norm = clipped(hinge, critic_before, 0.05)
            expected |= {"discriminator": hinge, "discriminator_norm": norm}
        for p, old, g in zip(critic.parameters(), critic_before.parameters(), critic_gradient, strict=True):
            close(p.double(), old - 0.3 * rate * g, rtol=0, atol=1e-5)
        assert {k: float(v.detach()) for k, v in log.losses.items()} == pytest.approx(
            {k: float(v.detach()) for k, v in expected.items()}, rel=1e-4, abs=1e-6)
        assert torch.equal(log.tokens.flatten(), tokens)


def test_when_codes_restart(monkeypatch):
    """Every so many steps, until three quarters of the training are over; with the step's own generator."""
    restarts = []
    monkeypatch.setattr(train, "RESTART_EVERY", 3)
    monkeypatch.setattr(VectorQuantizer, "restart_dead_codes",
                        lambda vq, z_e, generator: restarts.append(generator.initial_seed()))
    model, images = VQVAE(8, 4, 6, 3, 16), torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    parts = {"tokenizer": model, "optimizer": torch.optim.SGD(model.parameters())}
    train.optimize_tokenizer(run_of(SHORT, images), parts, Steps(*range(70, 80)))
    assert restarts == [seed_of(5, STAGE["tokenizer"], i) for i in (71, 74)]


def test_start_of_the_codebook():
    """Random vectors of the first batch, then ten rounds of k-means; sums that fit."""
    torch.manual_seed(0)
    z = torch.cat([torch.randn(60, 3) + 6 * i for i in range(3)])
    vq = VectorQuantizer(5, 3)
    vq.initialise(z, seeded(4))
    generator = seeded(4)
    start = z[torch.randint(180, (5,), generator=generator)]
    start = start + 1e-3 * z.std(0) * torch.randn(5, 3, generator=generator)
    codes, z = start.double(), z.double()
    for _ in range(10):
        nearest = torch.cdist(z, codes).argmin(1)
        for k in nearest.unique():
            codes[k] = z[nearest == k].mean(0)
    assert (codes - start).norm(dim=1).max() > 1  # the rounds do something
    close(vq.codebook.double(), codes, rtol=0, atol=1e-5)
    close(vq.running_sum.double(), 36 * codes, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_where_dead_codes_restart(update):
    """At vectors far from their code, which are badly served; never two at one place."""
    torch.manual_seed(0)
    vq = VectorQuantizer(8, 3, update)
    vq.initialised.fill_(True)
    vq.codebook.data.copy_(torch.randn(8, 3))
    z = vq.codebook.detach()[torch.arange(40) % 8] + 1e-3 * torch.randn(40, 3)
    z[17] += 30.0  # all but 1e-6 of the squared distance
    z_e = z.T.reshape(1, 3, 5, 8)
    vq.running_count.copy_(torch.tensor([0.0] + 7 * [1.0]))
    vq.restart_dead_codes(z_e, seeded(0))
    assert torch.equal(vq.codebook[0], z[17])
    close(vq.running_count[0], torch.tensor(0.5 * 7 / 8))
    vq.running_count.copy_(torch.tensor([8.0] + 7 * [0.0]))
    assert vq.restart_dead_codes(z_e, seeded(0)) == 7
    assert len({tuple(code) for code in vq.codebook.tolist()}) == 8
    assert (vq.codebook[1:, None] == z).all(-1).any(1).all()


# ----------------------------------------------------------------------------
# Data: tokens, replacements, splits.

def test_sixteen_bits():
    """Tokens are stored without sign: those from 32,768 on come back as they were."""
    rows = np.array([((0, 32767, 32768, 65535), 3, False)], TOKENS)
    x, labels = TokenDataset(rows, torch.device("cpu")).batch(np.array([0]))
    assert x.tolist() == [[0, 32767, 32768, 65535]] and labels.tolist() == [3]


def test_who_takes_the_place_of_an_image():
    """The next one of the same class that can be read, and after the last the first of it."""
    labels, names = [0, 1, 0, 1, 0, 1], ["x", "y"]
    source = Source(".", names, labels, range(6), [])
    source.names = "abcdef"
    source.read = lambda i: b"no image" if i in (0, 3, 5) else np.full((4, 4, 3), 40 * i, np.uint8)
    images = ImageSet(labels, names, 4, source=source, items=np.arange(6))
    assert images.batch([0, 3, 5])[:, 0, 0, 0].tolist() == [80, 40, 40]


@pytest.mark.parametrize("n, every", [(2, 20), (19, 20), (100, 20), (90_000, 45)])
def test_splits(n, every, tmp_path):
    """Every 20th image is held out, of very many every (n / 2000)th."""
    source = Source(tmp_path, [], np.zeros(n), range(n))
    expected = [i for i in range(n) if i % every == min(every, n) // 2]
    assert source.test.tolist() == expected and len(expected) >= 1
    assert sorted([*source.train.tolist(), *expected]) == list(range(n))
