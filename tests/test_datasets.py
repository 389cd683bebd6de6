"""Samples lie at the margin that was asked for, and MNIST is read as it was written."""

import gzip
import struct

import numpy as np
import pytest

from skjacobian.datasets import find_mnist, load_mnist, make_separated

DUAL_ORDER = {"l1": np.inf, "l2": 2, "linf": 1}
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def write_idx(path, array):
    """Write the IDX format as http://yann.lecun.com/exdb/mnist describes it."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def global_state_of_numpy():
    return str(np.random.get_state(legacy=False))  # noqa: NPY002


@pytest.fixture
def written(tmp_path):
    """Both splits of a tiny MNIST, in a folder `mnist`."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    splits = {}
    for (split, (images_name, labels_name)), n in zip(FILES.items(), (5, 3), strict=True):
        images = rng.integers(0, 256, size=(n, 28, 28), dtype=np.uint8)
        images[0, 0, :2] = 0, 255
        labels = rng.integers(0, 10, size=n, dtype=np.uint8)
        write_idx(folder / images_name, images)
        write_idx(folder / labels_name, labels)
        splits[split] = images, labels
    return folder, splits


@pytest.mark.parametrize("norm", DUAL_ORDER)
@pytest.mark.parametrize("margin", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("n_samples", "n_features"), [(1, 1), (20, 1), (21, 7)])
def test_every_sample_lies_at_the_margin_on_the_side_of_its_class(
    norm, margin, n_samples, n_features
):
    X, y, w = make_separated(n_samples, n_features, margin=margin, norm=norm, random_state=0)
    assert X.shape == (n_samples, n_features)
    assert w.shape == (n_features,)
    signed = X @ w / np.linalg.norm(w, DUAL_ORDER[norm])
    np.testing.assert_allclose(signed, np.where(y == 1, margin, -margin), rtol=1e-9)


@pytest.mark.parametrize("norm", DUAL_ORDER)
def test_the_nearest_point_of_the_plane_is_a_margin_away(norm):
    X, y, w = make_separated(10, 4, margin=0.7, norm=norm, random_state=1)
    steepest = {
        "l1": np.sign(w) * (np.abs(w) == np.abs(w).max()),
        "l2": w / np.linalg.norm(w),
        "linf": np.sign(w),
    }[norm]
    towards = X - np.outer(2 * y - 1, 0.7 * steepest)
    np.testing.assert_allclose(towards @ w, 0, atol=1e-9)


def test_classes_alternate():
    _, y, _ = make_separated(5, 2, random_state=0)
    np.testing.assert_array_equal(y, [0, 1, 0, 1, 0])


def test_the_same_seed_makes_the_same_samples_and_none_makes_new_ones():
    first, again = (make_separated(random_state=3)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(make_separated()[0], make_separated()[0])


def test_samples_without_a_seed_leave_the_global_state_of_numpy_alone():
    before = global_state_of_numpy()
    make_separated()
    assert global_state_of_numpy() == before


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"norm": "l3"}, "Got norm='l3', but expected one of 'l1', 'l2', 'linf'"),
        ({"norm": "inf"}, "did you mean 'linf'"),
        ({"margin": 0}, "Got margin=0, but expected a positive finite number"),
        ({"margin": np.inf}, "Got margin=inf, but expected a positive"),
        ({"n_samples": 0}, "Got n_samples=0, but expected an integer of at least 1"),
        ({"n_features": 2.5}, r"Got n_features=2\.5, but expected an integer"),
    ],
)
def test_impossible_samples_are_rejected(params, match):
    with pytest.raises(ValueError, match=match):
        make_separated(**params)


@pytest.mark.parametrize("split", FILES)
@pytest.mark.parametrize("n_samples", [None, 2, 1000])
def test_mnist_is_read_as_pixels_between_0_and_1(written, split, n_samples):
    folder, splits = written
    images, labels = (array[:n_samples] for array in splits[split])
    X, y = load_mnist(split, n_samples=n_samples, folder=folder)
    assert (X.dtype, y.dtype) == (np.float32, np.int64)
    assert (X.min(), X.max()) == (0, 1)
    np.testing.assert_allclose(X * 255, images.reshape(len(images), 784), rtol=1e-6)
    np.testing.assert_array_equal(y, labels)


def test_images_hold_the_same_pixels_in_their_shape(written):
    folder, splits = written
    flat, _ = load_mnist(folder=folder)
    images, _ = load_mnist(folder=str(folder), as_images=True)
    assert images.shape == (5, 1, 28, 28)
    np.testing.assert_array_equal(images.reshape(5, 784), flat)
    np.testing.assert_allclose(images[:, 0] * 255, splits["train"][0], rtol=1e-6)


def test_the_loaded_arrays_may_be_written_to(written):
    X, y = load_mnist(folder=written[0])
    X[0, 0], y[0] = 0.5, 9


def test_mnist_is_found_where_the_environment_says(written, monkeypatch):
    folder, _ = written
    monkeypatch.setenv("SKJACOBIAN_DATA", str(folder.parent))
    assert find_mnist() == folder
    assert len(load_mnist()[0]) == 5


def test_an_absent_mnist_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("SKJACOBIAN_DATA", str(tmp_path))
    assert find_mnist() is None
    with pytest.raises(FileNotFoundError, match=r"MNIST was not found\..*set SKJACOBIAN_DATA"):
        load_mnist()


def test_a_folder_without_the_files_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3"):
        load_mnist(folder=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"not an IDX file", struct.pack(">HBB", 1, 8, 3), struct.pack(">HBB", 0, 13, 1) + b"\0" * 8],
    ids=["text", "magic", "floats"],
)
def test_a_file_of_another_format_is_named(written, content):
    path = written[0] / FILES["train"][0]
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"train-images.*, but expected an IDX file of unsigned"):
        load_mnist(folder=written[0])


def test_an_unknown_split_is_rejected_with_the_closest():
    with pytest.raises(ValueError, match=r"Got split='tests', but expected.*did you mean 'test'"):
        load_mnist("tests")


def test_the_real_mnist_is_itself():
    if find_mnist() is None:
        pytest.skip("MNIST was not found: set SKJACOBIAN_DATA to the folder that holds `mnist`")
    X, y = load_mnist()
    assert X.shape == (60000, 784)
    np.testing.assert_array_equal(y[:5], [5, 0, 4, 1, 9])
    np.testing.assert_array_equal(np.unique(y), np.arange(10))
    assert (X.min(), X.max()) == (0, 1)
    X, y = load_mnist("test", as_images=True)
    assert X.shape == (10000, 1, 28, 28)
    np.testing.assert_array_equal(y[:5], [7, 2, 1, 0, 4])
