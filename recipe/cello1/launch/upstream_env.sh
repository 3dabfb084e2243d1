# Sourced by the launchers: the Python of the active environment, or the one on PATH, which must have what they need.
PYTHON=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
export PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
# shellcheck source=device.sh
source "$(dirname "${BASH_SOURCE[0]}")/device.sh"
find_device
CELLO1_DEVICE=$device
export CELLO1_DEVICE
"$PYTHON" -P -c '
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: {sys.executable} lacks {chr(44).join(missing)}; install what README.md of the recipe says")
' verl vllm ray transformers transfer_queue trl peft || return 1
