"""Do the samples show the class that was asked for? A small classifier, trained on the training images, says so.

    python experiments/agreement.py runs/toy/ckpt.pt

It prints how often the classifier agrees with the label of held-out images, of their reconstructions by the tokenizer,
and of class-conditional samples, class by class. The settings of the samples are those of the checkpoint, unless given.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.build import load_checkpoint
from engine.distributed import choose_device
from extras.datasets import find
from sample import sample_images
from vqvae import to_float


def make_classifier(num_classes):
    """Three stride-2 convolutions and a linear layer on the mean; images of any size from 8 pixels."""
    def level(c_in, c_out):
        return [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*level(3, 32), *level(32, 64), *level(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(128, num_classes))


def train_classifier(train, device, steps, batch=128, lr=2e-3, seed=0):
    """One linear decay of AdamW over `steps` batches of `batch` random training images."""
    torch.manual_seed(seed)
    model = make_classifier(len(train.class_names)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in tqdm(range(steps), "classifier", leave=False, disable=None):
        indices = torch.randint(len(train), (batch,))
        logits = model(to_float(train.batch(indices).to(device)).to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, train.labels[indices].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay.step()
    return model.eval()


@torch.no_grad()
def agreement(classifier, images, labels, device):
    """(share of images given their label, (C, C) counts of [label, answer])."""
    answers = torch.cat([classifier(to_float(part.to(device))).argmax(1).cpu() for part in images.split(256)])
    num_classes = classifier[-1].out_features
    counts = torch.bincount(labels * num_classes + answers, minlength=num_classes ** 2).view(num_classes, num_classes)
    return float((answers == labels).double().mean()), counts


def read_checkpoint_and_data(args):
    """(pipeline, training images, held-out images) of args.checkpoint, --data, --root and --device; ValueError."""
    pipeline = load_checkpoint(args.checkpoint, choose_device(args.device))
    source = find(args.data, args.root)
    if source.class_names != pipeline.class_names:
        raise ValueError(f"--data {args.data} has other classes than {args.checkpoint}")
    return pipeline, *source.load(pipeline.tokenizer.size)


def main():
    parser = argparse.ArgumentParser(description="Agreement of a classifier with the labels of samples.")
    parser.add_argument("checkpoint", help="the ckpt.pt that train.py wrote")
    parser.add_argument("--data", default="toy", help="the data that the checkpoint was trained on (default: toy)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--n", type=int, default=500, help="samples, spread over the classes (default: 500)")
    parser.add_argument("--guidance", type=float, nargs="+", help="one or more omegas (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, help="network calls per sample (default: the checkpoint's)")
    parser.add_argument("--sampler", choices=["ancestral", "ddim"], help="default: the checkpoint's")
    parser.add_argument("--classifier-steps", type=int, default=600, help="training steps of 128 (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the classifier (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args()
    try:
        pipeline, train, test = read_checkpoint_and_data(args)
        if not pipeline.class_names:
            raise ValueError(f"{args.checkpoint} was trained without classes: there are no labels to agree with")
    except ValueError as error:
        print(f"agreement.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    device = pipeline.device
    classifier = train_classifier(train, device, args.classifier_steps, seed=args.seed)
    images = test.batch(range(len(test)))
    rate, _ = agreement(classifier, images, test.labels, device)
    print(f"held-out images    {rate:.2%} of {len(test):,}")
    rebuilt = torch.cat([pipeline.tokenizer.decode(pipeline.tokenizer.encode(part.to(device))).cpu()
                         for part in images.split(256)])
    rate, _ = agreement(classifier, rebuilt, test.labels, device)
    print(f"reconstructions    {rate:.2%} of {len(test):,}")
    names, labels = pipeline.class_names, torch.arange(args.n) % len(pipeline.class_names)
    settings = dict(pipeline.sampling)
    settings.update({key: getattr(args, key) for key in ("steps", "sampler") if getattr(args, key) is not None})
    for omega in args.guidance or [settings["guidance"]]:
        settings["guidance"] = omega
        samples = sample_images(pipeline, labels, seed=args.seed, **settings)
        rate, counts = agreement(classifier, samples, labels, device)
        print(f"samples            {rate:.2%} of {args.n:,}   {settings}, seed {args.seed}")
        worst = sorted(range(len(names)), key=lambda c: float(counts[c, c] / counts[c].sum().clamp(min=1)))[:3]
        print("  least agreement: " + "; ".join(
            f"{names[c]} {int(counts[c, c])} of {int(counts[c].sum())}" for c in worst))


if __name__ == "__main__":
    main()
