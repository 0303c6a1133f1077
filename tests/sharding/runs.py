"""What happens on the ranks: one training per case in a layout, fed with prescribed gradients or with its own."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from reference import ReferenceLamb, ReferenceLars
from sharding.collectives import CountCollectives
from sharding.layouts import LAYOUTS, Laid, Layout
from sharding.networks import GLOBAL_BATCH, STEPS, batches, drifts, learning_rate, loss_of, new_net
from tolerances import relative_error
from torch import Tensor

from lightning_lamb import Lamb, Lars


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        layout: name of the layout.
        ranks: of the layout.
        source: "prescribed": gradients drawn beforehand, some absent; "backward": those of the run itself.
        alike: whether 1-D layers are adapted too.
        clip: bound of the gradient norm, or None.
        mixed: forward and backward under bf16 autocast.
        lars: Lars instead of Lamb.
        options: more options of the optimizer, as (name, value).
        blind: break the package: every rank takes its pieces for whole layers.
        shuffled: every rank has the parameters in another order, and in other groups.
    """

    layout: str
    ranks: int
    source: str = "prescribed"
    alike: bool = False
    clip: float | None = None
    mixed: bool = False
    lars: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    blind: bool = False
    shuffled: bool = False

    def __str__(self) -> str:
        words = [self.layout, f"{self.ranks} ranks", self.source, "all layers" if self.alike else "adapted only"]
        words += ["clipped" if self.clip else "unclipped", "bf16-mixed" if self.mixed else "fp32"]
        words += ["Lars"] * self.lars + [f"{name}={value}" for name, value in self.options] + ["blind"] * self.blind
        words += ["another order on every rank"] * self.shuffled
        return ", ".join(words)

    def optimizer_options(self) -> dict[str, Any]:
        return {"weight_decay": 0.1, "exempt_1d": not self.alike, "max_grad_norm": self.clip} | dict(self.options)

    def reference_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.optimizer_options().items() if name != "foreach"}


@dataclass
class Outcome:
    """What one rank saw.

    Attributes:
        error: largest relative error of a layer against the NumPy reference fed with the same gradients.
        ratio_error: likewise of the last trust ratios.
        norm_error: relative error of the last gradient norm, where it was clipped.
        drift: (backward only) `drifts` from the training in float64 on one process.
        collectives: of every step: name of the operator to number.
        names: layers whose ratio this rank reports.
        failure: the exception, as text.
    """

    error: float = float("nan")
    ratio_error: float = float("nan")
    norm_error: float = 0.0
    drift: dict[str, float] = field(default_factory=dict)
    collectives: list[dict[str, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    failure: str = ""


def layout_of(case: Case) -> Layout:
    return next(layout for layout in LAYOUTS if (layout.name, layout.ranks) == (case.layout, case.ranks))


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Worker: all cases of one number of ranks, one after the other."""
    outcomes = []
    for case in cases:
        try:
            with blindfolded() if case.blind else contextlib.nullcontext():
                outcome = run_case(case)
        except Exception as error:  # noqa: BLE001 - the test of this case reports it
            outcome = Outcome(failure=f"{type(error).__name__}: {error}")
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, outcome.failure)
        outcome.failure = next(filter(None, failures), "")
        outcomes.append(asdict(outcome))
    return outcomes


@contextlib.contextmanager
def blindfolded() -> Iterator[None]:
    """Lets every rank take its pieces for whole layers, as an optimizer does that does not know of sharding."""
    import dataclasses

    from lightning_lamb import sharding

    def ignorant(locator: Any) -> Any:
        def locate(parameter: Any, name: str) -> Any:
            pieces = locator(parameter, name)
            return pieces and [dataclasses.replace(piece, split=None) for piece in pieces]

        return locate

    before = list(sharding.LOCATORS)
    sharding.LOCATORS[:] = [ignorant(locator) for locator in before]
    try:
        yield
    finally:
        sharding.LOCATORS[:] = before


def run_case(case: Case) -> Outcome:
    laid = Laid(layout_of(case))
    optimizer = build_optimizer(case, laid)
    start = {name: weight.numpy() for name, weight in laid.weights().items()}
    reference = (ReferenceLars if case.lars else ReferenceLamb)(start, **case.reference_options())
    outcome = Outcome()
    steps = prescribed(laid) if case.source == "prescribed" else itertools.repeat(None, STEPS)
    data = batches()
    for step, gradients in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        if gradients is None:
            backward(case, laid, *next(data))
            gradients = summed_over_tensor_ranks(laid)
        else:
            laid.set_gradients(gradients)
        with CountCollectives() as counted:
            optimizer.step()
        outcome.collectives.append(dict(counted.counts))
        reference.step({k: None if g is None else g.numpy() for k, g in gradients.items()}, lr=learning_rate(step))
    inner = getattr(optimizer, "optim", optimizer)
    weights = laid.weights()  # fails where ranks disagree
    outcome.error = max(relative_error(weights[name], reference.weights[name]) for name in weights)
    reported = {name: float(value) for name, value in inner.trust_ratios.items()}
    outcome.names = sorted(reported)
    outcome.ratio_error = max(
        (abs(value / reference.trust_ratios[name] - 1) for name, value in reported.items()), default=0.0
    )
    if case.clip and layout_of(case).zero != "torch":
        outcome.norm_error = abs(float(optimizer.grad_norm) / reference.grad_norm - 1)
    if case.source == "backward":
        exact = trained_alone(case, torch.float64)
        outcome.drift = drifts(weights, exact)
    return outcome


def build_optimizer(case: Case, laid: Laid) -> Any:
    kind: Any = Lars if case.lars else Lamb
    named: Any = list(laid.parameters.items())
    if case.shuffled:
        random.Random(dist.get_rank()).shuffle(named)
        cut = 3 + dist.get_rank()
        named = [{"params": named[:cut]}, {"params": named[cut:]}]
    zero = laid.layout.zero
    if zero == "ours":
        from lightning_lamb.optimizers import ShardedStateOptimizer

        return ShardedStateOptimizer(named, kind, **case.optimizer_options())
    if zero == "torch":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        trained = [parameter for _, parameter in named if parameter.requires_grad]
        return ZeroRedundancyOptimizer(trained, kind, **case.optimizer_options())
    return kind(named, **case.optimizer_options())


def prescribed(laid: Laid, seed: int = 5) -> Iterator[dict[str, Tensor | None]]:
    """One dict per step: whole float32 gradients. Scales differ by layer and step; one layer's is sometimes absent."""
    draw = np.random.default_rng(seed)
    for step in range(STEPS):
        gradients: dict[str, Tensor | None] = {}
        for index, (name, shape) in enumerate(laid.shapes.items()):
            values = draw.standard_normal(shape) * 2.0 ** (index - 6) * (1 + step % 5)
            gradients[name] = torch.as_tensor(values, dtype=torch.float32)
            if not laid.parameters[name].requires_grad:
                gradients[name] = None
        if step % 4 == 1:
            gradients["wide.weight"] = gradients["narrow.bias"] = None
        if step % 5 == 2:
            gradients["first.weight"] = torch.zeros_like(gradients["first.weight"])
        yield gradients


def backward(case: Case, laid: Laid, inputs: Tensor, targets: Tensor) -> None:
    """This rank's share of the global batch."""
    size = GLOBAL_BATCH // laid.layout.data_ranks
    mine = slice(laid.data_rank() * size, (laid.data_rank() + 1) * size)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.mixed):
        loss = loss_of(laid.model, inputs[mine].float(), targets[mine].float())
    loss.backward()


def summed_over_tensor_ranks(laid: Laid) -> dict[str, Tensor | None]:
    """Whole gradients that the run produced, the partial sums of tensor parallelism added up on copies."""
    from torch.distributed.tensor import DTensor, Replicate

    kept = {name: parameter.grad for name, parameter in laid.parameters.items()}
    for parameter in laid.parameters.values():
        if isinstance(parameter.grad, DTensor) and any(p.is_partial() for p in parameter.grad.placements):
            places = [Replicate() if p.is_partial() else p for p in parameter.grad.placements]
            parameter.grad = parameter.grad.redistribute(placements=places)
    whole = laid.gradients()
    for name, parameter in laid.parameters.items():
        parameter.grad = kept[name]
    return whole


_ALONE: dict[Any, dict[str, Tensor]] = {}


def trained_alone(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same training on one process: the network's weights after it, in float64."""
    mixed = case.mixed and dtype == torch.float32
    width = layout_of(case).width
    key = (width, case.alike, case.clip, case.lars, case.options, mixed, dtype)
    if key not in _ALONE:
        net = new_net(width).to(dtype)
        kind: Any = Lars if case.lars else Lamb
        optimizer = kind(net.named_parameters(), **case.optimizer_options())
        for step, (inputs, targets) in enumerate(batches()):
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = loss_of(net, inputs.to(dtype), targets.to(dtype))
            loss.backward()
            optimizer.step()
        _ALONE[key] = {name: parameter.detach().double() for name, parameter in net.named_parameters()}
    return _ALONE[key]


def drift_alone(case: Case) -> dict[str, float]:
    """How far one process drifts from float64 in the case's precision."""
    return drifts(trained_alone(case, torch.float32), trained_alone(case, torch.float64))
