"""`plot_adversarial_examples`: which images it attacks, and what of them it draws."""

import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from torch import nn

from skjacobian import JacobianRegularizedClassifier, plot_adversarial_examples
from skjacobian.adversarial_examples import AdversarialExamplesDisplay
from skjacobian.attacks import FGSM
from skjacobian.differentiable import FittedModule
from skjacobian.exceptions import AttackWarning

pytestmark = pytest.mark.usefixtures("figures_are_closed")

X, y = (array[:300] for array in load_digits(return_X_y=True))
NAMES = np.array([f"digit {label}" for label in y])
THREAT = {"eps": 3.0, "bounds": (0, 16)}


@pytest.fixture(scope="module")
def model():
    """A network that is right about most images, but not all."""
    classifier = JacobianRegularizedClassifier(
        module__hidden_units=(16,), max_epochs=4, random_state=0
    )
    return make_pipeline(MinMaxScaler(), classifier).fit(X, NAMES)


def pixels(display, row):
    return np.array([np.asarray(image.get_array()) for image in display.images_[row]])


def of_images(images, **params):
    """A display of images that nothing was predicted of."""
    labels = ["a"] * len(images)
    return AdversarialExamplesDisplay(
        images, images, y=labels, y_clean=labels, y_adv=labels, **params
    )


# --- what is attacked and drawn -------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_draws_the_first_images_that_are_classified_right(model, norm):
    is_right = model.predict(X) == NAMES
    assert not is_right.all()
    wrong_first = np.argsort(is_right, kind="stable")
    right = wrong_first[(~is_right).sum() :][:4]
    display = plot_adversarial_examples(
        model, X[wrong_first], NAMES[wrong_first], norm=norm, n_samples=4, **THREAT
    )
    images = X[right].reshape(-1, 8, 8)
    np.testing.assert_array_equal(pixels(display, 0), images)
    X_adv = display.X_adv.reshape(-1, 8, 8)
    np.testing.assert_array_equal(pixels(display, 2), X_adv)
    np.testing.assert_array_equal(pixels(display, 1), X_adv - images)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    lengths = np.linalg.norm(display.X_adv - X[right], order, axis=1)
    assert (lengths <= 3 * (1 + 1e-9)).all()
    assert lengths.min() > 0
    assert display.X_adv.min() >= 0
    assert display.X_adv.max() <= 16


def test_titles_are_true_and_predicted_labels(model):
    display = plot_adversarial_examples(model, X, NAMES, **THREAT)
    right = np.flatnonzero(model.predict(X) == NAMES)[:5]
    fooled_by = model.predict(display.X_adv)
    assert (fooled_by != NAMES[right]).any()
    for k, label in enumerate(NAMES[right]):
        titles = [ax.get_title() for ax in display.axes_[:, k]]
        assert titles == [
            f"true: {label}\npredicted: {label}",
            "",
            f"predicted: {fooled_by[k]}",
        ]
    np.testing.assert_array_equal(display.y_adv, fooled_by)
    display.figure_.canvas.draw()


def test_the_scales_are_shared_and_said(model):
    display = plot_adversarial_examples(model, X, NAMES, **THREAT)
    clean, perturbation, adversarial = display.images_
    assert {image.get_clim() for image in clean + adversarial} == {(0.0, 16.0)}
    reach = np.abs(display.X_adv - display.X).max()
    for image in perturbation:
        assert image.get_clim() == (-reach, reach)
        np.testing.assert_allclose(image.cmap(0.5), (1, 1, 1, 1), atol=0.04)  # white is 0
    labels = [ax.get_ylabel() for ax in display.axes_[:, 0]]
    assert labels == ["clean", "perturbation\n(-3 to 3)", "adversarial"]
    assert all(len(ax.get_xticks()) == 0 for ax in display.axes_.flat)
    free = plot_adversarial_examples(model, X, NAMES, eps=3)
    values = np.stack([free.X, free.X_adv])
    assert free.images_[0][0].get_clim() == (values.min(), values.max())


def test_without_a_radius_nothing_is_added(model):
    display = plot_adversarial_examples(model, X, NAMES, eps=0)
    np.testing.assert_array_equal(display.X_adv, display.X)
    np.testing.assert_array_equal(display.y_adv, display.y)
    assert display.images_[1][0].get_clim() == (-1.0, 1.0)


def test_the_threat_model_is_that_of_the_scorer(model):
    scale = np.linspace(0.5, 2, 64)
    display = plot_adversarial_examples(
        model, X, NAMES, feature_scale=scale, mutable=range(32), attack=FGSM(), **THREAT
    )
    delta = display.X_adv - display.X
    assert not delta[:, 32:].any()
    assert np.abs(delta / scale).max() == pytest.approx(3)


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "strong", FGSM()])
def test_every_attack_draws(model, attack):
    display = plot_adversarial_examples(model, X, NAMES, attack=attack, n_samples=2, **THREAT)
    assert (display.y_adv != display.y).any()


def test_the_strong_attack_needs_no_gradients(short_stages):
    model = KNeighborsClassifier().fit(X, y)
    with pytest.warns(AttackWarning, match="weaker than a gradient attack"):
        display = plot_adversarial_examples(model, X, y, attack="strong", n_samples=1, **THREAT)
    assert display.axes_.shape == (3, 1)


def test_data_frames_and_fewer_images_than_asked_for(model):
    frame = pd.DataFrame(X[:20], columns=[f"pixel {k}" for k in range(64)])
    named = make_pipeline(MinMaxScaler(), *[step for _, step in model.steps[1:]])
    named.fit(frame, NAMES[:20])
    n_right = int((named.predict(frame) == NAMES[:20]).sum())
    display = plot_adversarial_examples(named, frame, NAMES[:20], n_samples=50, **THREAT)
    assert display.axes_.shape == (3, n_right)
    mutable = plot_adversarial_examples(named, frame, NAMES[:20], mutable=["pixel 20"], **THREAT)
    assert set(np.nonzero(mutable.X_adv - mutable.X)[1]) == {20}


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "image_shape", "drawn"),
    [
        ((64,), None, (8, 8)),
        ((4, 9), None, (4, 9)),
        ((1, 4, 9), None, (4, 9)),
        ((3, 4, 9), None, (4, 9, 3)),
        ((36,), (4, 9), (4, 9)),
        ((36,), (1, 9, 4), (9, 4)),
        ((36,), (3, 4, 3), (4, 3, 3)),
        ((36,), [2, 18], (2, 18)),
        ((3, 4, 9), (12, 9), (12, 9)),
    ],
)
def test_images_come_in_several_shapes(features, image_shape, drawn):
    images = np.random.default_rng(0).uniform(size=(2, *features))
    display = of_images(images, image_shape=image_shape, limits=(0, 1)).plot()
    assert pixels(display, 0).shape == (2, *drawn)
    as_drawn = images.reshape(2, *(drawn if len(drawn) == 2 else (3, *drawn[:2])))
    as_drawn = as_drawn if len(drawn) == 2 else np.moveaxis(as_drawn, 1, -1)
    np.testing.assert_allclose(pixels(display, 0), as_drawn)


def test_colour_perturbations_are_grey_where_nothing_was_added():
    X = np.full((1, 3, 2, 2), 100.0)
    X_adv = X.copy()
    X_adv[0, 0, 0, 0] += 8  # more red
    labels = {"y": ["a"], "y_clean": ["a"], "y_adv": ["b"]}
    display = AdversarialExamplesDisplay(X, X_adv, **labels, limits=(0, 200)).plot()
    (drawn,) = pixels(display, 1)
    np.testing.assert_allclose(drawn[0, 0], [1, 0.5, 0.5])
    np.testing.assert_allclose(drawn[1, 1], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(pixels(display, 0), 0.5)


@pytest.mark.parametrize("features", [(4,), (49,), (65,), (2, 4, 4), (4, 4, 3), (3, 1, 2, 2)])
def test_features_that_are_no_image_are_an_error(features):
    message = (
        f"Got X with features of shape {features}, but expected images: (H, W), (1, H, W) or "
        "(3, H, W), or a square number of pixels, 64 at least. Set image_shape for other flat "
        "images. Of tables, evaluate_robustness(...).X_adv has the samples."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        of_images(np.zeros((1, *features))).plot()
    assert plt.get_fignums() == []


def test_a_table_is_no_image_unless_it_is_said_to_be_one():
    iris, species = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=1000).fit(iris, species)
    with pytest.raises(
        ValueError, match=r"Got X with features of shape \(4,\), but expected images"
    ):
        plot_adversarial_examples(model, pd.DataFrame(iris), species)
    display = plot_adversarial_examples(model, iris, species, image_shape=(2, 2), n_samples=1)
    assert pixels(display, 0).shape == (1, 2, 2)


@pytest.mark.parametrize(
    "image_shape", [(8, 9), (64,), (2, 4, 8), 64, (8.0, 8.0), (-8, -8), "8x8", ()], ids=repr
)
def test_an_image_shape_that_does_not_fit_is_an_error(image_shape, model):
    message = (
        f"Got image_shape={image_shape!r}, but expected (H, W), (1, H, W) or (3, H, W) of the 64 "
        "features."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_adversarial_examples(model, X, NAMES, image_shape=image_shape)


# --- axes and errors --------------------------------------------------------------------------


def test_the_axes_given_are_drawn_on(model):
    figure, axes = plt.subplots(3, 2)
    display = plot_adversarial_examples(model, X, NAMES, n_samples=2, axes=axes, **THREAT)
    assert display.axes_ is axes
    assert display.figure_ is figure
    assert plt.get_fignums() == [figure.number]
    column = plt.figure().subplots(3)
    assert plot_adversarial_examples(
        model, X, NAMES, n_samples=1, axes=column, **THREAT
    ).axes_.shape == (3, 1)
    with pytest.raises(ValueError, match=r"Got axes of shape \(3, 2\), but expected \(3, 5\), a c"):
        plot_adversarial_examples(model, X, NAMES, axes=axes, **THREAT)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_samples": 0}, "Got n_samples=0, but expected an integer of at least 1."),
        ({"eps": [0.1, 0.2]}, "Got eps=[0.1, 0.2], but expected a non-negative finite number."),
        ({"norm": "l0"}, "Got norm='l0', but expected one of"),
        ({"attack": "weak"}, "Got attack='weak', but expected one of 'pgd', 'fgsm', 'strong'"),
        ({"bounds": (0, 1)}, "samples outside bounds=(0.0, 1.0)"),
    ],
)
def test_errors_say_what_was_got_and_what_was_expected(params, message, model):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_adversarial_examples(model, X, NAMES, **params)
    assert plt.get_fignums() == []


def test_an_estimator_that_is_always_wrong_is_an_error(model):
    labels = ["no digit"] * len(X)
    with pytest.raises(ValueError, match="Got an estimator that is wrong about every sample of X"):
        plot_adversarial_examples(model, X, labels)


def test_a_missing_matplotlib_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plot_adversarial_examples requires matplotlib"):
        plot_adversarial_examples(model, X, NAMES)
    with pytest.raises(ImportError, match=r"AdversarialExamplesDisplay.plot requires matplotlib"):
        of_images(X[:1]).plot()


def test_a_module_is_drawn_as_a_classifier_is():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    X = np.random.default_rng(0).random((6, 4, 4), dtype=np.float32)
    labels = FittedModule(module, X).predict(X)
    display = plot_adversarial_examples(module, X, labels, eps=0.5)
    assert set(np.ravel(display.y_adv)) <= {0, 1}
