"""A run directory and a run in it: files that are never half written, one process at a time, signals, and errors that
are one line. All programs use it; none of it is particular to VQ-LCMD.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.distributed import all_reduce_max, barrier, broadcast, gather, rank_and_world, uses_nccl
from engine.read_back import UserError, printable, regular_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SIGNALS = []  # received so far; the loops look at it once per step


class RunError(RuntimeError):
    """One line: why a run ended that had begun, and what to do. Exit status 1."""


class OutOfMemory(RunError):
    """This process's memory did not suffice; that of others may."""


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
        raise OutOfMemory(f"not enough memory: {advice}") from error


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
        alone = rank == 0 or isinstance(error, OutOfMemory)  # else all processes have come to the same
        message, status = str(error) if alone else "", 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message, status = "", 128 + 13
    except OSError as error:
        message, status = f"{error}. What was saved before is kept: mend this and give the same command again", 1
    except KeyboardInterrupt:
        print(f"{program}: {stopped}", file=sys.stderr)
        message, status = "", 130
    except dist.DistError as error:
        message, status = lost(error), 1
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        message, status = f"torch.compile does not work here ({reason}): leave --compile away and go on", 1
    except Exception as error:
        if isinstance(error, RuntimeError) and "gloo" in str(error):
            message, status = lost(error), 1
        elif not uses_nccl():
            raise
        else:
            traceback.print_exc()
            message, status = "", 1
    finally:
        at_once = status and uses_nccl()
        if dist.is_available() and dist.is_initialized() and not at_once:
            dist.destroy_process_group()
    if status:
        if message:
            print(f"{program}: error: {message if status == 2 else printable(message)}", file=sys.stderr)
        if at_once:  # NCCL's orderly end waits for the others, which wait for this process; when it dies, all end
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)


def lost(error):
    """The line of a process whose peers are gone: under torchrun one that failed ends them all."""
    reason = str(error).strip().splitlines()[-1]
    return (f"process {rank_and_world()[0]} waits for another in vain ({reason}): that one ended, and says why, or was "
            "stuck; what was saved is kept, and the same command goes on")


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
# Signals.

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


def leave():
    """Ends the run after its checkpoint is written, with the shell's status for the signal: 130 or 143. By all."""
    asked = stop_asked()
    tqdm.write("stopped; the same command continues from here")
    sys.exit(128 + asked)


# ----------------------------------------------------------------------------
# Work for some processes, or for all of them in turn.

def all_succeed(work):
    """work() in every process -> its result. If it fails in one, that one says why, and all end."""
    failed, result = 1, None
    try:
        result, failed = work(), 0
    finally:
        if all_reduce_max(failed, patient=True) and not failed:
            sys.exit(1)
    return result


def main_process_first(work):
    """work() by process 0 while the others wait -> its result, None for them. If it fails, it fails for all."""
    return all_succeed(lambda: work() if rank_and_world()[0] == 0 else None)


def in_turns(work):
    """work() by process 0, then by the first one of every other machine, then by the rest -> its result.

    So each finds what was fetched or written before, whether or not the machines share a home directory.
    """
    rank, _ = rank_and_world()
    turn = 0 if rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    return [all_succeed(lambda now=now: work() if now == turn else None) for now in range(3)][turn]


def require_shared(folder, seconds=60):
    """Do all processes see the same folder? UserError otherwise. Called by all of them.

    Process 0 writes a new word into its file .lock, and the others must find it there; some file systems take a while.
    """
    rank, world = rank_and_world()
    if world == 1:
        return
    word, path, until = broadcast(os.urandom(8).hex()), folder / ".lock", time.monotonic() + seconds
    if rank == 0:
        path.write_text(word)
    barrier()
    while not (found := path.is_file() and path.read_text() == word) and time.monotonic() < until:
        time.sleep(0.1)
    blind = gather(socket.gethostname() if not found else None)
    if all_reduce_max(int(not found)):
        if rank:  # process 0 says why
            sys.exit(2)
        raise UserError(f"{folder} is another directory on {', '.join(sorted(set(filter(None, blind))))}: several "
                        "machines need a disk in common; give an --out on it, and --data that all can read")


def shared_work(items, work):
    """All processes work on a list that is the same in each; process 0 gets (item, result) of all, in order.

    work: an iterator over some of the items -> an iterator over their results. Process r of W gets items r, r + W, ...
    Nothing but process 0's files need be seen by all. After Ctrl-C or kill all end at the same item.
    """
    rank, world = rank_and_world()
    results = work(items[rank::world])
    for start in range(0, len(items), world):
        if stop_asked():
            leave()
        yield from zip(items[start:start + world], gather(next(results, None)) or [], strict=False)
