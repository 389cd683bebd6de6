"""The chain of surrogates is ordered for every network, sample and radius, in float64."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skjacobian.jacobian import jacobian_norm
from skjacobian.losses import cross_entropy
from skjacobian.theory import (
    ORDER,
    TERMS,
    columns,
    entrywise,
    first_order_l2,
    first_order_linf,
    frobenius,
    optimal_tau,
    squared_frobenius,
    surrogate_terms,
    wrong_probability,
)

both_norms = pytest.mark.parametrize("norm", sorted(TERMS))

# Of norms below it the squares vanish in float64.
TINY = 1e-150

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.Softplus)


def random_problem(seed, n_classes, n_features, scale, n_samples=12):
    """A random network in float64, of logits from tiny to huge, with samples and labels."""
    torch.manual_seed(seed)
    rng = np.random.RandomState(seed)
    widths = [n_features, *rng.randint(1, 12, size=rng.randint(0, 3)), n_classes]
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), ACTIVATIONS[rng.randint(len(ACTIVATIONS))]()]
    network = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    X = torch.randn(n_samples, n_features, dtype=torch.float64)
    return network, X, torch.randint(n_classes, (n_samples,))


def assert_ordered(terms, norm):
    # p - e_y, and so the first order, is known to 1e-16 of 1 only; squares may underflow.
    rounding = 1e-14 * list(terms.values())[2] + TINY
    for lower, upper in ORDER[norm]:
        slack = 1e-9 * terms[upper] + rounding
        assert bool((terms[lower] <= terms[upper] + slack).all()), (lower, upper)


problems = st.builds(
    random_problem,
    seed=st.integers(0, 2**31 - 1),
    n_classes=st.integers(2, 10),
    n_features=st.integers(1, 8),
    scale=st.sampled_from([0.1, 1.0, 5.0, 50.0]),
)


@settings(deadline=None, max_examples=100)
@given(problem=problems, eps=st.floats(0, 100), norm=st.sampled_from(sorted(TERMS)))
def test_the_chain_is_ordered_for_every_network_sample_and_radius(problem, eps, norm):
    assert_ordered(surrogate_terms(*problem, norm=norm, eps=eps), norm)


@both_norms
def test_the_chain_is_ordered_with_a_radius_for_each_sample(norm):
    problem = random_problem(0, 4, 5, 1.0)
    eps = torch.linspace(0, 2, len(problem[1]), dtype=torch.float64)
    terms = surrogate_terms(*problem, norm=norm, eps=eps)
    assert_ordered(terms, norm)
    assert all(float(term[0]) == 0 for term in terms.values())


@both_norms
def test_the_chain_is_ordered_on_the_digits_sized_network_in_float32(norm):
    network, X, y = random_problem(3, 10, 64, 1.0, n_samples=50)
    terms = surrogate_terms(network.float(), X.float(), y, norm=norm, eps=0.1)
    for lower, upper in ORDER[norm]:
        assert bool((terms[lower] <= terms[upper] * (1 + 1e-5)).all())


@settings(deadline=None, max_examples=50)
@given(problem=problems)
def test_the_columns_norm_is_at_most_the_entrywise_one_and_the_terms_have_no_order(problem):
    network, X, y = problem
    by_columns, by_entries = columns(network, X, y, 1.0), entrywise(network, X, y, 1.0)
    assert bool((by_columns <= math.sqrt(2) * by_entries * (1 + 1e-12) + TINY).all())
    n_classes = network(X).shape[1]
    most = math.sqrt(n_classes / 2) * by_columns
    assert bool((by_entries <= most * (1 + 1e-12) + TINY).all())


def test_either_of_columns_and_entrywise_may_be_the_smaller():
    X, y = torch.zeros(1, 1).double(), torch.tensor([0])
    one_row = torch.tensor([[1.0], [0.0]]).double()
    equal_rows = torch.ones(3, 1).double()
    for W, columns_is_smaller in ((one_row, False), (equal_rows, True)):

        def predict_logits(X, W=W):
            return X @ W.T

        smaller = columns(predict_logits, X, y, 1.0) < entrywise(predict_logits, X, y, 1.0)
        assert bool(smaller) is columns_is_smaller


@settings(deadline=None, max_examples=25)
@given(problem=problems, eps=st.floats(0, 10))
def test_first_order_terms_are_the_largest_first_order_increase(problem, eps):
    network, X, y = problem
    X = X.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(network(X), y).sum(), X)
    gradient = gradient.flatten(1)
    torch.testing.assert_close(first_order_l2(network, X, y, eps), eps * gradient.norm(dim=1))
    torch.testing.assert_close(
        first_order_linf(network, X, y, eps), eps * gradient.abs().sum(dim=1)
    )


def test_the_squared_form_is_tight_at_the_optimal_tau():
    network, X, y = random_problem(1, 3, 4, 1.0)
    one = X[:1].expand(5, -1)
    same_y = y[:1].expand(5)
    torch.testing.assert_close(
        squared_frobenius(network, one, same_y, 0.3), frobenius(network, one, same_y, 0.3)
    )
    best = optimal_tau(jacobian_norm(network, X, y, norm="l2"))
    means = [
        float(squared_frobenius(network, X, y, 0.3, tau=factor * best).mean())
        for factor in (1.0, 0.5, 0.9, 1.1, 2.0)
    ]
    assert means[0] == min(means)
    assert means[0] == pytest.approx(float(squared_frobenius(network, X, y, 0.3).mean()))


def test_the_optimal_tau_weighs_by_the_radius_of_each_sample():
    network, X, y = random_problem(1, 3, 4, 1.0)
    eps = torch.linspace(0, 2, len(X), dtype=X.dtype) ** 2
    best = optimal_tau(jacobian_norm(network, X, y, norm="l2"), eps)
    means = [
        float(squared_frobenius(network, X, y, eps, tau=factor * best).mean())
        for factor in (1.0, 0.5, 0.9, 1.1, 2.0)
    ]
    assert means[0] == min(means)
    assert means[0] == pytest.approx(float(squared_frobenius(network, X, y, eps).mean()))
    assert float(squared_frobenius(network, X, y, 0 * eps).sum()) == 0.0


def test_where_a_float32_network_is_sure_the_chain_still_holds():
    W, sure = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([17.0, 0.0])
    X, y = torch.zeros(1, 2), torch.tensor([0])
    terms = surrogate_terms(lambda X: X @ W.T + sure, X, y, norm="linf", eps=1.0)
    wrong = 1 / (1 + math.exp(17))
    assert float(terms["first_order"]) == pytest.approx(wrong, rel=1e-6)
    assert float(terms["weighted_cross_lipschitz"]) == pytest.approx(wrong, rel=1e-6)


@both_norms
def test_all_terms_are_those_of_the_network_in_eval_mode(norm):
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    X, y = torch.randn(20, 6), torch.arange(20) % 3
    statistics = copy.deepcopy(net.state_dict())
    training = {name: term(net, X, y, 0.1) for name, term in TERMS[norm].items()}
    assert net.training
    torch.testing.assert_close(net.state_dict(), statistics, rtol=0, atol=0)
    torch.testing.assert_close(training, surrogate_terms(net.eval(), X, y, norm=norm, eps=0.1))


def test_the_wrong_probability_is_exact_where_it_is_tiny():
    logits = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
    wrong = wrong_probability(lambda X: logits, torch.zeros(1, 1), torch.tensor([0]))
    assert float(wrong) == pytest.approx(2 * math.exp(-60), rel=1e-12)
