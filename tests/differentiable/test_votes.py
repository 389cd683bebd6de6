"""Votes of pairs of classes: margins against a count by hand, and what attacks make of them."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.multiclass import OneVsOneClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from skjacobian import RobustScorer, adversarial_distances
from skjacobian.attacks import PGD
from skjacobian.differentiable import as_torch
from skjacobian.differentiable._votes import Votes
from skjacobian.exceptions import AttackWarning
from tests.slow import others_slow


def decisions_of(n_classes, seed, n_samples=20):
    generator = torch.Generator().manual_seed(seed)
    n_pairs = n_classes * (n_classes - 1) // 2
    return torch.randn(n_samples, n_pairs, generator=generator, dtype=torch.float64)


def pairs_of(n_classes):
    return [(a, b) for a in range(n_classes) for b in range(a + 1, n_classes)]


def tallied(decisions, n_classes):
    """Votes and sums of confidences of each class, pair by pair."""
    votes, totals = np.zeros(n_classes), np.zeros(n_classes)
    for (a, b), decision in zip(pairs_of(n_classes), decisions, strict=True):
        votes[a if decision > 0 else b] += 1
        totals[a] += decision
        totals[b] -= decision
    return votes, totals


def changed(decisions, n_classes, k, c, t):
    """The decisions with all about `k` moved in its favour by t, and all about `c` against it."""
    moved = np.array(decisions)
    for i, (a, b) in enumerate(pairs_of(n_classes)):
        if k in (a, b):
            moved[i] += t if a == k else -t
        elif c in (a, b):
            moved[i] -= t if a == c else -t
    return moved


def is_ahead(decisions, n_classes, k, c):
    """Tell whether k is predicted rather than c, where ties go to the first class."""
    votes, _ = tallied(decisions, n_classes)
    return votes[k] > votes[c] or (votes[k] == votes[c] and k < c)


def first_of_most(decisions, n_classes):
    return int(tallied(decisions, n_classes)[0].argmax())


@given(n_classes=st.integers(3, 7), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_a_margin_is_the_least_change_of_the_decisions_that_changes_who_is_ahead(n_classes, seed):
    decisions = decisions_of(n_classes, seed, n_samples=3)
    predicted = torch.tensor([first_of_most(d, n_classes) for d in decisions.numpy()])
    logits = Votes(n_classes).margins(decisions, predicted, confidence=None)
    for d, c, row in zip(decisions.numpy(), predicted.tolist(), logits.tolist(), strict=True):
        assert row[c] == 0
        for k in range(n_classes):
            if k == c:
                continue
            t = -row[k]
            assert t > 0
            assert is_ahead(changed(d, n_classes, k, c, t * (1 + 1e-9)), n_classes, k, c)
            assert not is_ahead(changed(d, n_classes, k, c, t * (1 - 1e-9)), n_classes, k, c)


@given(n_classes=st.integers(3, 7), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_where_confidences_break_ties_a_class_is_level_first_and_then_leads(n_classes, seed):
    decisions = decisions_of(n_classes, seed, n_samples=3)
    votes = Votes(n_classes)
    predicted = votes.scores(decisions, decisions).argmax(1)
    logits = votes.margins(decisions, predicted, confidence=decisions)
    for d, c, row in zip(decisions.numpy(), predicted.tolist(), logits.tolist(), strict=True):
        assert max(row) == row[c] == 0
        for k in set(range(n_classes)) - {c}:
            lead = np.subtract(*tallied(d, n_classes)[1][[c, k]]) / (2 * (n_classes - 1))
            level, ahead = -row[k] * (1 - 1e-9), -row[k] * (1 + 1e-9)
            before, _ = tallied(changed(d, n_classes, k, c, level), n_classes)
            after, _ = tallied(changed(d, n_classes, k, c, ahead), n_classes)
            assert after[k] > after[c] or (after[k] == after[c] and ahead > lead)
            assert before[k] < before[c] or (before[k] == before[c] and level < lead)


@pytest.mark.parametrize("n_classes", [3, 5])
def test_the_gradient_of_a_margin_is_an_average_over_decisions_in_favour_of_the_class(n_classes):
    decisions = decisions_of(n_classes, 0).requires_grad_()
    predicted = torch.tensor([first_of_most(d, n_classes) for d in decisions.detach().numpy()])
    votes = Votes(n_classes)
    logits = votes.margins(decisions, predicted, confidence=None)
    for k in range(n_classes):
        (slope,) = torch.autograd.grad(logits[:, k].sum(), decisions, retain_graph=True)
        for row, c in zip(slope, predicted.tolist(), strict=True):
            if k == c:
                assert not row.any()
                continue
            # In favour of k all decisions move by one: so does the margin.
            direction = changed(np.zeros(len(row)), n_classes, k, c, 1.0)
            assert (row.numpy() * direction >= 0).all()
            assert row.numpy() @ direction == pytest.approx(1)


def test_close_to_the_boundary_the_gradient_is_that_of_the_deciding_pair():
    # 0 beats 1 by a hair and 2 by far; 1 beats 2: one decision stands between 0 and 1.
    decisions = torch.tensor([[1e-6, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    logits = Votes(3).margins(decisions, torch.tensor([0]), confidence=None)
    assert logits[0, 1].item() == pytest.approx(-1e-6)
    (slope,) = torch.autograd.grad(logits[0, 1], decisions)
    torch.testing.assert_close(slope, torch.tensor([[-1.0, 0.0, 0.0]], dtype=torch.float64))


def test_decisions_of_any_size_give_finite_margins_and_gradients():
    rows = [[0.0, 0.0, 0.0], [1e-320, 1.0, -1.0], [1e300, 1e-300, 0.0], [1e-300, -1e300, 2.0]]
    values = torch.tensor(rows, dtype=torch.float64)
    for confidence in (None, values):
        decisions = values.clone().requires_grad_()
        votes = Votes(3)
        predicted = votes.count(decisions).argmax(1)
        if confidence is not None:
            predicted = votes.scores(decisions, decisions).argmax(1)
        logits = votes.margins(decisions, predicted, confidence)
        assert logits.isfinite().all()
        np.testing.assert_array_equal(logits.argmax(1), predicted)
        (slope,) = torch.autograd.grad(logits.sum(), decisions)
        assert slope.isfinite().all()


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_class_ruled_out_leaves_margins_and_scores_finite():
    """Its probability is 0, so the decisions about it are infinite."""
    X, y = load_wine(return_X_y=True)
    model = OneVsOneClassifier(GaussianNB(priors=[1.0, 0.0])).fit(X, y)
    view, values = as_torch(model), torch.from_numpy(X)
    logits = view(values)
    assert logits.isfinite().all()
    np.testing.assert_array_equal(model.classes_[logits.argmax(1)], model.predict(X))
    np.testing.assert_allclose(view.decision_function(values), model.decision_function(X))


@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_of_two_classes_vote_and_confidence_count_though_they_disagree(threshold):
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    inner = FixedThresholdClassifier(LinearSVC(random_state=0), threshold=threshold)
    model = OneVsOneClassifier(inner).fit(X, y)
    logits = as_torch(model)(torch.from_numpy(X))
    np.testing.assert_array_equal(model.classes_[logits.argmax(1)], model.predict(X))


X, y = load_digits(return_X_y=True)
CLASSIFIERS = {
    "linear": (SVC(kernel="linear"), {"linf": 0.22, "l2": 1.2}),
    "rbf": (SVC(), {"linf": 0.36, "l2": 1.9}),
    "breaking ties": (SVC(break_ties=True), {"linf": 0.36, "l2": 1.9}),
    "regressions": (OneVsOneClassifier(LogisticRegression()), {"linf": 0.28, "l2": 1.5}),
}


@pytest.mark.parametrize(
    ("name", "norm"),
    others_slow(
        itertools.product(CLASSIFIERS, ["linf", "l2"]),
        [("linear", "l2"), ("breaking ties", "linf")],
    ),
)
def test_one_attack_finds_nearly_all_that_attacks_towards_every_class_find(name, norm):
    """Followed through its votes, a machine looked up to ten points more robust than it is."""
    classifier, radii = CLASSIFIERS[name]
    model = make_pipeline(StandardScaler(), classifier).fit(X, y)
    chosen = slice(0, 50)
    threat = {"norm": norm, "feature_scale": "std"}

    def under(attack):
        scorer = RobustScorer(eps=radii[norm], attack=attack, **threat)
        return scorer(model, X[chosen], y[chosen])

    everything = under(PGD(n_targets=9, n_restarts=2))
    assert 0.3 < everything < 0.8
    assert under("pgd") <= everything + 0.06
    distances = adversarial_distances(model, X[chosen], y[chosen], **threat)
    assert (distances > radii[norm]).mean() <= everything + 0.04


@pytest.mark.parametrize(
    ("data", "base"),
    [(load_digits, SVC()), (load_breast_cancer, LinearSVC(random_state=0))],
    ids=["digits", "breast cancer"],
)
def test_an_isotonic_calibration_hides_no_gradient(data, base):
    """Most samples are on plateaus, where its own gradient is 0."""
    X, y = data(return_X_y=True)
    calibrated = CalibratedClassifierCV(base, method="isotonic", cv=2, ensemble=False)
    model = make_pipeline(StandardScaler(), calibrated).fit(X, y)
    machine = make_pipeline(StandardScaler(), base).fit(X, y)
    scorer = RobustScorer(eps=0.6, feature_scale="std")
    chosen = slice(0, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        seen = scorer(model, X[chosen], y[chosen])
    # Calibration moves the boundary, not by much: what it calibrates is no less robust.
    assert seen <= scorer(machine, X[chosen], y[chosen]) + 0.25


def test_a_gaussian_process_for_each_pair_is_followed_through_its_votes_too():
    few = np.arange(120)
    model = GaussianProcessClassifier(optimizer=None, multi_class="one_vs_one")
    model.fit(X[few] / 16, y[few])
    view = as_torch(model)
    values = torch.from_numpy(X[200:230] / 16).requires_grad_()
    logits = view(values)
    np.testing.assert_array_equal(model.classes_[logits.argmax(1)], model.predict(values.detach()))
    (slope,) = torch.autograd.grad(logits.topk(2).values[:, 1].sum(), values)
    assert (slope.abs().amax(1) > 1e-4).all()
