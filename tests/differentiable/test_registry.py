"""as_torch computes what scikit-learn's own transform and predict_proba compute."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.datasets import make_classification
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectFromModel, SelectKBest, VarianceThreshold
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier
from skjacobian._table import Table
from skjacobian.differentiable import as_torch, black_box
from skjacobian.differentiable._registry import SETTINGS
from skjacobian.exceptions import NotDifferentiableError

X, y = make_classification(60, 6, n_informative=4, n_classes=3, random_state=0)
X = X * [1.0, 0.5, 2.0, 1.0, 3.0, 1.0] + [0.0, 1.0, -2.0, 0.5, 0.0, 4.0]
LABELS = np.array(["ash", "beech", "oak"])[y]
# Some values past the range of the training data, so that clipping has something to do.
SPREAD = X.mean(0) + 1.7 * (X - X.mean(0))
# No value on an edge of that range, where clipping has no derivative.
SMOOTH = X.mean(0) + 0.37 * (X[:4] - X.mean(0))

TRANSFORMERS = {
    "StandardScaler": StandardScaler(),
    "StandardScaler without mean": StandardScaler(with_mean=False),
    "StandardScaler without std": StandardScaler(with_std=False),
    "StandardScaler without either": StandardScaler(with_mean=False, with_std=False),
    "MinMaxScaler": MinMaxScaler(),
    "MinMaxScaler with range": MinMaxScaler(feature_range=(-2, 3)),
    "MinMaxScaler with range and clip": MinMaxScaler(feature_range=(-2, 3), clip=True),
    "MaxAbsScaler": MaxAbsScaler(),
    "MaxAbsScaler with clip": MaxAbsScaler(clip=True),
    "RobustScaler": RobustScaler(),
    "RobustScaler without centering": RobustScaler(with_centering=False),
    "RobustScaler without scaling": RobustScaler(with_scaling=False),
    "RobustScaler of unit variance": RobustScaler(quantile_range=(10, 90), unit_variance=True),
    "PCA": PCA(),
    "PCA of 3": PCA(n_components=3),
    "PCA of 90 %": PCA(n_components=0.9, svd_solver="full"),
    "whitening PCA": PCA(n_components=3, whiten=True),
    "SelectKBest": SelectKBest(k=2),
    "VarianceThreshold": VarianceThreshold(threshold=3.0),
    "SelectFromModel": SelectFromModel(LogisticRegression(), max_features=3),
    "passthrough": Pipeline([("nothing", "passthrough"), ("scale", StandardScaler())]),
    "None": Pipeline([("nothing", None), ("scale", StandardScaler())]),
    "nested pipelines": make_pipeline(
        make_pipeline(MinMaxScaler(), "passthrough"), make_pipeline(PCA(4), SelectKBest(k=2))
    ),
}
PRECISION = {"float32": 1e-6, "float64": 1e-10}


def small(cls=JacobianRegularizedClassifier, **params):
    return cls(module__hidden_units=(8,), max_epochs=2, random_state=0, **params)


def assert_same_classifier(view, estimator, values, atol):
    """The softmax of the view is predict_proba, and its argmax predict."""
    logits = view(torch.from_numpy(values)).detach()
    np.testing.assert_allclose(logits.softmax(1), estimator.predict_proba(values), atol=atol)
    np.testing.assert_array_equal(
        estimator.classes_[logits.argmax(1).numpy()], estimator.predict(values)
    )


@pytest.fixture(params=TRANSFORMERS.values(), ids=TRANSFORMERS.keys())
def transformer(request):
    return request.param.fit(X, y)


@pytest.mark.parametrize("dtype", PRECISION)
def test_the_view_of_a_transformer_is_its_transform(transformer, dtype):
    values = SPREAD.astype(dtype)
    seen = as_torch(transformer)(torch.from_numpy(values))
    wanted = transformer.transform(values)
    assert str(seen.dtype) == f"torch.{wanted.dtype}"
    np.testing.assert_allclose(seen, wanted, rtol=PRECISION[dtype], atol=PRECISION[dtype])


def test_the_view_of_a_transformer_has_the_gradient_of_finite_differences(transformer):
    values = torch.from_numpy(SMOOTH).requires_grad_()
    assert torch.autograd.gradcheck(as_torch(transformer), (values,))


@pytest.mark.parametrize("scaler", [StandardScaler(), MinMaxScaler(), MaxAbsScaler()])
def test_a_constant_feature_is_scaled_as_scikit_learn_scales_it(scaler):
    constant = np.column_stack([X, np.full(len(X), 3.0), np.zeros(len(X))])
    scaler.fit(constant)
    seen = as_torch(scaler)(torch.from_numpy(constant + 1))
    np.testing.assert_allclose(seen, scaler.transform(constant + 1), atol=1e-10)


def test_whitening_a_component_without_variance_gives_what_transform_gives():
    flat = np.column_stack([X[:, :2], X[:, 0]])
    pca = PCA(whiten=True).fit(flat)
    seen = as_torch(pca)(torch.from_numpy(flat))
    np.testing.assert_allclose(seen[:, :2], pca.transform(flat)[:, :2], atol=1e-10)
    assert seen.isfinite().all()


@pytest.mark.parametrize("cls", [JacobianRegularizedClassifier, AdversarialClassifier])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: make_pipeline(StandardScaler(), model),
        lambda model: make_pipeline(make_pipeline(RobustScaler()), PCA(4), model),
        lambda model: Pipeline([("skip", "passthrough"), ("also", None), ("model", model)]),
        lambda model: GridSearchCV(model, {"lr": [1e-3, 1e-2]}, cv=2),
        lambda model: FrozenEstimator(make_pipeline(MinMaxScaler(), model).fit(X, LABELS)),
        lambda model: make_pipeline(
            MaxAbsScaler(), GridSearchCV(make_pipeline(PCA(2), model), {"pca__whiten": [True]})
        ),
    ],
    ids=["bare", "pipeline", "nested", "skipping", "search", "frozen", "search in pipeline"],
)
def test_the_view_of_a_classifier_gives_its_probabilities_and_labels(cls, dtype, wrap):
    model = wrap(small(cls, dtype=dtype)).fit(X, LABELS)
    assert_same_classifier(as_torch(model), model, SPREAD.astype(dtype), 10 * PRECISION[dtype])


def test_the_view_of_a_pipeline_has_the_gradient_of_finite_differences():
    model = make_pipeline(StandardScaler(), PCA(4), small(module__activation="tanh")).fit(X, y)
    values = torch.from_numpy(SMOOTH).requires_grad_()
    assert torch.autograd.gradcheck(as_torch(model), (values,))


def test_the_view_shares_the_weights_of_the_estimator():
    model = make_pipeline(StandardScaler(), small()).fit(X, LABELS)
    view = as_torch(model)
    model[-1].partial_fit(model[0].transform(X), LABELS)
    assert_same_classifier(view, model, X, 1e-10)


class Perceptron(nn.Module):
    def __init__(self, n_outputs=3, last=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, n_outputs))
        self.last = last

    def forward(self, X):
        out = self.layers(X)
        return out.softmax(1) if self.last == "softmax" else out


class WithHiddenUnits(Perceptron):
    def forward(self, X):
        return super().forward(X), self.layers[:2](X)


class NetOfFirstOutput(NeuralNetClassifier):
    def get_loss(self, y_pred, *args, **kwargs):
        return super().get_loss(y_pred[0], *args, **kwargs)


class OwnNLL(nn.NLLLoss):
    pass


class OwnCrossEntropy(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("module", "criterion", "last"),
    [
        (Perceptron, nn.CrossEntropyLoss, None),
        (Perceptron, OwnCrossEntropy, None),
        (Perceptron, nn.NLLLoss, "softmax"),
        (Perceptron, OwnNLL, "softmax"),
    ],
)
def test_the_view_of_a_bare_skorch_classifier_gives_its_probabilities(module, criterion, last):
    torch.manual_seed(0)
    net = NeuralNetClassifier(
        module, module__last=last, criterion=criterion, max_epochs=2, train_split=None, verbose=0
    )
    net.fit(X.astype(np.float32), y)
    assert_same_classifier(as_torch(net), net, SPREAD.astype(np.float32), 1e-6)


def test_the_first_of_several_outputs_of_a_skorch_module_is_the_logits():
    torch.manual_seed(0)
    net = NetOfFirstOutput(
        WithHiddenUnits, criterion=nn.CrossEntropyLoss, max_epochs=2, train_split=None, verbose=0
    )
    net.fit(X.astype(np.float32), y)
    assert_same_classifier(as_torch(net), net, SPREAD.astype(np.float32), 1e-6)


def test_the_view_of_a_skorch_binary_classifier_has_two_logits():
    torch.manual_seed(0)
    values = X.astype(np.float32)
    net = NeuralNetBinaryClassifier(
        Perceptron, module__n_outputs=1, max_epochs=2, train_split=None, verbose=0
    )
    net.fit(values, (y == 1).astype(np.float32))
    logits = as_torch(net)(torch.from_numpy(values)).detach()
    assert logits.shape == (len(X), 2)
    np.testing.assert_allclose(logits.softmax(1), net.predict_proba(values), atol=1e-6)
    np.testing.assert_array_equal(logits.argmax(1), net.predict(values))


def test_a_skorch_net_may_end_a_pipeline():
    torch.manual_seed(0)
    net = NeuralNetClassifier(
        Perceptron, criterion=nn.CrossEntropyLoss, max_epochs=2, train_split=None, verbose=0
    )
    values = X.astype(np.float32)
    model = make_pipeline(StandardScaler(), net).fit(values, y)
    assert_same_classifier(as_torch(model), model, values, 1e-6)


def test_the_view_of_a_module_takes_any_dtype_and_is_the_module():
    module = Perceptron()
    values = torch.from_numpy(X)
    torch.testing.assert_close(as_torch(module)(values), module(values.float()))


def test_the_view_of_a_module_without_weights_is_the_module():
    torch.testing.assert_close(
        as_torch(nn.Tanh())(torch.from_numpy(X)), torch.tanh(torch.tensor(X))
    )


def test_an_unknown_estimator_is_named_together_with_what_is_supported():
    model = KNeighborsClassifier().fit(X, y)
    with pytest.raises(
        NotDifferentiableError,
        match=r"estimator of type KNeighborsClassifier.*docs/tabular\.md.*as_torch\.register",
    ):
        as_torch(model)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            Pipeline([("bins", KBinsDiscretizer(quantile_method="averaged_inverted_cdf"))]),
            r"In step 'bins' of the pipeline: .*type KBinsDiscretizer",
        ),
        (
            Pipeline([("outer", Pipeline([("inner", KNeighborsClassifier())]))]),
            r"In step 'outer' of the pipeline: In step 'inner' of the pipeline: .*KNeighbors",
        ),
    ],
)
def test_an_unknown_step_of_a_pipeline_is_named(model, match):
    model.fit(X, y)
    with pytest.raises(NotDifferentiableError, match=match):
        as_torch(model)


class OwnScaler(StandardScaler):
    def transform(self, X):
        return 2 * super().transform(X)


class KnowingScaler(StandardScaler):
    """As a release of scikit-learn with a new parameter would be."""

    def __init__(self, *, copy=True, with_mean=True, with_std=True, cubed=False):
        super().__init__(copy=copy, with_mean=with_mean, with_std=with_std)
        self.cubed = cubed


def test_a_subclass_that_transforms_its_own_way_is_rejected():
    with pytest.raises(
        NotDifferentiableError,
        match=r"type OwnScaler, which has its own transform, but expected that of StandardScaler",
    ):
        as_torch(OwnScaler().fit(X))


def test_a_setting_that_is_not_known_is_rejected_unless_it_is_left_alone():
    as_torch(KnowingScaler().fit(X))
    with pytest.raises(
        NotDifferentiableError,
        match=r"KnowingScaler\(cubed=True\), but the differentiable view of StandardScaler does "
        "not know the parameter cubed",
    ):
        as_torch(KnowingScaler(cubed=True).fit(X))


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_parameter_of_scikit_learn_is_known(kind):
    new = set(kind._get_param_names()) - SETTINGS[kind]
    assert not new, f"say in view_of({kind.__name__}) what becomes of {new}"


def test_an_unknown_criterion_of_a_skorch_net_is_named():
    net = NeuralNetRegressor(Perceptron).initialize()
    with pytest.raises(
        NotDifferentiableError, match=r"criterion MSELoss, but expected one of CrossEntropyLoss"
    ):
        as_torch(net)


class Doubler(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return 2 * X


class UnknownDoubler(Doubler):
    pass


def test_a_registered_function_is_used_inside_a_pipeline_and_for_subclasses():
    model = make_pipeline(StandardScaler(), UnknownDoubler(), small()).fit(X, LABELS)
    with pytest.raises(NotDifferentiableError, match="step 'unknowndoubler'"):
        as_torch(model)
    as_torch.register(Doubler, lambda transformer: lambda X: 2 * X)
    assert_same_classifier(as_torch(model), model, X, 1e-10)


@pytest.mark.parametrize(
    "unfitted",
    [
        StandardScaler(),
        MinMaxScaler(),
        MaxAbsScaler(),
        RobustScaler(),
        PCA(),
        SelectKBest(),
        VarianceThreshold(),
        small(),
        small(AdversarialClassifier),
        make_pipeline(StandardScaler(), small()),
        GridSearchCV(small(), {}),
        FrozenEstimator(small()),
        NeuralNetClassifier(Perceptron),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_an_unfitted_estimator_is_rejected(unfitted):
    with pytest.raises(NotFittedError, match=r"is not (fitted|initialized) yet"):
        as_torch(unfitted)


def test_an_unfitted_selector_from_a_model_is_rejected_as_by_its_own_transform():
    with pytest.raises(ValueError, match="call fit before calling transform"):
        as_torch(SelectFromModel(LogisticRegression()))


def test_a_selector_from_a_model_that_came_fitted_needs_no_fit():
    model = LogisticRegression().fit(X, y)
    selector = SelectFromModel(model, prefit=True)
    seen = as_torch(selector)(torch.from_numpy(X))
    np.testing.assert_array_equal(seen, selector.transform(X))


def test_the_view_of_a_transformer_pickles(transformer):
    view = as_torch(transformer)
    again = pickle.loads(pickle.dumps(view))
    values = torch.from_numpy(SPREAD)
    assert torch.equal(again(values), view(values))


@pytest.mark.parametrize("cls", [JacobianRegularizedClassifier, AdversarialClassifier])
def test_the_view_of_a_pipeline_pickles(cls):
    view = as_torch(make_pipeline(StandardScaler(), small(cls)).fit(X, y))
    again = pickle.loads(pickle.dumps(view))
    values = torch.from_numpy(SPREAD)
    assert torch.equal(again(values), view(values))


# --- black boxes --------------------------------------------------------------------------


class OnlyPredicts(ClassifierMixin, BaseEstimator):
    def fit(self, X, y):
        self.tree_ = DecisionTreeClassifier(max_depth=2, random_state=0).fit(X, y)
        self.classes_ = self.tree_.classes_
        return self

    def predict(self, X):
        return self.tree_.predict(X)


def one_hot(model, values):
    return model.predict(values)[:, None] == model.classes_


BLACK_BOXES = {
    "probabilities": (KNeighborsClassifier(4), lambda m, v: m.predict_proba(v)),
    "decision function": (LinearSVC(), lambda m, v: m.decision_function(v)),
    # Three pairs of three classes look like three classes.
    "pairs of three classes": (SVC(decision_function_shape="ovo"), one_hot),
    "pairs in a pipeline": (make_pipeline(SVC(decision_function_shape="ovo")), one_hot),
    "pairs of four classes": (SVC(decision_function_shape="ovo"), one_hot),
    "decisions": (OnlyPredicts(), one_hot),
    "pipeline": (make_pipeline(StandardScaler(), SVC()), lambda m, v: m.decision_function(v)),
    "search": (GridSearchCV(LinearSVC(), {"C": [0.1, 1]}), lambda m, v: m.decision_function(v)),
}


@pytest.mark.parametrize("name", BLACK_BOXES)
def test_the_scores_of_a_black_box_are_those_of_scikit_learn(name):
    model, wanted = BLACK_BOXES[name]
    labels = np.where(X[:, 0] > 1, "yew", LABELS) if name == "pairs of four classes" else LABELS
    model = model.fit(X, labels)
    seen = black_box(model, Table(X))(torch.from_numpy(SPREAD))
    assert seen.dtype == torch.float64
    # But for what lets the first of equal votes win.
    expected = wanted(model, SPREAD).astype(float)
    np.testing.assert_allclose(seen, expected, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize(
    "model",
    [LinearSVC(), KNeighborsClassifier(3), OnlyPredicts(), SVC(decision_function_shape="ovo")],
    ids=str,
)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_highest_score_of_a_black_box_is_its_prediction(model, n_classes):
    labels = np.where(LABELS == "oak", "ash", LABELS) if n_classes == 2 else LABELS
    model = model.fit(X, labels)
    seen = black_box(model, Table(X))(torch.from_numpy(SPREAD))
    assert seen.shape == (len(X), n_classes)
    np.testing.assert_array_equal(model.classes_[seen.argmax(1)], model.predict(SPREAD))


def test_the_two_columns_of_a_binary_decision_function_differ_by_it():
    model = LinearSVC().fit(X, LABELS == "oak")
    seen = black_box(model, Table(X))(torch.from_numpy(X)).numpy()
    np.testing.assert_array_equal(seen[:, 1] - seen[:, 0], model.decision_function(X))


def test_a_black_box_gives_data_frames_to_what_was_fitted_on_them():
    frame = pd.DataFrame(X, columns=list("abcdef"), index=np.arange(len(X)) + 7)
    model = LinearSVC().fit(frame, y)  # warns, which fails, if it gets an array
    seen = black_box(model, Table(frame))(torch.from_numpy(SPREAD))
    np.testing.assert_array_equal(
        seen, model.decision_function(pd.DataFrame(SPREAD, columns=list("abcdef")))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scores_of_a_black_box_have_the_dtype_of_the_samples_and_no_gradient(dtype):
    samples = torch.from_numpy(X).to(dtype).requires_grad_()
    seen = black_box(KNeighborsClassifier(3).fit(X, y), Table(X))(samples)
    assert seen.dtype == dtype
    assert not seen.requires_grad


@pytest.mark.parametrize("unfitted", [LinearSVC(), make_pipeline(StandardScaler(), LinearSVC())])
def test_an_unfitted_black_box_is_rejected(unfitted):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        black_box(unfitted, Table(X))
