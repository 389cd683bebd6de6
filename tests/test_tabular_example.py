"""The example of tables in a tiny setting: no row gains by an attack, and says what it was."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "tabular.py"


def import_example():
    spec = importlib.util.spec_from_file_location("tabular", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tabular"] = module
    spec.loader.exec_module(module)
    return module


tabular = import_example()
TINY = tabular.Setting(n_test=10, n_queries=20, max_epochs=2)


@pytest.fixture(scope="module")
def rows():
    return tabular.compare(TINY)


def test_every_classifier_is_compared_on_both_tables(rows):
    names = list(tabular.make_classifiers([]))
    assert [(row.table, row.classifier) for row in rows] == [
        (table, name) for table in ("breast cancer", "credit") for name in names
    ]


def test_no_attack_raises_an_accuracy(rows):
    assert all(row.report.robust_accuracy <= row.report.accuracy for row in rows)
    assert any(row.report.robust_accuracy < row.report.accuracy for row in rows)


def test_trees_are_searched_among_their_leaves_and_others_through_views(rows):
    for row in rows:
        has_trees = row.classifier in ("RandomForest", "HistGradientBoosting")
        assert row.report.view == ("leaves of trees, predict_proba" if has_trees else "torch view")
        assert "weak attack" in [flag.name for flag in row.report.raised]  # 20 queries


def test_people_keep_what_they_cannot_change(rows):
    people, _ = tabular.make_credit(2000)
    for row in rows:
        X_adv = row.report.X_adv
        if row.table == "credit":
            assert (X_adv.dtypes == people.dtypes).all()
            X = people.loc[X_adv.index]
            assert X_adv[tabular.FIXED].equals(X[tabular.FIXED])
            assert (X_adv["age"] >= X["age"]).all()
            assert (X_adv["years_employed"].isna() == X["years_employed"].isna()).all()


def test_the_table_has_a_line_for_each_row(rows, capsys):
    tabular.print_table(rows, TINY)
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == len(rows) + 1
    assert "10 held-out samples" in printed
