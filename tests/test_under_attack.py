"""A classifier under attack: batches change nothing, containers and times are kept."""

import copy
import itertools
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_digits, load_iris, make_moons
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import CategoricalNB
from sklearn.neighbors import KNeighborsClassifier, RadiusNeighborsClassifier
from torch import nn

from skjacobian import (
    JacobianRegularizedClassifier,
    RobustScorer,
    evaluate_robustness,
    robustness_curve,
    surrogate_gap,
)
from skjacobian._under_attack import UnderAttack, are_many
from skjacobian._validation import check_count_or_auto
from skjacobian.attacks import PGD, Cascade, RayS, Square
from skjacobian.attacks._named import check_threat_model_is_unset
from skjacobian.attacks.cascade import PLANS
from skjacobian.differentiable import as_torch
from skjacobian.exceptions import AttackWarning

pytestmark = pytest.mark.usefixtures("short_stages")

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(50, 3))
W = np.array([[1.0, -1.0, 0.5], [-0.5, 1.0, 0.0], [0.0, 0.2, -1.0]])
y = (X @ W.T).argmax(1)
EVERYONE = np.arange(50)


class Net(ClassifierMixin, BaseEstimator):
    def __init__(self, module=None):
        self.module = module
        self.classes_ = np.array(["a", "b", "c"])

    def fit(self, X, y):
        return self

    def predict(self, X):
        with torch.no_grad():
            return self.classes_[self.module(torch.as_tensor(np.array(X))).argmax(1).numpy()]


@as_torch.register
def _(model: Net):
    return model.module


class Plane(nn.Module):
    """The linear scores of `W`, and what comes of them."""

    def __init__(self, after=lambda scores: scores):
        super().__init__()
        self.W = nn.Parameter(torch.from_numpy(W))
        self.after = after
        self.sizes = []

    def forward(self, X):
        self.sizes.append(len(X))
        return self.after(X.to(self.W) @ self.W.T)


NAMES = np.array(["a", "b", "c"])[y]


def subject_of(module=None, X=X, y=NAMES, needs="labels", **params):
    return UnderAttack(Net(module or Plane()), X, y, needs=needs, **params)


def arrays(perturbed):
    found = perturbed.found
    tensors = (found.fooled, found.n_queries, found.no_gradient)
    return [tensor.tolist() for tensor in tensors] + [perturbed.right.tolist()]


# --- batches ------------------------------------------------------------------------------


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("batch_size", [12, 36, 1000])
@pytest.mark.parametrize("attack", [PGD(n_steps=5, eps=0.1), Cascade(eps=0.1)], ids=str)
def test_batches_are_joined_in_the_order_of_the_samples(attack, batch_size):
    index = RNG.permutation(50)[:37]
    whole = subject_of(batch_size=50).perturb(attack, index)
    batched = subject_of(batch_size=batch_size).perturb(attack, index)
    assert arrays(batched) == arrays(whole)
    np.testing.assert_allclose(batched.X_adv, whole.X_adv, atol=1e-12)
    assert 0 < whole.found.fooled.sum() < 37
    for ours, theirs in zip(batched.found.stages, whole.found.stages, strict=True):
        assert (ours.name, ours.complete) == (theirs.name, theirs.complete)
        assert ours.fooled.tolist() == theirs.fooled.tolist()
        assert ours.n_queries.tolist() == theirs.n_queries.tolist()


def test_no_batch_is_larger_than_asked_for():
    module = Plane()
    subject_of(module, batch_size=8).perturb(PGD(n_steps=3, eps=0.1), EVERYONE)
    assert max(module.sizes[:-1]) == 8  # the last is that of predict


@pytest.mark.parametrize(
    ("n_features", "wanted"), [(1, 1024), (2**12, 256), (2**20, 64)], ids=["few", "some", "many"]
)
def test_automatic_batches_hold_about_as_many_numbers(n_features, wanted):
    model = KNeighborsClassifier(1).fit(np.zeros((2, n_features)), [0, 1])
    subject = UnderAttack(model, np.zeros((2, n_features)), [0, 1], needs="labels")
    assert subject.batch_size == wanted


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "big", [8], np.nan])
def test_a_bad_batch_size_is_named(value):
    match = "Got batch_size=.*, but expected an integer of at least 1 or 'auto'"
    with pytest.raises(ValueError, match=match):
        check_count_or_auto("batch_size", value)
    with pytest.raises(ValueError, match=match):
        subject_of(batch_size=value)


@pytest.mark.parametrize(("value", "wanted"), [("auto", None), (3, 3), (np.int64(4), 4)])
def test_a_good_batch_size_is_a_number_or_automatic(value, wanted):
    assert check_count_or_auto("batch_size", value) == wanted


# --- kinds of output ----------------------------------------------------------------------


def sharp(scores):
    """Probabilities of which many are 0 or 1."""
    return (50 * scores).softmax(1).round(decimals=2)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_sure_probabilities_are_attacked_as_probabilities_in_every_batch(batch_size):
    subject = subject_of(Plane(sharp), batch_size=batch_size)
    sure = (subject.view(subject.X_tensor) == 1).any(1)
    assert 10 < sure.sum() < 50
    chosen = np.concatenate([np.flatnonzero(sure)[:3], np.flatnonzero(~sure)[:1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = subject.perturb(Cascade(eps=0.1), chosen).found
    names = [stage.name for stage in found.stages]
    assert names[:2] == ["clean", "PGD"]
    assert "RayS" not in names
    assert found.complete


@pytest.mark.parametrize("as_module", [True, False])
def test_the_view_of_probabilities_is_their_logarithm(as_module, monkeypatch):
    subject = subject_of(Plane(lambda scores: scores.softmax(1)))
    if not as_module:
        module = subject.view
        monkeypatch.setattr(subject, "view", lambda X: module(X))
    seen = subject.logits_view(subject.X_tensor)
    np.testing.assert_allclose(seen.exp().detach(), subject.view(subject.X_tensor).detach())
    assert (seen <= 0).all()


@pytest.mark.parametrize("after", [lambda s: s, lambda s: (s == s.amax(1, keepdim=True)).double()])
def test_logits_and_decisions_are_viewed_as_they_are(after):
    subject = subject_of(Plane(after))
    assert subject.logits_view is subject.view


# --- containers and ends ------------------------------------------------------------------


@pytest.mark.parametrize("frame", [False, True])
@pytest.mark.parametrize("model", ["net", "neighbors"])
def test_no_samples_are_perturbed_to_no_samples(frame, model):
    values = pd.DataFrame(X, columns=list("uvw")) if frame else X
    if model == "net":
        subject = subject_of(X=values)
    else:
        subject = UnderAttack(KNeighborsClassifier().fit(values, y), values, y, needs="labels")
    perturbed = subject.perturb(Cascade(eps=0.1), np.zeros(0, dtype=int))
    assert perturbed.X_adv.shape == (0, 3)
    assert isinstance(perturbed.X_adv, type(values))
    assert arrays(perturbed) == [[], [], [], []]
    assert perturbed.found.stages == ()


def test_all_samples_come_back_with_those_perturbed_in_their_place():
    frame = pd.DataFrame(X, columns=list("uvw"), index=np.arange(50) + 100)
    subject = subject_of(X=frame)
    index = np.array([3, 7])
    perturbed = subject.perturb(PGD(eps=0.1, n_steps=3), index)
    everything = subject.with_rows(index, perturbed.found.X_adv)
    pd.testing.assert_frame_equal(everything.drop(index=[103, 107]), frame.drop(index=[103, 107]))
    pd.testing.assert_frame_equal(everything.loc[[103, 107]], perturbed.X_adv)
    assert (everything.loc[[103, 107]] != frame.loc[[103, 107]]).any(axis=None)
    pd.testing.assert_frame_equal(subject.rows(index), frame.iloc[index])


def test_the_time_of_an_attack_is_shared_among_the_batches(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-3 * next(ticks))  # asked at each query
    slow = Cascade(eps=0.1, time_limit=0.4)
    model = KNeighborsClassifier(3).fit(X, NAMES)
    long = PLANS["scores in boxes"][0]._replace(attack=Square(n_queries=10**6))
    monkeypatch.setitem(PLANS, "scores in boxes", (long,))
    subject = UnderAttack(model, X, NAMES, needs="labels", batch_size=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        perturbed = subject.perturb(slow, EVERYONE)
    assert 0.4 <= perturbed.seconds < 0.5
    assert not perturbed.found.complete
    queries = perturbed.found.n_queries.reshape(5, 10).amax(1)
    assert queries.min() > 0.8 * queries.max()


def test_progress_is_printed_for_each_batch(capsys):
    subject_of(batch_size=20, verbose=True).perturb(PGD(eps=0.1, n_steps=3), EVERYONE)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" samples")[0] for line in lines] == [
        f"[PGD, linf eps=0.1] {n} of 50" for n in (20, 40, 50)
    ]


# --- checks -------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [PGD(n_steps=3), Square(n_queries=7), RayS(), Cascade()])
def test_an_attack_that_only_says_how_it_searches_is_accepted(attack):
    check_threat_model_is_unset(attack, "Owner")


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm", "l2"), ("eps", 0.2), ("bounds", (0, 1)), ("feature_scale", "std"), ("mutable", [0])],
)
@pytest.mark.parametrize("cls", [PGD, Square, Cascade])
def test_a_threat_model_in_the_attack_is_named_with_its_owner(cls, name, value):
    match = rf"Got attack={cls.__name__}\(.*its {name} to be left alone.*Set Owner\({name}=\.\.\.\)"
    with pytest.raises(ValueError, match=match):
        check_threat_model_is_unset(cls(**{name: value}), "Owner")


@pytest.mark.parametrize(("missing", "kind"), [("predict", BaseEstimator), ("classes_", nn.Module)])
def test_what_is_no_classifier_is_named(missing, kind):
    class Part(kind):
        pass

    part = Part()
    if missing == "classes_":
        part.predict = lambda X: X
    with pytest.raises(TypeError, match=rf"type Part without {missing}, but expected a fitted"):
        UnderAttack(part, X, y, needs="gradients")


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_trained_module_is_attacked_as_the_classifier_that_it_comes_from(dtype):
    X, y = (values[::3] for values in load_iris(return_X_y=True))
    X = X.astype(dtype)
    model = JacobianRegularizedClassifier(random_state=0, max_epochs=20).fit(X, y)
    module = copy.deepcopy(model.module_).train()
    threat_model = {"norm": "l2", "eps": 0.4}
    assert RobustScorer(**threat_model)(module, X, y) == RobustScorer(**threat_model)(model, X, y)
    reports = [evaluate_robustness(m, X, y, **threat_model) for m in (module, model)]
    assert reports[0].robust_accuracy == reports[1].robust_accuracy
    assert reports[0].estimator_name == type(module).__name__
    of_module, of_model = (robustness_curve(m, X, y, n_steps=5)[1] for m in (module, model))
    np.testing.assert_array_equal(of_module, of_model)
    gap = surrogate_gap(module, X, y, eps=0.1)
    assert gap.loss.mean() == pytest.approx(surrogate_gap(model, X, y, eps=0.1).loss.mean())
    assert module.training


def test_a_module_takes_tensors_without_a_warning():
    X, y = torch.rand(6, 3), torch.tensor([0, 1] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        RobustScorer(eps=0.0)(nn.Linear(3, 2), X, y)


def test_a_network_on_a_device_that_is_not_supported_is_rejected():
    # "meta" stands for what this machine may lack: "mps", "xpu".
    with pytest.raises(ValueError, match="on 'meta', but expected one on 'cpu' or 'cuda'"):
        subject_of(nn.Linear(2, 2, device="meta"))


class Relabelled(ClassifierMixin, BaseEstimator):
    """A logistic regression with its classes in another order, or a threshold of its own."""

    def __init__(self, order=(0, 1, 2), threshold=None):
        self.order, self.threshold = order, threshold

    def fit(self, X, y):
        self.model_ = LogisticRegression(C=10, max_iter=1000).fit(X, y)
        self.classes_ = self.model_.classes_[list(self.order)]
        return self

    def predict_proba(self, X):
        return self.model_.predict_proba(X)[:, list(self.order)]

    def predict(self, X):
        if self.threshold is None:
            return self.model_.predict(X)
        return (self.predict_proba(X)[:, 1] > self.threshold).astype(int)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_classes_may_stand_in_any_order(order):
    X, y = load_iris(return_X_y=True)
    scorer = RobustScorer(norm="l2", eps=0.5, attack=Square(n_queries=300))
    expected, found = (scorer(Relabelled(o).fit(X, y), X, y) for o in ((0, 1, 2), order))
    assert found == pytest.approx(expected, abs=0.02)
    assert found < 0.9


def test_a_black_box_with_a_threshold_of_its_own_is_attacked_where_it_decides():
    X, y = load_iris(return_X_y=True)
    X, y = X[50:], y[50:] - 1
    model = Relabelled((0, 1), threshold=0.02).fit(X, y)
    labels = model.predict(X)
    w, b = model.model_.coef_[0], model.model_.intercept_[0]
    distance = np.abs(X @ w + b - np.log(0.02 / 0.98)) / np.linalg.norm(w)
    with pytest.warns(AttackWarning, match="weak attack"):
        report = evaluate_robustness(model, X, labels, norm="l2", eps=0.3)
    assert report.view == "black box, predict"
    assert report.robust_accuracy == pytest.approx((distance > 0.3).mean(), abs=0.02)


@pytest.mark.filterwarnings("ignore:The model does not depend on X")
def test_categories_that_a_model_has_not_seen_end_its_domain():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 4, (120, 3))
    y = ((X[:, 0] > 1) ^ (X[:, 1] > 1)).astype(int)
    X = pd.DataFrame(X, columns=list("abc"))
    model = CategoricalNB().fit(X, y)
    unsaid, said = (
        RobustScorer(eps=1, attack="strong", bounds=bounds)(model, X, y)
        for bounds in (None, (0, 3))
    )
    assert unsaid == said


class Staircase(nn.Module):
    """Logits rounded, with a gradient that leads nowhere."""

    def forward(self, logits):
        return (4 * logits).round().detach() / 4 + 1e-9 * logits.sin()


def test_a_scorer_says_where_square_fooled_what_gradients_did_not():
    X, y = load_iris(return_X_y=True)
    model = JacobianRegularizedClassifier(random_state=0, max_epochs=20).fit(X, y)
    masked = nn.Sequential(model.module_, Staircase())
    with pytest.warns(AttackWarning, match=r"Square fooled \d+ of \d+ samples after all gradients"):
        RobustScorer(eps=0.3, attack="strong")(masked, X, y)


def test_a_module_has_a_logit_for_each_class():
    X, y = load_iris(return_X_y=True)
    with pytest.raises(ValueError, match="Got a module of type Linear with 1 output, but expected"):
        RobustScorer()(nn.Linear(4, 1), X, y)


@pytest.mark.parametrize("measure", [RobustScorer(), robustness_curve, evaluate_robustness])
def test_a_wrong_number_of_features_is_said_as_scikit_learn_says_it(measure):
    X, y = load_iris(return_X_y=True)
    model = JacobianRegularizedClassifier(max_epochs=1, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match=r"X has 2 features, but .* is expecting 4 features"):
        measure(model, X[:, :2], y)


def test_a_neighbour_classifier_that_refuses_far_points_is_attacked_where_it_does_not():
    X, y = make_moons(200, noise=0.2, random_state=0)
    model = RadiusNeighborsClassifier(0.3).fit(X, y)
    with pytest.raises(ValueError, match="No neighbors found"):
        model.predict(X + 5)
    mixed = torch.from_numpy(np.concatenate([X[:3], X[:2] + 5]))
    view = UnderAttack(model, X, y, needs="labels").view
    assert view(mixed).isnan().all(1).tolist() == [False] * 3 + [True] * 2
    X, y = X[:50], y[:50]
    near, far = (
        RobustScorer(eps=eps, attack=Square(n_queries=30))(model, X, y) for eps in (0.02, 0.5)
    )
    assert far < near


def test_a_logit_that_is_infinite_is_a_decision():
    class Rule(nn.Module):  # over 1 always the second class
        def forward(self, X):
            z = X[:, 0].where(X[:, 0] < 1, torch.inf)
            return torch.stack([2 + 0 * X[:, 1], z], 1)

    X = np.random.default_rng(0).uniform(-1, 0.9, (100, 2))
    y = np.zeros(100, dtype=int)
    for attack in ("pgd", "strong"):
        assert RobustScorer(eps=2.0, attack=attack)(Rule(), X, y) == 0.0
    _, accuracy = robustness_curve(Rule(), X, y, eps=[0.5])
    assert accuracy[0] == pytest.approx((X[:, 0] < 0.5).mean(), abs=0.02)


@pytest.mark.parametrize(
    ("norm", "eps", "dtype"),
    [("linf", 0.05, torch.bfloat16), ("l2", 0.3, torch.float16), ("l1", 1.0, torch.bfloat16)],
)
def test_the_curve_of_a_module_of_half_precision_is_near_its_score(norm, eps, dtype):
    X, y = load_digits(return_X_y=True)
    X = X / 16
    linear = LogisticRegression(max_iter=500).fit(X[300:], y[300:])
    module = nn.Linear(64, 10)
    module.weight.data = torch.tensor(linear.coef_)
    module.bias.data = torch.tensor(linear.intercept_ + 20)
    module.to(dtype)
    X, y = X[:150], y[:150]
    score = RobustScorer(norm=norm, eps=eps)(module, X, y)
    curve = robustness_curve(module, X, y, norm=norm, eps=[eps])[1][0]
    assert curve <= score + 0.08  # it was up to 0.30 above


def test_labels_that_a_module_cannot_predict_are_named():
    module = nn.Linear(X.shape[1], 2).double()
    with pytest.raises(ValueError, match=r"y with labels \[2, 3\], but expected .*Linear, 0 to 1"):
        UnderAttack(module, X[:4], [0, 1, 2, 3], needs="gradients")


def test_samples_that_a_module_does_not_take_are_named():
    module = nn.Linear(X.shape[1] + 1, 2)
    with pytest.raises(ValueError, match=r"X with samples of shape \(\d+,\), but expected those"):
        UnderAttack(module, X, y, needs="gradients")


def test_a_module_without_parameters_takes_the_type_of_its_buffers():
    module = nn.Module()
    module.register_buffer("prototypes", torch.randn(2, X.shape[1]))
    module.forward = lambda values: -torch.cdist(values, module.prototypes)
    subject = UnderAttack(module, X.astype(np.float64), y % 2, needs="gradients")
    assert subject.view(subject.X_tensor).dtype == torch.float32


@pytest.mark.parametrize(
    ("n", "share", "n_samples", "expected"),
    [(1, 0.01, 10, False), (2, 0.01, 10, True), (2, 0.01, 200, False), (3, 0.01, 200, True)],
)
def test_one_sample_is_an_accident_and_more_than_a_share_are_many(n, share, n_samples, expected):
    assert are_many(n, share, n_samples) is expected
