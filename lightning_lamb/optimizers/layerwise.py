"""The paper's general strategy (section 3): any base direction, normalised layer by layer, on any sharding.

A step is a local pass (moments, directions, partial norms), one all-reduce per process group that holds pieces of
layers, and a second local pass (apply). Layers that are whole on this rank go through both passes at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_lamb import equations
from lightning_lamb.equations import Coefficients, Scalar, statistic_dtype
from lightning_lamb.errors import InvalidOptionError, LightningLambError, UnknownShardError
from lightning_lamb.kernels import StepSizes, trust_ratios
from lightning_lamb.optimizers import choice, gradients, loss_scaling, state
from lightning_lamb.optimizers.agreement import Agreement
from lightning_lamb.optimizers.batches import options_of, scales_of
from lightning_lamb.optimizers.group_options import parts_of
from lightning_lamb.optimizers.hosted import Host
from lightning_lamb.optimizers.options import checked, one_limit
from lightning_lamb.optimizers.plan import LayerPlan, Slot, fingerprint, parameter_name
from lightning_lamb.optimizers.report import LayerReport
from lightning_lamb.optimizers.roster import Roster, roster_of
from lightning_lamb.optimizers.split_step import Elsewhere, Pending, split_step
from lightning_lamb.param_groups import Exemptions
from lightning_lamb.sharding import replacing_module
from lightning_lamb.uncompiled import uncompiled

KEPT_PLANS = 4
"""Options that change the plan (``adapt``, ``norm``) may alternate between a few values."""

IDLE_STEPS_ASKED = 2
"""How often an optimizer without any gradient asks whether its parameters were replaced."""


class LayerwiseOptimizer(Optimizer):
    """Base of `Lamb` and `Lars`; a subclass names the base direction and its coefficients."""

    base: str
    signature: frozenset[str]
    exemptions: Exemptions | None = None
    """The rules behind its parameter groups, if `lamb_param_groups` made them: later groups are treated alike."""
    step_was_skipped = False
    """Whether the last `step` changed nothing: a `torch.amp.GradScaler` found an overflow, with ``fused=True``, or
    DeepSpeed allocated state by a step with zero gradients. It is not counted, and no schedule should count it."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if isinstance(params, Module):
            raise InvalidOptionError(f"params is a module ({type(params).__name__}): pass its named_parameters().")
        self._reset()
        self.agreement = Agreement()
        self._host = Host()
        super().__init__(params, checked(defaults))
        gradients.refuse_part_of_gradient_norm(one_limit(self.param_groups))

    def _reset(self) -> None:
        self._plans: dict[Any, LayerPlan] = {}
        self._report = LayerReport()
        self._idle_steps = 0
        self._grad_norm: Tensor | None = None

    # -------------------------------------------------------------------------------- what a subclass says about itself

    def coefficients(self, step: Scalar, group: dict[str, Any]) -> Coefficients:  # noqa: ARG002
        """The numbers that combine moments and gradient at step ``step``."""
        raise AssertionError("a subclass says it")

    def moment_decays(self, group: dict[str, Any]) -> tuple[float, float]:  # noqa: ARG002
        """(beta1, beta2) of the group; beta2 means nothing without a second moment."""
        raise AssertionError("a subclass says it")

    def moment_keys(self) -> tuple[str, ...]:
        """The names of the moments in the state."""
        return ("exp_avg", "exp_avg_sq") if self.base == "adam" else ("exp_avg",)

    # --------------------------------------------------------------------------------------------------------- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Makes one update of every parameter that has a gradient.

        Communication: none for whole layers; one all-reduce per process group that holds pieces of layers, and with
        ``max_grad_norm`` one more, of a single number. No host sync; ``p.grad`` is not modified.

        Args:
            closure: reevaluates the model and returns the loss; called once, before anything else.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            UnknownShardError: a layout over which the norms cannot be completed; before the first update.
            UnsupportedGradientError: a sparse or complex gradient; before the update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            self._update()
        return loss

    @functools.partial(uncompiled, recursive=False)
    def _update(self) -> None:
        self.step_was_skipped = self._host.before_step(self)
        if self.step_was_skipped:
            return
        plan = self.plan()
        self._refuse_replaced(plan)
        # Looked up once: a thousand look-ups take as long as a small layer's step.
        grads = [slot.parameter.grad for slot in plan.slots]
        gradients.check(plan, grads)
        self.agreement.ensure(self, plan, getattr(self, "found_inf", None) is not None, self._host.active)
        with gradients.completed(plan):
            self.step_was_skipped = self._overflowed(plan)
            if not self.step_was_skipped:
                self._update_layers(plan, grads)

    @functools.partial(uncompiled, recursive=False)
    def _update_layers(self, plan: LayerPlan, grads: list[Tensor | None]) -> None:
        grad_scale = self._clip_scale()
        roster = roster_of(self, plan, grads)
        report = LayerReport()
        for crew in roster.whole:
            group = self.param_groups[crew.slots[0].group]
            coefficients = roster.coefficients(crew)
            batch = crew.batch(self, coefficients, grad_scale, grads)
            bounds = group["weight_norm_bounds"], group["trust_ratio_bounds"]
            report.add(crew.names, crew.kernel.step(batch, scales_of(group, coefficients), *bounds))
        if plan.split:
            self._update_split(plan, roster, grad_scale, report)
        self._report = self._host.after_step(self.param_groups, report)

    def _update_split(self, plan: LayerPlan, roster: Roster, grad_scale: Tensor | None, report: LayerReport) -> None:
        """Steps the layers that are cut over ranks: first passes, all-reduce, second passes."""
        split = split_step(self, plan, roster, grad_scale)
        for item in split.moving:
            scales = scales_of(self.param_groups[item.slots[0].group], item.batch.coefficients)
            item.kernel.apply(item.batch, self._completed(item, scales, report))
        for layers in split.elsewhere:
            self._completed(layers, [1.0] * len(layers.slots), report)

    def _completed(self, item: Pending | Elsewhere, scales: Sequence[Scalar], report: LayerReport) -> StepSizes:
        """Step sizes from completed statistics; norms and ratios go to the report."""
        group, options = self.param_groups[item.slots[0].group], options_of(item.slots[0], self)
        bounds = group["weight_norm_bounds"], group["trust_ratio_bounds"]
        sizes, norms = trust_ratios.step_sizes(options, item.weights, item.updates, scales, *bounds)
        report.add([slot.piece.layer.name for slot in item.slots], norms)
        return sizes

    # ------------------------------------------------------------------------------------------- the parts of a step

    def plan(self) -> LayerPlan:
        """The layers behind the present parameter groups; worked out again when parameters or exemptions change."""
        key = fingerprint(self.param_groups)
        known = self._plans.get(key)
        if known is not None and known.holds():
            return known
        self._host.learn_names(self)
        self._host.adopt(self.param_groups)
        self._forget_plans()
        self._plans[key] = LayerPlan(self.param_groups)
        return self._plans[key]

    def _forget_plans(self) -> None:
        """Makes room for another plan: a plan keeps parameters and state alive."""
        if self._host.active:  # ZeRO steps part by part, each with a plan of its own
            if len(self._plans) > 64 + len(self.state):
                self._plans.clear()
            return
        present = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for key, plan in list(self._plans.items()):
            if len(self._plans) >= KEPT_PLANS or any(id(one) not in present for one in plan.parameters):
                del self._plans[key]

    def next_coefficients(self, slot: Slot) -> Coefficients:
        """The coefficients of the slot's next step, which is not counted yet."""
        group = self.param_groups[slot.group]
        step = self.state_of(slot)["step"] + 1
        return self.coefficients(step.to(statistic_dtype(step.device)) if group["capturable"] else float(step), group)

    def count_step(self, parameter: Tensor) -> None:
        """Counts one step of the parameter."""
        found = self.state[parameter]
        found["step"] = found["step"] + 1

    def state_of(self, slot: Slot) -> dict[str, Any]:
        """The state of the slot's parameter: allocated if there is none yet, cast if the parameter was."""
        found = self.state[slot.parameter]
        group = self.param_groups[slot.group]
        state.prepare(found, slot.parameter, group, self.base == "adam", slot.piece.layer.name)
        return found

    def _clip_scale(self) -> Tensor | None:
        """What every gradient is multiplied by, by ``max_grad_norm`` and against the loss scale; None for nothing."""
        limit = one_limit(self.param_groups)
        scale = loss_scaling.inverse(self)
        self._grad_norm = None
        if limit is None:
            return scale
        norm = self.global_grad_norm()
        self._grad_norm = norm if scale is None else norm * scale.to(norm.device)
        coefficient = equations.clip_coefficient(self._grad_norm, limit)
        return coefficient if scale is None else coefficient * scale.to(coefficient.device)

    def _overflowed(self, plan: LayerPlan) -> bool:
        """Whether this step is none, because a `torch.amp.GradScaler` found an infinite gradient, here or elsewhere."""
        found = loss_scaling.found_overflow(self)
        if found is None:
            return False
        if plan.split:  # the scaler has looked at this rank only; the norm of what it saw is the same on all
            square = gradients.square_norm(plan, [None] * len(self.param_groups))
            return square is not None and not bool(square.isfinite())
        return found

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells `torch.amp.GradScaler` not to rewrite gradients: see `loss_scaling`."""
        return bool(self.defaults.get("fused"))

    def _refuse_replaced(self, plan: LayerPlan) -> None:
        """Raises where a module has other tensors in the place of all of these, which so can never have a gradient.

        Asked in the first two steps, if they find no gradient. One without is no error by itself: a closure that
        returns nothing, layers that are not used yet.
        """
        if self.state or not plan.slots or plan.split or self._idle_steps == IDLE_STEPS_ASKED:
            return
        if any(parameter.grad is not None for parameter in plan.parameters):
            return
        self._idle_steps += 1
        has_names = all("param_names" in group for group in self.param_groups)
        names = [slot.piece.layer.name for slot in plan.slots] if has_names else None
        module = replacing_module(plan.parameters, names)
        if module is not None:
            raise UnknownShardError(
                f"{type(self).__name__}.step() found no gradient on any of its {len(plan.slots)} parameters (the first "
                f"is {plan.slots[0].piece.layer.name}): {type(module).__name__} has sharded parameters (DTensors) in "
                "their place, because it was sharded after the optimizer was built, and trains those. With the stock "
                "LightningCLI add `--trainer.callbacks+=lightning_lamb.LargeBatch`, or use LambCLI or LambMixin; in "
                "your own loop build the optimizer after fully_shard() or parallelize_module()."
            )

    # ------------------------------------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, at any time; their step count starts at zero.

        Without names they get those of the annotated module, where the other groups have names. Where
        `lamb_param_groups` made the other groups, its rules hold for these too, which can make several groups of one.

        Args:
            param_group: ``params`` (tensors or (name, tensor) pairs) and any option of the optimizer.

        Raises:
            InvalidOptionError: an option that cannot be meant.
            UnsupportedGradientError: a complex parameter.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        for part in parts_of(self, param_group):
            self._add_param_group(part)

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {name: param_group.get(name, default) for name, default in self.defaults.items()}
        one_limit([*self.param_groups, options])
        super().add_param_group({**param_group, **checked(options)})
        group = self.param_groups[-1]
        for position, parameter in enumerate(group["params"]):
            name = parameter_name(group, len(self.param_groups) - 1, position)
            try:
                if parameter.is_complex():
                    gradients.refuse_complex(name)
                choice.refuse_impossible(group, parameter, name)
            except LightningLambError:
                self.param_groups.pop()
                raise
        self._host.remember(group)

    def state_dict(self) -> dict[str, Any]:
        """As in every torch optimizer; under DeepSpeed with what its universal checkpoints would lose."""
        self._host.heal(self.param_groups)
        return self._host.marked(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; float32 masters and moments of half-precision parameters are not rounded.

        Where both sides know the names of parameters, state goes by name, else by position; ``param_names`` stay.

        Args:
            state_dict: of the same class, with the same groups and shapes.

        Raises:
            StateDictError: another class, other groups, names or shapes; nothing is changed then.
        """
        received: list[dict[str, Any]] = []

        def check(_: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            required, owner = ("step", *self.moment_keys()), type(self).__name__
            received.append(state.check_state_dict(found, self.param_groups, self.signature, required, owner))
            return received[0]

        def restore(_: Optimizer) -> None:
            state.restore_full_precision(self.state, self.param_groups, received[0])
            state.restore_steps(self.state)
            self._reset()

        # The user's own hooks have their say before the check, and after the restoration.
        check_hook = self.register_load_state_dict_pre_hook(check)
        restore_hook = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            with self._host.explaining(self.param_groups):
                super().load_state_dict(state_dict)
        finally:
            check_hook.remove()
            restore_hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "exemptions": self.exemptions}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        super().__setstate__(pickled)
        self._reset()
        known = self.__dict__.get("_host")
        self._host = Host() if known is None else known
        if "agreement" not in self.__dict__:
            self.agreement = Agreement()
        self._host.regroup(self.param_groups)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    # -------------------------------------------------------------------------------------------------- what it reports

    def global_grad_norm(self) -> Tensor:
        """The L2 norm of all gradients over all layers and ranks, as it is now; after ``max_grad_value``.

        Communication: one all-reduce of one number per process group that holds pieces of layers.

        Returns:
            0-dim tensor, the same on every rank.
        """
        plan = self.plan()
        self.agreement.ensure(self, plan, norm_first=True, in_parts=self._host.active)
        with gradients.completed(plan):
            square = gradients.square_norm(plan, [loss_scaling.bound(self, group) for group in self.param_groups])
        return torch.zeros((), device="cpu") if square is None else square.sqrt()

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradient norm that the last step clipped by, before clipping; None without ``max_grad_norm``."""
        return self._grad_norm

    @property
    def trust_ratios(self) -> dict[str, Tensor]:
        """``phi(||w||)/||u||`` of the last step by layer name, 0-dim tensors on the device; adapted layers only."""
        return self._report.trust_ratios

    @property
    def weight_norms(self) -> dict[str, Tensor]:
        """``||w||`` before the last step by layer name; over all ranks' pieces."""
        return self._report.weight_norms

    @property
    def update_norms(self) -> dict[str, Tensor]:
        """``||u||`` of the last step by layer name; over all ranks' pieces."""
        return self._report.update_norms
