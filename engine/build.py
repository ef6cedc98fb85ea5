"""Models out of configurations and files."""

import math
from types import SimpleNamespace

import torch

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
    """The pipeline of a ckpt.pt: tokenizer, model (its averaged weights), schedule, class_names and so on."""
    state = read_checkpoint(path, CHECKPOINT_FORMAT)
    config, bf16 = state["config"], bf16_works(device)
    tokenizer = load_weights(path, lambda: make_tokenizer(config["tokenizer"], bf16), state["tokenizer"])
    model = load_weights(path, lambda: EmbeddingDiffusion(**config["denoiser"], bf16=bf16), state["ema"])
    schedule = on_meta(path, lambda: ShiftedCosine(**config["schedule"]))
    sizes = tokenizer.K, math.prod(tokenizer.grid), len(state["class_names"])
    if sizes != (model.K, model.N, model.num_classes):
        raise UserError(f"{path}: tokenizer, denoiser and class names do not belong together: it is damaged")
    more = {name: state[name] for name in ("config", "class_names", "class_counts", "sampling", "step")}
    return make_pipeline(tokenizer.to(device).eval(), model.to(device).eval(), schedule, device, **more)


def read_tokenizer(file):
    """What --tokenizer names, as tokenizer.pt has it: a tokenizer.pt, a ckpt.pt or a published VQGAN."""
    state = read_torch(file)
    if not checkpoint.is_own(state):
        weights = first_stage(file, checkpoint.tensors_of(file, state))
        config = {"published": {name: list(value.shape) for name, value in weights.items()}}
        return {"format": TOKENIZER_FORMAT, "config": config, "tokenizer": weights, "metrics": {}, "step": 0,
                "history": []}
    checkpoint.check_contents(file, state)
    with reading(file):
        if state["format"] == CHECKPOINT_FORMAT:
            metrics = state["metrics"] or {"tokenizer": {"taken from": str(file)}}
            state = {"format": TOKENIZER_FORMAT, "config": state["config"]["tokenizer"],
                     "tokenizer": state["tokenizer"], "metrics": metrics["tokenizer"],
                     "step": state["config"]["training"]["tokenizer_steps"]}
        config = {"size": 256} | state["config"]  # a published one may not say: it is for any size
        check_weights(file, on_meta(file, lambda: make_tokenizer(config)).state_dict(), state["tokenizer"])
    if not state["metrics"]:
        raise UserError(f"--tokenizer {file}: its training is not complete; finish it first")
    return state


def options_of(tokenizer):
    """What a tokenizer of read_tokenizer decides: {option: value}."""
    config = tokenizer["config"]
    if "published" in config:
        return dict(zip(("f", "K", "code_dim"), read_geometry(config["published"]), strict=True))
    return {option: config[name] for name, option in TOKENIZER_OPTIONS.items() if name in config}


def load_tokenizer(config, out, device):
    """(tokenizer in eval mode, its metrics) from the complete tokenizer.pt of a run directory."""
    path = out / "tokenizer.pt"
    state = read_newest(path, TOKENIZER_FORMAT)
    if not state or not state["metrics"]:
        raise UserError(f"{path} is not there or not complete: run --stage tokenizer (or all) first")
    bf16 = bf16_works(device)
    tokenizer = load_weights(state["path"], lambda: make_tokenizer(config, bf16), state["tokenizer"])
    return tokenizer.to(device).eval(), state["metrics"]


def restore(parts, state, init):
    """Loads {name: model or AdamW} from a checkpoint's `state`; without one, models from `init` (--init)."""
    for name, part in parts.items():
        if state:
            with reading(f"{state['path']}: {name}", "it is damaged, or was made by --export and cannot be "
                         "trained further; give that to --init, with another --out"):
                part.load_state_dict(state[name])  # compares the names and shapes of weights
                moments = part.state if isinstance(part, torch.optim.Optimizer) else {}
                for p, found in moments.items():
                    wanted = {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}
                    check_weights(f"{state['path']}: {name}", wanted, found)
        elif name in init:
            with reading(f"--init: the {name}", "take its --preset and sizes, or leave --init away"):
                own, weights, classes = part.state_dict(), dict(init[name]), "class_embedding.weight"
                if classes in own and weights[classes].shape != own[classes].shape:
                    weights[classes] = own[classes]  # embeddings of other classes start anew
                # On the meta device names and shapes are compared, no more.
                part.load_state_dict(weights, assign=next(part.parameters()).is_meta)
