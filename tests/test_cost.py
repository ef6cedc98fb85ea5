"""The cost of a run, how it is made to fit, and presets by the number of images."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import train
from engine.config import DEFAULTS, OPTIONS, PRESETS, describe_models, resolve
from engine.tokens import random_tokens
from extras import cost, meta_count, setup
from tests.common import ESTIMATE_COST, TINY, train_tiny
from tests.exact import Steps, run_of

CPU = SimpleNamespace(name="cpu", memory=float("inf"), flops=1e11, bf16=False)
MEDIUM = DEFAULTS | dict(size=16, f=4, K=256, width=64, depth=3, heads=2, batch=32, tokenizer_batch=16,
                         tokenizer_width=32, gan=0.5, embedding_init="random")


def allocated(work, *args):
    """Bytes at peak that work(*args) allocates on a CPU, inside operations too, beyond what was there."""
    work(*args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work(*args)
    events = sorted((event.start_ns(), event.nbytes()) for event in profiled.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in events))


def size(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


def test_cost_of_the_denoiser_is_what_a_cpu_takes():
    """Recomputation saves memory."""
    activations = []
    for recompute in (False, True):
        config = MEDIUM | {"activation_checkpointing": recompute}
        models = describe_models(config, 3)
        counted = cost.count_diffusion(config, models, CPU, 32)
        run = run_of(config, models=models)
        parts = train.build_denoiser(run, None, None)
        tokens = random_tokens(32, models["denoiser"], run.device)
        taken = allocated(train.optimize_denoiser, run, parts, tokens, Steps(0))
        weights = size(parts["model"])
        assert counted.total == pytest.approx(taken + 4 * weights, rel=0.15)
        expected = {"weights": 1, "gradients": 1, "optimizer": 2, "EMA": 1}
        assert {kind: counted.peak[kind] / weights for kind in expected} == pytest.approx(expected, rel=0.01)
        activations.append(counted.peak["activations"])
    assert activations[1] < 0.8 * activations[0]


def test_tokens_lie_on_the_device():
    models = describe_models(MEDIUM, 3)
    few, many = (cost.estimate(MEDIUM, models, (n, 9), CPU).stages["diffusion"].peak["weights"]
                 for n in (1000, 3000))
    assert many - few == 2000 * (2 * 16 + 8)  # 16 numbers of a token, in 2 bytes, and a label in 8


def test_autocast_of_the_count():
    """Products in bfloat16, norms in float32, as on a GPU."""
    x = torch.ones(2, 4, dtype=torch.bfloat16, device="meta")
    with meta_count.autocast("meta", torch.bfloat16):
        assert F.linear(x.float(), x.float()).dtype == torch.bfloat16
        assert {norm(x, (4,)).dtype for norm in (F.layer_norm, F.rms_norm)} == {torch.float32}


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_cost_of_the_tokenizer_is_what_a_cpu_takes(update):
    config = MEDIUM | {"codebook_update": update}
    models = describe_models(config, 0)
    counted = cost.count_tokenizer(config, models, CPU, 16)
    images = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    run = run_of(config, images, models)
    parts = train.build_tokenizer(run, None)
    parts["tokenizer"].quantizer.initialised.fill_(True)
    taken = allocated(train.optimize_tokenizer, run, parts, Steps(config["tokenizer_steps"] - 1))
    kept = 4 * size(parts["tokenizer"], parts["discriminator"])
    assert counted.total == pytest.approx(taken + kept, rel=0.15)


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
    assert len(list(cost.report(whole, full=False))) == 1
    stage = whole.stages["diffusion"]
    three_passes_fit = (stage.at(6).total + stage.at(4).total) / 2  # and two do not
    chip.memory = meta_count.MARGIN * three_passes_fit + meta_count.RESERVE
    assert estimate().micro_batch == 4 and estimate().fits["diffusion"]
    asked = estimate(micro_batch=6)
    assert asked.micro_batch == 6 and "--micro-batch 4" in " ".join(cost.report(asked, full=False))
    chip.memory = meta_count.RESERVE
    assert estimate().eval_batch == 1
    _, *advice = cost.report(estimate(), full=False)
    assert [line.split()[1] for line in advice] == ["tokenizer's", "denoiser"]


def test_dry_run(folder, tmp_path, monkeypatch, capsys):
    """Of another machine, with the preset it would get; nothing is written."""
    monkeypatch.setattr(setup, "estimate_cost", ESTIMATE_COST)
    assert train_tiny(folder, tmp_path / "run", "--dry-run", "--for", "h100") == 0
    said = capsys.readouterr().out
    for word in ("preset 32:", "1 x h100 (", "bfloat16", "first generated picture", "disk"):
        assert word in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("n, width, steps", [
    (20000, 384, 104100), (2000, 256, 40000), (10 ** 6, 768, 400000)])
def test_presets_suit_the_number_of_images(n, width, steps):
    """At most 500 passes, not less than a tenth of the steps; what is given wins."""
    source = SimpleNamespace(dataset=None, class_names=[], sizes=lambda: (256, 300, 400),
                             counts=lambda: (n, 100))
    args, gpu = SimpleNamespace(preset=None, **dict.fromkeys(OPTIONS)), torch.device("cuda")
    config = resolve(args, source, gpu, {})
    assert (config["width"], config["heads"], config["steps"]) == (width, width // 64, steps)
    given = resolve(SimpleNamespace(**vars(args) | {"width": 640, "steps": 7}), source, gpu, {})
    assert (given["width"], given["heads"], given["steps"]) == (640, PRESETS["256"]["heads"], 7)
    source.class_names = ["cat"]
    without_null = resolve(SimpleNamespace(**vars(args) | {"label_drop": 0.0}), source, gpu, {})
    assert without_null["guidance"] == 0 < config["guidance"]
