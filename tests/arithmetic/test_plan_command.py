"""``python -m lightning_lamb plan`` as a person or a script runs it.

What a process adds (exit code, stderr, pipes) is checked in processes; the many cases run in this one, which does not
wait for torch to be imported each time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lamb.__main__ import main
from lightning_lamb.plan import plan_from_recipe
from lightning_lamb.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
RANKS = ["--micro_batch_size", "32", "--data_parallel_size", "128"]
OWN = [
    "--global_batch_size", "4096", "--micro_batch_size", "64", "--data_parallel_size", "8", "--base_lr", "1e-3",
    "--base_batch_size", "1024", "--warmup_fraction", "0.05", "--dataset_size", "1M", "--epochs", "10",
]  # fmt: skip


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


@pytest.fixture
def as_json(capsys: pytest.CaptureFixture[str]):
    """Run the command with --json in this process and read what it prints."""

    def run(*arguments: str) -> dict:
        assert main(["plan", *arguments, "--json"]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return json.loads(printed.out)

    return run


def test_bert_large_as_json_in_a_process():
    done = in_a_process(
        "-m", "lightning_lamb", "plan", "--recipe", "bert-large", "--global_batch_size", "32768", *RANKS, "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert (plan["lr"], plan["warmup_steps"], plan["total_steps"]) == (0.005, 3125, 15625)
    assert (plan["accumulate_grad_batches"], plan["global_batch_size"]) == (8, 32768)
    assert [stage["total_steps"] for stage in plan["stages"]] == [14063, 1562]


def test_the_mixed_recipe_needs_no_batch_and_counts_both_stages(as_json):
    plan = as_json("--recipe", "bert-large-mixed", *RANKS)
    assert (plan["global_batch_size"], plan["total_steps"]) == (65536, 8599)
    assert [stage["accumulate_grad_batches"] for stage in plan["stages"]] == [16, 8]
    assert [stage["warmup_steps"] for stage in plan["stages"]] == [2815, 312]


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_equals_the_library_for_every_recipe(recipe: str, as_json):
    arguments = [
        "--micro_batch_size",
        "8",
        "--data_parallel_size",
        "4",
        "--base_lr",
        "0.02",
        "--precision",
        "bf16-true",
    ]
    plan = plan_from_recipe(recipe, micro_batch_size=8, data_parallel_size=4, base_lr=0.02, precision="bf16-true")
    assert as_json("--recipe", recipe, *arguments) == json.loads(json.dumps(plan.to_dict()))


def test_without_json_a_table(capsys):
    assert main(["plan", "--recipe", "resnet50", "--global_batch_size", "8192", *RANKS]) == 0
    text = capsys.readouterr().out
    assert text.startswith("resnet50: ResNet-50 on ImageNet, 90 epochs")
    assert "0.02" in text
    assert "Table 5" in text


def test_an_own_plan_with_counts_written_short(as_json):
    plan = as_json(*OWN, "--parameters", "1.5B", "--layers", "100")
    assert (plan["lr"], plan["warmup_steps"], plan["total_steps"]) == (0.002, 488, 2442)
    assert plan["parameters"] == 1_500_000_000
    assert plan["recipe"] is None
    assert len(plan["stages"]) == 1


def test_an_own_plan_by_steps_that_doubles(as_json):
    plan = as_json(
        "--global_batch_size", "256", "--micro_batch_size", "32", "--data_parallel_size", "8", "--base_lr", "1e-3",
        "--total_steps", "1000", "--doublings", "1",
    )  # fmt: skip
    assert [(stage["global_batch_size"], stage["total_steps"]) for stage in plan["stages"]] == [(256, 500), (512, 250)]


def test_an_own_plan_in_stages(as_json):
    plan = as_json(
        *RANKS, "--base_lr", "1e-3", "--total_steps", "100", "--stages",
        '[{"global_batch_size": 4096, "share": 0.5, "warmup_steps": 5}, {"global_batch_size": 8192, "share": 0.5}]',
    )  # fmt: skip
    assert [(stage["total_steps"], stage["warmup_steps"]) for stage in plan["stages"]] == [(67, 5), (33, 0)]
    assert as_json(*OWN[:8], "--total_steps", "100", "--warmup_steps", "7")["warmup_steps"] == 7


def test_help_tells_recipes_options_and_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in (*RECIPES, "--warmup_fraction", "--doublings", "examples:", "samples per optimizer step"):
        assert word in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "derive accumulation" in capsys.readouterr().out


def test_no_optional_package_is_imported():
    code = (
        "import sys, lightning_lamb.__main__ as m; m.main(['plan', '--recipe', 'resnet50', *sys.argv[1:]])"
        "; print(sorted({'lightning', 'pytorch_lightning', 'deepspeed', 'jsonargparse'} & set(sys.modules)))"
    )
    assert in_a_process("-c", code, *RANKS).stdout.splitlines()[-1] == "[]"


def test_the_arithmetic_works_without_torch():
    """Skips the package's front door, which imports the optimizers, and makes torch impossible to import."""
    code = (
        "import sys, types; sys.modules['torch'] = None"
        "; package = types.ModuleType('lightning_lamb'); package.__path__ = ['lightning_lamb']"
        "; sys.modules['lightning_lamb'] = package"
        "; from lightning_lamb.plan import plan_from_recipe"
        "; print(plan_from_recipe('bert-large', micro_batch_size=32, data_parallel_size=8).schedule_stages()[0].steps)"
    )
    done = in_a_process("-c", code)
    assert (done.stdout, done.stderr) == ("15625\n", "")


def test_a_reader_that_stops_early_gets_no_traceback():
    line = f"{sys.executable} -m lightning_lamb plan --recipe bert-large --json {' '.join(RANKS)} | true"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.stderr == ""


ERRORS = {
    "no command": ([], "the following arguments are required: command"),
    "unknown command": (["plans"], "invalid choice: 'plans'"),
    "no ranks": (["plan", "--recipe", "resnet50"], "required: --micro_batch_size, --data_parallel_size"),
    "unknown option": (["plan", *RANKS, "--recipe", "resnet50", "--lr", "1"], "unrecognized arguments: --lr 1"),
    "shortened option": (["plan", *RANKS, "--recip", "resnet50"], "unrecognized arguments: --recip resnet50"),
    "no number": (["plan", *RANKS, "--global_batch_size", "1e4"], "--global_batch_size: invalid int value: '1e4'"),
    "no count": (["plan", *RANKS, "--parameters", "1.5"], "--parameters: '1.5' is no count"),
    "part of a sample": (["plan", *RANKS, "--dataset_size", "1.0005K"], "--dataset_size: '1.0005K' is no count"),
    "infinite count": (["plan", *RANKS, "--dataset_size", "infK"], "--dataset_size: 'infK' is no count"),
    "unknown recipe": (
        ["plan", *RANKS, "--recipe", "bert"],
        "recipe='bert' is not one of: bert-large, bert-large-mixed",
    ),
    "does not divide": (
        ["plan", *RANKS, "--recipe", "bert-large", "--global_batch_size", "30000"],
        "Nearest that divide: 28672 or 32768",
    ),
    "negative": (["plan", *RANKS, "--recipe", "resnet50", "--global_batch_size", "-1"], "global_batch_size=-1 must be"),
    "zero micro-batch": (
        ["plan", "--recipe", "resnet50", "--micro_batch_size", "0", "--data_parallel_size", "8"],
        "micro_batch_size=0 must be a whole number of at least 1",
    ),
    "too many micro-batches": (
        ["plan", "--recipe", "resnet50", "--micro_batch_size", "8", "8", "--data_parallel_size", "8"],
        "micro_batch_size=[8, 8] has 2 numbers for 1 stages",
    ),
    "odd mixed batch": (
        ["plan", "--recipe", "bert-large-mixed", "--global_batch_size", "4097", *RANKS],
        "Use a multiple of 2",
    ),
    "warm-up above 1": (
        ["plan", "--recipe", "bert-large", "--global_batch_size", "327680", *RANKS],
        "largest batch for it is 163840",
    ),
    "recipe without lr": (
        ["plan", "--recipe", "cifar10-davidnet", *RANKS],
        "Give base_lr (--base_lr on the command line)",
    ),
    "recipe and length": (
        ["plan", "--recipe", "resnet50", "--epochs", "3", *RANKS],
        "--epochs does not go with --recipe",
    ),
    "recipe and size": (
        ["plan", "--recipe", "resnet50", "--parameters", "3M", *RANKS],
        "--parameters does not go with",
    ),
    "nothing to plan": (["plan", *RANKS], "--global_batch_size and --base_lr missing. Without --recipe, give"),
    "no length": (["plan", *OWN[:8]], "dataset_size and epochs not given"),
    "two lengths": (["plan", *OWN, "--total_steps", "5"], "both set the length"),
    "batch above dataset": (["plan", *OWN, "--dataset_size", "4095"], "larger than the dataset (4095 samples)"),
    "nan": (["plan", *OWN, "--base_lr", "nan"], "base_lr=nan must be a finite number above 0"),
    "rule": (["plan", *OWN, "--lr_scaling", "square"], "lr_scaling='square' is not one of: sqrt, linear, none"),
    "last window": (["plan", *OWN, "--last_window", "pad"], "last_window='pad' is not one of: carry, keep, drop"),
    "stages and a batch": (
        ["plan", *OWN, "--stages", '[{"global_batch_size": 8, "steps": 1}]'],
        "each stage gives its",
    ),
    "stages that are no list": (["plan", *OWN, "--stages", "{}"], "'{}' is no list of stages"),
    "stages that are no JSON": (["plan", *OWN, "--stages", "[8"], "is no JSON"),
    "precision": (["plan", *OWN, "--precision", "bf16"], "precision='bf16' is not one of: 32-true, bf16-mixed"),
    "two micro-batches for one stage": (["plan", *OWN, "--micro_batch_size", "1", "2"], "2 numbers for 1 stages"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=list(ERRORS))
def test_an_error_is_one_message_on_stderr_and_exit_code_2(arguments: list[str], message: str, capsys):
    try:
        code = main(arguments)
    except SystemExit as stopped:  # argparse's own errors
        code = stopped.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("python -m lightning_lamb")


@pytest.mark.parametrize("name", ["does not divide", "no number"])
def test_an_error_in_a_process_leaves_no_traceback(name: str):
    arguments, message = ERRORS[name]
    done = in_a_process("-m", "lightning_lamb", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
