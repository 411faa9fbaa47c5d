"""Convolutional models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from pquant_jax.zoo._checks import whole


class CNN(nn.Module):
    """See `cnn` and `conv1d`."""

    filters: tuple[int, ...]
    window: tuple[int, ...]
    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, *positions, channels) -> (n, outputs)."""
        rank = len(self.window)
        for width in self.filters:
            x = nn.relu(nn.Conv(width, self.window, strides=(2,) * rank)(x))
        x = nn.max_pool(x, (2,) * rank, strides=(2,) * rank)
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


def cnn(filters: Sequence[int] = (4,), window: int = 3, hidden: Sequence[int] = (16,), outputs: int = 10) -> CNN:
    """Convolutions with stride 2 and relu, a 2 x 2 maximum, dense layers: small enough to be unrolled.

    Source: the pattern of LeCun et al., Proc. IEEE 86 (1998) 2278, with strides for their first pooling.

    filters: channels of each convolution.  window: its height and width.  hidden: widths of the dense layers.
    Takes x (n, height, width, channels).  Raises: ConfigError for a size that is no positive whole number.

    >>> cnn((4, 8), hidden=(16,)).window
    (3, 3)
    """
    whole("cnn", filters=filters, window=window, hidden=hidden, outputs=outputs)
    return CNN(tuple(filters), (window, window), tuple(hidden), outputs)


def conv1d(filters: Sequence[int] = (8,), window: int = 3, hidden: Sequence[int] = (16,), outputs: int = 5) -> CNN:
    """The same along one axis, such as the particles of a jet in falling pT.

    Takes x (n, positions, channels).  Raises: ConfigError for a size that is no positive whole number.

    >>> conv1d((4, 8)).window
    (3,)
    """
    whole("conv1d", filters=filters, window=window, hidden=hidden, outputs=outputs)
    return CNN(tuple(filters), (window,), tuple(hidden), outputs)


class TwoHeads(nn.Module):
    """See `two_heads`."""

    filters: int
    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """{"image": (n, h, w, c), "features": (n, ...)} -> {"class": (n, outputs), "value": (n, 1)}."""
        image, features = x["image"], x["features"]
        image = nn.relu(nn.Conv(self.filters, (3, 3), strides=(2, 2), name="image")(image))
        image = nn.max_pool(image, (2, 2), strides=(2, 2)).reshape(len(image), -1)
        features = nn.relu(nn.Dense(self.hidden, name="features")(features.reshape(len(features), -1)))
        joint = nn.relu(nn.Dense(self.hidden, name="joint")(jnp.concatenate([image, features], axis=-1)))
        return {"class": nn.Dense(self.outputs, name="class")(joint), "value": nn.Dense(1, name="value")(joint)}


def two_heads(filters: int = 4, hidden: int = 12, outputs: int = 5) -> TwoHeads:
    """An image and a list of features in, a class and a number out: two inputs and two heads on one trunk.

    filters: of the 3 x 3 convolution with stride 2.  hidden: width of the features' layer and of the joint one.
    Takes {"image": (n, height, width, channels), "features": (n, ...)}.
    Raises: ConfigError for a size that is no positive whole number.

    >>> two_heads(outputs=3).outputs
    3
    """
    whole("two_heads", filters=filters, hidden=hidden, outputs=outputs)
    return TwoHeads(filters, hidden, outputs)


class SmartPixels(nn.Module):
    """See `smart_pixels`."""

    filters: int
    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, 13, 21, slices) -> (n, outputs)."""
        x = nn.relu(nn.Conv(self.filters, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(self.filters, (1, 1))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


def smart_pixels(filters: int = 6, hidden: Sequence[int] = (18, 18), outputs: int = 3) -> SmartPixels:
    """A filter for clusters of charge in a pixel sensor: two convolutions, a mean of 2 x 2, dense layers; 2,193 weights.

    In the manner of the on-sensor filters of Yoo et al., arXiv:2310.02474, whose weights are few enough for the chip.

    filters: of the 3 x 3 convolution with stride 2 and of the 1 x 1 one.  hidden: widths of the dense layers.
    Takes x (n, 13, 21, slices), as `pquant_jax.data.pixel_clusters` gives it.
    Raises: ConfigError for a size that is no positive whole number.

    >>> smart_pixels().hidden
    (18, 18)
    """
    whole("smart_pixels", filters=filters, hidden=hidden, outputs=outputs)
    return SmartPixels(filters, tuple(hidden), outputs)


class ResNet(nn.Module):
    """See `resnet20`."""

    blocks: int
    width: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x (n, 32, 32, channels) -> (n, outputs)."""

        def norm(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train)(x)

        x = nn.relu(norm(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        for stage in range(3):
            width = self.width << stage
            for block in range(self.blocks):
                strides = (2, 2) if stage and not block else (1, 1)
                y = nn.relu(norm(nn.Conv(width, (3, 3), strides=strides, use_bias=False)(x)))
                y = norm(nn.Conv(width, (3, 3), use_bias=False)(y))
                x = norm(nn.Conv(width, (1, 1), strides=strides, use_bias=False)(x)) if x.shape != y.shape else x
                x = nn.relu(x + y)
        return nn.Dense(self.outputs)(jnp.mean(x, axis=(1, 2)))


def resnet20(outputs: int = 10, *, blocks: int = 3, width: int = 16) -> ResNet:
    """ResNet-20: three stages of residual blocks of two 3 x 3 convolutions; 0.27 million weights, 40 million products.

    He et al., arXiv:1512.03385, sec. 4.2, with a 1 x 1 convolution where a shortcut changes its width.  Far too large to be
    unrolled: the model that the size limit of the lowering is for.

    blocks: per stage, 6 blocks + 2 layers in all.  width: channels of the first stage; doubled twice.
    Takes x (n, 32, 32, channels).  Raises: ConfigError for a size that is no positive whole number.

    >>> resnet20(100).outputs
    100
    """
    whole("resnet20", outputs=outputs, blocks=blocks, width=width)
    return ResNet(blocks, width, outputs)
