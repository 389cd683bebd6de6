"""A report says the same in text, in a notebook and as a frame, and says it safely."""

import copy
import pickle
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from skjacobian.intervals import wilson_interval
from skjacobian.report import Flag, RobustnessReport, StageResult

VOID = {"br", "hr", "img", "input", "meta", "link"}


def make_report(**changes):
    values = {
        "estimator_name": "Pipeline",
        "norm": "linf",
        "eps": 0.25,
        "attack": "Cascade",
        "y": np.array(["ash", "ash", "ash", "oak", "oak"]),
        "right": np.array([True, True, True, True, False]),
        "robust": np.array([True, True, False, False, False]),
        "X_adv": np.zeros((5, 2)),
        "stages": (
            StageResult("clean", 0.8, 1, 1.0, 0.0),
            StageResult("PGD", 0.6, 1, 40.0, 1.234),
            StageResult("Square, briefly", 0.4, 1, 99.6, 0.5),
        ),
        "flags": (
            Flag("gradients", True, "3 of 4 samples", "Raised if zero."),
            Flag("bounds", False, "0 of 5 samples", "Raised if outside."),
            Flag("output", True, "the model returns decisions", "Raised if no logits."),
        ),
        "seconds": 1.8,
    }
    return RobustnessReport(**{**values, **changes})


class Parsed(HTMLParser):
    """The text of a page, its tables, and whether every tag is closed in its order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts, self.rows, self.well_formed = [], [], [], [], True
        self.feed(page)
        self.close()
        self.well_formed &= not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self.well_formed &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_the_figures_are_shares_of_the_samples():
    report = make_report()
    assert report.n_samples == 5
    assert (report.accuracy, report.robust_accuracy) == (0.8, 0.4)
    assert report.confidence_interval == pytest.approx(wilson_interval(2, 5))
    assert {type(end) for end in report.confidence_interval} == {float}
    assert report.class_accuracies == {
        "ash": (3, 1.0, pytest.approx(2 / 3)),
        "oak": (2, 0.5, 0.0),
    }


def test_weights_count_in_every_accuracy_and_in_the_interval():
    report = make_report(sample_weight=np.array([1.0, 2.0, 3.0, 0.0, 4.0]))
    assert (report.accuracy, report.robust_accuracy) == (0.6, 0.3)
    n_effective = 10**2 / (1 + 4 + 9 + 16)
    assert report.confidence_interval == pytest.approx(
        wilson_interval(0.3 * n_effective, n_effective)
    )
    assert report.class_accuracies == {"ash": (3, 1.0, 0.5), "oak": (2, 0.0, 0.0)}
    assert "5 weighted samples: accuracy 0.600, robust accuracy 0.300" in str(report)
    without_oak = make_report(sample_weight=np.array([1.0, 1.0, 1.0, 0.0, 0.0]))
    assert list(without_oak.class_accuracies) == ["ash"]


def test_equal_weights_are_none():
    equal = make_report(sample_weight=np.full(5, 0.1))
    plain = make_report()
    assert equal.confidence_interval == pytest.approx(plain.confidence_interval)
    assert equal.accuracy == pytest.approx(plain.accuracy)
    assert equal.class_accuracies == plain.class_accuracies


def test_the_raised_flags_are_those_that_are_raised():
    assert [flag.name for flag in make_report().raised] == ["gradients", "output"]
    assert make_report(flags=()).raised == ()


def test_the_text_has_every_figure():
    text = str(make_report())
    low, high = wilson_interval(2, 5)
    assert text.splitlines()[0] == (
        "Pipeline, linf eps=0.25, 5 samples: accuracy 0.800, robust accuracy 0.400 "
        f"(95 % interval {low:.3f} to {high:.3f})"
    )
    lines = [line.split() for line in text.splitlines()]
    assert ["clean", "0.800", "1", "1", "0.00"] in lines
    assert ["PGD", "0.600", "1", "40", "1.23"] in lines
    assert ["Square,", "briefly", "0.400", "1", "100", "0.50"] in lines
    assert ["ash", "3", "1.000", "0.667"] in lines
    assert ["oak", "2", "0.500", "0.000"] in lines


def test_the_text_lists_the_raised_flags_with_their_meaning():
    text = str(make_report())
    assert "2 of 3 flags are raised:" in text
    assert "  ! gradients: 3 of 4 samples\n    Raised if zero." in text
    assert "  ! output: the model returns decisions\n    Raised if no logits." in text
    assert "bounds" not in text


def test_the_text_says_when_no_flag_is_raised():
    sound = make_report(flags=(Flag("bounds", False, "0 of 5 samples", "Raised if outside."),))
    assert str(sound).endswith("None of 1 flags is raised.")
    assert "!" not in str(sound)


def test_one_raised_flag_is_one():
    one = make_report(flags=make_report().flags[:2])
    assert "1 of 2 flags is raised:" in str(one)


def test_columns_of_the_text_are_aligned():
    table = str(make_report()).split("\n\n")[1].splitlines()
    assert table[0].startswith("stage")
    assert len({len(line) for line in table}) == 1


def test_the_short_form_fits_a_line():
    report = make_report()
    assert repr(report) == (
        "<RobustnessReport: robust accuracy 0.400 at linf eps=0.25, 2 of 3 flags raised>"
    )
    assert repr([report]) == f"[{report!r}]"


def test_the_html_is_well_formed_and_has_every_figure():
    page = Parsed(make_report()._repr_html_())
    assert page.well_formed
    assert ["clean", "0.800", "1", "1", "0.00"] in page.rows
    assert ["PGD", "0.600", "1", "40", "1.23"] in page.rows
    assert ["Square, briefly", "0.400", "1", "100", "0.50"] in page.rows
    assert ["ash", "3", "1.000", "0.667"] in page.rows
    assert ["oak", "2", "0.500", "0.000"] in page.rows
    text = "".join(page.texts)
    assert str(make_report()).splitlines()[0] in text
    for said in ("2 of 3 flags are raised", "3 of 4 samples", "Raised if no logits."):
        assert said in text
    assert "bounds" not in text


def test_the_html_escapes_what_users_name():
    evil = "<script>alert('&')</script>"
    report = make_report(
        estimator_name=evil,
        y=np.array([evil] * 5),
        stages=(StageResult(evil, 0.4, 3, 1.0, 0.0),),
        flags=(Flag(evil, True, evil, evil),),
    )
    page = Parsed(report._repr_html_())
    assert page.well_formed
    assert "script" not in page.tags
    assert "".join(page.texts).count(evil) == 6  # title, stage, class, flag thrice


def test_the_frame_has_the_stages():
    pd = pytest.importorskip("pandas")
    frame = make_report().to_frame()
    wanted = pd.DataFrame(
        {
            "robust_accuracy": [0.8, 0.6, 0.4],
            "n_fooled": [1, 1, 1],
            "n_queries": [1.0, 40.0, 99.6],
            "seconds": [0.0, 1.234, 0.5],
        },
        index=pd.Index(["clean", "PGD", "Square, briefly"], name="stage"),
    )
    pd.testing.assert_frame_equal(frame, wanted)


def test_without_pandas_only_the_frame_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    report = make_report()
    assert str(report)
    assert report._repr_html_()
    with pytest.raises(ImportError, match="pandas"):
        report.to_frame()


@pytest.mark.parametrize("labels", [np.arange(5) % 2, np.arange(5) % 2 == 1, np.arange(5) / 2])
def test_labels_of_any_kind_are_shown(labels):
    report = make_report(y=labels)
    for label in np.unique(labels):
        assert [str(label)] in [line.split()[:1] for line in str(report).splitlines()]
    assert Parsed(report._repr_html_()).well_formed


def test_a_report_can_be_compared_hashed_copied_and_pickled():
    report = make_report()
    assert report == report
    assert report != make_report()
    assert len({report, report}) == 1
    for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert str(other) == str(report)


def test_a_report_cannot_be_changed():
    with pytest.raises(AttributeError):
        make_report().eps = 0.1
