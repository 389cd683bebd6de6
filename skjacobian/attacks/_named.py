"""Attacks by name, for what has a threat model of its own: scorers and functions."""

from typing import Any

import numpy as np

from skjacobian._validation import did_you_mean, reject
from skjacobian.attacks._base import Attack
from skjacobian.attacks.cascade import Cascade
from skjacobian.attacks.fgsm import FGSM
from skjacobian.attacks.pgd import PGD

ATTACKS: dict[str, type[Attack]] = {"pgd": PGD, "fgsm": FGSM, "strong": Cascade}


def make_attack(attack: str | Attack, owner: str, **search: Any) -> Attack:
    """Return the attack that a name stands for, or an object that says nothing twice.

    Parameters
    ----------
    attack : {"pgd", "fgsm", "strong"} or Attack
    owner : str
        Who says the threat model.
    **search
        Parameters of "pgd".
    """
    if isinstance(attack, Attack):
        check_threat_model_is_unset(attack, owner)
        return attack
    if not isinstance(attack, str) or attack not in ATTACKS:
        names = ", ".join(map(repr, ATTACKS))
        hint = did_you_mean(attack, ATTACKS)
        reject("attack", attack, f"one of {names}{hint} or an attack object such as PGD()")
    return PGD(**{"n_restarts": "auto", **search}) if attack == "pgd" else ATTACKS[attack]()


def check_threat_model_is_unset(attack: Attack, owner: str) -> None:
    """Raise if an attack object brings a threat model, which is that of its `owner`."""
    defaults = type(attack)().get_params()
    for name in attack.THREAT_MODEL:
        if not np.array_equal(getattr(attack, name), defaults[name]):
            raise ValueError(
                f"Got attack={attack!r}, but expected its {name} to be left alone: the threat "
                f"model is not the attack's. Set {owner}({name}=...)."
            )
