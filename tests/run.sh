#!/usr/bin/env bash
# Sets the environment up, then runs the tests: the fast ones first, the integration tests after them.
#
#   bash tests/run.sh                      all tests
#   bash tests/run.sh fast                 what needs no engine and no training, but for the tests marked slow
#   bash tests/run.sh tests/recipe/task    any other arguments go to pytest as they are
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=recipe/cello1/launch/setup_env.sh
source recipe/cello1/launch/setup_env.sh train test || exit 1
: "${PYTHON:?is set by setup_env.sh}"

# Two tests at a time, one by one and in their order: what is left at the end is short, and runs beside something else.
# A test that hangs (Ray, vLLM) fails after the time-out instead of holding everything.
two=(--numprocesses=2 --dist=loadgroup --no-loadscope-reorder --timeout=900 --durations=20)
case ${1-} in
"") set -- tests "${two[@]}" ;;
fast) set -- tests "${two[@]}" --hypothesis-profile=fast -m "not integration and not slow" "${@:2}" ;;
esac
exec "$PYTHON" -m pytest "$@"
