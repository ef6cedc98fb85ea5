"""The price of a run, how it is made to fit, presets by the number of images, and the best checkpoint."""

import copy
import functools
import json
import math
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import losses
import train
import vqvae
from embedding_diffusion import EmbeddingDiffusion
from engine import prepare, presets
from engine.best import Best, paired_difference
from engine.checkpoint import CHECKPOINT_FORMAT, read_checkpoint
from engine.config import DEFAULTS, OPTIONS, PRESETS, describe_models, resolve
from engine.distributed import compute_gradient
from engine.presets import suit_number
from extras import price
from extras.meta_count import CHIPS, Autocast, GiB, chip_of
from extras.published_vqgan import make_tokenizer
from extras.vqgan_losses import make_discriminator
from schedule import ShiftedCosine
from tests.common import FIND_PRICE, TINY, call, close, contents, flags, seeded, weights_of

CPU = SimpleNamespace(name="cpu", kind="cpu", memory=None, flops=1e11, bytes=1e10, bf16=False)
MEDIUM = DEFAULTS | dict(size=16, f=4, K=256, width=64, depth=3, heads=2, batch=32, tokenizer_batch=16,
                         tokenizer_width=32, gan=0.5)


def allocated(work):
    """Bytes at peak that work() allocates on a CPU, inside operations too, beyond what was there."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = sorted((event.start_ns(), event.nbytes()) for event in profiled.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    now = peak = 0
    for _, change in events:
        now += change
        peak = max(peak, now)
    return peak


def size(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


@pytest.mark.parametrize("options", [{}, {"micro_batch": 8}, {"activation_checkpointing": True}], ids=str)
def test_price_of_the_denoiser_is_what_a_cpu_takes(one_thread, options):
    """Bytes at peak within 15 % (2 %, here): with the loss, gradients and update of train.py."""
    config = MEDIUM | options
    models, passes = describe_models(config, 3), config["batch"] // (config["micro_batch"] or config["batch"])
    counted = price.count_diffusion(config, models, CPU, config["batch"], passes)
    model = EmbeddingDiffusion(**models["denoiser"], recompute=config["activation_checkpointing"]).train()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss_of = train.build_loss(config, model, ema, ShiftedCosine(**models["schedule"]))
    x = torch.zeros(config["batch"], model.N, dtype=torch.int64)

    def step():
        noisy = losses.sample_noise(model, x, x[:, 0], seeded(0), **{name: config[name] for name in losses.NOISE_ARGS})
        compute_gradient(model, loss_of, noisy, config["micro_batch"])
        train.update(model, ema, optimizer, 1.0, 0.9)

    assert counted.total == pytest.approx(allocated(step) + 4 * size(model), rel=0.15)
    static = {kind: counted.peak[kind] for kind in ("weights", "optimizer", "EMA")}
    assert static == {"weights": size(model), "optimizer": 2 * size(model), "EMA": size(model)}
    assert counted.peak["kept"] > counted.peak["temporary"] or options
    if not config["activation_checkpointing"]:
        with FlopCounterMode(display=False) as flops:  # which does not know a CPU's attention, 5 % here
            step()
        assert 1 < counted.flops / flops.get_total_flops() < 1.08


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_price_of_the_tokenizer_is_what_a_cpu_takes(one_thread, update):
    """With its discriminator; the gradients of the step before are still there."""
    config = MEDIUM | {"codebook_update": update}
    models = describe_models(config, 0)
    counted = price.count_tokenizer(config, models, CPU, config["tokenizer_batch"])
    adam = functools.partial(torch.optim.AdamW, fused=True)
    tokenizer, discriminator = make_tokenizer(models["tokenizer"]), make_discriminator(config)
    parts = {"tokenizer": tokenizer, "optimizer": adam(tokenizer.parameters()), "discriminator": discriminator,
             "discriminator_optimizer": adam(discriminator.parameters())}
    tokenizer.quantizer.started = True
    images = torch.randint(256, (config["tokenizer_batch"], 3, 16, 16), dtype=torch.uint8)

    def step():
        vqvae.tokenizer_step(config, parts, images, None, 1.0, 1e-3, 1e-3)

    assert counted.total == pytest.approx(allocated(step) + 4 * size(tokenizer, discriminator), rel=0.15)
    weights = size(tokenizer, discriminator)
    assert counted.peak["optimizer"] == 2 * weights and counted.peak["weights"] >= weights


def test_price_has_the_types_of_a_gpu():
    """What stands in for torch.autocast gives each operation of the networks the type that AutocastCUDA gives it."""
    def operations(x, image, weight):
        return [F.linear(x, weight), F.rms_norm(x, (8,)), F.layer_norm(x, (8,)), F.group_norm(image, 2), F.silu(x),
                F.conv2d(image, image), F.gelu(x), torch.addcmul(x, x.float(), x), F.leaky_relu(x), x + x.float(),
                F.scaled_dot_product_attention(image, image, image)]

    fake, shapes = FakeTensorMode(), ((4, 8, 8), (4, 4, 8, 8), (8, 8))
    types = [torch.bfloat16, torch.bfloat16, torch.float32]
    given = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, types, strict=True)]
    with (mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False), torch.no_grad(),
          mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True), fake,
          torch.autocast("cuda", dtype=torch.bfloat16)):
        expected = [y.dtype for y in operations(*(FakeTensor(fake, x, torch.device("cuda:0")) for x in given))]
    with Autocast() as mode, mode.autocast("meta", torch.bfloat16):
        assert [y.dtype for y in operations(*given)] == expected
    assert {torch.float32, torch.bfloat16} == set(expected)


@pytest.fixture
def counted_once(monkeypatch):
    """A count takes a quarter of a second, and knows nothing of the memory that there is."""
    for name in ("count_diffusion", "count_untrained"):
        def count(config, models, chip, *sizes, known, f):
            key = str((config["batch"], models, *sizes))
            return copy.deepcopy(known.get(key) or known.setdefault(key, f(config, models, chip, *sizes)))

        monkeypatch.setattr(price, name, functools.partial(count, known={}, f=getattr(price, name)))


def test_price_decides_how_a_batch_is_split(counted_once):
    """The fewest passes that fit; what is asked for is kept; what cannot fit is answered."""
    config = DEFAULTS | TINY | dict(size=16, K=1024, width=32, batch=12, eval_batch=2, activation_checkpointing=False)
    models, chip = describe_models(config, 3), copy.copy(CPU)

    def estimate(**options):
        return price.estimate(config | options, models, (1000, 50), chip, trains_tokenizer=False)

    whole = estimate()
    more = price.estimate(config, models, (1_001_000, 50), chip, trains_tokenizer=False)  # tokens lie on the device
    assert more.stages["diffusion"].total - whole.stages["diffusion"].total == 1_000_000 * (
        2 * models["denoiser"]["grid"][0] ** 2 + 8)
    assert (whole.micro_batch, whole.eval_batch, set(whole.fits.values())) == (0, 2, {True})
    assert list(price.advice(whole, config, models)) == [] and "GiB at most" in price.summary(whole)
    peaks = [price.count_diffusion(config, models, chip, 12, n).total for n in (2, 3)]
    chip.memory = sum(peaks) / 2 * 1.1 + 0.5 * GiB  # three passes fit, two do not
    assert peaks[1] < peaks[0] < whole.stages["diffusion"].total
    found = estimate()
    assert found.micro_batch == 4 and found.fits["diffusion"] and found.fits["untrained"]
    asked = estimate(micro_batch=6)
    assert asked.micro_batch == 6 and not asked.fits["diffusion"] and "does not fit" in "\n".join(price.report(asked))
    assert "what does: --micro-batch 4" in " ".join(price.advice(asked, config, models))
    chip.memory = GiB // 2
    found = price.estimate(config | {"batch": 3}, models, (1000, 50), chip)
    assert found.eval_batch == 1 and [line.split(" does not fit")[0] for line in price.advice(
        found, config | {"batch": 3}, models)] == ["the tokenizer's batch", "the denoiser"]


def test_price_makes_a_run_fit(counted_once, undone, run, folder, monkeypatch, capsys):
    """A machine with too little memory: the batch is split, the result and what is stored are the same."""
    models, split = describe_models(DEFAULTS | PRESETS["32-cpu"] | TINY, 2), []
    peaks = [price.count_diffusion(DEFAULTS | TINY, models, CPU, 6, n).total for n in (1, 3)]  # 2: gradients weigh more
    assert peaks[1] < peaks[0]
    monkeypatch.setattr(prepare, "find_price", FIND_PRICE)
    monkeypatch.setattr(price, "fits", lambda chip, peak: peak < peaks[0])
    monkeypatch.setattr(train, "compute_gradient", lambda *args: split.append(args[3]) or compute_gradient(*args))
    assert call("train.py", "--data", folder, "--out", undone, "--stage", "diffusion",
                *flags(TINY | {"eval_batch": 2})) == 0
    said = capsys.readouterr().out
    assert split == [2] * TINY["steps"] and "the batch in passes of 2 images" in said
    assert json.loads((undone / "config.json").read_text())["micro_batch"] == 0
    assert read_checkpoint(undone / "ckpt.pt", CHECKPOINT_FORMAT)["config"]["training"]["micro_batch"] == 0
    close(weights_of(undone), weights_of(run), rtol=0, atol=1e-4)


def test_price_in_a_dry_run(folder, tmp_path, monkeypatch, capsys):
    """Of another machine too, with the preset it would get; nothing is written."""
    monkeypatch.setattr(prepare, "find_price", FIND_PRICE)
    words = ["--data", folder, "--out", tmp_path / "run", *flags(TINY), "--dry-run"]
    for chip, preset in (("h100", "32"), ("cpu", "32-cpu")):
        assert call("train.py", *words, "--for", chip) == 0
        said = capsys.readouterr().out
        assert f"preset {preset}: chosen" in said and f"price on 1 x {chip} (" in said and "in all " in said
        assert ("in bfloat16" if chip == "h100" else "in float32") in said and "are enlarged" not in said
        for word in ("tokenizer", "diffusion", "untrained", "evaluation", "first generated picture", "disk: tokens"):
            assert word in said
    assert call("train.py", *words[:-1], "--for", "h100") == 2 and "give --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert [price.in_words(hours) for hours in (1650.4, 12.34, 0.2)] == ["1,650 h", "12.3 h", "12 min"]
    assert call("train.py", *words, "--size", 64, "--for", "cpu") == 0
    assert "most images have fewer than 64 pixels a side and are enlarged" in capsys.readouterr().out
    for name in CHIPS:  # the choices of --for
        assert chip_of(None, name).memory > 20 * GiB
        assert call("train.py", *words[:2], "--for", name) == 2 and "give --dry-run" in capsys.readouterr().err


def test_price_of_the_presets(monkeypatch, capsys):
    """The table of engine/README.md: a line for each."""
    monkeypatch.setattr(price, "PRESETS", {"toy": PRESETS["toy"]})
    monkeypatch.setattr("sys.argv", ["price.py", "--for", "3090"])
    price.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.count("|") == lines[0].count("|") and " yes " in line for line in lines[2:])


def test_bound_in_chunks(one_thread):
    """Rows at a time for the memory: the noise is that of all rows, the terms are the same."""
    torch.manual_seed(0)
    model = EmbeddingDiffusion(K=11, grid=(3, 3), D=6, width=16, depth=1, heads=2, num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    x, labels = torch.randint(11, (7, 9)), torch.zeros(7, dtype=torch.int64)
    rows = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    whole, parts = (losses.held_out_bits(model, ShiftedCosine(0.4, -10, 7), x, labels, seeded, 10, 4, chunk)
                    for chunk in (None, 3))
    close(whole, parts)
    assert rows == 6 * [4] + 3 * [3, 3, 1, 1]  # the last batch has two rows: as many calls, which FSDP demands
    assert whole.shape == (3, 10) and losses.mean_bound(whole)["total"] == pytest.approx(float(whole.sum(0).mean()))


# ----------------------------------------------------------------------------
# Presets by the number of images.

@pytest.mark.parametrize("n, width, steps", [(20000, 384, 104100), (2000, 256, 40000), (80000, 512, 400000),
                                             (3000000, 768, 400000)])
def test_presets_suit_the_number_of_images(n, width, steps, capsys):
    """At most 500 passes, not less than a tenth of the steps; what is given wins; a name or --preset keeps its own."""
    source = SimpleNamespace(dataset=None, class_names=[], sizes=lambda: (256, 300, 400), counts=lambda: (n, 100))
    args, gpu = SimpleNamespace(preset=None, gpus_like=1, **dict.fromkeys(OPTIONS)), torch.device("cuda")
    config = resolve(args, source, gpu, {})
    assert (config["width"], config["heads"], config["steps"]) == (width, width // 64, steps)
    assert config["steps"] * config["batch"] <= max(500 * n, 0.1 * 400000 * 96)
    assert (f"for {n:,} training images: " in capsys.readouterr().out) == (n < 300000)
    for unchanged in (resolve(args, source, gpu, {}, by_number=False),
                      resolve(SimpleNamespace(**vars(args) | {"preset": "256"}), source, gpu, {})):
        assert unchanged == DEFAULTS | PRESETS["256"]
    given = {"width": 640, "steps": 7}
    config = resolve(SimpleNamespace(**vars(args) | given), source, gpu, {})
    assert (config["width"], config["heads"], config["steps"]) == (640, PRESETS["256"]["heads"], 7)
    source.dataset = "ffhq"
    assert resolve(args, source, gpu, {}) == DEFAULTS | PRESETS["ffhq"]
    assert suit_number(DEFAULTS | PRESETS["toy"], {}, 18000) == {}


def test_runs_of_earlier_versions_keep_their_size(folder, run, tmp_path, capsys):
    """A run that was begun before presets looked at the number of images goes on as it was."""
    options = {name: value for name, value in TINY.items() if name != "steps"}
    shutil.copytree(run, tmp_path / "new")
    shutil.copytree(run, tmp_path / "old")
    stored = json.loads((tmp_path / "old" / "config.json").read_text())
    assert stored.pop("by_number") is True
    (tmp_path / "old" / "config.json").write_text(json.dumps(stored))
    for name, steps in (("new", 300), ("old", 3000)):
        with mock.patch.object(train, "train_diffusion") as trained, mock.patch.object(
                presets, "MOST_PASSES", 1):
            assert call("train.py", "--data", folder, "--out", tmp_path / name, *flags(options)) == 0
        assert trained.call_args.args[0].config["steps"] == steps


# ----------------------------------------------------------------------------
# The best checkpoint.

def test_best_says_when_bits_rise(run, tmp_path, capsys):
    """A rise that the noise explains is none, in 500 evaluations; a true one is seen when two in a row show it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(400, generator=generator, dtype=torch.float64)  # what is hard stays hard
    best, content = Best(tmp_path / "best.pt", 0, 400, 256), torch.load(run / "best.pt", weights_only=True)

    def evaluation(rise):
        return 5 + images + rise + 0.2 * torch.randn(400, generator=generator, dtype=torch.float64)

    for step in range(1, 501):
        best.look(step, evaluation(0), lambda: content)
    assert capsys.readouterr().out == "" and best.step < 501
    lucky, again = best.step, Best(tmp_path / "best.pt", 500, 400, 256)
    assert again.step == lucky and torch.equal(again.bits, best.bits)
    for step in (501, 502):
        assert capsys.readouterr().out == ""
        again.look(step, evaluation(0.1), None)
    assert f"since step {lucky:,}, whose network is" in capsys.readouterr().out
    again.look(503, evaluation(-1) * math.nan, None)
    assert again.step == lucky
    again.look(503, evaluation(-1), lambda: content)
    assert again.step == 503 and read_checkpoint(tmp_path / "best.pt", CHECKPOINT_FORMAT)["step"] == 503
    assert Best(tmp_path / "best.pt", 502, 400, 256).bits is None  # of a later step than the run is at
    (tmp_path / "best.pt").write_bytes(b"half")
    assert Best(tmp_path / "best.pt", 600, 400, 256).bits is None


def test_best_compares_draw_by_draw():
    """Images count once, however often they are drawn; of unequal lengths, whole batches."""
    before, d = torch.randn(8, dtype=torch.float64), torch.tensor([1., 3, 2, 2, 3, 5, 0, 0], dtype=torch.float64)
    mean, error = paired_difference(before + d, before, 4, 4)  # per image 2, 4, 1, 1
    assert mean == pytest.approx(2) and error == pytest.approx(math.sqrt(2) / 2)
    longer = torch.cat([before + d, torch.randn(5, dtype=torch.float64)])
    assert paired_difference(longer, before, 4, 4) == pytest.approx((mean, error))
    assert paired_difference(longer, before, 4, 3)[0] == pytest.approx(float(d[[0, 4]].mean() + d[[1, 5]].mean()
                                                                             + d[2] + d[3]) / 4)
    assert paired_difference(before[:1], before[:1], 1, 1) == (0, math.inf)


def test_best_checkpoint(folder, run, tmp_path):
    """best.pt is the network of the evaluation with the fewest bits; sample.py and --init take it; a run goes on."""
    state, last = (torch.load(run / name, weights_only=True) for name in ("best.pt", "ckpt.pt"))
    rows = [line.split(",") for line in (run / "evaluation.csv").read_text().splitlines()]
    total = {int(row[0]): float(row[rows[0].index("total")]) for row in rows[2:]}  # without step 0
    assert state["step"] == min(total, key=total.get)
    assert float(state["bits"].mean()) == pytest.approx(min(total.values()))
    assert {"model", "optimizer"} & state.keys() == set() and last["step"] == 8
    same = all(torch.equal(value, last["ema"][name]) for name, value in state["ema"].items())
    assert same == (state["step"] == 8)
    assert call("sample.py", run / "best.pt", "--n", 2, "--out", tmp_path / "a.png") == 0
    shutil.copytree(run, tmp_path / "pets")
    worse = mock.patch.object(train, "held_out_bits", lambda *args, f=losses.held_out_bits: f(*args) + 1)
    with worse:
        assert call("train.py", "--data", folder, "--out", tmp_path / "pets", *flags(TINY | {"steps": 12})) == 0
    assert contents(tmp_path / "pets")["best.pt"] == contents(run)["best.pt"]
