"""Attacks: value objects, each a callable `(predict_logits, X, y) -> X_adv`."""

from skjacobian.attacks._base import Attack
from skjacobian.attacks._found import Found, Stage
from skjacobian.attacks.apgd import APGD
from skjacobian.attacks.cascade import Cascade
from skjacobian.attacks.fgsm import FGSM
from skjacobian.attacks.fmn import FMN
from skjacobian.attacks.hotflip import HotFlip
from skjacobian.attacks.leaf_search import LeafSearch
from skjacobian.attacks.pgd import PGD
from skjacobian.attacks.rays import RayS
from skjacobian.attacks.square import Square

__all__ = [
    "APGD",
    "FGSM",
    "FMN",
    "PGD",
    "Attack",
    "Cascade",
    "Found",
    "HotFlip",
    "LeafSearch",
    "RayS",
    "Square",
    "Stage",
]
