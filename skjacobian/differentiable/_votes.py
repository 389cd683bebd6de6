"""The votes of classifiers of pairs of classes, and margins that an attack can follow."""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from skjacobian.differentiable._registry import View

# Changes of decisions count for the gradient of a margin by how near they are to it: less by e
# at this multiple of it. Attacks on digits find most from 0.4 to 1.6, on iris the more the
# larger it is.
WIDTH = 1.0

# Probabilities of 0 and 1 make infinite decisions, which can be neither added nor divided.
LARGEST = 1e100


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
        decisions = _finite(decisions)
        width = WIDTH * decisions.detach().abs().mean(1, keepdim=True)
        width = width.clamp(min=torch.finfo(width.dtype).tiny)
        gradual = self._sum(decisions / (width + decisions.abs()))
        total = confidence @ self.pairs
        return votes + (gradual - gradual.detach()) + shrunk(total)

    def _sum(self, wins: Tensor) -> Tensor:
        """Return the votes for each class: 1 counts for the first of a pair, -1 for the second."""
        # Wins and losses add up to n_classes - 1, and differ by this product.
        return (wins.to(self.pairs) @ self.pairs + self.pairs.shape[1] - 1) / 2

    def margins(self, decisions: Tensor, predicted: Tensor, confidence: Tensor | None) -> Tensor:
        """Return 0 for the class predicted, c, and less for each other class k that is farther.

        Votes are steps, without a gradient. So k is told by the least change t of decisions
        that puts it ahead of c (`_least_change`): its logit rises to 0 where k is predicted.
        The gradient of t is that of an average of the changes around it: the one that happens
        to be the least misleads more often than not (docs/architecture.md).

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
        lead = self._first(predicted) if confidence is None else self._lead(predicted, confidence)
        changes = self._changes(_finite(decisions), predicted)
        least, breaks_tie = self._least_change(changes, lead)
        followed = torch.where(breaks_tie, lead, _average_around(changes, least))
        margins = least + (followed - followed.detach())
        return -margins.scatter(1, predicted.unsqueeze(1), 0.0)

    def _changes(self, decisions: Tensor, predicted: Tensor) -> Tensor:
        """Return what wins k a vote or costs c one: by how much decisions about them change.

        Of shape (n_samples, n_classes, 2 n_classes): for each k the decisions of the others
        over k, and those of c over the others. A class has none over itself; -inf stands
        for one of these, and inf for the other, which leaves the middle where it is.
        """
        n_classes = self.pairs.shape[1]
        own = torch.eye(n_classes, dtype=torch.bool, device=decisions.device)
        over = decisions[:, self.place] * self.sign
        of_others = over.mT.masked_fill(own, -torch.inf)
        row = predicted.reshape(-1, 1, 1).expand(-1, 1, n_classes)
        of_predicted = over.masked_fill(own, torch.inf).gather(1, row)
        return torch.cat([of_others, of_predicted.expand(-1, n_classes, -1)], 2)

    @torch.no_grad()
    def _least_change(self, changes: Tensor, lead: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least t that puts k ahead of c, and whether that is what breaks a tie.

        All decisions about k change by t in its favour, and all about c against it. Where
        half of the `changes` are smaller than t both have as many votes: then k is ahead if
        t exceeds the `lead` of c. One more, and it is ahead anyhow.
        """
        n_classes = changes.shape[1]
        middle = changes.sort(2).values[..., n_classes - 1 : n_classes + 1]
        level, ahead = middle.unbind(2)
        least = torch.minimum(ahead, torch.maximum(level, lead))
        return least.clamp(min=torch.finfo(least.dtype).tiny), (level < lead) & (lead < ahead)

    def _lead(self, predicted: Tensor, confidence: Tensor) -> Tensor:
        """Return how far each decision about c and k has to change for their sums to be equal."""
        total = confidence @ self.pairs
        return (total.gather(1, predicted.unsqueeze(1)) - total) / (2 * self.pairs.shape[1] - 2)

    def _first(self, predicted: Tensor) -> Tensor:
        """Return the lead of c where the first class is ahead: none, or one beyond all."""
        classes = torch.arange(self.pairs.shape[1], device=predicted.device)
        comes_first = classes < predicted.unsqueeze(1)
        return torch.where(comes_first, -torch.inf, torch.inf).to(self.pairs)


def shrunk(total: Tensor) -> Tensor:
    """Return sums of confidences within ±1/3, so that they decide between equal votes alone."""
    return total / (3 * (total.abs() + 1))


def _finite(decisions: Tensor) -> Tensor:
    return decisions.clamp(-LARGEST, LARGEST)


def _average_around(values: Tensor, centre: Tensor) -> Tensor:
    """Return an average along the last dimension, of finite values and near ones above all."""
    with torch.no_grad():
        centre = centre.unsqueeze(2)
        distance = (values - centre).abs_().div_(WIDTH * centre)
        # Where all are too far for exp, the same for all.
        distance = distance.clamp_(max=1e6).masked_fill_(values.isinf(), torch.inf)
        weight = distance.neg_().softmax(2)
    return (weight * values.masked_fill(values.isinf(), 0.0)).sum(2)
