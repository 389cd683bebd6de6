"""`RobustnessCurveDisplay`: what it draws, of which estimators, and what it leaves alone."""

import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from sklearn.datasets import load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from skjacobian import (
    JacobianRegularizedClassifier,
    RobustnessCurveDisplay,
    adversarial_distances,
    robustness_curve,
)
from skjacobian.curve import curve_of_distances
from skjacobian.intervals import wilson_interval

pytestmark = pytest.mark.usefixtures("figures_are_closed")

DISTANCES = [0.0, 1.0, 2.0, 2.0, np.inf]
EPS, ACCURACY = [0.0, 1.0, 2.0], [0.8, 0.6, 0.2]
SEVERAL = {"eps": [EPS, [0, 1]], "robust_accuracy": [ACCURACY, [0.9, 0.5]], "n_samples": [5, 10]}


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    return X, load_iris().target_names[y]


def pipeline():
    classifier = JacobianRegularizedClassifier(
        module__hidden_units=(8,), max_epochs=5, random_state=0
    )
    return make_pipeline(StandardScaler(), classifier)


@pytest.fixture(scope="module")
def model(iris):
    return pipeline().fit(*iris)


@pytest.fixture(scope="module")
def cv_results(iris):
    cv = KFold(3, shuffle=True, random_state=0)
    return cross_validate(pipeline(), *iris, cv=cv, return_estimator=True, return_indices=True)


def legend(display):
    box = display.ax_.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def drawn_at(band, radius):
    """The ends of a band in the middle of the step that begins at a radius."""
    corners = band.get_paths()[0].vertices
    return corners[corners[:, 0] == radius, 1]


# --- what is drawn --------------------------------------------------------------------------


def test_the_curve_holds_each_value_to_the_next_radius():
    display = RobustnessCurveDisplay.from_predictions(DISTANCES)
    np.testing.assert_array_equal(display.line_.get_xydata(), np.column_stack([EPS, ACCURACY]))
    assert display.line_.get_drawstyle() == "steps-post"
    # What a reader sees at any radius is the share of distances above it.
    x, y = display.line_.get_path().vertices.T
    for radius in (0.5, 1.5):
        after = np.searchsorted(x, radius)
        assert y[after - 1] == (np.array(DISTANCES) > radius).mean()


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_band_is_wilsons_interval_at_each_radius(confidence):
    display = RobustnessCurveDisplay(EPS, ACCURACY, n_samples=5).plot(confidence=confidence)
    low, high = wilson_interval([4, 3, 1], 5, confidence)
    for k, radius in enumerate(EPS):
        ends = drawn_at(display.band_, radius)
        for end in (low[k], high[k]):
            assert np.isclose(ends, end).any()
    color = to_rgba(display.line_.get_color(), 0.2)
    np.testing.assert_allclose(display.band_.get_facecolor()[0], color)


def test_no_band_without_a_confidence_or_a_number_of_samples():
    assert RobustnessCurveDisplay(EPS, ACCURACY).plot().band_ is None
    display = RobustnessCurveDisplay(EPS, ACCURACY, n_samples=5).plot(confidence=None)
    assert display.band_ is None
    assert not display.ax_.collections


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_axes_say_what_is_drawn(norm):
    display = RobustnessCurveDisplay(EPS, ACCURACY, norm=norm).plot()
    symbol = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}[norm]
    assert display.ax_.get_xlabel() == f"Radius of the perturbation ({symbol})"
    assert display.ax_.get_ylabel() == "Robust accuracy"
    assert display.ax_.get_ylim() == (-0.01, 1.01)
    display.figure_.canvas.draw()


def test_several_estimators_share_axes_and_legend():
    first = RobustnessCurveDisplay.from_predictions(DISTANCES, name="a")
    second = RobustnessCurveDisplay.from_predictions(DISTANCES, name="b", ax=first.ax_)
    assert second.ax_ is first.ax_
    assert legend(second) == ["a", "b"]
    assert first.line_.get_color() != second.line_.get_color()
    assert legend(RobustnessCurveDisplay.from_predictions(DISTANCES)) == []


def test_a_name_given_to_plot_wins():
    display = RobustnessCurveDisplay(EPS, ACCURACY, name="a")
    assert legend(display.plot(name="b")) == ["b"]
    assert legend(display.plot()) == ["a"]


@pytest.mark.parametrize("key", ["color", "c"])
def test_keywords_reach_matplotlib_and_win_over_the_defaults(key):
    display = RobustnessCurveDisplay(EPS, ACCURACY, n_samples=5, name="a")
    display.plot(curve_kwargs={key: "red", "lw": 3, "ds": "default", "label": "mine"})
    assert to_rgba(display.line_.get_color()) == to_rgba("red")
    assert display.line_.get_linewidth() == 3
    assert display.line_.get_drawstyle() == "default"
    assert legend(display) == ["mine"]


# --- several curves -------------------------------------------------------------------------


def test_several_curves_look_alike_and_share_an_entry_of_the_legend():
    display = RobustnessCurveDisplay(**SEVERAL, name="folds").plot()
    assert legend(display) == ["folds"]
    first, second = display.line_
    np.testing.assert_array_equal(first.get_xydata(), np.column_stack([EPS, ACCURACY]))
    np.testing.assert_array_equal(second.get_ydata(), [0.9, 0.5])
    assert first.get_color() == second.get_color()
    assert (first.get_alpha(), first.get_linestyle()) == (0.5, "--")
    assert len(display.band_) == 2
    # The folds of another estimator on the same axes have another look.
    other = RobustnessCurveDisplay(**SEVERAL, name="others").plot(display.ax_)
    assert legend(other) == ["folds", "others"]
    assert other.line_[0].get_color() != first.get_color()


def test_several_curves_may_have_a_look_and_a_name_of_their_own():
    styles = [{"color": "red"}, {"color": "blue"}]
    display = RobustnessCurveDisplay(**SEVERAL, name=["a", "b"]).plot(curve_kwargs=styles)
    assert [line.get_color() for line in display.line_] == ["red", "blue"]
    assert legend(display) == ["a", "b"]
    assert legend(display.plot(name="c", curve_kwargs=styles)) == ["c", "c"]
    colors = [line.get_color() for line in display.plot(curve_kwargs=[{}, {}]).line_]
    assert colors[0] != colors[1]


def test_arrays_and_lists_of_numbers_are_one_curve():
    for container in (list, tuple, np.array, pd.Series):
        display = RobustnessCurveDisplay(container(EPS), container(ACCURACY)).plot()
        np.testing.assert_array_equal(display.line_.get_ydata(), ACCURACY)


# --- of which estimators --------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, [0.0, 0.1, 0.5]])
def test_draws_the_curve_of_an_estimator(eps, model, iris):
    options = {"norm": "l2", "bounds": (0, 9), "feature_scale": "std", "mutable": [0, 2, 3]}
    options |= {"n_steps": 5, "n_restarts": 2, "random_state": 1, "batch_size": 50}
    display = RobustnessCurveDisplay.from_estimator(model, *iris, eps=eps, **options)
    radii, accuracy = robustness_curve(model, *iris, eps=eps, **options)
    np.testing.assert_array_equal(display.line_.get_xydata(), np.column_stack([radii, accuracy]))
    assert (display.n_samples, display.norm, display.name) == (150, "l2", "Pipeline")
    assert display.band_ is not None
    assert legend(display) == ["Pipeline"]
    named = RobustnessCurveDisplay.from_estimator(model, *iris, name="mine", confidence=None)
    assert legend(named) == ["mine"]
    assert named.band_ is None


def test_weights_of_samples_count_in_the_curve_and_its_band(model, iris):
    X, y = iris
    weight = np.where(y == "setosa", 3.0, 1.0)
    display = RobustnessCurveDisplay.from_estimator(model, X, y, eps=EPS, sample_weight=weight)
    _, accuracy = robustness_curve(model, X, y, eps=EPS, sample_weight=weight)
    np.testing.assert_array_equal(display.robust_accuracy, accuracy)
    assert display.n_samples == pytest.approx((3 * 50 + 100) ** 2 / (9 * 50 + 100))

    plain, equal = (
        RobustnessCurveDisplay.from_predictions(DISTANCES, sample_weight=weight)
        for weight in (None, np.full(5, 0.5))
    )
    assert plain.n_samples == equal.n_samples == 5
    with pytest.raises(ValueError, match=r"sample_weight\.shape == \(149,\), expected \(150,\)"):
        RobustnessCurveDisplay.from_estimator(model, X, y, sample_weight=weight[:-1])


@pytest.mark.parametrize("frame", [False, True])
def test_draws_the_curve_of_each_fold_on_what_it_was_tested_on(frame, cv_results, iris):
    X, y = iris
    options = {"norm": "l2", "n_steps": 5}
    given = (pd.DataFrame(X), pd.Series(y)) if frame else iris
    display = RobustnessCurveDisplay.from_cv_results(cv_results, *given, **options)
    tests = cv_results["indices"]["test"]
    for line, estimator, test in zip(display.line_, cv_results["estimator"], tests, strict=True):
        expected = robustness_curve(estimator, X[test], y[test], **options)
        np.testing.assert_allclose(line.get_xydata(), np.transpose(expected), rtol=1e-9)
    assert display.n_samples == [50, 50, 50]
    assert display.band_ is None
    assert legend(display) == []
    again = RobustnessCurveDisplay.from_cv_results(
        cv_results, X, y, eps=[0, 1], name="folds", confidence=0.9, **options
    )
    assert [line.get_xdata().tolist() for line in again.line_] == [[0, 1]] * 3
    assert len(again.band_) == 3
    assert legend(again) == ["folds"]


def test_all_folds_are_measured_in_one_unit(cv_results, iris):
    X, y = iris
    display = RobustnessCurveDisplay.from_cv_results(
        cv_results, X, y, feature_scale="std", mutable=[0, 1], n_steps=5
    )
    test = cv_results["indices"]["test"][0]
    distances = adversarial_distances(
        cv_results["estimator"][0],
        X[test],
        y[test],
        feature_scale=X.std(0),
        mutable=[0, 1],
        n_steps=5,
    )
    expected = np.transpose(curve_of_distances(distances))
    np.testing.assert_allclose(display.line_[0].get_xydata(), expected, rtol=1e-9)


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "plot", "message"),
    [
        ({"norm": "l0"}, {}, "Got norm='l0', but expected one of 'l2', 'linf', 'l1'"),
        ({"n_samples": 5}, {"confidence": 95}, "Got confidence=95, but expected a number between"),
        ({"n_samples": 0}, {}, "Got n_samples=0, but expected at least 1."),
        (
            {"eps": [0.0]},
            {},
            "Got eps of shape (1,) and robust_accuracy of shape (3,), but expected (n_radii,)",
        ),
        (
            {"eps": [EPS, EPS]},
            {},
            "Got eps of 2 curves, robust_accuracy of 1 and n_samples of 2, but expected as many",
        ),
        (
            {**SEVERAL, "n_samples": [5]},
            {},
            "Got eps of 2 curves, robust_accuracy of 2 and n_samples of 1, but expected as many",
        ),
        (
            SEVERAL,
            {"curve_kwargs": [{}]},
            "Got curve_kwargs=[{}], but expected a dict or a list of 2, one per curve.",
        ),
        (
            {**SEVERAL, "name": ["a", "b"]},
            {},
            "Got name=['a', 'b'], but expected None, a str, or a list of 2 with a list of curve_",
        ),
        (
            SEVERAL,
            {"name": ["a", "b", "c"], "curve_kwargs": [{}, {}]},
            "Got name=['a', 'b', 'c'], but expected None, a str, or a list of 2",
        ),
    ],
)
def test_errors_say_what_was_got_and_what_was_expected(given, plot, message):
    display = RobustnessCurveDisplay(**{"eps": EPS, "robust_accuracy": ACCURACY, **given})
    with pytest.raises(ValueError, match=re.escape(message)):
        display.plot(**plot)
    assert plt.get_fignums() == []  # no empty figure is left behind


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        (["estimator"], "'indices'"),
        (["indices"], "'estimator'"),
        ([], "'estimator' and 'indices'"),
    ],
)
def test_cv_results_without_estimators_or_indices_are_rejected(keys, missing, cv_results, iris):
    message = (
        f"Got cv_results without {missing}, but expected those of cross_validate(..., "
        "return_estimator=True, return_indices=True)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        RobustnessCurveDisplay.from_cv_results({key: cv_results[key] for key in keys}, *iris)


def test_cv_results_of_other_samples_are_rejected(cv_results, iris):
    X, y = iris
    message = "Got X with 100 samples, but expected what was cross-validated: cv_results have"
    with pytest.raises(ValueError, match=message):
        RobustnessCurveDisplay.from_cv_results(cv_results, X[:100], y[:100])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        RobustnessCurveDisplay.from_cv_results(cv_results, X, y[:100])


def test_a_parameter_of_lines_is_not_one_of_the_search(model, iris):
    with pytest.raises(TypeError, match=r"Got color='r', but .* lines go into curve_kwargs"):
        RobustnessCurveDisplay.from_estimator(model, *iris, color="r")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"confidence": 95}, "Got confidence=95, but expected"),
        ({"eps": [-1.0]}, r"Got eps=\[-1.0\], but expected"),
        ({"curve_kwargs": {"colour": "r"}}, "Got curve_kwargs={'colour': 'r'}, but expected"),
        ({"curve_kwargs": [{}, {}]}, r"Got curve_kwargs=\[{}, {}\], but expected"),
    ],
)
@pytest.mark.parametrize("method", ["from_estimator", "from_cv_results"])
def test_what_a_plot_would_reject_is_rejected_before_the_search(
    method, params, message, model, cv_results, iris, capsys
):
    source = model if method == "from_estimator" else cv_results
    with pytest.raises(ValueError, match=message):
        getattr(RobustnessCurveDisplay, method)(source, *iris, verbose=True, **params)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("method", ["from_estimator", "from_cv_results"])
def test_what_is_no_axes_is_rejected_before_the_search(method, model, cv_results, iris, capsys):
    source = model if method == "from_estimator" else cv_results
    axes = plt.subplots(1, 2)[1]
    with pytest.raises(TypeError, match="Got ax of type ndarray, but expected one matplotlib Axes"):
        getattr(RobustnessCurveDisplay, method)(source, *iris, verbose=True, ax=axes)
    assert capsys.readouterr().out == ""


def test_an_unknown_parameter_is_named(model, iris):
    with pytest.raises(TypeError, match="n_step"):
        RobustnessCurveDisplay.from_estimator(model, *iris, n_step=3)


@pytest.mark.parametrize("method", ["plot", "from_estimator", "from_predictions", "cv_results"])
def test_a_missing_matplotlib_is_named(method, model, iris, cv_results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calls = {
        "plot": RobustnessCurveDisplay(EPS, ACCURACY).plot,  # made and stored without
        "from_estimator": lambda: RobustnessCurveDisplay.from_estimator(model, *iris),
        "from_predictions": lambda: RobustnessCurveDisplay.from_predictions(DISTANCES),
        "cv_results": lambda: RobustnessCurveDisplay.from_cv_results(cv_results, *iris),
    }
    with pytest.raises(ImportError, match=r"RobustnessCurveDisplay\.\w+ requires matplotlib"):
        calls[method]()


# --- what is left alone ---------------------------------------------------------------------


def test_a_display_only_stores_what_it_is_given():
    given = {"n_samples": 5, "norm": "l1", "name": "a"}
    display = RobustnessCurveDisplay(EPS, ACCURACY, **given)
    assert vars(display) == {"eps": EPS, "robust_accuracy": ACCURACY, **given}
    assert display.eps is EPS


def test_the_axes_given_are_drawn_on_and_others_are_not(model, iris):
    figure, (left, right) = plt.subplots(1, 2)
    plt.sca(right)
    style = {"color": "red"}
    display = RobustnessCurveDisplay.from_estimator(model, *iris, ax=left, curve_kwargs=style)
    assert (display.ax_, display.figure_) == (left, figure)
    assert not right.has_data()
    assert plt.gca() is right
    assert plt.get_fignums() == [figure.number]
    assert style == {"color": "red"}


def test_a_figure_that_pyplot_does_not_know_stays_unknown_to_it():
    figure = Figure()
    RobustnessCurveDisplay(**SEVERAL).plot(figure.subplots())
    figure.canvas.draw()
    assert plt.get_fignums() == []


def test_a_display_searches_as_far_as_the_function_does():
    X, y = load_wine(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    model = SVC(C=10).fit(X, y)
    radii = [0.1, 0.5, 1.0]
    curve = robustness_curve(model, X, y, eps=radii)[1]
    display = RobustnessCurveDisplay.from_estimator(model, X, y, eps=radii)
    np.testing.assert_array_equal(display.robust_accuracy, curve)


def test_scales_of_folds_are_those_of_the_columns_in_any_order():
    X, y = load_iris(return_X_y=True, as_frame=True)
    X = X * [1, 10, 100, 1000]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    folds = cross_validate(pipeline, X, y, cv=3, return_estimator=True, return_indices=True)
    given = {"eps": [0.1, 0.3], "feature_scale": "std"}
    displays = [
        RobustnessCurveDisplay.from_cv_results(folds, X[columns], y, **given)
        for columns in (list(X.columns), list(X.columns)[::-1])
    ]
    np.testing.assert_array_equal(*(display.robust_accuracy for display in displays))
