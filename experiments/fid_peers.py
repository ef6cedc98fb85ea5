"""fid.py beside torch-fidelity and pytorch-fid, in one run: are the numbers the same, and how long does each take?

    pip install --no-deps torch-fidelity pytorch-fid torchvision
    python experiments/fid_peers.py [--device cuda] [--weights FILE] [--images 256]

Without --weights all three networks get the same random weights (running statistics included): agreement and speed do
not depend on them. Metrics are compared on the same features. Speed is the median of --repeats passes, in turns, so
that a noisy machine is noisy for all.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from extras.datasets import find  # noqa: E402
from extras.fid_sources import Pictures  # noqa: E402
from extras.inception import PREPROCESS, InceptionV3, fold_batch_norm, load_inception  # noqa: E402
from extras.metrics import inception_score, kernel_distance, precision_recall  # noqa: E402
from fid import compute_scores, frechet_distance, measure  # noqa: E402


def import_peers():
    """torch_fidelity's extractor and metrics, pytorch_fid. torchvision may lack its compiled operators."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a torchvision built for CUDA beside a torch for the CPU: the peers need none of these
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_peers.library = library  # its definitions live as long as it does
    import pytorch_fid.fid_score
    import pytorch_fid.inception
    import torch_fidelity.feature_extractor_inceptionv3 as extractor
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    return extractor, metric_fid, metric_isc, metric_kid, metric_prc, pytorch_fid


def random_weights(seed=0):
    """A state dict in the published layout, from NumPy's generator: the same everywhere. Activations stay near 1."""
    rng, state = np.random.default_rng(seed), {}
    for name, like in InceptionV3().state_dict().items():
        if name.endswith("conv.weight"):
            value = rng.standard_normal(like.shape) * (2 / like[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            value = rng.uniform(0.5, 1.5, like.shape)
        elif name.endswith("num_batches_tracked"):
            continue
        else:
            value = 0.2 * rng.standard_normal(like.shape)
        state[name] = torch.from_numpy(value).float()
    return state


def test_images(size, n=2):
    """(n, 3, size, size) uint8, smooth and noisy parts; from NumPy's generator."""
    rng = np.random.default_rng(size)
    y, x = np.mgrid[:size, :size] / size
    smooth = 128 + 100 * np.sin(np.stack([3 * x + i * y for i in range(3 * n)]) * 4)
    noisy = smooth.reshape(n, 3, size, size) + 40 * rng.standard_normal((n, 3, size, size)) * (x > 0.5)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


def in_turns(calls, repeats):
    """{name: function} -> {name: median seconds}, {name: value}; all called once a round, the first round a warm-up."""
    seconds, values = {name: [] for name in calls}, {}
    for _ in range(repeats + 1):
        for name, function in calls.items():
            start = time.perf_counter()
            values[name] = function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(several[1:]) for name, several in seconds.items()}, values


def relative(ours, theirs):
    """Largest difference over the root mean square of theirs."""
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


def features(args, device, peers):
    """Features and logits at four sizes, and images per second."""
    extractor, *_, pytorch_fid = peers
    state = torch.load(args.weights, weights_only=True) if args.weights else random_weights()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder, "weights.pth"))
        names = ["64", "192", "768", "2048", "logits_unbiased", "logits"]
        theirs = extractor.FeatureExtractorInceptionV3("x", names, str(Path(folder, "weights.pth"))).to(device)
    pytorch_fid.inception.load_state_dict_from_url = lambda *a, **k: state
    other = pytorch_fid.inception.InceptionV3([3]).to(device).eval()
    networks = {}
    for resize in PREPROCESS:
        network = InceptionV3(resize)
        network.load_state_dict(state)
        networks[resize] = fold_batch_norm(network).to(device)
    print("largest difference / root mean square; uint8 images")
    for size in (32, 64, 256, 299):
        images = test_images(size, 8).to(device)
        ours, reference = networks["tf"](images), dict(zip(names, theirs(images), strict=True))
        found = [f"{name} {relative(ours[name], value):.1e}" for name, value in reference.items()]
        with torch.no_grad():
            mode = relative(networks["pytorch-fid"](images)["2048"], other(images.float() / 255)[0].flatten(1))
        print(f"  {size:>3} px  torch-fidelity: {', '.join(found)};  pytorch-fid: 2048 {mode:.1e}")
    if args.pin:
        for size in (32, 320):
            reference = dict(zip(names, theirs(test_images(size).to(device)), strict=True))
            print({name: [round(float(v), 7) for v in value[1, :3]] for name, value in reference.items()})
    generator = torch.Generator().manual_seed(1)
    for batch in args.batches:
        images = torch.randint(0, 256, (max(args.images // batch, 1), batch, 3, 256, 256), dtype=torch.uint8,
                               generator=generator)
        calls = {"ours": networks["tf"], "torch-fidelity": theirs, "pytorch-fid": lambda x: other(x.float() / 255)}
        times, _ = in_turns({name: partial(over, images, f, device) for name, f in calls.items()}, args.repeats)
        n, ours = images.shape[0] * batch, times["ours"]
        print(f"network at 256 px, batch {batch}: "
              + ", ".join(f"{name} {n / s:.1f} images/s ({s / ours:.2f}x our time)" for name, s in times.items()))


@torch.no_grad()
def over(images, network, device):
    for part in images:
        network(part.to(device))
    if device.type == "cuda":
        torch.cuda.synchronize()


def folders(args, device, peers):
    """Two folders of images through both whole programs: reading, resizing, network, metrics."""
    import torch_fidelity
    with tempfile.TemporaryDirectory() as place:
        torch.save(torch.load(args.weights, weights_only=True) if args.weights else random_weights(),
                   Path(place, "weights.pth"))
        network = load_inception(Path(place, "weights.pth"), device)
        real, fake = (measure(Pictures(find(folder)), network, name=folder) for folder in args.folders)
        ours = compute_scores(real, fake)
        theirs = torch_fidelity.calculate_metrics(
            input1=args.folders[1], input2=args.folders[0], fid=True, kid=True, isc=True, prc=True,
            feature_extractor="inception-v3-compat", feature_layer_prc="2048", cuda=device.type == "cuda",
            batch_size=16, feature_extractor_weights_path=str(Path(place, "weights.pth")), verbose=False, cache=False,
            kid_subset_size=min(1000, real.n, fake.n), samples_find_deep=True)
    print(f"\n{real.n} and {fake.n} files          ours           torch-fidelity    relative difference")
    for name, key in (("fid", "frechet_inception_distance"), ("kid", "kernel_inception_distance_mean"),
                      ("is", "inception_score_mean"), ("precision", "precision"), ("recall", "recall")):
        print(f"  {name:<10} {ours[name]:>20.10f} {theirs[key]:>20.10f}   {ours[name] / theirs[key] - 1:+.1e}")


def made_up_features(n, seed, shift=0.0):
    """(n, 2048) float64, non-negative and correlated like pooled activations."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((64, 2048)) / 8
    hidden = rng.standard_normal((n, 64)) + shift
    return np.maximum(hidden @ mix + 0.3 * rng.standard_normal((n, 2048)) + 0.2, 0)


def metrics(args, device, peers):
    """FID and its relatives on the same features."""
    _, metric_fid, metric_isc, metric_kid, metric_prc, pytorch_fid = peers
    sqrtm = scipy.linalg.sqrtm

    def with_disp(a, disp=True, **k):  # pytorch-fid 0.3.0 asks for a return form that SciPy 1.18 dropped
        return sqrtm(a) if disp else (sqrtm(a), 0.0)

    pytorch_fid.fid_score.linalg.sqrtm = with_disp

    def moments(x):
        return x.mean(0), np.cov(x, rowvar=False)

    def torch_fidelity(mu1, sigma1, mu2, sigma2):
        return metric_fid.fid_statistics_to_metric({"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2},
                                                   False)["frechet_inception_distance"]

    functions = {"ours": frechet_distance, "torch-fidelity": torch_fidelity,
                 "pytorch-fid": pytorch_fid.fid_score.calculate_frechet_distance}
    print("\nFrechet distance, d = 2048, of the same statistics")
    exact = {}
    for n in (5000, 1000):
        both = *moments(made_up_features(n, 1)), *moments(made_up_features(n, 2, 0.1))
        times, values = in_turns({name: partial(f, *both) for name, f in functions.items()}, max(1, args.repeats // 2))
        exact[n] = values["ours"]
        for name, f in functions.items():
            print(f"  {n} images a side  {name:<15} {values[name]:.10f} ({values[name] / values['ours'] - 1:+.1e})   "
                  f"{times[name]:6.2f} s ({times[name] / times['ours']:.1f}x our time)   with itself "
                  f"{f(*both[:2], *both[:2]):+.1e}")
    # The right answer where N < d, from the features: Tr (s1 s2)^(1/2) is the nuclear norm of A B^T / (n - 1).
    a, b = made_up_features(1000, 1), made_up_features(1000, 2, 0.1)
    x, y = a - a.mean(0), b - b.mean(0)
    right = (np.square(a.mean(0) - b.mean(0)).sum() + (np.square(x).sum() + np.square(y).sum()) / 999
             - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum() / 999)
    print(f"  1000, from singular values of the features: {right:.10f}; ours {exact[1000] / right - 1:+.1e}")

    a, b = (torch.from_numpy(made_up_features(n, seed, shift)) for n, seed, shift in ((3000, 3, 0.1), (2500, 4, 0)))
    logits = torch.randn(3000, 1008, generator=torch.Generator().manual_seed(5)) * 2
    theirs = metric_kid.kid_features_to_metric(a, b, kid_subsets=100, kid_subset_size=1000, rng_seed=2020,
                                               kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
                                               kid_kernel_poly_coef0=1, verbose=False)
    ours = kernel_distance(b.to(device), a.to(device))
    table = [("KID", ours[0], theirs["kernel_inception_distance_mean"]),
             ("KID, deviation", ours[1], theirs["kernel_inception_distance_std"])]
    theirs, ours = metric_isc.isc_features_to_metric(logits), inception_score(logits.to(device))
    table += [("IS", ours[0], theirs["inception_score_mean"]),
              ("IS, deviation", ours[1], theirs["inception_score_std"])]
    theirs = metric_prc.prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False,
                                               verbose=False)
    ours = precision_recall(b.to(device), a.to(device))
    table += [("precision", ours[0], theirs["precision"]), ("recall", ours[1], theirs["recall"])]
    print("\n3,000 generated and 2,500 real features       ours           torch-fidelity    relative difference")
    for name, o, t in table:
        print(f"  {name:<20} {o:>26.12f} {t:>24.12f}   {o / t - 1:+.1e}")


def main():
    parser = argparse.ArgumentParser(description="fid.py beside torch-fidelity and pytorch-fid.")
    parser.add_argument("--device", default="cpu", help="of the networks (default: cpu)")
    parser.add_argument("--weights", help="the published weights (default: random ones)")
    parser.add_argument("--images", type=int, default=64, help="per timed pass (default: 64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 50], help="batch sizes to time")
    parser.add_argument("--folders", nargs=2, metavar="FOLDER", help="real and generated: compare whole programs")
    parser.add_argument("--pin", action="store_true", help="print the figures of torch-fidelity that test_all.py holds")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes (default: 3)")
    args = parser.parse_args()
    device, peers = torch.device(args.device), import_peers()
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n")
    features(args, device, peers)
    metrics(args, device, peers)
    if args.folders:
        folders(args, device, peers)


if __name__ == "__main__":
    main()
