"""What every view is held to: the estimator's own numbers, finite differences, pickling."""

import pickle
from unittest import mock

import numpy as np
import pytest
import torch

from skjacobian.differentiable import _calibration, _votes, as_torch

# How far a view may be from the estimator, relative to the larger of 1 and the value.
PRECISION = {"float32": 1e-6, "float64": 1e-10}


def as_tensor(X):
    return torch.from_numpy(np.array(X))


def assert_equal_outputs(function, wanted, X):
    """`function` of tensors is `wanted` of arrays, in both precisions."""
    for dtype, precision in PRECISION.items():
        values = np.asarray(X, dtype=dtype)
        seen = function(as_tensor(values)).detach().numpy()
        # In float64 of the rounded values: scikit-learn's own float32 errors are not ours.
        np.testing.assert_allclose(
            seen, wanted(values.astype(float)), rtol=precision, atol=precision
        )


def assert_gradient(view, smooth):
    """The gradient is that of finite differences, at points where there is one."""
    # Votes and isotonic plateaus have one that they are given for attacks: not here.
    with mock.patch.object(_votes, "WIDTH", 1e-9), mock.patch.object(_calibration, "SLANT", 0):
        assert torch.autograd.gradcheck(view, (as_tensor(smooth).double().requires_grad_(),))


def assert_pickles(view, X):
    X = as_tensor(np.asarray(X, dtype=float))
    again = pickle.loads(pickle.dumps(view))
    torch.testing.assert_close(again(X), view(X), rtol=0, atol=0)


@pytest.fixture
def assert_transformer_view():
    """Check the view of a fitted transformer on `X`, and its gradient at `smooth` points."""

    def check(transformer, X, smooth):
        view = as_torch(transformer)
        assert_equal_outputs(view, transformer.transform, X)
        assert_gradient(view, smooth)
        assert_pickles(view, X)

    return check


@pytest.fixture
def assert_classifier_view():
    """Check the view of a fitted classifier on `X`, and its gradient at `smooth` points."""

    def check(classifier, X, smooth):
        view, X = as_torch(classifier), np.asarray(X, dtype=float)
        logits = view(as_tensor(X)).detach().numpy()
        assert logits.shape == (len(X), len(classifier.classes_))
        np.testing.assert_array_equal(classifier.classes_[logits.argmax(1)], classifier.predict(X))
        if view.has_proba and hasattr(classifier, "predict_proba"):
            assert_equal_outputs(view.predict_proba, classifier.predict_proba, X)
        if hasattr(classifier, "decision_function"):
            assert_equal_outputs(view.decision_function, classifier.decision_function, X)
        assert_gradient(view, smooth)
        assert_pickles(view, X)

    return check
