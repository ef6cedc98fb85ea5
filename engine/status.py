"""Status lines and CSV files of a run. A loss that is not finite ends it."""

import csv
import math
import time

import torch
from tqdm import tqdm

from engine.distributed import all_reduce_max, all_reduce_sum, rank_and_world
from engine.process import stop_requested
from engine.validate import UserError, reading

# columns that differ from run to run; seconds count from the stage's begin, without pauses
TIMES = ("img/s", "seconds")


def format_metrics(metrics):
    return ", ".join(f"{name} {value if isinstance(value, str) else format(value, '.4g')}"
                     for name, value in metrics.items())


# ----------------------------------------------------------------------------
# CSV files, whose first column is the step.

def read_rows(path):
    """A list of dicts of str; [] if there is no file. A row that a killed process wrote half is left out."""
    if not path.is_file():
        return []
    with reading(path, "delete it"), path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and int(row["step"]) >= 0]


def write_rows(path, rows):
    with path.with_suffix(".part").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".part").replace(path)


def append_row(path, row):
    """One more row. A column that the file does not have yet (GPU memory, say) is added to it."""
    rows = read_rows(path)
    if not rows or row.keys() - rows[0].keys():
        return write_rows(path, [*rows, row])
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, list(rows[0]), restval="").writerow(row)


def trim_rows(path, last_step):
    """Drops the rows after this step, which a run wrote that was killed before its next checkpoint."""
    if path.exists():
        rows = [row for row in read_rows(path) if int(row["step"]) <= last_step]
        if rows:
            write_rows(path, rows)
        else:
            path.unlink()


def log_bound(path, step, bound, K, collapse):
    """A row of evaluation.csv and a line: the held-out bound in bits per token, the state of the table."""
    if rank_and_world()[0] == 0:
        trim_rows(path, step - 1)
        append_row(path, {"step": step} | bound | {"log2_K": math.log2(K)} | collapse)
    tqdm.write(f"held out at step {step:,}: {bound['total']:.3f} bits per token = prior {bound['prior']:.3f} "
               f"+ rec {bound['rec']:.3f} + diff {bound['diff']:.3f} (log2 K = {math.log2(K):.2f});  "
               f"{format_metrics(collapse)}")


# ----------------------------------------------------------------------------
# The log of one training loop.

class StatusLog:
    """Losses of the steps, as means per status line, on the terminal and in STAGE.csv.

    They stay on the device until a line is due: reading them at each step makes the GPU wait for Python.
    state: a checkpoint to continue from, or None. per_rank: losses are of this rank's share of the batch, and
    a line has the mean over ranks. K: of a tokenizer, whose lines also count the codes in use.
    """

    def __init__(self, stage, out, config, steps, batch, device, state=None, per_rank=False, K=None):
        self.stage, self.path, self.config = stage, out / f"{stage}.csv", config
        self.steps, self.batch, self.device, self.per_rank = steps, batch, device, per_rank
        state = state or {"step": 0}
        self.step = self.first_step = self.last_line = state["step"]
        self.pending = []  # rows (n,) of losses, on the device
        self.checked = state.get("history", [])  # those of the next line that are known to be finite
        self.used = None if K is None else state.get("used", torch.zeros(K)).to(device)  # 1 for a used code
        self.main = rank_and_world()[0] == 0
        if self.main:
            trim_rows(self.path, self.step)
        rows = read_rows(self.path) if self.main else []
        self.start = self.clock = time.time()
        self.earlier = float(rows[-1]["seconds"]) if rows else 0.0  # seconds of the starts before this one
        if self.step:
            print(f"{stage}: continuing at step {self.step:,}")
        self.bar = tqdm(total=steps, initial=self.step, desc=stage, unit="step", leave=False,
                        disable=None if self.main else True)

    def loop(self):
        """The steps that are left. After Ctrl-C or kill it ends early, at the same step in all ranks."""
        for step in range(self.step, self.steps):
            if stop_requested():
                break
            yield step
        self.bar.close()

    def add(self, losses, tokens=None):
        """One more step is done. losses: dict of scalar tensors, the same names at each step."""
        self.names = list(losses)
        self.pending.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        if tokens is not None:
            self.used.index_fill_(0, tokens.flatten(), 1.0)
        self.step += 1
        self.bar.update()

    def due(self, name):
        """Is it time for what is done every config[name] steps (0: never)? If so, all losses are finite."""
        every = self.config[name]
        if self.step == self.steps:  # train.py draws, evaluates and saves after its loop
            due = every and name in ("log_every", "fid_every")
        else:
            due = every and self.step % every == 0
        if due:
            self.check()
        return due

    def check(self):
        """Reads the losses from the device; UserError if one is not finite. All ranks call this."""
        if self.used is not None:
            all_reduce_max(self.used)
        if not self.pending:
            return
        rows, self.pending = torch.stack(self.pending), []
        if self.per_rank:
            rows = rows / rank_and_world()[1]
            all_reduce_sum([rows])
        for step, row in enumerate(rows.cpu(), self.step - len(rows) + 1):
            if not row.isfinite().all():
                values = format_metrics(dict(zip(self.names, row.tolist(), strict=True)))
                lr = "--tokenizer-lr (or --gan-lr)" if self.stage == "tokenizer" else "--lr"
                raise UserError(f"the {self.stage}'s loss or gradient is not finite at step {step:,} "
                                f"({values}); its last checkpoint is kept. Give the same command with a "
                                f"lower {lr}, a lower --clip or another --seed: it continues there", status=1)
            self.checked.append(row)

    def line(self, **columns):
        """Prints and writes the status line that is due, with these columns beside the losses."""
        self.check()
        row = {}
        for name, values in zip(self.names, torch.stack(self.checked).T.tolist(), strict=True):
            row[name] = f"{sum(values) / len(values):.5f}"
        row |= columns
        if self.used is not None:
            row["codes"] = int(self.used.sum())
            self.used.zero_()
        now = time.time()
        row["img/s"] = round((self.step - self.last_line) * self.batch / (now - self.clock))
        if self.device.type == "cuda":
            row["GB"] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
        seconds = self.earlier + now - self.start
        if self.main:
            append_row(self.path, {"step": self.step} | row | {"seconds": f"{seconds:.2f}"})
        left = (self.steps - self.step) * (now - self.start) / (self.step - self.first_step)
        tqdm.write(f"{self.stage} {self.step:>6,}/{self.steps:,}  "
                   + "  ".join(f"{name} {value}" for name, value in row.items())
                   + f"  elapsed {tqdm.format_interval(seconds)}, ETA {tqdm.format_interval(left)}")
        self.checked, self.last_line, self.clock = [], self.step, now

    def state(self):
        """What a checkpoint needs of this log."""
        self.check()
        used = {} if self.used is None else {"used": self.used}
        return {"step": self.step, "history": self.checked} | used
