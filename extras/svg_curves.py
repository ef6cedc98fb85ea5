"""HTML in which every text is escaped, and curves as inline SVG. Called by extras/run_page.py.

A curve is an array (n, 2) of steps and values, in the order of the steps.
"""

import math
from html import escape

import numpy as np

from engine.read_back import printable

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 170, 44, 12, 10, 22  # of a figure, and its margins
VOID = {"img", "input", "meta"}  # elements that have no end


class Html(str):
    """What is HTML already. tag() escapes every other text."""


def tag(name, /, *content, **attributes):
    """One element. Attributes: class_ is class, data_x is data-x; one that is None is left away."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(printable(str(value)))}"'
                    for key, value in attributes.items() if value is not None)
    inside = "".join(part if isinstance(part, Html) else escape(printable(str(part))) for part in content)
    return Html(f"<{name}{words}>" + ("" if name in VOID else f"{inside}</{name}>"))


def number(value):
    """As people read it: 0.2586, 1,528, 8.4e-05; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def short(value):
    """A number at an axis: 2.5k, 1M, 0.02."""
    size, letter = next(((size, letter) for size, letter in ((1e6, "M"), (1e3, "k")) if abs(value) >= size), (1, ""))
    return f"{value / size:g}{letter}"


def thin(curve, limit=300):
    """About `limit` points of a curve: the first, the last, and the lowest and the highest of every stretch between."""
    n = len(curve)
    if n <= limit:
        return curve
    size = math.ceil(2 * n / limit)
    parts = np.pad(curve[:, 1], (0, -n % size), mode="edge").reshape(-1, size)
    chosen = np.arange(0, n, size) + np.stack([parts.argmin(1), parts.argmax(1)])
    return curve[np.unique([0, *chosen.clip(max=n - 1).flat, n - 1])]


def ticks(low, high, most=5):
    """At most about `most` round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (times * step) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Some of 1, 2, 5 times the powers of ten from low to high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [times * 10.0 ** power for power in powers for times in (1, 2, 5) if low <= times * 10.0 ** power <= high]
    tens = [10.0 ** power for power in powers if low <= 10.0 ** power <= high]
    return found if len(found) <= 4 else tens[::-(-len(tens) // 4)] if len(tens) > 1 else found[::2]


def chart(title, curves, hint="", level=None, log=True, base=None):
    """A figure of {name: curve}, with the last values in words; "" if no curve has a point.

    level: (name, value) of a dashed line. log: a logarithmic axis if all is positive and the largest value is more than
    20 times the smallest. base: where the axis begins, or lower.
    """
    curves = {name: thin(curve) for name, curve in curves.items() if curve is not None and len(curve)}
    if not curves:
        return Html()
    every = np.concatenate(list(curves.values()))
    more = ([level[1]] if level else []) + ([] if base is None else [base])
    last, low, high = int(every[:, 0].max()), min([every[:, 1].min(), *more]), max([every[:, 1].max(), *more])
    log = log and low > 0 and high > 20 * low
    scale = math.log10 if log else float
    if not log:
        space = 0.06 * (high - low) or 0.05 * abs(high) or 1
        low, high = max(low - space, 0.0) if low >= 0 else low - space, high + space
    bottom, extent = scale(low), scale(high) - scale(low)

    def at(step, value):  # in the figure
        return (round(LEFT + step / (last or 1) * (WIDTH - LEFT - RIGHT), 1),
                round(TOP + (1 - (scale(value) - bottom) / extent) * (HEIGHT - TOP - BOTTOM), 1))

    parts = []
    for value in log_ticks(low, high) if log else ticks(low, high):
        y = at(0, value)[1]
        parts += [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"),
                  tag("text", short(value), x=LEFT - 5, y=y + 4, text_anchor="end")]
    for step in ticks(0, last or 1):
        if step == int(step):
            parts.append(tag("text", short(step), x=at(step, high)[0], y=HEIGHT - 5, text_anchor="middle"))
    if level:
        y = at(0, level[1])[1]
        parts.append(tag("line", tag("title", f"{level[0]} = {number(level[1])}"), x1=LEFT, x2=WIDTH - RIGHT, y1=y,
                         y2=y, class_="level"))
    words = []
    for i, (name, curve) in enumerate(curves.items()):
        curve, newest = curve.tolist(), number(curve[-1, 1])
        least, most = (number(choose(value for _, value in curve)) for choose in (min, max))
        text = f"{name}: {newest} at step {curve[-1][0]:,.0f}, lowest {least}, highest {most}"
        parts.append(tag("polyline", tag("title", text), class_=f"c{i % 5}", data_name=name,
                         points=" ".join(f"{x},{y}" for x, y in (at(*point) for point in curve)),
                         data_values=" ".join(f"{step:.0f}:{value:.5g}" for step, value in curve)))
        x, y = at(*curve[-1])
        parts.append(tag("circle", cx=x, cy=y, r=2.5, class_=f"c{i % 5}"))
        words += [tag("span", name, " ", tag("b", newest), class_=f"c{i % 5}"), " "]
    if level:
        words.append(tag("span", f"{level[0]} {number(level[1])}", class_="level"))
    parts.append(tag("line", y1=TOP, y2=HEIGHT - BOTTOM, class_="rule"))
    return tag("figure", tag("h3", title, tag("small", " log scale") if log else ""), tag("p", *words, class_="legend"),
               tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title),
               tag("output", f"step {last:,}"), tag("figcaption", hint) if hint else "", class_="chart")
