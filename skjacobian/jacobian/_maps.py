"""The derivative of each kind of layer, applied to cotangents: G ↦ G·∂layer/∂x.

Cotangents G have the shape (n_samples, n_rows, *output of the layer): each sample brings
its own rows. Every map comes with its backward pass, written by hand: on small networks
autograd takes longer to keep its books than the products take.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from skjacobian.jacobian._chosen import Index, at

CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# The convolutions of a CPU work on 8 or 16 channels at a time. Where an image has so many times
# fewer channels than its convolution, products of patches take half the time, and less.
NARROW = 6
# Numbers of patches at a time: what they take beside the rows that are in flight anyway.
PATCHES_AT_ONCE = 2**20


@dataclass(frozen=True)
class Map:
    """The transposed derivative of one layer at each sample.

    Attributes
    ----------
    input_shape : tuple of int
        Shape of a sample as the layer receives it.
    """

    input_shape: tuple[int, ...]

    # The field that holds a tensor, and whether that has a row for each sample.
    TENSOR: ClassVar[str | None] = None
    PER_SAMPLE: ClassVar[bool] = False

    def __call__(self, G: Tensor) -> Tensor:
        """Return G·∂layer/∂x, shape (n_samples, n_rows, *input_shape)."""
        raise NotImplementedError

    def by_cotangent(self, D: Tensor) -> Tensor:
        """Return the gradient by G, for the gradient D by the result; may overwrite D."""
        raise NotImplementedError

    def by_tensor(self, G: Tensor, D: Tensor) -> Tensor:
        """Return the gradient by the map's tensor, for the gradient D by the result."""
        raise NotImplementedError

    def add_by_tensor(self, total: Tensor, G: Tensor, D: Tensor) -> Tensor:
        """Add `by_tensor` to `total`."""
        return total.add_(self.by_tensor(G, D))

    def numbers_per_row(self) -> int:
        """Return how many numbers a row of one sample leaves behind for the backward pass."""
        return math.prod(self.input_shape)

    @property
    def tensor(self) -> Tensor | None:
        """What the map depends on, None if on nothing."""
        return None if self.TENSOR is None else getattr(self, self.TENSOR)

    def with_tensor(self, tensor: Tensor) -> Self:
        """Return the same map with another tensor in place of its own."""
        fields: dict[str, Any] = {str(self.TENSOR): tensor}
        return replace(self, **fields)

    def at(self, index: Index) -> Self:
        """Return the map at the samples that `index` chooses."""
        if self.TENSOR is None or not self.PER_SAMPLE:
            return self
        assert self.tensor is not None
        return self.with_tensor(at(self.tensor, index))

    def part(self, samples: slice, tensors: Iterator[Tensor]) -> Self:
        """Return the map at some samples, with the next of `tensors` in place of its own."""
        if self.TENSOR is None:
            return self
        tensor = next(tensors)
        return self.with_tensor(tensor[samples] if self.PER_SAMPLE else tensor)


@dataclass(frozen=True)
class Dense(Map):
    """Linear layer: G·W.

    Attributes
    ----------
    weight : Tensor of shape (n_out, n_in)
    """

    weight: Tensor
    TENSOR = "weight"

    def __call__(self, G: Tensor) -> Tensor:
        """Return G·W."""
        return G @ self.weight

    def by_cotangent(self, D: Tensor) -> Tensor:
        """Return D·Wᵀ."""
        return D @ self.weight.T

    def by_tensor(self, G: Tensor, D: Tensor) -> Tensor:
        """Return Gᵀ·D, summed over samples and rows."""
        return G.flatten(0, -2).T @ D.flatten(0, -2)

    def add_by_tensor(self, total: Tensor, G: Tensor, D: Tensor) -> Tensor:
        """Add Gᵀ·D to `total`, without room for the product."""
        return total.addmm_(G.flatten(0, -2).T, D.flatten(0, -2))


@dataclass(frozen=True)
class Diagonal(Map):
    """Elementwise layer: G times the slope of the activation at the sample.

    Attributes
    ----------
    slope : Tensor of shape (n_samples, *input_shape)
    """

    slope: Tensor
    TENSOR = "slope"
    PER_SAMPLE = True

    def __call__(self, G: Tensor) -> Tensor:
        """Return G∘σ'(z)."""
        return G * self.slope.unsqueeze(1)

    def by_cotangent(self, D: Tensor) -> Tensor:
        """Return D∘σ'(z)."""
        return D.mul_(self.slope.unsqueeze(1))

    def by_tensor(self, G: Tensor, D: Tensor) -> Tensor:
        """Return G∘D, summed over rows."""
        return (G * D).sum(1)


@dataclass(frozen=True)
class ChannelScale(Map):
    """Batch normalization in eval mode: each channel times its scale.

    Attributes
    ----------
    scale : Tensor of shape (n_channels,)
        γ / √(running variance + ε).
    """

    scale: Tensor
    TENSOR = "scale"

    def __call__(self, G: Tensor) -> Tensor:
        """Return G times the scale of its channel."""
        return G * self.scale.reshape(-1, *[1] * (len(self.input_shape) - 1))

    def by_cotangent(self, D: Tensor) -> Tensor:
        """Return D times the scale of its channel."""
        return self(D)

    def by_tensor(self, G: Tensor, D: Tensor) -> Tensor:
        """Return G∘D, summed over all but the channels."""
        return (G * D).flatten(3).sum((0, 1, 3)) if G.ndim > 3 else (G * D).sum((0, 1))


@dataclass(frozen=True)
class Reshape(Map):
    """A change of shape, which costs nothing.

    Attributes
    ----------
    output_shape : tuple of int
    """

    output_shape: tuple[int, ...]

    def __call__(self, G: Tensor) -> Tensor:
        """Return G in the shape of the input."""
        return G.reshape(*G.shape[:2], *self.input_shape)

    def by_cotangent(self, D: Tensor) -> Tensor:
        """Return D in the shape of the output."""
        return D.reshape(*D.shape[:2], *self.output_shape)

    def numbers_per_row(self) -> int:
        """Return 0: a view keeps nothing."""
        return 0


@dataclass(frozen=True)
class Window(Map):
    """What the two poolings share: windows without overlap.

    Attributes
    ----------
    window : tuple of int
        Height and width of the window, which is also the stride.
    """

    window: tuple[int, int]

    def places(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield each place in the window, with the slices that it takes of the input."""
        height, width = self.window
        covered_height = self.input_shape[-2] // height * height
        covered_width = self.input_shape[-1] // width * width
        for row in range(height):
            for column in range(width):
                place = row * width + column
                yield (
                    place,
                    slice(row, covered_height, height),
                    slice(column, covered_width, width),
                )

    def empty_input(self, G: Tensor) -> Tensor:
        """Return room for the input's cotangents, 0 where no window comes."""
        covered = all(
            size % w == 0 for size, w in zip(self.input_shape[-2:], self.window, strict=True)
        )
        make = G.new_empty if covered else G.new_zeros
        return make(*G.shape[:2], *self.input_shape)


@dataclass(frozen=True)
class MaxPooling(Window):
    """Max pooling without overlap, times the slope of an activation before it.

    By strided writes: torch's own ways over the same numbers (broadcasting, unpooling)
    took two to fifteen times as long on the CPU.

    Attributes
    ----------
    slopes : Tensor of shape (n_samples, window height * width, n_channels, height, width)
        For each place in the window, 0 where another place holds the maximum, else the
        slope; height and width are the output's.
    """

    slopes: Tensor
    TENSOR = "slopes"
    PER_SAMPLE = True

    def __call__(self, G: Tensor) -> Tensor:
        """Return each cotangent at the place where the maximum was."""
        spread = self.empty_input(G)
        for place, rows, columns in self.places():
            torch.mul(G, self.slopes[:, place].unsqueeze(1), out=spread[..., rows, columns])
        return spread

    def by_cotangent(self, D: Tensor) -> Tensor:
        """Return D from where the maximum was."""
        total: Tensor | None = None
        for place, rows, columns in self.places():
            slope = self.slopes[:, place].unsqueeze(1)
            part = D[..., rows, columns]
            total = part * slope if total is None else total.addcmul_(part, slope)
        assert total is not None
        return total

    def by_tensor(self, G: Tensor, D: Tensor) -> Tensor:
        """Return G∘D at each place, summed over rows."""
        places = [(G * D[..., rows, columns]).sum(1) for _, rows, columns in self.places()]
        return torch.stack(places, 1)


@dataclass(frozen=True)
class AveragePooling(Window):
    """Average pooling without overlap."""

    def __call__(self, G: Tensor) -> Tensor:
        """Return each cotangent spread evenly over its window."""
        spread, even = self.empty_input(G), G / math.prod(self.window)
        for _, rows, columns in self.places():
            spread[..., rows, columns] = even
        return spread

    def by_cotangent(self, D: Tensor) -> Tensor:
        """Return the mean of D over each window."""
        places = [D[..., rows, columns] for _, rows, columns in self.places()]
        return torch.stack(places).mean(0)


@dataclass(frozen=True)
class Convolution(Map):
    """Convolution: G through the transposed convolution.

    Attributes
    ----------
    weight : Tensor of shape (n_out, n_in / groups, *kernel)
    stride, padding, dilation : tuple of int
    groups : int
    """

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    TENSOR = "weight"

    def __call__(self, G: Tensor) -> Tensor:
        """Return G through the transposed convolution."""
        flat = G.flatten(0, 1)
        n_out, n_in = self.weight.shape[:2]
        if n_out >= NARROW * n_in and self._is_plain(G):
            X = torch.cat([self._from_patches(flat[part]) for part in self._parts(flat)])
        else:
            X = self._gradient(flat, flat.new_empty(1).expand(len(flat), *self.input_shape), 0)
        return X.reshape(*G.shape[:2], *self.input_shape)

    def _is_plain(self, G: Tensor) -> bool:
        """Tell whether this is a convolution of images, step by step, on the CPU."""
        steps = {*self.stride, *self.dilation, self.groups}
        return len(self.stride) == 2 and steps == {1} and not G.is_cuda

    def _parts(self, G: Tensor) -> list[slice]:
        """Return the cotangents that make patches at a time; of none there is one empty part."""
        step = max(1, PATCHES_AT_ONCE // max(1, self.weight[0].numel() * G[:1, 0].numel()))
        return [slice(start, start + step) for start in range(0, max(1, len(G)), step)]

    def _from_patches(self, G: Tensor) -> Tensor:
        """Return the transposed convolution as the sum of each cotangent's patch, k by k."""
        n_out, n_in, *kernel = self.weight.shape
        by_place = self.weight.permute(2, 3, 1, 0).reshape(-1, n_out)
        height, width = G.shape[-2:]
        # `@` would join the cotangents to one product, whose copies take five times as long.
        patches = torch.bmm(by_place.expand(len(G), -1, -1), G.flatten(2))
        patches = patches.reshape(-1, *kernel, n_in, height, width)
        rows = G.new_zeros(len(G), kernel[0], n_in, height, width + kernel[1] - 1)
        for j in range(kernel[1]):
            rows[..., j : j + width] += patches[:, :, j]
        X = G.new_zeros(len(G), n_in, height + kernel[0] - 1, rows.shape[-1])
        for i in range(kernel[0]):
            X[..., i : i + height, :] += rows[:, i]
        top, left = self.padding
        return X[..., top : top + self.input_shape[-2], left : left + self.input_shape[-1]]

    def by_cotangent(self, D: Tensor) -> Tensor:
        """Return the convolution of D."""
        convolve = CONVOLVE[len(self.stride)]
        settings = (self.stride, self.padding, self.dilation, self.groups)
        flat = convolve(D.flatten(0, 1), self.weight, None, *settings)
        return flat.reshape(*D.shape[:2], *flat.shape[1:])

    def by_tensor(self, G: Tensor, D: Tensor) -> Tensor:
        """Return the gradient of ⟨G, convolution of D⟩ by the weight."""
        G, D = G.flatten(0, 1), D.flatten(0, 1)
        if self.weight.shape[1] == 1 and self._is_plain(G):
            total = torch.zeros_like(self.weight)
            for part in self._parts(G):
                total += self._by_windows(G[part], D[part])
            return total
        return self._gradient(G, D, 1)

    def _by_windows(self, G: Tensor, D: Tensor) -> Tensor:
        """Return the gradient by the weight as a product of G and all windows of D."""
        (top, left), (height, width) = self.padding, G.shape[-2:]
        D = F.pad(D, (left, left, top, top)).contiguous()
        n_samples, *kernel = (len(D), *self.weight.shape[1:])
        sample, channel, row, column = D.stride()
        windows = D.as_strided(
            (n_samples, *kernel, height, width), (sample, channel, row, column, row, column)
        ).reshape(n_samples, -1, height * width)
        by_sample = torch.bmm(G.flatten(2), windows.transpose(1, 2))
        return by_sample.sum(0).reshape(self.weight.shape)

    def _gradient(self, G: Tensor, X: Tensor, wanted: int) -> Tensor:
        """Return the gradient of ⟨G, convolution of X⟩, by X for 0 and the weight for 1."""
        gradients = torch.ops.aten.convolution_backward(
            *(G, X, self.weight, None, self.stride, self.padding, self.dilation),
            *(False, [0] * len(self.stride), self.groups),
            [wanted == 0, wanted == 1, False],
        )
        gradient: Tensor = gradients[wanted]
        return gradient
