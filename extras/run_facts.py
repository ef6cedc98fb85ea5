"""What lies in a run directory, as extras/run_page.py shows it: numbers, pictures, how far the run is, how it ended."""

import math
import re

import numpy as np

from engine import process as engine_process
from engine.process import lock
from engine.read_back import ReadError, UserError, check_nesting, no_file, read_json
from engine.stored import check_stored

LARGEST = 1 << 28  # bytes of a CSV file
OLD_COLUMNS = {"rank": "effective_rank", "min_dist": "smallest_distance"}  # of earlier versions: their names today


def read_columns(path):
    """{column: (n, 2) steps and values} of a CSV file, without what is no finite number; {} if there is none.

    Quick, and without a Python object for every row: it is read again and again while a run trains.
    """
    header, *lines = (path.read_text(encoding="utf-8").splitlines() if is_file(path) else []) or [""]
    names = [OLD_COLUMNS.get(name, name) for name in header.split(",")]
    cells = ",".join(line for line in lines if line.count(",") == len(names) - 1).split(",")
    table = np.array(list(map(real, cells)) if len(cells) > 1 else []).reshape(-1, len(names))
    table = table[np.isfinite(table[:, 0])]
    return {name: table[np.isfinite(table[:, i])][:, [0, i]] for i, name in enumerate(names) if i}


def is_file(path):
    """Is there a file of which a page can be made, and no pipe to wait for?"""
    return path.exists() and not no_file(path) and path.stat().st_size < LARGEST


def real(cell):
    """A cell's number; nan if it has none."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def read_object(path):
    """The dict of a JSON file; {} if there is none, or none that can be read."""
    try:
        content = read_json(path)
        check_nesting(path, content)
    except ReadError:
        return {}
    return content


def last(columns, name):
    """The last value of a column; None if it has none."""
    curve = columns.get(name, ())
    return float(curve[-1][1]) if len(curve) else None


def seconds_per_step(columns, batch):
    """Of the last few status lines, with all that happens between them; None before the first.

    columns: "seconds" and "img/s", each rows (step, value). Earlier versions wrote no seconds.
    """
    seconds, speeds = columns.get("seconds", ()), columns.get("img/s", ())
    rows = [*([(0, 0.0)] if len(seconds) == len(speeds) < 6 else []), *seconds[-6:]]
    if len(rows) > 1:
        return float(rows[-1][1] - rows[0][1]) / float(rows[-1][0] - rows[0][0])
    speeds = [float(value) for _, value in speeds[-5:] if value]
    return batch * sum(1 / speed for speed in speeds) / len(speeds) if speeds and batch else None


def read_run(out):
    """What the page shows, as a dict; UserError if this is no run."""
    config = check_stored(out / "config.json", read_object(out / "config.json"))
    if not config:
        raise UserError(f"{out} is no run of train.py: it has no config.json")
    run = {"out": out, "config": config, "metrics": read_object(out / "metrics.json"), **{
        name: read_columns(out / f"{name}.csv") for name in ("tokenizer", "diffusion", "evaluation", "fid")}}
    run["pictures"] = {kind: sorted((path.name for path in out.glob(f"{kind}_*.png") if re.fullmatch(
        kind + r"_\d+\.png", path.name)), key=lambda name: int(re.search(r"\d+", name)[0]))
        for kind in ("samples", "reconstructions")}
    steps = {"tokenizer": config.get("tokenizer_steps", 0), "diffusion": config.get("steps", 0)}
    done = {name: max((int(curve[-1][0]) for curve in run[name].values() if len(curve)), default=0) for name in steps}
    encoded = (out / "tokens.npy").exists()
    own = config.get("tokenizer", "own") == "own"
    stage = "diffusion" if encoded else "tokens" if not own or done["tokenizer"] >= steps["tokenizer"] else "tokenizer"
    batch = config.get({"tokenizer": "tokenizer_batch", "diffusion": "batch"}.get(stage), 0)
    run |= {"stage": stage, "step": done.get(stage, 0), "steps": steps.get(stage, 0),
            "per_step": seconds_per_step(run.get(stage, {}), batch)}
    run["complete"] = stage == "diffusion" and bool(run["metrics"]) and done[stage] >= steps[stage]
    told = read_object(out / "state.json")  # of earlier versions there is none
    run["state"] = told["state"] if told.get("state") in ("running", "stopped", "failed") else "ended"
    if run["state"] == "ended" and run["complete"]:
        run["state"] = "complete"
    command = told.get("command")
    return run | {"message": str(told.get("message", "")), "command": command if isinstance(command, list) else None}


def in_use(out):
    """Does a process work in this run directory? None where locks cannot tell."""
    if engine_process.fcntl is None or not (out / ".lock").exists():
        return None
    try:
        lock(out).close()
    except UserError:
        return True
    return False
