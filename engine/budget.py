"""--minutes: how many steps of both stages fit into a time, from the speed that a few of them have here.

Both stages get the preset's steps times one factor. A run that goes on keeps its plan, in config.json.
"""

import time

import torch

from engine.distributed import all_reduce_max, rank_and_world
from engine.process import write_json
from engine.validate import UserError, read_json

MARGIN = 0.9  # of the time is for steps; the rest is for encoding, evaluations, pictures and checkpoints


class Stopwatch:
    """Stands in for a StatusLog: lets a loop of `steps` run for some seconds, and times its steps."""

    def __init__(self, steps, seconds, device):
        self.step, self.steps, self.seconds, self.device = 0, steps, seconds, device

    def loop(self):
        """Steps from the whole course of the training: once the discriminator trains, they take longer."""
        course = [int(self.steps * share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
        yield from (course[0], course[-1])  # the first ones compile, allocate and start the reader
        start, count = self.now(), 0
        while all_reduce_max(int(self.now() - start < self.seconds)):
            yield from course
            count += len(course)
        self.seconds_per_step = all_reduce_max(round(1e6 * (self.now() - start) / count)) / 1e6

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def due(self, *_):
        return False

    add = check = due  # nothing is logged


def choose_steps(run, loops):
    """Sets the steps in run.config and config.json. loops: {option: function of a Stopwatch, its loop}."""
    print(f"--minutes {run.minutes:g}: timing some steps", flush=True)
    per_step = {}
    for name, loop in loops.items():
        watch = Stopwatch(run.config[name], min(5, 0.3 * run.minutes), run.device)
        loop(watch)
        per_step[name] = watch.seconds_per_step
    spent = all_reduce_max(round(time.monotonic() - run.began))
    chosen, message = plan(run.minutes, spent, per_step, run.config)
    run.config.update(chosen)
    if rank_and_world()[0] == 0:
        path = run.out / "config.json"
        write_json(path, read_json(path) | chosen | {"minutes": run.minutes})
    print(message)


def plan(minutes, spent, per_step, config):
    """({option: steps}, a message). spent, per_step: seconds so far, and of a step of each stage."""
    full = sum(config[name] * seconds for name, seconds in per_step.items())  # as long as the preset takes
    left = MARGIN * 60 * minutes - spent
    if left <= 0:
        raise UserError(f"--minutes {minutes:g}: looking at the images alone took {spent / 60:.1f} minutes; "
                        f"the preset's steps take {full / 60:.0f}")
    chosen = {name: max(1, int(config[name] * left / full)) for name in per_step}
    words = [f"{steps:,} {name} ({1e3 * per_step[name]:.3g} ms each)" for name, steps in chosen.items()]
    message = f"--minutes {minutes:g}: {' and '.join(words)}, {left / full:.2g} times the preset's"
    if left < 0.1 * full:
        message += (f"\nThat is too little to mean much: the preset's steps take {full / 60:.0f} minutes. "
                    "Give more, or a smaller --size, --width or --depth")
    return chosen, message
