"""Train VQ-LCMD from images to samples with one command; the same command again continues an interrupted run.

    python train.py                          the built-in set, minutes on two CPU cores
    python train.py --data FOLDER            your own images; a preset is chosen by their size and your device
    python train.py --data FOLDER --preset 64 --out runs/faces --device cuda

Three stages in one run directory (--out):

    tokenizer   images -> VQ-VAE                       tokenizer.pt, reconstructions_*.png, tokenizer.csv
    tokens      every image encoded once               tokens.npy, one memory-mapped array
    diffusion   tokens -> embeddings and denoiser      ckpt.pt, samples_*.png, diffusion.csv, evaluation.csv

Every random draw comes from (seed, stage, step), so an interrupted run continues exactly where it was.
"""

import argparse
import copy
import csv
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import vqvae
from embedding_diffusion import EmbeddingDiffusion
from losses import collapse_diagnostics, training_loss, vlb
from sample import (CHECKPOINT_FORMAT, COLUMNS, CheckpointError, bf16_works, choose_device, default_labels,
                    read_checkpoint, sample_images)
from schedule import ShiftedCosine
from vqvae import VQVAE

TOKENIZER_FORMAT = "vq-lcmd tokenizer 1"

# ----------------------------------------------------------------------------
# Configuration: a preset fills only what the command line leaves open. All sizes and step counts are ours.

OPTIONS = {  # name: (type, default, help); the flag is the name with dashes
    "size": (int, 32, "pixels a side; images are centre-cropped and resized"),
    # tokenizer
    "f": (int, 4, "down-sampling factor, a power of two: N = (size / f)^2 tokens"),
    "K": (int, 512, "codebook size"),
    "code_dim": (int, 16, "width of the tokenizer's codes"),
    "tokenizer_width": (int, 64, "channels of its first level; doubles per level up to 4x"),
    "tokenizer_blocks": (int, 1, "residual blocks per level"),
    "codebook_update": (("ema", "gradient"), "ema", "how the codebook moves"),
    "beta": (float, 0.25, "weight of the commitment loss"),
    "tokenizer_steps": (int, 20000, "training steps of the tokenizer"),
    "tokenizer_batch": (int, 128, "images per tokenizer step"),
    "tokenizer_lr": (float, 4e-4, "its peak learning rate"),
    # embeddings and denoiser
    "D": (int, 16, "width of the learned token embeddings"),
    "norm": (("rms", "layer", "none"), "rms", "normalisation of the embedding table"),
    "width": (int, 384, "width of the transformer"),
    "depth": (int, 8, "its blocks"),
    "heads": (int, 6, "its attention heads"),
    "likelihood": (bool, True, "add the closed-form log-likelihood of a token's own noisy embedding to its logits"),
    # schedule and losses
    "shift": (float, 0.4, "s of the shifted cosine schedule; SNR is multiplied by s^2"),
    "log_snr_min": (float, -10.0, "lambda(1) before the shift"),
    "log_snr_max": (float, 7.0, "lambda(0) before the shift"),
    "w_rec": (float, 1.0, "weight of L_rec"),
    "w_diff": (float, 1.0, "weight of L_diff"),
    "w_cm": (float, 1.0, "weight of L_CM; 0 switches it off"),
    "max_snr": (float, 5.0, "bound on e^lambda in the trained L_diff; inf is the exact bound"),
    "rec_fraction": (float, 0.25, "share of the batch at t = 0, which gives L_rec"),
    "coupling": (("markov", "shared"), "markov", "how z_s and z_t of L_CM belong together"),
    "teacher": (("current", "ema"), "current", "weights of the CM teacher"),
    "p_drop": (float, 0.1, "highest rate of dropped embeddings, drawn per image from [0, p_drop]"),
    "label_drop": (float, 0.1, "rate of dropped labels, for classifier-free guidance"),
    # optimisation of the denoiser
    "steps": (int, 50000, "training steps of the denoiser; may be raised later"),
    "batch": (int, 256, "images per step"),
    "lr": (float, 5e-4, "peak learning rate, reached after warmup, then cosine to zero"),
    "warmup": (int, 200, "warm-up steps, both stages"),
    "weight_decay": (float, 0.0, "AdamW's, denoiser"),
    "clip": (float, 1.0, "largest gradient norm, both stages"),
    "ema_decay": (float, 0.999, "of the averaged weights that sample; shorter at the start"),
    # sampling defaults, stored in the checkpoint
    "sample_steps": (int, 50, "calls of the network per image"),
    "guidance": (float, 1.0, "omega of classifier-free guidance"),
    "sampler": (("ancestral", "ddim"), "ancestral", "sampler"),
    # bookkeeping
    "log_every": (int, 100, "steps between status lines"),
    "sample_every": (int, 1000, "steps between pictures and evaluations"),
    "save_every": (int, 500, "steps between checkpoints"),
}
PRESETS = {
    "toy": dict(size=16, K=256, tokenizer_width=32, tokenizer_steps=2500, tokenizer_batch=64, tokenizer_lr=2e-3,
                width=128, depth=4, heads=4, steps=3000, batch=128, lr=1e-3),
    "32-cpu": dict(size=32, K=512, tokenizer_width=32, tokenizer_steps=4000, tokenizer_batch=64, tokenizer_lr=1e-3,
                   width=128, depth=4, heads=4, steps=5000, batch=64, lr=1e-3),
    "32": dict(size=32),
    "64": dict(size=64, f=8, K=1024, tokenizer_width=96),
    "256": dict(size=256, f=16, K=1024, code_dim=32, tokenizer_width=96, tokenizer_steps=200000, tokenizer_batch=32,
                D=32, width=768, depth=12, heads=12, steps=400000, lr=2e-4, ema_decay=0.9999),
}
CHANGEABLE = {"steps", "log_every", "sample_every", "save_every", "sample_steps", "guidance", "sampler"}
