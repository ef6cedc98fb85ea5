"""The page of a run: index.html in its directory, one file for any browser, without a network.

    python -m extras.run_page runs/toy        writes it for a run of any age, and prints where it is

All of it comes from what lies in the run directory: config.json, the CSV files, metrics.json, the PNG files, and
state.json, which says how the run was started and how it ended. engine/prepare.py keeps the page while a run lives,
engine/status.py writes it anew. A page that cannot be written stops no run.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

from tqdm import tqdm

from engine.distributed import rank_and_world
from engine.process import RunError, UserError, report_errors, user_error, write_atomically, write_json
from extras.page_style import SCRIPT, STYLE
from extras.run_facts import in_use, last, read_run
from extras.svg_curves import Html, chart, number, tag

RELOAD = 30  # seconds after which a page of a living run loads itself again
SHARE = 0.01  # of the time of a run, at most, goes into its page
NEXT, SAID = {}, set()  # run directory: when its page may be written again; those of which it was said that it cannot
TITLES = {  # column of a CSV file: its title, and what to expect
    "rec": ("L_rec", ""), "diff": ("L_diff, weight clipped", ""),
    "cm": ("L_CM", "levels off above 0"), "norm": ("norm of the gradient", "before clipping"),
    "lr": ("learning rate", ""), "codes": ("codes in use", "between two status lines"), "img/s": ("images/s", ""),
    "GB": ("GPU memory, GB", ""), "effective_rank": ("effective rank of the embeddings", "steady when healthy"),
    "smallest_distance": ("smallest distance of two embeddings", "falls towards 0 when they collapse"),
    "reconstruction": ("reconstruction", ""), "lpips": ("LPIPS", ""), "mean_distance": ("mean distance", "")}


# ----------------------------------------------------------------------------
# The page.

def in_words(seconds):
    minutes = round(seconds / 60)
    return (f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 120
            else f"{minutes // 60} h {minutes % 60} min" if minutes < 2880 else f"{minutes / 1440:.1f} days")


def header(run):
    """What, which state, how far, how long still; and why not, if it ended."""
    config, stage, step, steps, state = (run[name] for name in ("config", "stage", "step", "steps", "state"))
    place = {"tokenizer": "stage 1 of 3, the tokenizer", "tokens": "stage 2 of 3, images to tokens",
             "diffusion": "stage 3 of 3, embeddings and denoiser"}[stage]
    words = [place, *([f"step {step:,} of {steps:,}"] if steps else [])]
    if state == "running" and steps and step >= steps:
        words.append("the end is measured")
    elif state == "running" and run["per_step"]:
        words.append(f"about {in_words((steps - step) * run['per_step'])} left in this stage")
    notes = {"stopped": "It was stopped. The same command continues.", "failed": "It failed:",
             "gone": "No process works on it any more, and none said why it ended: killed, or the power failed. The "
                     "same command continues.",
             "ended": "It ended. Not all stages are done: the same command, with --stage all, continues."}
    about = [f"{config.get('train_images', 0):,} training images", f"{config.get('held_out_images', 0):,} held out"]
    classes = config.get("classes") or []
    about += [f"{len(classes):,} classes"] if classes else ["no classes"]
    badge = tag("span", {"gone": "not running"}.get(state, state), class_=f"state {state}")
    return [tag("h1", config.get("data", run["out"].name), " ", badge),
            tag("p", "VQ-LCMD on ", ", ".join(about), class_="soft"),
            tag("p", tag("b", words[0]), "".join(", " + word for word in words[1:])),
            *([tag("progress", max=steps, value=min(step, steps))] if steps else []),
            *([tag("p", notes[state])] if state in notes else []),
            *([tag("pre", run["message"], class_="error")] if run["message"] else [])]


def facts(run):
    """The newest numbers."""
    evaluation, diffusion, tokenizer = run["evaluation"], run["diffusion"], run["tokenizer"]
    found = []
    if (bits := last(evaluation, "total")) is not None:
        error, most = last(evaluation, "standard_error"), last(evaluation, "log2_K")
        found.append((f"held-out bits per token{f', ± {error:.2f}' if error else ''}"
                      + (f"; log2 K = {number(most)}" if most else ""), f"{bits:.3f}"))
    for name in ("effective_rank", "smallest_distance"):
        value = last(diffusion, name)
        value = last(evaluation, name) if value is None else value
        found += [] if value is None else [(TITLES[name][0], number(value))]
    if (codes := last(tokenizer, "codes")) is not None:
        found.append((f"codes in use, of {run['config'].get('K')}", number(codes)))
    for name, columns in (("denoiser", diffusion), ("tokenizer", tokenizer)):
        if (speed := last(columns, "img/s")) is not None:
            found.append((f"images/s, {name}", number(speed)))
    for part, scores in run["metrics"].items():
        if part in ("tokenizer", "fid") and isinstance(scores, dict):
            found += [(f"{part}: {name}", number(value)) for name, value in scores.items()]
    return [tag("div", *(tag("div", tag("b", value), tag("span", name)) for name, value in found), class_="facts")]


def slides(kind, title, files):
    """Pictures over time: the newest, and a slider to the older ones."""
    if not files:
        return Html()
    step = int(re.search(r"\d+", files[-1])[0])
    return tag("div", tag("h3", title, " ", tag("output", f"step {step:,}", class_="soft")),
               tag("input", type="range", min=0, max=len(files) - 1, value=len(files) - 1, autocomplete="off",
                   aria_label=f"{title}: which step") if len(files) > 1 else "",
               tag("a", tag("img", src=files[-1], alt=f"{title} at step {step:,}"), href=files[-1]),
               class_="slides" if len(files) > 1 else "card", id=kind, data_files=" ".join(files))


def curves(run):
    """Sections of figures: a bound, then every column of both stages."""
    evaluation, diffusion = run["evaluation"], run["diffusion"]
    most, both = last(evaluation, "log2_K"), ("effective_rank", "smallest_distance")
    bits = {name: evaluation.get(name) for name in ("total", "diff", "rec", "prior")}
    held_out = [chart("held-out bits per token", bits, "total = prior + rec + diff, of the averaged weights",
                      most and ("log2 K", most), log=False)]
    held_out += [chart(TITLES[name][0], {"trained": diffusion.get(name), "averaged": evaluation.get(name)},
                       TITLES[name][1], log=False, base=0) for name in both]
    held_out.append(chart("mean distance of two embeddings", {"averaged": evaluation.get("mean_distance")}, log=False,
                          base=0))
    for title, figures in (("Held out, and the embeddings", held_out), *(
            (f"Training: {words}", [
                chart(TITLES.get(name, (name, ""))[0], {name: curve}, TITLES.get(name, ("", ""))[1],
                      log=name not in ("codes", "img/s", "GB", "lr") and "_2k" not in name)
                for name, curve in columns.items()
                if name != "seconds" and (columns is not diffusion or name not in both)])
            for words, columns in (("FID-2k and its relatives", run["fid"]), ("embeddings and denoiser", diffusion),
                                   ("the tokenizer", run["tokenizer"])))):
        if any(figures):
            yield from (tag("h2", title), tag("div", *figures, class_="row"))


def commands(run):
    """(what it does, command line) pairs, quoted for a shell."""
    config, out = run["config"], str(run["out"])
    start = run["command"] or ["python", "train.py", "--data", config.get("data", ""), "--out", out]
    start = [str(word) for word in start]
    if run["complete"]:
        yield "Train it longer", [*start, "--steps", str(2 * config.get("steps", 1))]
    else:
        yield "Continue it, should it stop" if run["state"] == "running" else "Continue it", start
    if (run["out"] / "ckpt.pt").exists():
        program = next((word for word in start if word.endswith("train.py")), "train.py")[:-len("train.py")]
        names = [name for name in config.get("classes") or []
                 if name == name.strip() and "," not in name and not name.startswith("-")][:2]
        yield "Draw samples", ["python", program + "sample.py", os.path.join(out, "ckpt.pt"), *(
            ["--class", ",".join(names)] if names else []), "--out", "more.png"]


def page(run):
    """The HTML of what read_run found."""
    config, out, state = run["config"], run["out"], run["state"]
    names = config.get("classes") or []
    settings = {name: value for name, value in config.items() if name != "classes"}
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", json.dumps(value) if value in (True, False, None)
            else value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list)
            else str(value))) for name, value in settings.items()]
    files = [name for name in ("config.json", "tokenizer.csv", "diffusion.csv", "evaluation.csv", "fid.csv",
                               "metrics.json", "skipped.txt") if (out / name).exists()]
    late = 1e9 if not run["per_step"] or run["step"] >= run["steps"] else max(
        600, 10 * config.get("log_every", 0) * run["per_step"])
    body = [
        *header(run), *facts(run),
        tag("h2", "Pictures") if any(run["pictures"].values()) else "",
        tag("div", *(slides(kind, title, run["pictures"][kind]) for kind, title in (
            ("samples", "Samples"), ("reconstructions", "Reconstructions, below their originals"))), class_="row wide"),
        *curves(run),
        tag("h2", "Trained on"),
        tag("p", f"{config.get('train_images', 0):,} images of {config.get('data', '')}, and "
            f"{config.get('held_out_images', 0):,} held out, cropped and resized to {config.get('size')} pixels a side."
            + (f" {len(names):,} classes: {', '.join(names[:100])}{', ...' if len(names) > 100 else '.'}"
               if names else " No classes.")),
        tag("a", tag("img", src="data.png", alt="some training images"), href="data.png")
        if (out / "data.png").exists() else "",
        tag("h2", "Commands"),
        *(tag("div", title, tag("pre", shlex.join(words))) for title, words in commands(run)),
        tag("h2", "Settings"), tag("div", tag("table", *rows), class_="settings"),
        tag("p", "Files: ", *(part for name in files for part in (tag("a", name, href=name), " ")), class_="soft"),
        tag("p", time.strftime("Written %Y-%m-%d %H:%M:%S"), id="written", class_="soft", data_at=int(time.time()),
            data_late=round(late)),
        tag("script", Html(SCRIPT))]
    head = [tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", http_equiv="refresh", content=RELOAD) if state == "running" else "",
            tag("title", f"{config.get('data', '')}: {state}"), tag("style", Html(STYLE))]
    return "<!DOCTYPE html>\n" + tag("html", tag("head", *head), tag("body", *body, data_state=state), lang="en") + "\n"


def write_page(out, run=None):
    text = page(run or read_run(out))
    write_atomically(out / "index.html", lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))


# ----------------------------------------------------------------------------
# While a run lives. All is called by its main process only.

def try_to(out, write, *words):
    """write(*words), if it can be done: whatever is wrong with a page is said once, and the run goes on."""
    try:
        write(*words)
    except Exception as error:
        if out not in SAID:
            SAID.add(out)
            reason = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"no page of this run, which goes on without: {reason}")


def update_page(out, at_once):
    """Writes the page, at once or only if that keeps within its share of the time. Was it tried?"""
    began = time.monotonic()
    if not at_once and began < NEXT.get(out, 0):
        return False
    if (out / "config.json").exists():
        try_to(out, write_page, out)
    NEXT[out] = time.monotonic() + (time.monotonic() - began) / SHARE
    return True


def started_as():
    """The command line of this process, as one would type it; of several nodes without where they meet."""
    world = rank_and_world()[1]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = ["--nnodes", str(world // here)] if world > here else []
    return [*(["torchrun", *nodes, "--nproc-per-node", str(here)] if world > 1 else ["python"]), *sys.argv]


def how_it_ended(error):
    """(state, message) of an exception that ends a run."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, BrokenPipeError)):
        return "stopped", ""
    said = (str(error).strip().splitlines() or [""])[-1]
    ours = isinstance(error, (UserError, RunError, OSError))
    return "failed", said if ours else f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextlib.contextmanager
def page_of_a_run(out):
    """Around a run: its page says that it lives, and at the end how it ended."""
    print(f"Follow it in a browser: {out / 'index.html'}")

    def say(state, message=""):
        write_json(out / "state.json", {"state": state, "message": message, "command": started_as()})
        write_page(out)

    SAID.discard(out)
    NEXT[out] = 0
    try_to(out, say, "running")
    try:
        yield
    except BaseException as error:
        try_to(out, say, *how_it_ended(error))
        raise
    try_to(out, say, "ended")


def main():
    parser = argparse.ArgumentParser(description="Write the page of a run: index.html in its directory.")
    parser.add_argument("out", nargs="+", type=Path, metavar="DIR", help="run directory, e.g. runs/toy")
    with report_errors("extras.run_page"):
        for out in parser.parse_args().out:
            with user_error(f"{out} cannot be shown: "):
                run = read_run(out)
                if run["state"] == "running" and in_use(out) is False:
                    run["state"] = "gone"
                elif run["state"] != "running" and in_use(out):  # started by an earlier version
                    run |= {"state": "running", "message": ""}
                write_page(out, run)
            print(out / "index.html")


if __name__ == "__main__":
    main()
