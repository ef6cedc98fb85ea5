"""Presets: options that belong together, chosen by the images' name or size, cut down to their number, grown for GPUs.

All sizes and step counts are ours, not the paper's. Called by engine/config.py, which has the defaults of all options.
"""

from engine.read_back import UserError

SHARP = dict(pixel_loss="l1", perceptual=1.0, gan=0.5)  # as in VQGAN; for fewer pixels the squared error does
LARGE = dict(**SHARP, size=256, f=16, K=1024, code_dim=32, tokenizer_width=96, tokenizer_steps=200000,
             tokenizer_batch=32, D=32, width=768, depth=12, heads=12, steps=400000, batch=96, lr=2e-4, ema_decay=0.9999)
GREY = dict(size=28, K=256, tokenizer_steps=10000, width=256, depth=6, heads=4, steps=30000)  # 7 x 7 tokens
PRESETS = {
    "toy": dict(size=20, K=256, tokenizer_width=32, tokenizer_steps=2000, tokenizer_batch=32, tokenizer_lr=4e-3,
                width=96, depth=2, heads=3, steps=2500, batch=64, lr=5e-3),
    "32-cpu": dict(size=32, K=512, tokenizer_width=32, tokenizer_steps=4000, tokenizer_batch=32, tokenizer_lr=3e-3,
                   width=128, depth=3, heads=4, steps=3000, batch=64, lr=4e-3),
    "32": dict(size=32),
    "64": dict(**SHARP, size=64, f=8, K=1024, tokenizer_width=96),
    "256": LARGE,
    "cifar10": dict(size=32, flip=True, steps=100000),
    "mnist": GREY,
    "fashion-mnist": GREY,
    # For one GPU of 24 GB or more (engine/README.md has the price of each); with eight of them, --gpus-like 8. The
    # smaller sets get a smaller network.
    "ffhq": LARGE | dict(flip=True, width=512, heads=8, batch=128, steps=300000),
    "lsun-churches": LARGE | dict(width=512, heads=8, batch=128, steps=300000),
    "lsun-bedrooms": LARGE | dict(tokenizer_steps=300000, steps=600000),
    "imagenet": LARGE | dict(flip=True, K=4096, tokenizer_steps=300000, steps=1000000),
}
WIDTHS = ((300000, 768), (50000, 512), (10000, 384), (0, 256))  # training images from which on: width at most
MOST_PASSES = 500  # over the training images; ffhq takes 549, cifar10 512, the other named sets fewer
GROW = {"tokenizer_steps": -2 / 3, "tokenizer_batch": 1, "tokenizer_lr": 1 / 3, "gan_lr": 1 / 3, "steps": -2 / 3,
        "batch": 1, "lr": 1 / 3}  # --gpus-like S: option: power of S
SMALL_SETS = {"cifar10", "fashion-mnist", "mnist"}  # fit the 32-cpu preset, which they get on a CPU


def choose_preset(dataset, median, on_cpu):
    """The preset that is taken unless one is asked for, and the one that a GPU would get.

    dataset: name of a published set or None. median: shorter side of the images in pixels.
    """
    on_gpu = dataset or ("32" if median <= 40 else "64" if median <= 128 else "256")
    return (on_gpu if dataset and dataset not in SMALL_SETS or not on_cpu else "32-cpu"), on_gpu


def suit_number(config, given, n):
    """Changes to a preset that was chosen by the size of n training images, so that it suits their number too (ours).

    Few images need no large network, which would learn them by heart, and no thousand passes. Not narrower than 256,
    not less than a tenth of the preset's steps, nothing that is in given. {option: value}.
    """
    width, changes = next(width for least, width in WIDTHS if n >= least), {}
    if width < config["width"] and not {"width", "heads"} & given.keys():
        changes = {"width": width, "heads": width // 64}
    for steps, batch in (("tokenizer_steps", "tokenizer_batch"), ("steps", "batch")):
        most = max(MOST_PASSES * n // config[batch], config[steps] // 10) // 100 * 100
        if steps not in given and most < config[steps]:
            changes[steps] = most
    return changes


def for_gpus(config, S):
    """The settings of one GPU as they suit S of them (ours; a guess, not measured).

    The number of processes changes no result, so this is not done by itself where there are S of them: it is asked for,
    and the run can go on with any number.
    """
    if S < 1:
        raise UserError(f"--gpus-like {S}: must be at least 1")
    grown = {name: config[name] * S ** power for name, power in GROW.items() if S > 1}
    return config | {name: float(f"{value:.3g}") if name.endswith("lr") else round(value)
                     for name, value in grown.items()}
