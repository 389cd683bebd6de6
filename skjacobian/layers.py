"""Facts about the layers that networks are made of."""

from typing import Any, TypeGuard

from torch import Tensor, nn

ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid),
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)


class Rescaling(nn.Module):
    """x ↦ (x - before)·scale + after, each feature by fixed numbers: a scaler's layer.

    Parameters
    ----------
    before, scale, after : Tensor of shape (n_features,) or (), optional
        None leaves the step out.
    """

    before: Tensor | None
    scale: Tensor | None
    after: Tensor | None

    def __init__(
        self, before: Tensor | None = None, scale: Tensor | None = None, after: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("before", before)
        self.register_buffer("scale", scale)
        self.register_buffer("after", after)

    def forward(self, X: Tensor) -> Tensor:
        """Return the rescaled `X`."""
        X = X if self.before is None else X - self.before
        X = X if self.scale is None else X * self.scale
        return X if self.after is None else X + self.after


def linear(W: Tensor, b: Tensor | None = None) -> nn.Linear:
    """Return the layer x ↦ Wx + b."""
    # On the meta device torch draws no initial weights.
    layer = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, device="meta")
    layer.weight = nn.Parameter(W)
    if b is not None:
        layer.bias = nn.Parameter(b)
    return layer


def is_plain_sequence(module: object) -> TypeGuard[nn.Sequential]:
    """Tell whether a module does what `nn.Sequential` does, one layer after another."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def is_changed(module: nn.Module) -> bool:
    """Tell whether an instance does more than its class: by hooks, or a `forward` of its own."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def pair(value: Any) -> tuple[int, int]:
    """Return a setting of both dimensions, given as one number or as two."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def pools_disjointly(layer: Any) -> bool:
    """Tell whether each value is in the window of one output, or of none."""
    plain = pair(layer.stride) == pair(layer.kernel_size) and not layer.ceil_mode
    plain = plain and pair(layer.padding) == (0, 0)
    return plain and pair(getattr(layer, "dilation", 1)) == (1, 1)
