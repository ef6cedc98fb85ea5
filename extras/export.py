"""`python sample.py CKPT --export FILE.pt`: a checkpoint to share. Called by extras/sample_command.py.

It is a ckpt.pt like any other, and sample.py, fid.py, --init and --tokenizer take it, but it has no optimizer and of
the two sets of weights only the averaged ones that draw, and all numbers are float16. engine/checkpoint.py makes them
float32 again, so nothing is computed in half precision.
"""

import torch

from engine.checkpoint import CHECKPOINT_FORMAT, read_checkpoint
from engine.process import UserError, write_atomically

KEPT = ("format", "config", "tokenizer", "ema", "class_names", "class_counts", "sampling", "metrics", "step")


def to_half(value):
    """float32 tensors in float16, also inside dicts; one that holds numbers too large for float16 stays as it is."""
    if isinstance(value, dict):
        return {name: to_half(v) for name, v in value.items()}
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        half = value.half()
        return half if half.isfinite().all() else value
    return value


def export(checkpoint, out):
    """Writes `checkpoint` anew to `out` (a Path) and says so in a line."""
    if out.suffix != ".pt":
        raise UserError(f"--export {out}: the name must end in .pt")
    if out.exists():
        raise UserError(f"--export {out} is there already: remove it, or give another name")
    content = read_checkpoint(checkpoint, CHECKPOINT_FORMAT)
    if missing := [name for name in KEPT if name not in content and name != "class_counts"]:
        raise UserError(f"{checkpoint} has no {missing[0]}: it is damaged, or of another version")
    kept = {name: to_half(content[name]) for name in KEPT if name in content}
    write_atomically(out, lambda partial: torch.save(kept, partial))
    return f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB. Draw with it:  python sample.py {out}"
