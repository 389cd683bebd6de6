"""The main job on scikit-learn's digits: tune, compare and plot robust classifiers.

Run ``python examples/quickstart.py``. No download; under two minutes on two cores. It
searches the strength and norm of a Jacobian penalty and the radius and norm of adversarial
training with clean and robust accuracy at once, compares the winners with a plain network
on held-out data, and writes ``outputs/quickstart.png``.

All radii of attacks are in the units of the raw pixels, 0 to 16: the attack goes through
the scaler.
"""

import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier, RobustScorer

BOUNDS = (0, 16)
LINF = RobustScorer(norm="linf", eps=1.6, bounds=BOUNDS)
L2 = RobustScorer(norm="l2", eps=8, bounds=BOUNDS)
SCORING = {"accuracy": "accuracy", "robust": LINF, "robust_l2": L2}
LAMBDAS = [1e-4, 1e-3, 1e-2, 3e-2]
RADII = {"linf": [0.025, 0.05, 0.1], "l2": [0.25, 0.5, 1.0]}  # behind the scaler: of [0, 1]
OUTPUT = Path("outputs") / "quickstart.png"


def search(name: str, classifier, grid: list[dict] | dict, X, y) -> GridSearchCV:
    """Tune a classifier behind a scaler by cross-validation, two folds at a time."""
    step = type(classifier).__name__.lower()
    grids = grid if isinstance(grid, list) else [grid]
    grids = [{f"{step}__{key}": values for key, values in one.items()} for one in grids]
    n_fits = 3 * sum(int(np.prod([len(v) for v in one.values()])) for one in grids)
    print(f"{name}: {n_fits} fits …", end=" ", flush=True)
    start = time.perf_counter()
    found = GridSearchCV(
        make_pipeline(MinMaxScaler(), classifier),
        grids,
        scoring=SCORING,
        refit="robust",
        cv=3,
        n_jobs=2,
    ).fit(X, y)
    best = {key.split("__", 1)[1]: value for key, value in found.best_params_.items()}
    print(f"{time.perf_counter() - start:.0f} s, best {best}", flush=True)
    return found


def print_table(models: dict, X_train, y_train, X_test, y_test) -> None:
    """Fit each pipeline once more, by itself, for its time; print what it reaches."""
    n_test = len(y_test)
    print(f"\n{n_test} held-out digits, PGD-40, radii in raw pixel units (0 to 16)\n")
    print("| network | clean | linf 1.6 | l2 8 | fit, s |\n| --- | --- | --- | --- | --- |")
    for name, model in models.items():
        start = time.perf_counter()
        model.fit(X_train, y_train)
        seconds = time.perf_counter() - start
        clean, linf, l2 = (
            model.score(X_test, y_test),
            LINF(model, X_test, y_test),
            L2(model, X_test, y_test),
        )
        print(f"| {name} | {clean:.3f} | {linf:.3f} | {l2:.3f} | {seconds:.1f} |", flush=True)


def plot(jacobian: GridSearchCV, adversarial: GridSearchCV) -> None:
    """Draw clean and robust accuracy against λ and against ε."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharey=True, layout="constrained")
    panels = [
        (axes[0], jacobian, "lam", ["l2", "l1"], "penalty", "λ"),
        (
            axes[1],
            adversarial,
            "eps",
            ["linf", "l2"],
            "training attack",
            "ε of training, of [0, 1]",
        ),
    ]
    for row, found, parameter, norms, kind, label in panels:
        for ax, norm in zip(row, norms, strict=True):
            results = found.cv_results_
            chosen = [i for i, p in enumerate(results["params"]) if norm in p.values()]
            x = [
                next(v for k, v in results["params"][i].items() if k.endswith(parameter))
                for i in chosen
            ]
            for key, text in (
                ("accuracy", "clean"),
                ("robust", "linf, 1.6 pixels"),
                ("robust_l2", "l2, 8 pixels"),
            ):
                mean, std = (results[f"{m}_test_{key}"][chosen] for m in ("mean", "std"))
                ax.errorbar(x, mean, std, marker="o", capsize=3, label=text)
            ax.set(xscale="log", xlabel=label, title=f"{norm} {kind}", ylim=(0, 1))
            ax.grid(alpha=0.3)
        row[0].set_ylabel("accuracy, 3-fold")
    axes[0, 0].legend(loc="lower left")
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=120)
    print(f"\nPlot written to {OUTPUT}")


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)
    common = {"max_epochs": 20, "random_state": 0}
    jacobian = search(
        "Jacobian regularization over λ and norm",
        JacobianRegularizedClassifier(**common),
        {"norm": ["l2", "l1"], "lam": LAMBDAS},
        X_train,
        y_train,
    )
    adversarial = search(
        "Adversarial training over ε and norm",
        AdversarialClassifier(bounds=(0, 1), n_steps=5, **common),
        [{"norm": [norm], "eps": radii} for norm, radii in RADII.items()],
        X_train,
        y_train,
    )
    plain = make_pipeline(MinMaxScaler(), JacobianRegularizedClassifier(lam=0, **common))
    models = {
        "plain": plain,
        "Jacobian-regularized": jacobian.best_estimator_,
        "adversarially trained": adversarial.best_estimator_,
    }
    print_table(models, X_train, y_train, X_test, y_test)
    plot(jacobian, adversarial)
    print(f"Finished in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
