"""``python -m lightning_lamb plan``: all numbers of a large-batch training, before the first GPU is rented."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning_lamb.errors import InvalidOptionError, LightningLambError
from lightning_lamb.footprint import PRECISIONS
from lightning_lamb.plan import Plan, make_plan, plan_from_recipe
from lightning_lamb.recipes import RECIPES
from lightning_lamb.scaling import LAST_WINDOWS, LR_SCALINGS

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}

_DESCRIPTION = """\
Derive accumulation, learning rate, warm-up and steps from a global batch, and estimate what each rank holds and sends.

With --recipe, the numbers of the LAMB paper (arXiv 1904.00962v5) are scaled to your batch and ranks:

"""

_EPILOG = """\
examples:
  python -m lightning_lamb plan --recipe bert-large --global_batch_size 32768 \\
      --micro_batch_size 32 --data_parallel_size 128
  python -m lightning_lamb plan --recipe bert-large-mixed --micro_batch_size 64 16 \\
      --data_parallel_size 1024 --json
  python -m lightning_lamb plan --base_lr 1e-3 --base_batch_size 256 --warmup_fraction 0.02 \\
      --dataset_size 1281167 --epochs 90 --global_batch_size 4096 --micro_batch_size 64 --data_parallel_size 8
"""


class _Parser(argparse.ArgumentParser):
    """Report a wrong command line as one message on stderr, with exit code 2 and without the usage block."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}. See {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None: those of this process.

    Returns:
        The exit code: 0, or 2 after an error (argparse exits by itself).
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        plan = _plan(options)
    except LightningLambError as error:
        print(f"python -m lightning_lamb plan: error: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(plan.to_dict(), indent=2) if options.json else plan.table(), flush=True)
    except BrokenPipeError:  # `| head` has read enough; keep the interpreter from complaining when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name in ("command", "json"):
        given.pop(name, None)
    if "recipe" in given:
        own_only = [name for name in _OWN_PLAN_ONLY if name in given]
        if own_only:
            raise InvalidOptionError(
                f"--{own_only[0]} does not go with --recipe {options.recipe}, which brings its own. Leave it out, or "
                "leave --recipe out and plan with --base_lr, --dataset_size and --epochs."
            )
        return plan_from_recipe(**given)
    needed = ("base_lr",) if "stages" in given else ("global_batch_size", "base_lr")
    missing = [name for name in needed if name not in given]
    if missing:
        raise InvalidOptionError(
            f"--{' and --'.join(missing)} missing. Without --recipe, give --global_batch_size, --base_lr, and "
            f"--dataset_size with --epochs (or --total_steps). Recipes: {', '.join(RECIPES)}."
        )
    return make_plan(**given)


# Without --recipe only: what a recipe decides by itself.
_OWN_PLAN_ONLY = (
    *("warmup_steps", "dataset_size", "epochs", "total_steps", "last_window", "stages", "doublings"),
    *("parameters", "layers"),
)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m lightning_lamb", description="Tools around the LAMB optimizer.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    recipes = "\n".join(f"  {recipe.name:<18}{recipe.title}" for recipe in RECIPES.values())
    plan = commands.add_parser(
        "plan",
        help="derive accumulation, learning rate, warm-up and steps from a global batch",
        description=_DESCRIPTION + recipes,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_batch_options(plan)
    _add_rule_options(plan)
    _add_length_options(plan)
    _add_model_options(plan)
    return parser


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("batch and ranks").add_argument
    add("--recipe", metavar="NAME", help="one of the recipes above; leave out to plan your own training")
    add(
        "--global_batch_size",
        type=int,
        metavar="B",
        help="samples per optimizer step over all ranks; a recipe's stages keep their ratio (default: the paper's)",
    )
    add(
        "--micro_batch_size",
        type=int,
        nargs="+",
        required=True,
        metavar="b",
        help="samples per rank and forward pass; one number, or one per stage",
    )
    add(
        "--data_parallel_size",
        type=int,
        required=True,
        metavar="N",
        help="ranks that see different samples (under tensor parallelism not the world size)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")


def _add_rule_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "learning rate and warm-up (a recipe brings its own; these replace it)"
    ).add_argument
    add("--base_lr", type=float, metavar="LR", help="learning rate that is good at --base_batch_size")
    add(
        "--base_batch_size",
        type=int,
        metavar="B0",
        help="batch that --base_lr and --warmup_fraction belong to (default: the recipe's, else --global_batch_size)",
    )
    add(
        "--warmup_fraction",
        type=float,
        metavar="F",
        help="warm-up at that batch as a share of the training, 0 to 1; grows in proportion to the batch (default: 0)",
    )
    add("--warmup_steps", type=int, metavar="W", help="warm-up in optimizer steps, instead (without --recipe)")
    add(
        "--lr_scaling",
        metavar="RULE",
        help=f"how the learning rate follows the batch: {', '.join(LR_SCALINGS)} (default: sqrt)",
    )


def _add_length_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("length of the training (without --recipe)").add_argument
    add("--dataset_size", type=_count, metavar="SAMPLES", help="samples per epoch, such as 1281167 or 50K")
    add("--epochs", type=float, metavar="E", help="passes over the data")
    add("--total_steps", type=int, metavar="T", help="optimizer steps, instead of --dataset_size and --epochs")
    add(
        "--last_window",
        metavar="WAY",
        help=f"samples that do not fill a batch at the end of an epoch: {', '.join(LAST_WINDOWS)}; carry: the next "
        "epoch uses them (default); keep: a smaller step, as Lightning and LargeBatch do; drop: left out",
    )
    add(
        "--stages",
        type=_stages,
        metavar="JSON",
        help="a training in stages, as in LargeBatch(stages=...): a JSON list, such as "
        '\'[{"global_batch_size": 64, "share": 0.5}, {"global_batch_size": 128, "share": 0.5}]\'',
    )
    add(
        "--doublings",
        type=int,
        metavar="K",
        help="let the batch double K times at a constant learning rate, in K + 1 stages of equally many samples",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("memory and traffic").add_argument
    add("--parameters", type=_count, metavar="P", help="the model's parameters, such as 336226108 or 1.5B")
    add("--layers", type=int, metavar="L", help="tensors that get a trust ratio (two dimensions or more), for traffic")
    add("--precision", metavar="P", help=f"one of {', '.join(PRECISIONS)} (default: 32-true)")


def _stages(text: str) -> list[Any]:
    """Read a list of stages."""
    try:
        stages = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(stages, list):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of stages")
    return stages


def _count(text: str) -> int:
    """Read a count: ``1281167``, ``1_281_167``, ``336M`` or ``1.5B``."""
    scale = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        number = float(text[:-1]) * scale if scale > 1 else int(text)
        whole = int(number)
    except (ValueError, OverflowError):
        whole, number = 0, 1
    if whole != number:
        raise argparse.ArgumentTypeError(f"{text!r} is no count. Write a whole number, such as 1281167, 336M or 1.5B")
    return whole


if __name__ == "__main__":
    sys.exit(main())
