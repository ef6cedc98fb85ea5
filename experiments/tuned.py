"""Every method at its best: the same care for each, on the tokens of experiments/compare.py.

    python experiments/tuned.py --data mnist --budget 4800 --rows VQ-LCMD --seeds 0 1 2 3 --lr 0.004
    python experiments/tuned.py --tables     prints the tables of README.md and draws tuned.png

All other words go to train.py, as in compare.py, whose run directory (--out) this may share. Each row is
trained once per seed. For each number of calls of the network every one of settings() is drawn from the first
seed (purpose: tried), and the one with the least distance is measured on the other seeds (result), beside
plain sampling (untuned): tuned.csv. The same command again goes on.

Calls are counted the same for all: a guided step is two. Guidance counts at all times, or at t <= 0.5 alone
(a limited interval, Kynkaanniemi et al. 2024). `end` is the time of the last call, where all tokens that are
left are drawn: the method's own, or larger. While the strongest guidance or the largest end is the best, a
larger one is tried (up to --most-guidance).
"""

import itertools
import math

import compare
import numpy as np
from baselines import KINDS, time_grid
from common import HERE, markdown, pyplot, read, select, spread, values

from sample import default_end

OMEGAS = (0.25, 0.5, 1.0, 2.0)  # beside none
ENDS = (0.3, 0.45, 0.6, 0.75, 0.9)  # beside the method's own: first three in up to 8 calls, else one
# The tables of README.md. {name in the files: in the tables}; {set: (title, digits of a distance)}.
NAMES = {"VQ-LCMD": "VQ-LCMD", "absorbing": "absorbing",
         "mask-and-replace + likelihood, auxiliary 0.1": "mask-and-replace"}
SETS = {"mnist": ("MNIST", 3), "faces": ("faces", 2), "cifar10": ("CIFAR-10", 2)}
CALLS = (4, 8, 16, 50)


# ----------------------------------------------------------------------------
# What is tried.

def most_steps(calls, guided_below, discrete, end=None):
    """(steps, guided ones among them): as many as calls allow, where a step at t <= guided_below is two."""
    for steps in range(calls, 0, -1):
        last = default_end(steps) if end is None and not discrete else end
        guided = sum(t <= guided_below for t in time_grid(steps, last))
        if steps + guided <= calls:
            return steps, guided
    return 0, 0


def settings(kind, calls, classes, omegas, ends):
    """What is tried with a number of calls: dicts of sampler, steps, ..., as compare.draw has them."""
    found, discrete = [], kind in KINDS
    samplers = ("ancestral", "confidence") if kind == "absorbing" else ("ancestral",)
    ways = [(0.0, 1.0), *itertools.product(omegas if classes else (), (1.0, 0.5))]
    for sampler, (omega, below), end in itertools.product(samplers, ways, (None, *ends)):
        steps, guided = most_steps(calls, below, discrete, end) if omega else (calls, 0)
        if (omega and not guided) or (end and (steps == 1 or sampler == "confidence")):
            continue
        temperatures = (0.6, 0.7, 0.8, 0.9, 1.0) if discrete else (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
        for temperature in (0.8, 1.0) if omega else temperatures:
            # Gumbel noise matters to decoding by confidence alone.
            for gumbel in (1.0, 4.0) if sampler == "confidence" and not omega else (1.0,):
                found.append(dict(sampler=sampler, steps=steps, guidance=omega, guided_below=below,
                                  temperature=temperature, gumbel=gumbel,
                                  end=end or ("" if discrete else default_end(steps))))
    return found


def best_setting(name, args, calls, shared):
    """The setting with the least distance on the first seed."""
    omegas, ends = [omega for omega in OMEGAS if omega <= args.most_guidance], ENDS[:3 if calls <= 8 else 1]
    kind = compare.ROWS[name].get("loss")

    def distance(setting):
        return float(compare.measure(shared.out / "tuned.csv", name, args.seeds[0], args.budget, "tried",
                                     calls, setting, args.tune_n, shared)["distance"])

    while True:
        best = min(settings(kind, calls, shared.classes, omegas, ends), key=distance)
        if best["guidance"] == max(omegas, default=1) and 2 * omegas[-1] <= args.most_guidance:
            omegas.append(2 * omegas[-1])
        elif best["end"] == ends[-1] < ENDS[-1]:
            ends = ENDS[:len(ends) + 1]
        else:
            return best


# ----------------------------------------------------------------------------
# Reports.

def words(line):
    """The settings of a line. An end is named where it is not the method's own."""
    guidance, steps = float(line["guidance"]), int(line["steps"])
    said = f"{steps} steps"
    if guidance:
        said += f", ω {guidance:g}"
    if guidance and float(line["guided_below"]) < 1:
        said += f" at t ≤ {line['guided_below']}"
    said += f", τ {float(line['temperature']):g}"
    if line["sampler"] == "confidence":
        said += ", by confidence"
    own = math.nan if compare.is_discrete(line["row"]) else default_end(steps, guidance)
    if line["end"] and not math.isclose(float(line["end"]), own, abs_tol=1e-9):
        said += f", end {float(line['end']):.2g}"
    return said


def table(title, lines, calls, bits, digits):
    """Markdown: distance per row and calls, and the settings. bits: {row: of each seed}."""
    rows = []
    for name in dict.fromkeys(line["row"] for line in lines):
        cells = [NAMES.get(name, name), spread(bits[name])]
        for number in calls:
            found = select(lines, row=name, calls=number)
            said = {words(line) for line in found if line["purpose"] != "untuned"}
            assert len(said) < 2, f"{name}, {number} calls: several results, {said}"
            cells.append((spread(values(found, "distance"), digits) or "–")
                         + "".join(f" ({one})" for one in said))
        rows.append(cells)
    return markdown([title, "bits per token", *(f"{number} calls" for number in calls)], rows)


def curves(panel, lines):
    """Distance against calls: each row at its best and untuned, the range over the seeds."""
    from matplotlib import ticker
    for i, name in enumerate(dict.fromkeys(line["row"] for line in lines)):
        for purpose, style, said in (("result", "-o", "at its best"), ("untuned", ":o", "untuned")):
            mine = select(lines, row=name, purpose=purpose)
            calls = sorted({int(line["calls"]) for line in mine})
            found = [values(select(mine, calls=number), "distance") for number in calls]
            low, mean, high = (np.array([f(v) for v in found]) for f in (min, np.mean, max))
            panel.errorbar(calls, mean, [mean - low, high - mean], fmt=style, color=f"C{i}", capsize=3,
                           label=f"{NAMES.get(name, name)}, {said}")
    panel.set(xscale="log", yscale="log", xlabel="calls of the network per image", ylabel="Fréchet distance",
              xticks=sorted({int(line["calls"]) for line in lines}))
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_locator(ticker.NullLocator())


def draw(path):
    """The picture of README.md: a panel for each set, after 4,800 steps."""
    plt, legend = pyplot(), {}
    picture, panels = plt.subplots(1, len(SETS), figsize=(4 * len(SETS), 4))
    for (name, (title, _)), panel in zip(SETS.items(), panels, strict=True):
        curves(panel, page_lines(name, 4800))
        panel.set_title(title)
        legend |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    picture.legend(legend.values(), legend, fontsize=8, loc="lower center", ncols=4)
    picture.tight_layout(rect=(0, 0.12, 1, 1))
    picture.savefig(path, dpi=90)
    plt.close(picture)


def page_lines(name, budget):
    lines = select(read(HERE / f"tuned_{name}.csv"), budget=budget)
    return [line for row in NAMES for line in select(lines, row=row)]


def page_tables():
    """The tables of README.md: (set, training steps, Markdown)."""
    titles = {4800: {"untuned": "untuned", "result": "at its best"},
              19200: {"untuned": "untuned", "tuned on itself": "tuned on itself"}}
    for (name, (_, digits)), budget in itertools.product(SETS.items(), titles):
        lines, bounds = page_lines(name, budget), select(read(HERE / "bounds.csv"), set=name, budget=budget)
        bits = {row: values(select(bounds, row=row), "bound") for row in NAMES}
        calls = [number for number in CALLS if select(lines, calls=number)]
        for purpose, title in titles[budget].items():
            if some := select(lines, purpose=purpose):
                yield name, budget, table(title, some, calls, bits, digits)


def main():
    parser = compare.make_parser(__doc__.split("\n")[0])
    parser.add_argument("--tables", action="store_true", help="print the tables of README.md; nothing else")
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=compare.ROWS,
                        default=["VQ-LCMD", "absorbing"], help="default: VQ-LCMD absorbing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3],
                        help="the first one tunes, the others are measured (default: 0 1 2 3)")
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, metavar="N",
                        help="of the network per image (default: 4 8 16 50)")
    parser.add_argument("--most-guidance", type=float, default=math.inf, metavar="OMEGA",
                        help="try no stronger one: some features like what looks bad (default: inf)")
    parser.add_argument("--n", type=int, default=2000, help="samples of a result (default: 2000)")
    parser.add_argument("--tune-n", type=int, default=1000, help="samples of a try (default: 1000)")
    args, others = parser.parse_known_args()
    if args.tables:
        for name, budget, text in page_tables():
            print(f"{name}, {budget} training steps\n\n{text}")
        return draw(HERE / "tuned.png")
    shared = compare.prepare(args, others)
    for name, calls in itertools.product(args.rows, args.calls):
        best = best_setting(name, args, calls, shared)
        for seed in args.seeds[1:]:
            for setting, purpose in (best, "result"), (compare.plain(name, calls), "untuned"):
                compare.measure(shared.out / "tuned.csv", name, seed, args.budget, purpose, calls, setting,
                                args.n, shared)
    print(compare.references(shared, args.n))


if __name__ == "__main__":
    main()
