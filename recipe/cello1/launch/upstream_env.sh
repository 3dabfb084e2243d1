# Sourced by the launchers: the Python of the active environment, or the one on PATH, checked for what training needs.
PYTHON=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
export PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
if [ -z "${CELLO1_DEVICE:-}" ]; then
  listed=$(nvidia-smi -L 2>/dev/null) || listed=
  case $listed in GPU*) CELLO1_DEVICE=gpu ;; *) CELLO1_DEVICE=cpu ;; esac
fi
export CELLO1_DEVICE
"$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/environment.py" look || return 1
