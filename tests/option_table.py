"""Every option of Lamb and Lars, alone and in the combinations where two of them meet in one formula.

In the style of torch.testing._internal.common_optimizers: one table, many generic tests over it.
"""

from __future__ import annotations

from typing import Any

Options = dict[str, Any]

LAYERWISE: dict[str, Options] = {
    "defaults": {},
    "no decay": {"weight_decay": 0.0},
    "strong decay": {"weight_decay": 0.5},
    "l1 norm": {"norm": "l1"},
    "linf norm": {"norm": "linf"},
    "phi bounded": {"weight_norm_bounds": (0.5, 3.0)},
    "ratio bounded": {"trust_ratio_bounds": (0.5, 2.0)},
    "ratio at most one (LAMBC)": {"trust_ratio_bounds": (0.0, 1.0)},
    "phi and ratio bounded, l1": {"weight_norm_bounds": (1.0, 2.0), "trust_ratio_bounds": (0.1, 0.4), "norm": "l1"},
    "never adapted": {"adapt": False},
    "adapted where decayed": {"adapt": "decayed"},
    "adapted where decayed, no decay": {"adapt": "decayed", "weight_decay": 0.0},
    "all layers treated alike": {"exempt_1d": False},
    "all alike, adapted where decayed": {"exempt_1d": False, "adapt": "decayed"},
    "clipped by norm": {"max_grad_norm": 0.5},
    "norm limit never reached": {"max_grad_norm": 1e6},
    "clipped by value": {"max_grad_value": 0.05},
    "clipped by value, then norm": {"max_grad_value": 0.05, "max_grad_norm": 0.3},
    "maximize": {"maximize": True},
    "maximize, clipped": {"maximize": True, "max_grad_norm": 0.5, "max_grad_value": 0.1},
}
LAMB: dict[str, Options] = LAYERWISE | {
    "other betas": {"betas": (0.5, 0.9)},
    "no memory": {"betas": (0.0, 0.0)},
    "large eps": {"eps": 0.1},
    "no eps": {"eps": 1e-30},
    "no correction": {"bias_correction": False},
    "correction on the learning rate": {"bias_correction": "lr"},
    "correction on the learning rate, bounded, alike": {
        "bias_correction": "lr", "trust_ratio_bounds": (0.01, 10.0), "exempt_1d": False,
    },
    "N-LAMB": {"nesterov": "first"},
    "NN-LAMB": {"nesterov": "both"},
    "N-LAMB without correction": {"nesterov": "first", "bias_correction": False},
    "NN-LAMB without correction": {"nesterov": "both", "bias_correction": False},
    # Not linf: with a constant phi its largest element takes equal steps, which float32 rounds the same way each time.
    "NN-LAMB, l1, bounded, clipped, maximize": {
        "nesterov": "both", "norm": "l1", "weight_norm_bounds": (0.1, 500.0), "max_grad_norm": 1.0, "maximize": True,
    },
    "N-LAMB, linf": {"nesterov": "first", "norm": "linf"},
}  # fmt: skip
LARS: dict[str, Options] = LAYERWISE | {"no momentum": {"momentum": 0.0}, "heavy momentum": {"momentum": 0.99}}

GROUP_OVERRIDES: dict[str, Options] = {
    "decay": {"weight_decay": 0.0},
    "adaptation": {"adapt": False},
    "1-D rule": {"exempt_1d": False},
    "learning rate": {"lr": 0.5},
    "norm": {"norm": "l1"},
    "bounds": {"weight_norm_bounds": (0.5, 1.0), "trust_ratio_bounds": (0.9, 1.1)},
    "value clip": {"max_grad_value": 0.01},
    "direction": {"maximize": True},
    "several at once": {"weight_decay": 0.2, "norm": "linf", "trust_ratio_bounds": (0.0, 1.0), "exempt_1d": False},
}
LAMB_GROUP_OVERRIDES: dict[str, Options] = GROUP_OVERRIDES | {
    "betas": {"betas": (0.8, 0.95), "eps": 1e-3},
    "correction": {"bias_correction": False},
    "correction on the learning rate": {"bias_correction": "lr"},
    "nesterov": {"nesterov": "both"},
}
