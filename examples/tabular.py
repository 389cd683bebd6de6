"""Seven classifiers under attack on two tables, in the units of their columns.

Run ``python examples/tabular.py``. No download; under three minutes on a core of its own,
``--quick`` under a minute. It prints a Markdown table of clean and robust accuracy and, with
matplotlib, writes ``outputs/tabular.png``.

An adversary moves every number by up to `eps` standard deviations of the training data (linf),
inside the range of the training data. The table of breast cancer has 30 measurements. The
other, "credit", is generated: age only grows, age and cards are whole numbers, job and
owns_home cannot change, and years_employed is missing at every tenth person.

Classifiers with a torch view are attacked through it, by the whole cascade. Forests and boosted
trees have none, and are searched among their leaves. No classifier is tuned.
"""

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from skjacobian import (
    AdversarialClassifier,
    FeatureConstraints,
    JacobianRegularizedClassifier,
    RobustnessReport,
    evaluate_robustness,
)
from skjacobian.exceptions import AttackWarning
from skjacobian.intervals import wilson_interval

EPS = 0.25  # standard deviations of the training data
FIXED = ["job", "owns_home"]
JOBS = {"clerk": 0.0, "craft": 0.3, "farm": -0.4, "none": -1.2, "nurse": 0.5}
OUTPUT = Path("outputs") / "tabular.png"


@dataclass(frozen=True)
class Setting:
    """How much is spent: samples, queries for each, and epochs of our classifiers."""

    n_test: int = 100
    n_queries: int | None = None
    max_epochs: int | str = "auto"


QUICK = Setting(n_test=20, n_queries=300, max_epochs=10)


@dataclass(frozen=True)
class Row:
    """One classifier on one table."""

    table: str
    classifier: str
    report: RobustnessReport
    clean_interval: tuple[float, float]
    seconds: float  # of this process on the CPU


def make_credit(n_samples: int, random_state: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a table of people, and whether each of them paid a loan back."""
    rng = np.random.default_rng(random_state)
    age = rng.integers(18, 75, n_samples)
    income = rng.lognormal(7.8, 0.5, n_samples)  # euros a month
    debt = income * rng.gamma(2.0, 4.0, n_samples)
    years = rng.uniform(0, age - 17)
    job = rng.choice(list(JOBS), n_samples)
    owns_home = rng.random(n_samples) < (age - 10) / 100
    n_cards = rng.poisson(2, n_samples)
    score = 1.0 - 0.25 * debt / income + 0.03 * (age - 18) + 0.08 * years + 1.0 * owns_home
    score += np.array([JOBS[one] for one in job]) - 0.2 * np.abs(n_cards - 2)
    X = pd.DataFrame(
        {
            "age": age,
            "income": income,
            "debt": debt,
            "years_employed": np.where(rng.random(n_samples) < 0.1, np.nan, years),
            "n_cards": n_cards,
            "job": job,
            "owns_home": owns_home,
        }
    )
    return X, np.where(rng.random(n_samples) < expit(2 * score), "paid", "unpaid")


def load_tables() -> dict[str, tuple[pd.DataFrame, np.ndarray, FeatureConstraints]]:
    """Return for each table its samples, its labels and what an adversary cannot do."""
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    of_train = {"scale": "std", "bounds": "train"}
    on_credit = FeatureConstraints(immutable=FIXED, increasing=["age"], **of_train)
    return {
        "breast cancer": (X, y.to_numpy(), FeatureConstraints(**of_train)),
        "credit": (*make_credit(2000), on_credit),
    }


def make_preprocessor(X: pd.DataFrame):
    """Return what all classifiers stand behind: numbers scaled, categories one-hot."""
    numbers = [column for column in X if column not in FIXED]
    categories = [column for column in X if column in FIXED]
    imputed = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    return make_column_transformer((imputed, numbers), (OneHotEncoder(), categories))


def make_classifiers(columns: list[str], max_epochs: int | str = "auto") -> dict:
    """Return the classifiers, for columns as the preprocessor names them."""
    ours = {"max_epochs": max_epochs, "random_state": 0}
    # The same adversary but for whole numbers: behind the preprocessor the unit is the std.
    constraints = FeatureConstraints(
        immutable=[j for j, name in enumerate(columns) if name.startswith("onehot")],
        increasing=[j for j, name in enumerate(columns) if name.endswith("__age")],
        bounds="train",
    )
    return {
        "LogisticRegression": LogisticRegression(max_iter=1000),
        "SVC (rbf)": SVC(),
        "RandomForest": RandomForestClassifier(random_state=0),
        "HistGradientBoosting": HistGradientBoostingClassifier(random_state=0),
        "MLPClassifier": MLPClassifier(
            early_stopping=True, learning_rate_init=5e-3, random_state=0
        ),
        "JacobianRegularized": JacobianRegularizedClassifier(norm="l1", **ours),
        "Adversarial": AdversarialClassifier(eps=EPS, constraints=constraints, **ours),
    }


def evaluate(model, X, y, constraints: FeatureConstraints, setting: Setting) -> RobustnessReport:
    """Attack one fitted pipeline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)  # the table prints the flags
        return evaluate_robustness(
            model,
            X,
            y,
            eps=EPS,
            constraints=constraints,
            n_queries=setting.n_queries,
        )


def compare(setting: Setting) -> list[Row]:
    """Fit the classifiers on both tables and attack samples that none has seen."""
    rows = []
    for table, (X, y, constraints) in load_tables().items():
        X_train, X_test, y_train, y_test = train_test_split(
            X, y, test_size=setting.n_test, stratify=y, random_state=0
        )
        constraints.fit(X_train)
        preprocessor = make_preprocessor(X_train)
        columns = list(preprocessor.fit(X_train).get_feature_names_out())
        for name, classifier in make_classifiers(columns, setting.max_epochs).items():
            model = make_pipeline(preprocessor, classifier).fit(X_train, y_train)
            start = time.process_time()
            report = evaluate(model, X_test, y_test, constraints, setting)
            seconds = time.process_time() - start
            interval = wilson_interval(int(report.right.sum()), setting.n_test)
            rows.append(Row(table, name, report, interval, seconds))
    return rows


def line_of(row: Row) -> str:
    """Return a line of the Markdown table."""
    report = row.report
    n_queries = sum(stage.n_queries for stage in report.stages[1:])
    cells = (
        row.table,
        row.classifier,
        _with_interval(report.accuracy, row.clean_interval),
        _with_interval(report.robust_accuracy, report.confidence_interval),
        report.view,
        f"{n_queries:.0f}",
        f"{row.seconds:.1f}",
        ", ".join(flag.name for flag in report.raised) or "none",
    )
    return f"| {' | '.join(cells)} |"


def _with_interval(accuracy: float, interval: tuple[float, float]) -> str:
    return f"{accuracy:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def print_table(rows: list[Row], setting: Setting) -> None:
    """Print all rows as Markdown, and what the columns mean."""
    head = ("table", "classifier", "clean", "robust", "attacked", "queries", "s", "flags")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(line_of(row))
    print(
        f"\n{setting.n_test} held-out samples of each table, linf, eps = {EPS} standard "
        "deviations of the training data; 95 % Wilson intervals. Queries: for each sample that "
        "a stage of the attack was run on, the stages added up. s: CPU seconds of attack and "
        "checks."
    )


def plot(rows: list[Row]) -> None:
    """Draw clean and robust accuracy with their intervals, a panel for each table."""
    try:
        import matplotlib
    except ImportError:
        print("\nNo plot: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = list(dict.fromkeys(row.table for row in rows))
    figure, axes = plt.subplots(1, len(tables), figsize=(10, 4), sharey=True, layout="constrained")
    for ax, table in zip(axes, tables, strict=True):
        _draw(ax, [row for row in rows if row.table == table])
        ax.set(title=table, xlabel="accuracy, 95 % interval", xlim=(0, 1))
        ax.grid(alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend(loc="lower left")
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=120)
    print(f"\nPlot written to {OUTPUT}")


def _draw(ax, rows: list[Row]) -> None:
    """Draw the rows of one table."""
    accuracies = {
        "clean": [(row.report.accuracy, row.clean_interval) for row in rows],
        f"robust, {EPS} std": [
            (row.report.robust_accuracy, row.report.confidence_interval) for row in rows
        ],
    }
    for color, (label, values) in enumerate(accuracies.items()):
        x = np.array([value for value, _ in values])
        low, high = np.array([interval for _, interval in values]).T
        bars = {"xerr": [x - low, high - x], "fmt": "o", "capsize": 3, "color": f"C{color}"}
        ax.errorbar(x, np.arange(len(rows)) + 0.2 * color, label=label, **bars)
    ax.set_yticks(range(len(rows)), [row.classifier for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples and queries")
    quick = parser.parse_args().quick
    start = time.perf_counter()
    torch.set_num_threads(1)
    setting = QUICK if quick else Setting()
    rows = compare(setting)
    print_table(rows, setting)
    plot(rows)
    print(
        f"Finished in {time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of them on "
        "the CPU."
    )


if __name__ == "__main__":
    main()
