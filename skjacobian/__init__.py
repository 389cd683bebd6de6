"""Adversarially robust classifiers that behave like any scikit-learn estimator."""

from skjacobian._version import __version__
from skjacobian.classifiers import AdversarialClassifier, JacobianRegularizedClassifier
from skjacobian.displays import JacobianNormDisplay
from skjacobian.metrics import RobustScorer, robust_accuracy_score

__all__ = [
    "AdversarialClassifier",
    "JacobianNormDisplay",
    "JacobianRegularizedClassifier",
    "RobustScorer",
    "__version__",
    "robust_accuracy_score",
]
