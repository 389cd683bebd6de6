"""What users say of columns and labels is taken by name, or an error says why not."""

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from skjacobian import (
    AdversarialClassifier,
    FeatureConstraints,
    RobustScorer,
    adversarial_distances,
    evaluate_robustness,
    robustness_curve,
)
from skjacobian.exceptions import AttackWarning

pytestmark = pytest.mark.usefixtures("short_stages")

X, y = load_iris(return_X_y=True, as_frame=True)
MODEL = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
REVERSED = X[X.columns[::-1]]


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize(
    "table", [X, REVERSED, REVERSED.assign(more=1.0)], ids=["as fitted", "reversed", "more"]
)
def test_what_is_said_by_name_does_not_depend_on_the_order_of_the_columns(table):
    names = list(X.columns)
    spread = X.std()[names[2:] + names[:2]]
    said = {
        "feature_scale": spread,
        "bounds": (X.min()[::-1] - 0.1, X.max() + 0.1),
        "mutable": pd.Index(names[1:]),
    }
    scorer = RobustScorer(eps=0.5, **said)
    by_place = RobustScorer(
        eps=0.5,
        feature_scale=X.std().to_numpy(copy=True),
        bounds=(X.min().to_numpy() - 0.1, X.max().to_numpy() + 0.1),
        mutable=[1, 2, 3],
    )
    assert scorer(MODEL, table, y) == by_place(MODEL, X, y) < MODEL.score(X, y)
    fixed = FeatureConstraints(immutable=names[:1])
    report = evaluate_robustness(MODEL, table, y, eps=0.5, constraints=fixed)
    assert report.X_adv[names[0]].equals(table[names[0]])
    assert not report.X_adv[names[1]].equals(table[names[1]])


@pytest.mark.parametrize(
    "said",
    [
        {"feature_scale": [1.0, 2.0, 3.0, 4.0]},
        {"feature_scale": pd.Series([1.0, 2.0, 3.0, 4.0])},
        {"bounds": (0, np.full(4, 9.0))},
        {"mutable": [0]},
        {"mutable": [True, False, False, False]},
        {"constraints": FeatureConstraints(immutable=[0])},
        {"constraints": FeatureConstraints(scale={1: 2.0})},
        {"constraints": FeatureConstraints(bounds="train").fit(X.to_numpy())},
    ],
    ids=repr,
)
def test_what_is_said_by_place_is_rejected_where_places_are_ambiguous(said):
    assert RobustScorer(eps=0.1, **said)(MODEL, X, y) <= MODEL.score(X, y)
    with pytest.raises(ValueError, match=f"Got {next(iter(said))} by place and X with other col"):
        RobustScorer(eps=0.1, **said)(MODEL, REVERSED, y)


@pytest.mark.usefixtures("brief_stages")
@pytest.mark.parametrize("eps", [0.5, 1.6])
def test_columns_of_an_integer_type_that_cannot_move_or_much_less_are_said(eps):
    table = pd.DataFrame({"kids": [0, 2, 4, 6] * 20, "bmi": np.linspace(-1, 1, 80)})
    label = (table.kids + table.bmi > 3.5).astype(int)
    model = LogisticRegression().fit(table, label)
    with pytest.warns(
        AttackWarning, match=rf"Got eps={eps}, at which columns .* \(kids\) cannot change"
    ):
        whole = RobustScorer(eps=eps)(model, table, label)
    assert whole > RobustScorer(eps=eps)(model, table.astype(float), label)
    said = FeatureConstraints(integer=["kids"])
    assert RobustScorer(eps=eps, constraints=said)(model, table, label) == whole
    with pytest.warns(AttackWarning, match="stuck features"):
        report = evaluate_robustness(model, table, label, eps=eps)
    assert "stuck features" in [flag.name for flag in report.raised]
    assert "kids" in str(report)
    quiet = evaluate_robustness(model, table, label, eps=eps, constraints=said)
    assert "stuck features" not in [flag.name for flag in quiet.raised]


@pytest.mark.parametrize("radii", [[0.1, 0.4], [0.9, 0.2], [0.4, 1.0], [0.0]])
def test_a_curve_says_what_cannot_move_at_its_radii_as_a_scorer_does_at_the_largest(radii):
    table = pd.DataFrame({"kids": [0, 2, 4, 6] * 5, "bmi": np.linspace(-1, 1, 20)})
    label = (table.kids + table.bmi > 3.5).astype(int)
    model = LogisticRegression().fit(table, label)

    def said(call):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        return [str(warning.message) for warning in caught]

    by_scorer = said(lambda: RobustScorer(eps=max(radii))(model, table, label))
    assert bool(by_scorer) == (0 < max(radii) < 1)
    assert said(lambda: robustness_curve(model, table, label, eps=radii, n_steps=3)) == by_scorer
    by_distances = said(lambda: adversarial_distances(model, table, label, radii=radii, n_steps=3))
    assert by_distances == by_scorer


def test_columns_whose_changes_are_lost_in_rounding_are_said():
    time = 1.6e9 + np.arange(0, 2000, 10.0)
    table = pd.DataFrame({"time": time, "bmi": np.linspace(-1, 1, 200)})
    label = (table.time > table.time.median()).astype(int)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(table, label)
    threat = {"eps": 30.0, "feature_scale": [1, 0.001]}
    single = table.astype("float32")  # whose neighbours are 128 apart there
    with pytest.warns(
        AttackWarning, match=r"Got eps=30.0, at which columns \(time\) cannot change"
    ):
        RobustScorer(**threat)(model, single, label)
    with pytest.warns(AttackWarning, match="stuck features"):
        evaluate_robustness(model, single, label, **threat)
    assert RobustScorer(**threat)(model, table, label) < 0.98


def test_categories_that_are_held_fixed_are_said():
    table = pd.DataFrame({"job": ["a", "b"] * 40, "bmi": np.linspace(-1, 1, 80)})
    label = (table.bmi > 0).astype(int)
    encode = make_column_transformer((OneHotEncoder(), ["job"]), remainder="passthrough")
    model = make_pipeline(encode, LogisticRegression()).fit(table, label)
    with pytest.warns(AttackWarning, match=r"Got X whose columns \(job\) hold categories"):
        held = RobustScorer(eps=0.1)(model, table, label)
    assert RobustScorer(eps=0)(model, table, label) == model.score(table, label)
    said = FeatureConstraints(immutable=["job"])
    assert RobustScorer(eps=0.1, constraints=said)(model, table, label) == held
    assert RobustScorer(eps=0.1, mutable=["bmi"])(model, table, label) == held


@pytest.mark.parametrize("feature_scale", ["std", "range"])
def test_that_nothing_can_move_is_said(feature_scale):
    model = LogisticRegression(max_iter=1000).fit(X.to_numpy(), y)
    scorer = RobustScorer(eps=5, feature_scale=feature_scale)
    with pytest.warns(AttackWarning, match="at which no feature can change"):
        cross_val_score(model, X.to_numpy()[:8], [0, 1] * 4, cv=LeaveOneOut(), scoring=scorer)
    with pytest.warns(AttackWarning, match="stuck features"):
        report = evaluate_robustness(
            model, X.to_numpy()[:1], y[:1], eps=9, feature_scale=feature_scale
        )
    assert "no feature can change" in str(report)
    held = FeatureConstraints(immutable=range(4))
    with pytest.warns(AttackWarning, match="at which no feature can change"):
        assert RobustScorer(constraints=held)(model, X.to_numpy(), y) == model.score(
            X.to_numpy(), y
        )


@pytest.mark.parametrize("ask", [RobustScorer(), evaluate_robustness, robustness_curve])
def test_missing_labels_and_texts_are_errors(ask):
    with pytest.raises(ValueError, match="Input y contains NaN"):
        ask(MODEL, X, y.astype(float).where(y > 0))
    with pytest.raises(ValueError, match="Got X with 'setosa', which is no number"):
        ask(MODEL, ["setosa", "virginica"], [0, 1])


@pytest.mark.parametrize("ask", [RobustScorer(), evaluate_robustness, robustness_curve])
def test_labels_of_another_kind_are_an_error(ask):
    with pytest.raises(
        ValueError, match=r"Got y with labels like '0', but expected .* fitted on, like 0\."
    ):
        ask(MODEL, X, y.astype(str).to_numpy(dtype="U"))


@pytest.mark.parametrize("ask", [RobustScorer(), evaluate_robustness, robustness_curve])
@pytest.mark.parametrize("odd", [0.5, None, "0"])
def test_a_label_that_no_class_can_be_is_an_error(ask, odd):
    labels = y.to_numpy(dtype=object, copy=True)
    labels[-1] = odd
    if odd == 0.5:
        labels = labels.astype(float)
    with pytest.raises(ValueError, match=f"Got y with labels like {odd!r}, but .* like 0"):
        ask(MODEL, X, labels)


@pytest.mark.parametrize("kind", [float, object, "Int64", "uint8"])
def test_whole_numbers_are_labels_whatever_their_type(kind):
    assert RobustScorer()(MODEL, X, y.astype(kind)) == RobustScorer()(MODEL, X, y)


def test_a_mask_of_zeros_and_ones_is_not_taken_for_indices():
    with pytest.raises(ValueError, match=r"Got mutable=\[0, 0, 1, 1\].*each once"):
        RobustScorer(mutable=[0, 0, 1, 1])(MODEL, X, y)


def test_categories_that_boosted_trees_were_told_of_are_held_fixed():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.normal(size=200), "zip": rng.integers(0, 10, 200)})
    label = table.zip % 2
    model = HistGradientBoostingClassifier(max_iter=5, categorical_features=["zip"])
    model.fit(table, label)
    with pytest.warns(AttackWarning, match="categories"):
        report = evaluate_robustness(model, table[:30], label[:30], eps=1, n_queries=50)
    assert report.X_adv.zip.equals(table.zip[:30])
    assert "zip" in {flag.name: flag for flag in report.flags}["categories"].detail


@pytest.mark.filterwarnings("error")
def test_columns_that_a_pipeline_drops_raise_no_warnings_and_no_flags():
    X, y = load_iris(return_X_y=True)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(X, columns=list("abcd"))
    frame = frame.assign(name=rng.choice(["q", "r"], 150), row=range(150))
    scaler = make_column_transformer((StandardScaler(), list("abcd")))
    model = make_pipeline(scaler, LogisticRegression()).fit(frame, y)
    report = evaluate_robustness(model, frame, y, eps=0.2)
    assert {"categories", "stuck features"}.isdisjoint(flag.name for flag in report.raised)
    RobustScorer(eps=0.2)(model, frame, y)
    read = make_column_transformer((StandardScaler(), [*"abcd", "row"]))
    model = make_pipeline(read, LogisticRegression()).fit(frame, y)
    with pytest.warns(AttackWarning, match=r"columns of an integer type \(row\) cannot change"):
        RobustScorer(eps=0.2)(model, frame, y)


def test_training_and_scoring_take_the_types_of_the_columns_alike():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "children": rng.integers(0, 4, 300),
            "smoker": rng.random(300) < 0.5,
            "bmi": rng.normal(0, 1, 300),
        }
    )
    y = (frame.children + 3 * frame.smoker + frame.bmi > 3).astype(int)
    said = FeatureConstraints(immutable=["smoker"], integer=["children"])
    model = AdversarialClassifier(eps=0.6, n_steps=3, random_state=0, max_epochs=3)
    with (
        pytest.warns(AttackWarning, match=r"integer type \(children\) cannot change"),
        pytest.warns(AttackWarning, match=r"columns \(smoker\) hold categories"),
    ):
        by_type = model.fit(frame, y).predict_proba(frame)
    by_word = model.set_params(constraints=said).fit(frame, y).predict_proba(frame)
    np.testing.assert_array_equal(by_type, by_word)


@pytest.mark.filterwarnings("error")
def test_without_an_attack_neither_training_nor_scoring_says_what_it_cannot_change():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"smoker": rng.random(60) < 0.5, "children": rng.integers(0, 4, 60)})
    y = (frame.children + frame.smoker > 1.5).astype(int)
    model = AdversarialClassifier(eps=0.0, random_state=0, max_epochs=2).fit(frame, y)
    assert RobustScorer(eps=0.0)(model, frame, y) == model.score(frame, y)


def test_training_reads_values_by_names_that_are_numbers_as_scoring_does():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(80, 2)) * [10.0, 0.1], columns=[20, 10])
    y = (frame[20] / 10 + frame[10] * 10 > 0).astype(int)
    units = pd.Series({10: 0.1, 20: 10.0})
    model = AdversarialClassifier(eps=0.5, random_state=0, max_epochs=2)
    by_name, by_place = (
        clone(model).set_params(feature_scale=scale).fit(frame, y)
        for scale in (units, units.loc[frame.columns].to_numpy())
    )
    np.testing.assert_array_equal(by_name.predict_proba(frame), by_place.predict_proba(frame))
    scorers = [RobustScorer(eps=0.5, feature_scale=scale) for scale in (units, [10.0, 0.1])]
    assert scorers[0](by_name, frame, y) == scorers[1](by_name, frame, y)


@pytest.mark.usefixtures("brief_stages")
def test_bounds_are_of_numbers_and_not_of_the_codes_of_categories():
    # The codes of four jobs are 0 to 3: half of the samples lay outside, and counted as fooled.
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.random(40), "b": rng.random(40)})
    frame["job"], frame["grade"] = rng.choice(list("wxyz"), 40), rng.integers(1, 5, 40)
    y = (frame.a + frame.b + 0.3 * (frame.job == "z") > 1.1).astype(int)
    encode = make_column_transformer((OneHotEncoder(), ["job", "grade"]), remainder="passthrough")
    model = make_pipeline(encode, LogisticRegression()).fit(frame, y)
    fixed = FeatureConstraints(immutable=["job", "grade"])
    named = FeatureConstraints(immutable=["job", "grade"], bounds={"a": (0, 1), "b": (0, 1)})
    l1 = {"norm": "l1", "n_steps": 8}
    expected = adversarial_distances(model, frame, y, constraints=named, **l1)
    unbounded = adversarial_distances(model, frame, y, constraints=fixed, **l1)
    assert (expected > unbounded).any()
    for bounds in ((0, 1), (np.zeros(4), [1, 1, 0, 0]), (0, pd.Series(1.0, frame.columns))):
        said = {"norm": "l1", "bounds": bounds, "constraints": fixed}
        found = adversarial_distances(model, frame, y, n_steps=8, **said)
        np.testing.assert_array_equal(found, expected)
        report = evaluate_robustness(model, frame, y, eps=0.2, **said)
        assert report.robust_accuracy == RobustScorer(eps=0.2, **said)(model, frame, y)
        assert report.robust_accuracy == np.mean(expected > 0.2)


def test_bounds_are_of_the_categories_that_a_group_lets_change():
    frame = pd.DataFrame({"age": np.linspace(-1, 1, 40), "a": [True, False] * 20})
    frame["b"] = ~frame.a
    y = (frame.age + 3 * frame.a > 1.5).astype(int)
    model = LogisticRegression().fit(frame, y)
    group = FeatureConstraints(one_hot=[["a", "b"]], immutable="age")
    shut = (pd.Series({"age": -9.0, "a": 0.0, "b": 0.0}), pd.Series({"age": 9, "a": 1, "b": 1}))
    shut[1]["b"] = 0  # which no sample of b obeys
    distances = adversarial_distances(model, frame[::2], y[::2], bounds=shut, constraints=group)
    assert np.isinf(distances[model.predict(frame[::2]) == y[::2]]).all()
    with pytest.raises(ValueError, match=r"outside the bounds of columns \(b\)"):
        adversarial_distances(model, frame, y, bounds=shut, constraints=group)


@pytest.mark.usefixtures("brief_stages")
def test_dummies_of_bool_in_a_one_hot_group_are_those_of_numbers():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.normal(0, 1, 60), "job": rng.choice(list("abc"), 60)})
    y = (frame.age + (frame.job == "a") > 0.3).astype(int)
    group = [["job_a", "job_b", "job_c"]]
    scorer = RobustScorer(eps=1, attack="strong", constraints=FeatureConstraints(one_hot=group))
    found = []
    for dtype in (bool, int):
        dummies = pd.get_dummies(frame, dtype=dtype)
        model = AdversarialClassifier(eps=1, random_state=0, max_epochs=5, n_steps=3)
        model.set_params(constraints=scorer.constraints).fit(dummies, y)
        linear = LogisticRegression().fit(dummies, y)
        report = evaluate_robustness(linear, dummies, y, eps=1, constraints=scorer.constraints)
        assert report.X_adv.dtypes["job_a"] == dtype
        assert (report.X_adv[group[0]].sum(axis=1) == 1).all()
        assert (report.X_adv[group[0]] != dummies[group[0]]).to_numpy().any()
        found.append((model.predict_proba(dummies).tolist(), scorer(linear, dummies, y)))
    assert found[0] == found[1]


def test_dummies_of_bool_that_an_encoder_reads_stay_fixed():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.normal(0, 1, 60), "b": rng.random(60) < 0.5})
    frame["not_b"] = ~frame.b
    y = (frame.age + frame.b > 0.5).astype(int)
    read = make_column_transformer((OneHotEncoder(), ["b"]), remainder="passthrough")
    model = make_pipeline(read, LogisticRegression()).fit(frame, y)
    constraints = FeatureConstraints(one_hot=[["b", "not_b"]])
    with pytest.warns(AttackWarning, match=r"columns \(b\) hold categories and are held fixed"):
        RobustScorer(eps=1, constraints=constraints)(model, frame, y)


def test_training_says_that_nothing_can_change():
    frame = pd.DataFrame(np.random.default_rng(0).integers(0, 9, (60, 3)))
    y = (frame[0] > 4).astype(int)
    model = AdversarialClassifier(eps=0.5, n_steps=2, random_state=0, max_epochs=1)
    with pytest.warns(AttackWarning, match="eps=0.5, at which no feature can change"):
        model.fit(frame.set_axis(list("abc"), axis=1), y)


def test_a_frame_of_polars_is_attacked_as_that_of_pandas():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    pytest.importorskip("pyarrow", reason="polars needs pyarrow for pandas")
    rng = np.random.default_rng(0)
    frame = polars.DataFrame(
        {
            "children": rng.integers(0, 4, 100),
            "smoker": rng.random(100) < 0.5,
            "bmi": rng.normal(25, 4, 100),
        }
    )
    y = (frame["children"].to_numpy() + frame["bmi"].to_numpy() / 4 > 8).astype(int)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, y)
    constraints = FeatureConstraints(immutable=["smoker"])
    scorer = RobustScorer(eps=1.5, constraints=constraints)
    assert scorer(model, frame, y) == scorer(model, frame.to_pandas(), y)
    assert constraints.fit(frame).feature_names_in_.tolist() == frame.columns
    report = evaluate_robustness(model, frame, y, eps=1.5, constraints=constraints)
    np.testing.assert_array_equal(report.X_adv["smoker"], frame["smoker"].to_numpy())
    assert report.X_adv["children"].dtype.kind == "i"


def test_what_rounding_takes_from_the_radius_is_said():
    rng = np.random.default_rng(0)
    X = (1e5 + 0.5 * rng.normal(size=(100, 3))).astype(np.float32)
    y = (X.sum(1) > 3e5).astype(int)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X.astype(float), y)
    with pytest.warns(AttackWarning, match=r"\(0, 1, 2\) cannot change, or by clearly less"):
        RobustScorer(eps=0.05)(model, X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RobustScorer(eps=0.5)(model, X, y)
        RobustScorer(eps=0.05)(model, X.astype(float), y)
