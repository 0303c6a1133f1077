#!/usr/bin/env bash
# Makes a virtual environment (default .venv) and installs this package into it with the extras named.
#   bash scripts/setup_venv.sh examples      what the examples need
#   bash scripts/setup_venv.sh test          what the tests need, peers' LAMBs included
# Does nothing when that has been done already. PYTHON=... chooses the interpreter, LAMB_VENV=... the folder.
set -euo pipefail
cd "$(dirname "$0")/.."

extra="${1:?name an extra: examples or test}"
venv="${LAMB_VENV:-.venv}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "lightning_lamb needs Python 3.10 or newer; '$python' is $("$python" -V). Set PYTHON=/path/to/a/newer/python." >&2
  exit 1
}
wanted="$extra $(cat pyproject.toml .ci/constraints.txt scripts/setup_venv.sh | cksum) $(ls -d tests/deepspeed 2>/dev/null || true)"
stamp="$venv/.installed-for-$extra"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt "$@"; }

echo "Setting up $venv for '$extra' (a few minutes the first time) ..."
# torch alone and first: a build of it that is already there, a CPU one say, then satisfies everything after it.
install torch
install setuptools wheel numpy
install -e ".[$extra]"
if [ "$extra" = test ]; then
  # Peers' LAMBs, compared with ours. Without their dependencies: timm's torchvision would replace or break torch.
  install --no-deps timm pytorch_optimizer torch_optimizer pytorch-ranger
  # torch for CUDA brings its own. Without a GPU, Triton's interpreter runs the CUDA kernel in the tests.
  if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
    "$venv/bin/python" -c 'import triton' 2>/dev/null || install 'triton>=3.5,<4'
  fi
  if [ -d tests/deepspeed ]; then
    DS_BUILD_OPS=0 install --no-build-isolation "deepspeed>=0.19.8,<0.20"
  fi
fi
echo "$wanted" > "$stamp"
