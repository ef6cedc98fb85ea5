"""The engine: passes, processes, kills, checkpoints, what is not finite, files, one process per run."""

import contextlib
import csv
import io
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import time
from unittest import mock

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

import train
import vqvae
from engine import arrays, checkpoint, prepare, status
from engine import process as engine_process
from engine.arrays import resumable_array
from engine.checkpoint import TOKENIZER_FORMAT, previous
from engine.config import TOKENIZER_OPTIONS
from engine.distributed import choose_device, init_distributed
from engine.randomness import batch_indices
from engine.process import (
    RunError,
    UserError,
    lock,
    look_ahead,
    on_signal,
    require_shared,
    write_atomically,
)
from engine.status import TIMES
from extras.vqgan_losses import PatchDiscriminator
from tests.common import (
    TINY,
    call,
    close,
    contents,
    flags,
    free_ports,
    join_processes,
    piped,
    start_processes,
    weights_of,
)

LATE = ["--stage", "diffusion", *flags(TINY)]  # what a copy of `run` without its checkpoint still has to do


def test_batches_walk_through_epochs():
    """Every item once per epoch, in another order each time, whatever the batch; a batch may span several."""
    walk = np.concatenate([batch_indices(7, 5, 0, "diffusion", step) for step in range(7)]).reshape(5, 7)
    assert (np.sort(walk) == np.arange(7)).all() and len({tuple(epoch) for epoch in walk.tolist()}) == 5
    assert np.array_equal(batch_indices(7, 35, 0, "diffusion", 0), walk.flatten())


def test_passes_and_recomputation(undone, run, folder, capsys):
    """--micro-batch changes nothing but rounding, --activation-checkpointing not even that; --compile compiles."""
    words = ["--data", folder, "--out", undone, *LATE]
    expected = weights_of(run)
    compiled = []
    for flag in ["--micro-batch", 1], ["--micro-batch", 4], ["--activation-checkpointing"], ["--compile"]:
        with mock.patch.object(torch, "compile", lambda f: compiled.append(f) or f), mock.patch.object(
                train, "training_loss", wraps=train.training_loss) as passes:
            assert call("train.py", *words, *flag) == 0
        assert passes.call_count == 8 * (2 if flag[0] == "--micro-batch" else 1) * (1 + (flag[-1] == 1))
        if flag[0] == "--micro-batch":  # rounding: at most a hundredth of a step of AdamW, whose rate is 1e-2
            close(weights_of(undone), expected, rtol=0, atol=1e-4)
        else:
            assert torch.equal(weights_of(undone), expected)
        (undone / "ckpt.pt").unlink()
    assert len(compiled) == 1
    with mock.patch.object(torch, "compile", side_effect=torch._dynamo.exc.TorchDynamoException("no compiler")):
        assert call("train.py", *words, "--compile") == 1
    assert "torch.compile does not work here (no compiler): leave --compile away" in capsys.readouterr().err
    assert call("train.py", *words, "--fsdp") == 2 and "start them by torchrun" in capsys.readouterr().err
    with mock.patch.object(torch, "__version__", TorchVersion("2.7.1+cpu")), mock.patch.object(
            prepare, "rank_and_world", lambda: (0, 2)):
        assert call("train.py", *words, "--fsdp") == 2 and "--fsdp needs PyTorch 2.8" in capsys.readouterr().err


def one_of_two(rank, jobs, elsewhere):
    """What torchrun starts twice: train.py, or sample.py, with each of some command lines; and with an --out that is
    another directory for each."""
    for port, words in jobs:
        program = "train.py" if str(words[0]).startswith("--") else "sample.py"
        join_processes(rank, port)
        if "--out" == words[-1]:
            def here(_):
                require_shared(elsewhere[rank], seconds=0.2)

            with mock.patch.object(prepare, "require_shared", here), contextlib.redirect_stderr(io.StringIO()) as error:
                assert call(program, *words, elsewhere[0]) == 2
            says = f"error: {elsewhere[0]} is another directory on {socket.gethostname()}: several machines need a disk"
            assert rank or says in error.getvalue() and error.getvalue().count("\n") == 1
        else:
            assert call(program, *words) == 0


def test_two_processes_train_as_one(run, folder, tmp_path):
    """Global batch 32 in four passes, 8 steps: the weights of one process in one pass to 1e-5. So with --fsdp, which
    goes on from those; and the tokenizer, its discriminator and flips included. Tokens are the same bit for bit. And
    two machines without a disk in common end with one line."""
    settings = {k: v for k, v in TINY.items() if k not in TOKENIZER_OPTIONS.values()}
    settings |= dict(steps=8, batch=32, depth=2, lr=2e-3)
    words, (one, two, split) = ["--data", run / "tokens.npy", *flags(settings)], (tmp_path / name for name in "abc")
    assert call("train.py", *words, "--out", one) == 0
    expected = weights_of(one)
    shutil.copytree(one, split)
    images = ["--data", folder, *flags(TINY | {"flip": True, "tokenizer_steps": 6, "log_every": 1})]
    options = ["--fsdp", "--activation-checkpointing", "--micro-batch", 10, "--steps", 11, "--out", split]
    drawing = [run / "ckpt.pt", "--samples", 21, "--batch", 4, "--out"]
    encoding = ["--data", folder, *flags(TINY), "--flip", "--tokenizer", run / "tokenizer.pt", "--stage", "tokens",
                "--eval-batch", 3, "--out"]
    elsewhere = [tmp_path / "g" / "pets", tmp_path / "h" / "pets"]
    shutil.copytree(run, elsewhere[1])  # an old copy on the other machine
    jobs = zip(free_ports(6), ([*words, "--micro-batch", 4, "--out", two], words + options,
                               [*images, "--out", tmp_path / "e"], [*drawing, tmp_path / "e.npz", "--steps", 2],
                               [*encoding, tmp_path / "f2", "--seed", 0], encoding), strict=True)
    start_processes(one_of_two, list(jobs), elsewhere, n=2, wait=300)
    assert call("train.py", *images, "--stage", "tokenizer", "--out", tmp_path / "d") == 0
    with mock.patch.object(vqvae.VQVAE, "encode", autospec=True, side_effect=vqvae.VQVAE.encode) as encode:
        assert call("train.py", *encoding, tmp_path / "f1") == 0 and encode.call_count > 20
    assert (tmp_path / "f2" / "tokens.npy").read_bytes() == (tmp_path / "f1" / "tokens.npy").read_bytes()
    assert call("sample.py", *drawing, tmp_path / "d.npz", "--steps", 2) == 0
    assert np.array_equal(*(np.load(tmp_path / name)["arr_0"] for name in ("d.npz", "e.npz")))
    by_one, by_two = (contents(tmp_path / name)["tokenizer.csv"] for name in "de")
    for a, b in zip(by_one, by_two, strict=True):  # five decimals of each term
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()}, abs=2e-5)
    assert float(by_one[-1]["adversarial"]) and (tmp_path / "e" / "ckpt.pt").exists()
    measured = [torch.load(tmp_path / name / "tokenizer.pt", weights_only=True)["metrics"] for name in "de"]
    assert measured[0] == pytest.approx(measured[1], abs=2e-2) and measured[0]["ssim"]
    close(weights_of(two), expected, rtol=0, atol=1e-5)
    assert contents(two)["samples_000004.png"] == contents(one)["samples_000004.png"]
    for steps in (11, 12):  # what FSDP2 wrote is a checkpoint like any other
        assert call("train.py", *words, "--out", one, "--steps", steps) == 0
        close(weights_of(split), weights_of(one), rtol=0, atol=1e-5)
        assert {path.name for path in split.iterdir()} == {path.name for path in one.iterdir()}
        assert steps == 12 or call("train.py", *words, "--out", split, "--steps", 12) == 0


def test_two_kills(folder, run, tmp_path):
    """SIGKILL at two random moments, then the same command: every file is the undisturbed run's."""
    out, seed = tmp_path / "pets", int.from_bytes(os.urandom(4), "big")
    print(f"moments of random.Random({seed})")
    words, moments = ["--data", folder, "--out", out, *flags(TINY)], random.Random(seed)
    for _ in range(2):
        with piped(tmp_path / "errors", call, "train.py", *words) as (_, output):
            assert output.readline()  # its first word
            time.sleep(moments.uniform(0, 0.6))
    assert call("train.py", *words) == 0 and contents(out) == contents(run)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_the_checkpoint_before(damage, undone, run, folder, capsys):
    """A last checkpoint that is truncated, or was being renamed: the run goes on from the one before, and says so."""
    words, path = ["--data", folder, "--out", undone, *LATE, "--save-every", 2], undone / "ckpt.pt"
    real = checkpoint.write_atomically

    def stop_after(file, write, **options):
        real(file, write, **options)
        if file == path and torch.load(path, weights_only=True)["step"] == 6:
            raise ArithmeticError

    with mock.patch.object(checkpoint, "write_atomically", stop_after), pytest.raises(ArithmeticError):
        call("train.py", *words)
    assert torch.load(previous(path), weights_only=True)["step"] == 4
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
        assert call("sample.py", path) == 2 and "ckpt.previous.pt is the one before" in capsys.readouterr().err
    else:
        path.unlink()
    assert call("train.py", *words) == 0
    said = capsys.readouterr().out
    assert "going on from there, step 4" in said and "continuing at step 4" in said
    assert contents(undone) == contents(run)


def test_half_a_line(tmp_path):
    """What a kill leaves of a table: rows after the checkpoint, half a row, half a header, an empty file."""
    path = tmp_path / "a.csv"
    for text, left in (("step,loss\n2,5\n4,6\n6,7\n", "step,loss\n2,5\n4,6\n"),
                       ("step,loss\n2,5\n4", "step,loss\n2,5\n"), ("step,lo", None), ("", None)):
        path.write_text(text)
        status.trim_rows(path, 4)
        assert (path.read_text() if path.exists() else None) == left


def test_evaluated_twice(tmp_path):
    """A run that is killed after its last evaluation and before the checkpoint with it evaluates again: one row."""
    path, bound = tmp_path / "evaluation.csv", dict(prior=0.0, rec=1.0, diff=1.0, total=2.0, standard_error=0.1)
    for step in (0, 4, 8, 8):
        status.log_bound(path, step, bound, 8, {"effective_rank": 1.0})
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "0", "4", "8"]


def hold(out):
    """Keeps a run directory until it is killed."""
    held = lock(out)
    print(f"held {held.name}", flush=True)
    time.sleep(60)


def test_one_process_per_run(folder, run, tmp_path, capsys):
    """A run directory that another process works in is refused, until that process dies, however it dies."""
    shutil.copytree(run, tmp_path / "pets")
    words = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]
    with piped(tmp_path / "errors", hold, tmp_path / "pets") as (holder, output):
        assert output.readline().startswith("held ")
        assert call("train.py", *words) == 2 and "is in use by another process" in capsys.readouterr().err
        holder.kill()
        holder.join()
        assert call("train.py", *words) == 0
    with mock.patch.object(engine_process, "fcntl", None):  # Windows: no lock, but it works
        assert call("train.py", *words) == 0


@pytest.mark.parametrize("what, due, way_on", [
    ("loss", {"log_every": 4}, {"lr": 1e-3}), ("gradient", {"log_every": 4}, {"clip": 0.1}),
    ("gradient", {"log_every": 8, "sample_every": 6}, {"seed": 1}),
    ("gradient", {"log_every": 8, "save_every": 2}, {"lr": 1e-3})], ids=["loss", "gradient", "picture", "checkpoint"])
def test_not_finite(what, due, way_on, undone, run, folder, capsys):
    """The step, its terms, and the checkpoint before it, unharmed, whatever is due first after that step; nothing is
    replaced by a zero in silence. The same command goes on, and so does one with what the error says."""
    words, real, calls, kept = ["--data", folder, *LATE, *flags(due)], train.training_loss, [], []

    def broken(*args, **options):
        loss, terms = real(*args, **options)
        calls.append(1)
        if len(calls) != 6:
            return loss, terms
        kept.append((undone / "ckpt.pt").read_bytes())
        # A square root at 0: the value is finite, its slope is not.
        return (loss * math.nan, terms * math.nan) if what == "loss" else (loss + (loss - loss).abs().sqrt(), terms)

    with mock.patch.object(train, "training_loss", broken):
        assert call("train.py", *words, "--out", undone) == 1
    said = capsys.readouterr().err
    assert "loss or gradient is not finite at step 6 (rec " in said and said.count("\n") == 1
    assert "norm nan" in said and ("rec nan" in said) == (what == "loss") and "last checkpoint is kept" in said
    assert "a lower --lr, a lower --clip or another --seed" in said
    assert [(undone / "ckpt.pt").read_bytes()] == kept
    assert torch.load(undone / "ckpt.pt", weights_only=True)["step"] == 4
    other = shutil.copytree(undone, undone.with_name("other"))
    assert call("train.py", *words, "--out", other, *flags(way_on)) == 0
    said, ((name, value),) = capsys.readouterr().out, way_on.items()
    assert f"{name} was {({'clip': 1.0, 'seed': 0} | TINY)[name]}, from here on it is {value}" in said
    assert "continuing at step 4" in said and torch.load(other / "ckpt.pt", weights_only=True)["step"] == 8
    assert weights_of(other).isfinite().all() and not torch.equal(weights_of(other), weights_of(run))
    assert call("train.py", *words, "--out", undone) == 0 and torch.equal(weights_of(undone), weights_of(run))


@pytest.mark.parametrize("part", ["tokenizer", "discriminator"])
def test_not_finite_tokenizer(part, folder, run, tmp_path, capsys):
    """A finite loss with a gradient that is not, at a step after which a checkpoint is due: it is not written."""
    out, path, kept, calls = tmp_path / "pets", tmp_path / "pets" / "tokenizer.pt", [], []
    words = ["--data", folder, "--stage", "tokenizer", *flags(TINY | {"log_every": 8, "save_every": 2})]
    kind, real = {"tokenizer": vqvae.VQVAE, "discriminator": PatchDiscriminator}[part], vqvae.optimizer_step

    def broken(loss, module, *rest):
        """The fourth step; the discriminator starts one step later."""
        calls.append(isinstance(module, kind))
        if not calls[-1] or sum(calls) != (4 if part == "tokenizer" else 3):
            return real(loss, module, *rest)
        assert loss.isfinite()
        kept.append(path.read_bytes())
        hook = next(module.parameters()).register_hook(lambda gradient: gradient * math.nan)
        norm = real(loss, module, *rest)
        hook.remove()
        return norm

    with mock.patch.object(vqvae, "optimizer_step", broken):
        assert call("train.py", *words, "--out", out) == 1
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: the tokenizer's ") and said.count("\n") == 1
    assert "loss or gradient is not finite at step 4 (reconstruction 0." in said and "last checkpoint is kept" in said
    for name in ("commitment", "codebook", "norm", "adversarial", "weight", "discriminator", "discriminator_norm"):
        is_nan = name == {"tokenizer": "norm", "discriminator": "discriminator_norm"}[part]
        assert (f" {name} nan" in said) == is_nan and f" {name} " in said, name
    assert "a lower --tokenizer-lr (or --gan-lr), a lower --clip or another --seed" in said
    assert [path.read_bytes()] == kept and torch.load(path, weights_only=True)["step"] == 2
    shutil.copytree(out, tmp_path / "lower")
    assert call("train.py", *words, "--out", tmp_path / "lower", "--tokenizer-lr", 1e-4) == 0
    said = capsys.readouterr().out
    assert re.search(r"tokenizer_lr was 0.00\d+, from here on it is 0.0001", said) and "continuing at step 2" in said
    assert call("train.py", *words, "--out", out) == 0
    lower, same, undisturbed = (torch.load(folder / "tokenizer.pt", weights_only=True)
                                for folder in (tmp_path / "lower", out, run))
    assert lower["step"] == 8 and lower["metrics"] and same["metrics"] == undisturbed["metrics"]
    for name in ("tokenizer", "discriminator"):
        assert all(value.isfinite().all() for value in lower[name].values())
        assert all(torch.equal(value, undisturbed[name][key]) for key, value in same[name].items())


@pytest.mark.parametrize("at", [3, 4])
def test_codes_do_not_restart_at_nan(at, folder, run, tmp_path, capsys, monkeypatch):
    """Encoder outputs that are not finite, in the step before codes restart or in that very step: the same one line."""
    words, real, calls = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)], vqvae.VQVAE.encode_continuous, []

    def broken(model, images):
        z_e = real(model, images)
        calls.append(model.training)
        return z_e * math.nan if sum(calls) == at else z_e

    monkeypatch.setattr(train, "RESTART_EVERY", 4)
    words += ["--stage", "tokenizer", "--log-every", 8]
    with mock.patch.object(vqvae.VQVAE, "encode_continuous", broken):
        assert call("train.py", *words) == 1
    said = capsys.readouterr().err
    assert f"loss or gradient is not finite at step {at} (reconstruction nan" in said and said.count("\n") == 1
    assert call("train.py", *words) == 0


NAMES = ["loss", "norm"]


def status_of_two(rank, port, out):
    """Two runs of seven steps by two processes, one of them asked to stop before the fourth; and one that breaks."""
    join_processes(rank, port)
    init_distributed()

    def part(folder, state=None, stop_at=None, broken=False):
        log = status.StatusLog("tokenizer", out / folder, NAMES, {"log_every": 5, "save_every": 2}, 7, 4,
                               torch.device("cpu"), state, summed=True, K=16)
        for step in log.loop():
            loss = math.nan if broken and (rank, step) == (1, 2) else 1 / 3 + step ** 2 + 10 * rank
            log.add({"loss": torch.tensor(loss), "norm": torch.tensor(step / 7)}, torch.tensor([[step, 15 - rank]]))
            if log.due("log_every"):
                log.line(lr=step)
            if log.due("save_every"):
                log.save(out / folder / "tokenizer.pt", {"format": TOKENIZER_FORMAT})
            if step + 1 == stop_at and rank == 1:
                engine_process.SIGNALS.append(signal.SIGTERM)
        log.save(out / folder / "tokenizer.pt", {"format": TOKENIZER_FORMAT})
        log.leave_if_stopped()

    part("whole")
    with pytest.raises(SystemExit, match="143"):
        part("stopped", stop_at=3)
    engine_process.SIGNALS.clear()
    state = torch.load(out / "stopped" / "tokenizer.pt", weights_only=True)
    assert state["step"] == 3 and len(state["history"]) == 3
    part("stopped", state)
    with pytest.raises(RunError, match=r"not finite at step 3 \(loss nan, norm 0.28"):
        part("broken", broken=True)
    assert torch.load(out / "broken" / "tokenizer.pt", weights_only=True)["step"] == 2
    torch.distributed.destroy_process_group()


def test_status_lines_of_two_processes(tmp_path):
    """A row is the mean of both processes' losses, and the codes are those that either used, over a stop as well."""
    for name in ("whole", "stopped", "broken"):
        (tmp_path / name).mkdir()
    start_processes(status_of_two, *free_ports(1), tmp_path, n=2, wait=60)
    rows = []
    for name in ("whole", "stopped"):
        with (tmp_path / name / "tokenizer.csv").open(newline="") as file:
            rows.append([{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)])
    steps = [range(5), range(5, 7)]
    assert rows[0] == rows[1] == [
        {"step": str(s[-1] + 1), "loss": f"{5 + 1 / 3 + np.mean([i ** 2 for i in s]):.5f}",
         "norm": f"{np.mean(s) / 7:.5f}", "lr": str(s[-1]), "codes": str(len(s) + 2)} for s in steps]


def test_reading_ahead():
    """In order, one item ahead and no more; the reader's error comes where its item would, and nothing waits."""
    asked = []

    def read(item):
        asked.append(item)
        if item == 3:
            raise OSError("the disk is gone")
        return 10 * item

    ahead, found = look_ahead(read, iter(range(6))), []
    with pytest.raises(OSError, match="the disk is gone"):
        for result in ahead:
            found.append(result)
            assert len(asked) <= len(found) + 1
    assert found == [0, 10, 20] and asked == [0, 1, 2, 3]
    assert list(look_ahead(read, [])) == [] and list(look_ahead(read, [0])) == [0]
    for result in look_ahead(read, range(3)):
        assert result == 0
        break
    with pytest.raises(KeyError):  # the list's error, too
        list(look_ahead(read, ({}["no"] if i else i for i in range(2))))


def test_resumable_array(tmp_path):
    """What is filled stays; a file of other rows, another number, or half a file is refused; none appears half made."""
    path, dtype = tmp_path / "a.part.npy", [(("tokenizer 1", "x"), np.uint16, (2,)), ("label", np.int32)]

    def full(rows):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        resumable_array(path, dtype, 4, full)
    assert not path.exists()
    with mock.patch.object(arrays, "reserve", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(OSError, match=r"No space left on device: .*a.part.npy"):
            resumable_array(path, dtype, 4)
    assert not [name for name in os.listdir(tmp_path) if name != "a.part.new.npy"]
    rows = resumable_array(path, dtype, 4, lambda rows: rows["label"].fill(-1))
    assert not rows["x"].any() and (rows["label"] == -1).all()
    rows["label"][1], rows["x"][1] = 7, (3, 65535)
    rows.flush()
    again = resumable_array(path, dtype, 4, lambda rows: rows["label"].fill(-1))
    assert again["label"].tolist() == [-1, 7, -1, -1] and again["x"][1].tolist() == [3, 65535]
    assert os.listdir(tmp_path) == [path.name]
    content = path.read_bytes()
    for other, length in (([(("tokenizer 2", "x"), np.uint16, (2,)), ("label", np.int32)], 4), (dtype[:1], 4),
                          ([dtype[0], ("label", np.int64)], 4), (dtype, 5)):
        with pytest.raises(UserError, match=r"a.part.npy is of other images, settings or weights: delete it"):
            resumable_array(path, other, length)
    assert path.read_bytes() == content
    path.write_bytes(content[:-3])
    with pytest.raises(UserError, match=r"a.part.npy is damaged .*: delete it"):
        resumable_array(path, dtype, 4)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writing failed"),
                                   KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_atomic_writes(error, tmp_path):
    """A write that fails leaves the old file, and the one before; one that succeeds leaves nothing but the new one."""
    path, before, synced = tmp_path / "deep" / "a.pt", tmp_path / "deep" / "a.previous.pt", []

    def fails(partial):
        partial.write_text("half")
        raise error

    def written():
        return {file.name: file.read_text() for file in path.parent.iterdir() if file.suffix != ".part"}

    with pytest.raises(OSError if not isinstance(error, KeyboardInterrupt) else KeyboardInterrupt):
        write_atomically(path, fails, keep_as=before)
    assert written() == {}
    for text in "12":
        write_atomically(path, lambda partial, text=text: partial.write_text(text), keep_as=before)
    assert written() == {"a.pt": "2", "a.previous.pt": "1"}
    with pytest.raises(BaseException) as caught:
        write_atomically(path, fails, keep_as=before)
    if isinstance(error, KeyboardInterrupt):
        assert caught.value is error
    else:
        assert "a.pt cannot be written: is the disk full?" in str(caught.value)
        assert str(error) in str(caught.value) and not list(path.parent.glob("*.part"))
    assert written() == {"a.pt": "2", "a.previous.pt": "1"}
    with mock.patch.object(os, "fsync", side_effect=lambda _: synced.append(path.read_text())):
        write_atomically(path, lambda partial: partial.write_text("3"), keep_as=before)
    assert synced == ["2"]  # down to the disk before it takes the name
    assert written() == {"a.pt": "3", "a.previous.pt": "2"} and len(os.listdir(path.parent)) == 2


def test_stopping_twice(folder, tmp_path):
    """A second Ctrl-C ends a run at once; a second kill, as schedulers send it, does not keep it from saving."""
    with mock.patch.object(engine_process, "SIGNALS", [signal.SIGTERM]) as received:
        on_signal(signal.SIGTERM, None)
        on_signal(signal.SIGINT, None)
        with pytest.raises(KeyboardInterrupt):
            on_signal(signal.SIGINT, None)
        assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]


def test_one_process_of_one(folder, tmp_path, monkeypatch):
    """WORLD_SIZE=1, as some clusters set it, is plain python: nothing else has to be set."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert call("train.py", "--data", folder, "--out", tmp_path / "a", *flags(TINY), "--stage", "tokenizer") == 0
    assert not torch.distributed.is_initialized()


def test_stopped_between_training_and_fid(monkeypatch):
    """Ctrl-C during the last evaluation: the run ends before the long FID begins, with the shell's status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        monkeypatch.setattr(engine_process, "SIGNALS", [])
        engine_process.release_signals()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        monkeypatch.setattr(engine_process, "SIGNALS", [signal.SIGINT])
        with pytest.raises(SystemExit) as stopped:
            engine_process.release_signals()
        assert stopped.value.code == 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_more_processes_than_gpus(folder, tmp_path, monkeypatch, capsys):
    """Where there is one GPU, torchrun --nproc-per-node 2 says so; the price for eight needs none."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(prepare, "choose_device", lambda name: torch.device("cuda"))
    words = ["--data", folder, "--out", tmp_path / "a"]
    assert call("train.py", *words) == 2 and "more processes than GPUs, 1: lower" in capsys.readouterr().err
    assert call("train.py", *words, "--dry-run", "--for", "h100") == 0 and not (tmp_path / "a").exists()


def test_one_process_that_fails(monkeypatch, capsys):
    """With NCCL: what went wrong is said, and the process ends at once, for the others may wait for it."""
    ended, at_once = mock.Mock(), mock.Mock(side_effect=SystemExit)
    monkeypatch.setattr(engine_process, "uses_nccl", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", ended)
    monkeypatch.setattr(os, "_exit", at_once)
    monkeypatch.setenv("RANK", "5")
    for error, said in ((OSError(28, "No space left on device"), "No space left"), (MemoryError(), "lower this"),
                        (UserError("a mistake"), "a mistake"), (IndexError("a bug"), "IndexError: a bug"),
                        (RunError("the loss is not finite"), None)):  # all have come to this, and process 0 says so
        with pytest.raises(SystemExit), engine_process.report_errors("a.py", memory_advice="lower this"):
            raise error
        printed = capsys.readouterr().err
        assert said in printed if said else not printed
    assert at_once.call_args_list == [mock.call(status) for status in (1, 1, 2, 1, 1)] and not ended.called
    with engine_process.report_errors("a.py"):
        pass
    ended.assert_called_once_with()


def test_processes_that_read_different_checkpoints(run, monkeypatch):
    """One of them cannot read the last one, the others can: they do not go on from different steps."""
    monkeypatch.setattr(checkpoint, "all_reduce_max", lambda step: max(step, 4) if step > 0 else max(step, -4))
    with pytest.raises(OSError, match="by some processes and not by others"):
        checkpoint.read_newest(run / "ckpt.pt", checkpoint.CHECKPOINT_FORMAT)


def test_gpu_by_number():
    """--device cuda:1: what is asked of "the" GPU is asked of that one."""
    with mock.patch.object(torch, "empty"), mock.patch.object(torch.cuda, "set_device") as chosen:
        assert choose_device("cuda:1") == torch.device("cuda", 1)
        choose_device("cuda"), choose_device("cpu")
    chosen.assert_called_once_with(torch.device("cuda", 1))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
def test_freed_memory():
    """Five arrays of 8 MiB, freed and asked for again, are the pages they were."""
    resource, faults = pytest.importorskip("resource"), []
    choose_device("cpu")
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [torch.ones(2 ** 21) for _ in range(5)]
        del arrays
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 5000, faults  # of 10,240 pages, which without it are new each time
