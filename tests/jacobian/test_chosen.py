import pytest
import torch

from skjacobian.jacobian._chosen import at, n_chosen, spread


@pytest.mark.parametrize("places", [None, [4, 0, 2], []], ids=repr)
def test_what_is_spread_stands_where_it_was_taken_from(places):
    index = None if places is None else torch.tensor(places, dtype=torch.int64)
    values = torch.arange(1.0, 8.0)
    chosen = at(values, index)
    assert len(chosen) == n_chosen(len(values), index)
    expected = [float(i + 1) if places is None or i in places else 0.0 for i in range(7)]
    assert spread(chosen, index, len(values)).tolist() == expected
