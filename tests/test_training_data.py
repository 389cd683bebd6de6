"""Weights are scikit-learn's, and tensors hold what the arrays held."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_sample_weight

from skjacobian._training_data import (
    apply_class_weight,
    as_tensor,
    make_samples,
    resolve_device,
    training_weights,
)

CLASSES = np.array(["ash", "beech", "oak"])
TARGET = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 0])
WEIGHT = np.array([1.0, 2.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 4.0])
X = np.arange(20.0).reshape(10, 2)


@pytest.mark.parametrize(
    "class_weight", ["balanced", {"ash": 2.0, "beech": 0.5, "oak": 3.0}, {"beech": 4.0}]
)
def test_class_weights_are_those_of_scikit_learn(class_weight):
    weight = apply_class_weight(class_weight, CLASSES, TARGET, None)
    np.testing.assert_allclose(weight, compute_sample_weight(class_weight, CLASSES[TARGET]))


def test_a_dict_of_class_weights_multiplies_the_sample_weights():
    class_weight = {"ash": 2.0, "beech": 0.5, "oak": 3.0}
    weight = apply_class_weight(class_weight, CLASSES, TARGET, WEIGHT)
    np.testing.assert_allclose(weight, np.array([2.0, 0.5, 3.0])[TARGET] * WEIGHT)


def test_balanced_weights_are_those_of_the_repeated_samples():
    weight = apply_class_weight("balanced", CLASSES, TARGET, WEIGHT)
    counts = WEIGHT.astype(int)
    repeated = compute_sample_weight("balanced", np.repeat(CLASSES[TARGET], counts))
    np.testing.assert_allclose(np.repeat(weight / WEIGHT, counts), repeated)
    # What "balanced" means: every class weighs the same.
    np.testing.assert_allclose(np.bincount(TARGET, weight), WEIGHT.sum() / 3)


@pytest.mark.parametrize("present", [[0, 2], [1], [2]])
@pytest.mark.parametrize(
    "class_weight", [{"ash": 2.0, "beech": 0.5, "oak": 3.0}, {"ash": 2.0, "beech": 4.0}]
)
def test_a_part_of_the_data_may_lack_classes_that_have_a_weight(class_weight, present):
    target = TARGET[np.isin(TARGET, present)]
    weight = apply_class_weight(class_weight, CLASSES, target, None)
    np.testing.assert_allclose(weight, [class_weight.get(label, 1.0) for label in CLASSES[target]])


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_without_class_weights_the_sample_weights_are_left_alone(weight):
    assert apply_class_weight(None, CLASSES, TARGET, weight) is weight


@pytest.mark.parametrize(
    ("class_weight", "why"),
    [
        ({"elm": 2.0, "ash": 1.0}, "The classes, .* are not in class_weight"),
        ({"ash": "heavy"}, "could not convert string to float: 'heavy'"),
        ({"ash": [1, 2]}, "setting an array element with a sequence"),
    ],
)
def test_class_weights_that_scikit_learn_rejects_are_named(class_weight, why):
    expected = rf"Got class_weight={{.*}}, but expected weights of labels among \['ash'.* \({why}"
    with pytest.raises(ValueError, match=expected):
        apply_class_weight(class_weight, CLASSES, TARGET, None)


def test_without_weights_every_row_is_kept():
    weight, rows = training_weights(X, None)
    assert weight is None
    np.testing.assert_array_equal(rows, np.arange(10))


def test_rows_of_weight_zero_are_dropped():
    given = [0, 1, 0, 2, 3, 0, 0.5, 1, 1, 0]
    weight, rows = training_weights(X, given)
    np.testing.assert_array_equal(weight, given)
    np.testing.assert_array_equal(rows, [1, 3, 4, 6, 7, 8])


def test_one_number_as_weight_is_that_of_every_row():
    weight, rows = training_weights(X, 2.0)
    np.testing.assert_array_equal(weight, np.full(10, 2.0))
    assert len(rows) == 10


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (np.zeros(10), "at least one non-zero number|and a weight that is not zero"),
        (-np.ones(10), "Negative values in data passed to `sample_weight`"),
        (np.ones(9), r"sample_weight\.shape == \(9,\), expected \(10,\)"),
        ([np.nan] * 10, "sample_weight contains NaN"),
    ],
)
def test_impossible_weights_are_rejected(weight, match):
    with pytest.raises(ValueError, match=match):
        training_weights(X, weight)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "array",
    [X, X.astype(np.float32), read_only(X), X[::-2], np.asfortranarray(X), X.reshape(10, 1, 2)],
    ids=["float64", "float32", "read-only", "strided", "fortran", "3-d"],
)
def test_a_tensor_holds_what_the_array_holds(array, dtype):
    tensor = as_tensor(array, dtype)
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(tensor, array)


def test_a_tensor_shares_memory_only_with_an_array_that_may_be_written_to():
    shared, frozen = X.copy(), read_only(X)
    assert as_tensor(shared, torch.float64).data_ptr() == shared.ctypes.data
    assert as_tensor(frozen, torch.float64).data_ptr() != frozen.ctypes.data


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_hold_data_labels_and_weights_in_the_dtype_of_training(weight, dtype):
    samples = make_samples(X, TARGET, weight, dtype=dtype, device=torch.device("cpu"))
    assert samples.X.dtype == dtype
    np.testing.assert_array_equal(samples.X, X)
    np.testing.assert_array_equal(samples.y, TARGET)
    if weight is None:
        assert samples.sample_weight is None
    else:
        assert samples.sample_weight.dtype == dtype
        np.testing.assert_allclose(samples.sample_weight, WEIGHT / np.mean(WEIGHT), rtol=1e-6)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_cpu_is_always_there(device):
    assert resolve_device(device) == torch.device("cpu")


def test_auto_is_cuda_where_there_is_one():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["gpu", "cpuu", "meta", "", torch.device("meta")])
def test_a_device_of_another_kind_is_rejected(device):
    with pytest.raises(ValueError, match=r"Got device=.*, but expected 'auto', 'cpu', 'cuda' or"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_is_rejected_where_there_is_none(device):
    with pytest.raises(ValueError, match="expected 'auto' or 'cpu', because torch finds no CUDA"):
        resolve_device(device)


@pytest.mark.cuda
def test_samples_are_moved_to_the_device():
    device = torch.device("cuda", 0)
    samples = make_samples(X, TARGET, WEIGHT, dtype=torch.float32, device=device)
    assert {samples.X.device, samples.y.device, samples.sample_weight.device} == {device}


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="Got device='cuda:7', but expected an index below 1"):
        resolve_device("cuda:7")
