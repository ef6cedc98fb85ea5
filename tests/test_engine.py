"""The engine: passes, processes, kills, checkpoints, what is not finite, files, one process per run."""

import math
import os
import random
import shutil
import signal
import time
from unittest import mock

import numpy as np
import pytest
import torch

import losses
import vqvae
from engine import checkpoint, process, status, tokens
from engine.checkpoint import previous
from engine.config import TOKENIZER_OPTIONS
from engine.distributed import init_distributed
from engine.process import write_atomically
from engine.randomness import batch_indices
from engine.validate import UserError
from extras import setup, vqgan_losses
from tests import common
from tests.common import TINY, call, close, contents, flags, rows_of, seeded, train_tiny, weights_of


def test_batches_walk_through_epochs():
    """Every item once per epoch, in another order each time; a batch may span several epochs."""
    walk = np.concatenate([batch_indices(7, 5, 0, "diffusion", step) for step in range(7)]).reshape(5, 7)
    assert (np.sort(walk) == np.arange(7)).all() and len({tuple(epoch) for epoch in walk.tolist()}) == 5
    assert np.array_equal(batch_indices(7, 35, 0, "diffusion", 0), walk.flatten())


def test_passes_and_recomputation(undone, run, folder):
    """--micro-batch changes nothing but rounding; --activation-checkpointing nothing; --compile compiles."""
    expected, compiled = weights_of(run), []
    for flag, passes in ((["--micro-batch", 4], 2), (["--activation-checkpointing"], 1), (["--compile"], 1)):
        with (mock.patch.object(torch, "compile", lambda f: compiled.append(f) or f),
              mock.patch.object(losses, "training_loss", wraps=losses.training_loss) as loss):
            assert train_tiny(folder, undone, *flag) == 0
        assert loss.call_count == 8 * passes
        # Rounding: at most a hundredth of a step of AdamW, whose rate is 1e-2.
        close(weights_of(undone), expected, rtol=0, atol=1e-4 if passes > 1 else 0)
        (undone / "ckpt.pt").unlink()
    assert len(compiled) == 1


def move_a_codebook(rank, world, folder):
    """Twenty batches, of which this process sees its share; codes die and restart."""
    if world > 1:
        init_distributed()
        add = torch.Tensor.index_add_  # on GPUs these sums differ in their last bits
        torch.Tensor.index_add_ = lambda *a: add(*a).mul_(1 + rank * 2e-7)
        gather = vqvae.all_gather_cat
        vqvae.all_gather_cat = lambda z: gather(z).mul_(1 + rank * 2e-7)
    torch.manual_seed(0)
    vq = vqvae.VectorQuantizer(16, 3)
    z_e = torch.randn(20, 8, 3, 4, 4)
    dead, codes = 0, []
    for step in range(20):
        z = z_e[step, rank * 8 // world:(rank + 1) * 8 // world] + (step > 9)  # the data moves, and codes die
        vq(z, seeded(0))
        codes.append(vq.codebook.detach().clone())
        vq.running_count[step % 16] *= 0
        dead += int(vq.restart_dead_codes(z, seeded(step)))
    assert dead >= 20
    torch.save(vq.state_dict() | {"first": codes[0]}, folder / f"{rank}of{world}.pt")


def one_of_two(rank, jobs, port, folder):
    """What torchrun starts twice: train.py or sample.py, with each of some command lines; and a codebook."""
    for job_port, (program, words) in jobs:
        common.join_processes(rank, job_port)
        assert call(program, *words) == 0
    common.join_processes(rank, port)
    move_a_codebook(rank, 2, folder)
    torch.distributed.destroy_process_group()  # gloo's threads may still run when Python ends, and abort it


def test_two_processes_train_as_one(run, folder, tmp_path):
    """Weights, the optimizer's moments and the bound are those of one process in one pass, up to rounding; so
    is the tokenizer, with its discriminator and flips. Tokens, samples, and both processes' codebooks are the
    same bit for bit."""
    settings = {k: v for k, v in TINY.items() if k not in TOKENIZER_OPTIONS.values()}
    settings |= dict(batch=32, lr=2e-3)
    jobs = {  # name of the output: (flags of two processes alone, program, its words)
        "a": (["--micro-batch", 4], "train.py", ["--data", run / "tokens.npy", *flags(settings)]),
        "b": ([], "train.py", ["--data", folder, "--stage", "tokenizer", *flags(
            TINY | {"flip": True, "tokenizer_steps": 6, "log_every": 1})]),
        "c.npz": ([], "sample.py", [run / "ckpt.pt", "--n", 21, "--batch", 4, "--steps", 2]),
        "d": ([], "train.py", ["--data", folder, *flags(TINY), "--flip", "--tokenizer", run / "tokenizer.pt",
                               "--stage", "tokens", "--eval-batch", 3])}
    one, two = tmp_path / "one", tmp_path / "two"
    of_two = [(program, [*words, *more, "--out", two / name])
              for name, (more, program, words) in jobs.items()]
    *ports, last = common.free_ports(5)
    common.start_processes(one_of_two, list(zip(ports, of_two, strict=True)), last, tmp_path, n=2, wait=300)
    for name, (_, program, words) in jobs.items():
        assert call(program, *words, "--out", one / name) == 0
    close(weights_of(two / "a"), weights_of(one / "a"), rtol=0, atol=1e-5)
    pictures = [(path / "a" / "samples_000004.png").read_bytes() for path in (one, two)]
    assert pictures[0] == pictures[1]
    for name, table, margin in (("a", "evaluation.csv", 1e-4), ("b", "tokenizer.csv", 2e-5)):
        rows = [rows_of(path / name / table) for path in (one, two)]
        for a, b in zip(*rows, strict=True):
            expected = {k: pytest.approx(float(v), abs=margin) for k, v in a.items() if k not in status.TIMES}
            assert expected == {k: float(b[k]) for k in expected}
    assert float(rows[0][-1]["adversarial"])
    assert (two / "d" / "tokens.npy").read_bytes() == (one / "d" / "tokens.npy").read_bytes()
    assert np.array_equal(*(np.load(path / "c.npz")["arr_0"] for path in (one, two)))
    move_a_codebook(0, 1, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0of1", "0of2", "1of2"))
    close(first, second, rtol=0, atol=0)
    close(first, alone)


def encode_by_two(*args, encode_sets=tokens.encode_sets):
    """tokens.encode_sets with two images at a time, so that there is something to be stopped in."""
    return encode_sets(*args[:5], 2, *args[6:])


@pytest.mark.parametrize("stage, how", [("tokenizer", "Ctrl-C"), ("tokens", "crash"), ("diffusion", "kill")])
def test_interrupted_and_continued(stage, how, folder, run, tmp_path, monkeypatch):
    """Stopped in any stage and started again: bit for bit what the uninterrupted run computed."""
    owner, name, calls = {"tokenizer": (vqvae.VQVAE, "forward", 5), "tokens": (vqvae.VQVAE, "encode", 12),
                          "diffusion": (losses, "training_loss", 5)}[stage]
    real, seen = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == calls:
            if how == "crash":
                raise ArithmeticError
            os.kill(os.getpid(), signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(setup, "encode_sets", encode_by_two)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        if how == "crash":
            with pytest.raises(ArithmeticError):
                train_tiny(folder, tmp_path)
        else:
            assert train_tiny(folder, tmp_path) == {"Ctrl-C": 130, "kill": 143}[how]
    part = tmp_path / "tokens.part.npy"
    assert not part.exists() or (np.load(part)["label"] >= 0).sum() == 16  # what was encoded is kept
    assert part.exists() == (stage == "tokens")
    assert train_tiny(folder, tmp_path) == 0 and contents(tmp_path) == contents(run)


def test_two_kills(folder, run, tmp_path):
    """SIGKILL at two random moments, then the same command: every file is the undisturbed run's."""
    for _ in range(2):
        child, = common.start_processes(train_tiny, folder, tmp_path)
        time.sleep(random.SystemRandom().uniform(0, 0.8))
        child.kill()
        child.join()
    assert train_tiny(folder, tmp_path) == 0 and contents(tmp_path) == contents(run)


def test_the_checkpoint_before(undone, run, folder, capsys):
    """A last checkpoint that is truncated: the run continues from the one before, and says so."""
    path, real = undone / "ckpt.pt", checkpoint.write_atomically

    def stop_after(file, write, **options):
        real(file, write, **options)
        if file == path and torch.load(path, weights_only=True)["step"] == 6:
            raise ArithmeticError

    with mock.patch.object(checkpoint, "write_atomically", stop_after), pytest.raises(ArithmeticError):
        train_tiny(folder, undone, save_every=2)
    assert torch.load(previous(path), weights_only=True)["step"] == 4
    path.write_bytes(path.read_bytes()[:-1000])
    assert train_tiny(folder, undone, save_every=2) == 0
    assert "continuing at step 4" in capsys.readouterr().out and contents(undone) == contents(run)


def test_ranks_go_on_from_one_step(run, monkeypatch):
    """A disk that fails one rank ends the run: the others would wait for it for ever."""
    monkeypatch.setattr(checkpoint, "all_reduce_max", lambda step: max(step, 0))  # another is at step 0
    with pytest.raises(OSError, match="not by others"):
        checkpoint.read_newest(run / "ckpt.pt", checkpoint.CHECKPOINT_FORMAT)


def test_rows_after_the_checkpoint_go(tmp_path):
    """What a kill leaves of a table: rows after the checkpoint, half a row."""
    path = tmp_path / "a.csv"
    for text, left in (("step,loss\n2,5\n4,6\n6,7\n", ["2", "4"]), ("step,loss\n2,5\n4", ["2"])):
        path.write_text(text)
        status.trim_rows(path, 4)
        assert [row["step"] for row in status.read_rows(path)] == left


def test_one_process_per_run(folder, run, tmp_path, capsys):
    """A run directory that somebody works in is refused, until he is done."""
    out = shutil.copytree(run, tmp_path / "pets")
    with process.lock(out):
        assert train_tiny(folder, out) == 2 and "is in use by another process" in capsys.readouterr().err
    assert train_tiny(folder, out) == 0


@pytest.mark.parametrize("what, due", [
    ("loss", {"log_every": 4}), ("gradient", {"log_every": 8, "sample_every": 6}),
    ("gradient", {"log_every": 8, "save_every": 2})], ids=["line", "picture", "checkpoint"])
def test_not_finite(what, due, undone, run, folder, capsys):
    """The step, its terms, and the checkpoint before it, unharmed, whatever is due first after that step.
    The same command continues, and so does one with another learning rate."""
    real, calls, kept = losses.training_loss, [], []

    def broken(*args, **options):
        loss, terms = real(*args, **options)
        calls.append(1)
        if len(calls) != 6:
            return loss, terms
        kept.append((undone / "ckpt.pt").read_bytes())
        if what == "loss":
            return loss * math.nan, terms * math.nan
        return loss + (loss - loss).abs().sqrt(), terms  # the value is finite, its slope at 0 is not

    with mock.patch.object(losses, "training_loss", broken):
        assert train_tiny(folder, undone, **due) == 1
    said = capsys.readouterr().err
    assert "loss or gradient is not finite at step 6 (rec " in said and said.count("\n") == 1
    assert "norm nan" in said and ("rec nan" in said) == (what == "loss")
    assert [(undone / "ckpt.pt").read_bytes()] == kept
    other = shutil.copytree(undone, undone.with_name("other"))
    assert train_tiny(folder, other, lr=1e-3, **due) == 0
    said = capsys.readouterr().out
    assert "lr was 0.01, from here on it is 0.001" in said and "continuing at step 4" in said
    assert weights_of(other).isfinite().all() and not torch.equal(weights_of(other), weights_of(run))
    assert train_tiny(folder, undone, **due) == 0 and torch.equal(weights_of(undone), weights_of(run))


def test_not_finite_discriminator(folder, tmp_path, capsys):
    """A finite loss with a gradient that is not: the checkpoint that is due is not written."""
    def broken(*args, hinge_loss=vqgan_losses.hinge_loss):
        loss = hinge_loss(*args)
        return loss + (loss - loss).abs().sqrt()

    with mock.patch.object(vqgan_losses, "hinge_loss", broken):
        assert train_tiny(folder, tmp_path, log_every=8, save_every=2) == 1
    said = capsys.readouterr().err
    assert "not finite at step 2 (reconstruction 0." in said and " discriminator_norm nan" in said
    assert not (tmp_path / "tokenizer.pt").exists()


def test_codes_in_use(tmp_path):
    """... between two status lines."""
    log = status.StatusLog("tokenizer", tmp_path, {"log_every": 1}, 2, 4, torch.device("cpu"), None, K=16)
    for codes in ([1, 2, 2], [3]):
        log.add({"loss": torch.tensor(1.0)}, torch.tensor([codes]))
        log.line()
    assert [row["codes"] for row in rows_of(tmp_path / "tokenizer.csv")] == ["2", "1"]


def log_of_two(rank, port, out):
    """A run that the second of two processes is asked to stop; one in which its loss is not finite."""
    common.join_processes(rank, port)
    init_distributed()

    def last_step(name):
        log = status.StatusLog("tokenizer", out, {"log_every": 5, "save_every": 2}, 7, 4,
                               torch.device("cpu"), None, per_rank=True, K=16)
        for step in log.loop():
            loss = math.nan if name == "broken" and (rank, step) == (1, 2) else 1.0
            log.add({"loss": torch.tensor(loss)}, torch.tensor([[step]]))
            if log.due("save_every"):
                log.check()
            if name == "stopped" and (rank, step) == (1, 2):
                process.SIGNALS.append(signal.SIGTERM)
        return log.state()["step"]

    assert last_step("stopped") == 3
    process.SIGNALS.clear()
    with pytest.raises(UserError, match=r"not finite at step 3 \(loss nan"):
        last_step("broken")
    torch.distributed.destroy_process_group()


def test_both_processes_stop(tmp_path):
    common.start_processes(log_of_two, *common.free_ports(1), tmp_path, n=2, wait=60)


def test_best_checkpoint(tmp_path):
    """The least mean over the draws that both evaluations have; a file of a later step was rolled back."""
    path = tmp_path / "best.pt"

    def best(step, *bits):
        content = {"step": step, "bits": torch.tensor(bits), "model": 1, "optimizer": 1}
        checkpoint.save_best(path, content, batch=2)
        state = torch.load(path, weights_only=True)
        assert state.keys() == {"step", "bits"}
        return state["step"]

    assert best(4, 3., 4., 1.) == 4
    assert best(6, 3., 3., 3., 5., 5.) == 6  # whole batches of both: 3 3 against 3 4
    assert best(8, 3., 3., 4., 5., 5.) == 6
    assert best(5, 9., 9., 9.) == 5     # the run went back to before step 6
    assert best(9, 10.) == 9  # no whole batch of both
    for damaged in ([1], {"bits": torch.ones(3)}, {"step": "a", "bits": torch.ones(3)}):
        torch.save(damaged, path)
        assert best(4, 3., 4., 1.) == 4


@pytest.mark.parametrize("error", [OSError(28, "full"), RuntimeError("full"), KeyboardInterrupt("full")])
def test_atomic_writes(error, tmp_path):
    """A write that fails leaves the old file, and the one before; one that succeeds is on the disk first."""
    path, before, synced = tmp_path / "deep" / "a.pt", tmp_path / "deep" / "a.previous.pt", []

    def fails(partial):
        partial.write_text("half")
        raise error

    def written():
        return {file.name: file.read_text() for file in path.parent.iterdir() if file.suffix != ".part"}

    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    for text in "12":
        write_atomically(path, lambda partial, text=text: partial.write_text(text), keep_as=before)
    with pytest.raises(kind, match="full"):
        write_atomically(path, fails, keep_as=before)
    assert written() == {"a.pt": "2", "a.previous.pt": "1"}
    with mock.patch.object(os, "fsync", side_effect=lambda _: synced.append(path.read_text())):
        write_atomically(path, lambda partial: partial.write_text("3"), keep_as=before)
    assert synced == ["2"]  # down to the disk before it takes the name
    assert written() == {"a.pt": "3", "a.previous.pt": "2"} and len(os.listdir(path.parent)) == 2
