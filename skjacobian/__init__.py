"""Adversarially robust classifiers that behave like any scikit-learn estimator."""

from skjacobian._version import __version__
from skjacobian.adversarial_examples import plot_adversarial_examples
from skjacobian.classifiers import AdversarialClassifier, JacobianRegularizedClassifier
from skjacobian.constraints import FeatureConstraints
from skjacobian.curve import adversarial_distances, robustness_curve
from skjacobian.curve_display import RobustnessCurveDisplay
from skjacobian.evaluation import evaluate_robustness
from skjacobian.generalization import generalization_gap
from skjacobian.jacobian_display import JacobianNormDisplay
from skjacobian.metrics import RobustScorer, robust_accuracy_score
from skjacobian.report import RobustnessReport
from skjacobian.tightness import surrogate_gap

__all__ = [
    "AdversarialClassifier",
    "FeatureConstraints",
    "JacobianNormDisplay",
    "JacobianRegularizedClassifier",
    "RobustScorer",
    "RobustnessCurveDisplay",
    "RobustnessReport",
    "__version__",
    "adversarial_distances",
    "evaluate_robustness",
    "generalization_gap",
    "plot_adversarial_examples",
    "robust_accuracy_score",
    "robustness_curve",
    "surrogate_gap",
]
