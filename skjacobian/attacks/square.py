"""Square attack: random search by scores alone (Andriushchenko et al., arXiv 1912.00049)."""

from typing import Any

import torch
from torch import Tensor

from skjacobian._validation import check_count, check_number
from skjacobian.attacks._base import Attack
from skjacobian.attacks._search import Search
from skjacobian.attacks._square_moves import CornerMoves, MassMoves, Moves
from skjacobian.constraints import FeatureConstraints

# The share of the features that one proposal changes is halved at each of these of 10,000
# steps (section 4.1).
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Square(Attack):
    """Square attack: change random parts of a sample, keep what raises the margin.

    A black-box attack: it asks for logits or probabilities only, so it runs on models
    without gradients (trees) or with misleading ones (Andriushchenko et al., arXiv
    1912.00049, algorithms 1 to 3; for l1 Croce & Hein, arXiv 2103.01208, section 4). Images
    are changed in squares over all channels; flat samples in random subsets of features.

    Parameters
    ----------
    norm : {"linf", "l2", "l1"}, default="linf"
        Norm of the ball.
    eps : float or Tensor of shape (n_samples,), default=0.1
        Radius: ‖(X_adv - X) / feature_scale‖ <= eps. A tensor has one value per sample.
    feature_scale : None, "std", "range" or array of shape (n_features,), default=None
        Unit of each feature; None is 1, "std" and "range" are those of the X attacked.
    bounds : (low, high), optional
        Numbers or one value per feature. None means unbounded; there is no implicit clip.
    mutable : int, or array-like of int or bool, optional
        Features that may change: indices, or a boolean mask. None is all.
    constraints : FeatureConstraints, optional
        What else makes a sample valid, columns given by index.
    n_queries : int, default=1000
        How often each sample is shown to the model in one restart, at most. The clean
        sample is the first; for l1 and l2 one query more may confirm the result.
    p_init : float, default=0.8
        Share of the features, in (0, 1], that the first proposals change. It is halved nine
        times over the queries.
    n_restarts : int, default=1
        Independent searches.

    Notes
    -----
    Samples whose last one or two dimensions are no image axes should be given flat.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> X, y = torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    >>> attack = Square(norm="linf", eps=0.2, n_queries=50)
    >>> attack(lambda X: X @ W.T, X, y, generator=torch.Generator().manual_seed(0))
    tensor([[0.8000, 0.7000]])
    """

    needs = "scores"

    def __init__(
        self,
        *,
        norm: str = "linf",
        eps: Any = 0.1,
        feature_scale: Any = None,
        bounds: Any = None,
        mutable: Any = None,
        constraints: FeatureConstraints | None = None,
        n_queries: int = 1000,
        p_init: float = 0.8,
        n_restarts: int = 1,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.n_queries = n_queries
        self.p_init = p_init
        self.n_restarts = n_restarts

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super().check_params()
        check_count("n_queries", self.n_queries)
        check_count("n_restarts", self.n_restarts)
        self._p_init()

    def _p_init(self) -> float:
        return check_number("p_init", self.p_init, lambda v: 0 < v <= 1, "a number in (0, 1]")

    def share(self, step: int) -> float:
        """Return the share of the features that the proposal of this step, from 0, changes."""
        rescaled = 10_000 * step / check_count("n_queries", self.n_queries)
        return self._p_init() * 0.5 ** sum(mark < rescaled for mark in HALVED_AT)

    def _search(self, search: Search, generator: torch.Generator) -> None:
        n_queries = check_count("n_queries", self.n_queries)
        if not search.restart():
            return
        X = search.ball.X
        search.record(X, search.margin(X), ~search.done)
        for restart in range(check_count("n_restarts", self.n_restarts)):
            first = restart == 0  # to which the clean sample counts
            if not search.restart():
                return
            self._climb(search, n_queries - 1 if first else n_queries, generator)

    def _climb(self, search: Search, n_queries: int, generator: torch.Generator) -> None:
        """Search once with the samples that are active."""
        if n_queries == 0:
            return
        moves: Moves = (CornerMoves if self.norm == "linf" else MassMoves)(search.ball)
        best, _ = _ask(search, moves.start(generator))
        for step in range(n_queries):
            search.end(moves.X_adv, best, best > 0)
            kept = search.drop(step)
            if kept is not None:
                moves.select(search.ball, kept)
                best = best[kept]
            if len(best) == 0 or step == n_queries - 1:
                break
            found, rounding = _ask(search, moves.propose(self.share(step), generator))
            # Equal is good enough: it leads across the plateaus of trees. A difference that
            # depends on the size of the batch must not decide.
            moves.keep(found >= best - rounding)
            best = torch.where(found > best, found, best)
        search.record(moves.X_adv, best, ~search.done)


def _ask(search: Search, X_adv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margin of each active sample, and what rounding may have made of it."""
    found, rounding = search.margin_and_rounding(search.logits(X_adv))
    return (found - rounding).to(X_adv.dtype), rounding.to(X_adv.dtype)
