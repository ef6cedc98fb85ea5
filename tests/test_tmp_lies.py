"""Files that lie: each kind, of every file that is read back, is refused in one line, and costs no time and no memory.

A kind is a name and a function that writes the file into a folder and returns its path, or None for the folder itself.
Readers are called in this process, with a bound on what they may allocate: a size that is only announced fails as
surely as one that is filled. Here: checkpoints, run directories, tokens; data and statistics: tests/lying_data.py.
"""

import contextlib
import copy
import io
import json
import os
import re
import signal
import struct
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from embedding_diffusion import EmbeddingDiffusion
from engine import prepare, read_back, status, stored, tokens, build
from engine.arrays import resumable_array
from engine.best import Best, check_bits
from engine.checkpoint import CHECKPOINT_FORMAT, TOKENIZER_FORMAT, digest, read_checkpoint, read_newest
from engine.build import restore
from engine.process import UserError, lock, report_errors, write_atomically
from extras import downloads, fid_sources, run_facts, run_page, vqgan_losses
from extras.datasets import find
from extras.sampling_options import labels_to_draw
from tests.common import TINY, call, flags, noise, png, write_images
sample.load_checkpoint = build.load_checkpoint
tokens.read_tokenizer, tokens.load_tokenizer = build.read_tokenizer, build.load_tokenizer
def load_optimizer(adam, model, state, device, fsdp): restore({"optimizer": adam}, state, {})
from vqvae import VQVAE

CPU = torch.device("cpu")
PATIENCE, MEMORY = 10, 600 << 20  # seconds of work a file; bytes beyond what is allocated already
NASTY = "a\x1b[31m\u202eb\n\t\x07<i>,'\""  # what a name may try
SIZES = dict(tokenizer=dict(size=8, f=4, K=8, code_dim=4, width=16),
             denoiser=dict(K=8, grid=(2, 2), D=4, width=16, depth=1, heads=2, num_classes=2),
             schedule=dict(shift=1.0, log_snr_min=-10.0, log_snr_max=7.0))
GONE = object()  # in place of a value: the entry is not there


class Waited(BaseException):
    """It took too long. No `except Exception` may take it for a damaged file."""


@contextlib.contextmanager
def bounded():
    """In this block, MemoryError beyond MEMORY more bytes, and Waited for what waits, or works too long."""
    def late(*_):
        raise Waited(f"it took more than {PATIENCE} s")

    before, limits = signal.signal(signal.SIGALRM, late), None
    with contextlib.suppress(ImportError, OSError):  # Linux alone says what is allocated
        import resource
        with open("/proc/self/status") as file:
            now = int(re.search(r"VmData:\s+(\d+)", file.read())[1]) << 10
        limits = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, limits[1]))
    signal.alarm(6 * PATIENCE)  # of the clock, which others on the machine share
    began = time.process_time()
    try:
        yield
        assert time.process_time() - began < PATIENCE
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        if limits:
            resource.setrlimit(resource.RLIMIT_DATA, limits)


RESULTS=[]
def refused(kinds, read, tmp_path, says=()):
    where = tmp_path / f"lies{len(list(tmp_path.iterdir()))}"
    for number, (name, write) in enumerate(kinds.items()):
        folder = where / f"lie{number}"
        folder.mkdir(parents=True)
        path = write(folder) or folder
        began=time.process_time()
        try:
            with bounded():
                read(path)
            r="LOADS"
        except UserError as e:
            r="line "+("" if f"lie{number}" in str(e) and str(e).isprintable() and len(str(e))<700 else "BAD ")+str(e)
            c=e
            while c is not None:
                if isinstance(c,MemoryError): r="MEM "+r
                c=c.__cause__ or c.__context__
        except BaseException as e:
            r=f"RAISES {e!r}"[:300]
        with open('/tmp/lies.txt','a') as f: f.write(f"{where.parent.name[:30]} | {name[:60]} | {time.process_time()-began:.2f}s | {r}\n")


def edited(state, entry, value):
    """A copy of nested dicts in which an entry, "a/b/c", is another, or GONE, or a function of what it was."""
    state, (*path, last) = copy.copy(state), entry.split("/")
    inner = state
    for part in path:
        inner[part] = copy.copy(inner[part])
        inner = inner[part]
    inner[last] = value(inner[last]) if callable(value) else value
    if value is GONE:
        del inner[last]
    return state


def saved(state, name="ckpt.pt"):
    def write(folder):
        torch.save(state, folder / name)
        return folder / name
    return write


def edits(state, changes, name="ckpt.pt"):
    """Kinds that differ from an honest state in one entry each."""
    return {f"{entry}, {number}": saved(edited(state, entry, value), name)
            for number, (entry, value) in enumerate(changes)}


def put(name, content=b""):
    """A file of these bytes, or of this text."""
    def write(folder):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name
    return write


def pipe(name):
    def write(folder):
        os.mkfifo(folder / name)
        return folder / name
    return write


def device(name):
    def write(folder):
        (folder / name).symlink_to("/dev/zero")
        return folder / name
    return write


def npy(array, name="a.npy"):
    def write(folder):
        np.save(folder / name, array)
        return folder / name
    return write


def header(shape, kind="|u1", body=b""):
    """A .npy that claims a shape, whatever there is of it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue() + body


DEEP_HEADER = b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000


def nested(depth, twice=False):
    """Lists in one another; twice: each is named twice, so there are 2^depth of them to a reader that follows."""
    inner = []
    for _ in range(depth):
        inner = [inner, inner] if twice else [inner]
    return inner


@pytest.fixture(scope="module")
def honest():
    """The state of an honest ckpt.pt, with an optimizer that did one step."""
    torch.manual_seed(0)
    tokenizer, model = VQVAE(**SIZES["tokenizer"]), EmbeddingDiffusion(**SIZES["denoiser"])
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    sum(p.square().sum() for p in model.parameters()).backward()
    adam.step()
    some = {"total": 3.0}
    return {"format": CHECKPOINT_FORMAT, "config": SIZES | {"training": {"label_drop": 0.1, "tokenizer_steps": 8}},
            "class_counts": [3, 5], "tokenizer": tokenizer.state_dict(), "model": model.state_dict(), "ema": model.state_dict(),
            "optimizer": adam.state_dict(), "class_names": ["cat", "dog"], "begin": 0, "step": 8, "history": [],
            "sampling": {"steps": 3, "guidance": 1.0, "sampler": "ddim"},
            "metrics": {"vlb": some, "collapse": some, "tokenizer": {"psnr": 20.0}}}


def spoiled(weight):
    """What stands in place of a weight, each made of an honest one; the last three are less than they claim."""
    one = weight.flatten()[:1].clone()
    return [GONE, "text", weight[..., :-1].clone(), weight.double(), weight.bfloat16(), weight * float("nan"),
            torch.full_like(weight, float("inf")), weight.to_sparse(), one.expand(weight.shape), one.expand(1 << 40),
            weight[:1].expand(1 << 40, *weight.shape[1:])]


# ----------------------------------------------------------------------------
# Checkpoints.

def test_checkpoints_that_lie(honest, tmp_path, monkeypatch):
    """ckpt.pt, as sample.py opens it: every entry away, or of another type, range or shape, or more than the file."""
    honest = {name: value for name, value in honest.items() if name not in ("model", "optimizer")}  # it needs none
    monkeypatch.setenv("VQLCMD_MAX_CLASSES", "99")
    assert sample.load_checkpoint(saved(honest)(tmp_path), CPU).class_names == ["cat", "dog"]
    kinds = [(entry, GONE) for entry in (
        "format", "config", "tokenizer", "ema", "class_names", "sampling", "metrics", "step", "config/denoiser",
        "config/denoiser/K", "config/tokenizer/size", "config/training", "config/training/label_drop",
        "sampling/steps", "metrics/vlb")]
    kinds += [(entry, value) for entry in ("config", "tokenizer", "ema", "sampling", "config/denoiser", "metrics")
              for value in ([1], "text", torch.zeros(2))]
    kinds += [(f"config/{size}", value) for size in (
        "denoiser/K", "denoiser/width", "denoiser/heads", "denoiser/depth", "denoiser/D", "tokenizer/K",
        "tokenizer/size", "tokenizer/f", "tokenizer/code_dim", "tokenizer/width")
        for value in (0, 10 ** 9, "2")]
    kinds += [("config/denoiser/width", value) for value in (-1, 3, 10 ** 30, 2.5, None, True)]
    kinds += [
        ("config/tokenizer/blocks", 10 ** 9), ("config/tokenizer/update", "x"), ("config/tokenizer/more", 1),
        ("config/denoiser/num_classes", 10 ** 9), ("config/denoiser/num_classes", 3), ("config/denoiser/grid", "22"),
        ("config/denoiser/grid", (10 ** 9, 10 ** 9)), ("config/denoiser/grid", (2, 1)), ("config/denoiser/norm", "x"),
        ("config/denoiser/output_prior", "yes"), ("config/denoiser/more", 1), ("config/schedule/shift", 0.0),
        ("config/schedule/shift", float("nan")), ("config/schedule/shift", "a"), ("config/schedule/log_snr_min", 8.0),
        ("config/schedule/log_snr_max", torch.zeros(1)), ("config/training/label_drop", 2.0),
        ("sampling/steps", 0), ("sampling/steps", 10 ** 12), ("sampling/guidance", float("nan")),
        ("sampling/guidance", "1"), ("sampling/sampler", "x"), ("sampling/more", 1), ("class_names", "cats"),
        ("class_names", [1, 2]), ("class_names", ["cat"]), ("class_names", ["x" * 10 ** 6, "y"]),
        ("class_names", ["x"] * 100), ("class_counts", 0), ("class_counts", "12"), ("class_counts", {"cat": 1}),
        ("class_counts", torch.ones(2)), ("class_counts", torch.zeros(1).expand(1 << 40)), ("class_counts", [1.0, 2]),
        ("class_counts", [1, -1]), ("class_counts", [1, float("nan")]), ("class_counts", [1, 1 << 41]),
        ("class_counts", [True, 1]), ("class_counts", [[1], 1]), ("class_counts", [1, 1, 1]),
        ("class_counts", [1] * 9999), ("class_counts", [torch.ones(1), 1]), ("sampling/steps", 2.5),
        ("sampling/steps", True), ("sampling/steps", torch.ones(1)), ("sampling/guidance", float("inf")),
        ("sampling/guidance", [1.0]), ("sampling/sampler", ["ddim"]), ("sampling", {}), ("sampling", nested(100)),
        ("sampling", dict.fromkeys(map(str, range(9999)), 1)), ("step", -1), ("step", "8"), ("step", 10 ** 40),
        ("step", True),
        ("format", torch.zeros(2)), ("format", ["x"]), ("format", "vq-lcmd checkpoint 2"), ("begin", 9),
        ("history", [torch.zeros(2, 2)]), ("history", 3), ("metrics/vlb", 3), ("metrics/vlb/total", "\x1b[31m"),
        ("metrics/tokenizer", {"\n": 1.0}), ("more", nested(100)), ("more", nested(60, twice=True)),
        ("config/more", nested(60, twice=True)), ("ema/another", torch.zeros(2)), ("ema/\x1b\n", torch.zeros(2)),
        ("ema/" + "a." * 5000, torch.zeros(2))]
    kinds += [("ema/embedding", value) for value in spoiled(honest["ema"]["embedding"])]
    kinds += [("tokenizer/quantizer.codebook", value) for value in spoiled(honest["tokenizer"]["quantizer.codebook"])]
    refused(edits(honest, kinds), lambda path: sample.load_checkpoint(path, CPU), tmp_path)
    for counts in ([], (3, 5), [1 << 40] * 2):
        pipeline = sample.load_checkpoint(saved(honest | {"class_counts": counts})(tmp_path), CPU)
        assert pipeline.class_counts == (counts if counts is None else list(counts))
        if counts:
            args = SimpleNamespace(class_counts="training")
            assert labels_to_draw(8, args, pipeline, [0, 1])[0].bincount().tolist() == [[3, 5], [4, 4]][counts[0] > 3]


def test_pickles_that_lie(tmp_path, monkeypatch):
    """What is around the tensors: steps that ask for memory, storages that are not there, packed archives."""
    plain = io.BytesIO()
    torch.save({"state_dict": {"encoder.x": torch.zeros(4)}}, plain)

    def zipped(change, how=zipfile.ZIP_STORED):
        def write(folder):
            with zipfile.ZipFile(plain) as old, zipfile.ZipFile(folder / "a.ckpt", "w", how) as new:
                for name in old.namelist():
                    new.writestr(name, change(old.read(name)) if name.endswith("/data.pkl") else old.read(name))
            return folder / "a.ckpt"
        return write

    legacy = io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, legacy, _use_new_zipfile_serialization=False)
    legacy = legacy.getvalue()
    huge = legacy.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f")  # numbers of elements
    offset, more = (lambda old: old.replace(b"K\x00K\x04\x85", b"K\x01K\x04\x85"),
                    lambda old: old.replace(b"K\x00K\x04\x85", b"K\x00K\x05\x85"))
    with zipfile.ZipFile(plain) as archive:
        content = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    assert huge != legacy and offset(content) != content != more(content)
    lists, room = b"\x80\x02" + b"]" * 10_009 + b".", b"\x80\x02]r" + struct.pack("<I", 2 ** 31) + b"."
    kinds = {
        "lists": zipped(lambda _: lists),
        "room for 2^31 numbers": zipped(lambda _: room),
        "packed": zipped(lambda old: old, zipfile.ZIP_DEFLATED),
        "bytes that are not there": zipped(lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."),
        "no end": zipped(lambda old: old[:-1]),
        "empty": zipped(lambda _: b""),
        "an offset": zipped(offset),
        "more elements": zipped(more),
        "old, huge": put("a.ckpt", huge),
        "old, cut": put("a.ckpt", legacy[:-400]),
        "old, lists": put("a.ckpt", lists),
        "old, room": put("a.ckpt", room),
        "text": put("a.ckpt", "hello"),
        "nothing": put("a.ckpt"),
        "pipe": pipe("a.ckpt")}
    says = dict.fromkeys(("lists", "room for 2^31 numbers", "old, lists", "old, room"), "more than 9,999 objects")
    refused(kinds, tokens.read_tokenizer, tmp_path, says)
    refused(kinds, lambda path: vqgan_losses.read_lpips([path]), tmp_path, says)
    refused({name: kinds[name] for name in ("text", "nothing", "pipe")}, lambda path: downloads.find_weights(
        "inception", "http://nowhere", "0" * 64, "or not", path, False), tmp_path)


def test_published_tokenizers_that_lie(tmp_path, small_lpips):
    """Names that are no layers, layers that do not fit together, a codebook that is none; LPIPS' weights."""
    base = {"quant_conv.weight": torch.zeros(4, 4, 1, 1), "post_quant_conv.weight": torch.zeros(4, 4, 1, 1),
            "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3), "decoder.conv_in.weight": torch.zeros(32, 4, 3, 3),
            "quantize.embedding.weight": torch.zeros(8, 4)}
    codebook, first = "quantize.embedding.weight", "encoder.conv_in.weight"
    kinds = {f"{name[:40]}, {number}": {name: value} for number, (name, value) in enumerate([
        (first, GONE), (first, torch.zeros(2, 2)), (codebook, torch.zeros(8)), (codebook, torch.zeros(70_000, 1)),
        (codebook, torch.zeros(1, 4).expand(1 << 40, 4)), (codebook, torch.full((8, 4), float("nan"))),
        ("encoder." + "a." * 50 + "b", torch.ones(1)), ("encoder." + "a" * 10_000, torch.ones(1)),
        ("encoder.forward", torch.ones(1)), ("encoder.training.weight", torch.ones(1)),
        ("encoder.\x1b\n.weight", torch.zeros(2))])}
    kinds["sixty levels"] = {f"encoder.down.{i}.downsample.conv.weight": torch.zeros(1) for i in range(60)}
    refused({name: saved({"state_dict": {k: v for k, v in (base | change).items() if v is not GONE}}, "a.ckpt")
             for name, change in kinds.items()}, tokens.read_tokenizer, tmp_path)
    good = torch.load(small_lpips, weights_only=True)
    name = next(iter(good["state_dict"]))
    refused(edits(good, [(f"state_dict/{name}", value) for value in (
        GONE, torch.zeros(3), good["state_dict"][name] * float("nan"), torch.zeros(1).expand(1 << 40))]),
        lambda path: vqgan_losses.read_lpips([path]), tmp_path)


# ----------------------------------------------------------------------------
# Run directories.

def test_states_that_lie(honest, tmp_path):
    """ckpt.pt and tokenizer.pt of a run that goes on, and of --init and --tokenizer."""
    model = EmbeddingDiffusion(**SIZES["denoiser"])
    adam = torch.optim.AdamW(model.parameters(), fused=True)

    def resume(path):
        state = read_newest(path, CHECKPOINT_FORMAT)
        restore({"model": model}, state, {})
        load_optimizer(adam, model, state, CPU, False)

    def start(path):
        try:
            restore({"model": model}, None, prepare.read_init(path))
        except UserError as error:
            assert "--init" in str(error) or str(path) in str(error)
            raise UserError(f"{path}: {error}") from error

    resume(saved(honest)(tmp_path))
    first = honest["optimizer"]["state"][0]
    groups, state = "optimizer/param_groups", "optimizer/state"
    kinds = [("model", GONE), ("model", {}), ("optimizer", GONE), ("optimizer", [1]), (groups, []), (state, [1]),
             (groups, [{"params": [0]}]), (groups, [{"params": 10 ** 9}]), (state, lambda old: old | {99: first})]
    kinds += [(groups, lambda old, lie=lie: [old[0] | lie]) for lie in (
        {"betas": "ab"}, {"betas": (2.0, 0.9)}, {"eps": float("nan")}, {"fused": "yes"})]
    kinds += [(state, lambda old, lie=lie: old | {0: lie}) for lie in (
        3, {"step": first["step"]}, first | {"exp_avg": first["exp_avg"][:1].clone()}, first | {"exp_avg": "x"},
        first | {"exp_avg_sq": first["exp_avg"] * float("nan")}, first | {"step": torch.zeros(9)})]
    kinds += [("model/head.weight", value) for value in spoiled(honest["model"]["head.weight"])]
    refused(edits(honest, kinds), resume, tmp_path)
    refused(edits(honest, [("ema/head.weight", GONE), ("ema/head.weight", "x"),
                           ("ema/head.weight", lambda weight: weight * float("nan"))]), start, tmp_path)

    tokenizer = {"format": TOKENIZER_FORMAT, "config": SIZES["tokenizer"], "metrics": {"psnr": 20.0}, "step": 8,
                 "history": [], "used": torch.zeros(8), "tokenizer": honest["tokenizer"]}
    saved(tokenizer, "tokenizer.pt")(tmp_path)
    assert tokens.load_tokenizer(SIZES["tokenizer"], tmp_path, CPU)[0].K == 8
    kinds = edits(tokenizer, [
        ("used", torch.zeros(7)), ("used", torch.full((8,), float("nan"))), ("used", "x"), ("step", None),
        ("metrics", {"psnr": {}}), ("metrics", {}), ("config/K", 10 ** 9), ("tokenizer", {}),
        ("config", {"published": {"encoder.x": [10 ** 9, 10 ** 9]}}), ("config", {"published": [1]}),
        ("history", [torch.full((3,), float("nan"))])], "tokenizer.pt")
    refused(kinds, lambda path: tokens.load_tokenizer(SIZES["tokenizer"], path.parent, CPU), tmp_path)
    refused(kinds | edits(tokenizer, [("config/K", 4)]), tokens.read_tokenizer, tmp_path)


def test_best_checkpoints_that_lie(honest, tmp_path):
    """best.pt, as a run that goes on reads it: what it cannot believe is written over, by the next evaluation."""
    bits = torch.ones(4, dtype=torch.float64)
    honest = {name: value for name, value in honest.items() if name != "optimizer"} | {"bits": bits}
    kinds = [("bits", value) for value in (
        "text", None, [1.0] * 4, bits.float(), bits.long(), bits[:3].clone(), bits[:0].clone(), bits.view(2, 2), -bits,
        bits[0].clone(), bits * float("nan"), bits * float("inf"), bits.to_sparse(), bits[:1].clone().expand(1 << 40),
        bits[:1].clone().expand(4))]
    kinds = {"pipe": pipe("best.pt"), "device": device("best.pt"), "text": put("best.pt", "text"),
             "nothing": put("best.pt"), "half": lambda folder: put("best.pt", saved(honest)(folder).read_bytes()[:999])(
                 folder)} | edits(honest, kinds, "best.pt")
    refused({name: kind for name, kind in kinds.items() if name.startswith("bits")}, lambda path: check_bits(
        f"{path}: bits", read_checkpoint(path, CHECKPOINT_FORMAT)["bits"], 4), tmp_path)
    kinds |= edits(honest, [("bits", GONE), ("step", -1), ("step", "8"), ("step", 10), ("class_counts", torch.ones(2)),
                            ("format", "x")], "best.pt")
    for number, (name, write) in enumerate(kinds.items()):
        (tmp_path / str(number)).mkdir()
        path = write(tmp_path / str(number))
        with bounded():
            best = Best(path, 9, 4, 4)
            assert (best.step, best.bits) == (0, None), name
            if not name.startswith("device"):
                best.look(9, bits, lambda: honest)
                assert Best(path, 9, 4, 4).step == 9, name
    (tmp_path / "folder" / "best.pt").mkdir(parents=True)
    best = Best(tmp_path / "folder" / "best.pt", 9, 4, 4)
    with pytest.raises(SystemExit, match="1"), report_errors("train.py"):  # nothing of anybody's is taken away
        best.look(9, bits, lambda: honest)
    assert Best(saved(honest, "best.pt")(tmp_path), 9, 4, 4).step == 8


def test_run_directories_that_lie(tmp_path):
    """config.json, skipped.txt, the CSV files, metrics.json, the lock; and where the next file will be written."""
    def entry(**entries):
        return put("config.json", json.dumps(entries))

    refused({
        "a list": put("config.json", "[]"), "deep": put("config.json", "[" * 10 ** 5), "half": put("config.json", "{"),
        "no text": put("config.json", b"\xff\xfe\x00"), "pipe": pipe("config.json"), "device": device("config.json"),
        "lists": put("config.json", b"[" + b"[]," * 5_000_000 + b"[]]"),
        "folder": lambda folder: (folder / "config.json").mkdir(), "lr": put("config.json", '{"lr": NaN}'),
        "steps": entry(steps="8"), "K": entry(K=-1), "norm": entry(norm="x"), "flip": entry(flip=3),
        "classes": entry(classes=3), "class": entry(classes=[["x"]]), "sides": entry(sides=[1]),
        "side": entry(sides=[1, 2, "3"]), "seed": entry(seed=1.5), "data": entry(data=[1]),
        "images": entry(train_images=-1),
        **{f"minutes {lie}": entry(minutes=lie, steps=9, tokenizer_steps=9) for lie in (
            "5", -1, 1e10, float("nan"), float("inf"), True, [5], {}, None)},  # --minutes, and the steps it chose
        **{f"planned {lie}": entry(minutes=5, steps=9, tokenizer_steps=lie) for lie in (
            0, -3, 2.5, "8", float("nan"), [8], None)}},
        lambda path: stored.read_config(path if path.is_dir() else path.parent), tmp_path)
    refused({"steps": entry(steps="8"), "classes": entry(classes={"a": 1}), "pipe": pipe("config.json")},
            lambda path: run_facts.read_run(path.parent), tmp_path)
    refused({"no tab": put("skipped.txt", "a.png\n"), "two": put("skipped.txt", "a.png\tb\tc\n"),
             "escape": put("skipped.txt", NASTY), "pipe": pipe("skipped.txt")}, stored.read_skipped, tmp_path)
    refused({"no step": put("d.csv", "step,rec\nx,1\n"), "bytes": put("d.csv", b"step,\xff\n"), "pipe": pipe("d.csv"),
             "escape": put("d.csv", "step,rec\n\x1b[31m,1\n"),
             "field": put("d.csv", "step,rec\n1," + "x" * 200_000 + "\n")},
            lambda path: status.trim_rows(path, 9), tmp_path)
    refused({"pipe": pipe(".lock")}, lambda path: lock(path.parent), tmp_path)
    refused({"fid": put("metrics.json", '{"fid": 3}'), "name": put("metrics.json", '{"fid": {"n": "x"}}'),
             "list": put("metrics.json", "[]")},
            lambda path: fid_sources.evaluate_run(type("run", (), {"out": path.parent}), 9), tmp_path)
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "a.pt.part").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "b.pt.part")
    with bounded():
        for name in ("a.pt", "b.pt"):
            write_atomically(tmp_path / name, lambda partial: partial.write_text("new"))
            assert (tmp_path / name).read_text() == "new" and not (tmp_path / name).is_symlink()
    assert (tmp_path / "precious").read_text() == "years of work"


def test_token_files_that_lie(tmp_path):
    """tokens.npy: of a run that goes on, as --data, and half made."""
    tokenizer = VQVAE(**SIZES["tokenizer"])
    rest = [("label", np.int32), ("test", bool)]
    dtype = [((f"tokenizer {digest(tokenizer.state_dict())}", "x"), np.uint16, (4,)), *rest]

    def rows(n=6, kind=dtype, **values):
        made = np.zeros(n, kind)
        made["test"][:2] = True
        for name, value in values.items():
            made[name] = value
        return made

    def changed(change):
        file = io.BytesIO()
        np.save(file, rows())
        return put("a.npy", change(file.getvalue()))

    def sparse(folder):
        with open(folder / "a.npy", "wb") as file:
            file.write(header((1 << 40,), np.lib.format.dtype_to_descr(np.dtype(dtype))))
            file.truncate(file.tell() + (1 << 40) * np.dtype(dtype).itemsize)
        return folder / "a.npy"

    kinds = {
        "zero bytes": put("a.npy"), "half": changed(lambda old: old[:-9]), "header": changed(lambda old: old[:60]),
        "no header": changed(lambda old: b"x" + old), "deep": put("a.npy", DEEP_HEADER), "sparse": sparse,
        "negative": changed(lambda old: old.replace(b"(6,), } ", b"(-6,), }")),
        "claims": changed(lambda old: old.replace(b"(6,), }   ", b"(6666,), }")),
        "float": npy(np.zeros((6, 4))), "two axes": npy(rows().reshape(2, 3)), "no rows": npy(rows(0)),
        "one row": npy(rows(1)), "all train": npy(rows(test=False)), "all test": npy(rows(test=True)),
        "label": npy(rows(label=-1)), "labels": npy(rows(label=10 ** 8)), "objects": npy(np.array([{}])),
        "wide": npy(rows(kind=[("x", np.int64, (4,)), *rest])),
        "names": npy(rows(kind=[("y", np.uint16, (4,)), *rest])),
        "no tokens": npy(rows(kind=[("x", np.uint16, (0,)), *rest])), "pipe": pipe("a.npy")}
    refused(kinds, lambda path: find(str(path)), tmp_path)
    of_a_run = {"ids": npy(rows(x=8)), "classes": npy(rows(label=2)),
                "width": npy(rows(kind=[("x", np.uint16, (5,)), *rest]))}
    refused(kinds | of_a_run, lambda path: tokens.read_tokens(path, tokenizer, ["cat", "dog"], CPU), tmp_path)
    refused({name: kinds[name] for name in ("zero bytes", "half", "deep", "float", "pipe")},
            lambda path: resumable_array(path, dtype, 6), tmp_path)
    path = npy(rows(x=7, label=1))(tmp_path)
    assert len(tokens.read_tokens(path, tokenizer, ["cat", "dog"], CPU)[0]) == 4

    def beside(classes):
        def write(folder):
            put("config.json", json.dumps({"classes": classes}))(folder)
            return npy(rows(label=1))(folder)
        return write

    refused({str(lie): beside(lie) for lie in ([], ["a"], 3, [3, 4])}, lambda path: find(str(path)), tmp_path)


# ----------------------------------------------------------------------------
# Programs, and names.

def test_programs_and_files_that_lie(honest, folder, tmp_path, capsys):
    """Some of them through the programs themselves: status 2, one line, no traceback, nothing written."""
    for name, entry, value in (("w", "config/denoiser/width", 10 ** 9), ("n", "ema/embedding", GONE),
                               ("e", "class_names", ["cat", NASTY, "cow"])):
        (tmp_path / name).mkdir()
        saved(edited(honest, entry, value))(tmp_path / name)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "dataset.json")
    write_images(tmp_path / "pipe", ["a.png", "b.png"], noise(2))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("[]")
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    new = tmp_path / "new"
    same = ["--data", folder, "--out", new, *flags(TINY)]
    for program, words, says in [
        ("sample.py", [tmp_path / "w" / "ckpt.pt"], "config: denoiser: width must be below 1,048,576, is 1000000000"),
        ("sample.py", [tmp_path / "n" / "ckpt.pt"], "ema lacks 'embedding'"),
        ("sample.py", [tmp_path / "e" / "ckpt.pt"], "class names do not belong together"),
        ("train.py", [*same, "--tokenizer", tmp_path / "w" / "ckpt.pt"], "denoiser: width must be below 1,048,576"),
        ("train.py", [*same, "--init", tmp_path / "n" / "ckpt.pt"], "--init: the model there has other sizes"),
        ("train.py", ["--data", tmp_path / "pipe", "--out", new], "dataset.json: a pipe, no file"),
        ("train.py", ["--data", folder, "--out", tmp_path / "run"], "config.json must be entries by name, is []"),
        ("data.py", [tmp_path / "pipe"], "a pipe, no file"),
        ("fid.py", [tmp_path / "s.npz", tmp_path / "s.npz"], "sigma must be numbers of shape (3, 3)"),
    ]:
        capsys.readouterr()
        with bounded():
            assert call(program, *words) == 2, words
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and error.startswith(f"{program}: error: "), (words, error)
        assert not new.exists()


def harmless(text):
    """Nothing but lines of characters that are shown as they are."""
    return all(line.isprintable() for line in text.split("\n"))


def test_names_of_others(honest, tmp_path, capsys, monkeypatch):
    """Class names, file names and texts of others reach terminal, page, CSV and skipped.txt spelled out."""
    assert read_back.printable(NASTY) == "a\\x1b[31m\\u202eb\\n\\t\\x07<i>,'\""
    folder = tmp_path / "set"
    for name in (f"{NASTY}/0.png", f"{NASTY}/1.png", f"{NASTY}/2.png", "b/3.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(noise(1)[0]))
    (folder / f"{NASTY}/{NASTY}.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    assert call("data.py", folder) == 0
    said = capsys.readouterr().out
    assert harmless(said) and "a\\x1b[31m\\u202eb\\n\\t\\x07<i>" in said and "cannot be used: " in said
    source = find(str(folder))
    source.load(8)
    stored.write_skipped(tmp_path / "skipped.txt", source.skipped | {NASTY: NASTY})
    text = (tmp_path / "skipped.txt").read_text().replace("\t", "")
    assert harmless(text) and len(text.splitlines()) == 2 == len(stored.read_skipped(tmp_path / "skipped.txt"))
    state = edited(honest, "class_names", ["cat", NASTY])
    names = sample.load_checkpoint(saved(state)(tmp_path), CPU).class_names
    assert names == ["cat", read_back.printable(NASTY)]
    assert call("sample.py", tmp_path / "ckpt.pt", "--class", "cow") == 2
    assert harmless(capsys.readouterr().err)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": NASTY, "classes": [NASTY], "more": [NASTY]}))
    (tmp_path / "run" / "state.json").write_text(json.dumps({"state": "failed", "message": NASTY, "command": [NASTY]}))
    run_page.write_page(tmp_path / "run")
    page = (tmp_path / "run" / "index.html").read_text()
    assert harmless(page) and "<i>" not in page and "\\x1b" in page
    with pytest.raises(SystemExit), report_errors("a.py"):
        raise UserError(f"no class {NASTY}")
    assert capsys.readouterr().err == f"a.py: error: no class {read_back.printable(NASTY)}\n"
