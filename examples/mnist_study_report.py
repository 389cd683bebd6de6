"""The report of `mnist_study.py`: tables and figures from the JSON files it keeps."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from skjacobian.generalization import difference_interval
from skjacobian.intervals import wilson_interval

# The penalty that the theory pairs with each attack, and the surrogate that it bounds with.
PAIRED = {"l2": "l2", "linf": "l1"}
SURROGATES = {
    "l2": ("first_order", "spectral", "frobenius"),
    "linf": ("first_order", "cross_lipschitz", "columns", "entrywise"),
}
N_BOOTSTRAPS = 1000

# Clean accuracy that a network must keep to be compared with PGD training.
LEAST_CLEAN = 0.97


def robust(result: dict, threat: str) -> float:
    """Return the accuracy on the test data under the strong cascade."""
    return result["test"][threat]["robust_accuracy"]


def gap(result: dict, name: str, threat: str | None = None) -> float:
    """Return training minus test; accuracy under attack by the same attack on both."""
    train, test = (
        result[split] if threat is None else result[split][threat] for split in ("train", "test")
    )
    return train[name] - test[name]


def grouped(results: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Return the results by the values of some keys, in the order of these."""
    groups = defaultdict(list)
    for result in results:
        groups[tuple(result[key] for key in keys)].append(result)
    return dict(sorted(groups.items()))


def of_method(results: list[dict], method: str) -> list[dict]:
    """Return the networks of a method, plain ones as its strength 0."""
    return [result for result in results if result["method"] in (method, "plain")]


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    """Return a mean, and the standard deviation over seeds where there are several."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


# --- rank correlation ---------------------------------------------------------------------


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation along the last axis, nan where a side is constant."""
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (_ranks(x), _ranks(y)))
    length = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return (x * y).sum(-1) / np.where(length > 0, length, np.nan)


def _ranks(x: np.ndarray) -> np.ndarray:
    return rankdata(x, axis=-1)


def spearman_interval(x, y, n_bootstraps: int = N_BOOTSTRAPS) -> tuple[float, float, float]:
    """Return the rank correlation and its 95 % bootstrap interval over networks."""
    x, y = np.asarray(x), np.asarray(y)
    rows = np.random.default_rng(0).integers(len(x), size=(n_bootstraps, len(x)))
    low, high = np.nanquantile(spearman(x[rows], y[rows]), [0.025, 0.975])
    return float(spearman(x, y)), float(low), float(high)


def surrogate_risk(result: dict, threat: str, term: str) -> float:
    """Return the mean of ℓ plus a surrogate of its increase, on the test data."""
    return result["test"]["loss"] + result["test"][threat]["terms"][term]


def correlations(results: list[dict]) -> list[tuple]:
    """Return (networks, n, attack, risk of which pairing, surrogate, ρ with interval) rows."""
    rows = []
    for penalty in ("l2", "l1"):
        networks = of_method(results, penalty)
        if len(networks) < 4:
            continue
        for threat, of_norm in (("l2", "l2"), ("linf", "linf"), ("l2", "linf"), ("linf", "l2")):
            for term in SURROGATES[of_norm]:
                risks = [surrogate_risk(result, of_norm, term) for result in networks]
                errors = [1 - robust(result, threat) for result in networks]
                losses = [result["test"][threat]["adversarial_loss"] for result in networks]
                both = spearman_interval(risks, losses), spearman_interval(risks, errors)
                rows.append((penalty, len(networks), threat, of_norm, term, *both))
    return rows


# --- tables -------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def results_table(results: list[dict]) -> str:
    """Return accuracy, gaps and norms of every setting, averaged over seeds."""
    header = ["method", "strength", "n", "seeds", "clean", "l2", "linf", "gap", "gap l2"]
    header += ["gap linf", "loss gap", "‖J‖_F²", "‖J‖_{1,1}", "CPU s"]
    rows = []
    for (method, n, strength), same in grouped(results, "method", "n_train", "strength").items():
        columns = [
            [result["test"]["accuracy"] for result in same],
            *([robust(result, threat) for result in same] for threat in ("l2", "linf")),
            [gap(result, "accuracy") for result in same],
            *([gap(r, "robust_accuracy_pgd", threat) for r in same] for threat in ("l2", "linf")),
            [-gap(result, "loss") for result in same],
        ]
        norms = [np.mean([r["test"]["jacobian"][norm] for r in same]) for norm in ("l2", "l1")]
        seconds = np.mean([result["cpu_seconds"] for result in same])
        numbers = [mean_and_spread(column) for column in columns]
        rows.append([method, f"{strength:g}", n, len(same), *numbers])
        rows[-1] += [f"{norms[0]:.3g}", f"{norms[1]:.3g}", f"{seconds:.0f}"]
    return table(header, rows)


def best_table(results: list[dict]) -> str:
    """Return for each method, size and attack its most robust strength, with Wilson's interval."""
    rows = []
    for (method, n), same in grouped(results, "method", "n_train").items():
        for threat in ("l2", "linf"):
            best = _most_robust(same, threat)
            setting = [method, n, threat, f"{best['strength']:g}"]
            rows.append([*setting, *_numbers(best)])
    header = ["method", "n", "attack", "strength", "clean", "robust", "95 %", "CPU s"]
    return table(header, rows)


def against_pgd_table(results: list[dict]) -> str:
    """Return what each method reaches of PGD training's robust accuracy, and of its time.

    At the largest size, each method at the strength that is most robust among those that keep
    `LEAST_CLEAN`; PGD training on the attack itself, for as many epochs.
    """
    largest = max((r["n_train"] for r in results), default=0)
    same_size = [r for r in results if r["n_train"] == largest]
    rows = []
    for threat in PAIRED:
        found = {
            method: best
            for (method,), same in grouped(same_size, "method").items()
            if (best := _most_robust(same, threat, LEAST_CLEAN))
        }
        reference = found.get(f"pgd_{threat}")
        for method, best in sorted(found.items(), key=lambda item: -item[1]["robust"]):
            shares = ["", ""]
            if reference is not None:
                shares = [f"{best[name] / reference[name]:.2f}" for name in ("robust", "seconds")]
            setting = [threat, method, f"{best['strength']:g}", best["seeds"]]
            rows.append([*setting, *_numbers(best), *shares])
    header = ["attack", "method", "strength", "seeds", "clean", "robust", "95 %", "CPU s"]
    return table([*header, "share of PGD's accuracy", "share of its time"], rows)


def _most_robust(same: list[dict], threat: str, least_clean: float = 0.0) -> dict:
    """Return the means of the most robust strength that stays so accurate; {} for none."""
    means = [
        {
            "strength": strength,
            "seeds": len(group),
            "clean": np.mean([r["test"]["accuracy"] for r in group]),
            "robust": np.mean([robust(r, threat) for r in group]),
            "seconds": np.mean([r["cpu_seconds"] for r in group]),
            "n_test": group[0]["test"]["n_samples"],
        }
        for (strength,), group in grouped(same, "strength").items()
    ]
    clean = [mean for mean in means if mean["clean"] >= least_clean]
    return max(clean, key=lambda mean: mean["robust"], default={})


def _numbers(best: dict) -> list[str]:
    """Return the cells of accuracy, clean and robust, its interval, and seconds of training."""
    # Seeds share the test data, so they narrow nothing.
    low, high = wilson_interval(best["robust"] * best["n_test"], best["n_test"])
    accuracies = [f"{best[name]:.3f}" for name in ("clean", "robust")]
    return [*accuracies, f"{low:.3f} to {high:.3f}", f"{best['seconds']:.0f}"]


def gaps_table(results: list[dict]) -> str:
    """Return standard and robust gaps along λ: of accuracy, with intervals, and of the loss."""
    rows = []
    for threat, penalty in PAIRED.items():
        for (n,), same in grouped(of_method(results, penalty), "n_train").items():
            for (strength,), of_strength in grouped(same, "strength").items():
                accuracies = [_pooled_gap(of_strength, attack) for attack in (None, threat)]
                losses = [
                    mean_and_spread([-gap(r, "loss") for r in of_strength]),
                    mean_and_spread([-gap(r, "adversarial_loss", threat) for r in of_strength]),
                ]
                rows.append([f"{penalty} / {threat}", n, f"{strength:g}", *accuracies, *losses])
    header = ["penalty / attack", "n", "λ", "standard gap", "robust gap (PGD)"]
    return table([*header, "standard gap of the loss", "robust gap of the loss"], rows)


def gap_correlation_table(results: list[dict]) -> str:
    """Return the rank correlation of the training data's Jacobian norm with both loss gaps."""
    rows = []
    for threat, penalty in PAIRED.items():
        for (n,), same in grouped(of_method(results, penalty), "n_train").items():
            if len(same) < 4:
                continue
            norms = [r["train"]["jacobian"][penalty] for r in same]
            gaps = [
                [-gap(r, "loss") for r in same],
                [-gap(r, "adversarial_loss", threat) for r in same],
            ]
            rows.append([f"{penalty} / {threat}", n, len(same), *(_rho(norms, g) for g in gaps)])
    header = ["penalty / attack", "n", "networks", "ρ of norm and standard gap of the loss"]
    return table([*header, "ρ of norm and robust gap of the loss"], rows)


def _rho(x: list[float], y: list[float]) -> str:
    rho, low, high = spearman_interval(x, y)
    return f"{rho:.2f} ({low:.2f} to {high:.2f})"


def _pooled_gap(same: list[dict], threat: str | None) -> str:
    name = "accuracy" if threat is None else "robust_accuracy_pgd"
    accuracies, counts = [], []
    for split in ("train", "test"):
        values = [r[split] if threat is None else r[split][threat] for r in same]
        accuracies.append(float(np.mean([value[name] for value in values])))
        counts.append(same[0][split]["n_samples"])
    low, high = difference_interval(accuracies[0], counts[0], accuracies[1], counts[1])
    return f"{accuracies[0] - accuracies[1]:+.3f} ({low:+.3f} to {high:+.3f})"


def correlation_table(results: list[dict]) -> str:
    """Return the rank correlations of surrogate risks with adversarial loss and error."""
    rows = []
    for penalty, n, threat, of_norm, term, with_loss, with_error in correlations(results):
        kind = "paired" if PAIRED[of_norm] == penalty and of_norm == threat else "crossed"
        numbers = [f"{r:.2f} ({low:.2f} to {high:.2f})" for r, low, high in (with_loss, with_error)]
        rows.append([kind, penalty, n, threat, f"{term} ({of_norm})", *numbers])
    rows.sort(key=lambda row: row[0] != "paired")
    header = ["pairing", "penalty trained with", "networks", "attack", "surrogate (its attack)"]
    return table([*header, "ρ with adversarial loss", "ρ with robust error"], rows)


def tightness_table(results: list[dict]) -> str:
    """Return by how much each surrogate overstates the mean increase found, and where it fails."""
    rows = []
    for threat, penalty in PAIRED.items():
        largest = max((r["n_train"] for r in results), default=0)
        same_size = [r for r in of_method(results, penalty) if r["n_train"] == largest]
        for (strength,), same in grouped(same_size, "strength").items():
            tests = [(r["test"], r["test"][threat]) for r in same]
            rise = np.mean([t["adversarial_loss"] - whole["loss"] for whole, t in tests])
            share = np.mean([t["second_order_share"] for _, t in tests])
            ratios = [
                f"{np.mean([t['terms'][term] for _, t in tests]) / rise:.2f}"
                for term in SURROGATES[threat]
            ]
            names = ", ".join(
                f"{term} {ratio}" for term, ratio in zip(SURROGATES[threat], ratios, strict=True)
            )
            rows.append(
                [f"{penalty} / {threat}", f"{strength:g}", f"{rise:.3f}", f"{share:.2f}", names]
            )
    header = ["penalty / attack", "λ", "increase of the loss", "second-order share"]
    return table([*header, "mean surrogate over mean increase"], rows)


def write_report(results: list[dict], folder: Path) -> Path:
    """Write `report.md`, and the figures beside it where matplotlib is there; return its path."""
    radii = results[0]["radii"] if results else {}
    threats = ", ".join(f"{norm} {eps:g}" for norm, eps in radii.items())
    attacks = ", ".join(sorted({result.get("attack", "strong") for result in results}))
    sections = {
        "Every setting": results_table,
        "Each method at its most robust strength": best_table,
        f"Against PGD training, clean accuracy at least {LEAST_CLEAN:g}": against_pgd_table,
        "Generalization gaps": gaps_table,
        "Rank correlation of Jacobian norm and generalization gap": gap_correlation_table,
        "Tightness of the surrogates": tightness_table,
        "Rank correlation of surrogate and adversarial risk": correlation_table,
    }
    lines = [
        "# Report of the study\n",
        f"{len(results)} networks. Radii: {threats}. Columns l2 and linf are accuracy on the test "
        f"data under attack={attacks}; gaps are training minus test accuracy, under attack by "
        "PGD-40 on both; ± is the standard deviation over seeds. The most robust strength is "
        "chosen on the same test data that measure it. Intervals of accuracies and gaps are for "
        "the choice of the samples of one network, those of ρ for the choice of the networks.\n",
    ]
    for title, section in sections.items():
        lines += [f"## {title}\n", section(results), ""]
    lines += [f"![{name}]({name})" for name in draw_figures(results, folder)]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


# --- figures ------------------------------------------------------------------------------


def draw_figures(results: list[dict], folder: Path) -> list[str]:
    """Draw the figures, and return their names; none without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    drawings = {
        "tradeoff.png": draw_tradeoff,
        "gaps.png": draw_gaps,
        "surrogates.png": draw_surrogates,
        "cost.png": draw_cost,
    }
    for name, draw in drawings.items():
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2)
        for ax, (threat, penalty) in zip(axes, PAIRED.items(), strict=True):
            draw(ax, results, threat, penalty)
            ax.grid(alpha=0.3)
        handles, labels = axes[1].get_legend_handles_labels()
        if labels:
            axes[1].legend(handles, labels, fontsize="small")
        figure.savefig(folder / name, dpi=110)
    return list(drawings)


def draw_tradeoff(ax, results, threat, penalty) -> None:
    """Robust against clean accuracy along λ, a line for each training size."""
    for (n,), same in grouped(of_method(results, penalty), "n_train").items():
        clean, under_attack = (
            [np.mean([f(r) for r in group]) for group in grouped(same, "strength").values()]
            for f in (lambda r: r["test"]["accuracy"], lambda r: robust(r, threat))
        )
        ax.plot(clean, under_attack, marker="o", label=f"n = {n}")
    ax.set(xlabel="clean accuracy", ylabel=f"accuracy under {threat}", title=f"{penalty} penalty")


def draw_gaps(ax, results, threat, penalty) -> None:
    """Standard and robust gap against λ."""
    for (n,), same in grouped(of_method(results, penalty), "n_train").items():
        groups = grouped(same, "strength")
        places = np.arange(len(groups))
        standard = [np.mean([gap(r, "accuracy") for r in group]) for group in groups.values()]
        under_attack = [
            np.mean([gap(r, "robust_accuracy_pgd", threat) for r in group])
            for group in groups.values()
        ]
        (line,) = ax.plot(places, under_attack, marker="o", label=f"n = {n}, under attack")
        ax.plot(places, standard, ":", color=line.get_color(), label=f"n = {n}, clean")
        ax.set_xticks(places, [f"{strength:g}" for (strength,) in groups])
    ax.set(xlabel="λ", ylabel="training minus test accuracy", title=f"{penalty}, {threat}")


def draw_surrogates(ax, results, threat, penalty) -> None:
    """Adversarial loss against each surrogate risk, a point for each network."""
    for term in SURROGATES[threat]:
        networks = of_method(results, penalty)
        risks = [surrogate_risk(r, threat, term) for r in networks]
        ax.scatter(
            risks, [r["test"][threat]["adversarial_loss"] for r in networks], s=12, label=term
        )
    if networks:
        ends = np.array([min(r["test"]["loss"] for r in networks), max(risks)])
        ax.plot(ends, ends, "k:", linewidth=0.8)
        ax.set(xscale="log", yscale="log")
    ax.legend(fontsize="small")
    ax.set(
        xlabel=f"surrogate risk, {threat}", ylabel="adversarial loss", title=f"{penalty} penalty"
    )


def draw_cost(ax, results, threat, penalty) -> None:
    """Robust accuracy against CPU time of training, at the largest size."""
    largest = max((r["n_train"] for r in results), default=0)
    same_size = [r for r in results if r["n_train"] == largest]
    for (method,), same in grouped(same_size, "method").items():
        groups = grouped(same, "strength").values()
        seconds = [np.mean([r["cpu_seconds"] for r in group]) for group in groups]
        accuracies = [np.mean([robust(r, threat) for r in group]) for group in groups]
        ax.plot(seconds, accuracies, marker="o", linestyle=":", linewidth=0.8, label=method)
    ax.set(xlabel="CPU seconds of training", ylabel=f"accuracy under {threat}", xscale="log")
