"""From validated arrays to the tensors that a net trains on."""

from typing import Any

import numpy as np
import torch
from sklearn.utils import assert_all_finite
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from skjacobian._net.batches import Samples
from skjacobian._validation import check_weights, reject


def training_weights(X: np.ndarray, sample_weight: Any) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the weights, or None, and the indices of the rows whose weight is not zero."""
    if sample_weight is None:
        return None, np.arange(len(X))
    weight = check_weights(sample_weight, X)
    return weight, np.flatnonzero(weight)


def apply_class_weight(
    class_weight: Any, classes: np.ndarray, target: np.ndarray, weight: np.ndarray | None
) -> np.ndarray | None:
    """Multiply the weights by those of the classes; `target` holds class indices."""
    if class_weight is None:
        return weight
    if class_weight == "balanced":  # is about the classes that the data has
        present, y = np.unique(target), classes[target]
        factors = np.ones(len(classes))
        factors[present] = compute_class_weight(
            class_weight, classes=classes[present], y=y, sample_weight=weight
        )
    else:  # a dict is about all classes
        try:
            factors = compute_class_weight(class_weight, classes=classes, y=classes)
        except (TypeError, ValueError) as error:
            expected = f"weights of labels among {classes.tolist()} ({error})"
            reject("class_weight", class_weight, expected)
        if not (np.isfinite(factors) & (factors >= 0)).all() or not factors[target].any():
            expected = "non-negative finite numbers, not 0 for all classes of the samples"
            reject("class_weight", class_weight, expected)
    return factors[target] if weight is None else factors[target] * weight


def as_tensor(X: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return `X` as a CPU tensor, without a copy where numpy and torch allow it.

    Raises
    ------
    ValueError
        If finite numbers are too large for the dtype.
    """
    X = np.ascontiguousarray(X)
    tensor = torch.from_numpy(X if X.flags.writeable else X.copy())
    converted = tensor.to(dtype)
    if converted.dtype != tensor.dtype:
        with np.errstate(invalid="ignore"):
            assert_all_finite(converted.numpy(), input_name="X")
    return converted


def make_samples(
    X: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Samples:
    """Make tensors and move them to the device, where they stay if there is room.

    The weights are divided by their mean, over all samples: a batch by itself does not know how
    heavy it is.
    """
    if weight is not None and len(weight):
        weight = weight / weight.mean()
    tensor = as_tensor(X, dtype)
    if _fits(tensor, device):
        tensor = tensor.to(device)
    y = torch.from_numpy(target).to(tensor.device)
    return Samples(tensor, y, None if weight is None else torch.from_numpy(weight).to(tensor))


def resolve_device(device: Any) -> torch.device:
    """Return the torch device that a `device` parameter names, and that exists."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "'auto', 'cpu', 'cuda' or 'cuda:<index>'"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        reject("device", device, expected)
    if resolved.type not in ("cpu", "cuda"):
        reject("device", device, expected)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        reject("device", device, "'auto' or 'cpu', because torch finds no CUDA device")
    if resolved.type == "cuda" and not is_there(resolved):
        n_devices = torch.cuda.device_count()
        reject("device", device, f"an index below {n_devices}, the number of CUDA devices")
    return resolved


def is_there(device: torch.device) -> bool:
    """Tell whether torch finds a CUDA device of this index."""
    return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()


def _fits(X: Tensor, device: torch.device) -> bool:
    """Tell whether `X` takes at most half of the device's free memory."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return X.numel() * X.element_size() <= free // 2
