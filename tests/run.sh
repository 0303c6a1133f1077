#!/usr/bin/env bash
# Sets up .venv (the first time) and runs the tests; arguments go to pytest: bash tests/run.sh -k schedules
#   bash tests/run.sh            everything that a change must pass
#   bash tests/run.sh -m slow    full matrices of layouts and options, whole trainings
# Two processes share the files; -n 0 runs one test after the other, in this process.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_venv.sh test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # several ranks share the cores in the distributed tests
exec "${LAMB_VENV:-.venv}/bin/python" -m pytest -n 2 --dist loadfile "$@"
