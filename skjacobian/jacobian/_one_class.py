"""The joint pass of a ReLU network and one class of each sample, written out.

That is what the default penalty takes, on so few rows that the records, maps and tape of
`_joint`, which does the same for more kinds of layers and norms, take a third of the penalty's
time. Here are only the products. In the names of `_joint`: δ cotangents of the loss, h inputs
of the layers, G cotangents of the rows, D tangents of the norm.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from skjacobian.jacobian._cost import gram_pays
from skjacobian.jacobian._norms import REDUCTIONS, JacobianNorm, draw_classes


def takes_one_class(layers: list[nn.Module], X: Tensor, norm: JacobianNorm, n_rows: int) -> bool:
    """Tell whether layers accepted by `joint_pass_fits`, and a norm, are of this kind."""
    if norm.class_samples != 1:
        return False
    first = 1 if type(layers[0]) is nn.Flatten else 0
    kinds = [type(layer) for layer in layers[first:]]
    alternate = set(kinds[::2]) == {nn.Linear} and set(kinds[1::2]) <= {nn.ReLU}
    if not alternate or len(kinds) % 2 == 0 or (first == 0 and X.ndim > 2):
        return False
    entry, last = layers[first], layers[-1]
    assert isinstance(entry, nn.Linear)
    assert isinstance(last, nn.Linear)
    # Where the Gram matrix saves operations, the general pass takes it.
    by_gram = norm.norm == "l2" and gram_pays(n_rows, entry.out_features, entry.in_features)
    return last.out_features > 1 and not by_gram


class OneClassPass(torch.autograd.Function):
    """The tensors are the weights, from the last layer to the first, then their biases."""

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        index: Tensor | None,
        norm: JacobianNorm,
        generator: torch.Generator,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return logits, and the norm at the samples that `index` chooses (None: at all)."""
        n_dense = len(tensors) // 2
        weights, biases = tensors[:n_dense], tensors[n_dense:]
        h = X.flatten(1)
        inputs = [h]
        for i in range(n_dense - 1, 0, -1):
            h = torch.relu(F.linear(h, weights[i], biases[i]))
            inputs.insert(0, h)
        logits = F.linear(h, weights[0], biases[0])

        n_classes = logits.shape[1]
        n_rows = len(X) if index is None else len(index)
        classes = draw_classes(n_rows, n_classes, 1, generator).flatten().to(X.device)
        G = weights[0].index_select(0, classes)
        rows, chosen = [], []
        for h, weight in zip(inputs, weights[1:], strict=False):
            chosen.append(h if index is None else h.index_select(0, index))
            rows.append(_where_active(G, chosen[-1]))
            G = rows[-1] @ weight
        # Saved, so that a weight changed in between is an error.
        ctx.save_for_backward(*tensors)
        ctx.reduction, ctx.n_classes, ctx.classes = REDUCTIONS[norm.norm], n_classes, classes
        ctx.inputs, ctx.rows, ctx.chosen, ctx.J = inputs, rows, chosen, G.unsqueeze(1)
        return logits, n_classes * ctx.reduction(ctx.J)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """Return the gradients by the weights and biases."""
        n_dense = len(ctx.inputs)
        weights, wanted = ctx.saved_tensors[:n_dense], ctx.needs_input_grad[4:]
        by_weight: list[Tensor | None] = [None] * n_dense
        by_bias: list[Tensor | None] = []
        deltas = [delta]
        for i, h in enumerate(ctx.inputs):
            by_bias.append(deltas[i].sum(0) if wanted[n_dense + i] else None)
            if i + 1 < n_dense:
                deltas.append(_where_active(deltas[i] @ weights[i], h))
        D = ctx.reduction.gradient(ctx.J, ctx.n_classes * weight).squeeze(1)
        for i in range(n_dense - 1, 0, -1):
            if wanted[i]:
                by_weight[i] = (ctx.rows[i - 1].T @ D).addmm_(deltas[i].T, ctx.inputs[i])
            D = _where_active(D @ weights[i].T, ctx.chosen[i - 1])
        if wanted[0]:
            by_weight[0] = (deltas[0].T @ ctx.inputs[0]).index_add_(0, ctx.classes, D)
        return None, None, None, None, *by_weight, *by_bias


def _where_active(values: Tensor, h: Tensor) -> Tensor:
    """Return the values where the ReLU whose output is h is active, else 0.

    One kernel, where the slope and its product would be two.
    """
    active: Tensor = torch.ops.aten.threshold_backward.default(values, h, 0)
    return active
