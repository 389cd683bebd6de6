"""Every sample is served once per epoch, with its label and its weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skjacobian._net.batches import Batches, Samples
from tests.seeds import seeded


def numbered(n_samples, weighted=False, n_features=2):
    """Samples that carry their number in X, y and weight."""
    number = torch.arange(n_samples)
    X = number.float().unsqueeze(1).repeat(1, n_features)
    return Samples(X, number, number.double() + 0.5 if weighted else None)


def served(batches):
    return torch.cat([y for _, y in batches])


@given(
    n_samples=st.integers(1, 40),
    batch_size=st.integers(1, 45),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_every_sample_is_served_once_with_its_label_and_weight(
    n_samples, batch_size, shuffle, drop_last
):
    batches = Batches(numbered(n_samples, weighted=True), batch_size, shuffle, drop_last, seeded(0))
    epoch = list(batches)
    n_full = n_samples // batch_size
    sizes = [len(batch[0]) for batch in epoch]
    assert len(batches) == len(epoch)
    assert all(size == batch_size for size in sizes[:-1])
    assert all(size == batch_size for size in sizes) or not drop_last
    assert sum(sizes) == (n_full * batch_size if drop_last else n_samples)
    # Batch normalization cannot be trained on one sample.
    assert min(sizes, default=2) > 1 or batch_size == 1 or n_samples == 1
    assert max(sizes, default=0) <= batch_size + 1
    numbers = [int(y) for batch in epoch for y in batch[1]]
    assert len(set(numbers)) == len(numbers)
    assert len(numbers) == (n_full * batch_size if drop_last else n_samples)
    for X, y in epoch:
        assert torch.equal(X[:, 0], y.float())
    for batch in epoch:
        assert torch.equal(batch.sample_weight, batch[1] + 0.5)


def test_without_shuffling_the_order_is_kept():
    assert torch.equal(served(Batches(numbered(10), 3)), torch.arange(10))


def test_the_order_follows_from_the_seed_and_changes_every_epoch():
    first, again, other = (
        Batches(numbered(50), 8, shuffle=True, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    epochs = [served(first), served(first)]
    assert torch.equal(epochs[0], served(again))
    assert torch.equal(epochs[1], served(again))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], served(other))


def test_shuffling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    served(Batches(numbered(20), 4, shuffle=True, generator=seeded(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_unpacks_as_a_pair_and_has_no_weights_unless_the_samples_have():
    (batch,) = Batches(numbered(3), 5)
    X, y = batch
    assert isinstance(batch, tuple)
    assert (X.shape, y.shape) == ((3, 2), (3,))
    assert batch.sample_weight is None


def test_images_keep_their_shape():
    samples = Samples(torch.zeros(8, 1, 4, 4), torch.zeros(8))
    assert [tuple(X.shape) for X, _ in Batches(samples, 3)] == [(3, 1, 4, 4)] * 2 + [(2, 1, 4, 4)]


def test_batches_are_copies_so_that_training_cannot_change_the_data():
    samples = numbered(4)
    for X, _ in Batches(samples, 4):
        X.zero_()
    assert torch.equal(samples.X, numbered(4).X)


@pytest.mark.parametrize("index", [2, slice(1, 3), torch.tensor([3, 0])])
def test_samples_are_a_dataset_of_pairs(index):
    samples = numbered(4)
    X, y = samples[index]
    assert len(samples) == 4
    assert torch.equal(X, samples.X[index])
    assert torch.equal(y, samples.y[index])
