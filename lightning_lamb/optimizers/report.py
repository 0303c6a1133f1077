"""The last step's norms and trust ratios by layer name, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_lamb.kernels import Norms


class LayerReport:
    """Collects what a step computed anyway; nothing is copied or synchronised until a property is read."""

    def __init__(self) -> None:
        self._parts: list[tuple[list[str], Tensor, Tensor, Tensor]] = []

    @classmethod
    def joined(cls, reports: Sequence[LayerReport]) -> LayerReport:
        """One report on everything that ``reports`` are about."""
        whole = cls()
        for report in reports:
            whole._parts += report._parts  # noqa: SLF001 - of the same class
        return whole

    def add(self, names: Sequence[str], norms: Norms | None) -> None:
        """Adds (n,) values of ``n`` layers; None for layers that are not adapted."""
        if norms is not None:
            self._parts.append((list(names), *norms))

    @property
    def weight_norms(self) -> dict[str, Tensor]:
        """``||w||`` before the step, by layer name; 0-dim tensors."""
        return self._by_name(1)

    @property
    def update_norms(self) -> dict[str, Tensor]:
        """``||u||`` by layer name; 0-dim tensors."""
        return self._by_name(2)

    @property
    def trust_ratios(self) -> dict[str, Tensor]:
        """The ratios that were applied, by layer name; 0-dim tensors."""
        return self._by_name(3)

    def _by_name(self, column: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self._parts:
            values = part[column]
            assert isinstance(values, Tensor)
            found.update(zip(part[0], values.detach().unbind()))
        return found
