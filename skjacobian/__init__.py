"""Adversarially robust classifiers that behave like any scikit-learn estimator."""

from skjacobian._version import __version__
from skjacobian.classifiers import AdversarialClassifier, JacobianRegularizedClassifier
from skjacobian.displays import JacobianNormDisplay
from skjacobian.evaluation import evaluate_robustness
from skjacobian.metrics import RobustScorer, robust_accuracy_score
from skjacobian.report import RobustnessReport

__all__ = [
    "AdversarialClassifier",
    "JacobianNormDisplay",
    "JacobianRegularizedClassifier",
    "RobustScorer",
    "RobustnessReport",
    "__version__",
    "evaluate_robustness",
    "robust_accuracy_score",
]
