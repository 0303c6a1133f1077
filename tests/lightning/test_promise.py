"""What LargeBatch announced is what trains, or it says so: the check itself."""

from __future__ import annotations

import warnings

import pytest

from lightning_lamb import LargeBatch
from lightning_lamb.callbacks.promise import Promise
from lightning_lamb.errors import InvalidOptionError, PromiseError

DIFFERENCE = ("learning rate of group 0", 0.25, 0.5, "a callback", "Remove it.")


def test_a_difference_names_the_number_its_cause_and_the_remedy() -> None:
    message = (
        r"learning rate of group 0: LargeBatch announced 0.25, and it is 0.5. Most likely changed by a callback. "
        r"Remove it. \(LargeBatch\(check="
    )
    with pytest.raises(PromiseError, match=message):
        Promise("error").compare(*DIFFERENCE)


def test_warn_tells_once_per_number_and_stage() -> None:
    promise = Promise("warn")
    for stage in range(2):
        with pytest.warns(UserWarning, match="learning rate of group 0"):
            promise.compare(*DIFFERENCE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            promise.compare(*DIFFERENCE)
        promise.begin()
        assert promise.is_first_window, stage


def test_off_and_equal_numbers_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Promise("off").compare(*DIFFERENCE)
        Promise("error").compare("samples", 8, 8, "nobody", "")


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="check='always' is not one of: error, warn, off"):
        LargeBatch(8, check="always")  # type: ignore[arg-type]
