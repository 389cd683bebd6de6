"""`jacobian_norm` of a fitted classifier: against a Jacobian taken sample by sample."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits, make_classification
from sklearn.exceptions import NotFittedError
from torch import nn

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier
from skjacobian._prediction import PREDICTION_BATCH_SIZE

SMALL = {"module__hidden_units": (32,), "max_epochs": 3, "random_state": 0}
NAMES = np.array(["zebra", "ant", "cat"])  # not in the order of their codes

# Of one sample: J of shape (n_classes, n_features), ∇ₓℓ of shape (n_features,), the code y.
FORMULAS = {
    ("l2", "logits"): lambda J, gradient, y: (J**2).sum(),
    ("l1", "logits"): lambda J, gradient, y: abs(J).sum(),
    ("l21", "logits"): lambda J, gradient, y: np.sqrt((J**2).sum(0)).sum(),
    ("spectral", "logits"): lambda J, gradient, y: np.linalg.svd(J, compute_uv=False)[0],
    ("cross_lipschitz", "logits"): lambda J, gradient, y: abs(J - J[y]).sum(1).max(),
    ("l2", "loss"): lambda J, gradient, y: (gradient**2).sum(),
    ("l1", "loss"): lambda J, gradient, y: abs(gradient).sum(),
}
LABELLED = [("cross_lipschitz", "logits"), ("l2", "loss"), ("l1", "loss")]
all_norms = pytest.mark.parametrize(("norm", "output"), list(FORMULAS))
labelled_norms = pytest.mark.parametrize(("norm", "output"), LABELLED)


def slowly(model, X, y, norm, output):
    """The norm at each sample, from autograd's Jacobian of that sample alone."""
    codes = [list(model.classes_).index(label) for label in y]
    module = model.module_.eval()
    results = []
    for x, k in zip(torch.as_tensor(X), codes, strict=True):
        logits = lambda x: module(x[None])[0]  # noqa: E731
        J = torch.autograd.functional.jacobian(logits, x)
        gradient = torch.autograd.functional.jacobian(lambda x: -logits(x).log_softmax(0)[k], x)  # noqa: B023
        results.append(FORMULAS[norm, output](J.flatten(1).numpy(), gradient.flatten().numpy(), k))
    return np.array(results)


@pytest.fixture(scope="module")
def data():
    X, y = make_classification(
        300, n_features=6, n_informative=4, n_classes=3, flip_y=0.2, random_state=0
    )
    return X, NAMES[y]


@pytest.fixture(scope="module")
def model(data):
    return JacobianRegularizedClassifier(**SMALL).fit(*data)


class Tower(nn.Module):
    """A module whose modes matter: it normalizes batches and drops units."""

    def __init__(self, n_features, n_classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_features, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(8, n_classes)

    def forward(self, X):
        return self.head(self.layers(X))


# --- values ---------------------------------------------------------------------------------


@all_norms
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-4), (np.float64, 1e-9)])
@pytest.mark.parametrize("module", ["mlp", Tower])
def test_equals_the_formula_on_the_jacobian_of_each_sample(norm, output, dtype, rtol, module, data):
    X, y = data[0].astype(dtype), data[1]
    params = {"max_epochs": 3, "random_state": 0} if module is Tower else SMALL
    model = JacobianRegularizedClassifier(module, **params).fit(X, y)
    norms = model.jacobian_norm(X[:20], y[:20], norm=norm, output=output)
    assert norms.dtype == dtype
    np.testing.assert_allclose(norms, slowly(model, X[:20], y[:20], norm, output), rtol=rtol)


@all_norms
def test_two_classes_have_two_rows(norm, output, data):
    X, y = data[0], np.where(data[1] == "cat", "yes", "no")
    model = JacobianRegularizedClassifier(**SMALL).fit(X, y)
    norms = model.jacobian_norm(X[:20], y[:20], norm=norm, output=output)
    np.testing.assert_allclose(norms, slowly(model, X[:20], y[:20], norm, output), rtol=1e-9)


@all_norms
def test_images_are_flattened_as_features_are(norm, output, data):
    X, y = np.random.default_rng(0).normal(size=(40, 1, 8, 8)), data[1][:40]
    model = JacobianRegularizedClassifier("cnn", max_epochs=1, random_state=0).fit(X, y)
    norms = model.jacobian_norm(X[:5], y[:5], norm=norm, output=output)
    np.testing.assert_allclose(norms, slowly(model, X[:5], y[:5], norm, output), rtol=1e-9)


@all_norms
def test_a_sample_does_not_depend_on_the_others(norm, output, model, data):
    X, y = data
    norms = model.jacobian_norm(X, y, norm=norm, output=output)
    order = np.random.default_rng(0).permutation(len(X))
    permuted = model.jacobian_norm(X[order], y[order], norm=norm, output=output)
    np.testing.assert_allclose(permuted, norms[order], rtol=1e-9)


@all_norms
def test_batches_give_what_single_samples_give(norm, output, model, data):
    n_samples = 2 * PREDICTION_BATCH_SIZE + 3
    X, y = (np.resize(array, (n_samples, *array.shape[1:])) for array in data)
    X = X + np.linspace(0, 1, n_samples)[:, None]  # no two samples alike
    norms = model.jacobian_norm(X, y, norm=norm, output=output)
    assert norms.shape == (n_samples,)
    edges = [0, *range(1021, 1027), *range(2046, n_samples)]
    single = [model.jacobian_norm(X[[i]], y[[i]], norm=norm, output=output).item() for i in edges]
    np.testing.assert_allclose(norms[edges], single, rtol=1e-9)


# --- labels ---------------------------------------------------------------------------------


@labelled_norms
@pytest.mark.parametrize("container", [list, pd.Series, lambda y: y.astype(object)])
def test_labels_are_those_of_fit_in_any_container(norm, output, container, model, data):
    X, y = data
    options = {"norm": norm, "output": output}
    expected = slowly(model, X[:9], y[:9], norm, output)
    np.testing.assert_allclose(
        model.jacobian_norm(X[:9], container(y[:9]), **options), expected, rtol=1e-9
    )


@labelled_norms
def test_without_labels_those_predicted_are_taken(norm, output, model, data):
    X, y = data
    options = {"norm": norm, "output": output}
    norms = model.jacobian_norm(X, **options)
    np.testing.assert_array_equal(norms, model.jacobian_norm(X, model.predict(X), **options))
    wrong = model.predict(X) != y
    assert 0 < wrong.sum() < len(X)
    differs = norms != model.jacobian_norm(X, y, **options)
    assert differs.any()
    assert not differs[~wrong].any()


@pytest.mark.parametrize("norm", ["l2", "l1", "l21", "spectral"])
def test_norms_of_the_logits_do_not_depend_on_labels(norm, model, data):
    X, y = data
    np.testing.assert_array_equal(
        model.jacobian_norm(X, norm=norm), model.jacobian_norm(X, y, norm=norm)
    )


@pytest.mark.parametrize("norm", ["l2", "cross_lipschitz"])
def test_labels_that_fit_has_not_seen_are_an_error(norm, model, data):
    X = data[0]
    message = (
        "Got y with labels ['cow', 'dog'], but expected those in classes: ['ant', 'cat', 'zebra']."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.jacobian_norm(X[:3], ["dog", "cat", "cow"], norm=norm)


@pytest.mark.parametrize("norm", ["l2", "cross_lipschitz"])
def test_labels_of_another_number_are_an_error(norm, model, data):
    X, y = data
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[3, 2\]"):
        model.jacobian_norm(X[:3], y[:2], norm=norm)


# --- estimates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "estimate"),
    [
        ("l21", {"n_projections": 2}),
        ("l2", {"class_samples": 1}),
        ("l1", {"class_samples": np.array(2)}),  # as a grid may pass it
        pytest.param("l2", {"n_projections": 2}, marks=pytest.mark.slow),
        pytest.param("l1", {"class_samples": 2}, marks=pytest.mark.slow),
    ],
)
def test_estimates_are_reproducible_and_right_on_average(norm, estimate, model, data):
    X = data[0][:10]
    draws = [
        model.jacobian_norm(X, norm=norm, **estimate, random_state=seed) for seed in range(400)
    ]
    again = model.jacobian_norm(X, norm=norm, **estimate, random_state=7)
    np.testing.assert_array_equal(again, draws[7])
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    bias = np.mean(draws, axis=0) - model.jacobian_norm(X, norm=norm)
    assert (error > 0).all()
    assert (abs(bias) < 4.5 * error).all()


def test_all_classes_are_the_exact_norm(model, data):
    X = data[0]
    np.testing.assert_allclose(
        model.jacobian_norm(X, norm="l1", class_samples=3), model.jacobian_norm(X, norm="l1")
    )


def test_estimates_in_different_batches_are_independent(model, data):
    X = np.repeat(data[0][:1], 2 * PREDICTION_BATCH_SIZE, axis=0)
    norms = model.jacobian_norm(X, n_projections=1, random_state=0)
    first, second = norms[:PREDICTION_BATCH_SIZE], norms[PREDICTION_BATCH_SIZE:]
    # Directions drawn anew would correlate by 1/√1024 = 0.03; the same ones by 1.
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_global_random_states_are_neither_read_nor_changed(model, data):
    def states():
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        return torch.get_rng_state().tolist(), numpy_state["state"]["key"].tolist()

    before = states()
    one, two = (model.jacobian_norm(data[0], n_projections=1) for _ in range(2))
    assert (one != two).any()
    assert states() == before


# --- parameters, and what is left behind ----------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"norm": "l3"}, "Got norm='l3', but expected one of 'l1', 'l2', 'l21', 'spectral'"),
        ({"output": "los"}, "but expected one of 'logits', 'loss' (did you mean 'loss'?)."),
        ({"norm": "l21", "output": "loss"}, "Got norm='l21', but expected 'l1' or 'l2'"),
        ({"norm": "l1", "n_projections": 3}, "Got n_projections=3, but expected None with norm"),
        ({"n_projections": 0}, "Got n_projections=0, but expected an integer of at least 1."),
        ({"norm": "spectral", "class_samples": 2}, "Got class_samples=2, but expected None with"),
    ],
)
def test_parameters_are_checked(params, message, model, data):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.jacobian_norm(data[0], **params)


def test_samples_of_another_shape_are_an_error(model, data):
    with pytest.raises(ValueError, match=r"X has 5 features, but Jacobian.* is expecting 6"):
        model.jacobian_norm(data[0][:, :5])


@pytest.mark.parametrize("Classifier", [JacobianRegularizedClassifier, AdversarialClassifier])
def test_an_unfitted_classifier_says_so(Classifier, data):
    with pytest.raises(NotFittedError, match=f"This {Classifier.__name__} instance is not fitted"):
        Classifier().jacobian_norm(data[0])


@labelled_norms
def test_the_method_that_shares_its_name_with_a_parameter_takes_labels(norm, output, data):
    X, y = data
    params = {**SMALL, "penalty_norm": "l1", "method": "fgsm"}
    model = AdversarialClassifier(**params).fit(X, y)
    expected = slowly(model, X[:9], y[:9], norm, output)
    for norms in (
        model.jacobian_norm(X[:9], y[:9], norm=norm, output=output),
        model.jacobian_norm(X[:9], y=y[:9], norm=norm, output=output),
    ):
        np.testing.assert_allclose(norms, expected, rtol=1e-9)


@all_norms
@pytest.mark.parametrize("labels", ["given", "predicted", "unknown"])
@pytest.mark.parametrize("training", [True, False])
def test_leaves_modes_gradients_and_statistics_as_they_were(norm, output, labels, training, data):
    X, y = data
    model = JacobianRegularizedClassifier(Tower, max_epochs=1, random_state=0).fit(X, y)
    module = model.module_.train(training)
    module.head.bias.requires_grad_(False)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    if labels == "unknown":
        with pytest.raises(ValueError, match="Got y with labels"):
            model.jacobian_norm(X, ["cow"] * len(X), norm=norm, output=output)
    else:
        given = y if labels == "given" else None
        model.jacobian_norm(X, given, norm=norm, output=output)
    assert all(part.training is training for part in module.modules())
    for name, p in module.named_parameters():
        assert p.requires_grad is (name != "head.bias")
        assert p.grad is gradients[name]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.cuda
@all_norms
def test_on_a_card_as_on_the_cpu(norm, output, data):
    X, y = data
    model = JacobianRegularizedClassifier(device="cuda", dtype="float64", **SMALL).fit(X, y)
    for labels in (y, None):
        norms = model.jacobian_norm(X, labels, norm=norm, output=output)
        named = model.predict(X) if labels is None else y
        expected = slowly_on_cpu(model, X[:9], named[:9], norm, output)
        np.testing.assert_allclose(norms[:9], expected, rtol=1e-9)


def slowly_on_cpu(model, X, y, norm, output):
    device = next(model.module_.parameters()).device
    model.module_.cpu()
    try:
        return slowly(model, X, y, norm, output)
    finally:
        model.module_.to(device)


def test_drawn_classes_do_not_follow_the_order_of_the_samples():
    X, y = load_digits(return_X_y=True)
    X = X / 16
    model = JacobianRegularizedClassifier(lam=0, max_epochs=5, random_state=0).fit(X, y)
    one_of_each = np.stack([np.flatnonzero(y == k)[:100] for k in range(10)], axis=1).ravel()
    shuffled = np.random.default_rng(0).permutation(one_of_each)
    in_turns, at_random = (
        [
            model.jacobian_norm(X[order], class_samples=1, random_state=seed).mean()
            for seed in range(20)
        ]
        for order in (one_of_each, shuffled)
    )
    assert np.std(in_turns) < 2 * np.std(at_random)
    exact = model.jacobian_norm(X[shuffled]).mean()
    np.testing.assert_allclose(np.mean(in_turns), exact, rtol=0.01)
