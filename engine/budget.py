"""--minutes: how many steps of both stages fit into a time, from the speed that a few of them have on this
machine.

Both stages get the steps of the preset times one factor. The steps that are timed train networks that are
thrown away. What was chosen is in config.json: a run that goes on keeps its plan. Called by train.py.
"""

import time

import torch

from engine.distributed import all_reduce_max, rank_and_world
from engine.process import write_json
from engine.validate import UserError, read_json

# of the time is planned for steps; the rest is for encoding, evaluations, pictures and checkpoints
MARGIN = 0.9
FEW = 1000  # steps of a stage that mean little


class Stopwatch:
    """Stands in for a StatusLog: lets a training loop run for some seconds, and times its steps.

    at: the step that is repeated. Afterwards seconds_per_step is that of the slowest rank.
    """

    def __init__(self, at, seconds, device):
        self.step, self.at, self.seconds, self.device = 0, at, seconds, device

    def loop(self):
        yield self.at  # the first one compiles, allocates and starts the reader
        yield self.at
        began, count = self.now(), 0
        while count < 50 and all_reduce_max(int(self.now() - began < self.seconds)):
            yield self.at
            count += 1
        self.seconds_per_step = all_reduce_max(round(1e6 * (self.now() - began) / count)) / 1e6

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, losses, tokens=None):
        pass

    def check(self):
        pass

    def due(self, name):
        return False


def choose_steps(run, loops):
    """Sets the steps in run.config and config.json. loops: {option: function of a Stopwatch that runs that
    loop}.
    """
    config, seconds = run.config, 60 * run.minutes
    print(f"--minutes {run.minutes:g}: timing some steps", flush=True)
    patience = min(5, seconds / 200)
    per_step = {name: seconds_per_step(run, name, loop, patience) for name, loop in loops.items()}
    spent = all_reduce_max(round(time.monotonic() - run.began))
    chosen, message = plan(seconds, spent, per_step, config)
    config.update(chosen)
    if rank_and_world()[0] == 0:
        path = run.out / "config.json"
        write_json(path, read_json(path) | chosen | {"minutes": run.minutes})
    print(message)


def seconds_per_step(run, name, loop, seconds):
    """Of early and of late steps of a loop, which cost more once the discriminator trains."""
    config = run.config
    early_share = config["gan_start"] if name == "tokenizer_steps" and config["gan"] else 1.0
    total = 0.0
    for at, share in ((0, early_share), (config[name] - 1, 1 - early_share)):
        if share:
            watch = Stopwatch(at, seconds, run.device)
            loop(watch)
            total += share * watch.seconds_per_step
    return total


def plan(seconds, spent, per_step, config):
    """({option: steps}, a message). per_step: seconds of a step of each stage that is trained."""
    full = sum(config[name] * each for name, each in per_step.items())  # as long as the preset takes
    left = MARGIN * seconds - spent
    if left <= 0:
        raise UserError(f"--minutes {seconds / 60:g}: looking at the images alone took {spent / 60:.1f} "
                        f"minutes; give at least {(spent + 0.05 * full) / MARGIN / 60:.1f}, for a twentieth "
                        "of the preset's steps")
    chosen = {name: max(1, int(config[name] * left / full)) for name in per_step}
    words = [f"{steps:,} {name} ({1e3 * per_step[name]:.3g} ms each)" for name, steps in chosen.items()]
    message = f"--minutes {seconds / 60:g}: {' and '.join(words)}, {left / full:.2g} times the preset's"
    if min(chosen.values()) < FEW and left < full:
        message += ("\nThat is too little to mean much: the preset's steps would take "
                    f"{(spent + full) / 60:.0f} minutes. Give more, or a smaller --size, --width or --depth")
    return chosen, message
