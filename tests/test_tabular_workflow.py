"""Tables, pipelines and classifiers without gradients, in the searches of scikit-learn."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler

from skjacobian import FeatureConstraints, JacobianRegularizedClassifier, RobustScorer
from skjacobian.attacks import Square
from skjacobian.differentiable._registry import SETTINGS

X_IRIS, Y_IRIS = load_iris(return_X_y=True)
ON_IRIS = RobustScorer(eps=0.3, n_steps=10)  # centimetres


def make_people(n_samples=90):
    rng = np.random.default_rng(0)
    age, job = rng.integers(20, 70, n_samples), rng.choice(["clerk", "nurse", "pilot"], n_samples)
    income = rng.normal(2500, 600, n_samples) + 600 * (job == "pilot")
    y = np.where(income + 20 * age + rng.normal(0, 300, n_samples) > 3500, "paid", "unpaid")
    return pd.DataFrame({"age": age, "income": income, "job": job}), y


X_PEOPLE, Y_PEOPLE = make_people()
ON_PEOPLE = RobustScorer(
    eps=0.3,
    n_steps=10,
    constraints=FeatureConstraints(
        immutable=["job"], increasing=["age"], scale="std", bounds="train"
    ).fit(X_PEOPLE),
)

# Estimator, grid, scorer, samples and labels.
CASES = {
    "DataFrame behind a ColumnTransformer": (
        make_pipeline(
            make_column_transformer(
                (StandardScaler(), ["age", "income"]), (OneHotEncoder(), ["job"])
            ),
            LogisticRegression(),
        ),
        {"logisticregression__C": [0.1, 10.0]},
        ON_PEOPLE,
        X_PEOPLE,
        Y_PEOPLE,
    ),
    "MLPClassifier": (
        make_pipeline(StandardScaler(), MLPClassifier(max_iter=50, random_state=0)),
        {"mlpclassifier__alpha": [1e-4, 1.0]},
        ON_IRIS,
        X_IRIS,
        Y_IRIS,
    ),
    "RandomForest": (
        RandomForestClassifier(n_estimators=10, random_state=0),
        {"max_depth": [1, 3]},
        RobustScorer(eps=0.3, attack=Square(n_queries=20)),
        X_IRIS,
        Y_IRIS,
    ),
    "ours with a preprocessor": (
        JacobianRegularizedClassifier(preprocessor=StandardScaler(), max_epochs=2, random_state=0),
        [
            {"preprocessor": [MinMaxScaler(), None], "lam": [0.0, 1e-2]},
            {"preprocessor__with_mean": [True, False]},
        ],
        ON_IRIS,
        X_IRIS,
        Y_IRIS,
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def without_times(results):
    return {key: value for key, value in results.items() if "_test_" in key or key == "params"}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_cross_validate(case):
    estimator, _, scorer, X, y = case
    scoring = {"accuracy": "accuracy", "robust": scorer}
    folds = cross_validate(estimator, X, y, scoring=scoring, cv=3, error_score="raise")
    robust, clean = folds["test_robust"], folds["test_accuracy"]
    assert ((robust >= 0) & (robust <= clean)).all()
    assert robust.mean() < clean.mean()  # the attack does something


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_grid_search_is_the_same_in_one_process_and_in_two():
    # Not a test for each case: the second process is started once.
    for estimator, grid, scorer, X, y in CASES.values():
        scoring = {"accuracy": "accuracy", "robust": scorer}
        options = {"scoring": scoring, "refit": "robust", "cv": 2, "error_score": "raise"}
        searches = [GridSearchCV(estimator, grid, n_jobs=n, **options).fit(X, y) for n in (1, 2)]
        first, second = (without_times(search.cv_results_) for search in searches)
        assert str(first["params"]) == str(second["params"])
        for key in first.keys() - {"params"}:
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)
        assert scorer(searches[0], X, y) == scorer(searches[1], X, y)
        assert (first["mean_test_robust"] <= first["mean_test_accuracy"]).all()


def test_the_documentation_names_every_type_that_as_torch_knows():
    text = (Path(__file__).parents[1] / "docs" / "tabular.md").read_text()
    assert [kind.__name__ for kind in SETTINGS if f"`{kind.__name__}`" not in text] == []
