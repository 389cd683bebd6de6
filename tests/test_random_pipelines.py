"""50 random pipelines under attack: no X_adv violates anything that was said.

Judged with no code of the package, the norms in exact arithmetic. Three of ten parts
are attacked in every suite, each kind of classifier among them; the others are marked slow.
"""

import functools
import warnings
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier, VotingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
)
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from skjacobian import FeatureConstraints, JacobianRegularizedClassifier
from skjacobian._under_attack import UnderAttack
from skjacobian.attacks import FGSM, PGD, Cascade, RayS, Square
from skjacobian.differentiable import as_torch, bind_samples
from skjacobian.exceptions import NotDifferentiableError
from tests.slow import others_slow

pytestmark = pytest.mark.filterwarnings("ignore::skjacobian.exceptions.AttackWarning")

N_PIPELINES, N_PARTS = 50, 10
PARTS = [range(first, first + 5) for first in range(0, N_PIPELINES, 5)]
N_TRAIN, N_ATTACKED = 60, 8
NORMS = ("linf", "l2", "l1")
# Of the last three each case gets one.
ATTACKS = (
    PGD(n_steps=5),
    FGSM(),
    Square(n_queries=15),
    RayS(n_queries=30),
    Cascade(n_queries=60),
)
GROUP = ["kind_a", "kind_b", "kind_c"]
CATEGORIES = ["job", "size", "member"]

TRANSFORMERS = {
    "standard": StandardScaler,
    "min-max": MinMaxScaler,
    "max-abs": MaxAbsScaler,
    "robust": RobustScaler,
    "normalizer": Normalizer,
    "pca": lambda: PCA(4, whiten=True),
    "svd": lambda: TruncatedSVD(4, random_state=0),
    "power": PowerTransformer,
    "quantile": lambda: QuantileTransformer(n_quantiles=20),
    "normal quantile": lambda: QuantileTransformer(
        n_quantiles=20, output_distribution="normal", random_state=0
    ),
    "splines": lambda: make_pipeline(PCA(2), SplineTransformer(3, extrapolation="linear")),
    "polynomial": lambda: make_pipeline(PCA(3), PolynomialFeatures(2)),
    "union": lambda: make_union(StandardScaler(), PCA(3)),
    "bins": lambda: KBinsDiscretizer(4, encode="ordinal"),
}
CLASSIFIERS = {
    "logistic": lambda: LogisticRegression(max_iter=300),
    "linear svc": lambda: SVC(kernel="linear"),
    "rbf svc": SVC,
    "mlp": lambda: MLPClassifier((8,), max_iter=30, random_state=0),
    "naive bayes": GaussianNB,
    "lda": LinearDiscriminantAnalysis,
    "tree": lambda: DecisionTreeClassifier(max_depth=4, random_state=0),
    "forest": lambda: RandomForestClassifier(5, random_state=0),
    "neighbors": lambda: KNeighborsClassifier(3),
    "ours": lambda: JacobianRegularizedClassifier(max_epochs=2, random_state=0),
    "voting": lambda: VotingClassifier(
        [("a", LogisticRegression(max_iter=300)), ("b", GaussianNB())], voting="soft"
    ),
    "calibrated": lambda: CalibratedClassifierCV(LogisticRegression(max_iter=300), cv=2),
    "bagging": lambda: BaggingClassifier(
        LogisticRegression(max_iter=300), n_estimators=3, random_state=0
    ),
}


def draw_table(rng):
    """A DataFrame of all kinds of columns, without missing values."""
    n = N_TRAIN + N_ATTACKED
    kind = rng.integers(0, 3, n)
    table = {
        "height": rng.normal(1.7, 0.2, n),
        "income": rng.normal(3000, 4, n),
        "debt": rng.normal(0, 2, n),
        "ratio": rng.random(n).astype(np.float32),
        "age": rng.integers(18, 80, n),
        "children": rng.integers(0, 5, n),
        **{name: (kind == k).astype(float) for k, name in enumerate(GROUP)},
        "job": rng.choice(["clerk", "cook", "smith"], n),
        "size": pd.Categorical(rng.choice(list("sml"), n), categories=list("smlx")),
        "member": rng.random(n) < 0.5,
    }
    return pd.DataFrame(table, index=rng.permutation(n) + 100)


class Problem:
    """A generated pipeline, fitted, with the samples to attack."""

    def __init__(self, number):
        self.number, self.rng = number, (rng := np.random.default_rng(number))
        self.classifier = list(CLASSIFIERS)[number % len(CLASSIFIERS)]
        self.is_frame = number % 2 == 1
        self.has_missing = rng.random() < 0.4
        table = draw_table(rng)
        self.categories = CATEGORIES if self.is_frame and rng.random() < 0.8 else []
        # Numbers that an encoder reads cannot change, either.
        self.encoded = ["children"] if self.categories and rng.random() < 0.3 else []
        y = self._labels(table)
        if self.has_missing:
            table = self._with_holes(table)
        table = table.drop(columns=[name for name in CATEGORIES if name not in self.categories])
        self.names = list(table.columns)
        self.numbers = [name for name in self.names if name not in self.categories]
        X = table if self.is_frame else table.to_numpy(dtype=rng.choice(["f4", "f8"]))
        self.model = self._pipeline()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing has time to converge
            self.model.fit(X[:N_TRAIN], y[:N_TRAIN])
        self.X_train, self.X, self.y = X[:N_TRAIN], X[N_TRAIN:], y[N_TRAIN:]

    def _labels(self, table):
        score = table.height / 0.2 + table.debt / 2 + table.age / 30 + table.kind_b
        n_classes = self.rng.choice([2, 3])
        cuts = np.quantile(score, np.arange(1, n_classes) / n_classes)
        return np.array(["no", "maybe", "yes"])[np.searchsorted(cuts, score)]

    def _with_holes(self, table):
        table = table.astype({"children": "Int64"})
        for name in ("height", "debt", "children", "ratio"):
            table.loc[self.rng.random(len(table)) < 0.2, name] = None
        table.loc[self.rng.random(len(table)) < 0.2, "job"] = None
        return table

    def _pipeline(self):
        chosen = self.rng.choice(list(TRANSFORMERS), self.rng.integers(1, 4), replace=False)
        self.transformers = [str(name) for name in chosen]
        steps = [TRANSFORMERS[name]() for name in self.transformers]
        if self.has_missing:
            indicates = bool(self.rng.random() < 0.3)
            steps.insert(0, SimpleImputer(strategy="median", add_indicator=indicates))
        if self.categories:
            one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
            ordinal = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
            encoder = (one_hot, ordinal)[self.rng.integers(2)]
            if self.has_missing and isinstance(encoder, OrdinalEncoder):
                encoder = make_pipeline(encoder, SimpleImputer())
            numbers = [name for name in self.numbers if name not in self.encoded]
            branches = [
                ("numbers", make_pipeline(*steps), numbers),
                ("categories", encoder, self.categories + self.encoded),
            ]
            steps = [ColumnTransformer(branches)]
        return make_pipeline(*steps, CLASSIFIERS[self.classifier]())

    def column(self, name, X):
        """The numbers of a column as exact fractions; None where one is missing."""
        j = self.names.index(name)
        values = X.iloc[:, j].to_numpy(dtype=float, na_value=np.nan) if self.is_frame else X[:, j]
        return [None if np.isnan(v) else Fraction(float(v)) for v in values]

    def present(self, name, X):
        return [value for value in self.column(name, X) if value is not None]


make_problem = functools.cache(Problem)


class Threat:
    """A generated threat model, and what it means for each column."""

    def __init__(self, problem, norm):
        self.problem, self.norm = problem, norm
        rng = np.random.default_rng([problem.number, NORMS.index(norm)])
        self.names = names = problem.numbers
        self.said = {"feature_scale": None, "bounds": None, "mutable": None}
        self.rules = {}
        self.unit = dict.fromkeys(names, Fraction(1))
        self.low, self.high = dict.fromkeys(names), dict.fromkeys(names)
        self.slack, self.extends = 0, False
        self._draw_scale(rng)
        self._draw_bounds(rng)
        self._draw_mutable(rng)
        self._draw_directions(rng)
        size = {"linf": 1.0, "l2": 1.7, "l1": 2.5}[norm]
        self.eps = float(size * rng.choice([0.01, 0.3, 1.0, 3.0]))
        self.said["constraints"] = self._constraints()

    def _draw_mutable(self, rng):
        self.fixed = set(self.problem.encoded)
        if rng.random() < 0.3:
            free = [name for name in self.names if name not in self.fixed]
            chosen = rng.choice(free, rng.integers(2, len(free)), replace=False)
            self.said["mutable"] = self._keys(chosen)
            self.fixed.update(set(free) - set(chosen))

    def _draw_directions(self, rng):
        if rng.random() < 0.7:
            self.rules["immutable"] = list(rng.choice(self.names, rng.integers(3), replace=False))
            one_way = list(rng.choice(self.names, 4, replace=False))  # no column is both
            for name in ("increasing", "decreasing"):
                self.rules[name] = [one_way.pop() for _ in range(rng.integers(3))]
        self.fixed.update(self.rules.get("immutable", ()))
        whole = ["age", "children"]
        if rng.random() < 0.6:
            self.rules["integer"] = list(rng.choice(whole, rng.integers(1, 3), replace=False))
        # Columns of a DataFrame that have an integer type need not be named.
        self.whole = whole if self.problem.is_frame else self.rules.get("integer", [])
        self.groups = [GROUP] if rng.random() < 0.8 else []

    def _keys(self, names):
        """Columns as the package is told of them: by name, or by index."""
        if self.problem.is_frame:
            return [str(name) for name in names]
        return [self.problem.names.index(name) for name in names]

    def _draw_scale(self, rng):
        kind = rng.choice(["none", "array", "std", "range", "dict", "train std", "train range"])
        values = np.exp(rng.normal(size=len(self.names)))
        data = self.problem.X_train if kind.startswith("train") else self.problem.X
        if kind == "array" and not self.problem.categories:
            self.said["feature_scale"] = values
            self._set_units(values)
        elif kind == "dict":
            chosen = rng.random(len(self.names)) < 0.5
            self._set_units(np.where(chosen, values, 1.0))
            named = [name for name, is_named in zip(self.names, chosen, strict=True) if is_named]
            self.rules["scale"] = dict(zip(self._keys(named), values[chosen], strict=True))
        elif kind.endswith(("std", "range")):
            which = kind.split()[-1]
            self._set_units([self._spread(name, which, data) for name in self.names])
            self.slack = Fraction(1, 10**6) if which == "std" else 0
            if kind == which:
                self.said["feature_scale"] = which
            else:
                self.rules["scale"] = which

    def _set_units(self, values):
        self.unit = {name: Fraction(float(v)) for name, v in zip(self.names, values, strict=True)}

    def _spread(self, name, which, data):
        values = np.array([float(value) for value in self.problem.present(name, data)])
        if which == "range" and not self.problem.is_frame:
            values = values.astype(data.dtype)
        return values.std() if which == "std" else values.max() - values.min()

    def _draw_bounds(self, rng):
        kind = rng.choice(["none", "dict", "tight", "train", "numbers", "arrays"])
        if kind == "none" or (kind == "arrays" and self.problem.categories):
            return
        self.extends = kind == "train"
        chosen = self.names
        if kind in ("dict", "tight"):
            chosen = rng.choice(self.names, rng.integers(1, 5), replace=False)
        low, high = self._bounds(rng, kind, chosen)
        if kind == "arrays":
            self.said["bounds"] = (low, high)
        elif kind == "numbers":
            self.said["bounds"] = (low[0], high[0])
        elif kind == "train":
            self.rules["bounds"] = "train"
        else:
            pairs = zip(low.tolist(), high.tolist(), strict=True)
            self.rules["bounds"] = dict(zip(self._keys(chosen), pairs, strict=True))
        self.low.update(zip(chosen, map(Fraction, low.tolist()), strict=True))
        self.high.update(zip(chosen, map(Fraction, high.tolist()), strict=True))

    def _bounds(self, rng, kind, chosen):
        """The lower and the upper bounds of chosen columns."""
        data = self.problem.X_train if kind == "train" else self.problem.X
        columns = [self.problem.present(name, data) for name in chosen]
        low, high = (np.array([float(end(c)) for c in columns]) for end in (min, max))
        if kind == "numbers":
            low, high = np.full_like(low, low.min() - 0.3), np.full_like(high, high.max() + 0.7)
        elif kind not in ("tight", "train"):
            room = 0.1 + rng.random(len(chosen))
            low, high = low - room, high + room
        return low, high

    def _constraints(self):
        said = dict(self.rules)
        for name in ("immutable", "integer", "increasing", "decreasing"):
            if name in said:
                said[name] = self._keys(said[name])
        if self.groups:
            said["one_hot"] = [self._keys(group) for group in self.groups]
        if not said:
            return None
        return FeatureConstraints(**said).fit(self.problem.X_train)


def check_container(problem, X_adv):
    """Columns, index and types are those of X, and what is no number has not changed."""
    X = problem.X
    assert type(X_adv) is type(X)
    assert X_adv.shape == X.shape
    if not problem.is_frame:
        assert X_adv.dtype == X.dtype
        return
    assert X_adv.index.equals(X.index)
    assert X_adv.columns.equals(X.columns)
    for name in X.columns:
        # A float32 column between others becomes float64 where it must.
        widened = X[name].dtype == np.float32 and X_adv[name].dtype == np.float64
        assert X_adv[name].dtype == X[name].dtype or widened
    for name in problem.categories:
        pd.testing.assert_series_equal(X_adv[name], X[name])


def check_column(threat, name, clean, found):
    """One number, where it was, obeys what was said about its column."""
    assert (clean is None) == (found is None)
    if clean is None:
        return Fraction(0)
    low, high = threat.low[name], threat.high[name]
    if threat.extends:
        low, high = min(low, clean), max(high, clean)
    assert low is None or found >= low, (name, float(found - low))
    assert high is None or found <= high, (name, float(found - high))
    if name in threat.fixed or threat.unit[name] == 0:
        assert found == clean, name
    if name in threat.whole or any(name in group for group in threat.groups):
        assert found.denominator == 1, name
    assert name not in threat.rules.get("increasing", ()) or found >= clean, name
    assert name not in threat.rules.get("decreasing", ()) or found <= clean, name
    return Fraction(0) if found == clean else (found - clean) / threat.unit[name]


def check_norms(threat, u):
    """‖delta / scale‖ <= eps for rows of exact fractions, without a tolerance."""
    eps = Fraction(threat.eps) * (1 + threat.slack)
    for row in u:
        if threat.norm == "l2":
            assert sum(value * value for value in row) <= eps * eps
        else:
            total = sum if threat.norm == "l1" else max
            assert total(map(abs, row)) <= eps, float(total(map(abs, row)) - eps)


def check(threat, X_adv):
    """Whatever was said holds; return how many samples moved."""
    problem = threat.problem
    check_container(problem, X_adv)
    u = []
    for name in threat.names:
        pairs = zip(problem.column(name, problem.X), problem.column(name, X_adv), strict=True)
        u.append([check_column(threat, name, *pair) for pair in pairs])
    check_norms(threat, list(zip(*u, strict=True)))
    for group in threat.groups:
        ones = [problem.column(name, X_adv) for name in group]
        assert all(sorted(row) == [0, 0, 1] for row in zip(*ones, strict=True))
    return sum(any(row) for row in zip(*u, strict=True))


def attacked(threat, attack):
    problem = threat.problem
    subject = UnderAttack(problem.model, problem.X, problem.y, needs=attack.needs)
    armed = subject.arm(attack, norm=threat.norm, eps=threat.eps, **threat.said)
    return subject.perturb(armed, np.arange(len(problem.y))).X_adv


def has_view(problem):
    try:
        bind_samples(as_torch(problem.model), problem.X)
    except NotDifferentiableError:
        return False
    return True


def chosen_attacks(problem, number):
    *common, square, rays, cascade = ATTACKS
    usable = [*common] if has_view(problem) else []
    return [*usable, (square, rays, cascade)[number % 3]]


@pytest.mark.parametrize("part", others_slow(range(N_PARTS), range(2)))
def test_nothing_is_violated(part):
    n_cases = n_moved = 0
    for number in PARTS[part]:
        problem = make_problem(number)
        for k, norm in enumerate(NORMS):
            threat = Threat(problem, norm)
            for attack in chosen_attacks(problem, number + k):
                try:
                    n_moved += check(threat, attacked(threat, attack))
                except Exception as error:
                    raise AssertionError(f"{attack!r} in Problem({number}), {norm}") from error
            n_cases += 1
    assert n_cases >= 15
    assert n_moved >= 4 * n_cases  # most others are fooled where they are


@pytest.mark.parametrize("part", range(N_PARTS))
def test_views_say_what_predict_says(part):
    n_views = 0
    for number in PARTS[part]:
        problem = make_problem(number)
        model = problem.model
        if not has_view(problem):
            continue
        n_views += 1
        view = as_torch(model)
        bind_samples(view, problem.X)
        X = problem.X if problem.is_frame else problem.X.astype(float)
        tensor = UnderAttack(model, X, problem.y, needs="gradients").X_tensor
        with torch.no_grad():
            predicted = view(tensor).argmax(1).numpy()
            if view.has_proba and hasattr(model, "predict_proba"):
                seen, wanted = view.predict_proba(tensor), model.predict_proba(X)
            else:
                seen, wanted = view.decision_function(tensor), model.decision_function(X)
        assert (model.classes_[predicted] == model.predict(X)).all()
        # Fitted in float32, scikit-learn rounds the projected mean of PCA: 3e-5 at 3000 ± 4.
        precision = 1e-6 if problem.is_frame or problem.X.dtype == np.float64 else 1e-4
        message = f"Problem({number})"
        np.testing.assert_allclose(seen, wanted, rtol=0, atol=precision, err_msg=message)
    assert n_views >= 1


def test_there_are_at_least_150_cases_of_every_kind():
    assert N_PIPELINES * len(NORMS) >= 150
    problems = [make_problem(number) for number in range(N_PIPELINES)]
    assert {problem.classifier for problem in problems} == set(CLASSIFIERS)
    assert {name for problem in problems for name in problem.transformers} == set(TRANSFORMERS)
    for seen in ("is_frame", "has_missing", "categories", "encoded"):
        assert 3 <= sum(bool(getattr(problem, seen)) for problem in problems) <= 40
    assert 25 <= sum(map(has_view, problems)) <= 45
