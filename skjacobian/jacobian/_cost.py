"""What the Jacobian costs, written down: the rules by which ways of computing it are chosen.

Unit: floating point operations (2 for a multiplication and an addition). F is what one
forward pass of one sample takes, n the samples of a batch, C the classes.

=====================================  =========================  =========================
what                                   operations                 numbers kept for backward
=====================================  =========================  =========================
a step of plain training               3 n F                      n · activations
one row vJ, closed form                3 F: the product and       sum of the layers' widths
                                       its two gradients
one row vJ, by autograd                5 F: forward, backward,    activations of a forward
                                       and its backward           pass
‖A W‖² for R rows A, W (h, d):
  by the product                       6 R h d                    R d
  in the Gram form                     4 R h² + 4 h² d            R h
=====================================  =========================  =========================
"""

import math
from typing import Any, NamedTuple

import torch
from sklearn import get_config
from torch import Tensor

from skjacobian.jacobian._sizes import Sizes

# Share of a step of plain training that the default penalty may add; but with fewer rows than
# these, its noise shows in the network whatever the batch.
PENALTY_SHARE = 1 / 6
FEWEST_ROWS = 20
# Matrix products take rows by fours: 21 take as long as 24, a seventh longer than 20.
ROWS_OF_KERNELS = 4

# Where starting the kernels of a penalty takes far longer than running them, these come for
# free: operations and rows on one core, some 10 microseconds; operations on an accelerator,
# where the whole penalty of the MNIST networks took no longer than a part of it. Penalizing
# some batches and not others is noise of its own, which larger networks do not bear: on
# digits one to five points under attack were lost (docs/jacobian.md).
FREE_OPERATIONS = 1e6
FREE_ROWS = 128
# A batch of no more rows than the above is taken whole where it costs no more than this: the
# only way to count a weight of 2 as a sample twice, and few samples do not take long.
SMALL_BATCH_OPERATIONS = 1e7
FREE_ACCELERATED_OPERATIONS = 2e10

# Where `masked_product` pays on the CPU: it trades one product for passes over the weight, for each
# row; 64 samples make up for the passes, and so many operations for starting their kernels.
MASKED_SAMPLES = 64
MASKED_OPERATIONS = 4e6

# What it takes to leave a unit out: its weights are copied, and their gradient is put in its place,
# which takes as long as so many operations of a product for each of them.
OPERATIONS_OF_COPIES = 100
# Products of 217 units take a twentieth longer than those of 224, whose rows fill the registers.
UNITS_OF_KERNELS = 8

# Numbers of a block of rows that the caches of a CPU hold, with what is made of them.
NUMBERS_IN_BLOCK = 2**17

# What a row takes at the height of a pass over what it keeps: its gradients, and temporaries.
COPIES_OF_ROWS = 4

# Rows of convolutions in flight on the CPU: what its caches hold.
CPU_CACHE_BYTES = 8 * 2**20


class Sample(NamedTuple):
    """What of the batches a penalty is taken on.

    Attributes
    ----------
    n_samples : int
        Of each batch that is penalized.
    class_samples : int or None
        Classes of each of these samples; None is all.
    every : int
        One in so many batches is penalized.
    """

    n_samples: int
    class_samples: int | None
    every: int = 1


def affordable_sample(
    n_samples: int, sizes: Sizes, rows_of_one: float, rows_add: bool, accelerated: bool = False
) -> Sample:
    """Return a sample that costs about a sixth of the operations of plain training.

    3 F for a row against 3 n F for a step: a row for every sixth sample of the batch, by
    fours, and 20 rows at least. Where a norm is a sum over classes the rows go to as many
    samples as possible: rows of different samples say more about the mean than rows of one.

    Where the network is so small that starting the kernels of a penalty takes longer than
    running them, one batch in three is penalized instead, on as many rows as make little
    difference to its time. On an accelerator that holds for most networks, and all samples
    and classes of every batch are penalized. So are batches of few rows by small networks.

    On MNIST this trains the network that the whole penalty trains, within the noise of five
    seeds, but for λ that cost two points of clean accuracy and more: there it ends up to 1.4
    points lower under attack after three or four epochs (docs/jacobian.md).

    Parameters
    ----------
    n_samples : int
        Of the batch.
    sizes : Sizes
    rows_of_one : float
        Rows that the norm of one sample takes.
    rows_add : bool
        Whether classes may be drawn.
    accelerated : bool
        Whether the network is on an accelerator.
    """
    whole = 3 * sizes.operations * n_samples * rows_of_one
    if accelerated and sizes.operations and whole < FREE_ACCELERATED_OPERATIONS:
        return Sample(n_samples, None)
    rows = max(PENALTY_SHARE * n_samples // ROWS_OF_KERNELS * ROWS_OF_KERNELS, FEWEST_ROWS)
    every = 1
    if 3 * sizes.operations * rows < FREE_OPERATIONS and sizes.operations:
        rows = max(FREE_ROWS, FREE_OPERATIONS / (3 * sizes.operations))
        every = 3
    few_rows = n_samples * rows_of_one <= FREE_ROWS and 0 < whole <= SMALL_BATCH_OPERATIONS
    if few_rows or rows >= n_samples * rows_of_one:
        return Sample(n_samples, None, every)
    if not rows_add:
        return Sample(max(1, round(rows / rows_of_one)), None, every)
    n_penalized = min(n_samples, max(1, round(rows)))
    n_classes = min(sizes.n_classes, max(1, int(rows / n_penalized)))
    return Sample(n_penalized, n_classes, every)


def gram_pays(n_rows: int, n_hidden: int, n_features: int) -> bool:
    """Tell whether ‖A W‖² is cheaper by W Wᵀ than by A W, gradients included."""
    by_product = 6 * n_rows * n_hidden * n_features
    by_gram = 4 * n_rows * n_hidden**2 + 4 * n_hidden**2 * n_features
    return by_gram < by_product


def masked_product_pays(n_samples: int, W: Tensor) -> bool:
    """Tell whether `masked_product` beats the chain rule.

    It saves one of three products, for passes over the weight row by row.
    """
    saved = 2 * n_samples * W.numel()
    return n_samples >= MASKED_SAMPLES and saved >= MASKED_OPERATIONS and not W.is_cuda


def leaving_out_pays(n_rows: int, n_left: int, n_units: int) -> bool:
    """Tell whether products of so many rows, and their gradients, are cheaper with fewer units.

    For each weight of a unit that is left out they save 6 operations a row.
    """
    return 6 * n_rows * (n_units - n_left) > OPERATIONS_OF_COPIES * n_left


def blocks_pay(n_rows: int, W: Tensor) -> bool:
    """Tell whether so many rows A W are better made and reduced block by block."""
    return not W.is_cuda and n_rows * W.shape[1] > 2 * NUMBERS_IN_BLOCK


def samples_in_block(numbers: int) -> int:
    """Return how many samples, of so many numbers each, make a block."""
    return max(1, NUMBERS_IN_BLOCK // numbers)


def rows_that_fit(numbers: int, dtype: torch.dtype, limit: float = math.inf) -> int:
    """Return how many rows of so many numbers fit into the memory that may be used.

    The limit is scikit-learn's: `sklearn.set_config(working_memory=...)`, in MiB; `limit`
    is another, in bytes, on what the rows keep.
    """
    kept = get_config()["working_memory"] * 2**20 / COPIES_OF_ROWS
    return max(1, int(min(limit, kept) // (max(1, numbers) * dtype.itemsize)))


def rows_at_once(linearization: Any) -> int:
    """Return how many rows of Jacobians may be in flight, for memory and for the caches."""
    cached = linearization.convolves and linearization.device.type == "cpu"
    limit = CPU_CACHE_BYTES if cached else math.inf
    numbers = linearization.numbers_per_row() + linearization.shape[1]
    return rows_that_fit(numbers, linearization.dtype, limit)
