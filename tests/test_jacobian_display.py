"""`JacobianNormDisplay`: what it draws, of which estimators, and what it leaves alone."""

import re
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from skjacobian import (
    AdversarialClassifier,
    JacobianNormDisplay,
    JacobianRegularizedClassifier,
)
from skjacobian.jacobian_display import FORMULAS, KINDS

pytestmark = pytest.mark.usefixtures("figures_are_closed")

SMALL = {"module__hidden_units": (16,), "max_epochs": 10, "random_state": 0}
NORMS = [1.0, 2.0, 4.0, 8.0]
LABELS = ["cat", "dog", "cat", "ant"]
MARGINS = [0.5, -1.0, 2.0, 0.0]

both_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    return X, load_iris().target_names[y]


@pytest.fixture(scope="module")
def model(iris):
    return JacobianRegularizedClassifier(**SMALL).fit(*iris)


def tick_labels(display):
    return [label.get_text() for label in display.ax_.get_xticklabels()]


def assert_shows(display, norms):
    """Assert that the display is a scatter of these norms over its margins."""
    expected = np.column_stack([display.margins, norms])
    np.testing.assert_allclose(display.scatter_.get_offsets(), expected, rtol=1e-12)


# --- what is drawn --------------------------------------------------------------------------


def test_each_class_has_a_box_of_its_norms():
    rng = np.random.default_rng(0)
    norms, y = rng.exponential(size=200), rng.choice(["b", "c", "a"], 200)
    display = JacobianNormDisplay(norms, y=y).plot()
    assert tick_labels(display) == ["a", "b", "c"]
    assert display.ax_.get_xlabel() == "Class"
    for k, label in enumerate("abc"):
        own = norms[y == label]
        box = display.boxplot_["boxes"][k].get_ydata()
        np.testing.assert_allclose([box.min(), box.max()], np.percentile(own, [25, 75]))
        median = display.boxplot_["medians"][k].get_ydata()
        np.testing.assert_allclose(median, np.median(own))
        fliers = display.boxplot_["fliers"][k].get_ydata()
        assert set(fliers) <= set(own)
        whiskers = [cap.get_ydata()[0] for cap in display.boxplot_["caps"][2 * k : 2 * k + 2]]
        assert min([*whiskers, *fliers]) == own.min()
        assert max([*whiskers, *fliers]) == own.max()


def test_without_classes_there_is_one_box():
    display = JacobianNormDisplay(NORMS).plot()
    assert tick_labels(display) == ["all samples"]
    assert display.ax_.get_xlabel() == ""
    (median,) = display.boxplot_["medians"]
    np.testing.assert_allclose(median.get_ydata(), 3)


def test_points_are_margins_and_norms():
    display = JacobianNormDisplay(NORMS, margins=MARGINS).plot(kind="margin")
    assert_shows(display, NORMS)
    np.testing.assert_array_equal(display.line_.get_xdata(), [0, 0])


@pytest.mark.parametrize(
    ("y", "label"),
    [
        (LABELS, "Margin of the true class (misclassified below 0)"),
        (None, "Margin of the predicted class"),
    ],
)
def test_the_axis_says_of_which_class_the_margin_is(y, label):
    display = JacobianNormDisplay(NORMS, y=y, margins=MARGINS).plot(kind="margin")
    assert display.ax_.get_xlabel() == label


@both_kinds
def test_the_axis_of_norms_is_logarithmic_where_all_are_positive(kind):
    for norms, scale in (([0.1, 1, 10, 100], "log"), ([0.0, 1, 10, 100], "linear")):
        display = JacobianNormDisplay(norms, margins=MARGINS).plot(kind=kind)
        assert display.ax_.get_yscale() == scale


@pytest.mark.parametrize(
    ("norm", "output"), [(norm, output) for output, norms in FORMULAS.items() for norm in norms]
)
def test_the_axis_names_every_norm_in_text_that_matplotlib_can_set(norm, output, model, iris):
    display = JacobianNormDisplay.from_estimator(model, *iris, norm=norm, output=output)
    assert display.ax_.get_ylabel() == f"Norm {FORMULAS[output][norm]}"
    display.figure_.canvas.draw()


@both_kinds
def test_the_name_is_the_title_of_axes_without_one_and_the_label_of_a_legend(kind):
    first, second = (
        JacobianNormDisplay(NORMS, margins=MARGINS, estimator_name=name) for name in "ab"
    )
    ax = first.plot(kind=kind).ax_
    assert ax.get_title() == "a"
    second.plot(ax, kind=kind)
    assert ax.get_title() == "a"
    assert ax.get_legend_handles_labels()[1] == ["a", "b"]
    assert JacobianNormDisplay(NORMS).plot().ax_.get_title() == ""


def test_keywords_reach_matplotlib_and_win_over_the_defaults():
    display = JacobianNormDisplay(NORMS, y=LABELS, margins=MARGINS, estimator_name="a")
    display.plot(kind="margin", color="red", s=7, label="mine")
    np.testing.assert_array_equal(display.scatter_.get_facecolor()[0, :3], to_rgba("red")[:3])
    assert display.scatter_.get_sizes() == [7]
    assert display.scatter_.get_label() == "mine"
    display.plot(tick_labels=["x", "y", "z"], showfliers=False, label="mine")
    assert tick_labels(display) == ["x", "y", "z"]
    assert not display.boxplot_["fliers"]


def test_what_is_stored_is_drawn_again_in_another_way(model, iris):
    display = JacobianNormDisplay.from_estimator(model, *iris)
    first = display.ax_
    assert display.plot(kind="margin") is display
    assert display.ax_ is not first
    assert_shows(display, model.jacobian_norm(iris[0]))


# --- of which estimators --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "output"), [("l1", "logits"), ("cross_lipschitz", "logits"), ("l2", "loss")]
)
@pytest.mark.parametrize("labelled", [True, False])
def test_draws_the_norms_of_a_classifier(norm, output, labelled, model, iris):
    X, y = iris[0], iris[1] if labelled else None
    options = {"norm": norm, "output": output}
    display = JacobianNormDisplay.from_estimator(model, X, y, kind="margin", **options)
    assert_shows(display, model.jacobian_norm(X, y, **options))
    assert display.ax_.get_title() == "JacobianRegularizedClassifier"
    boxes = JacobianNormDisplay.from_estimator(model, X, y, **options)
    assert tick_labels(boxes) == (model.classes_.tolist() if labelled else ["all samples"])


@pytest.mark.parametrize("n_classes", [2, 3])
def test_margins_are_those_of_the_logits(n_classes, iris):
    X, y = (array[: 50 * n_classes] for array in iris)
    X = X + np.random.default_rng(0).normal(size=X.shape)  # so that some are misclassified
    model = JacobianRegularizedClassifier(**SMALL).fit(X, y)
    with torch.no_grad():
        logits = model.module_.eval()(torch.as_tensor(X)).numpy()
    own = model.classes_ == y[:, None]
    margins = logits[own] - np.where(own, -np.inf, logits).max(1)
    display = JacobianNormDisplay.from_estimator(model, X, y)
    np.testing.assert_allclose(display.margins, margins, rtol=1e-9)
    wrong = model.predict(X) != y
    assert 0 < wrong.sum() < len(X)
    np.testing.assert_array_equal(display.margins < 0, wrong)
    first, second = np.sort(logits, axis=1)[:, :-3:-1].T
    display = JacobianNormDisplay.from_estimator(model, X)
    np.testing.assert_allclose(display.margins, first - second, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:A column-vector y was passed")
@pytest.mark.parametrize("container", [list, pd.Series, lambda y: y[:, None]])
def test_labels_come_in_any_container(container, model, iris):
    X, y = iris
    for kind in KINDS:
        display = JacobianNormDisplay.from_estimator(model, X, container(y), kind=kind)
        expected = JacobianNormDisplay.from_estimator(model, X, y)
        np.testing.assert_array_equal(display.margins, expected.margins)
    assert tick_labels(expected) == tick_labels(display.plot())


def test_an_adversarial_classifier_is_one_of_ours(iris):
    model = AdversarialClassifier(method="fgsm", **SMALL).fit(*iris)
    display = JacobianNormDisplay.from_estimator(model, *iris, norm="cross_lipschitz")
    np.testing.assert_array_equal(display.norms, model.jacobian_norm(*iris, norm="cross_lipschitz"))
    assert display.estimator_name == "AdversarialClassifier"


def classifier():
    return JacobianRegularizedClassifier(**SMALL)


@pytest.mark.parametrize(
    ("estimator", "steps"),
    [
        (make_pipeline(classifier()), []),
        (make_pipeline("passthrough", classifier()), []),
        (make_pipeline(StandardScaler(), classifier()), [StandardScaler()]),
        (
            make_pipeline(MinMaxScaler(), make_pipeline(StandardScaler(), classifier())),
            [MinMaxScaler(), StandardScaler()],
        ),
        (
            GridSearchCV(make_pipeline(StandardScaler(), classifier()), {}, cv=2),
            [StandardScaler()],
        ),
        (
            make_pipeline(StandardScaler(), GridSearchCV(classifier(), {"lam": [0, 1]}, cv=2)),
            [StandardScaler()],
        ),
    ],
    ids=["one step", "passthrough", "scaled", "nested", "search", "search inside"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_draws_the_norms_of_the_classifier_at_the_end(estimator, steps, frozen, iris):
    X, y = iris
    estimator.fit(X, y)
    final, Z = estimator, X
    while not isinstance(final, JacobianRegularizedClassifier):
        final = final.best_estimator_ if isinstance(final, GridSearchCV) else final[-1]
    for step in steps:
        Z = step.fit_transform(Z)
    estimator = FrozenEstimator(estimator) if frozen else estimator
    display = JacobianNormDisplay.from_estimator(
        estimator, X, y, norm="cross_lipschitz", kind="margin"
    )
    assert_shows(display, final.jacobian_norm(Z, y, norm="cross_lipschitz"))
    np.testing.assert_array_equal(display.margins > 0, estimator.predict(X) == y)
    assert display.estimator_name == "JacobianRegularizedClassifier"


def test_columns_keep_their_names_on_the_way(iris):
    X = pd.DataFrame(iris[0], columns=["a", "b", "c", "d"])
    pipe = make_pipeline(StandardScaler(), classifier()).set_output(transform="pandas")
    pipe.fit(X, pd.Series(iris[1]))
    display = JacobianNormDisplay.from_estimator(pipe, X, pd.Series(iris[1]))
    assert tick_labels(display) == list(load_iris().target_names)
    np.testing.assert_array_equal(display.norms, pipe[-1].jacobian_norm(pipe[:-1].transform(X)))


@pytest.mark.parametrize(
    ("estimator", "name"),
    [
        (LogisticRegression(max_iter=1000), "LogisticRegression"),
        (make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), "LogisticRegression"),
        (GridSearchCV(LogisticRegression(max_iter=1000), {}, cv=2), "LogisticRegression"),
        (make_pipeline(StandardScaler(), "passthrough"), "str"),
    ],
)
def test_other_estimators_are_an_error_that_names_them(estimator, name, iris):
    estimator.fit(*iris)
    message = f"Got an estimator of type {name}, but expected a fitted classifier of skjacobian"
    with pytest.raises(TypeError, match=re.escape(message)):
        JacobianNormDisplay.from_estimator(estimator, *iris)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "estimator",
    [
        classifier(),
        make_pipeline(classifier()),
        make_pipeline(StandardScaler(), classifier()),
        GridSearchCV(classifier(), {}),
    ],
    ids=["classifier", "one step", "pipeline", "search"],
)
def test_unfitted_estimators_say_so(estimator, iris):
    with pytest.raises(NotFittedError, match="is not fitted"):
        JacobianNormDisplay.from_estimator(estimator, *iris)


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"kind": "margins"}, None, "Got kind='margins', but expected one of 'distribution', "),
        ({}, "margin", "Got margins=None, but expected the margin of each sample with kind="),
        ({"y": ["a", "b"]}, None, "Got len(y)=2, but expected 4, the number of norms."),
        ({"margins": [1.0]}, None, "Got len(margins)=1, but expected 4, the number of norms."),
        (
            {"margins": [np.nan, np.inf, 0, 0]},
            "margin",
            "Got margins with 2 NaN or infinite, but expected finite numbers.",
        ),
        ({"norms": [1, np.nan]}, None, "Got norms with 1 NaN or infinite, but expected finite"),
        ({"norms": [1, -np.inf]}, None, "Got norms with 1 NaN or infinite, but expected finite"),
        ({"norms": [[1.0, 2.0]]}, None, "Got norms of shape (1, 2), but expected (n_samples,)."),
        ({"norms": []}, None, "Got norms of shape (0,), but expected (n_samples,)."),
        ({"norm": "l22"}, None, "but expected one of 'l2', 'l1', 'l21', 'spectral', 'cross_lip"),
        ({"output": "loss", "norm": "l21"}, None, "Got norm='l21', but expected one of 'l2', 'l1'"),
        ({"norms": ["a"]}, None, "Got norms that are no array of numbers: could not convert"),
        ({"output": "x"}, None, "Got output='x', but expected one of 'logits', 'loss'."),
    ],
)
def test_errors_say_what_was_got_and_what_was_expected(given, kind, message):
    options = {"norms": NORMS, **({} if kind is None else {"kind": kind}), **given}
    with pytest.raises(ValueError, match=re.escape(message)):
        JacobianNormDisplay.from_predictions(**options)
    assert plt.get_fignums() == []  # no empty figure is left behind


def test_what_is_no_axes_is_found_before_anything_is_computed():
    with pytest.raises(TypeError, match="Got ax of type str, but expected one matplotlib Axes"):
        JacobianNormDisplay.from_estimator(None, None, ax="ax")
    with pytest.raises(TypeError, match="Got ax of type list, but expected one matplotlib Axes"):
        JacobianNormDisplay.from_predictions(NORMS, ax=[])


def test_an_unknown_kind_is_found_before_anything_is_computed():
    with pytest.raises(ValueError, match="Got kind='box', but expected one of"):
        JacobianNormDisplay.from_estimator(None, None, kind="box")


def test_labels_of_the_estimator_are_checked(model, iris):
    X, y = iris
    with pytest.raises(ValueError, match=r"Got y with labels \['rose'\], but expected those in"):
        JacobianNormDisplay.from_estimator(model, X, ["rose"] * len(X))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        JacobianNormDisplay.from_estimator(model, X, y[:-1])


@pytest.mark.parametrize("method", ["plot", "from_estimator", "from_predictions"])
def test_a_missing_matplotlib_is_named(method, model, iris, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    display = JacobianNormDisplay(NORMS)  # makes and stores without matplotlib
    calls = {
        "plot": display.plot,
        "from_estimator": lambda: JacobianNormDisplay.from_estimator(model, *iris),
        "from_predictions": lambda: JacobianNormDisplay.from_predictions(NORMS),
    }
    with pytest.raises(ImportError, match=r"JacobianNormDisplay\.\w+ requires matplotlib"):
        calls[method]()


# --- what is left alone ---------------------------------------------------------------------


def test_a_display_only_stores_what_it_is_given():
    given = {"y": LABELS, "margins": MARGINS, "norm": "l1", "output": "loss", "estimator_name": "a"}
    display = JacobianNormDisplay(NORMS, **given)
    assert vars(display) == {"norms": NORMS, **given}
    assert display.norms is NORMS
    with pytest.raises(TypeError, match="positional argument"):
        JacobianNormDisplay(NORMS, LABELS)


@both_kinds
def test_the_axes_given_are_drawn_on_and_others_are_not(kind, model, iris):
    figure, (left, right) = plt.subplots(1, 2)
    plt.sca(right)
    display = JacobianNormDisplay.from_estimator(model, *iris, kind=kind, ax=left)
    assert display.ax_ is left
    assert display.figure_ is figure
    assert left.has_data()
    assert not right.has_data()
    assert plt.gca() is right
    assert plt.get_fignums() == [figure.number]


@both_kinds
def test_without_axes_a_figure_is_added(kind):
    other = plt.figure()
    settings, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    display = JacobianNormDisplay(NORMS, margins=MARGINS).plot(kind=kind)
    assert display.figure_ is plt.gcf()
    assert not other.axes
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.get_backend() == backend


@both_kinds
def test_a_figure_that_pyplot_does_not_know_stays_unknown_to_it(kind):
    figure = Figure()
    JacobianNormDisplay(NORMS, y=LABELS, margins=MARGINS).plot(figure.subplots(), kind=kind)
    figure.canvas.draw()
    assert plt.get_fignums() == []
