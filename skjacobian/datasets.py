"""Data for examples, tests and benchmarks: MNIST from its files, sets of known margin."""

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from skjacobian._rng import own_random_state
from skjacobian._validation import check_count, check_option, check_positive

DATA_VARIABLE = "SKJACOBIAN_DATA"

_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def find_mnist() -> Path | None:
    """Return the folder of the MNIST files, or None where there is none.

    Looked for are `mnist` in the folder that the environment variable SKJACOBIAN_DATA
    names, and otherwise `../shared/data/mnist` beside a checkout of the repository.
    """
    named = os.environ.get(DATA_VARIABLE)
    parent = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    folder = parent / "mnist"
    return folder if (folder / _MNIST_FILES["train"][0]).exists() else None


def load_mnist(
    split: str = "train",
    *,
    n_samples: int | None = None,
    as_images: bool = False,
    folder: str | Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Load MNIST (LeCun, Cortes & Burges) from its four original files.

    Parameters
    ----------
    split : {"train", "test"}, default="train"
    n_samples : int, optional
        Take only the first samples of the split.
    as_images : bool, default=False
        Shape samples (1, 28, 28) instead of (784,).
    folder : path, optional
        Where the gzip-compressed IDX files are; None is `find_mnist()`.

    Returns
    -------
    X : ndarray of shape (n_samples, 784) or (n_samples, 1, 28, 28), float32
        Pixels in [0, 1].
    y : ndarray of shape (n_samples,), int64

    Raises
    ------
    FileNotFoundError
        If the files are not there.

    Examples
    --------
    >>> if find_mnist():  # where the files are
    ...     X, y = load_mnist("test", n_samples=100)
    ...     assert X.shape == (100, 784)
    """
    check_option("split", split, _MNIST_FILES)
    place = find_mnist() if folder is None else Path(folder)
    if place is None:
        raise FileNotFoundError(
            "MNIST was not found. Put its four .gz files in a folder `mnist` and set "
            f"{DATA_VARIABLE} to the folder that holds it."
        )
    images, labels = (_read_idx(place / name) for name in _MNIST_FILES[split])
    X = (images[:n_samples] / np.float32(255)).astype(np.float32)
    y = labels[:n_samples].astype(np.int64)
    return X.reshape(len(X), 1, 28, 28) if as_images else X.reshape(len(X), 784), y


def _read_idx(path: Path) -> np.ndarray:
    """Read an array of unsigned bytes from the IDX format: magic, sizes, data."""
    with gzip.open(path, "rb") as file:
        zeros, kind, n_dimensions = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or kind != 8:
            raise ValueError(f"Got {path}, but expected an IDX file of unsigned bytes.")
        shape = struct.unpack(f">{n_dimensions}I", file.read(4 * n_dimensions))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def make_separated(
    n_samples: int = 100,
    n_features: int = 10,
    *,
    margin: float = 1.0,
    norm: str = "l2",
    random_state: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make two classes whose every sample lies at one distance from the plane between.

    The linear classifier sign(x @ w) is right at every point within `margin` of a sample
    and wrong just beyond: its robust accuracy is 1 below `margin` and 0 above.

    Parameters
    ----------
    n_samples, n_features : int
    margin : float, default=1.0
        Distance of each sample from the plane {x : x @ w = 0}.
    norm : {"l1", "l2", "linf"}, default="l2"
        Norm in which the distance is measured.
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    X : ndarray of shape (n_samples, n_features)
    y : ndarray of shape (n_samples,)
        0 or 1.
    w : ndarray of shape (n_features,)
        Normal of the plane.

    Examples
    --------
    >>> X, y, w = make_separated(4, 3, margin=0.5, norm="linf", random_state=0)
    >>> np.round(abs(X @ w) / np.abs(w).sum(), 6).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    rng = own_random_state(random_state)
    n_samples = check_count("n_samples", n_samples)
    n_features = check_count("n_features", n_features)
    order = {"l1": np.inf, "l2": 2, "linf": 1}[check_option("norm", norm, ["l1", "l2", "linf"])]
    w = rng.normal(size=n_features)
    y = np.arange(n_samples) % 2
    X = rng.normal(size=(n_samples, n_features))
    # The distance of x from the plane is |x @ w| / ‖w‖ in the dual norm.
    wanted = (2 * y - 1) * check_positive("margin", margin) * np.linalg.norm(w, order)
    X += np.outer(wanted - X @ w, w / (w @ w))
    return X, y, w
