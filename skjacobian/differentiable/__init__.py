"""The torch view of fitted scikit-learn objects: what a gradient attack goes through."""

from skjacobian.differentiable._black_box import (
    BlackBox,
    answers_or_nan,
    black_box,
    methods_of,
)
from skjacobian.differentiable._calibration import Calibrated
from skjacobian.differentiable._columns import (
    Columns,
    bind_samples,
    encoded_columns,
    unread_columns,
)
from skjacobian.differentiable._composition import Chain
from skjacobian.differentiable._elementwise import TORCH_FUNCTIONS, Power
from skjacobian.differentiable._ensembles import MeanProbability
from skjacobian.differentiable._expansions import Monomials, Splines
from skjacobian.differentiable._gaussian_process import LatentProcess
from skjacobian.differentiable._generative_classifiers import Gaussians
from skjacobian.differentiable._kernels import KernelMap
from skjacobian.differentiable._leaves import leaves_of
from skjacobian.differentiable._linear_classifiers import LinearLogits
from skjacobian.differentiable._meta_classifiers import Thresholded
from skjacobian.differentiable._mlp import Perceptrons
from skjacobian.differentiable._multiclass import OneVsRest
from skjacobian.differentiable._networks import FittedModule, Network
from skjacobian.differentiable._projections import Linear
from skjacobian.differentiable._registry import (
    ClassifierView,
    TensorFunction,
    View,
    as_torch,
    check_methods,
)
from skjacobian.differentiable._scalers import Affine
from skjacobian.differentiable._support_vectors import SupportVectors

__all__ = [
    "TORCH_FUNCTIONS",
    "Affine",
    "BlackBox",
    "Calibrated",
    "Chain",
    "ClassifierView",
    "Columns",
    "FittedModule",
    "Gaussians",
    "KernelMap",
    "LatentProcess",
    "Linear",
    "LinearLogits",
    "MeanProbability",
    "Monomials",
    "Network",
    "OneVsRest",
    "Perceptrons",
    "Power",
    "Splines",
    "SupportVectors",
    "TensorFunction",
    "Thresholded",
    "View",
    "answers_or_nan",
    "as_torch",
    "bind_samples",
    "black_box",
    "check_methods",
    "encoded_columns",
    "leaves_of",
    "methods_of",
    "unread_columns",
]
