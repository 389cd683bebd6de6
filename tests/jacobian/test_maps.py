import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from skjacobian.jacobian._maps import (
    CONVOLVE,
    AveragePooling,
    ChannelScale,
    Convolution,
    Dense,
    Diagonal,
    Map,
    MaxPooling,
    Reshape,
)

DOUBLE = torch.float64
N, ROWS = 4, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def dense(*input_shape, n_out=3):
    W = random(n_out, input_shape[-1])
    return Dense(input_shape, W), F.linear


def diagonal(*shape):
    return Diagonal(shape, random(N, *shape)), torch.mul


def channel_scale(*shape):
    def layer(X, scale):
        return X * scale.reshape(-1, *[1] * (X.ndim - 2))

    return ChannelScale(shape, random(shape[0])), layer


def reshape(input_shape, output_shape):
    return Reshape(input_shape, output_shape), lambda X: X.reshape(-1, *output_shape)


def max_pooling(window, *shape):
    height, width = shape[1] // window[0], shape[2] // window[1]
    place = torch.randint(
        math.prod(window), (N, shape[0], height, width), generator=torch.Generator().manual_seed(1)
    )
    chosen = F.one_hot(place, math.prod(window)).movedim(-1, 1)
    slopes = chosen * random(N, 1, shape[0], height, width)

    def layer(X, slopes):
        windows = F.unfold(X, window, stride=window).reshape(N, shape[0], -1, height, width)
        return (windows * slopes.transpose(1, 2)).sum(2)

    return MaxPooling(shape, window, slopes), layer


def average_pooling(window, *shape):
    return AveragePooling(shape, window), lambda X: F.avg_pool2d(X, window)


def convolution(shape, n_out, kernel, stride=1, padding=0, dilation=1, groups=1):
    dims = len(kernel)

    def full(value):
        return (value,) * dims if isinstance(value, int) else value

    settings = full(stride), full(padding), full(dilation), groups
    weight = random(n_out, shape[0] // groups, *kernel)
    return (
        Convolution(shape, weight, *settings),
        lambda X, weight: CONVOLVE[dims](X, weight, None, *settings),
    )


MAPS = {
    "dense": lambda: dense(5),
    "dense to one": lambda: dense(5, n_out=1),
    "dense from one": lambda: dense(1),
    "dense along the last axis": lambda: dense(2, 3, 5),
    "diagonal": lambda: diagonal(5),
    "diagonal of images": lambda: diagonal(2, 4, 3),
    "channel scale": lambda: channel_scale(5),
    "channel scale of sequences": lambda: channel_scale(3, 5),
    "channel scale of images": lambda: channel_scale(3, 4, 2),
    "channel scale of volumes": lambda: channel_scale(3, 2, 4, 2),
    "flattening": lambda: reshape((2, 3, 4), (24,)),
    "unflattening": lambda: reshape((24,), (2, 3, 4)),
    "max pooling": lambda: max_pooling((2, 2), 3, 4, 6),
    "max pooling that leaves a rest": lambda: max_pooling((2, 3), 3, 5, 7),
    "max pooling along one axis": lambda: max_pooling((1, 3), 2, 4, 6),
    "max pooling of single pixels": lambda: max_pooling((1, 1), 2, 3, 4),
    "max pooling of all": lambda: max_pooling((3, 4), 2, 3, 4),
    "average pooling": lambda: average_pooling((2, 2), 3, 4, 6),
    "average pooling that leaves a rest": lambda: average_pooling((2, 3), 3, 5, 7),
    "average pooling of single pixels": lambda: average_pooling((1, 1), 3, 5, 7),
    "conv1d": lambda: convolution((2, 7), 3, (3,)),
    "conv1d, all settings": lambda: convolution((4, 9), 2, (3,), 2, 2, 2, 2),
    "conv2d": lambda: convolution((2, 6, 5), 3, (3, 3)),
    "conv2d, padding": lambda: convolution((2, 6, 5), 3, (3, 2), padding=(1, 0)),
    "conv2d, padding beyond the kernel": lambda: convolution((2, 3, 3), 3, (2, 2), padding=3),
    "conv2d, dilation": lambda: convolution((2, 6, 7), 3, (3, 2), padding=2, dilation=(2, 3)),
    "conv2d, stride": lambda: convolution((2, 6, 7), 3, (3, 2), stride=2, padding=1),
    "conv2d, columns unused": lambda: convolution((2, 6, 7), 3, (2, 2), stride=4),
    "conv2d, groups": lambda: convolution((4, 5, 5), 6, (3, 3), groups=2),
    "conv2d, depthwise": lambda: convolution((3, 5, 5), 6, (3, 3), padding=1, groups=3),
    "conv2d, many channels from one": lambda: convolution((1, 6, 5), 12, (3, 2)),
    "conv2d, many channels from two": lambda: convolution((2, 6, 5), 25, (3, 3), padding=(1, 2)),
    "conv2d, few channels from one": lambda: convolution((1, 6, 5), 3, (3, 2), padding=(1, 2)),
    "conv2d, many channels, kernel 1": lambda: convolution((1, 3, 4), 13, (1, 1)),
    "conv2d, many channels, padding beyond": lambda: convolution((1, 3, 4), 13, (2, 2), padding=3),
    "conv2d, many channels, stride": lambda: convolution((1, 6, 5), 12, (3, 2), stride=2),
    "conv2d, many channels, dilation": lambda: convolution((1, 6, 5), 12, (3, 2), dilation=2),
    "conv2d, one channel": lambda: convolution((1, 5, 5), 1, (1, 1)),
    "conv3d": lambda: convolution((2, 3, 4, 3), 3, (2, 2, 2)),
    "conv3d, all settings": lambda: convolution((2, 5, 4, 5), 4, (2, 3, 2), 2, 1, (2, 1, 1), 2),
}
every_map = pytest.mark.parametrize("name", MAPS)


def applied(layer, map_, X):
    """The layer at each row of X, shape (n_samples, n_rows, *features)."""
    tensors = [] if map_.tensor is None else [map_.tensor]
    return torch.stack([layer(x, *tensors) for x in X.unbind(1)], 1)


def operands(map_, layer, rows=ROWS):
    """Rows of cotangents of the output, and of tangents of the input."""
    D = random(N, rows, *map_.input_shape, seed=2)
    return random(*applied(layer, map_, D).shape, seed=3), D


def gradients_of_the_layer(map_, layer, G, D):
    """Gradients of ⟨G, layer(D)⟩ by D and by the tensor of the map."""
    D = D.clone().requires_grad_()
    tensor = None if map_.tensor is None else map_.tensor.clone().requires_grad_()
    rows = [layer(d) if tensor is None else layer(d, tensor) for d in D.unbind(1)]
    product = (G * torch.stack(rows, 1)).sum()
    by_D = torch.autograd.grad(product, D, retain_graph=True)[0]
    return by_D, None if tensor is None else torch.autograd.grad(product, tensor)[0]


def close(computed, expected):
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


def check(map_, layer, rows=ROWS):
    G, D = operands(map_, layer, rows)
    clean = G.clone(), D.clone()
    by_D, by_tensor = gradients_of_the_layer(map_, layer, G, D)
    close(map_(G), by_D)
    close(map_.by_cotangent(D.clone()), applied(layer, map_, D))
    if by_tensor is not None:
        close(map_.by_tensor(G, D), by_tensor)
        total = random(*by_tensor.shape, seed=4)
        close(map_.add_by_tensor(total.clone(), G, D), total + by_tensor)
    assert torch.equal(G, clean[0])
    assert torch.equal(D, clean[1])


@every_map
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_maps_are_the_derivatives_of_their_layers(name, rows):
    check(*MAPS[name](), rows)


@every_map
def test_by_cotangent_is_the_adjoint(name):
    map_, layer = MAPS[name]()
    G, D = operands(map_, layer)
    product = (map_(G) * D).sum()
    close((G * map_.by_cotangent(D.clone())).sum(), product)


@pytest.mark.parametrize("name", [name for name in MAPS if MAPS[name]()[0].TENSOR])
def test_by_tensor_is_the_gradient_of_the_product(name):
    map_, layer = MAPS[name]()
    G, D = operands(map_, layer)
    moved = random(*map_.tensor.shape, seed=5)
    # A map is linear in its tensor.
    at_moved = type(map_)(**{**vars(map_), map_.TENSOR: moved})
    close((map_.by_tensor(G, D) * moved).sum(), (at_moved(G) * D).sum())
    if not isinstance(map_, MaxPooling):  # writes into place, past autograd
        tensor = map_.tensor.clone().requires_grad_()
        differentiable = type(map_)(**{**vars(map_), map_.TENSOR: tensor})
        (gradient,) = torch.autograd.grad((differentiable(G) * D).sum(), tensor)
        close(map_.by_tensor(G, D), gradient)


@every_map
def test_the_tensor_of_a_map_is_left_alone(name):
    map_, layer = MAPS[name]()
    G, D = operands(map_, layer)
    before = None if map_.tensor is None else map_.tensor.clone()
    map_(G)
    map_.by_cotangent(D.clone())
    if before is not None:
        map_.by_tensor(G, D)
        assert torch.equal(map_.tensor, before)


@every_map
def test_cotangents_may_be_expanded(name):
    map_, layer = MAPS[name]()
    G, D = operands(map_, layer)
    expanded = G[:1].expand_as(G)
    close(map_(expanded), map_(expanded.clone()))
    if map_.tensor is not None:
        close(map_.by_tensor(expanded, D), map_.by_tensor(expanded.clone(), D))
    transposed = D.transpose(0, 1).contiguous().transpose(0, 1)
    close(map_.by_cotangent(transposed.clone()), map_.by_cotangent(D.clone()))


@every_map
@pytest.mark.parametrize("samples", [slice(1, 3), slice(3, 9), slice(0, 0)])
def test_a_part_of_a_map_is_the_map_at_those_samples(name, samples):
    map_, layer = MAPS[name]()
    G, D = operands(map_, layer)
    tensors = iter([] if map_.tensor is None else [map_.tensor])
    part = map_.part(samples, tensors)
    assert type(part) is type(map_)
    assert next(tensors, None) is None
    close(part(G[samples]), map_(G)[samples])
    close(part.by_cotangent(D[samples].clone()), map_.by_cotangent(D.clone())[samples])


@every_map
def test_a_part_takes_its_tensor_from_those_given(name):
    map_, _ = MAPS[name]()
    mine, other = random(*(1,) if map_.tensor is None else map_.tensor.shape), random(2)
    tensors = iter([mine, other])
    part = map_.part(slice(0, N), tensors)
    if map_.tensor is None:
        assert part.tensor is None
        assert next(tensors) is mine
    else:
        assert torch.equal(part.tensor, mine)
        assert next(tensors) is other


@every_map
@pytest.mark.parametrize("index", [[2], [3, 0], [1, 1, 2, 0, 3]])
def test_a_map_can_be_had_at_chosen_samples(name, index):
    map_, layer = MAPS[name]()
    G, _ = operands(map_, layer)
    index = torch.tensor(index)
    close(map_.at(index)(G[index]), map_(G)[index])


@every_map
def test_a_row_counts_the_numbers_of_its_input(name):
    map_, _ = MAPS[name]()
    expected = 0 if isinstance(map_, Reshape) else math.prod(map_.input_shape)
    assert map_.numbers_per_row() == expected


def test_every_kind_of_map_is_tested():
    def leaves(kind):
        return {kind}.union(*map(leaves, kind.__subclasses__()))

    tested = {type(make()[0]) for make in MAPS.values()}
    concrete = {kind for kind in leaves(Map) if "__call__" in vars(kind)} - {Map}
    assert tested == concrete


axis = st.tuples(
    st.integers(3, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2)
)


@given(
    axes=st.lists(axis, min_size=1, max_size=3),
    groups=st.integers(1, 2),
    n_in=st.integers(1, 2),
    n_out=st.sampled_from([1, 2, 25]),
)
@settings(deadline=None, max_examples=80)
def test_convolutions_of_any_settings_are_right(axes, groups, n_in, n_out):
    sizes, kernel, stride, padding, dilation = zip(*axes, strict=True)
    assume(all(s + 2 * p > d * (k - 1) for s, k, _, p, d in axes))
    check(
        *convolution(
            (groups * n_in, *sizes), groups * n_out, kernel, stride, padding, dilation, groups
        )
    )


@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
@settings(deadline=None, max_examples=40)
def test_pooling_by_any_window_is_right(size, window):
    assume(window[0] <= size[0] and window[1] <= size[1])
    check(*max_pooling(window, 2, *size))
    check(*average_pooling(window, 2, *size))
