"""The errors and warnings that are this package's own."""


class AttackWarning(UserWarning):
    """An evaluation ran, but its robustness figure may be too high.

    Raised, for instance, where the gradient that a gradient attack follows is zero or
    not finite, or where the estimator's own `predict` disagrees with the torch view
    that was attacked.
    """


class TrainingDivergedError(ValueError):
    """The loss or the weights became NaN or infinite while training.

    The estimator keeps the weights of the last epoch that ended with finite values.
    """


class NotDifferentiableError(TypeError):
    """No differentiable torch view of an estimator or transformer is known."""


class NoGradientError(ValueError):
    """The output of a model does not depend on its input differentiably."""
