"""The study in its quick form: the order that theory says, resumption, the report."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from skjacobian.theory import ORDER, surrogate_terms

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = Path(__file__).parents[1] / "docs"
KEPT = [DOCS / "study", DOCS / "study" / "cnn"]


def import_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


report = import_example("mnist_study_report")
study = import_example("mnist_study")

ARGUMENTS = ["--quick", "--parts", "A", "--sizes", "300"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study.main([*ARGUMENTS, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return study.load_results(folder)


def test_every_network_has_its_file(results):
    settings = study.settings_of(study.DIGITS, "A", [300], 1)
    assert len(results) == len(settings) == 7
    assert {result["method"] for result in results} == {"plain", "l1", "l2"}


@pytest.mark.parametrize(("threat", "penalty"), report.PAIRED.items())
def test_robust_accuracy_rises_from_no_penalty_to_the_best(results, threat, penalty):
    robust = {
        result["strength"]: report.robust(result, threat)
        for result in report.of_method(results, penalty)
    }
    assert max(robust.values()) > robust[0.0] + 0.15


def test_the_chain_of_surrogates_is_ordered_in_every_result(results):
    for result in results:
        for threat, order in ORDER.items():
            terms = result["test"][threat]["terms"]
            for lower, upper in order:
                assert terms[lower] <= terms[upper] * (1 + 1e-6)


@pytest.mark.parametrize("threat", sorted(ORDER))
@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_the_chain_is_ordered_at_every_digit(threat, strength):
    (X, y), _ = study.load(study.DIGITS)
    setting = study.Setting("l1", strength, 300, 0)
    model = study.make_model(setting, study.DIGITS, 5).fit(X[:300], y[:300])
    terms = surrogate_terms(
        model.module_.double(),
        torch.from_numpy(X[:300]).double(),
        torch.from_numpy(y[:300]),
        norm=threat,
        eps=study.DIGITS.radii[threat],
    )
    for lower, upper in ORDER[threat]:
        slack = 1e-12 * terms[upper] + 1e-14 * list(terms.values())[2]
        assert bool((terms[lower] <= terms[upper] + slack).all())


def test_a_network_that_has_its_file_is_not_trained_again(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    study.main([*ARGUMENTS, "--out", str(folder)])
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.json")} == before
    assert "7 networks, 7 of them are there" in capsys.readouterr().out


def test_the_report_comes_from_the_files_alone(folder, tmp_path, capsys):
    first = (folder / "report.md").read_text()
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    study.main(["--quick", "--report", "--out", str(tmp_path)])
    assert "[1/" not in capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == first
    for figure in ("tradeoff.png", "gaps.png", "surrogates.png", "cost.png"):
        assert (tmp_path / figure).stat().st_size > 1000


def test_the_report_names_pairings_and_intervals(folder):
    text = (folder / "report.md").read_text()
    assert "| paired | l2 | 4 | l2 | frobenius (l2) |" in text
    assert "| crossed | l1 | 4 | l2 | spectral (l2) |" in text
    assert "| plain | 0 | 300 | 1 |" in text


def test_rank_correlation_is_spearmans():
    assert report.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert report.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert report.spearman([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(15 / 18)
    rho, low, high = report.spearman_interval(range(30), range(30))
    assert rho == low == high == pytest.approx(1)


def test_the_most_valuable_networks_come_first():
    settings = study.settings_of(study.MNIST, "AB", [60000, 5000, 20000, 1000], 3)
    assert len({setting.file_name for setting in settings}) == len(settings)
    first = settings[:26]
    assert {(s.part, s.seed) for s in first} == {("A", 0)}
    assert [s.n_train for s in first] == [60000] * 13 + [5000] * 13
    assert first[0].method == "plain"


def test_adversarial_training_is_also_run_for_as_long_as_a_penalty():
    long, short = (study.Setting(m, 0.1, 60000, 0) for m in ("pgd_linf", "pgd_linf_quarter"))
    assert study.epochs_of(long, study.MNIST, None) == 20
    assert study.epochs_of(short, study.MNIST, None) == 5
    assert study.make_model(short, study.MNIST, 5).norm == "linf"
    assert study.epochs_of(study.Setting("l1_twice", 0.003, 60000, 0), study.MNIST, None) == 40


def test_a_convolutional_network_is_studied_too():
    for setting in study.settings_of(study.MNIST_CNN, "AB", [60000], 1):
        epochs = study.epochs_of(setting, study.MNIST_CNN, None)
        assert study.make_model(setting, study.MNIST_CNN, epochs).module == "cnn"


def test_results_are_plain_json(folder):
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["part"] == "A"


# --- docs/study.md ------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.name)
def test_the_report_that_is_kept_is_that_of_the_results_that_are_kept(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda *_: [])
    written = report.write_report(study.load_results(kept), tmp_path).read_text()
    there = (kept / "report.md").read_text()
    assert written.strip() == there[: there.find("![")].strip()


def test_every_number_found_by_the_study_is_in_a_report():
    text = (DOCS / "study.md").read_text()
    found = text[text.index("## What was found") : text.index("## What it teaches")]
    numbers = set(re.findall(r"(?<![\w.])\d*\.\d+", found))
    reported = {
        number
        for kept in KEPT
        for number in re.findall(r"\d+\.\d+", (kept / "report.md").read_text())
    }
    spread = r"\d\.\d+ ± \d\.\d+"
    reports = " ".join((kept / "report.md").read_text() for kept in KEPT)
    assert set(re.findall(spread, " ".join(found.split()))) <= set(re.findall(spread, reports))
    radii_and_strengths = {"0.1", "1.5"}
    assert len(numbers) > 20
    assert numbers <= reported | radii_and_strengths
