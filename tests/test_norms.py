import numpy as np
import pytest
import torch

from skjacobian.norms import rows, unit_rows, vector_norm

DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


def rand(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2), ("linf", np.inf)])
def test_vector_norm_is_numpys_norm_of_the_flattened_row(norm, order, generator):
    X = rand((4, 2, 3), generator)
    expected = np.linalg.norm(X.numpy().reshape(4, -1), order, axis=1)
    np.testing.assert_allclose(vector_norm(X, norm), expected)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-13, 1e13, 1e30])
def test_l2_norms_are_exact_however_small_or_large(size, generator):
    X = rand((4, 3), generator, torch.float32) * size
    X[1] = 0
    expected = X.double().square().sum(1).sqrt().float()
    torch.testing.assert_close(vector_norm(X, "l2"), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_norms_of_what_is_infinite_or_no_number_are_so_too(norm):
    X = torch.tensor([[1.0, torch.inf], [-torch.inf, 0.0], [1.0, torch.nan], [3.0, 0.0]])
    lengths = vector_norm(X, norm)
    assert lengths[:2].isinf().all()
    assert lengths[2].isnan()
    assert lengths[3] == 3


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_dual_norms_satisfy_hoelders_inequality(norm, generator):
    u, g = rand((200, 5), generator), rand((200, 5), generator)
    bound = vector_norm(u, norm) * vector_norm(g, DUAL[norm])
    assert ((u * g).sum(1).abs() <= bound * (1 + 1e-12)).all()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30])
def test_unit_rows_have_length_one_however_small_or_large_they_were(size, generator):
    G = rand((5, 2, 3), generator, torch.float32) * size
    torch.testing.assert_close(vector_norm(unit_rows(G), "l2"), torch.ones(5))


def test_unit_rows_do_not_depend_on_the_rows_beside_them(generator):
    sizes = torch.tensor([[1e-42], [1e-13], [1e-12], [1.0], [1e11], [1e30], [0.0]])
    G = rand((7, 5), generator, torch.float32) * sizes
    alone = torch.cat([unit_rows(row) for row in G.split(1)])
    assert torch.equal(unit_rows(G), alone)


def test_a_zero_row_has_no_direction():
    assert torch.equal(unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_rows_broadcast_one_value_per_sample_and_leave_scalars_alone():
    assert rows(torch.ones(3), torch.ones(3, 2, 4)).shape == (3, 1, 1)
    assert rows(torch.tensor(1.0), torch.ones(3, 2)).shape == ()
