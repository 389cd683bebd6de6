import random
import threading

import numpy as np
import pytest
import torch

from skjacobian._rng import (
    RandomStream,
    draw_seed,
    numpy_seeded,
    own_random_state,
    replayed_rng,
    seeded,
)

CPU = torch.device("cpu")


def draw_and_fail():
    torch.rand(10)
    raise KeyError("stop")


@pytest.fixture(autouse=True)
def _own_global_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        yield


def test_a_given_generator_is_used_as_it_is(generator):
    assert seeded(generator) is generator


def test_without_a_generator_a_fresh_one_is_made_and_the_global_one_left_alone():
    before = torch.get_rng_state()
    first, second = seeded(None), seeded(None)
    assert first.initial_seed() != second.initial_seed()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_random_state_a_fresh_one_is_made_and_the_global_one_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is the subject
    assert draw_seed(None) != draw_seed(None)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_given_random_state_is_used_as_it_is():
    random_state = np.random.RandomState(0)
    assert own_random_state(random_state) is random_state
    assert draw_seed(7) == draw_seed(7) == draw_seed(np.random.RandomState(7))


def test_a_stream_draws_what_a_generator_of_its_seed_draws():
    with RandomStream(5, CPU).borrowed():
        drawn = torch.rand(4)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(5)))


def test_a_stream_goes_on_where_it_stopped():
    stream = RandomStream(5, CPU)
    with stream.borrowed():
        first = torch.rand(3)
    torch.rand(100)
    with stream.borrowed():
        second = torch.rand(3)
    with RandomStream(5, CPU).borrowed():
        assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(3), torch.rand(3)]))


def test_borrowing_leaves_the_global_state_as_it_was():
    before = torch.get_rng_state()
    with RandomStream(5, CPU).borrowed():
        torch.rand(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_borrowing_leaves_the_global_state_as_it_was_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="stop"), RandomStream(5, CPU).borrowed():
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_may_be_borrowed_inside_one_another():
    outer, inner = RandomStream(1, CPU), RandomStream(2, CPU)
    with outer.borrowed():
        first = torch.rand(2)
        with inner.borrowed():
            torch.rand(2)
        second = torch.rand(2)
    expected = torch.Generator().manual_seed(1)
    assert torch.equal(first, torch.rand(2, generator=expected))
    assert torch.equal(second, torch.rand(2, generator=expected))


def test_streams_of_two_threads_do_not_disturb_each_other():
    drawn = {}

    def draw(seed):
        stream = RandomStream(seed, CPU)
        values = []
        for _ in range(50):
            with stream.borrowed():
                values.append(torch.rand(20))
        drawn[seed] = torch.stack(values)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(drawn)
    for seed in (1, 2):
        draw(seed)
        assert torch.equal(together[seed], drawn[seed])


def test_a_replay_repeats_the_draws_since_it_was_entered():
    with replayed_rng(CPU) as replay:
        drawn = torch.rand(5)
        with replay():
            again = torch.rand(5)
        with replay():
            once_more = torch.rand(5)
    assert torch.equal(drawn, again)
    assert torch.equal(drawn, once_more)


def test_a_replay_uses_up_no_draws():
    with replayed_rng(CPU) as replay:
        torch.rand(5)
        after = torch.get_rng_state()
        with replay():
            torch.rand(50)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_replay_restores_the_state_after_an_error():
    with replayed_rng(CPU) as replay:
        torch.rand(5)
        after = torch.get_rng_state()
        with pytest.raises(KeyError, match="stop"), replay():
            draw_and_fail()
        assert torch.equal(torch.get_rng_state(), after)


def test_seeding_numpy_leaves_its_global_state_as_it_was():
    draw = lambda: (np.random.random(), random.random())  # noqa: E731, NPY002
    before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    drawn = []
    for seed in (3, 3, 4, 2**40):
        with numpy_seeded(seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert len({*drawn}) == 3
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert random.getstate() == before[1]


def test_a_generator_of_another_kind_is_named():
    with pytest.raises(TypeError, match="Got generator=0, but expected a torch"):
        seeded(0)
