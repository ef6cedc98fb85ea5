"""Models out of configurations and files. Called by train.py, sample.py's programs and extras/."""

import math
from types import SimpleNamespace

from embedding_diffusion import EmbeddingDiffusion
from engine import checkpoint
from engine.checkpoint import CHECKPOINT_FORMAT, TOKENIZER_FORMAT, read_checkpoint, read_newest, read_torch
from engine.config import TOKENIZER_OPTIONS
from engine.distributed import bf16_works
from engine.published_vqgan import PublishedVQGAN, first_stage, read_geometry
from engine.validate import UserError, check_weights, load_weights, on_meta, reading
from schedule import ShiftedCosine
from vqvae import VQVAE


def make_tokenizer(config, bf16=False):
    """The tokenizer that a checkpoint's configuration describes: a VQVAE, or a PublishedVQGAN."""
    if "published" in config:
        return PublishedVQGAN(config["published"], config["size"], bf16)
    return VQVAE(**config, bf16=bf16)


def make_pipeline(tokenizer, model, schedule, device, **more):
    """All that sample_images needs, by name."""
    return SimpleNamespace(tokenizer=tokenizer, model=model, schedule=schedule, device=device, **more)


def load_checkpoint(path, device):
    """The pipeline of a ckpt.pt: tokenizer, model (its averaged weights), schedule, class_names, sampling,
    ...
    """
    state = read_checkpoint(path, CHECKPOINT_FORMAT)
    config = state["config"]
    tokenizer = load_weights(f"{path}: tokenizer", lambda: make_tokenizer(config["tokenizer"]), state["tokenizer"])
    model = load_weights(f"{path}: ema", lambda: EmbeddingDiffusion(**config["denoiser"]), state["ema"])
    schedule = on_meta(f"{path}: schedule", lambda: ShiftedCosine(**config["schedule"]))
    tokens, classes = math.prod(tokenizer.grid), len(state["class_names"])
    if (tokenizer.K, tokens, classes) != (model.K, model.N, model.num_classes):
        raise UserError(f"{path}: tokenizer, denoiser and class names do not belong together: it is damaged")
    tokenizer.bf16 = model.bf16 = bf16_works(device)
    more = {name: state[name] for name in ("config", "class_names", "class_counts", "sampling", "step")}
    return make_pipeline(tokenizer.to(device).eval(), model.to(device).eval(), schedule, device, **more)


def read_tokenizer(file):
    """What --tokenizer names, as tokenizer.pt holds it: another run's tokenizer.pt or ckpt.pt, or a VQGAN's.
    """
    content = read_torch(file)
    if not checkpoint.is_own(content):
        weights = first_stage(file, checkpoint.tensors_of(file, content))
        shapes = {name: list(value.shape) for name, value in weights.items()}
        return {"format": TOKENIZER_FORMAT, "config": {"published": shapes}, "tokenizer": weights, "step": 0,
                "metrics": {}}
    state, where = checkpoint.check_contents(file, content), f"{file}: tokenizer"
    if state["format"] == CHECKPOINT_FORMAT:
        metrics = state["metrics"]["tokenizer"] if state["metrics"] else {"taken from": str(file)}
        state = {"format": TOKENIZER_FORMAT, "config": state["config"]["tokenizer"], "metrics": metrics,
                 "tokenizer": state["tokenizer"], "step": state["config"]["training"]["tokenizer_steps"]}
    config = {"size": 1 << 8} | state["config"]  # a published tokenizer is made for any size
    check_weights(where, on_meta(where, lambda: make_tokenizer(config)).state_dict(), state["tokenizer"])
    if not state["metrics"]:
        raise UserError(f"--tokenizer {file}: its training is not complete; finish it first")
    return state


def options_of(tokenizer):
    """What a tokenizer of read_tokenizer decides: {option: value}."""
    if "published" in tokenizer["config"]:
        return dict(zip(("f", "K", "code_dim"), read_geometry(tokenizer["config"]["published"]), strict=True))
    config = tokenizer["config"]
    return {option: config[name] for name, option in TOKENIZER_OPTIONS.items() if name in config}


def load_tokenizer(config, out, device):
    """(tokenizer in eval mode, its metrics) from the complete tokenizer.pt of a run directory."""
    path = out / "tokenizer.pt"
    state = read_newest(path, TOKENIZER_FORMAT)
    if not state or not state["metrics"]:
        raise UserError(f"{path} is not there or not complete: run --stage tokenizer (or all) first")
    where = f"{state['path']}: tokenizer"
    tokenizer = load_weights(where, lambda: make_tokenizer(config, bf16_works(device)), state["tokenizer"])
    return tokenizer.to(device).eval(), state["metrics"]


# ----------------------------------------------------------------------------
# Weights for models that are there.

def restore(parts, state, init):
    """Loads {name: model or optimizer} from a checkpoint's `state`; without one, models from `init` (--init).
    """
    for name, part in parts.items():
        if state:
            if "optimizer" in name and name not in state:
                raise UserError(f"{state['path']} was made by --export and cannot be trained further as it is: give "
                                "it to --init, with another --out")
            with reading(f"{state['path']}: {name}"):  # load_state_dict compares names and shapes of weights
                part.load_state_dict(state[name])
                if "optimizer" in name:
                    check_moments(part)
        elif name in init:
            with reading(f"--init: the {name}", "take its --preset and sizes, or leave --init away"):
                start_from(part, dict(init[name]))


def check_moments(optimizer):
    """ValueError if AdamW's running means are not of the shapes of its parameters."""
    for p, means in optimizer.state.items():
        if means["exp_avg"].shape != p.shape or means["exp_avg_sq"].shape != p.shape or means["step"].numel() != 1:
            raise ValueError("it is of another model")


def start_from(model, weights):
    """Loads weights of another run. Embeddings of other classes start anew."""
    own, classes = model.state_dict(), "class_embedding.weight"
    if classes in own and weights[classes].shape != own[classes].shape:
        weights[classes] = own[classes]
    on_meta = any(value.is_meta for value in own.values())  # where only names and shapes are compared
    model.load_state_dict(weights, assign=on_meta)
