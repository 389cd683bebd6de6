"""The views of classifiers compute what scikit-learn's own predict and predict_proba compute."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.datasets import make_classification
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.gaussian_process import GaussianProcessClassifier, kernels
from sklearn.linear_model import (
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, LinearSVC, NuSVC

from skjacobian import robust_accuracy_score
from skjacobian.differentiable import as_torch
from skjacobian.exceptions import NotDifferentiableError

X, y = make_classification(90, 6, n_informative=4, n_redundant=0, n_classes=4, random_state=0)
X = X * [1.0, 0.5, 2.0, 1.0, 3.0, 1.0] + [0.0, 1.0, -2.0, 0.5, 0.0, 4.0]
LABELS = np.array(["ash", "beech", "oak", "yew"])[y]
# Also far outside of the data, where probabilities saturate and kernels vanish.
SPREAD = np.vstack([X, X.mean(0) + 3 * (X - X.mean(0)), X.mean(0) + 40 * (X[:5] - X.mean(0))])
SMOOTH = X.mean(0) + 0.37 * (X[:4] - X.mean(0))
TARGETS = {"two": np.where(y % 2, "ash", "oak"), "three": LABELS[y < 3], "four": LABELS}


def quietly(fit, *args):
    """Fit without the warning that a few steps do not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit(*args)


def fitted(classifier, n_classes="four"):
    values = X[y < 3] if n_classes == "three" else X
    return quietly(classifier.fit, values, TARGETS[n_classes])


def sgd(loss, **params):
    return SGDClassifier(loss=loss, max_iter=20, tol=None, random_state=0, **params)


def mlp(**params):
    return MLPClassifier((7, 5), max_iter=15, random_state=0, **params)


def gp(kernel=None, **params):
    return GaussianProcessClassifier(kernel, optimizer=None, **params)


LINEAR = {
    "LogisticRegression": LogisticRegression(max_iter=1000),
    "LogisticRegression without intercept": LogisticRegression(fit_intercept=False, max_iter=1000),
    "RidgeClassifier": RidgeClassifier(),
    "RidgeClassifier without intercept": RidgeClassifier(fit_intercept=False),
    "RidgeClassifierCV": RidgeClassifierCV(),
    "SGDClassifier, hinge": sgd("hinge"),
    "SGDClassifier, log_loss": sgd("log_loss"),
    "SGDClassifier, modified_huber": sgd("modified_huber"),
    "SGDClassifier, modified_huber, slow": sgd("modified_huber", alpha=1.0),
    "SGDClassifier, squared_error": sgd("squared_error", eta0=1e-4, learning_rate="constant"),
    "SGDClassifier, averaged, no intercept": sgd("log_loss", average=True, fit_intercept=False),
    "Perceptron": Perceptron(random_state=0),
    "LinearSVC": LinearSVC(random_state=0),
    "LinearSVC without intercept": LinearSVC(fit_intercept=False, random_state=0),
    "NearestCentroid": NearestCentroid(),
    "NearestCentroid, empirical priors": NearestCentroid(priors="empirical"),
    "NearestCentroid, shrunken": NearestCentroid(shrink_threshold=0.3),
    "NearestCentroid, manhattan": NearestCentroid(metric="manhattan"),
    "NearestCentroid, manhattan, priors": NearestCentroid(metric="manhattan", priors="empirical"),
}
GENERATIVE = {
    "GaussianNB": GaussianNB(),
    "GaussianNB, smoothed": GaussianNB(var_smoothing=0.1),
    "LDA, svd": LinearDiscriminantAnalysis(),
    "LDA, lsqr": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "LDA, eigen": LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.2),
    "QDA": QuadraticDiscriminantAnalysis(),
    "QDA, regularized": QuadraticDiscriminantAnalysis(reg_param=0.1),
    "QDA, eigen": QuadraticDiscriminantAnalysis(solver="eigen", shrinkage=0.1),
}
SUPPORT_VECTORS = {
    "SVC": SVC(),
    "SVC, ovo": SVC(decision_function_shape="ovo"),
    "SVC, breaking ties": SVC(break_ties=True),
    "SVC, linear": SVC(kernel="linear"),
    "SVC, linear, ovo": SVC(kernel="linear", decision_function_shape="ovo"),
    "SVC, poly": SVC(kernel="poly", degree=2, coef0=0.7),
    "SVC, poly, cubic": SVC(kernel="poly", gamma=0.1),
    "SVC, sigmoid": SVC(kernel="sigmoid", gamma="auto", coef0=-0.3),
    "SVC, weak": SVC(C=1e-3, gamma=3.0),
    "NuSVC": NuSVC(nu=0.3),
    "NuSVC, breaking ties": NuSVC(nu=0.3, break_ties=True),
}
NETWORKS = {
    **{activation: mlp(activation=activation) for activation in ("identity", "logistic", "tanh")},
    "relu": mlp(),
    "lbfgs": mlp(solver="lbfgs"),
}
PROCESSES = {
    "default": gp(),
    "RBF": gp(2.0 * kernels.RBF(3.0)),
    "RBF, a scale for each": gp(kernels.RBF([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
    "Matern, 1/2": gp(kernels.Matern(4.0, nu=0.5)),
    "Matern, 3/2": gp(kernels.Matern([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], nu=1.5)),
    "Matern, 5/2": gp(kernels.Matern(4.0, nu=2.5)),
    "Matern, inf": gp(kernels.Matern(4.0, nu=np.inf)),
    "RationalQuadratic": gp(kernels.RationalQuadratic(4.0, alpha=0.7)),
    "ExpSineSquared": gp(kernels.ExpSineSquared(0.2, periodicity=99.0)),
    "DotProduct": gp(0.1 * kernels.DotProduct(2.0)),
    "noise": gp(kernels.RBF(3.0) + kernels.WhiteKernel(0.5)),
    "powers": gp((0.1 * kernels.DotProduct(2.0) + 1.0) ** 2 * kernels.RBF(5.0)),
    "one against one": gp(kernels.RBF(4.0), multi_class="one_vs_one"),
}
ALL = {
    **LINEAR,
    **GENERATIVE,
    **SUPPORT_VECTORS,
    **{f"MLP, {name}": network for name, network in NETWORKS.items()},
    **{f"GP, {name}": process for name, process in PROCESSES.items()},
}


@pytest.mark.parametrize("n_classes", TARGETS)
@pytest.mark.parametrize("classifier", ALL.values(), ids=ALL.keys())
def test_the_view_of_a_classifier_computes_what_it_computes(
    classifier, n_classes, assert_classifier_view
):
    # Far from all data a Gaussian process knows nothing: its classes differ by rounding alone.
    values = X if isinstance(classifier, GaussianProcessClassifier) else SPREAD
    assert_classifier_view(fitted(classifier, n_classes), values, SMOOTH)


def tensor(values):
    return torch.from_numpy(np.array(values, dtype=float))


def gradient(view, values):
    """The gradient of the sum of the first logit."""
    values = tensor(values).requires_grad_()
    return torch.autograd.grad(view(values)[:, 0].sum(), values)[0]


@pytest.mark.parametrize(
    "classifier",
    [LogisticRegression(), *GENERATIVE.values(), *NETWORKS.values(), PROCESSES["RBF"]],
    ids=str,
)
def test_the_softmax_of_the_logits_is_predict_proba_where_predict_follows_it(classifier):
    classifier = fitted(classifier)
    seen = as_torch(classifier)(tensor(X)).softmax(1)
    np.testing.assert_allclose(seen, classifier.predict_proba(X), atol=1e-10)


@pytest.mark.parametrize("n_classes", ["two", "four"])
def test_the_view_of_a_search_for_c_is_that_of_the_regression(n_classes, assert_classifier_view):
    search = LogisticRegressionCV(
        Cs=2, cv=2, l1_ratios=(0,), use_legacy_attributes=False, scoring="neg_log_loss"
    )
    assert_classifier_view(fitted(search, n_classes), SPREAD, SMOOTH)


@pytest.mark.parametrize(
    "classifier",
    [
        RidgeClassifier(),
        RidgeClassifierCV(),
        sgd("hinge"),
        Perceptron(),
        LinearSVC(),
        NearestCentroid(metric="manhattan"),
        SVC(),
        gp(multi_class="one_vs_one"),
    ],
    ids=str,
)
def test_the_view_says_where_there_is_no_probability(classifier):
    classifier = fitted(classifier)
    assert not as_torch(classifier).has_proba
    assert not as_torch(make_pipeline(classifier)).has_proba


@pytest.mark.parametrize("loss", ["log_loss", "modified_huber"])
def test_probabilities_that_all_vanish_are_uniform_as_those_of_scikit_learn(loss):
    classifier = fitted(sgd(loss))
    values = 1e5 * np.random.default_rng(0).normal(size=(200, 6))
    wanted = classifier.predict_proba(values)
    assert (wanted == 0.25).all(1).any()
    np.testing.assert_allclose(as_torch(classifier).predict_proba(tensor(values)), wanted)


@pytest.mark.parametrize("fit", [lambda model: model.fit(X, LABELS).sparsify()])
def test_weights_may_be_sparse(fit, assert_classifier_view):
    classifier = fit(LogisticRegression(solver="saga", l1_ratio=1, C=0.1, max_iter=2000))
    assert sparse.issparse(classifier.coef_)
    assert_classifier_view(classifier, SPREAD, SMOOTH)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("target", [LABELS, TARGETS["two"]], ids=["four", "two"])
def test_support_vectors_may_be_sparse(kernel, target):
    classifier = SVC(kernel=kernel).fit(sparse.csr_matrix(X), target)
    seen = as_torch(classifier).decision_function(tensor(X))
    np.testing.assert_allclose(seen, classifier.decision_function(X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_tied_votes_go_to_the_first_class_unless_ties_are_broken(kernel):
    values = np.random.default_rng(0).normal(size=(4000, 6)) * 2 * X.std(0) + X.mean(0)
    classifier = fitted(SVC(kernel=kernel))
    logits = as_torch(classifier)(tensor(values))
    scores = classifier.decision_function(values)
    disagree = classifier.classes_[scores.argmax(1)] != classifier.predict(values)
    assert 10 < disagree.sum() < 1000
    np.testing.assert_array_equal(classifier.classes_[logits.argmax(1)], classifier.predict(values))
    broken = as_torch(classifier.set_params(break_ties=True))(tensor(values))
    np.testing.assert_array_equal(broken.argmax(1), scores.argmax(1))


@pytest.mark.parametrize("classifier", [SVC(), SVC(kernel="poly", coef0=1.0)], ids=str)
def test_every_logit_of_voting_machines_has_a_gradient(classifier):
    view = as_torch(fitted(classifier))
    values = tensor(X).requires_grad_()
    logits = view(values)
    for label, column in enumerate(logits.T):
        (slope,) = torch.autograd.grad(column.sum(), values, retain_graph=True)
        # Of the class predicted it is the constant 0 that the others are below.
        others = logits.argmax(1) != label
        assert (slope.abs().amax(1)[others] > 1e-6).all()


@pytest.mark.parametrize("name", [*PROCESSES, "SVC"])
def test_gradients_are_finite_at_the_training_points(name):
    classifier = fitted({**PROCESSES, "SVC": SVC()}[name])
    assert gradient(as_torch(classifier), X).isfinite().all()
    if hasattr(classifier, "base_estimator_"):
        binary = as_torch(fitted(classifier, "two"))
        assert gradient(binary.predict_proba, X).isfinite().all()


@pytest.mark.parametrize("classifier", GENERATIVE.values(), ids=GENERATIVE.keys())
def test_generative_models_have_gradients_where_their_probabilities_underflow(classifier):
    classifier = fitted(classifier)
    far = X.mean(0) + 1e4 * (X - X.mean(0))
    probabilities = classifier.predict_proba(far)
    assert (probabilities.max(1) == 1).mean() > 0.9
    slope = gradient(as_torch(classifier), far)
    assert slope.isfinite().all()
    assert (slope.abs().amax(1) > 0).all()


def test_a_class_of_no_prior_probability_is_never_the_largest_logit():
    classifier = GaussianNB(priors=[0.0, 0.3, 0.3, 0.4]).fit(X, LABELS)
    view = as_torch(classifier)
    assert (view(tensor(X))[:, 0] == -np.inf).all()
    with np.errstate(divide="ignore"):
        wanted = classifier.predict_proba(X)
    np.testing.assert_allclose(view.predict_proba(tensor(X)), wanted, atol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_perceptron_fitted_in_float32_computes_in_float32(activation):
    values = X.astype(np.float32)
    classifier = quietly(mlp(activation=activation).fit, values, LABELS)
    view = as_torch(classifier)
    assert not any(weight.requires_grad for weight in view.parameters())
    assert view(tensor(X)).dtype == torch.float32
    np.testing.assert_allclose(
        view.predict_proba(torch.from_numpy(values)), classifier.predict_proba(values), atol=1e-6
    )


class OwnRBF(kernels.RBF):
    def __call__(self, X, Y=None, eval_gradient=False):
        return super().__call__(X, Y, eval_gradient) ** 2


def multilabel(classifier):
    return quietly(classifier.fit, X, np.column_stack([y > 1, y % 2]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: multilabel(RidgeClassifier()),
            r"RidgeClassifier fitted on a multilabel-indicator target, but expected one label",
        ),
        (
            lambda: multilabel(RidgeClassifierCV()),
            r"RidgeClassifierCV fitted on a multilabel-indicator target, but expected one label",
        ),
        (
            lambda: multilabel(mlp()),
            r"MLPClassifier fitted on a multilabel-indicator target, but expected one label",
        ),
        (
            lambda: SVC(kernel="precomputed").fit(X @ X.T, y),
            r"Got kernel='precomputed', but expected one of .*poly.*rbf",
        ),
        (
            lambda: SVC(kernel=lambda X, Z: X @ Z.T).fit(X, y),
            r"Got kernel=<function .*, but expected one of .*poly.*rbf",
        ),
        (
            lambda: NuSVC(nu=0.3, break_ties=True, decision_function_shape="ovo").fit(X, y),
            r"Got NuSVC\(break_ties=True, decision_function_shape='ovo'\), but expected one",
        ),
        (
            lambda: fitted(gp(1.0 * kernels.Matern(4.0, nu=2.0))),
            r"kernel Matern\(length_scale=4, nu=2\), but expected its nu to be one of 0\.5, 1\.5",
        ),
        (
            lambda: fitted(gp(kernels.WhiteKernel() + kernels.PairwiseKernel(metric="rbf"))),
            r"Got a Gaussian process with kernel PairwiseKernel\(.*no differentiable view of Pair",
        ),
        (
            lambda: fitted(gp(OwnRBF(3.0) ** 2)),
            r"with kernel OwnRBF\(length_scale=3\), but no differentiable view of OwnRBF is known",
        ),
    ],
)
def test_what_has_no_view_is_named(make, match):
    with pytest.raises(NotDifferentiableError, match=match):
        as_torch(make())


@pytest.mark.parametrize(
    "classifier",
    [*{type(classifier): classifier for classifier in ALL.values()}.values()],
    ids=lambda classifier: type(classifier).__name__,
)
def test_an_unfitted_classifier_is_rejected(classifier):
    with pytest.raises(NotFittedError, match=r"is not fitted yet"):
        as_torch(type(classifier)())


ATTACKED = {
    "LogisticRegression": LogisticRegression(),
    "RidgeClassifier": RidgeClassifier(),
    "SGDClassifier": sgd("log_loss"),
    "Perceptron": Perceptron(),
    "LinearSVC": LinearSVC(),
    "NearestCentroid": NearestCentroid(),
    **SUPPORT_VECTORS,
    # Of relu the few units are dead for many samples.
    "MLPClassifier": mlp(activation="tanh", solver="lbfgs"),
    **GENERATIVE,
    **{f"GP, {name}": process for name, process in PROCESSES.items()},
}


@pytest.mark.parametrize(
    ("classifier", "n_classes"),
    list(zip(ATTACKED.values(), itertools.cycle(["two", "four"]), strict=False)),
    ids=ATTACKED,
)
def test_an_attack_through_the_view_lowers_the_accuracy(classifier, n_classes):
    classifier = fitted(classifier, n_classes)
    scores = robust_accuracy_score(
        classifier, X, TARGETS[n_classes], eps=[0.5], feature_scale="std", n_steps=10
    )
    assert scores["robust_accuracy_eps0.5"] < 0.75 * scores["accuracy"]


def test_a_view_is_made_without_random_numbers():
    model = fitted(mlp())
    before = torch.get_rng_state()
    as_torch(model)
    assert torch.equal(torch.get_rng_state(), before)
