"""RobustScorer on tables: against ART, our nets against MLPClassifier, forests; their curves.

Run ``python examples/benchmarks/tabular.py``; about ten minutes on one core, less with
``--quick``. The part forest needs pandas; the parts pgd and hopskipjump need
``pip install adversarial-robustness-toolbox``.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from _timing import describe_machine, interleaved
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from skjacobian import JacobianRegularizedClassifier, RobustScorer, robustness_curve
from skjacobian._table import Table
from skjacobian._under_attack import UnderAttack
from skjacobian.attacks import PGD, Cascade, Square
from skjacobian.differentiable import black_box

N_STEPS = 40
ORDER = {"linf": np.inf, "l2": 2}
SMOOTH = {
    "LogisticRegression": LogisticRegression(max_iter=5000),
    "SVC, linear": SVC(kernel="linear", probability=False),  # which ART reads
    "SVC, rbf": SVC(kernel="rbf", probability=False),
}
ROUGH = {
    "RandomForest": RandomForestClassifier(10, random_state=0),
    "DecisionTree": DecisionTreeClassifier(random_state=0),
    "KNeighbors": KNeighborsClassifier(5),
}


class Data(NamedTuple):
    """Training data and samples to attack in [0, 1], in float32, which is all that ART takes."""

    name: str
    X_train: np.ndarray
    y_train: np.ndarray
    X: np.ndarray
    y: np.ndarray


def load(name: str, n_samples: int, n_classes: int | None = None) -> Data:
    """Return a data set of scikit-learn's, each column over its range."""
    loaders = {"breast_cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits}
    X, y = loaders[name](return_X_y=True)
    kept = y < (n_classes or np.inf)
    X = MinMaxScaler(clip=True).fit_transform(X[kept]).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order], y[kept][order]
    half = len(X) // 2
    end = half + n_samples
    return Data(name, X[:half], y[:half], X[half:end], y[half:end])


# --- against ART -------------------------------------------------------------------------


class Counter:
    """A function that notes how many samples it has been asked about."""

    def __init__(self, function: Callable) -> None:
        self.function, self.n_samples = function, 0

    def __call__(self, x: np.ndarray, *args, **options):
        """Call the function."""
        self.n_samples += len(x)
        return self.function(x, *args, **options)


class Outcome(NamedTuple):
    """What an attack found: who stands at each radius, samples asked about, CPU seconds."""

    standing: dict[float, np.ndarray]
    n_queries: float
    seconds: float


def with_art(model, data: Data, norm: str, radii: list[float], smooth: bool) -> Outcome:
    """Attack as ART does: PGD at each radius, or HopSkipJump once for all of them."""
    from art.estimators.classification import SklearnClassifier

    classifier = SklearnClassifier(model, clip_values=(0.0, 1.0))
    counters = []
    for method in ("predict", "loss_gradient") if smooth else ("predict",):
        counters.append(Counter(getattr(classifier, method)))
        setattr(classifier, method, counters[-1])
    right = model.predict(data.X) == data.y
    X, y = data.X[right], data.y[right]
    np.random.seed(0)  # noqa: NPY002, which ART draws from
    start = time.process_time()
    if smooth:
        found = {eps: _art_pgd(classifier, norm, eps).generate(X, y) for eps in radii}
    else:
        found = dict.fromkeys(radii, _hop_skip_jump(classifier, norm).generate(X))
    seconds = time.process_time() - start
    standing = {eps: right.copy() for eps in radii}
    for eps, X_adv in found.items():
        standing[eps][right] = ~fools(model, X, y, X_adv, norm, eps)
    return Outcome(standing, sum(c.n_samples for c in counters) / len(X), seconds)


def _art_pgd(classifier, norm: str, eps: float):
    from art.attacks.evasion import ProjectedGradientDescent

    return ProjectedGradientDescent(
        classifier,
        norm=ORDER[norm],
        eps=eps,
        eps_step=2.5 * eps / N_STEPS,
        max_iter=N_STEPS,
        num_random_init=1,
        batch_size=1000,
        verbose=False,
    )


def _hop_skip_jump(classifier, norm: str):
    from art.attacks.evasion import HopSkipJump

    return HopSkipJump(classifier, norm=ORDER[norm], batch_size=1000, verbose=False)


def fools(model, X, y, X_adv, norm: str, eps: float) -> np.ndarray:
    """Tell who is fooled from within the ball, but for what float32 rounds."""
    length = np.linalg.norm((X_adv - X).astype(float), ord=ORDER[norm], axis=1)
    return (model.predict(X_adv.astype(np.float32)) != y) & (length <= eps * (1 + 1e-5))


def with_ours(model, data: Data, norm: str, radii: list[float], attack) -> Outcome:
    """Attack as RobustScorer does, one radius after the other."""
    start, standing, n_queries = time.process_time(), {}, 0
    subject = UnderAttack(model, data.X, data.y, needs=attack.needs)
    attacked = np.flatnonzero(subject.right)
    for eps in radii:
        armed = subject.arm(
            attack,
            norm=norm,
            eps=eps,
            feature_scale=None,
            bounds=(0, 1),
            mutable=None,
            constraints=None,
        )
        perturbed = subject.perturb(armed, attacked)
        standing[eps] = np.zeros(len(data.y), dtype=bool)
        standing[eps][attacked] = perturbed.right
        n_queries += int(perturbed.found.n_queries.sum())
    return Outcome(standing, n_queries / len(attacked), time.process_time() - start)


def compare(name: str, model, data: Data, radii: dict[str, list[float]], smooth: bool) -> int:
    """Print the rows of a model; return how often ours is above ART's."""
    model.fit(data.X_train, data.y_train)
    n_above = 0
    for norm, values in radii.items():
        theirs = with_art(model, data, norm, values, smooth)
        ours = with_ours(model, data, norm, values, Cascade())
        quick = with_ours(model, data, norm, values, PGD(n_steps=N_STEPS)) if smooth else None
        for eps in values:
            ends = [o.standing[eps] if o else None for o in (theirs, quick, ours)]
            stand = ["" if end is None else int(end.sum()) for end in ends]
            n_alone = int((ends[2] & ~ends[0]).sum())
            n_above += stand[2] > stand[0]
            cells = [data.name, name, f"{norm} {eps:g}", len(data.y), *stand, n_alone]
            print("| " + " | ".join(map(str, cells)) + " |", end="")
            if eps == values[0]:
                outcomes = (theirs, quick, ours)
                cells = [f"{o.n_queries:.0f}" if o else "" for o in outcomes]
                cells += [f"{o.seconds:.2f}" if o else "" for o in outcomes]
                print(" " + " | ".join(cells) + " |", flush=True)
            else:
                print(" |" * 6, flush=True)
    return n_above


HEAD = "| data | model | ball | samples | ART | pgd | strong | stand in strong alone | "
HEAD += "queries, ART | pgd | strong | CPU s, ART | pgd | strong |"


def compare_with_art(title: str, models: dict, radii: dict[str, list[float]], n: int) -> None:
    """Print who stands after each attack, at equal radii in [0, 1]."""
    print(f"\n### {title}, and ours: samples that stand\n\n{HEAD}\n|" + " --- |" * 14, flush=True)
    n_above = 0
    for data in (load("breast_cancer", n), load("wine", n), load("digits", n, n_classes=2)):
        for name, model in models.items():
            n_above += compare(name, model, data, radii, smooth=models is SMOOTH)
    print(f"\nOurs (strong) stands higher in {n_above} rows.")


def compare_with_pgd(quick: bool) -> None:
    radii = {"linf": [0.05, 0.1, 0.2], "l2": [0.2, 0.4, 0.8]}
    compare_with_art("ART's PGD-40", SMOOTH, radii, 20 if quick else 60)


def compare_with_hop_skip_jump(quick: bool) -> None:
    radii = {"linf": [0.03, 0.1], "l2": [0.06, 0.2]}
    compare_with_art("ART's HopSkipJump", ROUGH, radii, 4 if quick else 10)


# --- MLPClassifier -----------------------------------------------------------------------


def same_weights(mlp: MLPClassifier, data: Data) -> JacobianRegularizedClassifier:
    """Return a classifier of ours with the weights of an MLPClassifier."""
    ours = JacobianRegularizedClassifier(
        module__hidden_units=mlp.hidden_layer_sizes, max_epochs=1, random_state=0
    )
    ours.fit(data.X_train.astype(float), data.y_train)
    layers = [part for part in ours.module_.modules() if isinstance(part, torch.nn.Linear)]
    with torch.no_grad():
        for layer, W, b in zip(layers, mlp.coefs_, mlp.intercepts_, strict=True):
            if W.shape[1] < layer.out_features:  # one output for two classes
                W, b = np.hstack([0 * W, W]), np.hstack([0 * b, b])
            layer.weight.copy_(torch.from_numpy(W.T))
            layer.bias.copy_(torch.from_numpy(b))
    return ours


def time_mlp(quick: bool) -> None:
    """Print the time of PGD-40 per query, of both."""
    print("\n### MLPClassifier and our net with the same weights, PGD-40, float64\n")
    head = "| data | hidden units | ball | stand, MLPClassifier | ours | queries, MLPClassifier |"
    head += " ours | µs per query, MLPClassifier | ours | ratio |"
    print(f"{head}\n|" + " --- |" * 10, flush=True)
    for data, eps in ((load("breast_cancer", 280), 0.1), (load("digits", 800), 0.1)):
        X = data.X.astype(float)
        for hidden in ((64, 64), (256, 256)):
            mlp = MLPClassifier(hidden, max_iter=200, random_state=0)
            mlp.fit(data.X_train.astype(float), data.y_train)
            models = {"MLPClassifier": mlp, "ours": same_weights(mlp, data)}
            for norm, radius in (("linf", eps), ("l2", 4 * eps)):
                row = _time_pair(models, data._replace(X=X), norm, radius, 3 if quick else 9)
                cells = [data.name, f"{hidden[0]}-{hidden[1]}", f"{norm} {radius:g}", *row]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _time_pair(models: dict, data: Data, norm: str, eps: float, repeats: int) -> list:
    attack = partial(with_ours, data=data, norm=norm, radii=[eps], attack=PGD(n_steps=N_STEPS))
    found = {name: attack(model) for name, model in models.items()}
    results = interleaved(
        {name: partial(attack, model) for name, model in models.items()}, repeats, "ours"
    )
    standing = [int(outcome.standing[eps].sum()) for outcome in found.values()]
    total = [o.n_queries * m.score(data.X, data.y) * len(data.y) for o, m in _pairs(found, models)]
    each = [1e6 * results[name][0] / n for name, n in zip(models, total, strict=True)]
    ratio = results["MLPClassifier"][1] * total[1] / total[0]
    return [*standing, *(round(n) for n in total), *(f"{us:.2f}" for us in each), f"{ratio:.2f}"]


def _pairs(found: dict, models: dict) -> list[tuple]:
    return [(found[name], models[name]) for name in models]


# --- black boxes -------------------------------------------------------------------------


def time_forest(quick: bool) -> None:
    """Print what a query of a forest costs, and what of it is ours."""
    print("\n### RandomForest(100) as a black box: µs per query, 250 samples at once\n")
    print("| samples | predict_proba | and the way there and back | a query of Square | ours |")
    print("|" + " --- |" * 5)
    import pandas as pd

    data = load("breast_cancer", 250)
    names = load_breast_cancer().feature_names
    frames = [pd.DataFrame(X.astype(float), columns=names) for X in (data.X_train, data.X)]
    mixed = [frame.assign(job="cook").astype({"job": "category"}) for frame in frames]
    for kind, X_train, X in (
        ("array", data.X_train, data.X),
        ("DataFrame", *frames),
        ("DataFrame, one column of categories", *mixed),
    ):
        forest = RandomForestClassifier(100, random_state=0)
        dropped = kind.endswith("categories")
        model = _without_categories(forest) if dropped else forest
        model.fit(X_train, data.y_train)
        cells = _forest_costs(model, data._replace(X=X), 3 if quick else 15)
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


def _without_categories(classifier):
    from sklearn.compose import make_column_selector, make_column_transformer
    from sklearn.pipeline import make_pipeline

    numbers = make_column_selector(dtype_include="number")
    return make_pipeline(make_column_transformer(("passthrough", numbers)), classifier)


def _forest_costs(model, data: Data, repeats: int) -> list[str]:
    n_calls, n = 20, len(data.y)
    table = Table(data.X)
    scores = black_box(model, table)
    outcomes = []

    def repeated(function: Callable, X) -> None:
        for _ in range(n_calls):
            function(X)

    def square() -> None:
        # So far away that nobody is fooled and dropped: all n_calls queries are made of all.
        outcomes.append(with_ours(model, data, "linf", [1e-9], Square(n_queries=n_calls)))

    results = interleaved(
        {
            "predict_proba": partial(repeated, model.predict_proba, data.X),
            "black box": partial(repeated, scores, table.tensor),
            "Square": square,
        },
        repeats,
        "predict_proba",
    )
    n_asked = _n_times_asked(model[-1] if hasattr(model, "steps") else model, square) / n
    per_query = [1e6 * results[name][0] / n / n_calls for name in ("predict_proba", "black box")]
    per_query.append(1e6 * results["Square"][0] / n / n_asked)
    ours = 1 - per_query[0] / per_query[2]
    return [*(f"{us:.1f}" for us in per_query), f"{100 * ours:.0f} %"]


def _n_times_asked(forest, run: Callable) -> int:
    """Return about how many samples a forest is asked while something runs."""
    asked, ask = [], forest.predict_proba

    def counted(X):
        asked.append(len(X))
        return ask(X)

    forest.predict_proba = counted
    try:
        run()
    finally:
        del forest.predict_proba
    return sum(asked)


# --- curves of classifiers without gradients ---------------------------------------------


def compare_curves_with_strong(quick: bool) -> None:
    """Print robust accuracies from a curve by decisions, and from "strong" at each radius."""
    radii = {"linf": [0.02, 0.05, 0.1], "l2": [0.05, 0.15, 0.3], "l1": [0.05, 0.2, 0.5]}
    n_samples = 20 if quick else 60
    print(f'\n### Curves by decisions and "strong", {n_samples} samples\n')
    print("| data | model | norm | radii | curve | strong | CPU s, curve | strong |")
    print("| --- " * 8 + "|", flush=True)
    for data in (load("breast_cancer", n_samples), load("wine", n_samples)):
        for name, model in ROUGH.items():
            model.fit(data.X_train, data.y_train)
            for norm, eps in radii.items():
                start = time.process_time()
                _, curve = robustness_curve(model, data.X, data.y, norm=norm, eps=eps)
                middle = time.process_time()
                strong = [
                    RobustScorer(norm=norm, eps=e, attack="strong")(model, data.X, data.y)
                    for e in eps
                ]
                seconds = middle - start, time.process_time() - middle
                figures = [", ".join(f"{a:.2f}" for a in found) for found in (curve, strong)]
                cells = [data.name, name, norm, ", ".join(map(str, eps)), *figures]
                print(f"| {' | '.join(cells)} | {seconds[0]:.1f} | {seconds[1]:.1f} |", flush=True)


PARTS = {
    "pgd": compare_with_pgd,
    "hopskipjump": compare_with_hop_skip_jump,
    "mlp": time_mlp,
    "forest": time_forest,
    "curve": compare_curves_with_strong,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="fewer samples and repeats")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(describe_machine())
    for name, run in PARTS.items():
        if given.part in (name, "all"):
            run(given.quick)


if __name__ == "__main__":
    main()
