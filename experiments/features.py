"""The measures of images, by the formulas of fid.py: on Inception-v3 if its weights are there (then it is
FID), else on a classifier trained here on the training images, whose distance is never called FID.

A set without classes takes the classifier of another set (--features-of), as FID takes that of ImageNet.
"""

import functools
import sys
from pathlib import Path

import common  # noqa: F401
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from engine.process import write_atomically
from engine.validate import UserError
from extras.datasets import find
from extras.inception import find_inception, load_inception
from fid import frechet_distance, kernel_distance, precision_recall
from vqvae import to_float


def make_classifier(num_classes):
    """Three stride-2 convolutions and a linear layer on the mean; images of any size from 8 pixels."""
    layers = []
    for c_in, c_out in (3, 32), (32, 64), (64, 128):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                   nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes))


def train_classifier(model, images, device, steps, batch=128):
    """Trains it on the classes of a data.ImageSet, by AdamW over random batches, with a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in tqdm(range(steps), "classifier", leave=False, disable=None):
        indices = torch.randint(len(images), (batch,))
        logits = model(to_float(images.batch(indices).to(device)).to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, images.labels[indices].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay.step()
    model.eval()


def load_or_train(path, train, test, device, steps):
    """(classifier, its accuracy on held-out images), from its file if it is there."""
    torch.manual_seed(0)
    classifier = make_classifier(len(train.class_names)).to(device, memory_format=torch.channels_last)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        classifier.load_state_dict(state["weights"])
        return classifier.eval(), state["accuracy"]
    train_classifier(classifier, train, device, steps)
    some = torch.arange(min(len(test), 10000))
    with torch.no_grad():
        right = [classifier(to_float(test.batch(part).to(device))).argmax(1).cpu() == test.labels[part]
                 for part in some.split(256)]
    accuracy = float(torch.cat(right).double().mean())
    state = {"weights": classifier.state_dict(), "accuracy": accuracy}
    write_atomically(path, functools.partial(torch.save, state))
    return classifier, accuracy


def spread_out(n, most):
    """At most `most` of the numbers below n, evenly: a folder is sorted by class."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


class Evaluator:
    """Scores images against 10,000 training images. args: the command line; shared: of compare.prepare."""

    def __init__(self, args, shared):
        train, test = shared.images, shared.unseen
        kind, file = "classes", "classifier.pt"
        if args.features_of:
            train, test = find(args.features_of, args.root).load(shared.config["size"])
            name = Path(args.features_of).stem
            kind, file = f"{name}'s classes", f"classifier-{name}.pt"
        if not train.class_names:
            sys.exit(f"{args.features_of or args.data} has no classes to learn features from: give "
                     "--features-of another set, such as cifar10")
        self.device = shared.device
        classifier, accuracy = load_or_train(shared.out / file, train, test, self.device,
                                             args.classifier_steps)
        self.name = f"own classifier of {kind}, {accuracy:.2%} right on held-out images"
        self.network = lambda images: classifier[:-1](to_float(images))
        try:
            inception = load_inception(find_inception(may_download=False), self.device)
            self.name, self.network = "Inception-v3", lambda images: inception(images)["2048"]
        except UserError:
            pass
        some = np.array_split(spread_out(len(shared.images), 10000), 10)
        self.real = torch.cat([self.features(shared.images.batch(part)) for part in some])

    @torch.no_grad()
    def features(self, images):
        """float64 features (n, F) of uint8 images (n, 3, H, W)."""
        return torch.cat([self.network(part.to(self.device)).cpu().double() for part in images.split(100)])

    def __call__(self, images, distance_alone=False):
        """{measure: value} of uint8 images (n, 3, H, W)."""
        fake = self.features(images)
        statistics = [value for f in (self.real, fake) for value in (f.mean(0).numpy(), np.cov(f.numpy().T))]
        found = {"distance": frechet_distance(*statistics)}
        if distance_alone:
            return found
        found["kid"] = kernel_distance(self.real, fake)[0]
        found["precision"], found["recall"] = precision_recall(self.real, fake)
        return found
