import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skjacobian.jacobian._dense_products import (
    gram_gradient,
    gram_product,
    masked_gradients,
    masked_product,
    symmetric_product,
)

DOUBLE = torch.float64
# Around the width from which on symmetric products are taken in blocks.
WIDTHS = [1, 2, 7, 64, 126, 127, 128, 129, 130, 131, 257]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def close(computed, expected):
    torch.testing.assert_close(computed, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n_rows", [1, 2, 30])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_symmetric_product_is_the_product(width, n_rows):
    A = random(n_rows, width)
    close(symmetric_product(A, A), A.T @ A)
    scaled = A * random(n_rows, 1, seed=1)
    product = symmetric_product(A, scaled)
    close(product, A.T @ scaled)
    close(product, product.T)
    # Of a transposed and of an expanded matrix, too.
    close(symmetric_product(A.T.contiguous().T, A), A.T @ A)
    same = A[:1].expand(n_rows, width)
    close(symmetric_product(same, same), same.T @ same)


@pytest.mark.parametrize("width", [5, 131])
def test_a_symmetric_product_of_no_rows_is_zero(width):
    A = random(0, width)
    assert torch.equal(symmetric_product(A, A), torch.zeros(width, width, dtype=DOUBLE))


@pytest.mark.parametrize("shape", [(6,), (3, 2)])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_gram_product_gives_the_squared_lengths_of_the_product(width, shape):
    A, W = random(*shape, width), random(width, 9, seed=1)
    AG = gram_product(A, W)
    close(AG, A @ W @ W.T)
    close((A * AG).sum(-1), (A @ W).square().sum(-1))


@pytest.mark.parametrize("weight", [random(4, seed=2), torch.full((4,), -0.7, dtype=DOUBLE)])
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_the_gram_form_are_those_of_autograd(width, weight):
    A = random(4, 3, width).requires_grad_()
    W = random(width, 9, seed=1).requires_grad_()
    of_samples = weight.reshape(-1, 1, 1)
    by_A, by_W = torch.autograd.grad((of_samples * (A @ W).square()).sum(), [A, W])
    A, W = A.detach(), W.detach()
    close(gram_gradient(A, weight, W), by_W)
    close(2 * of_samples * gram_product(A, W), by_A)


sizes = st.integers(1, 9)


@given(n_rows=sizes, n_samples=sizes, n_hidden=sizes, n_in=sizes)
@settings(deadline=None, max_examples=40)
def test_the_masked_product_and_its_gradients_are_those_of_autograd(
    n_rows, n_samples, n_hidden, n_in
):
    V, W = random(n_rows, n_hidden), random(n_hidden, n_in, seed=1)
    slope = random(n_samples, n_hidden, seed=2)
    slope = slope * (slope > -0.5)
    D = random(n_samples, n_rows, n_in, seed=3)
    V.requires_grad_()
    W.requires_grad_()
    expected = torch.einsum("ch,ih,hj->icj", V, slope, W)
    close(masked_product(V, slope, W), expected)
    by_V, by_W = torch.autograd.grad((expected * D).sum(), [V, W])
    computed = masked_gradients(V.detach(), slope, W.detach(), D)
    close(computed[0], by_V)
    close(computed[1], by_W)


def test_gradients_of_the_masked_product_match_differences():
    V, slope, W = random(3, 4), random(5, 4, seed=1), random(4, 2, seed=2)

    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, V, W):
            ctx.save_for_backward(V, W)
            return masked_product(V, slope, W)

        @staticmethod
        def backward(ctx, D):
            return masked_gradients(ctx.saved_tensors[0], slope, ctx.saved_tensors[1], D)

    assert torch.autograd.gradcheck(Masked.apply, (V.requires_grad_(), W.requires_grad_()))


def test_the_gradients_take_what_is_not_contiguous():
    V, slope, W = random(3, 4), random(5, 4, seed=1), random(4, 2, seed=2)
    D = random(5, 3, 2, seed=3)
    expected = masked_gradients(V, slope, W, D)
    turned = [M.T.contiguous().T for M in (V, slope, W)]
    for D_other in (D.transpose(1, 2).contiguous().transpose(1, 2), D.clone()):
        for one, other in zip(masked_gradients(*turned, D_other), expected, strict=True):
            close(one, other)
