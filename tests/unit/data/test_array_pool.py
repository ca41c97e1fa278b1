"""Memory that is used again, and never while somebody holds it."""

import numpy as np
import torch

from dc_megatron.data.array_pool import ArrayPool


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_last_view_is_gone():
    pool = ArrayPool(np.float32)
    tensor = torch.from_numpy(pool.take(4, 3))
    place = tensor.data_ptr()
    row = tensor[1:2]
    del tensor
    assert address(pool.take(4, 3)) != place
    del row
    assert {address(a) for a in (pool.take(2, 2), pool.take(4, 3))} & {place}


def test_arrays_in_use_are_apart():
    pool = ArrayPool(np.uint8)
    held = []
    for number in range(20):
        array = pool.take(number % 5 + 1, 7)
        assert array.shape == (number % 5 + 1, 7)
        array[...] = number
        held.append((number, array))
        if number % 3 == 0:
            held.pop(0)
        for value, kept in held:
            assert (kept == value).all()


def test_blocks_that_are_too_small_make_room():
    pool = ArrayPool(np.uint8)
    for size in range(1, 50):
        pool.take(size)
    assert len(pool._blocks) == 1


def test_an_array_of_nothing_has_its_shape():
    assert ArrayPool(np.float32).take(0, 3, 5, 5).shape == (0, 3, 5, 5)
