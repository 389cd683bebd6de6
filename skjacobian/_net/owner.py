"""The net that a classifier composes: made for the data, pickled as arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from skjacobian._net.objective_net import ObjectiveNet
from skjacobian._net.training import make_net
from skjacobian._preprocessing import behind_preprocessor, output_shape
from skjacobian._training_data import is_there, resolve_device
from skjacobian._validation import unwrap_scalar
from skjacobian.modules import make_module, module_params


class NetOwner(BaseEstimator):
    """Base of an estimator that has a skorch net in `net_`, and knows how it was made.

    `_net_args` and `preprocessor_` are what it takes to make the net again: a pickle carries
    them and the weights, and no torch object. `_nested` holds the parameters in skorch's
    spelling.
    """

    net_: ObjectiveNet
    classes_: np.ndarray
    input_shape_: tuple[int, ...]
    preprocessor_: Any
    module: Any
    preprocessor: Any
    optimizer: Any
    weight_decay: Any
    device: Any
    dtype: str
    _nested: dict[str, Any]
    _net_said: dict[str, Any]

    def _init_net(self, preprocessor: Any, X: np.ndarray, seed: int) -> None:
        """Make the network for X behind a fitted preprocessor, and remember how, for pickling."""
        device = resolve_device(self.device)
        dtype = self.dtype
        if dtype == "auto":
            dtype = str(X.dtype) if device.type == "cpu" else "float32"
        own = {n: v for n, v in self._nested.items() if n.startswith("module__")}
        given = {name.removeprefix("module__"): value for name, value in own.items()}
        input_shape = output_shape(preprocessor, X[:1])
        sizes: dict[str, Any] = {"input_shape": input_shape, "n_classes": len(self.classes_)}
        self.preprocessor_ = preprocessor
        self._net_said = self._said_of_the_net()
        self._net_args = {
            "module": self.module,
            "params": module_params(self.module, given, **sizes),
            "sizes": sizes,
            "dtype": dtype,
            "device": str(device),
            "seed": seed,
            "optimizer": self.optimizer,
            "nested": {
                "optimizer__weight_decay": float(unwrap_scalar(self.weight_decay)),
                **{n: v for n, v in self._nested.items() if n not in own},
            },
        }
        self.net_ = self._make_net()

    def _said_of_the_net(self) -> dict[str, Any]:
        """Return the parameters that the network and its optimizer are made from.

        Those of the preprocessor by name, as `set_params` changes them in place.
        """
        names = ("module", "preprocessor", "optimizer", "weight_decay", "dtype")
        said = {name: getattr(self, name) for name in names} | self._nested
        if self.preprocessor is not None:
            own = self.preprocessor.get_params()
            said |= {f"preprocessor__{name}": value for name, value in own.items()}
        return said

    def _check_same_net(self) -> None:
        """Raise if these have changed: training goes on with the network that is there."""
        now, then = self._said_of_the_net(), self._net_said
        for name in sorted({*now, *then}):
            if not _is_same(now.get(name), then.get(name)):
                raise ValueError(
                    f"Got {name}={now.get(name)!r}, but expected {then.get(name)!r} as in the "
                    "first fit: warm_start and partial_fit go on with its network and optimizer."
                )

    def _make_net(self) -> ObjectiveNet:
        args = self._net_args
        device = torch.device(args["device"])
        if device.type == "cuda" and not is_there(device):
            device = resolve_device("auto")

        def module() -> nn.Module:
            dtype = self._torch_dtype
            made = make_module(args["module"], args["params"], dtype=dtype, **args["sizes"])
            return behind_preprocessor(self.preprocessor_, made, dtype)

        return make_net(
            module,
            seed=args["seed"],
            device=device,
            n_classes=len(self.classes_),
            optimizer=args["optimizer"],
            nested=args["nested"],
        )

    @property
    def _torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "float64": torch.float64}[self._net_args["dtype"]]

    @property
    def module_(self) -> nn.Module:
        """The trained torch module, from X, preprocessed by its first layers, to logits."""
        return self.net_.module_

    @property
    def n_iter_(self) -> int:
        """The number of epochs trained."""
        return len(self.net_.history)

    @property
    def n_parameters_(self) -> int:
        """The number of weights, those that are frozen included."""
        return sum(p.numel() for p in self.module_.parameters())

    @property
    def history_(self) -> list[dict[str, Any]]:
        """One dict per epoch: losses, penalty, validation scores, duration."""
        hidden = ("batches", "_best", "_batch_count")
        return [
            {
                name: value.item() if isinstance(value, np.generic) else value
                for name, value in row.items()
                if not name.endswith(hidden)
            }
            for row in self.net_.history
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the weights as arrays, not as torch objects."""
        state = dict(super().__getstate__())
        if "net_" in state:
            state["_net_state"] = net_state(state.pop("net_"))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the network anew, on a device that this machine has, and fill it."""
        state = dict(state)
        trained = state.pop("_net_state", None)
        super().__setstate__(state)
        if trained is not None:
            self.net_ = self._make_net()
            restore_net(self.net_, trained)


def _is_same(value: Any, other: Any) -> bool:
    """Tell whether two values of a parameter are the same; of estimators, but for parameters."""
    if hasattr(value, "get_params") and not isinstance(value, type):
        return type(value) is type(other)
    if isinstance(value, np.ndarray | Tensor):
        return type(value) is type(other) and np.array_equal(np.asarray(value), np.asarray(other))
    return value is other or repr(value) == repr(other)


def net_state(net: ObjectiveNet) -> dict[str, Any]:
    """Return all that training has changed, as arrays and plain Python objects."""
    return {
        "weights": _to_numpy(net.module_.state_dict()),
        "frozen": [n for n, p in net.module_.named_parameters() if not p.requires_grad],
        "optimizer": _to_numpy(net.optimizer_.state_dict()),
        "history": net.history.to_list(),
        "generator": _to_numpy(net.generator.get_state()),
        "order": _to_numpy(net.iterator_train__generator.get_state()),
        "stream": _to_numpy(net.stream.state),
        "cuda_stream": _to_numpy(net.stream.cuda_state),
    }


def restore_net(net: ObjectiveNet, state: dict[str, Any]) -> None:
    """Put a state of `net_state` into a net of the same shape."""
    net.module_.load_state_dict(_to_torch(state["weights"]))
    for name, parameter in net.module_.named_parameters():
        parameter.requires_grad_(name not in state.get("frozen", ()))
    _restore_optimizer(net.optimizer_, _to_torch(state["optimizer"]))
    net.history[:] = state["history"]
    net.generator.set_state(_to_torch(state["generator"]))
    net.iterator_train__generator.set_state(_to_torch(state["order"]))
    net.stream.state = _to_torch(state["stream"])
    if net.device.type == "cuda" and state["cuda_stream"] is not None:
        net.stream.cuda_state = _to_torch(state["cuda_stream"])


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put a state into an optimizer, its tensors as training had them.

    Averages of gradients get the strides of their parameters, which arrays have lost: fused
    kernels go through the memory of both side by side. And torch casts all to the dtype of the
    parameters, also the products of NAdam, which are of another.
    """
    optimizer.load_state_dict(saved)
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for index, parameter in enumerate(parameters):
        for name, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                loaded = optimizer.state[parameter][name]
                like = parameter if value.shape == parameter.shape else loaded
                made = torch.empty_like(like, dtype=value.dtype, device=loaded.device)
                optimizer.state[parameter][name] = made.copy_(value)


def _to_numpy(value: Any) -> Any:
    return _map_leaves(
        lambda leaf: leaf.cpu().numpy().copy() if isinstance(leaf, Tensor) else leaf, value
    )


def _to_torch(value: Any) -> Any:
    # Copied: the arrays may be a file's, which must be neither written nor unmapped in between.
    return _map_leaves(
        lambda leaf: torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, value
    )


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply `function` to the leaves of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: _map_leaves(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_leaves(function, item) for item in value)
    return function(value)
