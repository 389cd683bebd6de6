"""What `surrogate_gap` says of models, against closed forms and limits."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_iris, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from skjacobian import JacobianRegularizedClassifier, surrogate_gap
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.theory import TERMS, surrogate_terms

both_norms = pytest.mark.parametrize("norm", sorted(TERMS))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), norm=st.sampled_from(sorted(TERMS)), eps=st.floats(0.01, 3))
def test_of_a_linear_model_every_surrogate_without_probability_bounds_the_whole_increase(
    seed, norm, eps
):
    X, y = make_classification(60, 6, n_informative=4, n_classes=3, random_state=seed)
    model = LogisticRegression(C=10).fit(X, y)
    gap = surrogate_gap(model, X, y, norm=norm, eps=eps, n_steps=10)
    for name in list(TERMS[norm])[2:]:
        assert gap.exceeded[name] == 0


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def model(iris):
    return JacobianRegularizedClassifier(
        random_state=0, module__hidden_units=(16,), max_epochs=20
    ).fit(*iris)


@both_norms
def test_at_a_tiny_radius_the_increase_is_the_first_order_term(model, iris, norm):
    gap = surrogate_gap(model, *iris, norm=norm, eps=1e-3)
    assert gap.second_order_share == pytest.approx(0, abs=0.02)
    assert gap.ratios["first_order"] == pytest.approx(1, abs=0.02)
    assert list(gap.terms) == list(TERMS[norm])


@both_norms
def test_second_order_grows_with_the_radius(model, iris, norm):
    shares = [
        surrogate_gap(model, *iris, norm=norm, eps=eps).second_order_share
        for eps in (1e-3, 0.1, 0.5)
    ]
    assert shares == sorted(shares)
    assert shares[-1] > 0.1


@both_norms
def test_a_pipeline_is_measured_in_raw_units(iris, norm):
    X, y = iris
    scale = np.array([10.0, 0.1, 1.0, 3.0])
    model = make_pipeline(StandardScaler(), LogisticRegression())
    raw = surrogate_gap(model.fit(X * scale, y), X * scale, y, norm=norm, eps=0.01)
    step = model[0].scale_
    W = torch.from_numpy(model[-1].coef_ / step)
    logits = torch.from_numpy(model[-1].decision_function(model[0].transform(X * scale)))
    residual = logits.softmax(1) - nn.functional.one_hot(torch.from_numpy(y), 3)
    order = 2 if norm == "l2" else 1
    expected = 0.01 * np.linalg.norm((residual @ W).numpy(), order, axis=1)
    np.testing.assert_allclose(raw.terms["first_order"], expected, rtol=1e-6)


def test_terms_do_not_depend_on_the_size_of_batches(model, iris):
    whole = surrogate_gap(model, *iris, norm="l2", eps=0.1)
    parts = surrogate_gap(model, *iris, norm="l2", eps=0.1, batch_size=32)
    for name in whole.terms:
        np.testing.assert_allclose(whole.terms[name], parts.terms[name], rtol=1e-5)
    np.testing.assert_allclose(whole.increase, parts.increase, rtol=1e-4, atol=1e-6)


def test_the_squared_form_of_the_gap_is_that_of_the_chain(model, iris):
    X, y = iris
    gap = surrogate_gap(model, X, y, norm="l2", eps=0.1)
    terms = surrogate_terms(
        model.module_, torch.from_numpy(X), torch.from_numpy(y), norm="l2", eps=0.1
    )
    for name, term in terms.items():
        np.testing.assert_allclose(gap.terms[name], term.numpy(), rtol=1e-6)


def test_the_increase_is_never_negative_and_zero_at_radius_zero(model, iris):
    assert (surrogate_gap(model, *iris, eps=0.3).increase >= 0).all()
    nothing = surrogate_gap(model, *iris, eps=0.0)
    assert (nothing.increase == 0).all()
    assert math.isnan(nothing.second_order_share)
    assert "first_order" in str(nothing)


def test_bounds_hold_the_attack_and_more_restarts_find_no_less(model, iris):
    X, y = iris
    free = surrogate_gap(model, X, y, eps=1.0)
    held = surrogate_gap(model, X, y, eps=1.0, bounds=(X.min(), X.max()))
    assert held.increase.mean() <= free.increase.mean() + 1e-9
    more = surrogate_gap(model, X, y, eps=1.0, n_restarts=np.array(2))
    assert (more.increase >= free.increase).all()


def test_confident_networks_are_searched_too():
    X, y = make_classification(50, 5, random_state=0)
    model = LogisticRegression().fit(X, y)
    model.coef_, model.intercept_ = 1e4 * model.coef_, 1e4 * model.intercept_
    gap = surrogate_gap(model, X, y, norm="linf", eps=1.0)
    expected = np.abs(model.coef_).sum()
    right = model.predict(X) == y
    margins = np.abs(model.decision_function(X))
    increase = np.maximum(expected - margins, 0)[right]
    np.testing.assert_allclose(gap.increase[right], increase, rtol=1e-3, atol=1)


def test_labels_may_be_strings_and_unknown_ones_are_named(iris):
    X, y = iris
    names = load_iris().target_names[y]
    model = LogisticRegression(max_iter=1000).fit(X, names)
    gap = surrogate_gap(model, X, names, norm="l2", eps=0.1)
    numbers = surrogate_gap(LogisticRegression(max_iter=1000).fit(X, y), X, y, norm="l2", eps=0.1)
    np.testing.assert_allclose(gap.increase, numbers.increase, rtol=1e-6)
    with pytest.raises(ValueError, match=r"Got y=\['cat'\], but expected labels in classes_"):
        surrogate_gap(model, X, np.where(names == "setosa", "cat", names))


def test_the_table_names_every_term(model, iris):
    gap = surrogate_gap(model, *iris, norm="linf", eps=0.1)
    frame = gap.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert frame.index.tolist() == list(TERMS["linf"])
    assert frame.columns.tolist() == ["mean", "ratio", "exceeded"]
    assert all(name in str(gap) for name in TERMS["linf"])
    assert repr(gap).startswith("<SurrogateGap: loss ")
    np.testing.assert_allclose(gap.adversarial_loss, gap.loss + gap.increase)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"norm": "l1"}, "Got norm='l1', but expected one of 'l2', 'linf'"),
        ({"eps": -1}, "Got eps=-1, but expected a non-negative finite number"),
        ({"n_steps": 0}, "Got n_steps=0, but expected an integer of at least 1"),
        ({"n_restarts": 0}, "Got n_restarts=0, but expected an integer of at least 1"),
    ],
)
def test_bad_parameters_are_named(model, iris, parameters, message):
    with pytest.raises(ValueError, match=message):
        surrogate_gap(model, *iris, **parameters)


def test_a_model_without_gradients_is_refused(iris):
    with pytest.raises(NotDifferentiableError):
        surrogate_gap(DecisionTreeClassifier().fit(*iris), *iris)
