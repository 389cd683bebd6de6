"""as_torch of classifiers made of other classifiers computes what they compute."""

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_classification
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_selection import RFE, SelectKBest
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score, make_scorer
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    TunedThresholdClassifierCV,
)
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier, OutputCodeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import SelfTrainingClassifier
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from skjacobian import JacobianRegularizedClassifier
from skjacobian._table import Table
from skjacobian.differentiable import as_torch, black_box
from skjacobian.differentiable._calibration import Interpolation
from skjacobian.exceptions import NotDifferentiableError

X, y = make_classification(90, 6, n_informative=4, n_classes=3, random_state=0)
LABELS = np.array(["ash", "beech", "oak"])[y]
BINARY = np.where(LABELS == "oak", "oak", "ash")
# Some values past the range of the training data, where isotonic regressions are constant.
SPREAD = X.mean(0) + 1.7 * (X - X.mean(0))
SMOOTH = X.mean(0) + 0.37 * (X[:4] - X.mean(0))


def logistic(**params):
    return LogisticRegression(**params)


def network():
    return JacobianRegularizedClassifier(
        module__hidden_units=(8,), max_epochs=2, random_state=0, dtype="float64"
    )


def scaled(classifier):
    return make_pipeline(StandardScaler(), classifier)


def some():
    return [
        ("logistic", logistic()),
        ("pipeline", scaled(GaussianNB())),
        ("weak", logistic(C=100.0)),
        ("strong", logistic(C=0.01)),
    ]


CALIBRATED = {
    f"{method}, {name}, ensemble={ensemble}": CalibratedClassifierCV(
        base, method=method, cv=2, ensemble=ensemble
    )
    for method in ("sigmoid", "isotonic", "temperature")
    for name, base in {
        "decision": LinearSVC(),
        "probabilities": GaussianNB(),
        "pipeline": scaled(logistic()),
    }.items()
    for ensemble in (True, False)
}

OF_ANY_NUMBER_OF_CLASSES = {
    **CALIBRATED,
    "calibrated by default": CalibratedClassifierCV(cv=2),
    "calibrated network": CalibratedClassifierCV(network(), cv=2),
    "voting": VotingClassifier(some(), voting="soft"),
    "voting with weights": VotingClassifier(some(), voting="soft", weights=[3, 1, 0, 0.5]),
    "voting without one": VotingClassifier(some(), voting="soft", weights=[3, 1, 2, 5]).set_params(
        pipeline="drop"
    ),
    "bagging": BaggingClassifier(logistic(), 3, random_state=0),
    "bagging features": BaggingClassifier(GaussianNB(), 3, max_features=0.5, random_state=0),
    "bagging repeated features": BaggingClassifier(
        scaled(logistic()), 3, bootstrap_features=True, random_state=0
    ),
    "stacking": StackingClassifier(some(), cv=2),
    "stacking decisions": StackingClassifier(
        [("svc", LinearSVC()), ("pipeline", scaled(logistic()))],
        final_estimator=GaussianNB(),
        stack_method="decision_function",
        cv=2,
    ),
    "stacking mixed": StackingClassifier(
        [("svc", LinearSVC()), ("nb", GaussianNB())], final_estimator=LinearSVC(), cv=2
    ),
    "stacking passing X": StackingClassifier(some(), passthrough=True, cv=2),
    "stacking without one": StackingClassifier(some(), cv=2).set_params(logistic="drop"),
    "stacking fitted": StackingClassifier(
        [("first", logistic().fit(X, LABELS)), ("second", LinearSVC().fit(X, LABELS))],
        cv="prefit",
    ),
    "one against rest": OneVsRestClassifier(logistic()),
    "one against rest by decision": OneVsRestClassifier(LinearSVC()),
    "one against rest by probability": OneVsRestClassifier(GaussianNB()),
    "one against one": OneVsOneClassifier(LinearSVC()),
    "one against one by probability": OneVsOneClassifier(GaussianNB()),
    "search": GridSearchCV(
        VotingClassifier(some()[:2], voting="soft"), {"weights": [[1, 2], [2, 1]]}, cv=2
    ),
    "in a pipeline": scaled(CalibratedClassifierCV(LinearSVC(), cv=2)),
    "of themselves": VotingClassifier(
        [
            ("calibrated", CalibratedClassifierCV(LinearSVC(), cv=2)),
            ("bagging", BaggingClassifier(logistic(), 2, random_state=0)),
            ("stacking", StackingClassifier([("svc", LinearSVC())], cv=2)),
            ("rest", OneVsRestClassifier(logistic())),
        ],
        voting="soft",
    ),
}


@pytest.mark.parametrize("labels", [LABELS, BINARY], ids=["three classes", "two classes"])
@pytest.mark.parametrize("name", OF_ANY_NUMBER_OF_CLASSES)
def test_the_view_is_the_classifier(assert_classifier_view, name, labels):
    assert_classifier_view(OF_ANY_NUMBER_OF_CLASSES[name].fit(X, labels), SPREAD, SMOOTH)


@pytest.mark.parametrize("labels", [LABELS, BINARY], ids=["three classes", "two classes"])
@pytest.mark.parametrize("base", [LinearSVC(), GaussianNB()], ids=["decision", "probabilities"])
@pytest.mark.parametrize("method", ["sigmoid", "isotonic", "temperature"])
def test_the_view_of_a_calibrated_frozen_classifier(assert_classifier_view, method, base, labels):
    frozen = FrozenEstimator(base.fit(X[:50], labels[:50]))
    classifier = CalibratedClassifierCV(frozen, method=method).fit(X[50:], labels[50:])
    assert_classifier_view(classifier, SPREAD, SMOOTH)


@pytest.mark.parametrize("known", [LABELS, BINARY], ids=["three of four", "two of four"])
@pytest.mark.parametrize("base", [LinearSVC(), GaussianNB()], ids=["decision", "probabilities"])
@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_a_calibrated_classifier_may_know_fewer_classes(
    assert_classifier_view, method, base, known
):
    labels = np.where(X[:, 0] > 1, "beta", LABELS)
    frozen = FrozenEstimator(base.fit(X, known))
    classifier = CalibratedClassifierCV(frozen, method=method, ensemble=True, cv=2)
    assert_classifier_view(classifier.fit(X, labels), SPREAD, SMOOTH)


def partly_unlabeled(labels):
    numbers = np.unique(labels, return_inverse=True)[1]
    return np.where(np.arange(len(X)) % 3 == 0, -1, numbers)


@pytest.mark.parametrize("labels", [LABELS, BINARY], ids=["three classes", "two classes"])
def test_the_view_of_a_self_trained_classifier_is_that_of_the_classifier_it_trained(
    assert_classifier_view, labels
):
    classifier = SelfTrainingClassifier(logistic()).fit(X, partly_unlabeled(labels))
    assert_classifier_view(classifier, SPREAD, SMOOTH)


FOR_OAK = make_scorer(f1_score, pos_label="oak")
FOR_ASH = make_scorer(f1_score, pos_label="ash")


def fixed(classifier, threshold, pos_label=None, response_method="auto"):
    return FixedThresholdClassifier(
        classifier, threshold=threshold, pos_label=pos_label, response_method=response_method
    )


def tuned(classifier, **params):
    return TunedThresholdClassifierCV(classifier, thresholds=9, cv=2, **params)


THRESHOLDS = {
    "automatic": FixedThresholdClassifier(logistic()),
    "automatic of decisions": FixedThresholdClassifier(LinearSVC()),
    "of decisions": fixed(logistic(), 0.4, "oak", "decision_function"),
    "of probabilities": fixed(logistic(), 0.3, "oak"),
    "for the first class": fixed(scaled(logistic()), 0.8, "ash"),
    "of decisions for the first class": fixed(LinearSVC(), 0.2, "ash"),
    "always": fixed(logistic(), 0.0),
    "never": fixed(GaussianNB(), 1.5, "ash"),
    "tuned": tuned(logistic()),
    "tuned on decisions": tuned(LinearSVC()),
    "tuned for one class": tuned(logistic(), scoring=FOR_OAK),
    "tuned for the first class": tuned(logistic(), scoring=FOR_ASH),
    "tuned network": tuned(network()),
    "in an ensemble": VotingClassifier(
        [("tuned", tuned(logistic())), ("nb", GaussianNB())], voting="soft"
    ),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_logits_of_a_classifier_with_a_threshold_follow_it(assert_classifier_view, name):
    assert_classifier_view(THRESHOLDS[name].fit(X, BINARY), SPREAD, SMOOTH)


@pytest.mark.parametrize("pos_label", ["ash", "oak"])
def test_a_score_at_the_threshold_is_positive(pos_label):
    # Samples at 0 have probability ½ exactly, and decision 0.
    classifier = logistic(fit_intercept=False).fit(X - X.mean(0), BINARY)
    at_zero = np.zeros((2, 6))
    for method in ("predict_proba", "decision_function"):
        fixed = FixedThresholdClassifier(
            FrozenEstimator(classifier), pos_label=pos_label, response_method=method
        ).fit(X, BINARY)
        logits = as_torch(fixed)(torch.from_numpy(at_zero)).detach()
        assert (fixed.predict(at_zero) == pos_label).all()
        assert (fixed.classes_[logits.argmax(1)] == pos_label).all()


@pytest.mark.parametrize("voting", [{}, {"weights": [1, 2]}])
def test_softmax_of_the_logits_of_averaged_probabilities_is_predict_proba(voting):
    classifier = VotingClassifier(some()[:2], voting="soft", **voting).fit(X, LABELS)
    logits = as_torch(classifier)(torch.from_numpy(SPREAD)).detach()
    np.testing.assert_allclose(logits.softmax(1), classifier.predict_proba(SPREAD), atol=1e-10)


@pytest.mark.parametrize(
    "classifier",
    [
        VotingClassifier([("a", logistic()), ("b", GaussianNB())], voting="soft"),
        BaggingClassifier(logistic(), 3, random_state=0),
        CalibratedClassifierCV(logistic(), cv=2),
        CalibratedClassifierCV(logistic(), cv=2, method="temperature"),
        FixedThresholdClassifier(logistic(), threshold=0.2),
        OneVsRestClassifier(logistic()),
    ],
    ids=lambda classifier: type(classifier).__name__,
)
def test_the_gradient_survives_probabilities_of_zero_and_one(classifier):
    view = as_torch(classifier.fit(X, BINARY))
    far = torch.from_numpy(60 * X)
    # Where the members of an ensemble are sure of different classes, there is no gradient.
    sure = view.predict_proba(far).amin(1) < 1e-15
    assert sure.sum() > 20
    far = far[sure].requires_grad_()
    logits = view(far)
    wrong = 1 - logits.argmax(1)
    torch.nn.functional.cross_entropy(logits, wrong, reduction="sum").backward()
    assert far.grad.isfinite().all()
    assert (far.grad.abs().sum(1) > 0.01).all()


def test_bagged_classifiers_may_know_fewer_classes():
    # Too few samples for all classes; KNN would not say so, hence weights are not supported.
    few = np.r_[np.flatnonzero(y == 0)[:9], np.flatnonzero(y == 1)[:9], np.flatnonzero(y == 2)[:1]]
    bagging = BaggingClassifier(Unweighted(), 6, random_state=3).fit(X[few], LABELS[few])
    assert {len(part.classes_) for part in bagging.estimators_} == {2, 3}
    logits = as_torch(bagging)(torch.from_numpy(SPREAD)).detach()
    np.testing.assert_allclose(logits.softmax(1), bagging.predict_proba(SPREAD), atol=1e-10)


class Unweighted(ClassifierMixin, BaseEstimator):
    """A classifier that bagging cannot give weights of 0."""

    def fit(self, X, y):
        self.inner_ = logistic().fit(X, y)
        self.classes_ = self.inner_.classes_
        return self

    def predict_proba(self, X):
        return self.inner_.predict_proba(X)

    def predict(self, X):
        return self.inner_.predict(X)


@as_torch.register
def _(classifier: Unweighted):
    return as_torch(classifier.inner_)


class Registered(Unweighted):
    pass


class Softplus(nn.Module):
    """A module that is not a view."""

    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, X):
        return self.view(X)


@as_torch.register
def _(classifier: Registered):
    return Softplus(as_torch(classifier.inner_))


@pytest.mark.parametrize(
    "classifier",
    [
        VotingClassifier([("own", Registered())], voting="soft"),
        scaled(Registered()),
        CalibratedClassifierCV(scaled(Registered()), cv=2),
    ],
    ids=["voting", "pipeline", "calibrated"],
)
def test_a_module_that_a_user_registered_may_be_a_part(assert_classifier_view, classifier):
    assert_classifier_view(classifier.fit(X, LABELS), SPREAD, SMOOTH)


@pytest.mark.parametrize(
    "classifier",
    [
        CalibratedClassifierCV(network(), cv=2),
        CalibratedClassifierCV(network(), method="isotonic", cv=2),
        OneVsOneClassifier(network()),
        StackingClassifier([("net", network())], LogisticRegression(), cv=2),
    ],
)
def test_the_arrays_of_a_view_are_where_its_network_is(classifier, monkeypatch):
    classifier.fit(X, y)
    module_of = JacobianRegularizedClassifier.module_.fget
    elsewhere = property(lambda net: module_of(net).to("meta"))
    monkeypatch.setattr(JacobianRegularizedClassifier, "module_", elsewhere)
    view = as_torch(classifier)
    assert {array.device.type for array in view.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("ensemble", [True, False])
def test_isotonic_calibration_on_float32_data(ensemble):
    classifier = CalibratedClassifierCV(
        LinearSVC(), method="isotonic", cv=2, ensemble=ensemble
    ).fit(X.astype(np.float32), LABELS)
    seen = as_torch(classifier).predict_proba(torch.from_numpy(SPREAD))
    np.testing.assert_allclose(seen, classifier.predict_proba(SPREAD), atol=1e-5)


def test_a_class_with_one_isotonic_value_is_constant():
    # One sample of the second class: isotonic regression may see one value only.
    constant = np.zeros((8, 1))
    classifier = CalibratedClassifierCV(
        FrozenEstimator(logistic().fit(X[:, :1], BINARY)), method="isotonic", cv=2
    ).fit(constant, ["ash", "oak"] * 4)
    seen = as_torch(classifier).predict_proba(torch.from_numpy(X[:, :1]))
    np.testing.assert_allclose(seen, classifier.predict_proba(X[:, :1]), atol=1e-12)


def test_an_isotonic_regression_of_infinite_scores_is_that_of_the_last_ones():
    regression = IsotonicRegression(out_of_bounds="clip").fit([0.0, 1e-6, 2e-6], [0.0, 0.5, 1.0])
    scores = torch.tensor([np.inf, -np.inf, 1e300], dtype=torch.float64)
    assert Interpolation(regression)(scores).tolist() == [1.0, 0.0, 1.0]


def test_ties_of_isotonic_plateaus_go_to_the_first_class():
    classifier = CalibratedClassifierCV(logistic(), method="isotonic", cv=5).fit(X, BINARY)
    values = np.random.default_rng(0).normal(size=(2000, 6))
    logits = as_torch(classifier)(torch.from_numpy(values)).detach()
    np.testing.assert_array_equal(classifier.classes_[logits.argmax(1)], classifier.predict(values))


def test_probabilities_of_several_classes_that_are_rounded_to_0_go_to_the_first():
    labels = np.where(X[:, 0] > 1, "beta", LABELS)
    classifier = OneVsRestClassifier(GaussianNB()).fit(X, labels)
    view, far = as_torch(classifier), torch.from_numpy(60 * SPREAD).requires_grad_()
    logits = view(far)
    assert (view.predict_proba(far).sum(1) == 0).any()
    np.testing.assert_array_equal(
        classifier.classes_[logits.argmax(1)], classifier.predict(far.detach().numpy())
    )
    logits.sum().backward()
    assert far.grad.isfinite().all()
    assert (far.grad.abs().sum(1) > 0).all()


def test_probabilities_that_do_not_sum_to_1_are_averaged_as_they_are():
    voting = VotingClassifier(
        [("rest", OneVsRestClassifier(GaussianNB())), ("logistic", logistic())], voting="soft"
    ).fit(X, np.where(X[:, 0] > 1, "beta", LABELS))
    wanted = voting.predict_proba(60 * SPREAD)
    assert np.isclose(wanted.sum(1), 0.5).any()
    seen = as_torch(voting).predict_proba(torch.from_numpy(60 * SPREAD))
    np.testing.assert_allclose(seen, wanted, atol=1e-10)


def test_rows_of_zeros_keep_gradients_finite_and_are_calibrated_as_when_alone():
    labels = np.where(X[:, 0] > 1, "beta", LABELS)
    calibrated = CalibratedClassifierCV(
        OneVsRestClassifier(GaussianNB()), method="temperature", cv=2
    ).fit(X, labels)
    far = torch.from_numpy(60 * SPREAD).requires_grad_()
    P = as_torch(calibrated).predict_proba(far)
    alone = [calibrated.predict_proba(sample[None])[0] for sample in 60 * SPREAD]
    np.testing.assert_allclose(P.detach(), alone, atol=1e-10)
    P[:, 0].sum().backward()
    assert far.grad.isfinite().all()


def test_an_ensemble_of_classifiers_without_probabilities_has_none():
    for classifier in (
        OneVsRestClassifier(LinearSVC()),
        GridSearchCV(LinearSVC(), {"C": [0.1, 1]}, cv=2),
        FrozenEstimator(LinearSVC().fit(X, y)),
        scaled(LinearSVC()),
        StackingClassifier([("nb", GaussianNB())], LinearSVC(), cv=2),
    ):
        assert not as_torch(classifier.fit(X, y)).has_proba


TREE = DecisionTreeClassifier(max_depth=1)

ERRORS = {
    "hard votes": (
        VotingClassifier(some()[:2]),
        r"Got VotingClassifier\(voting='hard'\), but expected voting='soft': the labels that it "
        "counts have no gradient",
    ),
    "negative weights": (
        VotingClassifier(some()[:2], voting="soft", weights=[2, -1]),
        r"Got VotingClassifier\(weights=\[2, -1\]\), but expected weights of at least 0",
    ),
    "voting": (
        VotingClassifier([("nb", GaussianNB()), ("tree", TREE)], voting="soft"),
        "In estimator 'tree' of the VotingClassifier: Got an estimator of type DecisionTree",
    ),
    "nested": (
        VotingClassifier([("pipe", scaled(BaggingClassifier(TREE, 2)))], voting="soft"),
        "In estimator 'pipe' of the VotingClassifier: In step 'baggingclassifier' of the "
        "pipeline: In the estimator of the BaggingClassifier: Got an estimator of type Decision",
    ),
    "bagged votes": (
        BaggingClassifier(LinearSVC(), 2),
        "In the estimator of the BaggingClassifier: Got LinearSVC, but expected a classifier "
        "with a predict_proba that is differentiable: votes are not",
    ),
    "calibration": (
        CalibratedClassifierCV(KNeighborsClassifier(), cv=2),
        "In the estimator of the CalibratedClassifierCV: .* type KNeighborsClassifier",
    ),
    "stacking": (
        StackingClassifier([("tree", TREE)], cv=2),
        "In estimator 'tree' of the StackingClassifier: .* type DecisionTreeClassifier",
    ),
    "stacked labels": (
        StackingClassifier([("nb", GaussianNB())], stack_method="predict", cv=2),
        "In estimator 'nb' of the StackingClassifier: Got stack_method 'predict', but expected "
        "'predict_proba' or 'decision_function': labels have no gradient",
    ),
    "final estimator": (
        StackingClassifier([("nb", GaussianNB())], TREE, cv=2),
        "In the final estimator of the StackingClassifier: .* type DecisionTreeClassifier",
    ),
    "one against rest": (
        OneVsRestClassifier(TREE),
        "In the estimator of the OneVsRestClassifier: .* type DecisionTreeClassifier",
    ),
    "regressor": (
        OneVsRestClassifier(Ridge()),
        "In the estimator of the OneVsRestClassifier: .* type Ridge",
    ),
    "one against one": (
        OneVsOneClassifier(TREE),
        "In the estimator of the OneVsOneClassifier: .* type DecisionTreeClassifier",
    ),
    "boosting": (AdaBoostClassifier(logistic(), n_estimators=2), "type AdaBoostClassifier"),
    "output codes": (OutputCodeClassifier(logistic()), "type OutputCodeClassifier"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_has_no_gradient_is_rejected_and_named(name):
    classifier, match = ERRORS[name]
    with pytest.raises(NotDifferentiableError, match=match):
        as_torch(classifier.fit(X, y))


@pytest.mark.parametrize(
    ("classifier", "match"),
    [
        (FixedThresholdClassifier(TREE), "In the estimator of the FixedThresholdClassifier: "),
        (tuned(TREE), "In the estimator of the TunedThresholdClassifierCV"),
    ],
)
def test_a_threshold_on_what_has_no_view_is_rejected(classifier, match):
    with pytest.raises(NotDifferentiableError, match=match):
        as_torch(classifier.fit(X, BINARY))


def test_a_positive_label_that_is_no_class_is_rejected():
    # Ensembles encode the labels, and do not call `predict`, which would fail.
    voting = VotingClassifier([("fixed", fixed(logistic(), 0.5, "oak"))], voting="soft")
    with pytest.raises(
        NotDifferentiableError,
        match=r"Got FixedThresholdClassifier with pos_label 'oak', but expected one of \[0, 1\]",
    ):
        as_torch(voting.fit(X, BINARY))


def test_self_training_of_what_has_no_view_is_rejected():
    classifier = SelfTrainingClassifier(TREE).fit(X, partly_unlabeled(LABELS))
    with pytest.raises(
        NotDifferentiableError, match="In the estimator of the SelfTrainingClassifier: "
    ):
        as_torch(classifier)


@pytest.mark.parametrize(
    "classifier",
    [
        OneVsRestClassifier(logistic()),
        StackingClassifier([("knn", KNeighborsClassifier())], KNeighborsClassifier(), cv=2),
    ],
    ids=["one against rest", "stacking"],
)
def test_several_labels_of_each_sample_are_rejected(classifier):
    several = np.column_stack([y == 0, y < 2]).astype(int)
    with pytest.raises(
        NotDifferentiableError, match="fitted on several labels of each sample, but expected one"
    ):
        as_torch(classifier.fit(X, several))


def test_one_against_rest_of_one_class_is_rejected():
    with pytest.warns(UserWarning, match="Label"):
        classifier = OneVsRestClassifier(logistic()).fit(X, np.zeros(len(X)))
    with pytest.raises(NotDifferentiableError, match="fitted on 1 class, but expected at least 2"):
        as_torch(classifier)


def test_a_number_of_bagged_classifiers_that_changed_after_fit_is_rejected():
    bagging = BaggingClassifier(logistic(), 3).fit(X, y).set_params(n_estimators=2)
    with pytest.raises(
        NotDifferentiableError,
        match=r"Got BaggingClassifier\(n_estimators=2\) that was fitted with 3",
    ):
        as_torch(bagging)


# --- black boxes with a threshold ---------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda model: model, scaled], ids=["alone", "in a pipeline"])
@pytest.mark.parametrize("positive", ["ash", "oak"])
@pytest.mark.parametrize("inside", [TREE, KNeighborsClassifier(5)], ids=str)
def test_a_black_box_knows_the_threshold(inside, positive, wrap):
    for threshold in (0.0, 0.1, 0.4, 0.9):
        fixed = FixedThresholdClassifier(inside, threshold=threshold, pos_label=positive)
        model = wrap(fixed).fit(X, BINARY)
        scores = black_box(model, Table(X))(torch.from_numpy(SPREAD))
        assert (model.classes_[scores.argmax(1)] == model.predict(SPREAD)).all()
    searched = GridSearchCV(wrap(tuned(inside)), {}, cv=2).fit(X, BINARY)
    scores = black_box(searched, Table(X))(torch.from_numpy(SPREAD))
    assert (searched.classes_[scores.argmax(1)] == searched.predict(SPREAD)).all()


def test_what_selects_features_and_predicts_is_viewed_as_what_it_predicts():
    selector = RFE(LogisticRegression(), n_features_to_select=2).fit(X, LABELS)
    tensor = torch.from_numpy(SPREAD)
    view = as_torch(selector)
    np.testing.assert_allclose(view(tensor).softmax(1), selector.predict_proba(SPREAD))
    before = make_pipeline(RFE(Ridge(), n_features_to_select=2), LogisticRegression())
    before.fit(X, y)
    np.testing.assert_allclose(
        as_torch(before)(tensor).softmax(1), before.predict_proba(SPREAD), rtol=1e-6
    )


class Negated(SelectKBest):
    def transform(self, X):
        return -super().transform(X)


class Cautious(JacobianRegularizedClassifier):
    def predict(self, X):
        return self.classes_[np.where(self.predict_proba(X)[:, 1] > 0.9, 1, 0)]


@pytest.mark.parametrize(
    ("estimator", "method", "kind"),
    [
        (Negated(k=3), "transform", "SelectorMixin"),
        (Cautious(max_epochs=1), "predict", "NetClassifier"),
    ],
    ids=["selector", "classifier"],
)
def test_methods_of_ones_own_have_no_view(estimator, method, kind):
    with pytest.raises(NotDifferentiableError, match=f"its own {method}, but expected .* {kind}"):
        as_torch(estimator.fit(X, BINARY))
