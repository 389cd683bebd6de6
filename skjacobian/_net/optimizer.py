"""Adam at the price of its kernel."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


class Adam(torch.optim.Adam):
    """torch's fused Adam, bit for bit, without its bookkeeping between steps.

    On a small network that bookkeeping (collecting, checking and grouping a handful of
    tensors) takes a seventh of the training time. It is needed once: from the second step
    on the tensors are known, and go straight to the kernel. Needs parameters of one dtype
    on one device.

    Parameters
    ----------
    params : iterable of Tensor or dict
    **kwargs
        As `torch.optim.Adam` takes them.
    """

    __signature__ = inspect.signature(torch.optim.Adam)

    def __init__(self, params: Any, **kwargs: Any) -> None:
        by_loops = kwargs.get("foreach") or kwargs.get("differentiable")
        super().__init__(params, **{"fused": not by_loops, **kwargs})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure`, if given, computes the gradients."""
        if self._is_watched() or not all(map(self._is_plain, self.param_groups)):
            step = torch.optim.Adam.step
            # torch wraps the method, which calls the hooks, once a plain Adam is made.
            wrapped = step if hasattr(step, "hooked") else self.profile_hook_step(step)
            return wrapped(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._fused_step(group)
        return loss

    # Tells torch not to wrap `step` for its profiler, which would cost more than the kernel.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; `set_to_none=False` sets them to zero instead."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _is_watched(self) -> bool:
        """Tell whether hooks, or a scaler of gradients, want torch's own step."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or getattr(self, "grad_scale", None) is not None
            or getattr(self, "found_inf", None) is not None
        )

    def _is_plain(self, group: dict[str, Any]) -> bool:
        unusual = ("amsgrad", "maximize", "differentiable", "capturable", "decoupled_weight_decay")
        return group["fused"] and not any(group.get(name) for name in unusual)

    def _fused_step(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        states = [self.state[p] for p in params]
        if not all(states):
            # torch makes the state of a parameter at its first step.
            self._init_group(group, [], [], [], [], [], [])  # type: ignore[no-untyped-call]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
