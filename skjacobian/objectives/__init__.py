"""Training objectives: value objects that give each sample of a batch its loss."""

from skjacobian.objectives._base import Objective, ObjectiveValue
from skjacobian.objectives.adversarial_training import AdversarialTraining
from skjacobian.objectives.cross_entropy import CrossEntropy
from skjacobian.objectives.jacobian_regularization import JacobianRegularization
from skjacobian.objectives.trades import TRADES

__all__ = [
    "TRADES",
    "AdversarialTraining",
    "CrossEntropy",
    "JacobianRegularization",
    "Objective",
    "ObjectiveValue",
]
