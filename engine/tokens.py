"""Stage 2 and its files: every image is encoded once, and the tokens are served in batches.

tokens.npy has one structured row per image: x (N,) uint16, label int32, test bool; the title of the field x names the
tokenizer by its hash, because tokens of one tokenizer mean nothing to another. Called by train.py.
"""

import shutil

import numpy as np
import torch
from tqdm import tqdm

from engine.arrays import resumable_array
from engine.build import load_tokenizer
from engine.checkpoint import digest
from engine.distributed import barrier, broadcast
from engine.process import look_ahead, main_process_first, shared_work, write_atomically
from engine.read_back import ReadError, UserError, open_npy
from extras.data_arrays import TokenFile, check_rows
from extras.image_cache import remove_cache


def open_tokens(path):
    """The rows of a token file, memory-mapped."""
    try:
        return check_rows(path, open_npy(path))
    except ReadError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the same command encodes the images "
                        "again") from error


def check_tokenizer_hash(path, tokenizer):
    """UserError if the tokens in a file are those of another tokenizer."""
    maker, asked = open_tokens(path).dtype.fields["x"][2:], digest(tokenizer.state_dict())
    if maker and maker[0] != f"tokenizer {asked}":
        raise UserError(f"{path} was made by {maker[0]}, this one is {asked}: they do not belong together; give the "
                        "tokenizer.pt that lies beside the tokens, or encode the images again")


def check_fit(path, rows, tokenizer, class_names):
    """UserError if rows of a token file cannot be of this tokenizer, or of these classes."""
    (h, w), classes = tokenizer.grid, max(len(class_names), 1)
    if rows["x"].shape[1] != h * w or rows["x"].max() >= tokenizer.K:
        raise UserError(f"{path} has {rows['x'].shape[1]} tokens per image up to {rows['x'].max()}, the tokenizer "
                        f"{h * w} below {tokenizer.K}: they do not belong together")
    if rows["label"].max() >= classes:
        raise UserError(f"{path} has the label {rows['label'].max()}, there are {classes} classes: they do not belong "
                        "together")


def copy_tokens(source, tokenizer, path):
    """A token file made earlier (data_arrays.TokenFile) is checked and copied."""
    check_fit(source.path, open_tokens(source.path), tokenizer, source.class_names)
    check_tokenizer_hash(source.path, tokenizer)
    write_atomically(path, lambda partial: shutil.copyfile(source.path, partial))


@torch.no_grad()
def encode_sets(model, train, test, path, device, batch, flip=False):
    """Encodes two data.ImageSets into one token file, training images first.

    With flip, all training images follow once more, mirrored. The file appears when all is done; till then a
    .part.npy, in which label -1 marks the rows to do, lets a second call go on where the first stopped. The next images
    are read while these are encoded. Processes share out the batches, and process 0 writes what all of them found.
    """
    model.eval()
    partial, starts = path.with_suffix(".part.npy"), [0, len(train)][:1 + flip]
    total = len(starts) * len(train) + len(test)
    maker = f"tokenizer {digest(model.state_dict())}"
    dtype = [((maker, "x"), np.uint16, (model.grid[0] * model.grid[1],)), ("label", np.int32), ("test", bool)]
    rows = main_process_first(lambda: resumable_array(partial, dtype, total, lambda rows: rows["label"].fill(-1)))
    missing, todo = broadcast(None if rows is None else rows["label"] < 0), []
    for dataset, offsets in ((train, starts), (test, [total - len(test)])):
        for first in range(0, len(dataset), batch):
            indices = range(first, min(first + batch, len(dataset)))
            places = [slice(offset + first, offset + indices.stop) for offset in offsets]
            if any(missing[here].any() for here in places):
                todo.append((dataset, indices, places))
    remaining = sum(len(indices) * len(places) for _, indices, places in todo)

    def encode(items):
        for images in look_ahead(lambda item: item[0].batch(item[1]), items):
            images = images.to(device)
            yield [model.encode(oriented).cpu().numpy().astype(np.uint16)
                   for oriented in (images, images.flip(3))[:len(starts)]]

    with tqdm(total=total, initial=total - remaining, desc="tokens", unit="img", leave=False,
              disable=None if rows is not None else True) as bar:
        for (dataset, indices, places), tokens in shared_work(todo, encode):
            for here, x in zip(places, tokens, strict=False):
                rows["x"][here], rows["test"][here] = x, dataset is test
                bar.update(len(x))
            rows.flush()  # tokens are on the disk before the labels say so, whatever happens in between
            for here in places:
                rows["label"][here] = dataset.labels[indices.start:indices.stop].numpy()
    if rows is not None:
        rows.flush()
        del rows
        partial.replace(path)


def encode_tokens(run):
    """Writes tokens.npy of a run, unless it is there: every image encoded, or the tokens that an earlier run made.

    All processes call this. After it only --eval-fid opens images: the cache of decoded ones is deleted.
    """
    path = run.out / "tokens.npy"
    if broadcast(path.exists()):
        main_process_first(lambda: remove_cache(run.out))
        return print(f"tokens: complete ({len(open_tokens(path)):,} images)")
    tokenizer, _ = load_tokenizer(run.models["tokenizer"], run.out, run.device)
    if isinstance(run.source, TokenFile):
        main_process_first(lambda: copy_tokens(run.source, tokenizer, path))
    else:
        sets = run.load_images()
        encode_sets(tokenizer, *sets, path, run.device, run.eval_batch, run.config["flip"])
        if sets[0].pixels is None:
            run.load_images.cache_clear()  # a file's space is free once nobody has it open
    barrier()  # it is written
    main_process_first(lambda: remove_cache(run.out))
    rows = open_tokens(path)
    print(f"tokens: {len(rows):,} images x {rows['x'].shape[1]} tokens in {path}")


def to_device(array, device):
    """A numpy array as a tensor on the device. The copy to a GPU starts from pinned memory, so Python need not wait."""
    tensor = torch.from_numpy(array)  # mps copies later, from memory that is free again by then (pytorch issue 189690)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=device.type != "mps")


class TokenDataset:
    """Some rows of tokens.npy, on the device at two bytes a token. batch(indices) -> x (B, N), labels (B,), int64.

    class_counts: how often each label comes, a list.
    """

    def __init__(self, rows, device):
        self.class_counts = np.bincount(rows["label"]).tolist()
        self.x = torch.from_numpy(rows["x"].astype(np.int16)).to(device)
        self.labels, self.device = torch.from_numpy(rows["label"].astype(np.int64)).to(device), device

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        indices = to_device(indices, self.device)
        return self.x[indices].long() & 0xFFFF, self.labels[indices]  # 16 bits without sign


def read_tokens(path, tokenizer, class_names, device):
    """(training tokens, at most 2,000 held-out ones as (x, labels)) of a token file, on the device."""
    if not path.exists():
        raise UserError(f"{path} is not there: run --stage tokens (or all) first")
    check_tokenizer_hash(path, tokenizer)
    rows = open_tokens(path)
    check_fit(path, rows, tokenizer, class_names)
    test = np.flatnonzero(rows["test"])
    test = test[np.linspace(0, len(test) - 1, min(2000, len(test))).astype(int)]
    return TokenDataset(rows[~rows["test"]], device), TokenDataset(rows[test], device).batch(np.arange(len(test)))
