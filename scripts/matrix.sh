#!/usr/bin/env bash
# Runs the tests with the oldest and the newest versions of torch and transformers that pyproject.toml allows, each in its own
# environment in .matrix/ (about 6 GB each with CUDA builds of torch).
# Usage: bash scripts/matrix.sh [oldest|newest …] [-- PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rows=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do rows+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#rows[@]} -gt 0 ] || rows=(oldest newest)
python="${PYTHON:-python3}"
for row in "${rows[@]}"; do
  case "$row" in
    oldest) wanted=(torch==2.6.0 transformers==5.0.0) ;;
    newest) wanted=(--upgrade torch transformers) ;;
    *) echo "matrix: expected oldest or newest, got '$row'" >&2; exit 2 ;;
  esac
  folder=".matrix/$row"
  [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
  "$folder/bin/pip" install --quiet "${wanted[@]}" -e ".[dev]"
  "$folder/bin/python" -c "import torch, transformers; print('$row: torch', torch.__version__, 'transformers', transformers.__version__)"
  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/bin/python" -m pytest -n 2 --dist worksteal "$@"
done
