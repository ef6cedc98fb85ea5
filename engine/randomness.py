"""Random numbers by step: every draw comes from (seed, stage, step) or (seed, image). So resuming needs no
random state, and neither the batch size nor the number of processes changes what is drawn.
"""

import functools

import numpy as np
import torch

STAGES = {"tokenizer": 0, "diffusion": 1, "evaluation": 2, "weights": 3, "flips": 4}


def seed_for(*key):
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_for(seed, stage, step, device="cpu"):
    """A torch.Generator that depends on (seed, stage, step) alone."""
    return torch.Generator(device).manual_seed(seed_for(seed, STAGES[stage], step))


def image_generators(seed, indices):
    """One CPU generator per image, seeded by (seed, index)."""
    return [torch.Generator().manual_seed(seed_for(seed, i)) for i in indices]


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, stage, epoch):
    return np.random.default_rng(np.random.SeedSequence((seed, STAGES[stage], 1 << 40, epoch))).permutation(n)


def batch_indices(n, batch, seed, stage, step):
    """The step-th batch (batch,) of an endless walk through n items, reshuffled every epoch."""
    epoch, position = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    return np.concatenate([epoch_order(n, seed, stage, e)[position[epoch == e]]
                           for e in range(epoch[0], epoch[-1] + 1)])
