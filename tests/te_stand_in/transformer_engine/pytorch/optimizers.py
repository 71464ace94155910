"""The fused optimizers: torch's, with the step in the group and only the moments in the state."""

from typing import Any

import torch

from megatron.pruning.training import cpu_device


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **more: Any,
    ) -> None:
        assert bias_correction and more.get("adam_w_mode", True)
        assert not cpu_device.is_installed(), "its kernels are CUDA's"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for values in state["state"].values():
            assert values.keys() <= {"exp_avg", "exp_avg_sq"}, f"wrong name of a state: {sorted(values)}"
        super().load_state_dict(state)

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in (param for param in group["params"] if param.grad is not None):
                if not self.state[param]:
                    self.initialize_state(param)
                moments = self.state[param]
                torch.optim._functional.adamw(
                    [param], [param.grad], [moments["exp_avg"]], [moments["exp_avg_sq"]], [],
                    [torch.tensor(group["step"] - 1.0)], foreach=False, amsgrad=False, beta1=group["betas"][0],
                    beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                    maximize=False,
                )  # fmt: skip


class FusedSGD(torch.optim.SGD):
    """Not used here."""
