"""ZeRO stage 1: whole weights and gradients on every rank, optimizer state cut evenly over the ranks.

Every rank steps its slice of every layer, the norms are completed as for any other sharding, and the new weights are
gathered. Torch's ``ZeroRedundancyOptimizer`` gives whole layers to ranks instead: as uneven as the layers are, and its
ranks know neither names nor the gradient norm of the layers that they do not hold.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_lamb.errors import ConflictError, InvalidOptionError, StateDictError
from lightning_lamb.optimizers import gradients, state
from lightning_lamb.optimizers.agreement import moves
from lightning_lamb.optimizers.group_options import parts_of
from lightning_lamb.optimizers.lamb import Lamb
from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer
from lightning_lamb.optimizers.options import one_limit
from lightning_lamb.optimizers.plan import parameter_name
from lightning_lamb.optimizers.slices import Slice, gather_slices, gather_state, in_buckets, in_one_order
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
    """As in `LayerwiseOptimizer`; `step_was_skipped` too."""
    step_was_skipped = False

    def __init__(
        self,
        params: Any,
        optimizer_class: Callable[..., LayerwiseOptimizer] = Lamb,
        *,
        process_group: Any | None = None,
        bucket_bytes: int = 1 << 26,
        **options: Any,
    ) -> None:
        self._begin(optimizer_class, process_group, bucket_bytes, options)
        super().__init__(params, dict(self._template.defaults))

    def _begin(
        self,
        optimizer_class: Callable[..., LayerwiseOptimizer],
        process_group: Any | None,
        bucket_bytes: int,
        options: dict[str, Any],
    ) -> None:
        self.optimizer_class = optimizer_class
        self.bucket_bytes = bucket_bytes
        self._group = process_group
        self._options = options
        self._inner: LayerwiseOptimizer | None = None
        self._slices: list[Slice] = []
        self._consolidated: dict[int, dict[str, Any]] | None = None  # by the id of the slice
        # Checks the options now, and knows their defaults.
        self._template = optimizer_class([torch.nn.Parameter(torch.empty(0))], **options)

    # --------------------------------------------------------------------------------------------------------- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Makes one update of every parameter that has a gradient; all ranks hold the same weights afterwards.

        Args:
            closure: reevaluates the model and returns the loss; called once, before anything else.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RankDisagreementError: ranks were given different layers or options; before the first update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._consolidated = None
        with torch.no_grad(), self._prepared() as inner:
            inner._update()  # noqa: SLF001 - its step() would tell torch's global hooks of a second step
            self.step_was_skipped = inner.step_was_skipped
            if self._ranks() > 1 and not self.step_was_skipped:
                moved = [own for own in in_one_order(self._slices) if moves(own.parameter)]
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
        """The optimizer of this rank's slices, of the parameters that are in the groups now."""
        place = self._rank(), self._ranks()
        present = [parameter for group in self.param_groups for parameter in group["params"]]
        fits = len(present) == len(self._slices) and all(
            own.fits(parameter, place) for own, parameter in zip(self._slices, present)
        )
        if self._inner is None or not fits or len(self._inner.param_groups) != len(self.param_groups):
            self._build(place)
        assert self._inner is not None
        return self._inner

    def _build(self, place: tuple[int, int]) -> None:
        """Cuts what is new, and drops what is gone; the rest keeps its state."""
        known = {id(own.parameter): own for own in self._slices}
        groups, slices, recut = [], [], []
        for index, group in enumerate(self.param_groups):
            pieces = []
            for position, parameter in enumerate(group["params"]):
                old = known.get(id(parameter))
                fits = old is not None and old.fits(parameter, place)
                own = old if old is not None and fits else self._cut(group, index, position, place)
                if old is not None and not fits and self.state.get(old.piece):
                    recut.append((own.piece, own.recut(old, self.state[old.piece])))
                slices.append(own)
                pieces.append(own.piece)
            groups.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": pieces})
        if self._inner is None:
            self._inner = self.optimizer_class(groups, **self._options)
            self._inner.agreement.more = self._shared_facts
            self.state = self._inner.state
        self._inner.param_groups = groups
        for gone in set(known.values()) - set(slices):
            self.state.pop(gone.piece, None)
        self.state.update(recut)
        self._slices = slices

    def _cut(self, group: dict[str, Any], index: int, position: int, place: tuple[int, int]) -> Slice:
        parameter = group["params"][position]
        name = parameter_name(group, index, position)
        _refuse_sharded(parameter, name)
        is_named = len(group.get("param_names") or ()) == len(group["params"]) or annotation(parameter) is not None
        return Slice(parameter, name, *place, self._group, is_named)

    def _shared_facts(self) -> dict[str, list[tuple[str, str]]]:
        """What all ranks must say alike of a layer, besides its shape and options."""
        facts = {}
        for own in self._slices:
            facts[own.name] = [("bucket_bytes", str(self.bucket_bytes))]
            if not own.is_named and own.ranks > 1:  # in whatever order: layers are told apart by what is in them
                facts[own.name].append(("weights with checksum", str(own.checksum())))
        return facts

    def _ranks(self) -> int:
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    def _rank(self) -> int:
        return dist.get_rank(self._group) if dist.is_available() and dist.is_initialized() else 0

    # ------------------------------------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, at any time; their step count starts at zero.

        Args:
            param_group: ``params`` (tensors or (name, tensor) pairs) and any option of the optimizer.

        Raises:
            InvalidOptionError: an option that cannot be meant, or ``differentiable``.
            UnsupportedGradientError: a complex parameter.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        for part in parts_of(self, param_group):
            self._add_param_group(part)

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        whole = params if isinstance(params, (Tensor, set)) else list(params)  # an iterator can be read once
        alone = self.optimizer_class([{**param_group, "params": whole}], **self._options).param_groups[0]
        options = {name: alone[name] for name in self._template.defaults}
        if options["differentiable"]:
            raise InvalidOptionError(
                "differentiable=True in ShardedStateOptimizer: gradients do not flow through the all-gather of the "
                "new weights. Use Lamb itself."
            )
        one_limit([*self.param_groups, options])
        super().add_param_group({**param_group, **options, "params": whole})

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collects the state of all ranks on one, for `state_dict` there; call it on all ranks. Lightning does.

        Communication: one gather of objects, then one gather per kind of state and `bucket_bytes`.

        Args:
            to: rank in the process group that gets the state, in host memory.
        """
        self._built()
        ordered = in_one_order(self._slices)
        found = gather_state(ordered, self.state, self.bucket_bytes, to, self._group, self._ranks())
        self._consolidated = None if found is None else {id(ordered[index]): found[index] for index in found}

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the unsharded optimizer, on the rank that `consolidate_state_dict` named.

        Options and groups are those of this moment. The dict is the caller's.

        Raises:
            StateDictError: it was not called on all ranks since the last step, or named another rank.
        """
        for hook in list(self._optimizer_state_dict_pre_hooks.values()):
            hook(self)
        self._built()
        if self._ranks() == 1:
            self.consolidate_state_dict()
        if self._consolidated is None:
            raise StateDictError(
                f"rank {self._rank()} of {self._ranks()} holds a part of the optimizer state only. Call "
                "optimizer.consolidate_state_dict(to=rank) on all ranks first (Lightning and Fabric do), and "
                "optimizer.state_dict() on that rank."
            )
        found = self._consolidated
        saved = {index: copy.copy(found[id(own)]) for index, own in enumerate(self._slices) if id(own) in found}
        state_dict: dict[str, Any] = {"state": saved, "param_groups": self._groups_state()}
        for post_hook in list(self._optimizer_state_dict_post_hooks.values()):
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of the unsharded optimizer or of this one; every rank keeps its slices. No communication.

        Args:
            state_dict: whole, on every rank.

        Raises:
            StateDictError: another class, other groups or other shapes; nothing is changed then.
        """
        state_dict = dict(state_dict)
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            state_dict = hook(self, state_dict) or state_dict
        kind = type(self._template)
        keys = ("step", *self._template.moment_keys())
        state_dict = state.check_state_dict(state_dict, self.param_groups, kind.signature, keys, kind.__name__)
        inner = self._built()
        saved_keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        cut = {
            key: {k: own.cut_copy(v) if k != "step" else v for k, v in found.items()}
            for key, own in zip(saved_keys, self._slices)
            if (found := state_dict["state"].get(key))
        }
        inner.load_state_dict({"state": cut, "param_groups": state_dict["param_groups"]})
        self._take_options(inner, state_dict["param_groups"])
        self.state = inner.state
        self._consolidated = None
        for post_hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            post_hook(self)

    def _take_options(self, inner: LayerwiseOptimizer, saved: Sequence[dict[str, Any]]) -> None:
        """Options as they were loaded, beside this optimizer's own parameters; names too, as torch does."""
        groups = []
        for own, theirs, source in zip(self.param_groups, inner.param_groups, saved):
            group = {name: value for name, value in theirs.items() if name not in ("params", "param_names")}
            group["params"] = own["params"]
            names = own.get("param_names", source.get("param_names"))
            groups.append(group if names is None else {**group, "param_names": list(names)})
        self.param_groups = groups

    def _groups_state(self) -> list[dict[str, Any]]:
        """``param_groups`` as in a state dict."""
        groups, count = [], 0
        for group in self.param_groups:
            packed = {name: value for name, value in group.items() if name != "params"}
            groups.append({**packed, "params": list(range(count, count + len(group["params"])))})
            count += len(group["params"])
        return groups

    # ---------------------------------------------------------------------------------------------------------- copies

    def _snapshot(self) -> dict[str, Any]:
        """Everything that a copy of this rank's optimizer needs, but the process group."""
        if self._inner is not None:
            self._built()
        state = [] if self._inner is None else [dict(self._inner.state.get(own.piece, {})) for own in self._slices]
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "begin": (self.optimizer_class, self.bucket_bytes, self._options),
            "exemptions": self.exemptions,
            "state_of_slices": state if any(state) else [],
            "place": (self._rank(), self._ranks()),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedStateOptimizer:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__({**copy.deepcopy(self._snapshot(), memo), "process_group": self._group})
        return new

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None and self._group is not dist.group.WORLD:
            raise ConflictError(
                f"ShardedStateOptimizer(process_group={self._group}) cannot be pickled: a process group means nothing "
                "outside this process. Save its state_dict() (after consolidate_state_dict() on all ranks) instead."
            )
        return self._snapshot()

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        optimizer_class, bucket_bytes, options = pickled["begin"]
        self._begin(optimizer_class, pickled.get("process_group"), bucket_bytes, options)
        self.exemptions = pickled["exemptions"]
        super().__setstate__({name: pickled[name] for name in ("defaults", "param_groups")})
        self.state = defaultdict(dict)
        place = self._rank(), self._ranks()
        if not pickled["state_of_slices"]:
            return
        if place != pickled["place"]:
            raise StateDictError(
                f"This pickled ShardedStateOptimizer holds the part of the state of rank {pickled['place'][0]} of "
                f"{pickled['place'][1]}; here is rank {place[0]} of {place[1]}. Save its state_dict() (after "
                "consolidate_state_dict() on all ranks) instead: it continues on any number of ranks."
            )
        self._build(place)
        self.state.update({own.piece: found for own, found in zip(self._slices, pickled["state_of_slices"]) if found})

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
