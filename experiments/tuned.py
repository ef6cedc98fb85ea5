"""Every method at its best: the same care for each, on the tokens of experiments/compare.py.

    python experiments/tuned.py --data mnist --budget 4800 --rows VQ-LCMD absorbing --seeds 0 1 2 3 ...

All other words go to train.py, as in compare.py, whose run directory (--out) this may share. For each row:

    1. the peak learning rate: three of them, a short training each (--short, seed 9); the least held-out bound wins;
       while it is the largest or the smallest that was tried, twice or half of it is tried, too
    2. training with it, once per seed
    3. sampling: for each number of calls of the network (--calls) every one of settings() is drawn from the first
       seed, after --tuned-at steps of training, and the one with the least distance is taken
    4. the other seeds are measured with the settings that were taken, with --n samples, and untuned: a plain step per
       call, no guidance, temperature 1

Calls are counted the same for all: a guided step is two. Guidance counts at all times, or at t <= 0.5 alone (a limited
interval, Kynkaanniemi et al. 2024), which leaves calls for more steps. A setting that needs more calls than there are
is left out. `end` is the time of the last call, where all tokens that are left are drawn: 0.8 / steps^2 for VQ-LCMD, 1
/ steps for discrete diffusion, and larger ones, too. While the strongest guidance or the largest end that was tried is
the best, a larger one is tried, too (up to --most-guidance).
tuned.csv has a line per row, seed and setting: `purpose` says whether it was tried in step 3 or is a result of step 4,
tuned or not; rates.csv has the bounds of step 1. tuned.md has the tables, mean and half the range over the seeds of
step 4, tuned.png is their picture. The same command again does what is missing.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import compare  # noqa: E402

from sample import default_end  # noqa: E402

COLUMNS = ["row", "lr", "seed", "budget", "purpose", "calls", "sampler", "steps", "guidance", "guided_below",
           "temperature", "gumbel", "end", "n", "distance", "kid", "precision", "recall", "agreement", "bound",
           "train_seconds", "sample_seconds", "features", "commit", "device", "command"]
RATES = ["row", "lr", "budget", "bound", "seconds"]
OMEGAS = (0.25, 0.5, 1.0, 2.0)  # beside none
ENDS = (0.3, 0.45, 0.6, 0.75, 0.9)  # beside the method's own: the first three in up to 8 calls, else the first


def most_steps(calls, guided_below, discrete, end=None):
    """(steps, guided ones among them): as many as calls allow, where a step at t <= guided_below is two."""
    for steps in range(calls, 0, -1):
        times = compare.baselines.time_grid(steps, end) if discrete else torch.linspace(  # as in sample_tokens
            1.0, default_end(steps) if end is None else end, steps, dtype=torch.float64).tolist()
        guided = sum(t <= guided_below for t in times)
        if steps + guided <= calls:
            return steps, guided
    return 0, 0


def first_ends(calls):
    """The larger times of the last call that are always tried."""
    return ENDS[:3 if calls <= 8 else 1]


def settings(kind, calls, classes, omegas=OMEGAS, ends=None):
    """What is tried with a number of calls: dicts of sampler, steps, guidance, ..., as compare.draw has them."""
    found, discrete = [], kind in compare.baselines.KINDS
    for sampler, (omega, guided_below), end in itertools.product(
            ("ancestral", "confidence") if kind == "absorbing" else ("ancestral",),
            [(0.0, 1.0), *itertools.product(omegas if classes else (), (1.0, 0.5))],
            (None, *(first_ends(calls) if ends is None else ends))):
        steps, guided = most_steps(calls, guided_below, discrete, end) if omega else (calls, 0)
        if (omega and not guided) or (end and (steps == 1 or sampler == "confidence")):
            continue
        for temperature in (0.8, 1.0) if omega else (0.6, 0.7, 0.8, 0.9, 1.0) if discrete else (
                0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            # Gumbel noise matters to decoding by confidence alone.
            for gumbel in (1.0, 4.0) if sampler == "confidence" and not omega else (1.0,):
                found.append(dict(sampler=sampler, steps=steps, guidance=omega, guided_below=guided_below,
                                  temperature=temperature, gumbel=gumbel,
                                  end=end or ("" if discrete else default_end(steps))))
    return found


def with_rate(name, lr):
    """The name of a row trained with another learning rate, entered in compare.ROWS."""
    changed = f"{name}, lr {lr:g}"
    compare.ROWS[changed] = compare.ROWS[name] | {"lr": lr}
    return changed


def best_rate(name, args, shared, path):
    """Step 1: the learning rate with the least bound after a short training."""
    def bound_of(lr):
        for line in compare.read(path):
            if (line["row"], line["lr"], line["budget"]) == (name, f"{lr:g}", str(args.short)):
                return float(line["bound"])
        changed, seconds = with_rate(name, lr), math.nan
        try:
            model, schedule, state = compare.train_row(changed, 9, args.short, shared)
            found, seconds = compare.bound(changed, model, schedule, shared), state["seconds"]
        except ValueError:  # the loss was no longer finite
            found = math.inf
        compare.append(path, {"row": name, "lr": f"{lr:g}", "budget": args.short, "bound": f"{found:.5f}",
                              "seconds": f"{seconds:.0f}"}, RATES)
        return found

    bounds = {lr: bound_of(lr) for lr in args.rates}
    while (best := min(bounds, key=bounds.get)) in (min(bounds), max(bounds)):
        further = best * 2 if best == max(bounds) else best / 2
        bounds[further] = bound_of(further)
    print(f"{name}: bounds {', '.join(f'{lr:g}: {value:.3f}' for lr, value in bounds.items())}; takes {best:g}")
    return best


@functools.lru_cache(maxsize=1)
def train(name, seed, budget, shared):
    """(averaged weights, schedule, seconds) of a row, by its file if it is there."""
    model, schedule, state = compare.train_row(name, seed, budget, shared)
    return model, schedule, state["seconds"]


@functools.cache
def bound(name, seed, budget, shared):
    """Held-out bits per token of a row."""
    model, schedule, _ = train(name, seed, budget, shared)
    return compare.bound(name, model, schedule, shared, seed)


def measure(name, lr, seed, budget, calls, setting, n, purpose, shared, evaluator, facts):
    """One line of tuned.csv, from the file if it is there."""
    path = shared.out / "tuned.csv"
    line = {"row": name, "lr": f"{lr:g}", "seed": seed, "budget": budget, "purpose": purpose, "calls": calls,
            "n": n} | setting
    line = {key: str(value) for key, value in line.items()} | {"features": facts["features"]}
    same = [known for known in compare.read(path)
            if all(known[key] == value for key, value in line.items() if key != "purpose")]
    for known in same:
        if known["purpose"] == purpose:
            return known
    if same:  # the best setting is the plain one
        compare.append(path, same[0] | {"purpose": purpose}, COLUMNS)
        return same[0]
    trained = with_rate(name, lr)
    model, schedule, train_seconds = train(trained, seed, budget, shared)
    start = time.perf_counter()
    images = compare.draw(trained, model, schedule, shared, n, **setting)
    seconds = time.perf_counter() - start
    found = evaluator(images, distance_alone=purpose == "tried")  # the other measures take longer than the samples
    found |= {"bound": bound(trained, seed, budget, shared), "train_seconds": train_seconds, "sample_seconds": seconds}
    line |= {key: f"{value:.5f}" for key, value in found.items()} | facts
    compare.append(path, line, COLUMNS)
    print(f"{trained}, seed {seed}, {calls} calls, {setting}: distance {found['distance']:.3f}", flush=True)
    return line


def best_setting(name, lr, args, calls, *options):
    """Step 3: the setting with the least distance on the first seed."""
    omegas = [omega for omega in OMEGAS if omega <= args.most_guidance]
    ends = first_ends(calls)
    while True:
        found = settings(compare.ROWS[name].get("loss"), calls, options[0].classes, omegas, ends)
        best = min(found, key=lambda setting: float(measure(name, lr, args.seeds[0], args.tuned_at, calls, setting,
                                                            args.tune_n, "tried", *options)["distance"]))
        if best["guidance"] == max(omegas, default=1) and 2 * omegas[-1] <= args.most_guidance:
            omegas.append(2 * omegas[-1])
        elif best["end"] == ends[-1] < ENDS[-1]:
            ends = ENDS[:len(ends) + 1]
        else:
            return best


def words(line, discrete):
    """The settings of a line. An end is named where it is not the method's own: for VQ-LCMD, what sample.py takes."""
    guidance, steps = float(line["guidance"]), int(line["steps"])
    limited = "" if float(line["guided_below"]) == 1 else f" at t ≤ {line['guided_below']}"
    own = None if discrete else default_end(steps, guidance)
    named = line["end"] and (discrete or not math.isclose(float(line["end"]), own, abs_tol=1e-9))
    return ", ".join([f"{steps} steps", *[f"ω {guidance:g}{limited}"] * (guidance != 0),
                      f"τ {float(line['temperature']):g}", *["by confidence"] * (line["sampler"] == "confidence"),
                      *[f"end {float(line['end'] or 0):.2g}"] * bool(named)])


def table(lines, args, purpose):
    """Markdown: distance per row and number of calls, mean ± half the range over the seeds, and the settings taken."""
    out = ["| row | rate | bits per token ≤ |" + "".join(f" {calls} calls |" for calls in args.calls),
           "|" + " --- |" * (3 + len(args.calls))]
    for name in args.rows:
        mine = [line for line in lines if line["row"] == name and line["purpose"] == purpose]
        if not mine:
            continue
        bounds = {line["seed"]: float(line["bound"]) for line in mine}
        cells = [name, mine[0]["lr"], compare.spread(list(bounds.values()))]
        for calls in args.calls:
            some = [line for line in mine if line["calls"] == str(calls)]
            discrete = compare.ROWS[name].get("loss") in compare.baselines.KINDS
            said = f" ({words(some[0], discrete)})" if some and purpose == "result" else ""
            cells.append(compare.spread([float(line["distance"]) for line in some], 3) + said)
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def curves(panel, lines, rows, calls, references):
    """Distance against calls into one panel of matplotlib, both axes logarithmic.

    references: {words: {"distance": ...}}, a line each where it is not far below everything else.
    """
    from matplotlib import ticker
    for i, name in enumerate(rows):
        for purpose, style in (("result", "-o"), ("untuned", ":o")):
            found = {number: [float(line["distance"]) for line in lines if (line["row"], line["purpose"], line["calls"])
                              == (name, purpose, str(number))] for number in calls}
            found = {number: values for number, values in found.items() if values}
            means = [sum(values) / len(values) for values in found.values()]
            ranges = [[m - min(v) for m, v in zip(means, found.values(), strict=True)],
                      [max(v) - m for m, v in zip(means, found.values(), strict=True)]]
            panel.errorbar(list(found), means, ranges, fmt=style, color=f"C{i}", capsize=3,
                           label=name + (", at its best" if purpose == "result" else ", untuned"))
    panel.set(xscale="log", yscale="log", xlabel="calls of the network per image", ylabel="Fréchet distance",
              xticks=calls)
    least = panel.get_ylim()[0]
    for style, (kind, found) in zip((":", "-"), references.items(), strict=True):
        if found["distance"] > least / 4:
            panel.axhline(found["distance"], color="grey", lw=1, ls=style, label=kind)
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_locator(ticker.NullLocator())


def figure(lines, args, references):
    """tuned.png: distance against calls, each row at its best and untuned; bars are the range over the seeds.

    references: of compare.references, lines of their own.
    """
    try:
        import matplotlib
    except ImportError:
        return print("no picture: pip install matplotlib, and give the same command again")
    matplotlib.use("agg")
    from matplotlib import pyplot
    picture, panel = pyplot.subplots(figsize=(8, 4))
    curves(panel, lines, args.rows, args.calls, references)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    picture.tight_layout()
    picture.savefig(Path(args.out) / "tuned.png", dpi=110)
    pyplot.close(picture)


def parse_arguments():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="toy", help="as for train.py (default: toy)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--budget", type=int, default=1500, help="training steps of every row (default: 1500)")
    parser.add_argument("--tuned-at", type=int, metavar="STEPS", help="choose the settings of sampling after as many "
                        "training steps, for a long training (default: --budget)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=list(compare.ROWS),
                        default=["VQ-LCMD", "absorbing"], help="of compare.py (default: VQ-LCMD absorbing)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3],
                        help="the first one tunes, the others are measured (default: 0 1 2 3)")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3],
                        help="peak learning rates to choose from; one: no choice (default: 2e-3 4e-3 8e-3)")
    parser.add_argument("--short", type=int, default=600, help="steps of step 1 (default: 600)")
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 8, 16, 50], metavar="N",
                        help="of the network per image (default: 4 8 16 50)")
    parser.add_argument("--most-guidance", type=float, default=math.inf, metavar="OMEGA", help="try no stronger one: "
                        "some features like what looks bad (default: twice as much while the strongest is best)")
    parser.add_argument("--n", type=int, default=2000, help="samples of a result (default: 2000)")
    parser.add_argument("--tune-n", type=int, default=1000, help="samples of a try (default: 1000)")
    parser.add_argument("--classifier-steps", type=int, default=1500, help="of the feature network (default: 1500)")
    parser.add_argument("--features-of", metavar="DATA", help="another set, as for --data, whose classes the feature "
                        "network learns: for images without classes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--out", help="run directory (default: runs/compare-NAME)")
    args, words = parser.parse_known_args()
    args.tuned_at = args.budget if args.tuned_at is None else args.tuned_at
    if len(args.seeds) < 2 or min([args.budget, args.tuned_at, args.short, args.classifier_steps, *args.calls]) < 1 or (
            min(args.n, args.tune_n) < 4 or min(args.rates) <= 0):
        parser.error("--seeds: at least two; steps, calls: at least 1; --n, --tune-n: at least 4; --rates: above 0")
    args.out = args.out or f"runs/compare-{Path(args.data).stem}"
    return args, words


def main():
    args, words = parse_arguments()
    try:
        shared = compare.prepare(args, words)
        if any(list(line) != COLUMNS for line in compare.read(shared.out / "tuned.csv")):
            raise ValueError(f"{shared.out / 'tuned.csv'} is of an earlier version: rename it, the weights stay")
        evaluator = compare.Evaluator(shared, args.classifier_steps, compare.other_set(args, shared))
    except ValueError as error:
        print(f"tuned.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    facts = compare.facts_of(evaluator, shared, "tuned.py")
    references = compare.references(evaluator, shared, args.n)
    lines = []
    for name in args.rows:
        lr = args.rates[0] if len(args.rates) == 1 else best_rate(name, args, shared, shared.out / "rates.csv")
        options = (shared, evaluator, facts)
        for calls in args.calls:
            best = best_setting(name, lr, args, calls, *options)
            plain = dict(sampler="ancestral", steps=calls, guidance=0.0, guided_below=1.0, temperature=1.0, gumbel=1.0,
                         end="" if compare.ROWS[name].get("loss") in compare.baselines.KINDS else default_end(calls))
            for seed in args.seeds[1:]:
                for setting, purpose in ((best, "result"), (plain, "untuned")):
                    lines.append(measure(name, lr, seed, args.budget, calls, setting, args.n, purpose, *options))
    text = (f"Features: {evaluator.name}. {args.n:,} samples; " + "; ".join(
        f"{kind}: distance {found['distance']:.3f}" for kind, found in references.items()) + ".\n\n"
        + table(lines, args, "result") + "\nUntuned:\n\n" + table(lines, args, "untuned"))
    figure(lines, args, references)
    (shared.out / "tuned.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
