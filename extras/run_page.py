"""The page of a run, which needs no network: index.html, a copy of run.html, shows the data in run.js.

    python -m extras.run_page runs/toy        writes both for any run, and prints where they are
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

from tqdm import tqdm

from engine.distributed import rank_and_world
from engine.process import lock, report_errors, write_atomically, write_json
from engine.status import read_rows
from engine.validate import UserError, printable, read_json, reading, reason_of

SHARE = 0.01  # of a run's time, at most, goes into its page
POINTS = 300  # of a curve, about
pace = {"next_page": 0.0, "failed": False}  # of the run in this process; times as of time.monotonic()


def thin(points):
    """About POINTS of a curve's points: the first, the last, and the extremes of every stretch between."""
    size = math.ceil(2 * len(points) / POINTS)
    chosen = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = sorted(points[start:start + size], key=lambda point: point[1])
        chosen |= {stretch[0], stretch[-1]}
    return sorted(chosen)


def read_columns(path):
    """{column: [(step, finite value), ...]}, thinned, of a CSV file; {} if there is none."""
    columns = {}
    with reading(path):
        for row in read_rows(path):
            step = int(row.pop("step"))
            for name, cell in row.items():
                if cell and math.isfinite(float(cell)):
                    columns.setdefault(name, []).append((step, float(f"{float(cell):.5g}")))
    return {name: thin(points) for name, points in columns.items()}


def commands(out, config, start, state):
    """(what it does, command line) pairs, quoted for a shell."""
    words = start.get("command", ["python", "train.py", "--data", config["data"], "--out", str(out)])
    title = "Continue it, should it stop" if state == "running" else "Continue it"
    if state == "complete":
        title, words = "Train it longer", [*words, "--steps", str(2 * config["steps"])]
    pairs = [(title, shlex.join(words))]
    if (out / "ckpt.pt").exists():
        names = [name for name in config["classes"] if name.isalnum()][:2]
        options = ["--class", ",".join(names)] if names else []
        words = ["python", "sample.py", str(out / "ckpt.pt"), *options, "--out", "more.png"]
        pairs.append(("Draw samples", shlex.join(words)))
    return pairs


def read_run(out):
    """The content of run.js, a dict. UserError if this is no run, or a file in it is damaged."""
    config = read_json(out / "config.json")
    start, metrics = (read_json(file) if file.exists() else {}
                      for file in (out / "state.json", out / "metrics.json"))
    tables = ("tokenizer", "diffusion", "evaluation", "fid")  # the CSV files
    columns = {name: read_columns(out / f"{name}.csv") for name in tables}
    last_step = {name: max((points[-1][0] for points in curves.values()), default=0)
                 for name, curves in columns.items()}
    with reading(out / "config.json"):
        stage, steps = "tokenizer", config["tokenizer_steps"]
        if (out / "tokens.npy").exists():
            stage, steps = "diffusion", config["steps"]
        elif config["tokenizer"] != "own" or last_step["tokenizer"] >= steps:
            stage, steps = "tokens", 0
        state, step = start.get("state", "ended"), last_step.get(stage, 0)
        if state == "ended" and metrics and stage == "diffusion" and step >= steps:
            state = "complete"
        settings = {name: value if isinstance(value, str) else json.dumps(value)
                    for name, value in config.items() if name != "classes"}
        return {"state": state, "message": start.get("message", ""), "written": time.time(),
                "stage": stage, "step": step, "steps": steps, "columns": columns, "metrics": metrics,
                "classes": [printable(name) for name in config["classes"][:100]],
                "class_count": len(config["classes"]), "settings": settings,
                "commands": commands(out, config, start, state),
                "files": sorted((path.name for path in out.iterdir()), key=lambda name: (len(name), name))}


def write_page(out, run):
    text = json.dumps(run).replace("<", r"\u003c")  # ASCII, and no tag in it
    write_atomically(out / "run.js", lambda partial: partial.write_text(f"RUN = {text};\n"))
    page = Path(__file__).with_name("run.html").read_bytes()
    write_atomically(out / "index.html", lambda partial: partial.write_bytes(page))


def update_page(out, start=None):
    """Rank 0 writes the page: as far as its SHARE of the time allows, or with a new state.json at once."""
    begin = time.monotonic()
    if rank_and_world()[0] or not start and begin < pace["next_page"]:
        return
    try:
        if start:
            write_json(out / "state.json", start)
        write_page(out, read_run(out))
    except Exception as error:  # no page is worth a run
        if not pace["failed"]:  # is said once
            tqdm.write(f"no page of this run, which goes on without: {reason_of(error)}")
        pace["failed"] = True
    pace["next_page"] = time.monotonic() + (time.monotonic() - begin) / SHARE


@contextlib.contextmanager
def page_of_a_run(out):
    """Around a run, in its main process: state.json says how it was started and how it ended."""
    world, command = rank_and_world()[1], ["python", *sys.argv]
    if world > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        command = ["torchrun", "--nnodes", str(world // here), "--nproc-per-node", str(here), *sys.argv]
    print(f"Follow it in a browser: {out / 'index.html'}")
    pace.update(next_page=0.0, failed=False)
    start = {"state": "running", "message": "", "command": command}
    update_page(out, start)
    start["state"] = "ended"
    try:
        yield
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):
        start["state"] = "stopped"
        raise
    except BaseException as error:
        name = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
        start |= {"state": "failed", "message": f"{name}{error}"}
        raise
    finally:
        update_page(out, start)


def main():
    parser = argparse.ArgumentParser(description="Write index.html, the page of a run, for each.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="run directory, e.g. runs/toy")
    with report_errors("extras.run_page"):
        for out in parser.parse_args().runs:
            run = read_run(out)
            if run["state"] == "running":
                with contextlib.suppress(UserError), lock(out):  # refused while the run lives
                    run["state"] = "gone"
            write_page(out, run)
            print(out / "index.html")


if __name__ == "__main__":
    main()
