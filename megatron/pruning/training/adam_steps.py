"""The step count of Adam, which torch keeps with each weight and TransformerEngine and apex keep with each group.

A checkpoint of one is resumed by the other: Megatron carries the moments over, but not the count, without which torch's
Adam does not load and the fused ones correct their bias as if no step had been made.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER


def loading_steps(load: Callable[[Any], None], state: Any) -> None:
    """Call `load`, an optimizer's `load_state_dict`, with the step count where this machine's Adam keeps it."""
    move_steps(state, to_groups=not USING_PYTORCH_OPTIMIZER)
    load(state)


def move_steps(state: Any, to_groups: bool) -> None:
    """Move the step count of an optimizer's state, or of each in nested ones, in place.

    It goes to the groups of weights, or else to the weights. A state is left as it is where the count is there already,
    or is not the same everywhere.
    """
    if not isinstance(state, dict):
        return
    groups, weights = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(weights, dict):
        for part in state.values():
            move_steps(part, to_groups)
        return
    common = [weights["common_step"]] if "common_step" in weights else []  # as `torch_dist` has it
    of_weights = [values for key, values in weights.items() if key != "common_step"]
    if not of_weights or not all(isinstance(values, dict) for values in of_weights):
        return
    in_groups = {int(group["step"]) for group in groups if "step" in group}
    in_weights = {int(step) for step in [*common, *(values["step"] for values in of_weights if "step" in values)]}
    there, here = (in_weights, in_groups) if to_groups else (in_groups, in_weights)
    if here or len(there) != 1:
        return
    weights.pop("common_step", None)
    for place in [*groups, *of_weights]:
        place.pop("step", None)
    (step,) = there
    for place in groups if to_groups else of_weights:
        place["step"] = step if to_groups else torch.tensor(float(step))
