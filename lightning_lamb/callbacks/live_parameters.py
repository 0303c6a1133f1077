"""Points optimizers at the parameters that train, when the strategy replaced those they were built with.

The stock LightningCLI builds the optimizer before the Trainer exists. FSDP2 and tensor parallelism then replace
every parameter, and the optimizer would step on tensors that nobody uses: training changes nothing, silently
(Lightning issues #19110, #16489).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from lightning_lamb.errors import ConflictError
from lightning_lamb.sharding.annotate import clean_name


class LiveParameters:
    """Remembers parameters by name before they are replaced, and repairs optimizers afterwards.

    Args:
        module: the module before ``configure_model`` and wrapping.
    """

    def __init__(self, module: nn.Module) -> None:
        # The parameters themselves are kept, so that an id cannot be given to another tensor meanwhile.
        self._before = {id(parameter): (clean_name(name), parameter) for name, parameter in module.named_parameters()}

    def rebind(self, optimizers: Iterable[Optimizer], module: nn.Module) -> int:
        """Replaces stale parameters in ``optimizers`` by the live ones of the same name.

        Everything else in the groups stays as it is, names included: torch refuses groups with names beside groups
        without, and Lightning's BaseFinetuning adds the latter. A tensor that the module never had stays too.

        Args:
            optimizers: groups and state are modified in place.
            module: the module as it will train.

        Returns:
            How many parameters were replaced.

        Raises:
            ConflictError: a stale parameter has no successor of its name, or the module has none of the parameters.
        """
        now = {clean_name(name): parameter for name, parameter in module.named_parameters()}
        live = {id(parameter) for parameter in now.values()}
        replaced, held, strange = 0, 0, 0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for index, parameter in enumerate(group["params"]):
                    held += 1
                    if id(parameter) in live:
                        continue
                    if id(parameter) not in self._before:
                        strange += 1
                        continue
                    group["params"][index] = successor = self._successor(parameter, now)
                    if parameter in optimizer.state:
                        optimizer.state[successor] = optimizer.state.pop(parameter)
                    replaced += 1
        if strange and strange == held and any(parameter.requires_grad for parameter in now.values()):
            raise ConflictError(
                f"the optimizer holds {held} parameters, and {type(module).__name__} has none of them: training would "
                "change nothing in it. Build the optimizer in configure_optimizers (LambMixin, LambCLI), when all "
                "layers exist."
            )
        return replaced

    def _successor(self, parameter: nn.Parameter, now: dict[str, nn.Parameter]) -> nn.Parameter:
        """The live parameter that took the place of a stale one."""
        name, _ = self._before[id(parameter)]
        if name not in now:
            raise ConflictError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the module does not have any "
                f"more (it was {name!r}): build the optimizer in configure_optimizers (LambMixin, LambCLI), where the "
                "strategy has already replaced the parameters."
            )
        return now[name]
