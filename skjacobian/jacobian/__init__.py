"""Norms of the Jacobian of the logits, exact or estimated, by several engines."""

from skjacobian.jacobian._norms import JACOBIAN_NORMS, OUTPUTS, jacobian_norm

__all__ = ["JACOBIAN_NORMS", "OUTPUTS", "jacobian_norm"]
