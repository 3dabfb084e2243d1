#!/usr/bin/env bash
# GRPO training of a Cell-o1 model; run_rl.sh names the variables and what it does.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_rl.sh" grpo "$@"
