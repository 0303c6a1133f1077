"""What a rank has to hold and to send: memory and traffic of data-parallel strategies, from a parameter count.

For planning 1024 GPUs on a laptop. Counted: weights, gradients, fp32 master weights and the two moments, and what an
optimizer step sends. Not counted: activations, buffers of the communication library, fragmentation.
"""

from __future__ import annotations

import dataclasses

from lightning_lamb.checks import one_of, whole_number

# Strategy -> name in tables. FSDP with full sharding holds and sends what ZeRO stage 3 does.
STRATEGIES: dict[str, str] = {
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3 / FSDP",
}

_NORM_BYTES_PER_LAYER = 3 * 8  # square norms of weight and update and an activity flag, float64


@dataclasses.dataclass(frozen=True)
class BytesPerParameter:
    """Bytes that one parameter costs; ``master_weights`` is the fp32 copy of half-precision weights."""

    weights: int
    gradients: int
    master_weights: int
    moments: int


# Lightning's names. The mixed precisions keep weights in fp32 and cast activations, so nothing changes here.
PRECISIONS: dict[str, BytesPerParameter] = {
    "32-true": BytesPerParameter(4, 4, 0, 8),
    "bf16-mixed": BytesPerParameter(4, 4, 0, 8),
    "16-mixed": BytesPerParameter(4, 4, 0, 8),
    "bf16-true": BytesPerParameter(2, 2, 4, 8),
    "16-true": BytesPerParameter(2, 2, 4, 8),
}


@dataclasses.dataclass(frozen=True)
class HeldBytes:
    """Bytes that one rank holds."""

    weights: int
    gradients: int
    master_weights: int
    moments: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.master_weights + self.moments


@dataclasses.dataclass(frozen=True)
class SentBytes:
    """Bytes that one rank sends for one optimizer step: for gradients, for weights, and for LAMB's norms."""

    gradients: int
    weights: int
    norms: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.weights + self.norms


def held_bytes(parameters: int, data_parallel_size: int, precision: str = "32-true") -> dict[str, HeldBytes]:
    """Return the bytes one rank holds under each strategy.

    ZeRO-1 divides the optimizer's state over the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too.

    Args:
        parameters: Parameters of the model.
        data_parallel_size: Ranks that share the state.
        precision: One of Lightning's: 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true.

    Raises:
        InvalidOptionError: A value is out of range, or the precision is unknown.

    Example:
        >>> [held.total for held in held_bytes(1_000_000, data_parallel_size=8).values()]
        [16000000, 9000000, 5500000, 2000000]
    """
    whole = whole_number("parameters", parameters)
    share = -(-whole // whole_number("data_parallel_size", data_parallel_size))
    one = PRECISIONS[one_of("precision", precision, PRECISIONS)]
    held = {}
    for stage, strategy in enumerate(STRATEGIES):
        state, gradients, weights = (share if stage >= divided_from else whole for divided_from in (1, 2, 3))
        held[strategy] = HeldBytes(
            weights=one.weights * weights,
            gradients=one.gradients * gradients,
            master_weights=one.master_weights * state,
            moments=one.moments * state,
        )
    return held


def sent_bytes(
    parameters: int,
    layers: int,
    data_parallel_size: int,
    accumulate_grad_batches: int = 1,
    precision: str = "32-true",
) -> dict[str, SentBytes]:
    """Return the bytes one rank sends for one optimizer step under each strategy, with ring collectives.

    A ring reduce-scatter or all-gather of ``n`` bytes over ``N`` ranks sends ``n (N-1)/N`` per rank, an all-reduce
    twice that. DDP all-reduces the gradients once per optimizer step. ZeRO-1 reduce-scatters them once and all-gathers
    the new weights. ZeRO-2 reduce-scatters after every micro-batch. ZeRO-3 also all-gathers the weights twice per
    micro-batch, for forward and backward. Where layers are divided, LAMB adds one all-reduce of three float64 per
    layer. Everything is counted in the type it is stored in: casting for communication sends less.

    Args:
        parameters: Parameters of the model.
        layers: Tensors that get a trust ratio.
        data_parallel_size: Ranks.
        accumulate_grad_batches: Micro-batches per optimizer step.
        precision: One of Lightning's: 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true.

    Raises:
        InvalidOptionError: A value is out of range, or the precision is unknown.

    Example:
        >>> sent_bytes(1_000_000, layers=50, data_parallel_size=2)["ddp"]
        SentBytes(gradients=4000000, weights=0, norms=0)
        >>> sent_bytes(1_000_000, layers=50, data_parallel_size=2, accumulate_grad_batches=4)["zero3"].norms
        1200
    """
    ranks = whole_number("data_parallel_size", data_parallel_size)
    micro_batches = whole_number("accumulate_grad_batches", accumulate_grad_batches)
    one = PRECISIONS[one_of("precision", precision, PRECISIONS)]
    count = whole_number("parameters", parameters)

    def ring(payload_bytes: int) -> int:
        return -(-payload_bytes * (ranks - 1) // ranks)

    gradients, weights = ring(one.gradients * count), ring(one.weights * count)
    norms = 2 * ring(_NORM_BYTES_PER_LAYER * whole_number("layers", layers))
    return {
        "ddp": SentBytes(2 * gradients, 0, 0),
        "zero1": SentBytes(gradients, weights, norms),
        "zero2": SentBytes(micro_batches * gradients, weights, norms),
        "zero3": SentBytes(micro_batches * gradients, 2 * micro_batches * weights, norms),
    }
