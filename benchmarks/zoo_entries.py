"""What `zoo.py` trains: one `Entry` per model, each a minute on one core."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from scipy.stats import rankdata

import pquant_jax as pq
from pquant_jax import zoo
from pquant_jax.constrain import mdmm, patterns
from pquant_jax.quantize import Format
from pquant_jax.train import Metric, accuracy, cross_entropy, mae, squared_error

JETS, SEARCHED, PARTICLES = 8000, 20_000, 8
PORT: Final = pq.InputSpec(1, 4, 7)  # 12 bits: particles and features of order 1
WEIGHTS: Final = Format(i=0, f=6, k=1, overflow="SAT_SYM")
ACTIVATIONS: Final = Format(i=2, f=5, overflow="WRAP")


class Entry(NamedTuple):
    """A model of the zoo and how it is trained.

    build: () -> module or Model.  data: () -> Dataset; DataError where a file is missing.  compression: inst -> Transform.
    epochs: of the three stages.  outputs: format of the model's outputs, None for what the sums give.
    score: (outputs of the test set, Dataset) -> figure of merit, higher is better; None for the mean of `metric`.
    export: (Model) -> the Model that is lowered, with the same paths; None for the trained one.
    rtl: simulate the netlist with Verilator.  refused: the words with which lowering must refuse the model.
    """

    build: Callable[[], Any]
    data: Callable[[], pq.data.Dataset]
    compression: Callable[[pq.Instrumented], pq.Transform]
    epochs: tuple[int, int, int] = (4, 16, 4)
    batch: int = 256
    rate: float = 5e-3
    inputs: Any = PORT
    outputs: Any = None
    loss: Callable = cross_entropy
    metric: Metric = accuracy
    score: Callable[[Any, pq.data.Dataset], float] | None = None
    export: Callable[[pq.Model], pq.Model] | None = None
    rtl: bool = True
    refused: tuple[str, ...] = ()


def hgq(beta: float = 2e-6, beta_end: float = 2e-5) -> Callable[[pq.Instrumented], pq.Transform]:
    """Trained bit-widths."""

    def make(inst: pq.Instrumented) -> pq.Transform:
        price = dict(beta=beta, beta_end=beta_end, cost=inst.ebops)
        return pq.chain(pq.quantize.hgq(inst.sites, weights=WEIGHTS, activations=ACTIVATIONS, **price))

    return make


def fixed(weights: Format, activations: Format) -> Callable[[pq.Instrumented], pq.Transform]:
    """Fixed formats."""

    def make(inst: pq.Instrumented) -> pq.Transform:
        return pq.chain(pq.quantize.fixed(inst.sites, weights=weights, activations=activations))

    return make


def pruned(sparsity: float, quantizer: Callable) -> Callable[[pq.Instrumented], pq.Transform]:
    """Magnitude pruning with a ramp in front of a quantizer."""

    def make(inst: pq.Instrumented) -> pq.Transform:
        pruning = pq.prune.magnitude(sparsity=sparsity, budget="global", roles=inst.roles)
        return pq.chain(pruning, quantizer(inst))

    return make


def smart_pixels_formats(inst: pq.Instrumented) -> pq.Transform:
    """4-bit convolutions, 8-bit dense layers, each with its activations; 70 % of the weights pruned."""
    four, eight = Format(i=0, f=3, k=1), Format(i=0, f=7, k=1)
    conv = [("Conv_.*/kernel", four), ("Conv_.*/bias", four), ("Conv_.*/input", Format(i=2, f=2))]
    quantizer = pq.quantize.fixed(inst.sites, weights=eight, activations=Format(i=3, f=5), rules=conv)
    return pq.chain(pq.prune.magnitude(sparsity=0.7, budget="global", roles=inst.roles), quantizer)


def paca(inst: pq.Instrumented) -> pq.Transform:
    """Convolution kernels on a few patterns of their positions, 8 bits with one format per tensor."""
    few = patterns(num_patterns=8, epsilon=0.01, roles=inst.roles)
    weights, activations = Format(i=0, f=7, k=1, granularity="tensor"), Format(i=3, f=5, granularity="tensor")
    constraint = mdmm(few.metric, kind="==", target=0.0, scale=0.1, damping=1.0, prunes=few.masks)
    return pq.chain(constraint, pq.quantize.fixed(inst.sites, weights=weights, activations=activations))


def particle_jets(count: int = PARTICLES, n: int | None = None) -> Callable[[], pq.data.Dataset]:
    """The embedded particle jets with `count` particles."""
    return lambda: pq.data.particles(n, count)


def jets() -> pq.data.Dataset:
    """Some of the embedded jets."""
    return pq.data.jets(JETS)


def background() -> pq.data.Dataset:
    """Gluons and quarks to train on, all classes to test."""
    return pq.data.anomalies(SEARCHED)


def jet_images(size: int = 8, count: int = 4) -> pq.data.Dataset:
    """Two inputs, an image of the pT in size x size pixels of +-0.8 and the `count` leading particles; targets class and mass."""
    whole, masses = pq.data.particles(), pq.data.jet_masses()
    splits = []
    for part in ("train", "val", "test"):
        x, y = getattr(whole, part).x, getattr(whole, part).y
        places = np.clip(np.floor((x[..., 1:] / 8 / 0.8 + 1) / 2 * size), 0, size - 1).astype(int)
        image = np.zeros((len(x), size, size, 1), np.float32)
        np.add.at(image[..., 0], (np.arange(len(x))[:, None], places[..., 0], places[..., 1]), x[..., 0])
        targets = {"class": y, "value": getattr(masses, part).y}
        splits.append(pq.data.Split({"features": x[:, :count], "image": image}, targets))
    return pq.data.Dataset(*splits, classes=whole.classes, name="jet_images")


def two_losses(made: Any, y: Any) -> jax.Array:
    """Cross-entropy of the class and squared error of the mass."""
    return cross_entropy(made["class"], y["class"]) + squared_error(made["value"], y["value"])


CLASS: Final = Metric("accuracy", lambda made, y: accuracy.function(made["class"], y["class"]))


def colour_images(size: int = 32, noise: float = 0.2) -> pq.data.Dataset:
    """Ten images of `size` x `size` pixels and three colours under noise: the shape that ResNet-20 is made for."""
    rng = np.random.default_rng(0)
    templates = rng.uniform(0, 1, (10, size, size, 3))
    splits = []
    for n in (100, 30, 30):
        y = rng.integers(0, 10, n)
        x = templates[y] + rng.normal(0, noise, (n, size, size, 3))
        splits.append(pq.data.Split(np.clip(x, 0, 1).astype(np.float32), y.astype(np.int32)))
    return pq.data.Dataset(*splits, classes=tuple(map(str, range(10))), name="colour_images")


def auc(scores: np.ndarray, labels: np.ndarray, background: tuple[int, ...] = (0, 1)) -> float:
    """Area under the ROC curve of `scores`: the chance that a signal's is larger than a background's."""
    signal = ~np.isin(labels, background)
    ranks, n = rankdata(scores), int(signal.sum())
    return float((ranks[signal].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def reconstruction_auc(outputs: Any, data: pq.data.Dataset) -> float:
    """AUC of t, w, z against g, q, of the squared error with which the jets are reconstructed."""
    return auc(np.square(np.asarray(outputs) - data.test.x).sum(-1), pq.data.jets(SEARCHED).test.y)


def latent_auc(outputs: Any, data: pq.data.Dataset) -> float:
    """AUC of t, w, z against g, q, of the score that the hardware computes."""
    del data
    return auc(np.asarray(outputs)[:, 0], pq.data.jets(SEARCHED).test.y)


def no_score(made: Any, x: Any) -> jax.Array:
    """What training looks at: the reconstruction's error alone."""
    made = made["reconstruction"] if isinstance(made, Mapping) else made
    return squared_error(made, x)


RECONSTRUCTION: Final = Metric("mse", no_score, higher_is_better=False)
SIXTEEN: Final = Format(i=7, f=8, k=1)

ENTRIES: Final[dict[str, Entry]] = {
    "mlp": Entry(lambda: zoo.mlp([64, 32, 32], 5), jets, hgq()),
    "residual_mlp": Entry(lambda: zoo.mlp([32, 32, 32], 5, residual=True, batch_norm=True), jets, hgq()),
    "particle_mlp": Entry(
        zoo.particle_mlp, particle_jets(32), pruned(0.8, hgq()), epochs=(4, 24, 4), inputs=pq.InputSpec(1, 5, 10), outputs=SIXTEEN
    ),
    "deepsets": Entry(zoo.deepsets, particle_jets(), hgq()),
    "interaction_network": Entry(zoo.interaction_network, particle_jets(6), hgq()),
    "jedi_linear": Entry(zoo.jedi_linear, particle_jets(), hgq()),
    "two_heads": Entry(zoo.two_heads, jet_images, hgq(), loss=two_losses, metric=CLASS),
    "symbolic": Entry(zoo.symbolic, jets, fixed(Format(i=2, f=6, k=1), Format(i=3, f=6)), rate=2e-2),
    "mixer": Entry(zoo.mixer, particle_jets(), hgq()),
    "transformer": Entry(lambda: zoo.transformer(width=8, heads=2, hidden=8), particle_jets(4), hgq()),
    "conv1d": Entry(zoo.conv1d, particle_jets(16), hgq()),
    "cnn": Entry(
        zoo.cnn, lambda: pq.data.mnist(n=6000, size=14), hgq(), inputs=pq.InputSpec(0, 0, 8)
    ),
    "mass_regression": Entry(
        lambda: zoo.deepsets((16, 8), (16,), 1), lambda: pq.data.jet_masses(None, PARTICLES), hgq(),
        loss=squared_error, metric=mae,
    ),
    "autoencoder": Entry(
        zoo.autoencoder, background, hgq(1e-7, 1e-6), batch=128, loss=squared_error, metric=RECONSTRUCTION,
        score=reconstruction_auc,
    ),
    "vae": Entry(
        zoo.vae, background, hgq(1e-7, 1e-6), batch=128, loss=zoo.vae_loss, metric=RECONSTRUCTION, score=latent_auc,
        export=lambda model: zoo.vae_encoder(zoo.vae(), model.params),
    ),
    "gru": Entry(lambda: zoo.gru(6), particle_jets(6), hgq()),
    "smart_pixels": Entry(
        zoo.smart_pixels, pq.data.pixel_clusters, smart_pixels_formats, epochs=(6, 24, 6), inputs=pq.InputSpec(0, 3, 3)
    ),
    "resnet20": Entry(
        zoo.resnet20, colour_images, paca, epochs=(0, 1, 1), batch=30, inputs=pq.InputSpec(0, 0, 8), rtl=False,
        refused=("stream",),
    ),
}  # fmt: skip
