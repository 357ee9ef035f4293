"""Adam on the CPU with the state of Transformer Engine's `FusedAdam`, so that both backends read one checkpoint.

torch's Adam counts steps for each parameter, `FusedAdam` for each group of parameters, and Megatron-Core 0.19 turns
neither into the other.
"""

from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from torch.optim.adam import adam


def install() -> None:
    """Let Megatron build this Adam, and save and load its state as `FusedAdam`'s."""
    megatron.core.optimizer.Adam = CpuAdam
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = CpuAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


class CpuAdam(torch.optim.Optimizer):
    """AdamW, or Adam where `adam_w_mode` is off, by torch's function; `step` is an entry of each group.

    Example: `optimizer = CpuAdam(model.parameters(), lr=1e-3)`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        # `FusedAdam` reads bias_correction from the groups that it loads.
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states: list[dict[str, torch.Tensor]] = [self.state[p] for p in parameters]
            for parameter, state in zip(parameters, states, strict=True):
                if not state:
                    state.update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})
            before = group.get("step", 0)
            group["step"] = before + 1
            adam(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(before)) for _ in parameters],
                foreach=False,
                decoupled_weight_decay=self.adam_w_mode,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of torch's Adam."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("bias_correction", True)
            for p in group["params"]:
                if "step" in self.state[p]:
                    group["step"] = int(self.state[p].pop("step"))
