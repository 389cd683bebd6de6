"""The votes of classifiers of pairs of classes, and margins that an attack can follow."""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from skjacobian.differentiable._registry import View

# Decisions count for the gradient of a margin by how near they are to it: less by e at this
# share of it. Measured from 0.1 to 1.6 on support vector machines; 0.4 to 1.6 do as well.
WIDTH = 0.8


class Votes(View):
    """One decision for each pair of classes, in the order (0, 1), (0, 2), …, (1, 2), …

    Decisions are tensors of shape (n_samples, n_pairs), positive for the first class of the
    pair, which gets its vote.

    Parameters
    ----------
    n_classes : int
        Three or more.
    """

    pairs: Tensor
    place: Tensor
    sign: Tensor

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        first, second = np.array(list(combinations(range(n_classes), 2))).T
        pairs = np.eye(n_classes)[first] - np.eye(n_classes)[second]
        place = np.zeros((n_classes, n_classes), dtype=np.int64)
        place[first, second] = place[second, first] = np.arange(len(pairs))
        # Of the first class of a pair against the second the decision is positive.
        sign = np.triu(np.ones((n_classes, n_classes)), 1)
        self.hold(pairs=pairs, place=place, sign=sign - sign.T)

    def count(self, decisions: Tensor) -> Tensor:
        """Return how many of its pairs each class wins; of a decision of 0 the second class."""
        return self._sum(torch.where(decisions > 0, 1.0, -1.0))

    def scores(self, decisions: Tensor, confidence: Tensor) -> Tensor:
        """Return the votes for each class plus what its confidences come to, within ±1/3.

        Of a decision of 0 the vote is that of the first class. The gradient is that of votes
        that are no steps, but rise and fall over the average decision of the sample.
        """
        votes = self._sum(torch.where(decisions >= 0, 1.0, -1.0))
        width = WIDTH * decisions.detach().abs().mean(1, keepdim=True)
        width = width.clamp(min=torch.finfo(width.dtype).tiny)
        gradual = self._sum(decisions / (width + decisions.abs()))
        total = confidence @ self.pairs
        return votes + (gradual - gradual.detach()) + total / (3 * (total.abs() + 1))

    def _sum(self, wins: Tensor) -> Tensor:
        """Return the votes for each class: 1 counts for the first of a pair, -1 for the second."""
        # Wins and losses add up to n_classes - 1, and differ by this product.
        return (wins.to(self.pairs) @ self.pairs + self.pairs.shape[1] - 1) / 2

    def margins(self, decisions: Tensor, predicted: Tensor, confidence: Tensor | None) -> Tensor:
        """Return 0 for the class predicted, c, and less for each other class k that is farther.

        Votes are steps, without a gradient. So k is told by the least t that puts it ahead of
        c if all decisions about k change by t in its favour, and all about c against it. By
        then half of the votes in `_changes` are won by k or lost by c, and one more unless k
        is ahead of c where both have as many: t is one of the two medians of these changes.

        As a value that is exact, so that k is predicted where its logit comes to 0. The
        gradient is that of an average of the changes around it: the one that happens to be
        in the middle misleads, and left PGD ten points more of digits.

        Parameters
        ----------
        decisions : Tensor of shape (n_samples, n_pairs)
        predicted : Tensor of int of shape (n_samples,)
        confidence : Tensor of shape (n_samples, n_pairs), or None
            By whose sums ties are broken; None breaks them in favour of the first class.

        Returns
        -------
        Tensor of shape (n_samples, n_classes)
        """
        changes, n_classes = self._changes(decisions, predicted), self.pairs.shape[1]
        level, ahead = changes[..., n_classes - 1], changes[..., n_classes]
        lead = self._lead(predicted, confidence)
        least = torch.minimum(ahead, torch.maximum(level, lead)).detach()
        least = least.clamp(min=torch.finfo(least.dtype).tiny)
        breaks_tie = (level < lead) & (lead < ahead)
        followed = torch.where(breaks_tie, lead, _average_around(changes, least))
        margins = least + (followed - followed.detach())
        return -margins.scatter(1, predicted.unsqueeze(1), 0.0)

    def _changes(self, decisions: Tensor, predicted: Tensor) -> Tensor:
        """Return what wins k a vote or costs c one, in rising order.

        Of shape (n_samples, n_classes, 2 n_classes): for each k the decisions of the others
        over k, and those of c over the others, from -inf to inf.
        """
        n_classes = self.pairs.shape[1]
        own = torch.eye(n_classes, dtype=torch.bool, device=decisions.device)
        over = decisions[:, self.place] * self.sign
        # A class has no decision over itself: the lowest value and the highest, one in each
        # half of the row, leave its middle where it is.
        of_others = over.mT.masked_fill(own, -torch.inf)
        row = predicted.reshape(-1, 1, 1).expand(-1, 1, n_classes)
        of_predicted = over.masked_fill(own, torch.inf).gather(1, row)
        return torch.cat([of_others, of_predicted.expand(-1, n_classes, -1)], 2).sort(2).values

    def _lead(self, predicted: Tensor, confidence: Tensor | None) -> Tensor:
        """Return the change that it takes a class to be ahead of c where votes are level."""
        if confidence is None:
            classes = torch.arange(self.pairs.shape[1], device=predicted.device)
            comes_first = classes < predicted.unsqueeze(1)
            return torch.where(comes_first, -torch.inf, torch.inf).to(self.pairs)
        total = confidence @ self.pairs
        lead = total.gather(1, predicted.unsqueeze(1)) - total
        # As if the change moved both totals by as much for each decision about the two.
        return lead / (2 * (self.pairs.shape[1] - 1))


def _average_around(values: Tensor, centre: Tensor) -> Tensor:
    """Return an average along the last dimension, of finite values and near ones above all."""
    finite = values.isfinite()
    distance = (values.detach() - centre.unsqueeze(2)).abs() / (WIDTH * centre.unsqueeze(2))
    # Where all are too far for exp, the same for all.
    weight = (-distance.clamp(max=1e6)).masked_fill(~finite, -torch.inf).softmax(2)
    return (weight * torch.where(finite, values, 0.0)).sum(2)
