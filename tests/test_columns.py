"""Every parameter that takes columns takes them in the same forms, with the same errors."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from skjacobian import AdversarialClassifier, FeatureConstraints, RobustScorer
from skjacobian._columns import Columns, by_place
from skjacobian._under_attack import UnderAttack
from skjacobian.attacks import PGD
from skjacobian.threat_model import resolve_mutable

rng = np.random.default_rng(0)
FRAME = pd.DataFrame(rng.normal(size=(30, 4)), columns=["age", "red", "income", "blue"])
FRAME["red"] = rng.integers(0, 2, 30).astype(float)  # valid as anything that is said of them
FRAME["blue"] = 1 - FRAME.red
Y = (FRAME.age + FRAME.red > 0.5).astype(int).to_numpy()
NAMES_NEED = "; names need a DataFrame, which a step of a pipeline gets from the one before it by "

# What is passed to a scorer to say columns by each parameter.
SAID = {
    "mutable": lambda columns: {"mutable": columns},
    **{
        name: lambda columns, name=name: {"constraints": FeatureConstraints(**{name: columns})}
        for name in ("immutable", "integer", "increasing", "decreasing")
    },
    "one_hot": lambda group: {"constraints": FeatureConstraints(one_hot=[group])},
    "scale": lambda mapping: {"constraints": FeatureConstraints(scale=mapping)},
    "bounds": lambda mapping: {"constraints": FeatureConstraints(bounds=mapping)},
}
MAPPINGS = {"scale": 2.0, "bounds": (-9.0, 9.0)}
each_parameter = pytest.mark.parametrize("parameter", SAID)


def given(parameter, columns):
    """Columns as a parameter takes them: as they are, or as the keys of a mapping."""
    return dict.fromkeys(columns, MAPPINGS[parameter]) if parameter in MAPPINGS else columns


def understood(parameter, columns, X=FRAME):
    """The indices of the columns that a scorer takes a parameter to mean."""
    threat = dict.fromkeys(("feature_scale", "bounds", "mutable", "constraints"))
    threat |= SAID[parameter](given(parameter, columns))
    subject = UnderAttack(LogisticRegression().fit(X, Y), X, Y, needs="gradients")
    armed = subject.arm(PGD(), norm="linf", eps=1.0, **threat)
    if parameter == "mutable":
        return armed.reach_of(subject.X_tensor).nonzero().flatten().tolist()
    rules = armed.constraints.resolve(subject.X_tensor)
    if parameter == "one_hot":
        return sorted(rules.groups[0].tolist())
    if parameter == "scale":
        return (rules.scale == 2.0).nonzero().flatten().tolist()
    if parameter == "bounds":
        return rules.bounds[1].isfinite().nonzero().flatten().tolist()
    return getattr(rules, parameter).nonzero().flatten().tolist()


LISTS = [
    ["red", "blue"],
    ("blue", "red"),
    {"red", "blue"},
    np.array(["red", "blue"]),
    np.array(["blue", "red"], dtype=object),
    pd.Index(["red", "blue"]),
    [1, 3],
    [-1, 1],
    (np.int64(3), 1),
    range(1, 4, 2),
    np.array([1, 3], dtype=np.uint8),
    pd.Series([1, -1]),
]
MASK = [False, True, False, True]
NO_KEYS = [
    MASK,
    tuple(map(np.bool_, MASK)),
    np.array(MASK),
    pd.Series(MASK),
    torch.tensor(MASK),
    torch.tensor([1, -1]),
]


@pytest.mark.parametrize(
    ("parameter", "columns"),
    [(p, columns) for p in SAID for columns in LISTS + ([] if p in MAPPINGS else NO_KEYS)],
    # Workers must agree on names, and have orders of sets of their own.
    ids=lambda value: f"a set of {sorted(value)}" if isinstance(value, set) else repr(value),
)
def test_columns_are_taken_by_name_by_index_and_by_mask(parameter, columns):
    assert understood(parameter, columns) == [1, 3]


@pytest.mark.parametrize("column", ["red", np.str_("red"), 1, -3, np.int64(1)], ids=repr)
@pytest.mark.parametrize("parameter", [*SAID][:5])
def test_a_column_alone_needs_no_list(parameter, column):
    assert understood(parameter, column) == [1]


@pytest.mark.parametrize("X", [FRAME, FRAME.to_numpy()], ids=["DataFrame", "array"])
@pytest.mark.parametrize(
    ("columns", "but"),
    [
        (["blu"], "; 'blu' is none (did you mean 'blue'?)"),
        (("red", "xyzzy"), "; 'xyzzy' is none"),
        ([1, 4], "; 4 is none"),
        ([-5], "; -5 is none"),
        (["red", 3], ", all of one kind"),
        ([1.0, 3.0], ", all of one kind"),
        ([None], ", all of one kind"),
        ([b"red"], ", all of one kind"),
    ],
    ids=repr,
)
@each_parameter
def test_what_is_no_column_is_named_with_what_could_be_said(parameter, columns, but, X):
    said = given(parameter, columns)
    names = "names, "
    if X is not FRAME:
        names = ""
        if all(isinstance(column, str) for column in columns):
            but = NAMES_NEED + "set_output(transform='pandas')"
    message = (
        f"Got {parameter}={said!r}, but expected columns of X: {names}indices from -4 to 3 or a "
        f"boolean mask of shape (4,){but}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        understood(parameter, columns, X)


@pytest.mark.parametrize("parameter", [*SAID][1:])
def test_constraints_name_what_is_no_column_when_they_are_fitted(parameter):
    said = given(parameter, ["agee"])
    constraints = SAID[parameter](said)["constraints"]
    match = re.escape(f"Got {parameter}={said!r}, but expected columns of X: names, indices from")
    with pytest.raises(ValueError, match=f"^{match}.*'agee' is none \\(did you mean 'age'\\?\\)"):
        constraints.fit(FRAME)
    constraints.fit(FRAME.rename(columns={"age": "agee"})).fit(FRAME.assign(agee=FRAME.red))


@pytest.mark.parametrize(
    ("columns", "but"),
    [
        ([0, 1, 0, 1], ", each once"),  # no mask
        ([1, -3], ", each once"),
        (["red", "red"], ", each once"),
        ([True, False], ", all of one kind"),
        ([False, True, 2, 3], ", all of one kind"),
        ([[0, 1], [2, 3]], ", all of one kind"),
        ([["red"], ["age", "blue"]], ", all of one kind"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("parameter", [*SAID][:6])
def test_columns_said_twice_masks_that_do_not_fit_and_nested_lists_are_rejected(
    parameter, columns, but
):
    message = (
        f"Got {parameter}={columns!r}, but expected columns of X: names, indices from -4 to 3 or a "
        f"boolean mask of shape (4,){but}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        understood(parameter, columns)


@pytest.mark.parametrize("one_hot", ["red", ["red", "blue"], 3, [1, 3], np.array(MASK)], ids=repr)
def test_groups_are_lists_of_columns(one_hot):
    message = f"Got one_hot={one_hot!r}, but expected groups of columns, as in [['red', 'green'"
    with pytest.raises(ValueError, match=re.escape(message)):
        RobustScorer(constraints=FeatureConstraints(one_hot=one_hot))(
            LogisticRegression().fit(FRAME, Y), FRAME, Y
        )


@pytest.mark.parametrize("columns", ["agee", ["age", 1], [7]], ids=repr)
def test_training_rejects_columns_as_scoring_does(columns):
    constraints = FeatureConstraints(immutable=columns)
    with pytest.raises(ValueError, match=r"^Got immutable=") as scoring:
        RobustScorer(constraints=constraints)(LogisticRegression().fit(FRAME, Y), FRAME, Y)
    with pytest.raises(ValueError, match=r"^Got immutable=") as training:
        AdversarialClassifier(constraints=constraints).fit(FRAME, Y)
    assert str(training.value) == str(scoring.value)


@each_parameter
def test_places_are_rejected_where_the_columns_have_another_order(parameter):
    model, turned = LogisticRegression().fit(FRAME, Y), FRAME[FRAME.columns[::-1]]
    by_name = RobustScorer(**SAID[parameter](given(parameter, ["red", "blue"])))
    assert by_name(model, turned, Y) == by_name(model, FRAME, Y)
    for columns in ([1, 3], [-1, -3]):
        scorer = RobustScorer(**SAID[parameter](given(parameter, columns)))
        with pytest.raises(ValueError, match="by place and X with other columns"):
            scorer(model, turned, Y)


@pytest.mark.parametrize("columns", [0, [0], [True, False], np.array([1])], ids=repr)
def test_indices_and_masks_are_places(columns):
    assert by_place(columns)


@pytest.mark.parametrize("columns", [None, [], "age", ["age"], pd.Index(["age"])], ids=repr)
def test_names_are_no_places(columns):
    assert not by_place(columns)


@pytest.mark.parametrize("parameter", [name for name in SAID if name not in MAPPINGS])
def test_a_mask_that_is_a_series_is_read_by_its_labels(parameter):
    mask = pd.Series(MASK, index=FRAME.columns)
    assert understood(parameter, mask[::-1]) == understood(parameter, mask) == [1, 3]
    more = pd.concat([mask[::-1], pd.Series({"target": True})])
    assert understood(parameter, more) == [1, 3]
    model, turned = LogisticRegression().fit(FRAME, Y), FRAME[FRAME.columns[::-1]]
    scorer = RobustScorer(**SAID[parameter](given(parameter, mask[::-1])))
    assert scorer(model, turned, Y) == scorer(model, FRAME, Y)
    with pytest.raises(ValueError, match=r"without values for \['blue'\], but .* column of X\.$"):
        understood(parameter, mask.drop("blue"))


def test_masks_of_images_have_the_shape_of_a_sample_or_are_flat():
    X, mask = torch.zeros(4, 2, 3), np.array([[True, False, False], [False, True, True]])
    for said in (mask, mask.ravel(), mask.tolist(), torch.from_numpy(mask), [0, 4, -1]):
        constraints = FeatureConstraints(immutable=said)
        assert constraints.resolve(X).immutable.tolist() == mask.tolist()
        assert resolve_mutable(said, X).tolist() == mask.tolist()
    with pytest.raises(ValueError, match=r"or a boolean mask of shape \(2, 3\)"):
        FeatureConstraints(immutable=mask.T).resolve(X)


SERIES = pd.Series({"red": 1.0, "income": 2.0, "agee": 3.0, "blue": 4.0})


@pytest.mark.parametrize(
    "said", [{"feature_scale": SERIES}, {"bounds": (-SERIES - 9, 9.0)}, {"bounds": (-9, SERIES)}]
)
def test_a_series_has_a_value_for_each_column(said):
    message = re.escape(
        f"Got {next(iter(said))} without values for ['age'], but expected one for each column of X "
        "(did you mean 'agee'?). FeatureConstraints takes the scale and range of some columns."
    )
    with pytest.raises(ValueError, match=message):
        RobustScorer(**said)(LogisticRegression().fit(FRAME, Y), FRAME, Y)
    with pytest.raises(ValueError, match=message):
        AdversarialClassifier(**said).fit(FRAME, Y)


def test_no_name_of_another_column_is_suggested_for_a_column_without_a_value():
    frame = FRAME.rename(columns={"blue": "incomes"})
    scale = pd.Series({"red": 1.0, "income": 2.0, "age": 3.0})
    with pytest.raises(ValueError, match=r"values for \['incomes'\], .* column of X\. Feature"):
        RobustScorer(feature_scale=scale)(LogisticRegression().fit(frame, Y), frame, Y)


@pytest.mark.parametrize("said", [{"feature_scale": {"age": 2.0}}, {"bounds": {"age": (-9, 9)}}])
def test_mappings_of_columns_are_led_to_constraints(said):
    match = (
        rf"Got {next(iter(said))}={{'age': .*}}, but expected .*numbers.*; FeatureConstraints takes"
    )
    with pytest.raises(ValueError, match=match):
        RobustScorer(**said)(LogisticRegression().fit(FRAME, Y), FRAME, Y)


def test_a_series_is_read_by_place_where_the_columns_have_no_names():
    X = FRAME.to_numpy()
    model = LogisticRegression().fit(X, Y)
    scores = [RobustScorer(feature_scale=s)(model, X, Y) for s in (SERIES, SERIES.to_numpy())]
    assert scores[0] == scores[1]


def test_names_that_are_no_strings_name_nothing():
    columns = Columns((3,), [2, "age", "age"])
    assert columns.indices("immutable", [2]) == [2]
    assert columns.indices("immutable", "age") == [1]
    assert columns.shown([0, 1]) == "2, age"
    with pytest.raises(ValueError, match=r"; the names of X are no strings, but like 0\."):
        Columns((2,), [0, 1]).indices("immutable", "age")
    with pytest.raises(ValueError, match=r"are no strings, but like \('a', 'x'\)"):
        Columns((2,), [("a", "x"), ("a", "y")]).indices("mutable", [("a", "y")])
