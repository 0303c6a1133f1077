"""Before an optimizer adds up norms, all ranks compare the layers that they mean; again when those have changed.

A rank whose layers change alone must not wait for a comparison that the others do not join. So it first tells them, in
place of the numbers that they expect from it in this step; a rank without a change sees that in its own all-reduce,
which carries two more numbers for it (see `sharding.norms.Reduction`). A step without changes costs no collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_lamb.errors import RankDisagreementError
from lightning_lamb.optimizers import gradients
from lightning_lamb.optimizers.options import one_limit
from lightning_lamb.optimizers.plan import LayerPlan, Slot
from lightning_lamb.sharding import agreement

if TYPE_CHECKING:
    from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer

HOW_NOT_WHAT = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options that choose an implementation of the same step."""


class Agreement:
    """Which layers the ranks have agreed upon.

    Attributes:
        more: what else the ranks must say alike of a layer, by its name; asked at every comparison.
    """

    def __init__(self) -> None:
        self.more: Callable[[], Mapping[str, Sequence[tuple[str, str]]]] = dict
        self._plan: LayerPlan | None = None
        self._moving: list[bool] = []
        self._limited = False
        self._entries: list[agreement.Entry] = []
        self._known: set[Any] = set()

    def ensure(self, optimizer: LayerwiseOptimizer, plan: LayerPlan, norm_first: bool, in_parts: bool) -> None:
        """Compares the layers of ``plan`` over the ranks that share them, if they are new or have changed.

        Communication: none for layers that have been agreed upon; else one all-reduce of two numbers per process group,
        and on a change as many as a step makes before that. The host reads them.

        Args:
            optimizer: whose step or norm is to be computed.
            plan: of the optimizer.
            norm_first: whether the gradient's norm is what is added up first, even without ``max_grad_norm``.
            in_parts: whether the optimizer is stepped part by part (DeepSpeed), each with a plan of its own.

        Raises:
            RankDisagreementError: ranks differ, or only some have changed; before anything is updated.
        """
        if not plan.shared:
            return
        moving = [moves(slot.parameter) for slot in plan.shared]
        limited = one_limit(optimizer.param_groups) is not None
        if plan is self._plan and moving == self._moving and limited == self._limited:
            return
        key = tuple((*_structure(slot), moves) for slot, moves in zip(plan.shared, moving)), limited
        if key not in self._known:
            entries = self._described(optimizer, plan, moving)
            changed = self._plan is not None and not in_parts
            if changed:
                self._announce(norm_first or self._limited, entries)
            self._compare(plan, entries, cut_only=changed)
            self._known = {*self._known, key} if in_parts else {key}
            self._entries = entries
        self._plan, self._moving, self._limited = plan, moving, limited

    def _described(
        self, optimizer: LayerwiseOptimizer, plan: LayerPlan, moving: Sequence[bool]
    ) -> list[agreement.Entry]:
        more = self.more()
        found = []
        for slot, moves_here in zip(plan.shared, moving):
            group = optimizer.param_groups[slot.group]
            name, shape, dtype, cut, adapt, _ = _structure(slot)
            facts = [("shape", shape), ("dtype", dtype), ("cut", cut), ("trained", moves_here), ("trust ratio", adapt)]
            facts += [(option, _plain(group[option])) for option in optimizer.defaults if option not in HOW_NOT_WHAT]
            told = [(what, str(value)) for what, value in facts]
            found.append(agreement.Entry(str(name), (*told, *more.get(slot.piece.layer.name, ()))))
        return found

    def _announce(self, norm_first: bool, entries: Sequence[agreement.Entry]) -> None:
        """Joins what ranks without a change now add up, and raises if there are any."""
        before = self._plan
        assert before is not None
        with gradients.completed(before):
            if norm_first:
                together = all(norm.announce() for slots, norm in before.global_norms().values() if slots)
            else:
                together = all(table.announce() for slots, table in before.tables.values() if slots)
        if together:
            return
        name, was, now = agreement.first_difference(self._entries, entries)
        raise RankDisagreementError(
            f"{name}: since the last step this layer has changed on this rank and not on all that share it. It was: "
            f"{was}; it is: {now}. {agreement.REMEDY}"
        )

    def _compare(self, plan: LayerPlan, entries: Sequence[agreement.Entry], cut_only: bool) -> None:
        by_ranks: dict[Any, tuple[list[Any], list[int]]] = {}
        for index, slot in enumerate(plan.shared):
            for group in agreement.process_groups(slot.parameter, slot.piece, cut_only):
                groups, indices = by_ranks.setdefault(agreement.ranks_of(group), ([], []))
                groups.append(group)
                indices.append(index)
        for ranks in sorted(by_ranks):  # no rank can wait for another in a circle
            groups, indices = by_ranks[ranks]
            entries_here = [entries[index] for index in dict.fromkeys(indices)]
            agreement.compare(entries_here, agreement.in_one_order(groups)[0], plan.shared[indices[0]].device)


def moves(parameter: Tensor) -> bool:
    """Whether a step may move the parameter: it is not frozen, or was frozen after its gradient was there."""
    return parameter.requires_grad or parameter.grad is not None


def _structure(slot: Slot) -> tuple[Any, ...]:
    split = slot.piece.split
    cut = "over the ranks"
    if split is None or split.mesh is not None:
        parameter: Any = slot.parameter
        cut = f"{parameter.placements} on {tuple(parameter.device_mesh.shape)}"
    return slot.piece.layer.name, slot.piece.layer.shape, slot.parameter.dtype, cut, slot.adapt, slot.norm


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
