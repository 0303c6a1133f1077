#!/usr/bin/env bash
# Sets up .venv (the first time) and trains the digits classifier with LAMB; arguments go to the Lightning CLI:
#   bash examples/run_digits.sh --trainer.max_epochs 5
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_venv.sh examples
exec "${LAMB_VENV:-.venv}/bin/python" examples/digits/train.py fit --config configs/digits.yaml "$@"
