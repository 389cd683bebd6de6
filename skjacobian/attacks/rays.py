"""Search for the shortest fooling ray, knowing no more than which class is predicted."""

from typing import Any, ClassVar

import torch

from skjacobian._validation import check_count, check_flag
from skjacobian.attacks._base import Attack
from skjacobian.attacks._rays import Rays
from skjacobian.attacks._search import Search
from skjacobian.constraints import FeatureConstraints


class RayS(Attack):
    """Ray search: the direction in which the nearest fooling point lies, by decisions alone.

    After RayS (Chen & Gu, arXiv 2006.12792). Each fooling point is (u, r), direction and
    distance. A new direction u' is tried at a little less than r, which costs one query; if it
    still fools, a search along u' lowers r further. A sample is finished as soon as r <= eps, or
    with `minimal` only with its last query.

    For linf, u' is u with the signs of a block of features flipped, blocks being halved from
    sweep to sweep, as in the paper; then random sets of features are flipped. Where at most 10
    features may change, every second query is about a point between the corners: neighbours
    have pockets there. The first directions are random. The paper's is (1, …, 1), which finds
    more with few queries on images with a black background. The other norms are an extension of
    ours: u' is u with a block set to zero, or with noise added to it, or, with at most 100
    features, any direction in which only some of them change: trees are weakest against these.
    For l2 the boundary's normal is estimated too from decisions around the fooling point, as in
    HopSkipJump (Chen, Jordan & Wainwright, arXiv 1904.02144), and followed along the circle
    through clean and fooling point on which every point is nearer (Reza et al., ICCV 2023,
    CGBA). For l1 there is only the extension, which promises least.

    It asks for nothing but the predicted class, so that it runs on trees, neighbours, and
    whatever else has neither gradients nor probabilities worth following.

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
        How often at most the model is asked about each sample.
    minimal : bool, default=False
        Whether to spend all queries and return the shortest ray found, as `FMN` does; eps is then
        the largest radius that is looked at.

    Examples
    --------
    >>> import torch
    >>> X, y = torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    >>> def decide(X):
    ...     return torch.eye(2)[(X[:, 1] > X[:, 0]).long()]
    >>> attack = RayS(norm="linf", eps=0.3)
    >>> found = attack.search(decide, X, y, generator=torch.Generator().manual_seed(0))
    >>> found.fooled
    tensor([True])
    """

    needs: ClassVar[str] = "labels"

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
        minimal: bool = False,
    ) -> None:
        self.norm = norm
        self.eps = eps
        self.feature_scale = feature_scale
        self.bounds = bounds
        self.mutable = mutable
        self.constraints = constraints
        self.n_queries = n_queries
        self.minimal = minimal

    def check_params(self) -> None:
        """Raise a ValueError that names the first parameter with a bad value."""
        super().check_params()
        check_count("n_queries", self.n_queries)
        check_flag("minimal", self.minimal)

    def _search(self, search: Search, generator: torch.Generator) -> None:
        if not search.restart():
            return
        # Whether what is returned fools may be asked once more at the end, but for linf.
        budget = max(1, check_count("n_queries", self.n_queries) - (self.norm != "linf"))
        bounds = self.bounds_of(search.ball.X)
        rays = Rays(search, bounds, generator, budget, minimal=self.minimal)
        if rays.left > 0:
            rays.ask_clean()
        while rays.left > 1 and rays.drop():
            if rays.is_time_to_climb():
                rays.climb()
            else:
                rays.step()
        if rays.left > 0 and rays.start.numel() > 0:
            rays.finish()
