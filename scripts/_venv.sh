# Sourced by other scripts: creates .venv with pinned versions if necessary, and changes to the repository's root.
# Usage: source scripts/_venv.sh [EXTRA]      (EXTRA: an optional dependency group of pyproject.toml, such as dev)
# PYTHON: the Python interpreter that creates .venv (3.11 or later).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "expected Python 3.11 or later, got $("$python" --version 2>&1); set PYTHON to another interpreter" >&2
  exit 1
fi
if [ ! -x .venv/bin/python ]; then
  echo "creating .venv"
  "$python" -m venv .venv
fi
wanted="$(cat pyproject.toml constraints.txt | cksum)"
stamp=".venv/installed${extra:+-$extra}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing pinned versions${extra:+ (with $extra)}; the first time takes a few minutes"
  .venv/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".${extra:+[$extra]}"
  echo "$wanted" > "$stamp"
fi
