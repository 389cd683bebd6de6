"""The joint pass of a ReLU network, written out, where nothing that `_chain` knows would pay.

That is what the default penalty takes, on so few rows or of so small a network that the records,
maps and tape of `_joint`, which does the same for more kinds of layers and norms, take a third
of the penalty's time. Here are only the products. In the names of `_joint`: δ cotangents of the
loss, h inputs of the layers, G cotangents of the rows, D tangents of the norm.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from skjacobian.jacobian._chosen import Index, at, n_chosen, spread
from skjacobian.jacobian._cost import blocks_pay, gram_pays, masked_product_pays
from skjacobian.jacobian._norms import MAXIMA, REDUCTIONS, JacobianNorm, draw_classes


def relu_pass_fits(layers: list[nn.Module], X: Tensor, norm: JacobianNorm, n_samples: int) -> bool:
    """Tell whether layers accepted by `joint_pass_fits`, and a norm, are of this kind."""
    first = 1 if type(layers[0]) is nn.Flatten else 0
    kinds = [type(layer) for layer in layers[first:]]
    alternate = set(kinds[::2]) == {nn.Linear} and set(kinds[1::2]) <= {nn.ReLU}
    if not alternate or len(kinds) % 2 == 0 or (first == 0 and X.ndim > 2):
        return False
    weights = [layer.weight for layer in layers[first::2] if isinstance(layer, nn.Linear)]
    n_classes = len(weights[-1])
    if len(weights) == 1 or n_classes == 1:
        return False
    if norm.n_projections is not None or norm.norm in MAXIMA:
        return False
    n_rows = n_samples * int(norm.n_rows(n_classes))
    all_classes = n_rows == n_samples * n_classes
    by_gram = norm.norm == "l2" and gram_pays(n_rows, *weights[0].shape)
    by_mask = all_classes and masked_product_pays(n_samples, weights[-2])
    return not (by_gram or by_mask or blocks_pay(n_rows, weights[0]))


class ReLUPass(torch.autograd.Function):
    """The tensors are the weights, from the last layer to the first, then their biases."""

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        index: Index,
        norm: JacobianNorm,
        generator: torch.Generator,
        scale: float,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return logits, and `scale` times the norm at the samples chosen, 0 at the others."""
        n_dense = len(tensors) // 2
        weights, biases = tensors[:n_dense], tensors[n_dense:]
        h = X.flatten(1)
        inputs = [h]
        for i in range(n_dense - 1, 0, -1):
            h = torch.relu(F.linear(h, weights[i], biases[i]))
            inputs.insert(0, h)
        logits = F.linear(h, weights[0], biases[0])

        n_samples, n_classes = n_chosen(len(X), index), logits.shape[1]
        n_drawn, classes = norm.class_samples or n_classes, None
        if n_drawn < n_classes:
            drawn = draw_classes(n_samples, n_classes, n_drawn, generator)
            classes = drawn.flatten().to(X.device, non_blocking=True)
            G = weights[0].index_select(0, classes).view(n_samples, n_drawn, -1)
        else:
            n_drawn = n_classes
            G = weights[0].unsqueeze(0)
        rows, chosen = [], []
        for h, weight in zip(inputs, weights[1:], strict=False):
            chosen.append(at(h, index).unsqueeze(1))
            rows.append(_where_active(G, chosen[-1]))
            G = rows[-1] @ weight
        # Saved, so that a weight changed in between is an error.
        ctx.save_for_backward(*tensors)
        ctx.reduction, ctx.factor = REDUCTIONS[norm.norm], scale * n_classes / n_drawn
        ctx.index, ctx.classes = index, classes
        ctx.inputs, ctx.rows, ctx.chosen, ctx.J = inputs, rows, chosen, G
        return logits, spread(ctx.factor * ctx.reduction(G), index, len(X))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """Return the gradients by the weights and biases."""
        n_dense = len(ctx.inputs)
        weights, wanted = ctx.saved_tensors[:n_dense], ctx.needs_input_grad[5:]
        by_weight: list[Tensor | None] = [None] * n_dense
        by_bias: list[Tensor | None] = []
        deltas = [delta]
        for i, h in enumerate(ctx.inputs):
            by_bias.append(deltas[i].sum(0) if wanted[n_dense + i] else None)
            if i + 1 < n_dense:
                deltas.append(_where_active(deltas[i] @ weights[i], h))
        D = ctx.reduction.gradient(ctx.J, ctx.factor * at(weight, ctx.index))
        for i in range(n_dense - 1, 0, -1):
            if wanted[i]:
                of_norm = ctx.rows[i - 1].flatten(0, 1).T @ D.flatten(0, 1)
                by_weight[i] = of_norm.addmm_(deltas[i].T, ctx.inputs[i])
            D = _where_active(D @ weights[i].T, ctx.chosen[i - 1])
        if wanted[0]:
            of_loss = deltas[0].T @ ctx.inputs[0]
            by_weight[0] = (
                of_loss.add_(D.sum(0))
                if ctx.classes is None
                else of_loss.index_add_(0, ctx.classes, D.flatten(0, 1))
            )
        return None, None, None, None, None, *by_weight, *by_bias


def _where_active(values: Tensor, h: Tensor) -> Tensor:
    """Return the values where the ReLU whose output is h is active, else 0.

    One kernel, where the slope and its product would be two.
    """
    active: Tensor = torch.ops.aten.threshold_backward.default(values, h, 0)
    return active
