"""The course of a training loop: how far it is, whether it was asked to stop, its status lines in a CSV file, and that
nothing is saved that is not finite. The page of the run (extras/run_page.py) keeps up with them. Called by train.py.
"""

import csv
import io
import math
import time

import torch
from tqdm import tqdm

from engine.checkpoint import save_checkpoint
from engine.distributed import all_reduce_max, all_reduce_sum, barrier, rank_and_world
from engine.read_back import UserError, read_bytes, shown
from engine.process import RunError, leave, stop_asked, write_atomically
from extras.run_page import read_columns, update_page

TIMES = ("img/s", "seconds")  # columns that differ from run to run; seconds since the stage began, pauses left out


def format_metrics(metrics):
    return ", ".join(f"{name} {value if isinstance(value, str) else format(value, '.4g')}"
                     for name, value in metrics.items())


def read_rows(path):
    """The rows of a CSV file of steps, whose last may be half a row; UserError if it is none."""
    try:
        rows = list(csv.reader(io.StringIO(read_bytes(path, "VQLCMD_MAX_INDEX_BYTES").decode(), newline="")))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the rows of a run ({error}): delete it") from error
    for number, row in enumerate(rows[1:], 2):
        if len(row) == len(rows[0]) and not (row[0].isascii() and row[0].isdecimal()):
            raise UserError(f"{path}: line {number} must begin with a step, is {shown(row)}: delete it")
    return rows or [[]]


def append_row(path, row):
    """One more line of a CSV file, with a header first; columns that it does not have yet are added to it."""
    header = list(row)
    if path.exists():
        rows = read_rows(path)
        header = rows[0] + [name for name in row if name not in rows[0]]
        if header != rows[0]:  # written by an earlier version, or on another device
            lines = [header, *(old + [""] * (len(header) - len(old)) for old in rows[1:])]
            write_atomically(path, lambda partial: partial.write_text("\n".join(map(",".join, lines)) + "\n"))
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([header] * new + [[row.get(name, "") for name in header]])


def trim_rows(path, last_step):
    """Drops the rows that a killed run wrote after its last checkpoint; the last line may be half a line."""
    if path.exists():
        rows = read_rows(path)
        rows = rows[:1] + [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= last_step]
        if len(rows) > 1:
            write_atomically(path, lambda partial: partial.write_text("\n".join(map(",".join, rows)) + "\n"))
        else:
            path.unlink()


def log_bound(path, step, bound, K, collapse):
    """A row of evaluation.csv and a line: the held-out bound in bits per token, and the state of the table."""
    if rank_and_world()[0] == 0:
        trim_rows(path, step - 1)  # a run that was killed before the checkpoint that tells of this row comes again
        append_row(path, {"step": step} | bound | {"log2_K": math.log2(K)} | collapse)
    tqdm.write(f"held out at step {step:,}: {bound['total']:.3f} bits per token = prior {bound['prior']:.3f} + rec "
               f"{bound['rec']:.3f} + diff {bound['diff']:.3f} (log2 K = {math.log2(K):.2f});  "
               f"{format_metrics(collapse)}")


class StatusLog:
    """The steps of one training loop, and their losses: means per status line, on the terminal and in a CSV file.

    Losses stay on the device until a line is due: reading them at each step would make the GPU wait for Python.
    state: a checkpoint to go on from, or None. summed: each process has its share, and a row is the mean of all.
    K: for the tokenizer, whose lines also say how many of K codes were used. also: other CSV files, from which rows
    after the checkpoint are dropped too.
    """

    def __init__(self, stage, out, names, config, steps, batch, device, state=None, summed=False, K=None, also=()):
        self.stage, self.path, self.names, self.steps, self.batch = stage, out / f"{stage}.csv", names, steps, batch
        self.config, self.device, self.summed, self.fresh, self.stopped = config, device, summed, [], False
        self.news = True  # is there something that the page of the run does not show yet?
        self.step, state = (state["step"], state) if state else (0, {})
        history = state.get("history", [])
        if isinstance(history, tuple):  # of an earlier version: (rows without norms, codes in use)
            history, state = [], state | {"used": history[1].clamp(max=1)}
        self.checked = [row for row in history if len(row) == len(names)]  # rows (n,) of a line to come, on the CPU
        self.used = None if K is None else state.get("used", torch.zeros(K)).to(device)  # (K,) 1 where a code was used
        self.since, self.clock, rank = self.step, time.time(), rank_and_world()[0]
        for path in [self.path, *also] if rank == 0 else []:
            trim_rows(path, self.step or -1)
        # For the time that is left: (step, value) of all rows so far. Seconds go on from those of earlier starts.
        columns = read_columns(self.path) if rank == 0 else {}
        self.past = {name: list(columns.get(name, ())) for name in TIMES}
        self.begun = self.clock - (self.past["seconds"][-1][1] if self.past["seconds"] else 0)
        if self.step:
            print(f"{stage}: continuing at step {self.step:,}")
        self.bar = tqdm(total=steps, initial=self.step, desc=stage, unit="step", leave=False,
                        disable=True if rank else None)
        self.show()

    def loop(self):
        """The steps that are left; it ends early, at the same one in all processes, after Ctrl-C or kill."""
        for step in range(self.step, self.steps):
            self.stopped = bool(stop_asked())
            if self.stopped:
                return
            yield step
            self.show()

    def add(self, losses, tokens=None):
        """One more step is done. losses: dict of scalar tensors; a name that is missing counts as 0."""
        absent = next(iter(losses.values())).new_zeros(())
        self.fresh.append(torch.stack([losses.get(name, absent).detach().float() for name in self.names]))
        if tokens is not None:
            self.used.index_fill_(0, tokens.flatten(), 1.0)
        self.step += 1
        self.bar.update()

    def due(self, name):
        """Is it time for what is done every config[name] steps, 0 never? (After the last: for the status line and FID.)

        If so, nothing is looked at, drawn or saved before all losses and gradients so far are known to be finite.
        """
        every = self.config[name]
        due = every and (self.step % every == 0 if self.step < self.steps else name in ("log_every", "fid_every"))
        if due:
            self.check()
            self.news = True
        return due

    def check(self):
        """Reads what is on the device. A loss or gradient that is not finite ends the run: nothing is overwritten.

        All processes call this.
        """
        if self.used is not None:
            all_reduce_max(self.used)
        if not self.fresh:
            return
        rows, self.fresh = torch.stack(self.fresh), []
        if self.summed:
            rows = rows / rank_and_world()[1]
            all_reduce_sum([rows])
        for at, row in enumerate(rows.cpu(), self.step - len(rows) + 1):
            if not row.isfinite().all():
                values = format_metrics(dict(zip(self.names, row.tolist(), strict=True)))
                lr = "--tokenizer-lr (or --gan-lr)" if self.stage == "tokenizer" else "--lr"
                raise RunError(f"the {self.stage}'s loss or gradient is not finite at step {at:,} ({values}); its last "
                               f"checkpoint is kept. Give the same command with a lower {lr}, a lower --clip or "
                               "another --seed: it goes on from there")
            self.checked.append(row)

    def line(self, **more):
        """Prints and writes the status line that is due. more: further columns."""
        self.check()
        means = [sum(column) / len(self.checked) for column in zip(*(r.tolist() for r in self.checked), strict=True)]
        row = {name: f"{mean:.5f}" for name, mean in zip(self.names, means, strict=True)} | more
        if self.used is not None:
            row["codes"] = int(self.used.sum())
            self.used.zero_()
        now = time.time()
        row["img/s"] = round((self.step - self.since) * self.batch / (now - self.clock))
        seconds = {"seconds": f"{now - self.begun:.2f}"}
        for name in TIMES:
            self.past[name].append((self.step, float((row | seconds)[name])))
        if self.device.type == "cuda":
            row["GB"] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
        if rank_and_world()[0] == 0:
            append_row(self.path, {"step": self.step} | row | seconds)
        (first, begin), *_, (last, end) = [(0, 0.0), *self.past["seconds"]][-6:]  # the last five lines
        left = (self.steps - self.step) * (end - begin) / (last - first)
        tqdm.write(f"{self.stage} {self.step:>6,}/{self.steps:,}  "
                   + "  ".join(f"{name} {value}" for name, value in row.items())
                   + f"  {tqdm.format_interval(now - self.begun)} gone, {tqdm.format_interval(left)} left")
        self.checked, self.since, self.clock = [], self.step, now

    def save(self, path, content):
        """Writes a checkpoint, if all is finite: content, the step, and what the next status line needs. By all."""
        self.check()
        if rank_and_world()[0] == 0:
            save_checkpoint(path, content | {"step": self.step, "history": self.checked} | (
                {} if self.used is None else {"used": self.used}))
            self.news = True
            self.show(at_once=bool(content.get("metrics")))
        barrier()  # it is written

    def show(self, at_once=False):
        """Writes the page of the run anew, if there is news: at_once, or as far as its share of the time allows."""
        if self.news and rank_and_world()[0] == 0:
            self.news = not update_page(self.path.parent, at_once)

    def leave_if_stopped(self):
        """After the loop and its checkpoint: ends the program if that is what ended the loop."""
        self.bar.close()
        if self.stopped:
            leave()
