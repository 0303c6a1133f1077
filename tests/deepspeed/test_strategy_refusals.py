"""`LambDeepSpeedStrategy` refuses set-ups in which two parts would do the same thing."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from zero_setting import on_ranks
from zero_training import LR, fit, from_config, lightning_parts


def run_refusals() -> dict[str, str]:
    from lightning_lamb import LargeBatch

    pl, Model = lightning_parts()
    lamb = {"optimizer": {"type": "LightningLamb", "params": {"lr": LR}}}
    schedule = {"scheduler": {"type": "StagedWarmup", "params": {"total_steps": 5}}}
    fused = {"optimizer": {"type": "Lamb", "params": {"lr": LR}}}
    twice = {"optimizer": {"type": "LightningLamb", "params": {"max_grad_norm": 1.0}}, "gradient_clipping": 1.0}
    attempts: dict[str, Any] = {
        "two optimizers": lambda: fit(2, config=lamb),
        "two schedules": lambda: fit(2, config=schedule, model=Model(lamb_schedule={"total_steps": 9})),
        "fused": lambda: fit(2, config=fused, model=from_config(pl)),
        "clipped twice by the config": lambda: fit(2, config=twice, model=from_config(pl)),
        "clipped twice": lambda: fit(
            2, config={"gradient_clipping": 1.0}, model=Model(lamb_options={"max_grad_norm": 2.0})
        ),
        "state_dtype": lambda: fit(2, model=Model(lamb_options={"state_dtype": "bfloat16"})),
        "capturable": lambda: fit(2, model=Model(lamb_options={"capturable": True})),
        "max_grad_norm": lambda: fit(2, model=Model(lamb_options={"max_grad_norm": 2.0})),
        "state_dtype in the config": lambda: fit(
            2,
            config={"optimizer": {"type": "LightningLamb", "params": {"lr": LR, "state_dtype": "bfloat16"}}},
            model=from_config(pl),
        ),
        "two bounds": lambda: fit(2, config={"gradient_clipping": 1.0}, gradient_clip_val=0.5),
        "clipping switched off": lambda: fit(2, config={"gradient_clipping": 0.0}, gradient_clip_val=0.5),
        "other batch": lambda: fit(2, config={"train_batch_size": 4}, callbacks=[LargeBatch(global_batch_size=8)]),
        "other micro-batch": lambda: fit(
            2, config={"train_micro_batch_size_per_gpu": 4}, callbacks=[LargeBatch(global_batch_size=8)]
        ),
    }
    found = {}
    for label, attempt in attempts.items():
        try:
            attempt()
            found[label] = "no error"
        except Exception as error:  # noqa: BLE001 - its text is the result
            found[label] = f"{type(error).__name__}: {error}"
    return found


def test_contradictions_are_refused_before_training():
    (found,) = on_ranks(run_refusals, 1)
    for label, parts in {
        "two optimizers": ("ConflictError", "LightningLamb", "Remove the config's entry"),
        "two schedules": ("ConflictError", "scheduler", "Remove one"),
        "fused": ("ConflictError", "FusedLamb", "lamb_is_ours"),
        "clipped twice by the config": ("ConflictError", "clipped twice"),
        "clipped twice": ("ConflictError", "clipped twice"),
        "state_dtype": ("InvalidOptionError", "state_dtype='bfloat16' under DeepSpeed", "Leave state_dtype unset"),
        "state_dtype in the config": ("InvalidOptionError", "state_dtype='bfloat16' under DeepSpeed"),
        "capturable": ("InvalidOptionError", "capturable=True under DeepSpeed"),
        "max_grad_norm": ("ConflictError", "max_grad_norm=2.0 under DeepSpeed", "gradient_clip_val=2.0"),
        "two bounds": ("ConflictError", '"gradient_clipping": 1.0', "gradient_clip_val=0.5", "Leave one"),
        "clipping switched off": ("ConflictError", '"gradient_clipping": 0.0', "gradient_clip_val=0.5"),
        "other batch": ("BatchSizeError", "train_batch_size"),
        "other micro-batch": ("BatchSizeError", "train_micro_batch_size_per_gpu"),
    }.items():
        for part in parts:
            assert part in found[label], f"{label}: {found[label]}"
