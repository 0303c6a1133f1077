"""What LargeBatch announced, compared with what happens: in the first window of every stage, and ever after."""

from __future__ import annotations

from typing import Any, Literal

from lightning_lamb.checks import one_of
from lightning_lamb.errors import PromiseError
from lightning_lamb.lightning_seams import rank_zero_warn

Check = Literal["error", "warn", "off"]


class Promise:
    """Compares numbers with what was announced, and tells a difference as the user wants to be told.

    The checks themselves are functions that get this object and the numbers: of learning rates and lengths in
    `lightning_lamb.callbacks.promised_rates`, of samples and accumulation in
    `lightning_lamb.callbacks.promised_samples`. None of them communicates or synchronises a device: they look at
    numbers that the host has anyway.

    Args:
        check: "error", "warn" (once per number and stage) or "off".
    """

    def __init__(self, check: Check) -> None:
        self.check = one_of("check", check, ("error", "warn", "off"))
        self.is_first_window = True
        """Whether the present window is the first of a fit, of a stage or after a checkpoint."""
        self._told: set[str] = set()

    def begin(self) -> None:
        """A fit, a stage or a resumed run begins: its first window is compared thoroughly."""
        self.is_first_window = True
        self._told = set()

    def end_window(self) -> None:
        """The optimizer's step is done."""
        self.is_first_window = False

    def compare(
        self, number: str, announced: Any, found: Any, changed_by: str, remedy: str, *, where: str = ""
    ) -> None:
        """Tells that a number is not what was announced, if it is not.

        Args:
            number: what it is, with its unit: "learning rate of group 1".
            announced: what LargeBatch said.
            found: what is.
            changed_by: who most likely changed it.
            remedy: what to do, in the imperative.
            where: added to the number in the text, but not part of what is told once: "at optimizer step 7".

        Raises:
            PromiseError: they differ, and ``check="error"``.
        """
        if self.check == "off" or announced == found:
            return
        text = (
            f"{f'{number} {where}'.strip()}: LargeBatch announced {_shown(announced)}, and it is {_shown(found)}. Most "
            f'likely changed by {changed_by}. {remedy} (LargeBatch(check="warn") or "off" trains on as it is.)'
        )
        if self.check == "error":
            raise PromiseError(text)
        if number not in self._told:
            self._told.add(number)
            rank_zero_warn(text)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
