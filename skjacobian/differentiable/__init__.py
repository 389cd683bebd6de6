"""The torch view of fitted scikit-learn objects: what a gradient attack goes through."""

from skjacobian.differentiable._black_box import black_box
from skjacobian.differentiable._composition import Chain
from skjacobian.differentiable._networks import Network
from skjacobian.differentiable._projections import Linear
from skjacobian.differentiable._registry import ClassifierView, TensorFunction, View, as_torch
from skjacobian.differentiable._scalers import Affine

__all__ = [
    "Affine",
    "Chain",
    "ClassifierView",
    "Linear",
    "Network",
    "TensorFunction",
    "View",
    "as_torch",
    "black_box",
]
