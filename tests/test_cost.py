"""The cost of a run, how it is made to fit, presets by the number of images, and the best checkpoint."""

import copy
import json
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import losses
import train
import vqvae
from embedding_diffusion import EmbeddingDiffusion
from engine.config import DEFAULTS, OPTIONS, PRESETS, describe_models, resolve
from engine.distributed import compute_gradient
from engine.published_vqgan import make_tokenizer
from extras import cost, meta_count, setup
from extras.vqgan_losses import make_discriminator
from schedule import ShiftedCosine
from tests.common import ESTIMATE_COST, TINY, call, close, contents, flags, seeded, weights_of

CPU = SimpleNamespace(name="cpu", memory=float("inf"), flops=1e11, bf16=False)
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


@pytest.mark.parametrize("recompute", [False, True])
def test_cost_of_the_denoiser_is_what_a_cpu_takes(one_thread, recompute):
    config = MEDIUM | {"activation_checkpointing": recompute}
    models = describe_models(config, 3)
    counted = cost.count_diffusion(config, models, CPU, 32)
    model = EmbeddingDiffusion(**models["denoiser"], recompute=recompute).train()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss_of = train.build_loss(config, model, ema, ShiftedCosine(**models["schedule"]))
    x = torch.zeros(32, model.N, dtype=torch.int64)

    def step():
        noisy = losses.sample_noise(model, x, x[:, 0], seeded(0), **{
            name: config[name] for name in losses.NOISE_ARGS})
        compute_gradient(model, loss_of, noisy, 0)
        train.update(model, ema, optimizer, 1.0, 0.9)

    assert counted.total == pytest.approx(allocated(step) + 4 * size(model), rel=0.15)
    expected = {"weights": 1, "gradients": 1, "optimizer": 2, "EMA": 1}
    assert {kind: counted.peak[kind] / size(model) for kind in expected} == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_cost_of_the_tokenizer_is_what_a_cpu_takes(one_thread, update):
    config = MEDIUM | {"codebook_update": update}
    models = describe_models(config, 0)
    counted = cost.count_tokenizer(config, models, CPU, 16)
    tokenizer, discriminator = make_tokenizer(models["tokenizer"]), make_discriminator(config)
    parts = {"tokenizer": tokenizer, "optimizer": torch.optim.AdamW(tokenizer.parameters(), fused=True),
             "discriminator": discriminator,
             "discriminator_optimizer": torch.optim.AdamW(discriminator.parameters(), fused=True)}
    tokenizer.quantizer.started = True
    images = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)

    def step():
        vqvae.tokenizer_step(config, parts, images, None, 1.0, 1e-3, 1e-3)

    assert counted.total == pytest.approx(allocated(step) + 4 * size(tokenizer, discriminator), rel=0.15)


def test_cost_counts_operations():
    """Of a linear layer, forward and backward, by hand; half the images take half the activations."""
    def build():
        layer, x = torch.nn.Linear(8, 4, bias=False), torch.zeros(10, 8)
        return [layer], lambda: layer(x).sum().backward()

    stage = meta_count.Stage(build, 10)
    assert stage.flops == 2 * (2 * 10 * 8 * 4) and stage.size == 4 * 8 * 4
    assert stage.at(5).peak["activations"] == stage.peak["activations"] / 2 > 0


def test_autocast_has_the_types_of_a_gpu():
    """Each operation of the networks gives the type that PyTorch's autocast on CUDA gives."""
    def operations(x, image, weight):
        return [F.linear(x, weight), F.rms_norm(x, (8,)), F.layer_norm(x, (8,)), F.group_norm(image, 2),
                F.silu(x), F.conv2d(image, image), F.gelu(x), torch.addcmul(x, x.float(), x), F.leaky_relu(x),
                F.scaled_dot_product_attention(image, image, image)]

    fake, types = FakeTensorMode(), (torch.bfloat16, torch.bfloat16, torch.float32)
    given = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(
        ((4, 8, 8), (4, 4, 8, 8), (8, 8)), types, strict=True)]
    on_gpu = [FakeTensor(fake, x, torch.device("cuda:0")) for x in given]
    with (mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
          mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True), torch.no_grad(), fake,
          torch.autocast("cuda", dtype=torch.bfloat16)):
        expected = [y.dtype for y in operations(*on_gpu)]
    with meta_count.autocast("meta", torch.bfloat16):
        assert [y.dtype for y in operations(*given)] == expected


def test_a_run_is_made_to_fit(monkeypatch):
    """The fewest passes that fit; what is asked for is kept; what cannot fit is answered."""
    config = DEFAULTS | TINY | dict(size=16, K=1024, width=32, batch=12, eval_batch=2)
    models, chip = describe_models(config, 3), copy.copy(CPU)
    sizes = {"count_tokenizer": [4], "count_diffusion": [12], "count_untrained": []}
    for name, images in sizes.items():  # counted once, for any memory
        stage = getattr(cost, name)(config, models, chip, *images)
        monkeypatch.setattr(cost, name, lambda *_, stage=stage: copy.deepcopy(stage))

    def estimate(**options):
        return cost.estimate(config | options, models, (1000, 50), chip)

    whole = estimate()
    assert (whole.micro_batch, whole.eval_batch, set(whole.fits.values())) == (0, 2, {True})
    assert list(cost.advice(whole)) == [] and "GiB at most" in cost.summary(whole)
    stage = whole.stages["diffusion"]
    three_passes_fit = (stage.at(6).total + stage.at(4).total) / 2  # and two do not
    chip.memory = meta_count.MARGIN * three_passes_fit + meta_count.RESERVE
    assert estimate().micro_batch == 4 and estimate().fits["diffusion"]
    asked = estimate(micro_batch=6)
    assert asked.micro_batch == 6 and "does not fit" in "\n".join(cost.report(asked))
    assert "--micro-batch 4" in " ".join(cost.advice(asked))
    chip.memory = meta_count.RESERVE
    assert estimate().eval_batch == 1
    assert [line.split()[1] for line in cost.advice(estimate())] == ["tokenizer's", "denoiser"]


def test_a_batch_that_is_split_gives_the_same(undone, run, folder, monkeypatch, capsys):
    monkeypatch.setattr(setup, "estimate_cost", ESTIMATE_COST)
    monkeypatch.setattr(cost, "chip_of", lambda *_: CPU)
    monkeypatch.setattr(meta_count, "fits", lambda chip, peak: False)
    assert call("train.py", "--data", folder, "--out", undone, "--stage", "diffusion", *flags(TINY)) == 0
    assert "in passes of 2 images" in capsys.readouterr().out
    assert json.loads((undone / "config.json").read_text())["micro_batch"] == 0
    close(weights_of(undone), weights_of(run), rtol=0, atol=1e-4)


@pytest.mark.parametrize("chip, preset, dtype", [("h100", "32", "bfloat16"), ("cpu", "32-cpu", "float32")])
def test_dry_run(folder, tmp_path, monkeypatch, capsys, chip, preset, dtype):
    """Of another machine, with the preset it would get; nothing is written."""
    monkeypatch.setattr(setup, "estimate_cost", ESTIMATE_COST)
    words = ["--data", folder, "--out", tmp_path / "run", *flags(TINY), "--for", chip]
    assert call("train.py", *words, "--dry-run") == 0
    said = capsys.readouterr().out
    for word in (f"preset {preset}:", f"1 x {chip} (", dtype, "tokenizer", "diffusion", "untrained",
                 "evaluation", "first generated picture", "disk", "passes over the data"):
        assert word in said
    assert call("train.py", *words) == 2 and "--dry-run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_cost_of_the_presets(monkeypatch, capsys):
    monkeypatch.setattr(cost, "PRESETS", {"toy": PRESETS["toy"]})
    monkeypatch.setattr("sys.argv", ["cost.py", "--for", "3090"])
    cost.main()
    assert "toy" in (said := capsys.readouterr().out) and "peak of 3090" in said


def test_bound_in_chunks(one_thread):
    """Rows at a time for the memory: the noise is that of all rows, the terms are the same."""
    model = EmbeddingDiffusion(K=11, grid=(3, 3), D=6, width=16, depth=1, heads=2, num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    x, labels = torch.randint(11, (7, 9)), torch.zeros(7, dtype=torch.int64)
    whole, parts = (losses.held_out_bits(model, ShiftedCosine(0.4, -10, 7), x, labels, seeded, 10, 4, chunk)
                    for chunk in (None, 3))
    close(whole, parts)
    assert losses.mean_bound(whole)["total"] == pytest.approx(float(whole.sum(0).mean()))


@pytest.mark.parametrize("n, width, steps", [(20000, 384, 104100), (2000, 256, 40000), (80000, 512, 400000),
                                             (3000000, 768, 400000)])
def test_presets_suit_the_number_of_images(n, width, steps):
    """At most 500 passes, not less than a tenth of the steps; what is given wins; --preset keeps its own."""
    source = SimpleNamespace(dataset=None, class_names=[], sizes=lambda: (256, 300, 400),
                             counts=lambda: (n, 100))
    args, gpu = SimpleNamespace(preset=None, gpus_like=1, **dict.fromkeys(OPTIONS)), torch.device("cuda")
    config = resolve(args, source, gpu, {})
    assert (config["width"], config["heads"], config["steps"]) == (width, width // 64, steps)
    given = resolve(SimpleNamespace(**vars(args) | {"width": 640, "steps": 7}), source, gpu, {})
    assert (given["width"], given["heads"], given["steps"]) == (640, PRESETS["256"]["heads"], 7)
    args.preset = "256"
    assert resolve(args, source, gpu, {}) == DEFAULTS | PRESETS["256"]


def test_best_checkpoint(folder, run, tmp_path):
    """best.pt is the network of the evaluation with the fewest bits; sample.py takes it."""
    state = torch.load(run / "best.pt", weights_only=True)
    rows = [line.split(",") for line in (run / "evaluation.csv").read_text().splitlines()]
    total = {int(row[0]): float(row[rows[0].index("total")]) for row in rows[2:]}  # without step 0
    assert state["step"] == min(total, key=total.get)
    assert call("sample.py", run / "best.pt", "--n", 2, "--out", tmp_path / "a.png") == 0
    shutil.copytree(run, tmp_path / "pets")
    longer = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY | {"steps": 12})]
    with mock.patch.object(train, "held_out_bits", lambda *args, f=losses.held_out_bits: f(*args) + 1):
        assert call("train.py", *longer) == 0
    assert contents(tmp_path / "pets")["best.pt"] == contents(run)["best.pt"]
