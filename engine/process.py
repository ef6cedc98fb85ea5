"""A process of a long run: errors in one line, files that are never half written, a lock, signals."""

import contextlib
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.distributed import all_reduce_max, gather, rank_and_world
from engine.validate import UserError, printable, reason_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SIGNALS = []  # received so far; training looks at it once per step


@contextlib.contextmanager
def user_error():
    """ValueErrors in this block are the user's mistakes: bad sizes, settings that make no sense."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def on_out_of_memory(advice):
    """If memory runs out in this block, the run ends with one line and this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and "can't allocate memory" not in str(error):  # how PyTorch says it on a CPU
            raise
        raise UserError(f"not enough memory: {advice}", status=1) from error


@contextlib.contextmanager
def report_errors(program, stopped="stopped", memory_advice="choose a smaller --batch"):
    """Around main(): what a user can mend is one line and a status; a bug keeps its traceback."""
    lines, status = [], 0
    try:
        with on_out_of_memory(memory_advice):
            yield
        sys.stdout.flush()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        lines, status = getattr(error, "lines", [str(error)]), error.status
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + 13  # SIGPIPE
    except OSError as error:
        lines, status = [f"{error}. What was saved is kept: mend this and give the same command again"], 1
    except KeyboardInterrupt:
        print(f"{program}: {stopped}", file=sys.stderr)
        status = 128 + signal.SIGINT
    except torch._dynamo.exc.TorchDynamoException as error:
        lines, status = [f"torch.compile does not work here ({reason_of(error)}): leave --compile away"], 1
    if lines:
        print(f"{program}: error: " + "\n".join(map(printable, lines)), file=sys.stderr)
    if status:
        sys.exit(status)


# ----------------------------------------------------------------------------
# Files.

def write_atomically(path, write, keep_as=None):
    """write(partial path), flushed to disk, then a rename: at any time there is the old file or the new one.

    path may be a folder, made by write. keep_as: where the old file goes. OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    try:
        if not partial.is_dir():
            partial.unlink(missing_ok=True)  # never through a link, nor into a pipe
        write(partial)
        if partial.is_file():
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        if partial.is_file():
            partial.unlink()
        raise OSError(f"{path} cannot be written: is the disk full? ({reason_of(error)})") from error
    if keep_as is not None and path.exists():
        path.replace(keep_as)
    partial.replace(path)


def write_json(path, content):
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))


def look_ahead(read, items):
    """read(item) of each item, in order; a thread reads the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for item in items:
            ahead, result = pool.submit(read, item), ahead
            if result is not None:
                yield result.result()
        if ahead is not None:
            yield ahead.result()


def lock(out):
    """An open file that keeps every other process out of this run directory until this process ends.

    It keeps nobody out on Windows and on file systems without locks.
    """
    file = (out / ".lock").open("a+")  # a pipe is refused, where "a" would wait for its reader
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{out} is in use by another process: wait for it, or give another --out") from error
    except (OSError, AttributeError):
        pass
    return file


# ----------------------------------------------------------------------------
# Signals.

def catch_signals():
    """From now on Ctrl-C and kill end the run after the current step: see stop_requested."""
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def release_signals():
    """All is saved: Ctrl-C and kill end the program at once, and now if one of them has come already."""
    exit_if_stopped()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def on_signal(number, frame):
    if number == signal.SIGINT in SIGNALS:  # a second Ctrl-C exits at once; a scheduler's kill may come twice
        raise KeyboardInterrupt
    SIGNALS.append(number)


def stop_requested():
    """Was any rank sent Ctrl-C or kill? All ranks call this between two steps, and stop at the same one."""
    return all_reduce_max(max(SIGNALS, default=0))


def exit_if_stopped():
    """After a checkpoint: ends the program with the shell's status for the signal, 130 or 143."""
    number = stop_requested()
    if number:
        tqdm.write("stopped; the same command continues from here")
        sys.exit(128 + number)


# ----------------------------------------------------------------------------
# Work for some ranks.

def main_process_first(work):
    """work() by rank 0 while the others wait -> its result, None for them. If it fails, all ranks exit."""
    rank, _ = rank_and_world()
    failed, result = 1, None
    try:
        result = work() if rank == 0 else None
        failed = 0
    finally:
        if all_reduce_max(failed) and not failed:
            sys.exit(1)
    return result


def shared_work(items, work):
    """All ranks work on the same list; rank 0 gets (item, result) of all, in order. A signal ends it.

    work: an iterator over some of the items -> an iterator over their results. Rank r gets every world-th.
    """
    rank, world = rank_and_world()
    results = work(items[rank::world])
    for start in range(0, len(items), world):
        exit_if_stopped()
        yield from zip(items[start:start + world], gather(next(results, None)) or [], strict=False)
