"""What skorch and torch would refuse in words of their own, or an epoch later, is named first."""

import pickle
import re

import numpy as np
import pytest
import torch
from skorch.callbacks import (
    BatchScoring,
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    LRScheduler,
)
from torch import nn

from skjacobian import AdversarialClassifier, JacobianRegularizedClassifier

X = np.linspace(0, 1, 80).reshape(20, 4)
y = np.arange(20) % 2
QUICK = {"max_epochs": 2, "random_state": 0}
WATCHED = "dur, epoch, lr, train_loss, train_loss_best, train_penalty"


def never():
    """Make no module: what comes after the checks."""
    raise AssertionError


def check_refused(message, **params):
    model = JacobianRegularizedClassifier(never, **{**QUICK, **params})
    with pytest.raises(ValueError, match=re.escape(message)):
        model.fit(X, y)
    assert not hasattr(model, "net_")


# --- optimizers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [nn.Linear, object, int, torch.optim.Adam([torch.zeros(1)]), never]
)
@pytest.mark.parametrize("Classifier", [JacobianRegularizedClassifier, AdversarialClassifier])
def test_what_is_no_class_of_optimizers_is_named(Classifier, optimizer):
    expected = "'optimizer' parameter .* a subclass of torch.optim.Optimizer"
    with pytest.raises(ValueError, match=expected):
        Classifier(never, optimizer=optimizer).fit(X, y)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"optimizer__betas": None}, "Got optimizer__betas=None, but expected parameters that"),
        (
            {"optimizer__betas": (2, 3)},
            "Got optimizer__betas=(2, 3), but expected parameters that Adam takes: Invalid beta",
        ),
        ({"optimizer__betas": (0.9,)}, "Got optimizer__betas=(0.9,), but expected parameters"),
        ({"optimizer__eps": np.nan}, "Got optimizer__eps=nan, but expected parameters that Adam"),
        (
            {"optimizer": "sgd", "optimizer__momentum": -1},
            "Got optimizer__momentum=-1, but expected parameters that SGD takes",
        ),
        (
            {"optimizer": torch.optim.Optimizer},
            "Got optimizer=Optimizer, but expected parameters that Optimizer takes",
        ),
    ],
)
def test_what_an_optimizer_refuses_is_named(params, message):
    check_refused(message, **params)


@pytest.mark.parametrize("groups", [None, 3, "a", [("a",)], [("*", 3)], [(1, {})]])
def test_groups_of_parameters_are_pairs(groups):
    check_refused(
        f"Got optimizer__param_groups={groups!r}, but expected a list of pairs",
        optimizer__param_groups=groups,
    )


@pytest.mark.parametrize("group", [{"lr": -1}, {"lr": "a"}, {"typo": 1}])
def test_what_groups_of_parameters_say_is_checked(group):
    groups = [("*", group)]
    check_refused(
        f"Got optimizer__param_groups={groups!r}, but expected parameters that Adam takes",
        optimizer__param_groups=groups,
    )


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.RMSprop])
def test_any_optimizer_of_dense_gradients_is_taken(optimizer):
    model = JacobianRegularizedClassifier(optimizer=optimizer, **QUICK)
    if optimizer is torch.optim.LBFGS:  # needs a closure that skorch gives
        model.set_params(optimizer__max_iter=2)
    assert len(model.fit(X, y).history_) == 2


# --- iterators ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["iterator_train", "iterator_valid"])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_workers", 2, "one of batch_size, shuffle, drop_last"),
        ("suffle", True, "one of batch_size, shuffle, drop_last (did you mean 'shuffle'?)"),
        ("shuffle", "no", "True or False"),
        ("drop_last", 1, "True or False"),
        ("batch_size", 0, "an integer of at least 1"),
    ],
)
def test_parameters_of_iterators_are_checked(part, name, value, expected):
    check_refused(
        f"Got {part}__{name}={value!r}, but expected {expected}", **{f"{part}__{name}": value}
    )


def test_iterators_take_numpy_bools():
    model = JacobianRegularizedClassifier(**QUICK, iterator_train__shuffle=np.bool_(False))
    assert len(model.fit(X, y).history_) == 2


# --- callbacks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [EarlyStopping(monitor="train_lose")],
            f"Got EarlyStopping(monitor='train_lose') in callbacks, but expected one of {WATCHED} "
            "(did you mean 'train_loss'?).",
        ),
        ([("stop", EarlyStopping("typo"))], "Got EarlyStopping(monitor='typo') in callbacks"),
        ([Checkpoint(monitor="typo_best")], "Got Checkpoint(monitor='typo_best') in callbacks"),
        (
            [EpochScoring("accuracy", on_train=True), EarlyStopping("acuracy")],
            "train_penalty (did you mean 'accuracy'?)",
        ),
        (
            [EpochScoring("accuracy")],
            "Got EpochScoring('accuracy') in callbacks, but expected early_stopping=True, which "
            "holds out data, or on_train=True.",
        ),
        ([("f1", BatchScoring("f1"))], "Got BatchScoring('f1') in callbacks, but expected early"),
    ],
)
def test_callbacks_that_watch_or_score_what_there_is_not(callbacks, message):
    check_refused(message, callbacks=callbacks)


def test_what_callbacks_watch_may_be_said_in_skorchs_spelling():
    callbacks = [("stop", EarlyStopping), EarlyStopping("train_loss")]
    check_refused(
        "Got EarlyStopping(monitor='typo') in callbacks",
        callbacks=callbacks,
        callbacks__stop__monitor="typo",
    )
    model = JacobianRegularizedClassifier(
        **QUICK, callbacks=callbacks, callbacks__stop__monitor="train_loss"
    )
    assert len(model.fit(X, y).history_) == 2
    assert callbacks[1].monitor == "train_loss"


@pytest.mark.parametrize(
    ("scoring", "monitor"),
    [
        (None, "valid_accuracy"),
        ("f1", "valid_score"),
        (None, "valid_loss"),
        (None, "lr"),
        (None, "f1_macro"),
        (None, "train_accuracy"),
    ],
)
def test_callbacks_watch_what_is_recorded(scoring, monitor):
    no_files = dict.fromkeys(("f_params", "f_optimizer", "f_criterion", "f_history"))
    callbacks = [
        EpochScoring("f1_macro", lower_is_better=False),
        EpochScoring("accuracy", on_train=True, name="train_accuracy"),
        ("f1_best", Checkpoint("f1_macro_best", **no_files)),
        ("absent", None),
        EarlyStopping(monitor=monitor),
    ]
    model = JacobianRegularizedClassifier(
        **QUICK, early_stopping=True, scoring=scoring, callbacks=callbacks
    )
    assert monitor in model.fit(X, y).history_[-1]


def test_without_a_score_none_is_recorded():
    check_refused(
        "Got EarlyStopping(monitor='valid_score') in callbacks",
        early_stopping=True,
        callbacks=[EarlyStopping("valid_score")],
    )


class Recorder(Callback):
    """Records a number of its own."""

    def on_epoch_end(self, net, **kwargs):
        net.history.record("mine", 1.0)


def test_what_callbacks_of_a_users_own_record_is_not_guessed():
    model = JacobianRegularizedClassifier(
        **QUICK,
        lr_schedule="constant",
        callbacks=[Recorder(), LRScheduler("ReduceLROnPlateau", monitor="mine")],
    )
    history = model.fit(X, y).history_
    assert [row["mine"] for row in history] == [1.0, 1.0]
    assert pickle.loads(pickle.dumps(model)).history_ == history


@pytest.mark.parametrize("value", [3, None])
def test_a_callback_is_replaced_by_another(value):
    check_refused(
        f"Got callbacks__epoch_timer={value}, but expected a skorch callback.",
        callbacks__epoch_timer=value,
    )
    model = JacobianRegularizedClassifier(**QUICK, callbacks__epoch_timer=Recorder()).fit(X, y)
    assert "dur" not in model.history_[0]
    assert model.history_[0]["mine"] == 1.0
