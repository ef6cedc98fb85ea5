"""The tables of README.md and their picture, from the CSV files beside it: no figure is copied by hand.

    python experiments/tables.py            print the tables (a test finds each line in README.md)
    python experiments/tables.py --draw     and draw tuned.png (pip install matplotlib)

tuned_<set>.csv has what tuned.py measured, bounds.csv the bits, references.csv what real images score. A setting that a
larger grid has replaced has the purpose "result, smaller grid" and does not count.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import compare  # noqa: E402
import tuned  # noqa: E402

MASK_AND_REPLACE = "mask-and-replace + likelihood, auxiliary 0.1"
ROWS = {"VQ-LCMD": "VQ-LCMD", "absorbing": "absorbing", MASK_AND_REPLACE: "mask-and-replace"}  # name in the files: here
SETS = {"mnist": ("MNIST", 3), "faces": ("faces", 2), "cifar10": ("CIFAR-10", 2)}  # title, digits of a distance
CALLS = (4, 8, 16, 50)


def load(name, budget):
    """The lines of tuned_<name>.csv after so many training steps, with the rows' names of the tables."""
    return [line | {"row": ROWS[line["row"]]} for line in compare.read(HERE / f"tuned_{name}.csv")
            if line["row"] in ROWS and line["budget"] == str(budget)]


def bits(name, row, budget):
    """Held-out bits per token, mean ± half the range over the seeds that bounds.csv has."""
    return compare.spread([float(line["bound"]) for line in compare.read(HERE / "bounds.csv")
                           if (line["set"], ROWS.get(line["row"]), line["budget"]) == (name, row, str(budget))])


def table(name, lines, purpose, budget):
    """Markdown: mean ± half the range over the seeds; one seed has no ±. "–" is what was not measured."""
    calls = [number for number in CALLS if any(line["calls"] == str(number) for line in lines)]
    title = purpose if purpose != "result" else "at its best" if budget == 4800 else "settings of 4,800 steps"
    out = ["| " + " | ".join([title, "bits per token", *(f"{number} calls" for number in calls)]) + " |",
           "|" + " --- |" * (2 + len(calls))]
    for row in ROWS.values():
        mine = [line for line in lines if (line["row"], line["purpose"]) == (row, purpose)]
        cells = []
        for number in calls:
            here = [line for line in mine if line["calls"] == str(number)]
            cell = compare.spread([float(line["distance"]) for line in here], SETS[name][1]) or "–"
            if here and purpose != "untuned":
                settings = {tuned.words(line, row != "VQ-LCMD") for line in here}
                assert len(settings) == 1, f"{name}, {row}, {number} calls: several results, {settings}"
                cell += f" ({settings.pop()})"
            cells.append(cell)
        if mine:
            out.append("| " + " | ".join([row, bits(name, row, budget), *cells]) + " |")
    return "\n".join(out)


def tables():
    """{(set, training steps, purpose): Markdown}"""
    found = {}
    for name in SETS:
        for budget in (4800, 19200):
            lines = load(name, budget)
            found |= {(name, budget, purpose): table(name, lines, purpose, budget)
                      for purpose in ("untuned", "result", "tuned on itself")
                      if any(line["purpose"] == purpose for line in lines)}
    return found


def draw(path):
    """A panel per set: distance against calls."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    picture, panels = pyplot.subplots(1, len(SETS), figsize=(12, 4))
    for name, panel in zip(SETS, panels, strict=True):
        lines = load(name, 4800)
        references = {line["kind"]: {"distance": float(line["distance"])}
                      for line in compare.read(HERE / "references.csv") if line["set"] == name}
        calls = [number for number in CALLS if any(line["calls"] == str(number) for line in lines)]
        tuned.curves(panel, lines, list(ROWS.values()), calls, references)
        panel.set_title(SETS[name][0])
    legend = {label: handle for panel in panels
              for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    picture.legend(legend.values(), legend, fontsize=8, loc="lower center", ncols=4)
    picture.tight_layout(rect=(0, 0.12, 1, 1))
    picture.savefig(path, dpi=90)
    pyplot.close(picture)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draw", action="store_true", help="draw tuned.png, too")
    args = parser.parse_args()
    for (name, budget, purpose), markdown in tables().items():
        print(f"{name}, {budget:,} training steps, {purpose}\n\n{markdown}\n")
    if args.draw:
        draw(HERE / "tuned.png")


if __name__ == "__main__":
    main()
