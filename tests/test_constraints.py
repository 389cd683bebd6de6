"""FeatureConstraints: what attacks try and return obeys them, exactly."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from skjacobian import (
    AdversarialClassifier,
    FeatureConstraints,
    RobustScorer,
    adversarial_distances,
    robustness_curve,
)
from skjacobian._columns import Columns
from skjacobian._under_attack import UnderAttack
from skjacobian.attacks import APGD, FGSM, FMN, PGD, Cascade, RayS, Square
from skjacobian.exceptions import AttackWarning
from skjacobian.geometry import Ball
from skjacobian.threat_model import resolve_feature_scale
from tests.slow import others_slow

pytestmark = pytest.mark.usefixtures("short_stages")

RNG = np.random.default_rng(0)
N = 40
FRAME = pd.DataFrame(
    {
        "age": RNG.integers(18, 80, N),
        "income": RNG.normal(3, 1, N),
        "debt": RNG.normal(0, 2, N),
        **{f"job_{k}": 0.0 for k in "abc"},
        "children": RNG.integers(0, 4, N).astype(float),
    }
)
JOB = RNG.integers(0, 3, N)
for k, name in enumerate("abc"):
    FRAME[f"job_{name}"] = (k == JOB).astype(float)
JOBS = ["job_a", "job_b", "job_c"]
Y = (FRAME.age / 30 + FRAME.income + FRAME.job_b - FRAME.debt / 2 > 5).astype(int).to_numpy()
MODEL = LogisticRegression(max_iter=2000).fit(FRAME, Y)
ALL = FeatureConstraints(
    immutable=["debt"],
    integer=["children"],
    increasing=["age"],
    decreasing=["income"],
    one_hot=[JOBS],
    scale={"age": 5, "income": 0.5},
    bounds={"children": (0, 10), "age": (0, 75)},
)
INSIDE = FRAME[FRAME.age <= 75]


def attacked(attack, X, y, constraints, norm, eps, model=MODEL):
    """The samples that an attack returns through everything that a scorer does."""
    subject = UnderAttack(model, X, y, needs=attack.needs)
    armed = subject.arm(
        attack,
        norm=norm,
        eps=eps,
        feature_scale=None,
        bounds=None,
        mutable=None,
        constraints=constraints,
    )
    return subject.perturb(armed, np.arange(len(X))).X_adv


ATTACKS = {
    "FGSM": FGSM(),
    "PGD": PGD(n_steps=10),
    "APGD": APGD(n_steps=10),
    "FMN": FMN(n_steps=6),
    "Square": Square(n_queries=50),
    "RayS": RayS(n_queries=60),
    "RayS, minimal": RayS(n_queries=60, minimal=True),
}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.filterwarnings("ignore::skjacobian.exceptions.AttackWarning")
def test_every_attack_obeys_every_constraint(name, norm):
    attack = ATTACKS[name]
    if norm not in attack.norms:
        pytest.skip(f"{name} knows no {norm}")
    y = Y[INSIDE.index]
    X_adv = attacked(attack, INSIDE, y, ALL, norm, 1.0)
    assert (X_adv.dtypes == INSIDE.dtypes).all()
    assert (X_adv.debt == INSIDE.debt).all()
    assert (X_adv.age >= INSIDE.age).all()
    assert (X_adv.age <= 75).all()
    assert (X_adv.income <= INSIDE.income).all()
    assert X_adv.children.between(0, 10).all()
    assert (X_adv.children == X_adv.children.round()).all()
    assert (X_adv[JOBS].sum(axis=1) == 1).all()
    assert X_adv[JOBS].isin([0, 1]).all(axis=None)
    delta = (X_adv - INSIDE).to_numpy() / [5, 0.5, 1, 1, 1, 1, 1]
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    assert (np.linalg.norm(delta, order, axis=1) <= 1).all()
    assert np.abs(delta).max() > 0


def brute_force(model, x, y, norm, eps, reach, group):
    """Whether any valid sample of whole numbers and one category within eps fools."""
    whole = [np.arange(v - reach, v + reach + 1) for v in x[: len(x) - group]]
    everything = np.array(list(itertools.product(*whole, range(group))))
    candidates = np.c_[everything[:, :-1], np.eye(group)[everything[:, -1].astype(int)]]
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    within = np.linalg.norm(candidates - x, order, axis=1) <= eps
    return (model.predict(candidates[within]) != y).any()


@pytest.mark.parametrize(
    ("norm", "eps"), others_slow([("linf", 1), ("l1", 2), ("l2", 1.5)], [("l2", 1.5)])
)
def test_of_whole_numbers_and_categories_the_strong_attack_finds_what_brute_force_finds(norm, eps):
    rng = np.random.default_rng(1)
    X = np.column_stack([rng.integers(-4, 5, (60, 3)), np.eye(2)[rng.integers(0, 2, 60)]])
    X = X.astype(float)
    y = (X @ [1.0, -2.0, 0.7, 1.3, 0.0] + 0.3 > 0).astype(int)
    model = LogisticRegression(C=100).fit(X, y)
    constraints = FeatureConstraints(integer=[0, 1, 2], one_hot=[[3, 4]])
    scorer = RobustScorer(norm=norm, eps=eps, attack="strong", constraints=constraints)
    right = model.predict(X) == y
    fooled = [brute_force(model, x, k, norm, eps, int(eps), 2) for x, k in zip(X, y, strict=True)]
    assert scorer(model, X, y) == np.mean(right & ~np.array(fooled))


def test_a_category_that_cannot_be_left_takes_no_others_with_it():
    # In linf balls: what the first group may not do undid the change of the second as well.
    constraints = FeatureConstraints(one_hot=[[0, 1], [2, 3]])
    X = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    attack = PGD(norm="linf", eps=1.5, feature_scale=[1, 0.3, 1, 1], constraints=constraints)
    ball = attack.ball(X)
    wanted = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    valid = ball.valid(ball.enforce(ball.project(wanted)))
    assert valid.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert bool(ball.contains(valid).all())


@pytest.mark.parametrize("attack", [PGD(norm="l2"), FMN(), Cascade()], ids=repr)
def test_of_no_samples_none_is_attacked(attack):
    constrained = attack.set_params(constraints=FeatureConstraints(one_hot=[[0, 1]]))
    none = constrained(torch.nn.Identity(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert none.shape == (0, 3)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_directional_columns_have_the_closed_form_of_half_a_ball(norm):
    rng = np.random.default_rng(2)
    X = rng.normal(size=(80, 4))
    w = np.array([1.0, -2.0, 0.5, 1.5])
    y = (X @ w > 0).astype(int)
    model = LogisticRegression(C=1e3, fit_intercept=False).fit(X, y)
    w = model.coef_[0]
    constraints = FeatureConstraints(increasing=[0, 1], decreasing=[2], immutable=[3])
    # Towards the boundary the score must fall where y = 1 and rise where y = 0.
    towards = np.where(y[:, None] == 1, -w, w)
    usable = np.maximum(towards, 0) * [1, 1, 0, 0] + np.maximum(-towards, 0) * [0, 0, 1, 0]
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    slope = np.linalg.norm(usable, dual, axis=1)
    radii = np.abs(X @ w) / np.maximum(slope, 1e-300)
    eps = float(np.median(radii))
    right = model.predict(X) == y
    scorer = RobustScorer(norm=norm, eps=eps * 1.001, attack="strong", constraints=constraints)
    assert scorer(model, X, y) == np.mean(right & (radii > eps * 1.001))
    distances = adversarial_distances(model, X, y, norm=norm, constraints=constraints)
    np.testing.assert_allclose(
        distances[right & (radii < 1e3)], radii[right & (radii < 1e3)], rtol=1e-3
    )


def test_integer_columns_of_a_frame_stay_integers_without_being_named():
    X_adv = attacked(PGD(n_steps=10), FRAME, Y, None, "linf", 2.5)
    assert X_adv.age.dtype == FRAME.age.dtype
    assert (X_adv.age - FRAME.age).abs().max() == 2


def test_scale_and_range_of_bool_are_those_of_zeros_and_ones():
    # They were 0 and unknown: in units learned, categories of bool could not change at all.
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"age": rng.normal(size=60), "job": rng.choice(list("abc"), 60)})
    y = (X.age + 2 * (X.job == "a") > 0.7).astype(int)
    jobs = ["job_a", "job_b", "job_c"]
    model = LogisticRegression().fit(pd.get_dummies(X, dtype=float), y)
    for scale in ("std", "range", {"job_a": "std", "job_b": "range", "job_c": 0.5}):
        said = FeatureConstraints(one_hot=[jobs], immutable="age", scale=scale, bounds="train")
        found, learned = [], []
        for dtype in (bool, float):
            dummies = pd.get_dummies(X, dtype=dtype)
            constraints = clone(said).fit(dummies[:40])
            learned.append([constraints.scale_, constraints.low_, constraints.high_])
            found.append(
                adversarial_distances(model, dummies, y, constraints=constraints, n_steps=5)
            )
        np.testing.assert_array_equal(*learned)
        np.testing.assert_array_equal(*found)
        assert np.isfinite(found[0]).any()


def test_another_scale_needs_no_other_fit():
    frame = pd.DataFrame({"a": [0.0, 1.0, 5.0], "b": [0.0, 2.0, 4.0]})
    constraints = FeatureConstraints(scale="std").fit(frame)
    for scale in ("range", {"b": "std"}, {"a": "range", "b": 3.0}):
        again = FeatureConstraints(scale=scale).fit(frame)
        np.testing.assert_array_equal(constraints.set_params(scale=scale).scale_, again.scale_)
    assert not hasattr(constraints.set_params(scale={"b": 3.0}), "scale_")


def test_equal_numbers_have_a_scale_of_zero():
    # 1000000.1 is not its own mean, by rounding; with missing values the mean is another again.
    X = np.random.default_rng(0).normal(size=(200, 2)) * [1, 0] + [0, 1e6 + 0.1]
    assert X[:, 1].copy().std() > 0
    assert resolve_feature_scale("std", torch.full((10, 1), 0.1)) == 0
    assert FeatureConstraints(scale="std").fit(X).scale_[1] == 0
    X[0] = np.nan
    assert FeatureConstraints(scale={1: "std"}).fit(X).scale_[1] == 0
    assert resolve_feature_scale("std", torch.from_numpy(X))[1] == 0


def test_train_bounds_and_scale_are_those_of_the_data_that_fit_saw():
    constraints = FeatureConstraints(bounds="train", scale="range").fit(FRAME)
    # A sample beyond the range of the training data stays, and moves no farther out.
    beyond = FRAME[:5].assign(income=100.0)
    X_adv = attacked(PGD(n_steps=10), beyond, Y[:5], constraints, "linf", 0.5)
    assert (X_adv.income <= 100).all()
    assert (X_adv.debt <= FRAME.debt.max()).all()
    reach = 0.5 * (FRAME.debt.max() - FRAME.debt.min())
    assert (X_adv.debt - beyond.debt).abs().max() <= reach
    assert clone(constraints).low_ is constraints.low_


def test_a_scale_is_learned_for_all_columns_or_for_some():
    spread = FRAME.std(ddof=0)
    known = {"std": spread, "range": FRAME.max() - FRAME.min()}
    mixed = FeatureConstraints(scale={"debt": "range", "age": 3, "income": "std"}).fit(FRAME)
    assert mixed.scale_.tolist() == pytest.approx(
        [
            {"debt": known["range"].debt, "age": 3, "income": spread.income}.get(name, 1.0)
            for name in FRAME.columns
        ]
    )
    for name in known:
        each = FeatureConstraints(scale=dict.fromkeys(FRAME.columns, name)).fit(FRAME)
        together = FeatureConstraints(scale=name).fit(FRAME)
        np.testing.assert_allclose(each.scale_, together.scale_)
    # What was learned goes with the names.
    turned = FRAME[FRAME.columns[::-1]]
    scorers = [
        RobustScorer(
            norm="l2",
            eps=0.5,
            constraints=FeatureConstraints(scale={"debt": "range", "age": 3, "income": "std"}).fit(
                table
            ),
        )
        for table in (FRAME, turned)
    ]
    assert scorers[0](MODEL, FRAME, Y) == scorers[1](MODEL, FRAME, Y)
    with pytest.raises(NotFittedError):
        RobustScorer(constraints=FeatureConstraints(scale={"age": "std"}))(MODEL, FRAME, Y)
    for scale in ({"age": "mean"}, {"age": -1}, {"age": np.nan}, {"age": None}, 3):
        with pytest.raises(ValueError, match=r"Got scale=.*but expected a mapping of columns"):
            FeatureConstraints(scale=scale).fit(FRAME)
    with pytest.raises(ValueError, match=r"Got scale={'age': -1}, but expected"):
        RobustScorer(constraints=FeatureConstraints(scale={"age": -1}))(MODEL, FRAME, Y)


def test_missing_values_are_left_alone():
    X = FRAME.drop(columns="age").astype(float)
    X.iloc[::3, 0] = np.nan
    filled = X.fillna(X.mean())
    model = LogisticRegression().fit(filled, Y)

    class Filling(LogisticRegression):
        def predict(self, X):
            return model.predict(X.fillna(filled.mean()))

        def predict_proba(self, X):
            return model.predict_proba(X.fillna(filled.mean()))

    filling = Filling().fit(filled, Y)
    with pytest.warns(match="differentiably"):
        X_adv = attacked(Cascade(n_queries=200), X, Y, None, "l2", 1.0, model=filling)
    assert (X_adv.isna() == X.isna()).all(axis=None)
    assert (X_adv - X).abs().max().max() > 0


def test_the_valid_samples_pass_gradients_through():
    X = torch.tensor([[1.0, 2.0, float("nan")]], dtype=torch.float64)
    rules = FeatureConstraints(integer=[0]).resolve(X)
    ball = Ball.around(X, norm="linf", eps=1.0, rules=rules)
    point = torch.tensor([[1.7, 2.3, 0.0]], dtype=torch.float64, requires_grad=True)
    valid = ball.valid(point)
    assert valid[0, :2].tolist() == [2.0, 2.3]
    assert valid[0, 2].isnan()
    valid.sum().backward()
    assert point.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_a_search_over_parameters_keeps_fitted_constraints():
    X = FRAME.astype(float)
    constraints = FeatureConstraints(bounds="train", scale="std").fit(X)
    scorer = RobustScorer(norm="l2", eps=0.2, constraints=constraints)
    search = GridSearchCV(MODEL, {"C": [0.1, 1]}, scoring=scorer, cv=2, error_score="raise")
    assert 0 < clone(search).fit(X, Y).best_score_ < 1


def test_what_was_learned_goes_with_the_names():
    constraints = FeatureConstraints(bounds="train", scale="std").fit(FRAME[FRAME.columns[::-1]])
    scorer = RobustScorer(norm="l2", eps=0.5, constraints=constraints)
    same = FeatureConstraints(bounds="train", scale="std").fit(FRAME)
    assert scorer(MODEL, FRAME, Y) == clone(scorer).set_params(constraints=same)(MODEL, FRAME, Y)


def test_a_fit_on_an_array_forgets_the_names_of_an_earlier_one():
    constraints = FeatureConstraints(bounds="train").fit(FRAME.add_prefix("old_"))
    constraints.fit(FRAME.to_numpy())
    assert not hasattr(constraints, "feature_names_in_")
    assert RobustScorer(eps=0.0, constraints=constraints)(MODEL, FRAME, Y) == MODEL.score(FRAME, Y)


def test_a_mask_says_which_columns():
    mask = np.array([True, False, False])
    X = torch.zeros(2, 3)
    for columns in (mask, mask.tolist(), [0], np.array([0])):
        assert FeatureConstraints(immutable=columns).resolve(X).immutable.tolist() == mask.tolist()


def test_a_copy_is_another_object_with_the_same_knowledge():
    constraints = FeatureConstraints(bounds="train").fit(FRAME)
    copied = clone(constraints).set_params(immutable=["age"])
    assert constraints.immutable is None
    assert copied.low_ is constraints.low_


@pytest.mark.parametrize("norm", others_slow(["linf", "l2", "l1"], ["linf"]))
def test_distances_of_whole_numbers_and_categories_are_no_larger_than_scores_say(norm):
    rng = np.random.default_rng(3)
    X = pd.DataFrame({"k": rng.integers(0, 6, 60), "f": rng.normal(size=60)})
    y = (X.k + X.f > 2.5).astype(int)
    model = LogisticRegression(C=100).fit(X, y)
    radii = [0.6, 1.2]
    whole = FeatureConstraints(integer=["k"])
    scorer = RobustScorer(norm=norm, eps=radii, attack="strong", constraints=whole)
    strong = list(scorer(model, X, y).values())[1:]
    _, curve = robustness_curve(model, X, y, norm=norm, eps=radii, constraints=whole)
    np.testing.assert_allclose(curve, strong, atol=1.1 / 60)


def test_whole_numbers_that_cannot_move_are_said():
    X = FRAME[["age"]]
    model = LogisticRegression().fit(X, Y)
    with pytest.warns(AttackWarning, match="at which no feature can change"):
        assert RobustScorer(eps=0.9)(model, X, Y) == model.score(X, Y)
    assert RobustScorer(eps=2)(model, X, Y) < model.score(X, Y)


BAD = [
    ({"integer": ["income"]}, r"Got X with fractions in columns \(income\)"),
    ({"one_hot": [["job_a", "job_b"]]}, r"not one-hot in columns \(job_a, job_b\)"),
    ({"bounds": {"age": (5, 1)}}, "Got bounds=.*low <= high"),
    ({"bounds": (0, 1)}, r"Got bounds=\(0, 1\), but expected a mapping"),
    ({"bounds": {"age": (None, 5)}}, "Got bounds=.*, but expected a mapping"),
    ({"scale": [1.0, 2.0]}, r"Got scale=\[1.0, 2.0\], but expected a mapping"),
    ({"bounds": "test"}, "Got bounds='test', but expected one of 'train'"),
    ({"scale": {"age": -1}}, "Got scale=.*positive finite"),
    ({"bounds": {"age": (0, 20)}}, r"samples outside the bounds of columns \(age\)"),
    (
        {"increasing": ["age", "debt"], "decreasing": ["income", "age"]},
        r"Got increasing and decreasing with the same columns \(age\), but expected each in one",
    ),
    (
        {"one_hot": [JOBS, ["job_a", "children"]]},
        r"Got one_hot with columns \(job_a\) in several groups, but expected each in one",
    ),
    ({"one_hot": [JOBS, []]}, "Got one_hot=.*, but expected columns in each group"),
]


@pytest.mark.parametrize(("params", "match"), BAD, ids=[str(p) for p, _ in BAD])
def test_bad_constraints_are_named(params, match):
    scorer = RobustScorer(constraints=FeatureConstraints(**params))
    with pytest.raises(ValueError, match=match):
        scorer(MODEL, FRAME, Y)
    trained = AdversarialClassifier(max_epochs=1, constraints=scorer.constraints)
    with pytest.raises(ValueError, match=match):
        trained.fit(FRAME, Y)


def test_columns_of_an_array_that_break_constraints_are_said_by_index():
    scorer = RobustScorer(constraints=FeatureConstraints(integer=[0, 1, 4]))
    with pytest.raises(ValueError, match=r"Got X with fractions in columns \(1\)"):
        scorer(LogisticRegression(max_iter=2000).fit(FRAME.to_numpy(), Y), FRAME.to_numpy(), Y)


def test_constraints_that_learn_must_be_fitted_on_as_many_columns():
    with pytest.raises(NotFittedError, match="not fitted"):
        RobustScorer(constraints=FeatureConstraints(bounds="train"))(MODEL, FRAME, Y)
    constraints = FeatureConstraints(bounds="train").fit(FRAME[["age"]])
    with pytest.raises(ValueError, match=r"Got X with the columns .* fitted on: \['age'\]"):
        RobustScorer(constraints=constraints)(MODEL, FRAME, Y)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"feature_scale": "std"}, "Got feature_scale='std' and FeatureConstraints with scale"),
        ({"bounds": (0, 100)}, r"Got bounds=\(0, 100\) and FeatureConstraints with bounds"),
        ({"constraints": "age"}, "Got constraints='age', but expected None or FeatureConstraints"),
    ],
)
def test_nothing_is_said_twice(params, match):
    with pytest.raises(ValueError, match=match):
        RobustScorer(**{"constraints": ALL, **params})(MODEL, INSIDE, Y[INSIDE.index])


def test_names_need_a_data_frame():
    with pytest.raises(ValueError, match="names need a DataFrame"):
        PGD(constraints=FeatureConstraints(immutable=["age"]))(
            lambda X: X, torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
        )


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_adversarial_training_sees_valid_samples_only(norm):
    X = torch.from_numpy(FRAME.to_numpy(dtype=float))
    rules = ALL.by_index(Columns((7,), list(FRAME.columns))).set_params(integer=[0, 6])
    attack = PGD(norm=norm, eps=2.0, n_steps=5, constraints=rules)
    ball = attack.ball(X)
    w = torch.randn(X.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = attack.maximize(lambda X_adv: X_adv @ w, ball, torch.Generator().manual_seed(0))
    assert ball.rules.hold(seen).all()
    assert ball.contains(seen).all()
    assert (seen != X).any(1).double().mean() > 0.8
