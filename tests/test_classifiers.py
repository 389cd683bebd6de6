import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits, load_iris, make_classification
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    cross_validate,
    learning_curve,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.estimator_checks import (
    _NotAnArray,
    check_dataframe_column_names_consistency,
    check_param_validation,
    parametrize_with_checks,
)
from skorch.callbacks import Callback, EarlyStopping, EpochScoring, LRScheduler, ProgressBar
from torch import nn

from skjacobian import (
    AdversarialClassifier,
    FeatureConstraints,
    JacobianRegularizedClassifier,
    RobustScorer,
)
from skjacobian.differentiable import as_torch
from skjacobian.exceptions import TrainingDivergedError
from skjacobian.modules import MODULES

CLASSIFIERS = [JacobianRegularizedClassifier, AdversarialClassifier]
SMALL = {"module__hidden_units": (16,), "max_epochs": 3, "random_state": 0}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:400] / 16, y[:400]


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    return StandardScaler().fit_transform(X), y


class Tower(nn.Module):
    """A module of a user's, which names the sizes that it wants."""

    def __init__(self, n_features, n_classes, width=8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_features, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(width, n_classes),
        )

    def forward(self, X):
        return self.layers(X)


# --- scikit-learn ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*array API.*:UserWarning")
# Of DataFrames of whole numbers.
@pytest.mark.filterwarnings("ignore:Got eps=0.1, at which no feature can change")
@parametrize_with_checks(
    [
        JacobianRegularizedClassifier(max_epochs=12),
        AdversarialClassifier(max_epochs=12, n_steps=2),
    ]
)
def test_scikit_learns_own_checks_pass(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*array API.*:UserWarning")
@pytest.mark.filterwarnings("ignore:Got eps=0.1, at which no feature can change")
@parametrize_with_checks([JacobianRegularizedClassifier(), AdversarialClassifier(n_steps=2)])
def test_scikit_learns_own_checks_pass_of_what_trains_as_long_as_by_default(estimator, check):
    check(estimator)


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
@pytest.mark.parametrize(
    "check", [check_param_validation, check_dataframe_column_names_consistency]
)
def test_checks_that_scikit_learn_keeps_for_itself_pass(Classifier, check):
    check(Classifier.__name__, Classifier(max_epochs=2))


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_works_in_grid_search_over_a_pipeline(Classifier, iris):
    name = Classifier.__name__.lower()
    strengths = (
        {"lam": [0, 0.1]} if Classifier is JacobianRegularizedClassifier else {"eps": [0, 0.1]}
    )
    grid = {f"{name}__{key}": value for key, value in strengths.items()}
    grid[f"{name}__module__hidden_units"] = [(8,), (4,)]
    pipe = make_pipeline(MinMaxScaler(), Classifier(max_epochs=3, random_state=0))
    scoring = {"accuracy": "accuracy", "robust": RobustScorer(eps=0.1, n_steps=3)}
    search = GridSearchCV(pipe, grid, scoring=scoring, refit="robust", cv=2)
    search.fit(*iris)
    assert (
        search.cv_results_["mean_test_robust"] <= search.cv_results_["mean_test_accuracy"]
    ).all()
    units = search.best_params_[f"{name}__module__hidden_units"]
    assert search.best_estimator_[-1].module_[1].out_features == units[0]


def test_works_in_halving_search_over_epochs(iris):
    search = HalvingGridSearchCV(
        JacobianRegularizedClassifier(random_state=0),
        {"lam": [0, 0.01, 0.1]},
        resource="max_epochs",
        max_resources=9,
        min_resources=1,
        cv=2,
    )
    assert search.fit(*iris).score(*iris) > 0.5


def test_works_in_cross_validate_calibration_curves_and_importance(iris):
    model = JacobianRegularizedClassifier(**SMALL)
    X, y = iris
    result = cross_validate(model, X, y, cv=2, return_estimator=True)
    assert all(hasattr(fitted, "net_") for fitted in result["estimator"])
    calibrated = CalibratedClassifierCV(model, cv=2).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(1), 1, rtol=1e-6)
    learning_curve(model, X, y, cv=2, train_sizes=[0.5, 1.0], shuffle=True, random_state=0)
    importance = permutation_importance(model.fit(X, y), X, y, n_repeats=2, random_state=0)
    assert importance.importances_mean.shape == (4,)


def test_sample_weight_is_routed(iris):
    X, y = iris
    weight = np.where(y == 0, 0.0, 1.0)
    with sklearn.config_context(enable_metadata_routing=True):
        model = JacobianRegularizedClassifier(**SMALL).set_fit_request(sample_weight=True)
        result = cross_validate(
            make_pipeline(MinMaxScaler(), model),
            X,
            y,
            cv=2,
            scoring=get_scorer("accuracy").set_score_request(sample_weight=False),
            params={"sample_weight": weight},
            return_estimator=True,
            return_indices=True,
        )
        for fitted, train in zip(result["estimator"], result["indices"]["train"], strict=True):
            values = MinMaxScaler().fit_transform(X[train])
            alone = clone(model).fit(values, y[train], weight[train])
            np.testing.assert_array_equal(fitted[-1].predict_proba(X), alone.predict_proba(X))


def test_a_module_defined_in_main_survives_the_trip_to_worker_processes():
    script = """
        import torch
        from sklearn.datasets import load_iris
        from sklearn.model_selection import GridSearchCV
        from torch import nn
        from skjacobian import JacobianRegularizedClassifier

        class Net(nn.Module):
            def __init__(self, n_features, n_classes):
                super().__init__()
                self.linear = nn.Linear(n_features, n_classes)
            def forward(self, X):
                return self.linear(X)

        if __name__ == "__main__":
            X, y = load_iris(return_X_y=True)
            model = JacobianRegularizedClassifier(Net, max_epochs=2, random_state=0)
            fold = [(range(0, 150, 2), range(1, 150, 2))]  # one worker is waited for, not two
            search = GridSearchCV(model, {"lam": [0.1]}, cv=fold, n_jobs=2).fit(X, y)
            print(type(search.best_estimator_.module_).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "Net"


@pytest.mark.parametrize(
    "labels", [np.array(["cat", "dog", "eel"]), np.array([7, -3, 40]), np.array([0.0, 1.0, 2.0])]
)
def test_labels_of_any_kind_come_back(labels, iris):
    X, y = iris
    model = JacobianRegularizedClassifier(**SMALL).fit(X, labels[y])
    assert set(model.predict(X)) <= set(labels)
    assert model.classes_.tolist() == sorted(labels.tolist())


def test_log_probabilities_are_finite_where_probabilities_vanish(iris):
    X, y = iris
    model = JacobianRegularizedClassifier(**SMALL).fit(X, y)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X))
    far = 1e5 * X[:5]
    assert (model.predict_proba(far) == 0).any()
    assert np.isfinite(model.predict_log_proba(far)).all()


def test_two_classes_have_one_decision_value(iris):
    X, y = iris[0][:100], iris[1][:100]
    model = JacobianRegularizedClassifier(**SMALL).fit(X, y)
    decision, probabilities = model.decision_function(X), model.predict_proba(X)
    assert decision.shape == (100,)
    assert probabilities.shape == (100, 2)
    np.testing.assert_allclose(probabilities[:, 1], 1 / (1 + np.exp(-decision)), rtol=1e-6)


def test_data_frames_name_the_features(iris):
    X = pd.DataFrame(iris[0], columns=list("abcd"))
    model = JacobianRegularizedClassifier(
        **SMALL, early_stopping=True, scoring=RobustScorer(n_steps=2)
    ).fit(X, iris[1])
    assert model.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(X[list("abdc")])


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_images_and_flat_images_give_the_same_network(Classifier, digits):
    X, y = digits
    common = {"max_epochs": 1, "random_state": 0, "module__channels": (2,)}
    flat = Classifier("cnn", module__image_shape=(8, 8), **common).fit(X, y)
    images = X.reshape(-1, 1, 8, 8)
    square = Classifier("cnn", **common).fit(images, y)
    np.testing.assert_allclose(square.predict_proba(images), flat.predict_proba(X), rtol=1e-9)
    with pytest.raises(ValueError, match=r"expected \(1, 8, 8\), as in fit"):
        square.predict(X.reshape(-1, 1, 4, 16))


# --- the same result twice ------------------------------------------------------------------


class Noisy(nn.Module):
    """Adds noise to its input, also when it is asked."""

    def __init__(self, n_features, n_classes):
        super().__init__()
        self.linear = nn.Linear(n_features, n_classes)

    def forward(self, X):
        return self.linear(X + torch.randn_like(X))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_the_global_state_plays_no_part_in_a_fit_of_a_module_that_draws_when_asked(
    Classifier, early_stopping, iris
):
    histories = []
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            model = Classifier(
                Noisy,
                preprocessor=StandardScaler(),
                early_stopping=early_stopping,
                max_epochs=5,
                random_state=0,
            ).fit(*iris)
            assert torch.equal(torch.get_rng_state(), before)
        histories.append([{**row, "dur": 0} for row in model.history_])
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    "model",
    [
        JacobianRegularizedClassifier(**SMALL),
        JacobianRegularizedClassifier(**SMALL, n_projections=1),
        JacobianRegularizedClassifier(**SMALL, norm="l1", penalty_samples=4),
        JacobianRegularizedClassifier(Tower, max_epochs=3, random_state=0),
        AdversarialClassifier(**SMALL, n_steps=2),
        AdversarialClassifier(**SMALL, method="trades", n_steps=2),
    ],
)
def test_equal_seeds_give_bit_equal_networks_and_leave_global_states_alone(model, iris):
    np.random.seed(5)  # noqa: NPY002
    torch_state = torch.get_rng_state()
    first = clone(model).fit(*iris).predict_proba(iris[0])
    torch.manual_seed(17)
    second = clone(model).fit(*iris).predict_proba(iris[0])
    np.testing.assert_array_equal(first, second)
    other = clone(model).set_params(random_state=1).fit(*iris).predict_proba(iris[0])
    assert not np.array_equal(first, other)
    torch.set_rng_state(torch_state)
    clone(model).set_params(random_state=None).fit(*iris)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.rand() == np.random.RandomState(5).rand()  # noqa: NPY002


@pytest.mark.parametrize("module", ["mlp", Tower])
def test_the_number_of_jobs_does_not_change_the_result(module, iris):
    model = JacobianRegularizedClassifier(module, max_epochs=2, random_state=0)
    scorer = RobustScorer(eps=0.2, n_steps=3)
    scores = [
        cross_validate(model, *iris, scoring=scorer, cv=3, n_jobs=n_jobs, return_estimator=True)
        for n_jobs in (1, 2)
    ]
    np.testing.assert_array_equal(scores[0]["test_score"], scores[1]["test_score"])
    for one, two in zip(scores[0]["estimator"], scores[1]["estimator"], strict=True):
        np.testing.assert_array_equal(one.predict_proba(iris[0]), two.predict_proba(iris[0]))


def test_threads_do_not_disturb_each_other(iris):
    model = JacobianRegularizedClassifier(Tower, max_epochs=5, random_state=0)
    alone = clone(model).fit(*iris).predict_proba(iris[0])
    results = {}

    def run(k):
        results[k] = clone(model).fit(*iris).predict_proba(iris[0])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(results[0], alone)
    np.testing.assert_array_equal(results[1], alone)


# --- what is minimized ----------------------------------------------------------------------


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_strength_zero_is_plain_training(Classifier, iris):
    plain = JacobianRegularizedClassifier(lam=0, **SMALL).fit(*iris)
    if Classifier is AdversarialClassifier:
        others = [Classifier(eps=0, method=m, **SMALL) for m in ("fgsm", "pgd", "trades")]
    else:
        others = [Classifier(lam=np.float64(0), norm=norm, **SMALL) for norm in ("l1", "l21")]
    for other in others:
        np.testing.assert_array_equal(
            plain.predict_proba(iris[0]), other.fit(*iris).predict_proba(iris[0])
        )


@pytest.mark.filterwarnings("ignore:.*has learned nothing")  # of the strongest
def test_a_stronger_penalty_gives_a_smaller_jacobian(digits):
    X, y = digits
    for norm in ("l2", "l1", "l21"):
        norms = [
            JacobianRegularizedClassifier(lam=lam, norm=norm, **SMALL)
            .set_params(max_epochs=20)
            .fit(X, y)
            .jacobian_norm(X, norm=norm)
            .mean()
            for lam in (0, 1e-3, 1e-1)
        ]
        assert norms[0] > norms[1] > norms[2]


def test_adversarial_training_beats_plain_training_under_attack(digits):
    X, y = digits
    common = {**SMALL, "max_epochs": 30, "module__hidden_units": (64,)}
    scorer = RobustScorer(eps=0.1, bounds=(0, 1), n_steps=10)
    plain = scorer(JacobianRegularizedClassifier(lam=0, **common).fit(X, y), X, y)
    for method in ("fgsm", "pgd", "trades"):
        model = AdversarialClassifier(method=method, bounds=(0, 1), n_steps=5, **common)
        assert scorer(model.fit(X, y), X, y) > plain + 0.1


def test_a_penalty_on_top_of_adversarial_training_shrinks_the_jacobian(digits):
    X, y = digits
    norms = [
        AdversarialClassifier(
            lam=lam, penalty_norm="l1", method="fgsm", **{**SMALL, "max_epochs": 15}
        )
        .fit(X, y)
        .jacobian_norm(X, norm="l1")
        .mean()
        for lam in (0, 0.1)
    ]
    assert norms[1] < norms[0] / 2


def test_jacobian_norm_agrees_with_finite_differences(iris):
    model = JacobianRegularizedClassifier(**SMALL).fit(*iris)
    X, step = iris[0][:5], 1e-6
    logits = lambda X: model._logits(X)  # noqa: E731
    columns = [
        (logits(X + step * e) - logits(X - step * e)) / (2 * step) for e in np.eye(X.shape[1])
    ]
    J = np.stack(columns, axis=2)
    np.testing.assert_allclose(model.jacobian_norm(X), (J**2).sum((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(model.jacobian_norm(X, norm="l1"), abs(J).sum((1, 2)), rtol=1e-6)
    estimate = [model.jacobian_norm(X, n_projections=50, random_state=seed) for seed in range(20)]
    np.testing.assert_allclose(np.mean(estimate, 0), model.jacobian_norm(X), rtol=0.2)


def test_weights_act_like_repetition_in_a_grid_of_settings(iris):
    X, y = iris[0][::8], iris[1][::8]
    weight = np.arange(len(X)) % 3
    repeated = np.repeat(np.arange(len(X)), weight)
    for model in (
        JacobianRegularizedClassifier(**SMALL, norm="l1"),
        JacobianRegularizedClassifier(**SMALL, class_weight="balanced"),
        AdversarialClassifier(**SMALL, method="trades"),
        AdversarialClassifier(**SMALL, method="fgsm", norm="l2", lam=0.01),
    ):
        weighted = clone(model).fit(X, y, sample_weight=weight)
        copied = clone(model).fit(X[repeated], y[repeated])
        np.testing.assert_allclose(
            weighted.predict_proba(X), copied.predict_proba(X), rtol=1e-7, atol=1e-9
        )


# --- pickling and going on ------------------------------------------------------------------


def test_a_pickle_holds_arrays_and_no_torch_objects(iris):
    model = JacobianRegularizedClassifier(**SMALL).fit(*iris)
    blob = pickle.dumps(model)
    names = {
        (opcode_arg or "").split(" ")[0]
        for opcode, opcode_arg, _ in __import__("pickletools").genops(blob)
        if isinstance(opcode_arg, str)
    }
    assert not {name for name in names if name.startswith(("torch", "skorch"))}
    loaded = pickle.loads(blob)
    np.testing.assert_array_equal(loaded.predict_proba(iris[0]), model.predict_proba(iris[0]))
    assert loaded.history_ == model.history_


class Shuffled(nn.Module):
    """A network that draws from numpy's generator, and remembers what as an attribute."""

    def __init__(self, n_features, n_classes):
        super().__init__()
        self.order = np.random.permutation(n_features)  # noqa: NPY002
        self.head = nn.Linear(n_features, n_classes)

    def forward(self, X):
        return self.head(X[:, self.order] * torch.arange(1, 1 + X.shape[1]))


def test_what_a_module_draws_from_numpy_is_that_of_the_seed_and_comes_back(iris):
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, other = (
        JacobianRegularizedClassifier(Shuffled, max_epochs=1, random_state=0).fit(*iris)
        for _ in range(2)
    )
    for again in (other, pickle.loads(pickle.dumps(one))):
        np.testing.assert_array_equal(one.predict_proba(iris[0]), again.predict_proba(iris[0]))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


class Remembering(nn.Module):
    """A network that keeps a tensor made in one call for the next."""

    def __init__(self, n_features, n_classes):
        super().__init__()
        self.head = nn.Linear(n_features, n_classes)
        self.kept = {}

    def forward(self, X):
        mask = self.kept.setdefault(len(X), torch.ones(X.shape[1], dtype=X.dtype))
        return self.head(X * mask)


def test_a_module_may_keep_tensors_between_predicting_and_training(iris):
    model = JacobianRegularizedClassifier(Remembering, max_epochs=1, random_state=0).fit(*iris)
    model.predict(iris[0][:7])
    model.partial_fit(iris[0][:7], iris[1][:7])
    assert np.isfinite(model.jacobian_norm(iris[0][:7])).all()


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine"])
@pytest.mark.parametrize("module", ["mlp", Tower])
def test_a_pickled_half_trained_model_goes_on_bit_identically(module, lr_schedule, iris):
    model = AdversarialClassifier(
        module, max_epochs=2, n_steps=2, warm_start=True, random_state=0, lr_schedule=lr_schedule
    ).fit(*iris)
    copied = pickle.loads(pickle.dumps(model))
    first, second = model.fit(*iris), copied.fit(*iris)
    np.testing.assert_array_equal(first.predict_proba(iris[0]), second.predict_proba(iris[0]))
    assert [row["train_loss"] for row in first.history_] == [
        row["train_loss"] for row in second.history_
    ]
    assert len(second.history_) == 4


class Transposed(nn.Sequential):
    """A layer whose weight lies in memory column by column."""

    def __init__(self, n_features, n_classes):
        layer = nn.Linear(n_features, n_classes)
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
        super().__init__(layer)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", torch.optim.NAdam])
def test_a_pickle_keeps_the_averages_of_weights_of_any_layout(optimizer, iris):
    momentum = {"optimizer__momentum": 0.9} if optimizer == "sgd" else {}
    iris = iris[0].astype(np.float64), iris[1]
    model = JacobianRegularizedClassifier(
        Transposed, max_epochs=3, random_state=0, optimizer=optimizer, **momentum
    )
    copied = pickle.loads(pickle.dumps(model.fit(*iris)))
    first, second = model.partial_fit(*iris), copied.partial_fit(*iris)
    np.testing.assert_array_equal(first.predict_proba(iris[0]), second.predict_proba(iris[0]))


@pytest.mark.parametrize("mmap_mode", ["r", "r+"])
def test_training_on_with_a_memory_mapped_model_leaves_the_file_alone(mmap_mode, iris, tmp_path):
    model = JacobianRegularizedClassifier(**SMALL).fit(*iris)
    file = tmp_path / "model.joblib"
    joblib.dump(model, file)
    saved = file.read_bytes()
    trained = joblib.load(file, mmap_mode=mmap_mode).partial_fit(*iris)
    assert file.read_bytes() == saved
    expected = model.partial_fit(*iris).predict_proba(iris[0])
    np.testing.assert_array_equal(trained.predict_proba(iris[0]), expected)


def test_a_class_of_weight_0_is_left_out(iris):
    X, y = iris
    weighted = JacobianRegularizedClassifier(**SMALL, class_weight={0: 0, 1: 1, 2: 1}, batch_size=8)
    weighted.fit(X, y)
    assert weighted.score(X[y != 0], y[y != 0]) > 0.5
    assert np.isfinite(weighted.predict_proba(X)).all()


@pytest.mark.parametrize(
    "weights", [{0: -1, 1: 1, 2: 1}, {0: np.nan, 1: 1, 2: 1}, {0: 0, 1: 0, 2: 0}]
)
def test_bad_class_weights_are_named(weights, iris):
    with pytest.raises(ValueError, match=r"Got class_weight=.* but expected non-negative finite"):
        JacobianRegularizedClassifier(**SMALL, class_weight=weights).fit(*iris)


def test_no_batch_at_all_is_an_error(iris):
    model = JacobianRegularizedClassifier(**SMALL, batch_size=200, iterator_train__drop_last=True)
    with pytest.raises(ValueError, match="Got batch_size=200, but expected at most 150"):
        model.fit(*iris)


def test_early_stopping_takes_what_is_an_array_by_its_method_alone(iris):
    X, y = iris
    early = JacobianRegularizedClassifier(**SMALL, early_stopping=True)
    given = clone(early).fit(_NotAnArray(X), y)
    np.testing.assert_array_equal(given.predict_proba(X), clone(early).fit(X, y).predict_proba(X))


def test_one_number_as_weight_goes_with_early_stopping(iris):
    model = JacobianRegularizedClassifier(**SMALL, early_stopping=True)
    whole, none = model.fit(*iris, sample_weight=2.0).history_, clone(model).fit(*iris).history_
    assert [row["valid_accuracy"] for row in whole] == [row["valid_accuracy"] for row in none]


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_epochs_one_by_one_are_epochs_together(Classifier, iris):
    together = Classifier(**{**SMALL, "lr_schedule": "constant"}).fit(*iris)
    single = Classifier(**SMALL)
    for _ in range(3):
        single.partial_fit(*iris)
    np.testing.assert_array_equal(together.predict_proba(iris[0]), single.predict_proba(iris[0]))


def test_partial_fit_learns_classes_that_come_later(iris):
    X, y = iris
    model = JacobianRegularizedClassifier(**SMALL)
    model.partial_fit(X[:50], y[:50], classes=[0, 1, 2])
    model.partial_fit(X[50:], y[50:])
    assert model.predict_proba(X).shape == (150, 3)
    with pytest.raises(ValueError, match=r"labels \[5\], but expected those in classes"):
        model.partial_fit(X, np.full(150, 5))


def test_what_was_fitted_on_cuda_loads_without_it(iris):
    model = JacobianRegularizedClassifier(**SMALL).fit(*iris)
    model._net_args["device"] = "cuda"
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(loaded.predict_proba(iris[0]), model.predict_proba(iris[0]))


# --- early stopping, callbacks, history -----------------------------------------------------


def test_early_stopping_restores_the_best_weights(digits):
    X, y = digits
    model = JacobianRegularizedClassifier(
        **{**SMALL, "max_epochs": 60},
        lr=0.02,
        lr_schedule="constant",
        early_stopping=True,
        n_iter_no_change=3,
        scoring=RobustScorer(eps=0.05, n_steps=3),
    ).fit(X, y)
    scores = [row["valid_score"] for row in model.history_]
    assert len(scores) < 60
    assert max(scores[-3:]) <= max(scores[:-3])
    again = clone(model).set_params(early_stopping=True).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), again.predict_proba(X))
    assert {"valid_accuracy", "valid_loss", "train_loss", "train_penalty"} <= set(model.history_[0])


def test_the_weights_of_samples_count_in_the_score_of_early_stopping(iris):
    X, y = iris
    weight = np.random.default_rng(0).random(len(y)) ** 8
    model = JacobianRegularizedClassifier(**SMALL, early_stopping=True, scoring="accuracy")
    model.fit(X, y, sample_weight=weight)
    for row in model.history_:
        assert row["valid_score"] == row["valid_accuracy"]
    assert model.fit(X, y).history_ != clone(model).fit(X, y, sample_weight=weight).history_
    # A scorer that knows no weights is asked without.
    unweighted = clone(model).set_params(scoring=lambda model, X, y: model.score(X, y))
    unweighted.fit(X, y, sample_weight=weight)


def test_training_that_a_callback_ends_within_an_epoch_has_scores_before_it(iris):
    class Stop(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == 3:
                raise KeyboardInterrupt

    params = {"early_stopping": True, "scoring": "accuracy", **SMALL, "max_epochs": 6}
    model = JacobianRegularizedClassifier(callbacks=[Stop()], **params).fit(*iris)
    # Of the third epoch, which has not ended, nothing is left.
    assert ["valid_score" in row for row in model.history_] == [True, True]


def test_a_score_that_says_nothing_of_what_is_learned_is_warned_of(digits):
    X, y = digits
    raw_units = RobustScorer(eps=1.6, bounds=(0, 16), n_steps=2)  # X is behind a scaler
    model = JacobianRegularizedClassifier(**SMALL, early_stopping=True, scoring=raw_units)
    with pytest.warns(UserWarning, match=r"Got scoring=RobustScorer.* was 0 in every epoch"):
        model.fit(X, y)


@pytest.mark.parametrize("n_samples", [97, 129])
def test_batch_normalization_is_trained_whatever_the_number_of_samples(n_samples):
    def network(n_features, n_classes):
        hidden = (nn.Linear(n_features, 8), nn.BatchNorm1d(8), nn.ReLU())
        return nn.Sequential(*hidden, nn.Linear(8, n_classes))

    X = np.random.default_rng(0).normal(size=(n_samples, 3))
    model = JacobianRegularizedClassifier(network, max_epochs=2, random_state=0)
    model.fit(X, (X[:, 0] > 0).astype(int))
    assert model.history_[-1]["lr"] > 0
    assert len(model.history_) == 2


def test_the_loss_of_held_out_samples_is_weighted_as_that_of_training_is(iris):
    X, first = np.unique(iris[0], axis=0, return_index=True)
    y = iris[1][first]
    weight = np.random.default_rng(0).random(len(y)) ** 4
    held_out = {}

    class Keeper(Callback):
        def on_epoch_end(self, net, dataset_valid, **kwargs):
            held_out["X"], held_out["y"] = dataset_valid.X.numpy(), dataset_valid.y.numpy()

    model = JacobianRegularizedClassifier(
        **{**SMALL, "max_epochs": 1},
        early_stopping=True,
        validation_fraction=0.3,
        class_weight={0: 1, 1: 2, 2: 5},
        iterator_valid__batch_size=7,
        callbacks=[Keeper],
    ).fit(X, y, sample_weight=weight)
    rows = [int(np.flatnonzero((sample == X).all(1))[0]) for sample in held_out["X"]]
    losses = -model.predict_log_proba(X[rows])[np.arange(len(rows)), y[rows]]
    expected = np.average(losses, weights=weight[rows] * np.array([1, 2, 5])[y[rows]])
    assert model.history_[0]["valid_loss"] == pytest.approx(expected, rel=1e-5)


def test_skorch_callbacks_work_unmodified(iris):
    seen = []

    class Recorder(Callback):
        def on_batch_end(self, net, batch, training, loss, y_pred, **kwargs):
            seen.append((training, len(batch[0]), float(loss), y_pred.shape))

        def on_grad_computed(self, net, named_parameters, **kwargs):
            assert all(p.grad is not None for _, p in named_parameters)

    model = JacobianRegularizedClassifier(
        **SMALL,
        lr=1e-3,
        lr_schedule="constant",
        early_stopping=True,
        callbacks=[
            ("recorder", Recorder()),
            ("valid_f1", EpochScoring("f1_macro", lower_is_better=False)),
            ("train_acc", EpochScoring("accuracy", on_train=True, name="train_acc")),
            ("step", LRScheduler("StepLR", step_size=1, gamma=0.5)),
        ],
        callbacks__step__gamma=0.1,
    ).fit(*iris)
    assert {training for training, *_ in seen} == {True, False}
    assert {"f1_macro", "train_acc"} <= set(model.history_[0])
    assert model.net_.optimizer_.param_groups[0]["lr"] == pytest.approx(1e-6)


@pytest.mark.parametrize("scoring", ["accuracy", "roc_auc_ovr", "neg_log_loss"])
def test_callbacks_score_with_and_without_the_cache(scoring, iris):
    X, y = iris
    how = {"scoring": scoring, "lower_is_better": False}
    model = AdversarialClassifier(
        **SMALL,
        early_stopping=True,
        n_steps=2,
        callbacks=[
            ("cached", EpochScoring(**how, name="cached")),
            ("again", EpochScoring(**how, name="again", use_caching=False)),
            ("clean", EpochScoring(**how, name="clean", on_train=True, use_caching=False)),
        ],
    ).fit(X, y)
    for row in model.history_:
        assert row["again"] == pytest.approx(row["cached"])
        assert np.isfinite(row["clean"])
    np.testing.assert_array_equal(model.net_.predict(X), model.predict(X))


def test_a_scheduler_begins_anew_at_the_learning_rate_of_each_fit(iris):
    policies = {
        "StepLR": {"step_size": 2, "gamma": 0.5},
        "LambdaLR": {"lr_lambda": lambda epoch: 0.5**epoch},
        "CosineAnnealingLR": {"T_max": 3},
    }
    for policy, params in policies.items():
        schedule = LRScheduler(getattr(torch.optim.lr_scheduler, policy), **params)
        model = JacobianRegularizedClassifier(**SMALL, warm_start=True).fit(*iris)
        model.set_params(lr=0.5, lr_schedule="constant", callbacks=[schedule]).fit(*iris)
        model.set_params(lr=0.1).fit(*iris).partial_fit(*iris)
        rates = np.array([row["event_lr"] for row in model.history_[3:]])
        assert rates[0] == 0.5 > rates[2]
        np.testing.assert_allclose(rates[3:6], rates[:3] / 5)
        assert rates[6] == 0.1


def test_verbose_prints_a_table_with_the_penalty(iris, capsys):
    JacobianRegularizedClassifier(**SMALL, verbose=1).fit(*iris)
    assert "train_penalty" in capsys.readouterr().out
    JacobianRegularizedClassifier(**SMALL, callbacks=[ProgressBar(detect_notebook=False)]).fit(
        *iris
    )
    assert "0/5" in capsys.readouterr().err


def test_a_callback_may_stop_training_and_control_c_is_passed_on(iris):
    class Stop(Callback):
        def on_epoch_end(self, net, **kwargs):
            raise KeyboardInterrupt

    class ControlC(Callback):
        def on_epoch_end(self, net, **kwargs):
            press()

    def press():
        signal.raise_signal(signal.SIGINT)

    stopped = JacobianRegularizedClassifier(**SMALL, callbacks=[Stop()]).fit(*iris)
    assert len(stopped.history_) == 1
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            JacobianRegularizedClassifier(**SMALL, callbacks=[ControlC()]).fit(*iris)
    finally:
        signal.signal(signal.SIGINT, before)


def test_history_and_sizes_are_plain_numbers(iris):
    model = JacobianRegularizedClassifier(**SMALL).fit(*iris)
    assert [row["epoch"] for row in model.history_] == [1, 2, 3]
    assert all(type(value) in (int, float) for row in model.history_ for value in row.values())
    assert model.n_parameters_ == 4 * 16 + 16 + 16 * 3 + 3
    assert model.n_features_in_ == 4


# --- networks of a user's -------------------------------------------------------------------


def test_a_module_gets_the_sizes_that_its_signature_names(iris):
    model = JacobianRegularizedClassifier(Tower, module__width=5, max_epochs=2, random_state=0).fit(
        *iris
    )
    assert model.module_.layers[0].in_features == 4
    assert model.module_.layers[0].out_features == 5
    assert model.module_.layers[-1].out_features == 3
    function = JacobianRegularizedClassifier(
        lambda: nn.LazyLinear(3), max_epochs=2, random_state=0
    ).fit(*iris)
    assert function.module_.in_features == 4


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", torch.optim.RMSprop])
def test_optimizers_take_their_parameters(optimizer, iris):
    model = JacobianRegularizedClassifier(
        **SMALL, optimizer=optimizer, weight_decay=0.1, optimizer__maximize=False
    ).fit(*iris)
    assert model.net_.optimizer_.param_groups[0]["weight_decay"] == 0.1


def test_dtype_follows_the_data(iris):
    X, y = iris
    for dtype in (np.float32, np.float64):
        model = JacobianRegularizedClassifier(**SMALL).fit(X.astype(dtype), y)
        assert model.decision_function(X).dtype == dtype
    model = JacobianRegularizedClassifier(**SMALL, dtype="float32").fit(X, y)
    assert next(model.module_.parameters()).dtype == torch.float32


@settings(max_examples=15, deadline=None)
@given(lam=st.floats(0, 1), kind=st.sampled_from([np.float32, np.float64, np.array, float]))
def test_numbers_may_come_from_numpy(lam, kind):
    X, y = make_classification(n_samples=40, random_state=0)
    numbers = {"lam": kind(lam), "lr": kind(0.01), "max_epochs": np.array(1)}
    numbers |= {"penalty_samples": kind(0.5), "validation_fraction": kind(0.25)}
    numbers |= {"n_projections": np.int8(1), "early_stopping": np.bool_(True)}
    plain = {name: np.asarray(number).item() for name, number in numbers.items()}
    fits = [
        JacobianRegularizedClassifier(**params, batch_size=np.int64(16), random_state=0).fit(X, y)
        for params in (numbers, plain)
    ]
    np.testing.assert_array_equal(*(model.predict_proba(X) for model in fits))


# --- bad input ------------------------------------------------------------------------------

X_SMALL = np.linspace(0, 1, 40).reshape(10, 4)
Y_SMALL = np.arange(10) % 2


@pytest.mark.parametrize(
    ("Classifier", "params", "message"),
    [
        (JacobianRegularizedClassifier, {"lam": -1}, "'lam' parameter .* Got -1 instead"),
        (JacobianRegularizedClassifier, {"lam": np.nan}, "'lam' parameter .* Got nan instead"),
        (JacobianRegularizedClassifier, {"norm": "l3"}, "'norm' parameter .* Got 'l3' instead"),
        (
            JacobianRegularizedClassifier,
            {"norm": "linf"},
            "of linf attacks 'l1', 'l21', 'cross_lipschitz'[)].* Got 'linf' instead",
        ),
        (
            AdversarialClassifier,
            {"penalty_norm": "linf"},
            "of linf attacks 'l1', 'l21', 'cross_lipschitz'[)].* Got 'linf' instead",
        ),
        (
            JacobianRegularizedClassifier,
            {"norm": "l1", "n_projections": 2},
            "Got n_projections=2, but expected None with norm='l1'",
        ),
        (
            JacobianRegularizedClassifier,
            {"penalty_samples": 1.5},
            "'penalty_samples' parameter .* Got 1.5 instead",
        ),
        (
            JacobianRegularizedClassifier,
            {"interpolation": 0.6},
            "'interpolation' parameter .* Got 0.6 instead",
        ),
        (JacobianRegularizedClassifier, {"device": "tpu"}, "Got device='tpu', but expected"),
        (
            JacobianRegularizedClassifier,
            {"module__hidden_unit": (3,)},
            r"Got module__hidden_unit=\(3,\), .*did you mean 'hidden_units'",
        ),
        (
            JacobianRegularizedClassifier,
            {"callbacks__nothing__x": 1},
            "Got callbacks__nothing__x=1, but expected",
        ),
        (
            JacobianRegularizedClassifier,
            {"module": lambda: nn.Linear(4, 3)},
            r"has shape \(2, 3\), but expected logits of shape \(2, 2\)",
        ),
        (
            JacobianRegularizedClassifier,
            {"module": lambda: nn.Linear(3, 2)},
            r"Got module=.*, but expected one that takes torch.float64 of shape \(n_samples, 4\)",
        ),
        (
            JacobianRegularizedClassifier,
            {"module__hidden_units": (8, -8)},
            "Got hidden_units=-8, but expected an integer of at least 1",
        ),
        (
            AdversarialClassifier,
            {"optimizer__lr": 0.1},
            "Got optimizer__lr=0.1, but expected the learning rate as lr",
        ),
        (
            JacobianRegularizedClassifier,
            {"optimizer__beta": (0.9, 0.99)},
            r"Got optimizer__beta=.* a parameter of Adam \(did you mean 'betas'\?\)",
        ),
        (AdversarialClassifier, {"eps": -0.1}, "'eps' parameter .* Got -0.1 instead"),
        (AdversarialClassifier, {"eps": np.nan}, "'eps' parameter .* Got nan instead"),
        (
            AdversarialClassifier,
            {"bounds": (0, 0.5)},
            r"5 of 10 samples outside bounds=\(0.0, 0.5\), by up to 0.5",
        ),
        (AdversarialClassifier, {"bounds": (1, 0)}, r"Got bounds=\(1, 0\), but expected"),
        (AdversarialClassifier, {"bounds": ([0, 0], 1)}, "Got bounds with 2 values"),
        (AdversarialClassifier, {"feature_scale": [1, 2]}, "Got feature_scale with 2 values"),
        (
            AdversarialClassifier,
            {"feature_scale": [1, 2, 0, 1]},
            "Got feature_scale=.*, but expected positive finite numbers",
        ),
        (AdversarialClassifier, {"method": "pdg"}, "'method' parameter"),
    ],
)
def test_bad_parameters_are_named_before_training(Classifier, params, message):
    class Fails(Callback):
        def on_train_begin(self, net, **kwargs):
            raise AssertionError("training began")

    with pytest.raises(ValueError, match=message):
        Classifier(callbacks=[Fails()], **params).fit(X_SMALL, Y_SMALL)


def test_a_callback_that_would_do_nothing_or_fail_is_an_error():
    schedule = LRScheduler("StepLR", step_size=1)
    with pytest.raises(ValueError, match="Got an LRScheduler in callbacks and lr_schedule='cosine"):
        JacobianRegularizedClassifier(callbacks=[schedule]).fit(X_SMALL, Y_SMALL)
    stop = ("stop", EarlyStopping(patience=2))
    with pytest.raises(ValueError, match=r"Got EarlyStopping\(monitor='valid_loss'\) in callbacks"):
        JacobianRegularizedClassifier(callbacks=[stop]).fit(X_SMALL, Y_SMALL)
    held_out = {"early_stopping": True, "validation_fraction": 0.2}
    model = JacobianRegularizedClassifier(callbacks=[stop], **held_out, **SMALL)
    model.fit(X_SMALL, Y_SMALL)
    none = [("off", None), ["watch", Callback()], Callback]
    JacobianRegularizedClassifier(callbacks=none, **SMALL).fit(X_SMALL, Y_SMALL)

    class OwnScore(Callback):
        def on_epoch_end(self, net, **kwargs):
            net.history.record("valid_auc", 0.5)

    own = [OwnScore(), EarlyStopping(monitor="valid_auc", patience=1)]
    JacobianRegularizedClassifier(callbacks=own, **SMALL).fit(X_SMALL, Y_SMALL)
    with pytest.raises(
        ValueError, match=r"Got callbacks=.* expected a sequence of skorch callbacks"
    ):
        JacobianRegularizedClassifier(callbacks=[3]).fit(X_SMALL, Y_SMALL)


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_a_typo_in_a_parameter_raises_at_once(Classifier):
    with pytest.raises(TypeError, match=r"unexpected parameter 'lamb' \(did you mean 'lam'\?\)"):
        Classifier(lamb=1)
    with pytest.raises(ValueError, match="Invalid parameter 'lamb'"):
        Classifier().set_params(lamb=1)


def test_what_scorers_say_of_columns_is_led_to_constraints_where_there_are_any():
    with pytest.raises(TypeError, match=r"unexpected parameter 'mutable' \(here 'constraints'\)\."):
        AdversarialClassifier(mutable=["age"])
    with pytest.raises(TypeError, match=r"unexpected parameter 'mutable'(?!.*constraints)"):
        JacobianRegularizedClassifier(mutable=["age"])


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("hidden_layer_sizes", "module__hidden_units"),
        ("activation", "module__activation"),
        ("solver", "optimizer"),
        ("alpha", "weight_decay"),
        ("learning_rate", "lr"),
        ("learning_rate_init", "lr"),
        ("max_iter", "max_epochs"),
        ("hidden_units", "module__hidden_units"),
        ("image_shape", "module__image_shape"),
    ],
)
def test_names_of_scikit_learn_and_of_modules_are_led_to_those_here(Classifier, name, here):
    with pytest.raises(TypeError, match=rf"unexpected parameter '{name}' \(here '{here}'\)\."):
        Classifier(**{name: 1})
    module_params = {
        f"module__{name}" for Module in MODULES.values() for name in signature(Module).parameters
    }
    assert here in {*Classifier().get_params(), *module_params}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_an_error():
    with pytest.raises(ValueError, match=r"Got device='cuda', .* finds no CUDA device"):
        JacobianRegularizedClassifier(device="cuda").fit(X_SMALL, Y_SMALL)


def test_no_fit_goes_on_from_the_weights_of_another():
    net = nn.Linear(4, 2)
    model = JacobianRegularizedClassifier(lambda: net, max_epochs=1).fit(X_SMALL, Y_SMALL)
    with pytest.raises(ValueError, match="returned weights that it had returned before"):
        clone(model).fit(X_SMALL, Y_SMALL)
    model.partial_fit(X_SMALL, Y_SMALL)
    model.set_params(warm_start=True).fit(X_SMALL, Y_SMALL)


def test_a_module_instance_is_refused():
    with pytest.raises(TypeError, match="expected a class or a function that makes a module"):
        JacobianRegularizedClassifier(nn.Linear(4, 2)).fit(X_SMALL, Y_SMALL)


@pytest.mark.parametrize(
    ("share", "n", "said"),
    [
        (0.01, 150, "validation_fraction=0.01 of 150 samples of 3 classes, the smallest of 50"),
        (0.1, 101, "validation_fraction=0.1 of 101 samples of 3 classes, the smallest of 1"),
    ],
)
def test_too_few_samples_to_hold_out_are_an_error_that_says_so(iris, share, n, said):
    X, y = iris
    model = JacobianRegularizedClassifier(early_stopping=True, validation_fraction=share)
    with pytest.raises(ValueError, match=f"Got early_stopping=True and {said}, but expected"):
        model.fit(X[:n], y[:n])


# --- mistakes cost no work ---------------------------------------------------------------

MISTAKES = {
    "bounds": {"bounds": (0, 1)},
    "feature_scale": {"feature_scale": [1.0, 2.0]},
    "constraints": {"constraints": FeatureConstraints(immutable=["no such column"])},
    "callbacks": {"callbacks": ["no callback"]},
    "class_weight": {"class_weight": {0: -1.0}},
    "scoring": {"early_stopping": True, "scoring": "no such score"},
    "a scorer that fails": {"early_stopping": True, "scoring": lambda *args: None},
    "penalty": {"lam": 1.0, "penalty_norm": "l3"},
}


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_fit_that_raises_leaves_what_was_before(mistake, warm_start, iris):
    X, y = iris
    params = {"eps": 0.1, "n_steps": 2, "warm_start": warm_start, **SMALL}
    unfitted = AdversarialClassifier(**params).set_params(**mistake)
    with pytest.raises((ValueError, TypeError)):
        unfitted.fit(X, y)
    assert not [name for name in vars(unfitted) if name.endswith("_")]
    with pytest.raises(NotFittedError):
        unfitted.predict(X)

    fitted = AdversarialClassifier(**params).fit(X, y)
    before, n_epochs = fitted.predict_proba(X), fitted.n_iter_
    with pytest.raises((ValueError, TypeError)):
        fitted.set_params(**mistake).fit(X, y)
    np.testing.assert_array_equal(fitted.predict_proba(X), before)
    assert fitted.n_iter_ == n_epochs
    defaults = AdversarialClassifier(**params).get_params()
    fitted.set_params(**{name: defaults[name] for name in mistake}).fit(X, y)
    assert fitted.score(X, y) > 0.5


@pytest.mark.parametrize("hook", ["on_batch_end", "on_epoch_end"])
@pytest.mark.parametrize("train_on", ["fit", "partial_fit"])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_training_on_that_a_callback_fails_is_as_if_it_had_not_begun(
    classifier, train_on, hook, iris
):
    X, y = iris

    def fail(self, net, **kwargs):
        if net.history[-1].get("train_loss") or len(net.history[-1, "batches"]) == 2:
            raise OSError("no space left")

    class Failing(Callback):
        pass

    setattr(Failing, hook, fail)
    model = classifier(**SMALL, warm_start=True).fit(X, y)
    twin = pickle.loads(pickle.dumps(model))
    model.set_params(callbacks=[Failing()])
    with pytest.raises(OSError, match="no space left"):
        getattr(model, train_on)(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), twin.predict_proba(X))
    assert model.history_ == twin.history_
    # Order, optimizer and what is drawn at random, too.
    model.set_params(callbacks=None)
    for trained in (model, twin):
        getattr(trained, train_on)(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), twin.predict_proba(X))


def test_refitting_on_other_data_that_are_wrong_leaves_the_classes(iris):
    X, y = iris
    model = JacobianRegularizedClassifier(**SMALL).fit(X, y)
    before = model.predict_proba(X)
    with pytest.raises(ValueError, match="1 class"):
        model.fit(X[:, :2], np.zeros(len(X)))
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    np.testing.assert_array_equal(model.predict_proba(X), before)


# --- nothing learned ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shift", "factor"),
    [
        (JacobianRegularizedClassifier(random_state=0), 1e6, 1.0),
        (JacobianRegularizedClassifier(random_state=0), 0.0, 1e-6),
        (AdversarialClassifier(eps=8, random_state=0), 0.0, 1.0),
    ],
    ids=["far from 0", "tiny", "eps"],
)
def test_a_classifier_that_has_learned_nothing_says_so(model, shift, factor, iris):
    X, y = iris
    with pytest.warns(ConvergenceWarning, match="has learned nothing") as caught:
        model.fit(factor * X + shift, y)
    assert caught[0].filename == __file__
    assert np.ptp(model.predict_proba(factor * X + shift), axis=0).max() < 1e-3


def test_samples_that_are_all_alike_are_no_reason_to_warn():
    X, y = np.ones((20, 3)), np.arange(20) % 2
    JacobianRegularizedClassifier(**SMALL).fit(X, y)


@pytest.mark.parametrize("ask", ["predict", "predict_proba", "decision_function"])
def test_numbers_too_large_for_the_network_are_an_error(ask, iris):
    X, y = iris
    model = JacobianRegularizedClassifier(dtype="float32", **SMALL).fit(X, y)
    with pytest.raises(ValueError, match=r"too large for dtype\('float32'\)"):
        getattr(model, ask)(1e39 * X)
    with pytest.raises(ValueError, match=r"too large for dtype\('float32'\)"):
        model.fit(1e39 * X, y)


def test_early_stopping_and_partial_fit_exclude_each_other():
    with pytest.raises(ValueError, match="Got early_stopping=True, but partial_fit expected"):
        JacobianRegularizedClassifier(early_stopping=True).partial_fit(X_SMALL, Y_SMALL)


def test_a_scorer_of_several_numbers_cannot_stop_early():
    scorer = RobustScorer(eps=[0.1, 0.2])
    model = JacobianRegularizedClassifier(
        early_stopping=True, validation_fraction=0.4, scoring=scorer, max_epochs=1
    )
    with pytest.raises(ValueError, match=r"Got scoring=.*, but expected a scorer that returns one"):
        model.fit(X_SMALL, Y_SMALL)


@pytest.mark.parametrize(
    ("scoring", "expected"),
    [
        (RobustScorer, r"an instance of it, RobustScorer\(...\)."),
        (lambda: 3, "a scorer of the samples that early stopping holds out: .* 0 positional arg"),
        (lambda *_: None, "a scorer that returns one number; it returned None."),
        (lambda *_: "good", "a scorer that returns one number; it returned 'good'."),
        (lambda *_: np.nan, "a scorer that returns one number; it returned nan."),
    ],
)
def test_what_is_no_scorer_cannot_stop_early(scoring, expected):
    model = JacobianRegularizedClassifier(
        early_stopping=True, validation_fraction=0.4, scoring=scoring, max_epochs=1
    )
    with pytest.raises(ValueError, match=f"Got scoring=.*, but expected {expected}"):
        model.fit(X_SMALL, Y_SMALL)


@pytest.mark.parametrize("classes", [[], [0], "typo"])
def test_classes_are_at_least_two_labels(classes):
    message = f"Got classes={classes!r}, but expected an array of at least 2 labels."
    with pytest.raises(ValueError, match=re.escape(message)):
        JacobianRegularizedClassifier().partial_fit(X_SMALL, Y_SMALL, classes=classes)


@pytest.mark.parametrize("name", ["lam", "lr", "max_epochs", "batch_size", "penalty_samples"])
def test_a_truth_is_no_number(name):
    with pytest.raises(ValueError, match=f"'{name}' parameter .* Got True instead"):
        JacobianRegularizedClassifier(**{name: True}).fit(X_SMALL, Y_SMALL)


def test_a_class_without_a_signature_is_no_module():
    with pytest.raises(ValueError, match=r"Got module=<class 'dict'>, but expected a class or a f"):
        JacobianRegularizedClassifier(dict).fit(X_SMALL, Y_SMALL)


def test_divergence_names_the_epoch_and_keeps_the_last_good_weights(iris):
    class Poison(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == 3:
                with torch.no_grad():
                    next(net.module_.parameters()).fill_(float("nan"))

    model = JacobianRegularizedClassifier(
        **{**SMALL, "max_epochs": 5, "lr_schedule": "constant"}, callbacks=[Poison()]
    )
    with pytest.raises(TrainingDivergedError, match="NaN or infinite in epoch 3; the weights of"):
        model.fit(*iris)
    two_epochs = JacobianRegularizedClassifier(
        **{**SMALL, "max_epochs": 2, "lr_schedule": "constant"}
    ).fit(*iris)
    np.testing.assert_array_equal(model.predict_proba(iris[0]), two_epochs.predict_proba(iris[0]))


# --- it works -------------------------------------------------------------------------------


@pytest.mark.slow
def test_regularization_and_adversarial_training_make_mnist_networks_robust(mnist):
    (X_train, y_train), (X_test, y_test) = mnist
    common = {
        "module__hidden_units": (256, 256),
        "batch_size": 128,
        "max_epochs": 4,
        "random_state": 0,
    }
    scores = {}
    for name, model in {
        "plain": JacobianRegularizedClassifier(lam=0, **common),
        "projected": JacobianRegularizedClassifier(lam=0.05, n_projections=1, **common),
        "pgd": AdversarialClassifier(n_steps=7, bounds=(0, 1), **common),
    }.items():
        model.fit(X_train, y_train)
        scorer = RobustScorer(norm="linf", eps=0.1, bounds=(0, 1))
        scores[name] = scorer(model, X_test, y_test)
    assert scores["plain"] < 0.1
    assert scores["projected"] > 0.70
    assert scores["pgd"] > scores["projected"]


@pytest.mark.cuda
@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_cuda_trains_scores_and_unpickles_like_the_cpu(Classifier, digits):
    X, y = digits
    model = Classifier(device="cuda", max_epochs=10, random_state=0).fit(X, y)
    assert next(model.module_.parameters()).is_cuda
    assert model.score(X, y) > 0.8
    assert RobustScorer(eps=0.05, bounds=(0, 1))(model, X, y) <= model.score(X, y)
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), rtol=1e-4)
    first = model.set_params(warm_start=True).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(
        loaded.set_params(warm_start=True).fit(X, y).predict_proba(X), first, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
def test_between_fits_the_module_is_in_eval_mode(Classifier, iris):
    X, y = iris
    fitted = Classifier(module__dropout=0.5, **SMALL).fit(X, y)
    online = Classifier(module__dropout=0.5, **SMALL).partial_fit(X, y)
    for model in (fitted, online, pickle.loads(pickle.dumps(fitted))):
        assert not model.module_.training
        view = as_torch(model)(torch.from_numpy(X)).softmax(1)
        np.testing.assert_allclose(view.detach(), model.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize("Classifier", CLASSIFIERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("module__hidden_units", (4,)),
        ("optimizer", "sgd"),
        ("weight_decay", 1.0),
        ("dtype", "float32"),
        ("module__dropout", 0.5),
    ],
)
def test_going_on_with_another_network_is_an_error(Classifier, name, value, iris):
    model = Classifier(warm_start=True, **SMALL).fit(*iris).set_params(**{name: value})
    with pytest.raises(ValueError, match=f"Got {name}=.*go on with its network and optimizer"):
        model.fit(*iris)
    with pytest.raises(ValueError, match=f"Got {name}="):
        model.partial_fit(*iris)
    assert len(model.set_params(warm_start=False).fit(*iris).history_) == 3


def test_parts_must_agree_on_the_classes_and_do_not_balance_them(iris):
    X, y = iris
    model = JacobianRegularizedClassifier(**SMALL).partial_fit(X, y, classes=[0, 1, 2])
    model.partial_fit(X, y, classes=[2, 1, 0])
    with pytest.raises(ValueError, match=r"Got classes=.*, but expected those of the first call"):
        model.partial_fit(X, y, classes=["a", "b"])
    with pytest.raises(ValueError, match=r"Got class_weight='balanced', but partial_fit expected"):
        model.set_params(class_weight="balanced").partial_fit(X, y)


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine"])
def test_layers_may_have_a_learning_rate_of_their_own(lr_schedule, iris):
    groups = [("*.weight", {"lr": 0.0})]
    params = {**SMALL, "lr_schedule": lr_schedule, "optimizer__param_groups": groups}
    model = JacobianRegularizedClassifier(**params).fit(*iris)
    untrained = JacobianRegularizedClassifier(**{**params, "lr": 1e-12}).fit(*iris)
    for (name, trained), start in zip(
        model.module_.named_parameters(), untrained.module_.parameters(), strict=True
    ):
        assert torch.equal(trained, start) == name.endswith("weight")


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Rprop])
def test_an_optimizer_need_not_know_weight_decay(optimizer, iris):
    params = {**SMALL, "optimizer": optimizer}
    assert JacobianRegularizedClassifier(**params).fit(*iris).score(*iris) > 0.5
    with pytest.raises(ValueError, match=r"Got optimizer__weight_decay=0.1, but expected a param"):
        JacobianRegularizedClassifier(**params, weight_decay=0.1).fit(*iris)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_steps_may_be_taken_without_a_fused_kernel(optimizer, iris):
    params = {**SMALL, "optimizer": optimizer}
    fused, looped = (
        JacobianRegularizedClassifier(**params, **how).fit(*iris).predict_proba(iris[0])
        for how in ({}, {"optimizer__foreach": True})
    )
    np.testing.assert_allclose(fused, looped, rtol=1e-4)


class Masked(nn.Sequential):
    """Keeps a mask of infinities, as causal attention does, and a state that is no tensor."""

    def __init__(self, n_features, n_classes):
        super().__init__(nn.Linear(n_features, n_classes))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf))

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        self.version = state["version"]


def test_a_module_may_keep_infinities_and_what_is_no_tensor(iris):
    model = JacobianRegularizedClassifier(Masked, max_epochs=3, random_state=0).fit(*iris)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(iris[0]), model.predict_proba(iris[0]))


def test_a_layer_that_was_frozen_stays_so_in_a_pickle(iris):
    model = JacobianRegularizedClassifier(**SMALL, warm_start=True).fit(*iris)
    next(model.module_.parameters()).requires_grad_(False)
    again = pickle.loads(pickle.dumps(model))
    for half_trained in (model, again):
        before = next(half_trained.module_.parameters()).clone()
        half_trained.fit(*iris)
        assert torch.equal(next(half_trained.module_.parameters()), before)
    np.testing.assert_array_equal(again.predict_proba(iris[0]), model.predict_proba(iris[0]))


def test_a_learning_rate_is_that_of_the_parameters_that_its_pattern_matches(iris):
    groups = [("1.weight", {"weight_decay": 0.1}), ("1.*", {"lr": 1e-4})]
    params = {**SMALL, "lr_schedule": "constant", "optimizer__param_groups": groups}
    model = JacobianRegularizedClassifier(**params).fit(*iris)
    assert [group["lr"] for group in model.net_.optimizer_.param_groups] == [5e-3, 1e-4, 5e-3]
    params["optimizer__param_groups"] = [("nothing*", {"lr": 1e-4})]
    with pytest.raises(ValueError, match=r"Got optimizer__param_groups='nothing\*', but expected"):
        JacobianRegularizedClassifier(**params).fit(*iris)


def test_statistics_that_overflow_are_a_divergence(iris):
    X, y = iris

    def normalized(n_features, n_classes):
        return torch.nn.Sequential(
            torch.nn.BatchNorm1d(n_features), torch.nn.Linear(n_features, n_classes)
        )

    model = JacobianRegularizedClassifier(normalized, lam=0, max_epochs=2)
    with pytest.raises(TrainingDivergedError, match="became NaN or infinite in epoch 1"):
        model.fit((X * 1e25).astype(np.float32), y)


def test_a_class_without_weight_stays_a_class(iris):
    X, y = iris
    weight = (y != y[0]).astype(float)
    model = JacobianRegularizedClassifier(max_epochs=2, random_state=0).fit(X, y, weight)
    np.testing.assert_array_equal(model.classes_, np.unique(y))
    assert model.predict_proba(X).shape == (len(X), 3)
    only = (y == y[0]).astype(float)
    with pytest.raises(ValueError, match=rf"Got y with 1 class \({y[0]}\)"):
        clone(model).fit(X, y, only)


def test_images_with_channels_last_are_warned_of():
    X, y = np.random.default_rng(0).random((20, 8, 8, 1)), np.arange(20) % 2
    model = JacobianRegularizedClassifier("cnn", max_epochs=1, random_state=0)
    with pytest.warns(UserWarning, match=r"shape \(8, 8, 1\), whose last axis looks like channels"):
        model.fit(X, y)
    model.fit(X.transpose(0, 3, 1, 2), y)


def test_flat_samples_where_images_are_expected_are_named():
    X, y = np.random.default_rng(0).random((20, 4, 4)), np.arange(20) % 2
    model = JacobianRegularizedClassifier(max_epochs=1, random_state=0).fit(X, y)
    for ask in (model.predict, lambda X: model.partial_fit(X, y)):
        with pytest.raises(ValueError, match=r"samples of shape \(16,\), but .* expected \(4, 4\)"):
            ask(X.reshape(20, 16))


def test_a_scoring_that_fails_on_the_samples_held_out_is_named(iris):
    model = JacobianRegularizedClassifier(early_stopping=True, scoring="roc_auc", random_state=0)
    with pytest.raises(ValueError, match="Got scoring='roc_auc', but expected a scorer of"):
        model.fit(*iris)


class InBfloat16(nn.Module):
    def __init__(self, n_features, n_classes):
        super().__init__()
        self.layer = nn.Linear(n_features, n_classes)

    def forward(self, X):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(X)


def test_a_module_may_return_logits_of_lower_precision(iris):
    X, y = iris
    model = JacobianRegularizedClassifier(InBfloat16, dtype="float32", max_epochs=2, random_state=0)
    probability = model.fit(X, y).predict_proba(X)
    assert probability.dtype == np.float32
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-6)
    assert RobustScorer(eps=0.0)(model, X, y) == model.score(X, y)


def test_the_number_of_epochs_follows_from_the_batches_that_are_trained_on(iris):
    nested = JacobianRegularizedClassifier(iterator_train__batch_size=5, random_state=0)
    plain = JacobianRegularizedClassifier(batch_size=5, random_state=0)
    assert nested.fit(*iris).n_iter_ == plain.fit(*iris).n_iter_ == 34  # 30 batches, 1000 steps


def test_what_makes_an_encoder_dense_is_said_where_x_is_sparse(iris):
    X, y = iris
    with pytest.raises(TypeError, match=r"sparse csr_matrix, but .*sparse_output=False"):
        JacobianRegularizedClassifier().fit(csr_matrix(X), y)


def test_with_a_seed_a_fit_that_goes_on_holds_out_the_same_samples(iris):
    seen = []

    def scoring(model, X, y):
        seen.append(X)
        return model.score(X, y)

    model = JacobianRegularizedClassifier(
        **SMALL, early_stopping=True, scoring=scoring, warm_start=True
    )
    model.fit(*iris).fit(*iris)
    np.testing.assert_array_equal(seen[-1], seen[0])


def test_the_number_of_epochs_is_that_of_the_history(iris):
    model = JacobianRegularizedClassifier(max_epochs=3, random_state=0).fit(*iris)
    assert model.n_iter_ == 3 == len(model.history_)
    assert model.partial_fit(*iris).n_iter_ == 4


@pytest.mark.parametrize("how", ["class_weight", "sample_weight"])
def test_a_rare_class_has_the_weight_that_was_given_in_small_batches_too(how):
    rng = np.random.default_rng(0)
    y = (np.arange(4000) % 100 == 0).astype(int)  # one in a hundred, so many batches have none
    X = rng.normal(size=(4000, 2)) + y[:, None]
    weight = np.where(y == 1, 99.0, 1.0)
    model = JacobianRegularizedClassifier(
        module__hidden_units=(), lam=0, lr=0.02, max_epochs=20, batch_size=50, random_state=0
    )
    if how == "class_weight":
        model.set_params(class_weight="balanced").fit(X, y)
    else:
        model.fit(X, y, weight)
    expected = LogisticRegression(C=1e6).fit(X, y, weight).predict_proba(X)[:, 1]
    # It was 0.19 for 0.32 with w / Σw of each batch.
    assert abs(model.predict_proba(X)[:, 1].mean() - expected.mean()) < 0.02


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_goes_on_after_it_has_diverged(optimizer, iris):
    more = {"optimizer__momentum": 0.9} if optimizer == "sgd" else {}
    model = JacobianRegularizedClassifier(
        **SMALL, optimizer=optimizer, warm_start=True, lr_schedule="constant", **more
    )
    n_epochs = model.fit(*iris).n_iter_
    with pytest.raises(TrainingDivergedError):
        model.set_params(lr=1e200).fit(*iris)
    assert model.n_iter_ == n_epochs == len(model.history_)
    model.set_params(lr=1e-3).fit(*iris)
    assert np.isfinite(model.predict_proba(iris[0])).all()


def test_an_epoch_that_was_interrupted_leaves_nothing_behind(iris):
    class Interrupt(nn.Module):
        def __init__(self, n_features, n_classes):
            super().__init__()
            self.head = nn.Linear(n_features, n_classes)
            self.calls = 0

        def forward(self, X):
            self.calls += self.training
            if self.calls == 9:
                raise KeyboardInterrupt
            return self.head(X)

    model = JacobianRegularizedClassifier(Interrupt, lam=0, batch_size=30, random_state=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*iris)
    assert model.n_iter_ == 1 == len(model.history_)
    assert "train_loss" in model.history_[-1]


def test_another_preprocessor_is_not_taken_silently(iris):
    model = JacobianRegularizedClassifier(**SMALL, preprocessor=MinMaxScaler(), warm_start=True)
    model.fit(*iris).set_params(preprocessor=StandardScaler())
    with pytest.raises(ValueError, match=r"Got preprocessor=StandardScaler.*, but expected MinMax"):
        model.fit(*iris)


def test_values_by_column_are_read_by_name():
    X, y = load_iris(return_X_y=True, as_frame=True)
    scale = X.std()
    given = {"n_steps": 2, "max_epochs": 2, "random_state": 0}
    bounds = (X.min() - 1, X.max() + 1)
    one = AdversarialClassifier(feature_scale=scale, bounds=bounds, **given).fit(X, y)
    turned = tuple(side[::-1] for side in bounds)
    other = AdversarialClassifier(feature_scale=scale[::-1], bounds=turned, **given).fit(X, y)
    np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(X))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"feature_scale": "std"}, "Got feature_scale='std', but partial_fit expected numbers"),
        ({"constraints": FeatureConstraints(bounds="train")}, "but partial_fit expected fitted"),
        ({"constraints": FeatureConstraints(scale="std")}, "but partial_fit expected fitted"),
    ],
)
def test_what_a_part_of_the_data_does_not_know_is_not_learned_from_it(params, match, iris):
    model = AdversarialClassifier(n_steps=1, max_epochs=1, random_state=0, **params).fit(*iris)
    with pytest.raises(ValueError, match=match):
        model.partial_fit(*iris)


def test_trades_needs_a_random_start(iris):
    model = AdversarialClassifier(method="trades", random_start=False)
    with pytest.raises(ValueError, match="Got random_start=False, but expected True for TRADES"):
        model.fit(*iris)


def test_fits_in_threads_do_not_disturb_each_other(iris):
    def fitted(**params):
        model = JacobianRegularizedClassifier(random_state=0, max_epochs=3, **params)
        return lambda: clone(model).fit(*iris).predict_proba(iris[0])

    normalized = fitted(module=Normalized, penalty_samples=4)
    dropping = fitted(module__dropout=0.5)
    alone = dropping()
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        beside = [pool.submit(normalized) for _ in range(3)]
        np.testing.assert_array_equal(pool.submit(dropping).result(), alone)
        for future in beside:
            future.result()
    assert torch.equal(torch.get_rng_state(), before)


class Normalized(nn.Sequential):
    """A network with batch normalization, whose Jacobian takes a forward pass of its own."""

    def __init__(self, n_features, n_classes):
        super().__init__(
            nn.Linear(n_features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, n_classes)
        )


class Centred(nn.Module):
    def __init__(self, n_features, n_classes):
        super().__init__()
        self.linear = nn.Linear(n_features, n_classes)

    def forward(self, X):
        return self.linear(X - X.mean(0))


class CentredInTraining(Centred):
    def forward(self, X):
        return super().forward(X) if self.training else self.linear(X)


@pytest.mark.parametrize("module", [Centred, CentredInTraining])
@pytest.mark.parametrize("cls", [JacobianRegularizedClassifier, AdversarialClassifier])
def test_a_module_that_mixes_samples_has_no_penalty(cls, module):
    X, y = load_iris(return_X_y=True)
    with pytest.raises(ValueError, match="whose answer to a sample depends on the samples beside"):
        cls(module, lam=0.1, max_epochs=1).fit(X, y)
    assert len(cls(module, lam=0, max_epochs=1).fit(X, y).history_) == 1
