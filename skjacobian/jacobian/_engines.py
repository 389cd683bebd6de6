"""Choosing how the Jacobian of a model is computed."""

import torch
from torch import Tensor, nn

from skjacobian._validation import check_option, reject
from skjacobian.jacobian._autograd import AutogradLinearization
from skjacobian.jacobian._linearization import Linearization
from skjacobian.jacobian._stack import Stack, chain_of
from skjacobian.layers import ACTIVATIONS, DROPOUTS, Rescaling
from skjacobian.model_modes import PredictLogits, batch_norm_in_eval
from skjacobian.model_outputs import check_output

# Layers whose backward pass vmap takes in one piece, and faster than one by one.
VMAPPED = frozenset(
    (
        *(nn.Linear, nn.LayerNorm, nn.Flatten, nn.Unflatten, nn.Identity, Rescaling),
        *(*ACTIVATIONS, *DROPOUTS),
    )
)

ENGINES = ("auto", "closed_form", "batched", "loop")


def linearize(
    predict_logits: PredictLogits, X: Tensor, *, engine: str = "auto", create_graph: bool = False
) -> Linearization:
    """Return the Jacobian of a model at each sample, computed as `engine` says.

    "auto" is "closed_form" for the chains of layers that have one; otherwise "batched"
    where vmap saves time, which is where there are no convolutions; otherwise "loop".
    """
    check_option("engine", engine, ENGINES)
    with torch.set_grad_enabled(create_graph), batch_norm_in_eval(predict_logits):
        if (layers := closed_form(predict_logits, engine)) is not None:
            stack = Stack(layers, X.detach())
            check_output(stack.logits, X)
            return stack.linearize()
    return AutogradLinearization(
        predict_logits,
        X,
        batched=engine == "batched" or (engine == "auto" and _vmap_pays(predict_logits)),
        create_graph=create_graph,
        may_loop=engine == "auto",
    )


def closed_form(predict_logits: PredictLogits, engine: str) -> list[nn.Module] | None:
    """Return the layers of a model that `engine` treats in closed form, else None."""
    if engine not in ("auto", "closed_form"):
        return None
    layers = chain_of(predict_logits)
    if layers is None and engine == "closed_form":
        reject(
            "engine",
            engine,
            "'auto', 'batched' or 'loop' for this model: it is not an nn.Sequential of layers "
            "that have a closed form",
        )
    return layers


def _vmap_pays(model: object) -> bool:
    """Tell whether all that a model is made of are layers that vmap is fast on."""
    if not isinstance(model, nn.Module):
        return False
    leaves = [m for m in model.modules() if not m._modules]
    return all(type(leaf) in VMAPPED for leaf in leaves)
