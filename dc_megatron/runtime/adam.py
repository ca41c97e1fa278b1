"""Adam that counts its steps per parameter group, as Transformer Engine's and Apex's FusedAdam do.

torch's Adam keeps one step counter per parameter. megatron-core's distributed optimizer treats that layout on paths
of its own, which fail on a rank without parameters, fail on load, and let all parameters share one counter tensor
after load. With the counter in the group those paths are not entered, and a checkpoint written here continues under
FusedAdam and the other way round.
"""

from __future__ import annotations

import torch


class GroupStepAdam(torch.optim.Adam):
    """torch's Adam / AdamW arithmetic with ``step`` (int) in the parameter group.

    ``adam_w_mode`` is FusedAdam's name for decoupled weight decay; the other arguments are torch's.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, **kwargs):
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=adam_w_mode,
            **kwargs,
        )

    def __setstate__(self, state):
        """As any optimizer: torch's Adam would look for a counter beside every parameter."""
        torch.optim.Optimizer.__setstate__(self, state)
        for group in self.param_groups:
            # A checkpoint of FusedAdam lacks what only torch's classes know.
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] = torch.tensor(float(group.get("step", 0)))
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                del self.state[parameter]["step"]
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
        return loss
