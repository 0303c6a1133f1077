"""ZeRO stage 1: whole weights and gradients on every rank, optimizer state cut evenly over the ranks.

Every rank steps its slice of every layer, the norms are completed as for any other sharding, and the new weights are
gathered. Torch's ``ZeroRedundancyOptimizer`` gives whole layers to ranks instead: as uneven as the layers are, and its
ranks know neither names nor the gradient norm of the layers that they do not hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_lamb.errors import ConflictError, StateDictError
from lightning_lamb.optimizers import gradients, state
from lightning_lamb.optimizers.group_options import parts_of
from lightning_lamb.optimizers.lamb import Lamb
from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer
from lightning_lamb.optimizers.plan import parameter_name
from lightning_lamb.optimizers.slices import Slice, gather_slices, gather_state, in_buckets
from lightning_lamb.param_groups import Exemptions
from lightning_lamb.sharding import annotation, is_dtensor


class ShardedStateOptimizer(Optimizer):
    """Lamb or Lars under DDP with the optimizer state, masters included, divided by the number of ranks.

    Exactly the training of the unsharded optimizer, ``max_grad_norm`` and reports by name included. A state dict is the
    unsharded optimizer's, so a checkpoint continues on any number of ranks, with or without this class. Gradients must
    be the same on all ranks, as DDP leaves them.

    Communication per step: what the optimizer itself does for layers cut over ranks, one all-reduce (with
    ``max_grad_norm`` one more), and one all-gather of the new weights per `bucket_bytes`.

    Args:
        params: whole parameters, (name, parameter) pairs, or groups of either.
        optimizer_class: `Lamb`, `Lars`, or a preset, which makes one.
        process_group: the ranks that share the state; None is all ranks. It need not exist before the first step.
        bucket_bytes: weights gathered at a time; a step needs that much more memory.
        **options: of the optimizer.

    Raises:
        ConflictError: at the first step: parameters that are sharded already; their state is sharded with them.
        UnsupportedGradientError: a sparse or complex gradient.

    >>> layer = torch.nn.Linear(4, 3)
    >>> optimizer = ShardedStateOptimizer(layer.named_parameters(), Lamb, lr=0.1)  # one process: nothing to divide
    >>> layer(torch.ones(2, 4)).square().sum().backward()
    >>> optimizer.step()
    >>> list(optimizer.trust_ratios)
    ['weight']
    """

    exemptions: Exemptions | None = None
    """As in `LayerwiseOptimizer`."""

    def __init__(
        self,
        params: Any,
        optimizer_class: Callable[..., LayerwiseOptimizer] = Lamb,
        *,
        process_group: Any | None = None,
        bucket_bytes: int = 1 << 26,
        **options: Any,
    ) -> None:
        self.optimizer_class = optimizer_class
        self.bucket_bytes = bucket_bytes
        self._group = process_group
        self._options = options
        self._inner: LayerwiseOptimizer | None = None
        self._slices: list[Slice] = []
        self._consolidated: dict[str, Any] | None = None
        # Checks the options now, and knows their defaults.
        self._template = optimizer_class([torch.nn.Parameter(torch.empty(0))], **options)
        super().__init__(params, dict(self._template.defaults))

    # --------------------------------------------------------------------------------------------------------- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Makes one update of every parameter that has a gradient; all ranks hold the same weights afterwards.

        Args:
            closure: reevaluates the model and returns the loss; called once, before anything else.

        Returns:
            What ``closure`` returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._consolidated = None
        with torch.no_grad(), self._prepared() as inner:
            inner.step()
            if self._ranks() > 1:
                moved = [part for part in self._slices if part.parameter.requires_grad]
                for bucket in in_buckets(moved, self.bucket_bytes):
                    gather_slices(bucket, self._group)
        return loss

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[LayerwiseOptimizer]:
        """The optimizer of this rank's slices, with this moment's weights, gradients and options."""
        inner = self._built()
        for own, theirs in zip(self.param_groups, inner.param_groups):
            theirs.update({name: value for name, value in own.items() if name not in ("params", "param_names")})
        try:
            for part in self._slices:
                grad = part.parameter.grad
                if grad is not None:
                    gradients.refuse_unusable(grad, part.name)
                part.follow(grad)
            yield inner
        finally:
            for part in self._slices:
                part.piece.grad = None

    def _built(self) -> LayerwiseOptimizer:
        if self._inner is None:
            groups = [self._sliced(index) for index in range(len(self.param_groups))]
            self._inner = self.optimizer_class(groups, **self._options)
            self.state = self._inner.state
        return self._inner

    def _sliced(self, index: int) -> dict[str, Any]:
        """A parameter group of this rank's slices."""
        group = self.param_groups[index]
        named = []
        for position, parameter in enumerate(group["params"]):
            name = parameter_name(group, index, position)
            _refuse_sharded(parameter, name)
            own = Slice(parameter, name, self._rank(), self._ranks(), self._group)
            self._slices.append(own)
            named.append((name, own.piece))
        return {**{k: v for k, v in group.items() if k != "param_names"}, "params": named}

    def _ranks(self) -> int:
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    def _rank(self) -> int:
        return dist.get_rank(self._group) if dist.is_available() and dist.is_initialized() else 0

    # ------------------------------------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, at any time; their step count starts at zero.

        Args:
            param_group: ``params`` (tensors or (name, tensor) pairs) and any option of the optimizer.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        for part in parts_of(self, param_group):
            self._add_param_group(part)

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {k: v for k, v in param_group.items() if k in self._template.defaults}
        # Checks them.
        self.optimizer_class([{**options, "params": [torch.nn.Parameter(torch.empty(0))]}], **self._options)
        super().add_param_group(param_group)
        if self._inner is not None:
            self._inner.add_param_group(self._sliced(len(self.param_groups) - 1))

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collects the state of all ranks on one, for `state_dict` there; call it on all ranks. Lightning does.

        Communication: one gather of objects, then one gather per kind of state and `bucket_bytes`.

        Args:
            to: rank in the process group that gets the state, in host memory.
        """
        self._built()
        found = gather_state(self._slices, self.state, self.bucket_bytes, to, self._group, self._ranks())
        self._consolidated = None if found is None else {"state": found, **self._groups_state()}

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the unsharded optimizer, on the rank that `consolidate_state_dict` named.

        Raises:
            StateDictError: it was not called on all ranks since the last step, or named another rank.
        """
        if self._consolidated is None and self._ranks() == 1:
            self.consolidate_state_dict()
        if self._consolidated is None:
            raise StateDictError(
                f"rank {self._rank()} of {self._ranks()} holds a part of the optimizer state only. Call "
                "optimizer.consolidate_state_dict(to=rank) on all ranks first (Lightning and Fabric do), and "
                "optimizer.state_dict() on that rank."
            )
        return self._consolidated

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of the unsharded optimizer or of this one; every rank keeps its slices. No communication.

        Args:
            state_dict: whole, on every rank.

        Raises:
            StateDictError: another class, other groups or other shapes; nothing is changed then.
        """
        kind = type(self._template)
        keys = ("step", *self._template.moment_keys())
        state.check_state_dict(state_dict, self.param_groups, kind.signature, keys, kind.__name__)
        inner = self._built()
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        saved_keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        cut = {
            key: {k: own.cut_copy(v) if k != "step" else v for k, v in found.items()}
            for key, own in zip(saved_keys, self._slices)
            if (found := state_dict["state"].get(key))
        }
        inner.load_state_dict({"state": cut, "param_groups": state_dict["param_groups"]})
        self.state = inner.state
        self._consolidated = None

    def _groups_state(self) -> dict[str, Any]:
        """``param_groups`` as in a state dict."""
        groups, count = [], 0
        for group in self.param_groups:
            packed = {name: value for name, value in group.items() if name != "params"}
            groups.append({**packed, "params": list(range(count, count + len(group["params"])))})
            count += len(group["params"])
        return {"param_groups": groups}

    # -------------------------------------------------------------------------------------------------- what it reports

    def global_grad_norm(self) -> Tensor:
        """See `LayerwiseOptimizer.global_grad_norm`. One all-reduce of one number."""
        with self._prepared() as inner:
            return inner.global_grad_norm()

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradient norm that the last step clipped by, before clipping; None without ``max_grad_norm``."""
        return self._built().grad_norm

    @property
    def trust_ratios(self) -> dict[str, Tensor]:
        """Trust ratios of the last step by layer name, the same on every rank."""
        return self._built().trust_ratios

    @property
    def weight_norms(self) -> dict[str, Tensor]:
        """``||w||`` before the last step by layer name, the same on every rank."""
        return self._built().weight_norms

    @property
    def update_norms(self) -> dict[str, Tensor]:
        """``||u||`` of the last step by layer name, the same on every rank."""
        return self._built().update_norms


def _refuse_sharded(parameter: Tensor, name: str) -> None:
    known = annotation(parameter)
    sliced = getattr(parameter, "_fsdp_flattened", False) and not (known is not None and known.group is None)
    if is_dtensor(parameter) or sliced:
        raise ConflictError(
            f"{name} is sharded already (FSDP or tensor parallel), and its optimizer state with it: "
            "ShardedStateOptimizer would cut it a second time. Use Lamb itself."
        )
