"""Of linear classifiers the robust accuracy is known; the strong attack finds just that."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skjacobian import RobustScorer

DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
DATA = {"two classes": load_breast_cancer, "three classes": load_wine}
CLASSIFIERS = {
    "LogisticRegression": LogisticRegression(max_iter=1000),
    "LinearSVC": LinearSVC(random_state=0),
}
PIPELINES = {
    "StandardScaler": lambda model: make_pipeline(StandardScaler(), model),
    "PCA": lambda model: make_pipeline(PCA(8, whiten=True), model),
}
N_SAMPLES = 20


def class_scores(model, X):
    """The decision function with a column for each class."""
    decision = model.decision_function(X)
    return np.column_stack([0 * decision, decision]) if decision.ndim == 1 else decision


def raw_weights(model, X):
    """The weight of each raw feature in the score of each class.

    The scores are linear, so that a step of any size gives their exact slope.
    """
    center, step = X.mean(0), X.std(0)
    rise = class_scores(model, center + np.diag(step)) - class_scores(model, center[None])
    return (rise / step[:, None]).T


def robust_radii(model, X, y, norm, scale):
    """How far each sample is from the nearest class that the model would take it for.

    min over k != y of (z_y - z_k) / ‖scale·(w_k - w_y)‖, in the dual norm; negative where
    the model is wrong.
    """
    scores, W = class_scores(model, X), raw_weights(model, X)
    true = np.searchsorted(model.classes_, y)
    gaps = np.linalg.norm(scale * (W[None] - W[:, None]), ord=DUAL[norm], axis=2)[true]
    margins = scores[np.arange(len(X)), true][:, None] - scores
    is_other = np.arange(scores.shape[1]) != true[:, None]
    return np.where(is_other, margins / np.where(is_other, gaps, 1.0), np.inf).min(1)


def between_radii(radii, share):
    """An eps beyond the radii of a share of the samples, halfway to the next larger."""
    radii = np.sort(radii[radii > 0])
    index = int(share * len(radii))
    return (radii[index - 1] + radii[index]) / 2


@pytest.mark.usefixtures("short_stages")
@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize(
    ("data", "classifier", "pipeline", "scaled"),
    [
        ("two classes", "LogisticRegression", "StandardScaler", False),
        ("three classes", "LogisticRegression", "PCA", True),
        ("three classes", "LinearSVC", "StandardScaler", True),
        ("two classes", "LinearSVC", "PCA", False),
    ],
)
def test_the_strong_attack_finds_the_robust_accuracy_of_linear_classifiers(
    data, classifier, pipeline, scaled, norm
):
    X, y = DATA[data](return_X_y=True)
    model = PIPELINES[pipeline](CLASSIFIERS[classifier]).fit(X, y)
    scale = X.std(0) if scaled else np.ones(X.shape[1])
    some = np.random.default_rng(0).permutation(len(X))[:N_SAMPLES]
    radii = robust_radii(model, X[some], y[some], norm, scale)
    eps = between_radii(radii, share=0.6)
    scorer = RobustScorer(
        norm=norm, eps=[eps], attack="strong", feature_scale=scale if scaled else None
    )
    seen = scorer(model, X[some], y[some])
    assert list(seen.values()) == [np.mean(radii > radius) for radius in (0, eps)]
