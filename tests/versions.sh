#!/usr/bin/env bash
# The plugin's tests against the versions of scanpy and anndata it is written for, each pair in an environment of its own
# that holds what `pip install .[annotate]` brings (and dask, which users of it have), and is removed.
#
#   bash tests/versions.sh                                     every pair below
#   bash tests/versions.sh "scanpy==1.11.* anndata==0.12.*"    the pairs that are named
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# scanpy 1.10 stops at anndata 0.11, which needs the pandas, zarr and scipy of its time; anndata 0.13 needs scanpy 1.12.
(($#)) || set -- "scanpy==1.10.* anndata==0.11.* pandas<3 zarr<3 scipy<1.15" "scanpy==1.11.* anndata==0.12.*" "scanpy==1.12.* anndata==0.13.*"
python=${CELLO1_PYTHON:-python3.12} # scanpy 1.12 and anndata 0.13 need it, the others run on it
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
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
