"""Batches of images for the tokenizer: a thread reads the next one while this one trains. Called by train.py."""

import torch

from engine.distributed import rank_and_world
from engine.randomness import batch_indices, generator_for
from engine.process import look_ahead


def image_batches(dataset, config, seed, start, steps, device):
    """This process's images, uint8 (B / world, 3, H, W) on the CPU, for each step from start to steps - 1.

    For a GPU they lie in pinned memory: copied from there, they need not wait for the step before.
    """
    (rank, world), B = rank_and_world(), config["tokenizer_batch"]
    mine = slice(rank * B // world, (rank + 1) * B // world)

    def read(step):
        images = dataset.batch(batch_indices(len(dataset), B, seed, "tokenizer", step)[mine])
        if config["flip"]:
            mirrored = torch.rand(B, 1, 1, 1, generator=generator_for(seed, "flips", step))[mine] < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        return images.pin_memory() if device.type == "cuda" else images

    return look_ahead(read, range(start, steps))
