"""A run directory and a run in it: files that are never half written, one process at a time, signals, and errors that
are one line. All programs use it; none of it is particular to VQ-LCMD.
"""

import contextlib
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from engine.distributed import all_reduce_max, rank_and_world
from engine.read_back import UserError, open_npy, printable, regular_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SIGNALS = []  # received so far; the loops look at it once per step


class RunError(RuntimeError):
    """One line: why a run ended that had begun, and what to do. Exit status 1."""


@contextlib.contextmanager
def user_error(before=""):
    """ValueErrors in this block are the user's mistakes: bad sizes, settings that make no sense."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{before}{error}") from error


def is_out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error))  # how PyTorch says it on a CPU


@contextlib.contextmanager
def on_out_of_memory(advice):
    """If memory runs out in this block, the run ends with one line and this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"not enough memory: {advice}") from error


@contextlib.contextmanager
def report_errors(program, stopped="stopped", memory_advice="choose a smaller --batch"):
    """Around main(): what a user can mend is one line and a status; anything else is a bug and keeps its traceback."""
    rank, status = int(os.environ.get("RANK", 0)), 0
    try:
        with on_out_of_memory(memory_advice):
            yield
        sys.stdout.flush()
    except UserError as error:
        message, status = "\n".join(map(printable, getattr(error, "lines", [str(error)]))), 2
    except RunError as error:
        message, status = str(error) if rank == 0 else "", 1  # all processes have come to the same
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message, status = "", 128 + 13
    except OSError as error:
        message, status = f"{error}. What was saved before is kept: mend this and give the same command again", 1
    except KeyboardInterrupt:
        print(f"{program}: {stopped}", file=sys.stderr)
        message, status = "", 130
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        message, status = f"torch.compile does not work here ({reason}): leave --compile away and go on", 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if status:
        if message:
            print(f"{program}: error: {message if status == 2 else printable(message)}", file=sys.stderr)
        sys.exit(status)


# ----------------------------------------------------------------------------
# Files.

def write_atomically(path, write, keep_as=None):
    """write(partial path), down to the disk, then rename: whatever happens, there is the old file or the new one.

    path may be a folder, which write makes. keep_as: where the old file goes. OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    try:
        if partial.is_symlink() or partial.exists() and not partial.is_dir():  # never through a link, nor into a pipe
            partial.unlink()
        write(partial)
        if partial.is_file():
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        if partial.is_file():
            partial.unlink()
        raise OSError(f"{path} cannot be written: is the disk full? ({' '.join(str(error).split())})") from error
    if keep_as is not None and path.exists():
        path.replace(keep_as)
    partial.replace(path)


def write_json(path, content):
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))


def resumable_array(path, dtype, length, fill=None):
    """A memory-mapped .npy (length,) of dtype to be filled in many steps: zeros, then fill(rows), when it is new.

    The dtype should name what the rows are made from (a field's title): UserError if the file there is of another.
    """
    if not path.exists():
        fresh = path.with_suffix(".new.npy")  # half a file without marks would look like a finished one
        fresh.unlink(missing_ok=True)
        rows = np.lib.format.open_memmap(fresh, mode="w+", dtype=dtype, shape=(length,))
        if fill is not None:
            fill(rows)
        rows.flush()
        del rows
        fresh.replace(path)
    try:
        rows = open_npy(path, "r+")
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}): delete it") from error
    if rows.shape != (length,) or rows.dtype != np.dtype(dtype):
        raise UserError(f"{path} is of other images, settings or weights: delete it, or give another --out")
    return rows


def look_ahead(read, items):
    """read(item) for each of the items, in order; a thread reads the next one while the caller works on this one."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(read, item) for item in (next(items, None),) if item is not None]
        while ahead:
            result = ahead.pop().result()
            ahead += [pool.submit(read, item) for item in (next(items, None),) if item is not None]
            yield result


def lock(out):
    """An open file that keeps every other process out of this run; the system lets go of it when its process dies.

    It keeps nobody out on Windows and on file systems without locks.
    """
    path = out / ".lock"
    if path.exists():
        regular_file(path)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{out} is in use by another process: wait for it, or give another --out") from error
    except (OSError, AttributeError):
        pass
    return file


# ----------------------------------------------------------------------------
# Signals, and work for one process.

def catch_signals():
    """From now on Ctrl-C and kill end the run after the current step, see stop_asked."""
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def release_signals():
    """All is saved: from now on Ctrl-C and kill end the program at once, and now if one of them has come already."""
    if stop_asked():
        leave()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def on_signal(number, frame):
    if number == signal.SIGINT in SIGNALS:  # the second Ctrl-C means it; a scheduler's kill may come twice
        raise KeyboardInterrupt
    SIGNALS.append(number)


def stop_asked():
    """Was any process sent Ctrl-C or kill? All processes call this between two steps, and stop at the same one."""
    return all_reduce_max(max(SIGNALS, default=0))


def leave(together=True):
    """Ends the run after its checkpoint is written, with the shell's status for the signal: 130 or 143."""
    asked = stop_asked() if together else max(SIGNALS)
    tqdm.write("stopped; the same command continues from here")
    sys.exit(128 + asked)


def main_process_first(work):
    """work() by process 0 while the others wait -> its result, None for them. If it fails, it fails for all."""
    rank, _ = rank_and_world()
    done, result = 0, None
    try:
        if rank == 0:
            result, done = work(), 1
    finally:
        if not all_reduce_max(done) and rank:
            sys.exit(1)  # process 0 says why
    return result


def leave_if_asked():
    """Where the main process works alone."""
    if SIGNALS:
        leave(together=False)
