"""The cascade against its own stages, closed forms and brute force; its budgets and resumption."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, make_blobs
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVC

from skjacobian import evaluate_robustness, robustness_curve
from skjacobian.attacks import PGD, Cascade, Square
from skjacobian.attacks.cascade import PLANS
from skjacobian.exceptions import AttackWarning
from tests.attacks.problems import make_problem, margins
from tests.seeds import seeded
from tests.slow import others_slow

NORMS = ["linf", "l2", "l1"]
every_norm = pytest.mark.parametrize("norm", NORMS)
# What the longest stages come to here. In earnest they take far more, for which tests are short.
FEW_QUERIES, FEW_RESTARTS = 150, 2


@pytest.fixture(autouse=True)
def short_stages(shorten_stages):
    shorten_stages(n_queries=FEW_QUERIES, n_restarts=FEW_RESTARTS)


def all_stages(norm):
    known = "gradients in l1 balls of few features" if norm == "l1" else "gradients of few features"
    return ["clean", *(plan.name for plan in PLANS[known])]


EPS = {"linf": 0.04, "l2": 0.08, "l1": 0.15}
# That of 120 features in that of 6.
FAR = {"linf": 0.25, "l2": 1.0, "l1": 3.0}


# --- what it finds -----------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("n_features", [6, 120])
def test_it_is_no_weaker_than_any_of_its_stages(norm, n_features):
    net, X, y = make_problem(n_features=n_features)
    threat = {"norm": norm, "eps": EPS[norm] * (1 if n_features == 6 else FAR[norm])}
    fooled = Cascade(**threat).search(net, X, y, generator=seeded()).fooled
    assert 5 < fooled.sum() < 55
    for stage in (
        PGD(n_steps=40),
        PGD(n_steps=40, loss="cross_entropy"),
        PGD(n_steps=20, n_targets=9),
        Square(n_queries=300),
    ):
        alone = stage.set_params(**threat).search(net, X, y, generator=seeded()).fooled
        assert (alone & ~fooled).sum() <= 1


def best_u(g, eps, low, high, norm):
    """argmax gᵀu over the ball and the box around the origin."""
    if norm == "linf":
        return np.clip(eps * np.sign(g), low, high)
    if norm == "l1":  # greedily, from the steepest feature on
        u, left = np.zeros_like(g), eps
        for j in np.argsort(-np.abs(g)):
            u[j] = np.clip(np.sign(g[j]) * left, low[j], high[j])
            left -= abs(u[j])
        return u
    near, far = 0.0, 1e9
    for _ in range(200):
        t = (near + far) / 2
        inside = np.linalg.norm(np.clip(t * g, low, high)) <= eps
        near, far = (t, far) if inside else (near, t)
    return np.clip(near * g, low, high)


@pytest.mark.parametrize(
    ("norm", "scale", "bounds", "mutable"),
    [
        ("linf", None, None, None),
        ("linf", [0.2, 0.5, 1.0, 1.5, 2.0, 3.0], (0.0, 1.0), None),
        ("l2", None, (0.0, 1.0), [0, 2, 3, 5]),
        ("l2", [0.2, 0.5, 1.0, 1.5, 2.0, 3.0], None, [0, 2, 3, 5]),
        ("l1", [0.2, 0.5, 1.0, 1.5, 2.0, 3.0], (0.0, 1.0), None),
        ("l1", None, (0.0, 1.0), [0, 2, 3, 5]),
    ],
    ids=["plain", "scaled in a box", "some in a box", "some scaled", "scaled in a box", "box"],
)
def test_of_a_linear_model_it_fools_exactly_whom_it_can(norm, scale, bounds, mutable):
    W = torch.randn(4, 6, generator=seeded(), dtype=torch.float64)
    X = torch.rand(40, 6, generator=seeded(1), dtype=torch.float64)
    X = (0.5 + 1.4 * (X - 0.5)).clamp(0, 1)  # many features lie on the box
    b = (X @ W.T).mean(0)
    y = (X @ W.T - b).argmax(1)
    eps = {"linf": 0.05, "l2": 0.12, "l1": 0.25 if scale is None else 0.1}[norm]
    unit = np.ones(6) if scale is None else np.array(scale)
    free = np.isin(np.arange(6), range(6) if mutable is None else mutable)
    low, high = (-np.inf, np.inf) if bounds is None else bounds
    logits = (X @ W.T - b).numpy()
    worst = np.full(40, -np.inf)
    for i, x in enumerate(X.numpy()):
        for k in set(range(4)) - {int(y[i])}:
            g = (W[k] - W[y[i]]).numpy() * unit * free
            u = best_u(g, eps, (low - x) / unit, (high - x) / unit, norm)
            worst[i] = max(worst[i], logits[i, k] - logits[i, y[i]] + g @ u)
    attack = Cascade(norm=norm, eps=eps, bounds=bounds, feature_scale=scale, mutable=mutable)
    found = attack.search(lambda X: X @ W.T - b, X, y, generator=seeded())
    assert 3 < (worst > 0).sum() < 37
    assert found.fooled.tolist() == (worst > 0).tolist()


@every_norm
def test_it_finds_whom_brute_force_finds(norm):
    net, X, y = make_problem(n=60, n_features=2, n_classes=4, width=12, seed=3)
    eps = {"linf": 0.1, "l2": 0.12, "l1": 0.15}[norm]
    axis = torch.linspace(-eps, eps, 201, dtype=torch.float64)
    deltas = torch.cartesian_prod(axis, axis)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    deltas = deltas[torch.linalg.vector_norm(deltas, order, dim=1) <= eps]
    by_force = torch.stack(
        [(net(x + deltas).argmax(1) != k).any() for x, k in zip(X, y, strict=True)]
    )
    found = Cascade(norm=norm, eps=eps).search(net, X, y, generator=seeded())
    assert 5 < by_force.sum() < 55
    assert (by_force & ~found.fooled).sum() == 0
    assert (found.fooled & ~by_force).sum() <= 2  # between the points of the grid


# --- the scale of the logits, and other outputs ------------------------------------------


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        ("linf", torch.float32),
        ("linf", torch.float64),
        ("l2", torch.float32),
        ("l1", torch.float64),
    ],
    ids=str,
)
def test_multiplying_the_logits_fools_the_same_samples(norm, dtype):
    net, X, y = make_problem(n=40, dtype=dtype)
    attack = Cascade(norm=norm, eps=EPS[norm])
    fooled = attack.search(net, X, y, generator=seeded()).fooled
    for factor in (1e-3, 1e4):
        scaled = attack.search(lambda X, c=factor: c * net(X), X, y, generator=seeded()).fooled
        if dtype == torch.float64:
            assert torch.equal(scaled, fooled)
        else:
            assert (scaled != fooled).sum() <= 1


def test_multiplying_the_logits_blinds_cross_entropy():
    net, X, y = make_problem(dtype=torch.float32)
    attack = PGD(eps=EPS["linf"], loss="cross_entropy")
    plain = attack.search(net, X, y, generator=seeded()).fooled.sum()
    with pytest.warns(AttackWarning, match="The loss gradient was zero"):
        blind = attack.search(lambda X: 1e4 * net(X), X, y, generator=seeded()).fooled.sum()
    assert blind < 0.5 * plain


@pytest.mark.parametrize("norm", others_slow(["linf", "l2", "l1"], ["l2"]))
def test_probabilities_are_recognised(norm):
    net, X, y = make_problem()
    attack = Cascade(norm=norm, eps=EPS[norm])
    by_logits = attack.search(net, X, y, generator=seeded())
    by_probabilities = attack.search(lambda X: net(X).softmax(1), X, y, generator=seeded())
    assert torch.equal(by_probabilities.fooled, by_logits.fooled)
    torch.testing.assert_close(by_probabilities.X_adv, by_logits.X_adv, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", others_slow(["linf", "l2", "l1"], ["linf"]))
def test_a_model_whose_gradients_are_zero_is_searched_by_its_scores(norm):
    net, X, y = make_problem()

    def rounded(X):
        return (50 * net(X)).round() / 50 + 0 * X.sum(1, keepdim=True)

    y = rounded(X).argmax(1)
    with pytest.warns(AttackWarning, match=r"zero at the first step of \d+ of 60 samples"):
        found = Cascade(norm=norm, eps=EPS[norm]).search(rounded, X, y, generator=seeded())
    clean = found.stages[0].fooled
    assert found.no_gradient.sum() >= 55  # the others were fooled by a random start
    assert found.no_gradient[~found.fooled].all()
    assert torch.equal(found.fooled, margins(rounded, found.X_adv, y) > 0)
    # Under l1 the first stage asks about vertices, too, and these need no gradient.
    blind = ("PGD",) if norm == "l1" else ("Square", "Square, briefly", "Square, longer")
    by_scores = torch.stack([s.fooled for s in found.stages if s.name in blind]).any(0)
    assert not clean.any()
    # Random starts alone fool some; with gradients, nearly all that scores find are found.
    true = Cascade(norm=norm, eps=EPS[norm]).search(net, X, y, generator=seeded()).fooled
    assert by_scores.sum() >= 5
    assert found.fooled.sum() >= 0.8 * true.sum()


@pytest.mark.parametrize(
    ("norm", "graph"),
    [("linf", "none"), ("linf", "of the weights"), ("l2", "none"), ("l1", "none")],
)
def test_a_model_that_is_not_differentiable_is_searched_by_its_scores(norm, graph):
    net, X, y = make_problem(n=30)
    net.requires_grad_(graph != "none")

    def model(X):
        return net(X.detach())

    attack = Cascade(norm=norm, eps=EPS[norm])
    by = ["Square", "RayS"] if norm == "linf" else ["RayS", "Square"]
    said = rf"does not depend on X differentiably.*\({', '.join(by)}\)"
    with pytest.warns(AttackWarning, match=said):
        found = attack.search(model, X, y, generator=seeded())
    assert [stage.name for stage in found.stages] == ["clean", *by]
    assert found.complete
    square = Square(norm=norm, eps=EPS[norm], n_queries=FEW_QUERIES)
    alone = square.search(model, X, y, generator=seeded(1)).fooled
    assert alone.sum() > 3
    assert (alone & ~found.fooled).sum() <= 1


@every_norm
def test_a_model_that_returns_decisions_is_searched_by_them(norm):
    net, X, y = make_problem(n=30)

    def decide(X):
        return torch.eye(3, dtype=X.dtype)[net(X).argmax(1)]

    attack = Cascade(norm=norm, eps=EPS[norm])
    with pytest.warns(AttackWarning, match=r"returns only decisions.*\(RayS"):
        found = attack.search(decide, X, y, generator=seeded())
    by = ["RayS", "Square"] if norm == "linf" else ["RayS"]
    assert [stage.name for stage in found.stages] == ["clean", *by]
    assert torch.equal(found.fooled, net(found.X_adv).argmax(1) != y)
    full = attack.search(net, X, y, generator=seeded()).fooled
    assert 0.7 * full.sum() <= found.fooled.sum() <= full.sum() + 1


def test_saturated_probabilities_are_no_decisions():
    net, X, y = make_problem(dtype=torch.float32)
    # In float32 the largest is 1 and the others are tiny, but they tell where to go.
    large = 60 / (-margins(net, X, y)).clamp(min=0.2).max()

    def model(X):
        return (large * net(X)).softmax(1)

    sure = model(X).amax(1) == 1
    assert sure.sum() > 5
    attack = Cascade(eps=EPS["linf"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = attack.search(model, X[sure], y[sure], generator=seeded())
    assert [stage.name for stage in found.stages] == all_stages("linf")
    by_logits = attack.search(net, X[sure], y[sure], generator=seeded())
    assert (found.fooled != by_logits.fooled).sum() <= 1


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize(
    ("n_classes", "dtype"), [(2, torch.float32), (2, torch.float64), (1000, torch.float32)]
)
@every_norm
def test_two_and_a_thousand_classes(norm, n_classes, dtype):
    net, X, y = make_problem(n=20, n_classes=n_classes, dtype=dtype)
    found = Cascade(norm=norm, eps=EPS[norm]).search(net, X, y, generator=seeded())
    assert torch.equal(found.fooled, net(found.X_adv).argmax(1) != y)
    assert found.fooled.sum() > 0
    assert found.complete


# --- stages and counts -------------------------------------------------------------------


class Counting:
    """A model that counts how often it sees each sample, which its first feature names."""

    def __init__(self, net, n):
        self.net, self.seen, self.n_calls = net, torch.zeros(n, dtype=torch.long), 0

    def __call__(self, X):
        self.seen[X[:, 0].round().long()] += 1
        self.n_calls += 1
        return self.net(X[:, 1:])


def counted(norm, n=60, **params):
    """A problem in which the first feature, which may not change, is the sample's number."""
    net, X, y = make_problem(n=n)
    y[::7] = (y[::7] + 1) % 3
    X = torch.cat([torch.arange(n, dtype=X.dtype).unsqueeze(1), X], 1)
    attack = Cascade(norm=norm, eps=EPS[norm], mutable=range(1, 7), **params)
    return Counting(net, n), X, y, attack


@pytest.mark.usefixtures("brief_stages")
@every_norm
def test_the_stages_add_up(norm):
    model, X, y, attack = counted(norm)
    found = attack.search(model, X, y, generator=seeded())
    assert [stage.name for stage in found.stages] == all_stages(norm)
    assert found.complete
    fooled = torch.stack([stage.fooled for stage in found.stages])
    assert fooled.sum(0).max() == 1  # by one of them
    differ = fooled.any(0) != found.fooled
    assert differ.sum() <= (norm != "linf")  # what rounding takes back in the end
    assert torch.equal(found.stages[0].fooled, model(X).argmax(1) != y)

    n_queries = sum(stage.n_queries for stage in found.stages)
    confirmation = found.n_queries - n_queries
    # Who was moved by a rounding error at the end is asked about once more.
    assert confirmation.min() >= 0
    assert confirmation.max() <= (norm != "linf")
    model.seen -= 1  # the look at the clean samples, above
    assert torch.equal(model.seen, found.n_queries)
    # Misclassified samples are asked about once.
    assert (n_queries[found.stages[0].fooled] == 1).all()
    assert all(stage.seconds >= 0 for stage in found.stages)


def test_stages_that_cost_much_run_on_few():
    model, X, y, attack = counted("linf")
    found = attack.search(model, X, y, generator=seeded())
    stages = {stage.name: stage for stage in found.stages}
    standing = ~found.fooled
    assert 5 < standing.sum() < 55
    for name, most in (("clean", 1), ("PGD", 41), ("Square, briefly", 100)):
        assert stages[name].n_queries.max() <= most
        assert (stages[name].n_queries[standing] > 0).all()
    # Towards each of two wrong classes; what follows, only near the boundary.
    assert 0 < stages["PGD, targeted"].n_queries.max() <= 2 * 41
    assert (stages["PGD, restarted"].n_queries[standing] > 0).double().mean() < 0.9
    assert (stages["Square"].n_queries[standing] > 0).double().mean() < 0.9
    for i, stage in enumerate(found.stages):  # nobody is asked about who has fallen
        for later in found.stages[i + 1 :]:
            assert (later.n_queries[stage.fooled] == 0).all()


@pytest.mark.parametrize("n_queries", [1, 42, 43, 70, 2000])
@every_norm
def test_queries_never_exceed_their_budget(norm, n_queries):
    model, X, y, attack = counted(norm, n_queries=n_queries)
    found = attack.search(model, X, y, generator=seeded())
    assert torch.equal(model.seen, found.n_queries)
    assert found.n_queries.max() <= n_queries + (norm != "linf")
    assert found.complete == all(stage.complete for stage in found.stages)
    assert found.complete == (n_queries == 2000)
    assert found.stages[-1].complete == found.complete
    assert torch.equal(found.fooled, model(found.X_adv).argmax(1) != y)


@every_norm
def test_a_larger_budget_fools_no_fewer(norm):
    model, X, y, _ = counted(norm)
    previous = torch.zeros(60, dtype=torch.bool)
    for n_queries in (1, 5, 20, 100, None):
        attack = Cascade(norm=norm, eps=EPS[norm], mutable=range(1, 7), n_queries=n_queries)
        fooled = attack.search(model, X, y, generator=seeded()).fooled
        assert not (previous & ~fooled).any()
        previous = fooled


@pytest.mark.parametrize("model", ["gradients", "scores", "labels"])
def test_a_time_limit_stops_the_search(model):
    net, X, y = make_problem()
    models = {
        "gradients": net,
        "scores": lambda X: net(X.detach()),
        "labels": lambda X: torch.eye(3, dtype=X.dtype)[net(X).argmax(1)],
    }
    y[::5] = (y[::5] + 1) % 3
    attack = Cascade(eps=EPS["linf"], time_limit=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attack.search(models[model], X, y, generator=seeded())
    assert not found.complete
    # What is returned is true even then.
    assert torch.equal(found.fooled, net(found.X_adv).argmax(1) != y)
    assert found.fooled.sum() == 12
    assert (found.n_queries <= 1).all()


# --- resumption --------------------------------------------------------------------------


def same(first, second, at=None):
    assert torch.equal(first.fooled, second.fooled)
    at = torch.ones_like(first.fooled) if at is None else at
    assert torch.equal(first.X_adv[at], second.X_adv[at])
    assert torch.equal(first.no_gradient, second.no_gradient)
    standing = ~first.fooled
    for one, other in zip(first.stages, second.stages, strict=True):
        assert one.name == other.name
        assert torch.equal(one.n_queries[standing], other.n_queries[standing])


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("norm", others_slow(["linf", "l2", "l1"], ["l1"]))
def test_resuming_ends_where_a_search_without_a_break_ends(norm):
    model, X, y, attack = counted(norm, n=40)
    whole = attack.search(model, X, y, generator=seeded(4))
    for n_queries in (1, 5, 30, 60):
        cut = attack.set_params(n_queries=n_queries).search(model, X, y, generator=seeded(4))
        assert not cut.complete or n_queries == 60
        attack.set_params(n_queries=None)
        resumed = attack.search(model, X, y, generator=seeded(4), resume=cut)
        assert resumed.complete
        # Of points that differ by rounding errors, any may be kept of a sample that stands.
        same(resumed, whole, at=whole.fooled)
        kept, expected = (margins(model.net, found.X_adv[:, 1:], y) for found in (resumed, whole))
        torch.testing.assert_close(kept, expected, rtol=1e-6, atol=1e-9)
        assert (resumed.n_queries >= cut.n_queries).all()
        # The stages that were complete are not run again.
        done = [stage for stage in cut.stages if stage.complete]
        for before, after in zip(done, resumed.stages, strict=False):
            assert before is after


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("kind", ["zero", "NaN", "NaN on the way", "scores", "labels"])
def test_resuming_remembers_where_gradients_mislead(kind):
    net, X, y = make_problem(n=20)
    marked = (X[:, :1] > 0).double()  # samples without a gradient: a feature that is fixed
    assert 3 < marked.sum() < 17
    X[:, 1] = X[:, 0] / 2

    def model(X):
        logits, at = net(X), X[:, :1] > 0
        if kind == "zero":
            # Zero at the first step only; later steps are taken at other points.
            return torch.where(at, (20 * logits).round() / 20, logits)
        if kind == "NaN":
            bad = torch.where(X[:, 1:2].detach() > 10, 1.0, (0.0 * X[:, :1]).abs().sqrt())
            return torch.where(at, logits + bad, logits)
        if kind == "NaN on the way":  # which no first gradient tells
            return logits.masked_fill(at & (X[:, 1:2] > X[:, :1] / 2 + 0.03), torch.nan)
        if kind == "labels":
            return torch.eye(3, dtype=X.dtype)[logits.argmax(1)]
        return logits.detach()

    y = model(X).argmax(1)
    attack = Cascade(eps=EPS["linf"], mutable=range(1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = attack.search(model, X, y, generator=seeded(4))
        for n_queries in (1, 15, 60):
            cut = attack.set_params(n_queries=n_queries).search(model, X, y, generator=seeded(4))
            attack.set_params(n_queries=None)
            resumed = attack.search(model, X, y, generator=seeded(4), resume=cut)
            # Of points on one plateau, which differ by rounding errors, any may be kept.
            same(resumed, whole, at=whole.fooled | (kind not in ("zero", "NaN")))
            if kind == "NaN":
                kept, expected = (margins(net, found.X_adv, y) for found in (resumed, whole))
                torch.testing.assert_close(kept, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("brief_stages")
@every_norm
def test_resuming_loses_nothing_that_was_found(norm):
    model, X, y, attack = counted(norm, n=40, n_queries=100)
    found = attack.search(model, X, y, generator=seeded(4))
    for params in ({"n_queries": 1}, {"n_queries": 2}, {"n_queries": None, "time_limit": 1e-9}):
        again = attack.set_params(**params).search(model, X, y, generator=seeded(4), resume=found)
        assert torch.equal(again.fooled, found.fooled)
        assert torch.equal(again.X_adv, found.X_adv)
        assert not again.complete
        assert (again.n_queries - found.n_queries).max() <= 2 + (norm != "linf")


def test_a_search_may_be_resumed_again_and_again():
    model, X, y, attack = counted("linf", n=40)
    whole = attack.search(model, X, y, generator=seeded(4))
    found, attack, n_complete = None, attack.set_params(n_queries=60), 0
    for _ in range(4):
        found = attack.search(model, X, y, generator=seeded(4), resume=found)
        assert sum(stage.complete for stage in found.stages) >= n_complete
        n_complete = sum(stage.complete for stage in found.stages)
    assert n_complete >= 2  # clean and PGD at least
    attack.set_params(n_queries=None)
    resumed = attack.search(model, X, y, generator=seeded(4), resume=found)
    same(resumed, whole, at=whole.fooled)


def test_what_is_complete_is_resumed_at_the_cost_of_a_look():
    model, X, y, attack = counted("linf")
    whole = attack.search(model, X, y, generator=seeded(4))
    again = attack.search(model, X, y, generator=seeded(4), resume=whole)
    same(again, whole)
    assert (again.n_queries - whole.n_queries).max() <= 2


def test_resuming_another_search_is_an_error():
    net, X, y = make_problem()
    found = Cascade(eps=0.1, n_queries=5).search(net, X, y)
    message = "Got resume of another search, but expected what a search of the same X and y under"
    others = [
        (Cascade(eps=0.1), X[:10], y[:10]),
        (Cascade(eps=0.1), X.flip(0), y.flip(0)),
        (Cascade(eps=0.1), X, 1 - y),
        (Cascade(eps=0.2), X, y),
        (Cascade(eps=0.1, norm="l2"), X, y),
        (Cascade(eps=0.1, bounds=(torch.zeros(X.shape[1]), 1.0)), X, y),
    ]
    for attack, samples, labels in others:
        with pytest.raises(ValueError, match=message):
            attack.search(net, samples, labels, resume=found)


# --- the rest ----------------------------------------------------------------------------


@pytest.mark.usefixtures("brief_stages")
@every_norm
def test_neither_order_nor_batches_change_the_result(norm):
    net, X, y = make_problem(n=30)
    attack = Cascade(norm=norm, eps=EPS[norm])
    whole = attack.search(net, X, y, generator=seeded())
    same(attack.search(net, X, y, generator=seeded()), whole)
    order = torch.randperm(30, generator=seeded(1))
    shuffled = attack.search(net, X[order], y[order], generator=seeded())
    assert torch.equal(shuffled.fooled, whole.fooled[order])
    torch.testing.assert_close(shuffled.X_adv, whole.X_adv[order])
    parts = [
        attack.search(net, X[i : i + 17], y[i : i + 17], generator=seeded())
        for i in range(0, 30, 17)
    ]
    assert torch.equal(torch.cat([part.fooled for part in parts]), whole.fooled)
    torch.testing.assert_close(torch.cat([part.X_adv for part in parts]), whole.X_adv)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_queries": 0}, "Got n_queries=0, but expected an integer of at least 1"),
        ({"n_queries": 1.5}, "Got n_queries=1.5, but expected an integer of at least 1"),
        ({"time_limit": 0}, "Got time_limit=0, but expected a positive finite number"),
        ({"time_limit": math.inf}, "Got time_limit=inf, but expected a positive finite number"),
        ({"norm": "l0"}, "Got norm='l0', but expected one of"),
    ],
    ids=repr,
)
def test_bad_parameters_are_rejected(params, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Cascade(**params)(*make_problem())


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.9), ("l2", 1.0), ("l1", 1.4)])
def test_it_looks_inside_the_ball(norm, eps):
    # The other class is near all samples, and the corners of their balls are plateaus beyond it.
    centers = [[0, 0], [0.45, 0.45], [-0.45, 0.45], [0.45, -0.45], [-0.45, -0.45]]
    X, cluster = make_blobs([60, 10, 10, 10, 10], centers=centers, cluster_std=0.05, random_state=0)
    y = (cluster > 0).astype(int)
    model = SVC().fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        report = evaluate_robustness(model, X, y, norm=norm, eps=eps)
    _, curve = robustness_curve(model, X, y, norm=norm, eps=[eps])
    points = np.random.default_rng(0).uniform(-1.5, 1.5, (2000, 2))
    nearest = np.linalg.norm(
        X[:, None] - points, ord={"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=2
    )
    fools = model.predict(points) != y[:, None]
    brute_force = (nearest.min(axis=1, where=fools, initial=np.inf) > eps).mean()
    assert brute_force == curve[0] == 0
    assert report.robust_accuracy <= 0.02
    assert report.raised


def test_rays_find_what_flat_scores_hide():
    """Votes of neighbours are 0 and 1 around most samples: Square has nothing to climb."""
    X, y = load_breast_cancer(return_X_y=True)
    X = MinMaxScaler().fit_transform(X)
    model = KNeighborsClassifier(5).fit(X[::2], y[::2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = evaluate_robustness(model, X[1:80:2], y[1:80:2], norm="l2", eps=0.25)
    fooled = {stage.name: stage.n_fooled for stage in report.stages}
    assert fooled["RayS"] > 0
