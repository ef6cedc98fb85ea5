"""tokens.npy: every image of a set, encoded once, and served in batches.

One structured row per image: x (N,) uint16, label int32, test bool. The title of the field x names the
tokenizer by its hash, because tokens of one tokenizer mean nothing to another.
"""

import numpy as np
import torch
from tqdm import tqdm

from engine.checkpoint import digest
from engine.distributed import barrier, broadcast
from engine.process import look_ahead, main_process_first, shared_work
from engine.validate import UserError, read_array


def token_dtype(tokenizer):
    maker = f"tokenizer {digest(tokenizer.state_dict())}"
    return np.dtype([((maker, "x"), np.uint16, (tokenizer.grid[0] * tokenizer.grid[1],)), ("label", np.int32),
                     ("test", bool)])


@torch.no_grad()
def encode_sets(tokenizer, train, test, path, device, batch, flip=False):
    """Encodes two data.ImageSets into one token file, training images first. All ranks call this.

    With flip, all training images follow once more, mirrored. Until all is done the rows are in a .part.npy,
    in which label -1 marks the rows to do: a second call goes on where the first stopped. The next images are
    read while these are encoded. Ranks share out the batches, and rank 0 writes what all of them found.
    """
    starts = [0, len(train)] if flip else [0]
    total = len(starts) * len(train) + len(test)
    partial = path.with_suffix(".part.npy")
    rows = main_process_first(lambda: open_partial(partial, token_dtype(tokenizer), total))
    missing = broadcast(None if rows is None else rows["label"] < 0)
    todo = []  # (image set, some of its indices, their slices of rows)
    for images, offsets in ((train, starts), (test, [total - len(test)])):
        for first in range(0, len(images), batch):
            indices = range(first, min(first + batch, len(images)))
            slices = [slice(offset + first, offset + indices.stop) for offset in offsets]
            if any(missing[rows_of].any() for rows_of in slices):
                todo.append((images, indices, slices))

    def encode(items):
        for images in look_ahead(lambda item: item[0].batch(item[1]), items):
            images = images.to(device)
            oriented = [images, images.flip(3)][:len(starts)]
            yield [tokenizer.encode(x).cpu().numpy().astype(np.uint16) for x in oriented]

    remaining = sum(len(indices) * len(slices) for _, indices, slices in todo)
    with tqdm(total=total, initial=total - remaining, desc="tokens", unit="img", leave=False,
              disable=None if rows is not None else True) as bar:
        for (images, indices, slices), tokens in shared_work(todo, encode):
            for rows_of, x in zip(slices, tokens, strict=False):
                rows["x"][rows_of] = x
                rows["test"][rows_of] = images is test
                bar.update(len(x))
            rows.flush()  # tokens are on the disk before the labels say so, whatever happens in between
            for rows_of in slices:
                rows["label"][rows_of] = images.labels[indices.start:indices.stop].numpy()
    if rows is not None:
        rows.flush()
        del rows
        partial.replace(path)
    barrier()


def open_partial(partial, dtype, total):
    """The rows of a file that is being written, as an earlier start left them, or with label -1."""
    if partial.exists():
        rows = read_array(partial, "r+")
        if rows.dtype == dtype and rows.shape == (total,):
            return rows
        del rows
    fresh = partial.with_suffix(".new.npy")  # without marks, a file of zeros would look like a finished one
    rows = np.lib.format.open_memmap(fresh, mode="w+", dtype=dtype, shape=(total,))
    rows["label"] = -1
    rows.flush()
    del rows
    fresh.replace(partial)
    return read_array(partial, "r+")


def open_tokens(path, tokenizer, class_names):
    """The rows of a token file; UserError if they are not of this tokenizer and these classes."""
    if not path.exists():
        raise UserError(f"{path} is not there: run --stage tokens (or all) first")
    rows = read_array(path)
    expected = token_dtype(tokenizer)
    if rows.dtype.names != expected.names or rows.ndim != 1 or not len(rows):
        raise UserError(f"{path} is no token file of train.py: delete it, and give the same command")
    maker, maker_here = rows.dtype.fields["x"][2:], expected.fields["x"][2]
    if maker and maker[0] != maker_here:
        raise UserError(f"{path} was made by {maker[0]}, this is {maker_here}: give the tokenizer.pt that "
                        "lies beside the tokens, or encode the images again")
    for name, count in (("x", tokenizer.K), ("label", max(len(class_names), 1))):
        values = rows[name]
        if values.shape[1:] != expected[name].shape or values.min() < 0 or values.max() >= count:
            raise UserError(f"{path} does not belong to this tokenizer and these classes: {name} is up to "
                            f"{values.max()} of {count}, in the shape {values.shape[1:]}")
    return rows


class TokenDataset:
    """Some rows of tokens.npy, on the device at two bytes a token. class_counts: a list, for each label."""

    def __init__(self, rows, device):
        self.class_counts = np.bincount(rows["label"]).tolist()
        self.x = torch.from_numpy(rows["x"].astype(np.int16)).to(device)
        self.labels, self.device = torch.from_numpy(rows["label"].astype(np.int64)).to(device), device

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        """Indices (B,) -> x (B, N), labels (B,), int64 on the device."""
        indices = torch.from_numpy(indices)
        if self.device.type == "cuda":  # from pinned memory the copy does not make Python wait
            indices = indices.pin_memory()
        # mps copies later, from memory that is free again by then (pytorch issue 189690).
        indices = indices.to(self.device, non_blocking=self.device.type != "mps")
        return self.x[indices].long() & 0xFFFF, self.labels[indices]  # 16 bits without sign


def read_tokens(path, tokenizer, class_names, device):
    """(training tokens, at most 2,000 held-out ones as (x, labels)) of a token file, on the device."""
    rows = open_tokens(path, tokenizer, class_names)
    test = np.flatnonzero(rows["test"])
    test = test[np.linspace(0, len(test) - 1, min(2000, len(test))).astype(int)]
    held_out = TokenDataset(rows[test], device).batch(np.arange(len(test)))
    return TokenDataset(rows[~rows["test"]], device), held_out


def random_tokens(n, denoiser, device):
    """A TokenDataset of n random rows for the arguments of a denoiser, to time its steps."""
    N, classes = denoiser["grid"][0] * denoiser["grid"][1], max(denoiser["num_classes"], 1)
    rows = np.zeros(n, [("x", np.uint16, (N,)), ("label", np.int32)])
    rng = np.random.default_rng(0)
    rows["x"] = rng.integers(0, denoiser["K"], (n, N))
    rows["label"] = rng.integers(0, classes, n)
    return TokenDataset(rows, device)
