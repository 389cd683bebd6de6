"""`preprocessor=` of both classifiers: a network in raw units on preprocessed values."""

import pickle
import pickletools

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectKBest
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    OneHotEncoder,
    RobustScaler,
    StandardScaler,
)
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks
from skorch.callbacks import Callback
from torch import nn

from skjacobian import (
    AdversarialClassifier,
    FeatureConstraints,
    JacobianRegularizedClassifier,
    RobustScorer,
)
from skjacobian.differentiable import as_torch
from skjacobian.exceptions import NotDifferentiableError
from skjacobian.jacobian import JACOBIAN_NORMS, jacobian_norm
from skjacobian.jacobian._cost import gram_pays
from skjacobian.jacobian._maps import ChannelScale, Dense
from skjacobian.jacobian._stack import Stack, chain_of
from skjacobian.layers import Rescaling

# Raw units, where a preprocessor leaves them, are more than a few epochs can learn from.
pytestmark = pytest.mark.filterwarnings("ignore:.*has learned nothing")

CLASSIFIERS = [JacobianRegularizedClassifier, AdversarialClassifier]
SMALL = {"module__hidden_units": (16,), "max_epochs": 3, "random_state": 0}
UNITS = np.array([1.0, 0.02, 30.0, 1000.0])

PREPROCESSORS = {
    "standard": StandardScaler(),
    "standard without mean": StandardScaler(with_mean=False),
    "standard without std": StandardScaler(with_std=False),
    "range": MinMaxScaler((-1, 2)),
    "range, clipped": MinMaxScaler(clip=True),
    "largest": MaxAbsScaler(),
    "robust": RobustScaler(),
    "PCA": PCA(3),
    "whitening PCA": PCA(whiten=True),
    "selector": SelectKBest(k=2),
    # A classifier as well, of which `as_torch` would give the logits.
    "discriminants": LinearDiscriminantAnalysis(),
    "pipeline": make_pipeline(StandardScaler(), "passthrough", PCA(2)),
    "nested pipeline": make_pipeline(make_pipeline(MinMaxScaler()), StandardScaler()),
    "empty pipeline": make_pipeline("passthrough"),
    "fitted before": FrozenEstimator(StandardScaler().fit(load_iris().data * UNITS)),
}
every_preprocessor = pytest.mark.parametrize(
    "preprocessor", PREPROCESSORS.values(), ids=PREPROCESSORS
)
IN_CLOSED_FORM = {name: p for name, p in PREPROCESSORS.items() if "cl" not in name}
IN_CLOSED_FORM.pop("selector")


@pytest.fixture(scope="module")
def raw():
    """Iris with each feature in units of its own, far from 0."""
    X, y = load_iris(return_X_y=True)
    return (X + 5) * UNITS, y


def logits_of(module, X):
    return module(torch.as_tensor(X)).detach().numpy()


# --- the network is that of the pipeline, in raw units --------------------------------------


@every_preprocessor
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_plain_training_is_that_of_the_pipeline(preprocessor, dtype, raw):
    X, y = raw[0].astype(dtype), raw[1]
    model = JacobianRegularizedClassifier(preprocessor=preprocessor, lam=0, **SMALL).fit(X, y)
    pipe = make_pipeline(preprocessor, JacobianRegularizedClassifier(lam=0, **SMALL)).fit(X, y)
    probabilities = model.predict_proba(X)
    assert probabilities.dtype == dtype
    # In float32 the two round the scaled values differently, and training goes on from there.
    tolerance = 1e-9 if dtype == np.float64 else 2e-3
    np.testing.assert_allclose(probabilities, pipe.predict_proba(X), rtol=tolerance, atol=tolerance)
    module = model.module_.eval()
    assert module(torch.as_tensor(X)).dtype == torch.as_tensor(X).dtype
    np.testing.assert_array_equal(logits_of(module, X), logits_of(as_torch(model), X))
    assert model.n_parameters_ == pipe[-1].n_parameters_
    assert model.input_shape_ == (4,)
    assert model.n_features_in_ == 4


def test_a_float32_network_on_float64_data_is_that_of_the_pipeline(raw):
    model = JacobianRegularizedClassifier(dtype="float32", lam=0, **SMALL)
    pipe = make_pipeline(StandardScaler(), clone(model)).fit(*raw)
    model.set_params(preprocessor=StandardScaler()).fit(*raw)
    assert {t.dtype for t in [*model.module_.buffers(), *model.module_.parameters()]} == {
        torch.float32
    }
    np.testing.assert_allclose(
        model.predict_proba(raw[0]), pipe.predict_proba(raw[0]), rtol=2e-3, atol=2e-3
    )


def test_a_robust_score_in_raw_units_is_that_of_the_pipeline(raw):
    X, y = raw
    model = JacobianRegularizedClassifier(preprocessor=StandardScaler(), lam=0, **SMALL).fit(X, y)
    pipe = make_pipeline(StandardScaler(), JacobianRegularizedClassifier(lam=0, **SMALL)).fit(X, y)
    for params in ({"eps": 0.01}, {"eps": 0.3, "feature_scale": X.std(0)}):
        for norm in ("linf", "l2"):
            scorer = RobustScorer(norm=norm, n_steps=10, random_state=0, **params)
            assert scorer(model, X, y) == scorer(pipe, X, y)


@pytest.mark.parametrize(
    "params",
    [
        {"norm": "linf"},
        {"norm": "l2"},
        {"method": "fgsm", "norm": "linf"},
    ],
)
def test_an_attack_in_units_of_the_features_is_one_in_scaled_units(params, raw):
    X, y = raw
    # The random start of a row follows from its values, which differ between the two.
    common = {"eps": 0.3, "random_start": False, **params, **SMALL}
    model = AdversarialClassifier(preprocessor=StandardScaler(), feature_scale="std", **common).fit(
        X, y
    )
    pipe = make_pipeline(StandardScaler(), AdversarialClassifier(**common)).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), pipe.predict_proba(X), rtol=1e-6, atol=1e-8)
    plain = AdversarialClassifier(preprocessor=StandardScaler(), **{**common, "eps": 0}).fit(X, y)
    assert abs(model.predict_proba(X) - plain.predict_proba(X)).max() > 1e-3


def test_bounds_are_in_raw_units(raw):
    X, y = raw
    low, high = X.min(0), X.max(0)
    common = {"eps": 0.5, "feature_scale": X.std(0), "random_start": False, **SMALL}
    model = AdversarialClassifier(preprocessor=StandardScaler(), bounds=(low, high), **common)
    scaler = StandardScaler().fit(X)
    scaled_bounds = tuple(scaler.transform([low, high]))
    common.pop("feature_scale")
    pipe = make_pipeline(StandardScaler(), AdversarialClassifier(bounds=scaled_bounds, **common))
    np.testing.assert_allclose(
        model.fit(X, y).predict_proba(X), pipe.fit(X, y).predict_proba(X), rtol=1e-6, atol=1e-8
    )
    with pytest.raises(ValueError, match="outside bounds"):
        clone(model).set_params(bounds=(-3, 3)).fit(X, y)


@every_preprocessor
def test_the_jacobian_is_by_raw_features(preprocessor, raw):
    X, y = raw
    model = JacobianRegularizedClassifier(
        preprocessor=preprocessor, module__activation="tanh", **SMALL
    ).fit(X, y)
    X = X[:5]
    columns = []
    for j, unit in enumerate(UNITS):
        step = np.eye(4)[j] * unit * 1e-6
        columns.append((model._logits(X + step) - model._logits(X - step)) / (2e-6 * unit))
    J = np.stack(columns, axis=2)
    np.testing.assert_allclose(model.jacobian_norm(X), (J**2).sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(model.jacobian_norm(X, norm="l1"), abs(J).sum((1, 2)), rtol=1e-4)


def test_the_penalty_of_a_uniform_scale_is_that_of_the_pipeline_times_its_square(raw):
    # With lam · c² behind features divided by c, the two train the same network.
    X, y = load_iris(return_X_y=True)
    c = 4.0
    scaler = MinMaxScaler((0, 1 / c)).fit(np.array([[0.0], [1.0]]) * np.ones(4))
    common = {"penalty_samples": None, **SMALL}
    model = JacobianRegularizedClassifier(
        preprocessor=FrozenEstimator(scaler), lam=0.1 * c**2, **common
    ).fit(X, y)
    pipe = JacobianRegularizedClassifier(lam=0.1, **common).fit(X / c, y)
    np.testing.assert_allclose(
        model.predict_proba(X), pipe.predict_proba(X / c), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
@pytest.mark.parametrize("preprocessor", [None, FrozenEstimator(make_pipeline("passthrough"))])
def test_no_preprocessor_changes_nothing(Classifier, preprocessor, raw):
    X, y = StandardScaler().fit_transform(raw[0]), raw[1]
    if preprocessor is not None:
        preprocessor.estimator.fit(X)
    model = Classifier(preprocessor=preprocessor, **SMALL).fit(X, y)
    plain = Classifier(**SMALL).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), plain.predict_proba(X))
    assert (model.preprocessor_ is None) == (preprocessor is None)


class Tower(nn.Module):
    """A module of a user's, which draws random numbers and has running statistics."""

    def __init__(self, n_features, input_shape, n_classes):
        super().__init__()
        assert (n_features,) == input_shape
        self.layers = nn.Sequential(
            nn.Linear(n_features, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, n_classes)
        )

    def forward(self, X):
        return self.layers(X)


@pytest.mark.parametrize("preprocessor", [PCA(2), SelectKBest(k=3), MinMaxScaler(clip=True)])
def test_a_module_gets_the_sizes_and_random_numbers_as_in_a_pipeline(preprocessor, raw):
    common = {"max_epochs": 3, "random_state": 0, "lam": 0}
    model = JacobianRegularizedClassifier(Tower, preprocessor=preprocessor, **common).fit(*raw)
    pipe = make_pipeline(preprocessor, JacobianRegularizedClassifier(Tower, **common)).fit(*raw)
    np.testing.assert_allclose(
        model.predict_proba(raw[0]), pipe.predict_proba(raw[0]), rtol=1e-9, atol=1e-12
    )


# --- what is fitted -------------------------------------------------------------------------


def test_the_preprocessor_is_a_fitted_clone(raw):
    scaler = StandardScaler()
    model = JacobianRegularizedClassifier(preprocessor=scaler, **SMALL).fit(*raw)
    with pytest.raises(NotFittedError):
        scaler.transform(raw[0])
    np.testing.assert_allclose(model.preprocessor_.mean_, raw[0].mean(0))
    assert model.preprocessor is scaler


@pytest.mark.parametrize(
    "preprocessor",
    [
        StandardScaler(),
        make_pipeline(StandardScaler(), MinMaxScaler()),
        make_pipeline(MinMaxScaler(), make_pipeline(StandardScaler())),
        MinMaxScaler(),
    ],
)
@pytest.mark.parametrize("routing", [False, True])
def test_weights_act_like_repetition(preprocessor, routing, raw):
    X, y = raw[0][::8], raw[1][::8]
    weight = np.arange(len(X)) % 3
    repeated = np.repeat(np.arange(len(X)), weight)
    for model in (
        JacobianRegularizedClassifier(preprocessor=preprocessor, **SMALL),
        AdversarialClassifier(preprocessor=preprocessor, feature_scale=UNITS, **SMALL),
    ):
        copied = clone(model).fit(X[repeated], y[repeated])
        with config_context(enable_metadata_routing=routing):
            weighted = clone(model).fit(X, y, sample_weight=weight)
        np.testing.assert_allclose(
            weighted.predict_proba(X), copied.predict_proba(X), rtol=1e-7, atol=1e-9
        )


def test_rows_of_no_weight_are_not_seen(raw):
    X, y = raw
    weight = (np.arange(len(X)) % 2).astype(float)
    model = JacobianRegularizedClassifier(preprocessor=MinMaxScaler(), **SMALL)
    model.fit(X, y, sample_weight=weight)
    np.testing.assert_array_equal(model.preprocessor_.data_max_, X[1::2].max(0))


def test_rows_that_are_held_out_are_not_seen(raw):
    X, y = raw
    seen = []

    class Recorder(StandardScaler):
        def fit(self, X, y=None, sample_weight=None):
            seen.append(len(X))
            return super().fit(X, y, sample_weight)

    JacobianRegularizedClassifier(
        preprocessor=Recorder(), early_stopping=True, validation_fraction=0.2, **SMALL
    ).fit(X, y)
    assert seen == [120]


def test_the_users_estimator_in_a_frozen_one_is_left_alone(raw):
    scaler = StandardScaler().fit(raw[0])
    before = pickle.dumps(scaler)
    model = JacobianRegularizedClassifier(preprocessor=FrozenEstimator(scaler), **SMALL)
    model.fit(*raw, sample_weight=np.arange(150))
    assert pickle.dumps(scaler) == before


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_going_on_keeps_the_preprocessor(Classifier, raw):
    X, y = raw
    model = Classifier(preprocessor=StandardScaler(), warm_start=True, **SMALL).fit(X, y)
    first = model.preprocessor_
    assert model.fit(X[::2], y[::2]).preprocessor_ is first
    model.set_params(preprocessor=MinMaxScaler())
    with pytest.raises(
        ValueError, match=r"Got preprocessor=MinMaxScaler\(\), but expected Standard"
    ):
        model.fit(X[::2], y[::2])
    model.set_params(preprocessor=StandardScaler(), preprocessor__with_mean=False)
    with pytest.raises(ValueError, match="Got preprocessor__with_mean=False, but expected True"):
        model.fit(X, y)
    online = Classifier(preprocessor=StandardScaler(), **SMALL)
    online.partial_fit(X[::2], y[::2]).partial_fit(X[1::2], y[1::2])
    np.testing.assert_allclose(online.preprocessor_.mean_, X[::2].mean(0))
    model.set_params(warm_start=False, preprocessor=MinMaxScaler())
    assert isinstance(model.fit(X, y).preprocessor_, MinMaxScaler)


def test_what_a_preprocessor_shows_shortened_may_not_change_either(raw):
    steps = [(f"scaler{i}", StandardScaler()) for i in range(40)]
    model = JacobianRegularizedClassifier(preprocessor=Pipeline(steps), warm_start=True, **SMALL)
    model = pickle.loads(pickle.dumps(model.fit(*raw))).fit(*raw)
    shown = repr(model.preprocessor)
    model.set_params(preprocessor__scaler35__with_std=False)
    assert repr(model.preprocessor) == shown
    with pytest.raises(ValueError, match="Got preprocessor__scaler35__with_std=False"):
        model.fit(*raw)


@every_preprocessor
def test_a_pickle_goes_on_bit_identically_and_holds_no_torch_objects(preprocessor, raw):
    model = AdversarialClassifier(
        preprocessor=preprocessor, n_steps=2, eps=0.01, warm_start=True, **SMALL
    ).fit(*raw)
    blob = pickle.dumps(model)
    names = {
        (argument or "").split(" ")[0]
        for _, argument, _ in pickletools.genops(blob)
        if isinstance(argument, str)
    }
    assert not {name for name in names if name.startswith(("torch", "skorch"))}
    loaded = pickle.loads(blob)
    np.testing.assert_array_equal(loaded.predict_proba(raw[0]), model.predict_proba(raw[0]))
    first, second = model.fit(*raw), loaded.fit(*raw)
    np.testing.assert_array_equal(first.predict_proba(raw[0]), second.predict_proba(raw[0]))


@every_preprocessor
def test_nothing_of_the_preprocessor_is_trained(preprocessor, raw):
    fits = [
        AdversarialClassifier(
            preprocessor=preprocessor, weight_decay=0.1, eps=0, optimizer=optimizer, **SMALL
        ).fit(*raw)
        for optimizer in ("adam", "sgd")
    ]
    for model in fits:
        *layers, inner = model.module_
        expected = model.preprocessor_.transform(raw[0])
        np.testing.assert_allclose(
            logits_of(nn.Sequential(*layers), raw[0]), expected, rtol=1e-9, atol=1e-9
        )
        assert not list(nn.Sequential(*layers).parameters())
        assert sum(p.numel() for p in inner.parameters()) == model.n_parameters_
        assert len(model.module_.state_dict()) == len(inner.state_dict())


# --- scikit-learn ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*array API.*:UserWarning")
@pytest.mark.filterwarnings("ignore:Got eps=0.1, at which no feature can change")
@parametrize_with_checks(
    [AdversarialClassifier(preprocessor=StandardScaler(), method="fgsm", max_epochs=20)]
)
def test_scikit_learns_own_checks_pass(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*array API.*:UserWarning")
@parametrize_with_checks(
    [JacobianRegularizedClassifier(preprocessor=StandardScaler(), max_epochs=20)]
)
def test_scikit_learns_own_checks_pass_without_attacks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_the_check_of_parameters_passes(Classifier):
    model = Classifier(max_epochs=2, preprocessor=StandardScaler())
    check_param_validation(Classifier.__name__, model)


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_a_grid_may_hold_preprocessors_and_their_parameters(Classifier, raw):
    grid = [
        {"preprocessor": [StandardScaler(), MinMaxScaler(), None]},
        {"preprocessor": [StandardScaler()], "preprocessor__with_mean": [True, False]},
    ]
    scoring = {"accuracy": "accuracy", "robust": RobustScorer(eps=0.01, n_steps=2)}
    search = GridSearchCV(Classifier(**SMALL), grid, scoring=scoring, refit="accuracy", cv=2)
    search.fit(*raw)
    results = search.cv_results_
    assert (results["mean_test_robust"] <= results["mean_test_accuracy"]).all()
    assert len(set(results["mean_test_accuracy"])) > 1
    assert (results["mean_test_accuracy"][3] == results["mean_test_accuracy"][0]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weighted", [False, True])
def test_columns_are_chosen_by_name_or_by_index(weighted, raw):
    X, y = raw
    names = ["a", "b", "c", "d"]
    table = pd.DataFrame(X, columns=names)
    weight = np.linspace(1, 2, len(y)) if weighted else None
    fitted = []
    for columns, samples in ((["d", "a"], table), ([3, 0], table), ([3, 0], X)):
        scaler = make_column_transformer((StandardScaler(), columns), remainder="passthrough")
        model = JacobianRegularizedClassifier(preprocessor=scaler, **SMALL)
        model.fit(samples, y, sample_weight=weight)
        fitted.append(model.predict_proba(samples))
        RobustScorer(eps=0.01)(pickle.loads(pickle.dumps(model)), samples, y)
    np.testing.assert_array_equal(fitted[0], fitted[2])
    np.testing.assert_array_equal(fitted[1], fitted[2])


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_parameters_of_the_preprocessor_are_parameters(Classifier):
    model = Classifier(preprocessor=StandardScaler(), module__hidden_units=(3,))
    assert model.get_params()["preprocessor__with_mean"] is True
    assert "preprocessor__with_mean" not in model.get_params(deep=False)
    copy = clone(model).set_params(preprocessor__with_mean=False)
    assert copy.preprocessor.with_mean is False
    assert model.preprocessor.with_mean is True
    swapped = copy.set_params(preprocessor=MinMaxScaler(), preprocessor__clip=True)
    assert swapped.get_params()["preprocessor__clip"] is True
    assert swapped.get_params()["module__hidden_units"] == (3,)
    with pytest.raises(ValueError, match="Invalid parameter 'with_means'"):
        model.set_params(preprocessor__with_means=False)


def test_data_frames_and_cross_validation(raw):
    X = pd.DataFrame(raw[0], columns=list("abcd"))
    model = JacobianRegularizedClassifier(preprocessor=StandardScaler(), **SMALL)
    fitted = clone(model).fit(X, raw[1])
    assert fitted.feature_names_in_.tolist() == list("abcd")
    # The mean of an array in Fortran order is summed in another order.
    np.testing.assert_allclose(
        fitted.predict_proba(X), clone(model).fit(*raw).predict_proba(raw[0]), rtol=1e-9
    )
    result = cross_validate(model, X, raw[1], cv=2, return_estimator=True)
    means = [fold.preprocessor_.mean_ for fold in result["estimator"]]
    assert not np.array_equal(*means)


# --- bad input ------------------------------------------------------------------------------


class Unknown(TransformerMixin, BaseEstimator):
    """A transformer that as_torch does not know."""

    def fit(self, X, y=None):
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X):
        return X


class Fails(Callback):
    def on_train_begin(self, net, **kwargs):
        raise AssertionError("training began")


@pytest.mark.parametrize(
    "preprocessor",
    [StandardScaler, "standard", 3, LogisticRegression(), np.exp],
)
@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_what_is_no_transformer_is_refused(Classifier, preprocessor, raw):
    expected = (
        r"'preprocessor' parameter of \w+ must be a transformer that as_torch knows .*, not its "
        r"class\) or None. Got .* instead"
    )
    with pytest.raises(ValueError, match=expected):
        Classifier(preprocessor=preprocessor, callbacks=[Fails()]).fit(*raw)


@pytest.mark.parametrize("preprocessor", [Unknown(), make_pipeline(StandardScaler(), Unknown())])
@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_a_transformer_that_as_torch_does_not_know_is_named(Classifier, preprocessor, raw):
    model = Classifier(preprocessor=preprocessor, callbacks=[Fails()])
    expected = r"(?s)Got preprocessor=.*Unknown.*, but expected None or a transformer that as_torch"
    with pytest.raises(NotDifferentiableError, match=expected):
        model.fit(*raw)


def test_a_failed_fit_keeps_the_network_before_it(raw):
    model = JacobianRegularizedClassifier(preprocessor=StandardScaler(), **SMALL).fit(*raw)
    before = model.predict_proba(raw[0])
    with pytest.raises(NotDifferentiableError):
        model.set_params(preprocessor=Unknown()).fit(*raw)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(raw[0]), before)


def test_images_have_no_preprocessor():
    X, y = np.zeros((10, 1, 8, 8)), np.arange(10) % 2
    model = JacobianRegularizedClassifier("cnn", preprocessor=StandardScaler())
    message = r"Got preprocessor=StandardScaler\(\) and X with samples of shape \(1, 8, 8\), but"
    with pytest.raises(ValueError, match=message):
        model.fit(X, y)


TEXT = make_column_transformer((OneHotEncoder(), ["job"]), (StandardScaler(), ["age"]))


@pytest.mark.parametrize(
    ("preprocessor", "X"),
    [
        (SimpleImputer(), np.array([[1.0, np.nan]] * 10)),
        (SimpleImputer(), pd.DataFrame({"age": [1, None] * 5}).convert_dtypes()),
        (TEXT, pd.DataFrame({"job": ["nurse", "pilot"] * 5, "age": 1.0})),
    ],
)
@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_imputers_and_encoders_are_led_to_the_pipeline(Classifier, preprocessor, X):
    message = (
        rf"(?s)Got preprocessor={type(preprocessor).__name__}\(.*\) and X with missing values "
        r"\(NaN\) or columns that hold no numbers, but a preprocessor expected .* in a Pipeline"
    )
    with pytest.raises(ValueError, match=message):
        Classifier(preprocessor=preprocessor, callbacks=[Fails()]).fit(X, np.arange(10) % 2)


def test_other_faults_of_x_keep_their_messages(raw):
    model = JacobianRegularizedClassifier(preprocessor=StandardScaler())
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        model.fit(raw[0][:, 0], raw[1])
    with pytest.raises(ValueError, match="contains infinity"):
        model.fit(np.where(raw[0] > 0, np.inf, raw[0]), raw[1])


# --- transformers of a user's ---------------------------------------------------------------


class Embedding(TransformerMixin, BaseEstimator):
    """A transformer that is a torch network with dropout and normalization."""

    def fit(self, X, y=None):
        self.n_features_in_ = X.shape[1]
        self.net_ = nn.Sequential(
            nn.Linear(4, 6, dtype=torch.float32), nn.BatchNorm1d(6), nn.Dropout(0.9)
        )
        with torch.no_grad():
            self.net_[0].weight.copy_(torch.linspace(-1, 1, 24).reshape(6, 4))
            self.net_[0].bias.zero_()
        return self

    def transform(self, X):
        with torch.no_grad():
            return self.net_.eval()(torch.as_tensor(X, dtype=torch.float32)).numpy()


def test_a_network_as_preprocessor_is_frozen_and_left_alone(raw):
    X, y = StandardScaler().fit_transform(raw[0]), raw[1]
    as_torch.register(Embedding, lambda embedding: embedding.net_.train())
    model = JacobianRegularizedClassifier(preprocessor=Embedding(), **SMALL).fit(X, y)
    theirs = model.preprocessor_.net_
    assert theirs[0].weight.dtype == torch.float32
    assert all(p.requires_grad for p in theirs.parameters())
    assert int(theirs[1].num_batches_tracked) == 0
    assert model.n_parameters_ == 6 * 16 + 16 + 16 * 3 + 3
    features = model.module_[0].train()(torch.as_tensor(X)).numpy()
    np.testing.assert_allclose(features, model.preprocessor_.transform(X), rtol=1e-5, atol=1e-6)


# --- the closed form of the Jacobian --------------------------------------------------------


@pytest.mark.parametrize("preprocessor", IN_CLOSED_FORM.values(), ids=IN_CLOSED_FORM)
def test_affine_preprocessors_keep_the_closed_form(preprocessor, raw):
    model = JacobianRegularizedClassifier(preprocessor=preprocessor, **SMALL).fit(*raw)
    assert chain_of(model.module_) is not None


def rescaled(*layers, n_features=5):
    def random(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(n_features, generator=generator, dtype=torch.float64) + 0.2

    return nn.Sequential(Rescaling(random(0), random(1), random(2)), *layers).double()


RESCALED = {
    "dense": lambda: rescaled(nn.Flatten(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
    "relu": lambda: rescaled(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    ),
    "linear": lambda: rescaled(nn.Linear(5, 3)),
    "twice": lambda: rescaled(rescaled(nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3))),
    "alone": lambda: rescaled(n_features=3),
    "only a shift": lambda: nn.Sequential(
        Rescaling(before=torch.ones(3)), nn.Linear(3, 3)
    ).double(),
    "images": lambda: rescaled(
        *(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
        n_features=6,
    ),
    # Of many rows, the Gram matrix of the first weight takes the place of the product.
    "wide": lambda: rescaled(nn.Linear(40, 4), nn.Tanh(), nn.Linear(4, 3), n_features=40),
}
every_rescaled = pytest.mark.parametrize("name", RESCALED)


def values_and_gradients(net, X, y, engine, **options):
    weight = torch.linspace(0.5, 2, len(X), dtype=X.dtype)
    values = jacobian_norm(
        net,
        X,
        y,
        engine=engine,
        create_graph=True,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        return values, ()
    return values, torch.autograd.grad(weight @ values, parameters, allow_unused=True)


@every_rescaled
@pytest.mark.parametrize("n_samples", [1, 2, 9, 60])
@pytest.mark.parametrize("norm", JACOBIAN_NORMS)
def test_the_closed_form_of_rescaled_networks_is_right(name, n_samples, norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = RESCALED[name]()
    assert chain_of(net) is not None
    n_features = {"images": 6, "wide": 40, "alone": 3, "only a shift": 3}.get(name, 5)
    X = torch.randn(
        n_samples, n_features, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    y = torch.arange(n_samples) % 3
    values, gradients = values_and_gradients(net, X, y, "closed_form", norm=norm)
    expected, expected_gradients = values_and_gradients(net, X, y, "loop", norm=norm)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-11)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        mine, theirs = (torch.zeros(()) if g is None else g for g in (mine, theirs))
        difference = (mine - theirs).abs().max()
        assert difference <= 1e-9 * (1 + theirs.abs().max())


def test_of_many_samples_the_scale_goes_into_the_first_weight():
    layers = chain_of(RESCALED["wide"]())
    X = torch.zeros(60, 40, dtype=torch.float64)
    assert gram_pays(60 * 3, 4, 40)
    assert type(Stack(layers, X).linearize().maps[-1]) is Dense
    assert type(Stack(layers, X[:1]).linearize().maps[-1]) is ChannelScale
    assert type(Stack(layers, X).linearize(torch.tensor([7])).maps[-1]) is ChannelScale


@every_rescaled
def test_the_stack_runs_forward_as_the_network(name):
    net = RESCALED[name]()
    n_features = {"images": 6, "wide": 40, "alone": 3, "only a shift": 3}.get(name, 5)
    X = torch.randn(4, n_features, dtype=torch.float64)
    torch.testing.assert_close(Stack(chain_of(net), X).logits, net(X))


def test_constraints_hold_while_training_in_raw_units():
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    X = X[["mean radius", "mean texture", "mean area"]]
    shared = {
        "preprocessor": StandardScaler(),
        "norm": "linf",
        "eps": 0.5,
        "max_epochs": 5,
        "random_state": 0,
    }
    fixed = FeatureConstraints(immutable=["mean radius", "mean area"], scale="std", bounds="train")
    model = AdversarialClassifier(**shared, constraints=fixed).fit(X, y)
    free = AdversarialClassifier(**shared, feature_scale="std").fit(X, y)
    scorer = RobustScorer(eps=0.5, constraints=clone(fixed).fit(X))
    assert scorer(model, X, y) > scorer(free, X, y) - 0.02
    values = torch.tensor(X.to_numpy())
    X_adv = model._make_attack(values)(model.module_, values, torch.tensor(y.to_numpy()))
    moved = (X_adv.numpy() != X.to_numpy()).any(axis=0)
    assert moved.tolist() == [False, True, False]
    assert (X_adv.numpy()[:, 1] <= X["mean texture"].max()).all()
    plain = AdversarialClassifier(**shared, feature_scale="std", constraints=fixed)
    with pytest.raises(ValueError, match="Got feature_scale='std' and FeatureConstraints with"):
        plain.fit(X, y)
