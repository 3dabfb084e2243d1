# Sourced by the launchers: the Python of the active environment, or the one on PATH, which must have what they need.
PYTHON=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
export PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
if [ -z "${CELLO1_DEVICE:-}" ]; then # all lines are read: cut off while it writes, nvidia-smi would fail
  listed=$(nvidia-smi -L 2>/dev/null) || :
  [[ $'\n'$listed == *$'\n'"GPU "* ]] && CELLO1_DEVICE=gpu || CELLO1_DEVICE=cpu
fi
export CELLO1_DEVICE
"$PYTHON" -P -c '
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: {sys.executable} lacks {chr(44).join(missing)}; install what README.md of the recipe says")
' verl vllm ray transformers transfer_queue trl peft || return 1
