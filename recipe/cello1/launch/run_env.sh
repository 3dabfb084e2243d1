# Sourced by the launchers with OUTPUT set: the folder of a run is made and locked, and what the run writes elsewhere goes
# into a temporary folder that is removed at its end, or into OUTPUT/.cache. Only models are kept where they always are.

# A module of the working directory is not taken for an installed one.
export PYTHONSAFEPATH=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export CELLO1_LIMIT_TEMPLATES=1 # vLLM renders a prompt of its own when it starts
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}" VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"

for _name in OUTPUT H5AD MODEL TRAIN_DATA VAL_DATA TENSORBOARD_DIR; do # relative paths start here, wherever a process runs
  [[ -z ${!_name:-} || ${!_name} == /* ]] && continue
  # A model may be on the Hub, and what does not exist is reported as it was given.
  [[ $_name == @(OUTPUT|TENSORBOARD_DIR) || -e ${!_name} ]] && declare "$_name=$PWD/${!_name}"
done
{ mkdir -p "$OUTPUT" && [ -w "$OUTPUT" ]; } 2>/dev/null || fail "OUTPUT=$OUTPUT cannot be written; choose another folder"
if command -v flock >/dev/null; then
  exec 9>>"$OUTPUT/.lock" # which may be a link: nothing is cut off
  flock -w 60 9 || fail "another run is using OUTPUT=$OUTPUT; wait for it, stop it, or choose another OUTPUT"
fi
# The path of a socket ends at 107 characters, and Ray's lie 68 below its temporary folder, whose own name takes 14.
_parent=${RAY_TMPDIR:-${TMPDIR:-/tmp}}
[[ $(printf %s "$_parent" | wc -c) -le 25 && $_parent == /* && -d $_parent && -w $_parent ]] || _parent=/tmp
TMPDIR=$(mktemp -d "$_parent/cello1-XXXXXX" 2>/dev/null) || fail "$_parent cannot be written; set ${RAY_TMPDIR:+RAY_}TMPDIR to a folder whose path has at most 25 characters"
export TMPDIR HF_DATASETS_CACHE=$TMPDIR/datasets

own_folder() { # what lies in a home, or was compiled, is run as it is: only of a folder that was made here, and not brought along
  local seal=$1/.made-here
  owned=$1
  if mkdir "$1" 2>/dev/null; then
    TZ=UTC stat -c "%i %w" "$1" >"$seal" 2>/dev/null || true
  fi
  if [ -L "$1" ] || ! [[ -s $seal && $(<"$seal") == "$(TZ=UTC stat -c "%i %w" "$1")" ]]; then
    owned=$TMPDIR/$2
    mkdir -p "$owned"
  fi
}
if ! [ -w "${HOME:-/nonexistent}" ]; then # as with `docker run --user`
  own_folder "$OUTPUT/home" home
  export HOME=$owned
fi
# What is compiled or looked up for a run is kept with it, for when it goes on; but inductor's command of the compiler is
# taken apart at blanks and quotes.
if [[ $OUTPUT =~ ^[A-Za-z0-9_./-]+$ ]]; then
  own_folder "$OUTPUT/.cache" cache
  _caches=$owned
else
  _caches=$TMPDIR/cache
fi
for _cache in TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR VLLM_CACHE_ROOT MPLCONFIGDIR; do
  [ -n "${!_cache:-}" ] || declare -x "$_cache=$_caches/${_cache%%_*}"
done
if [ -z "${RAY_ADDRESS:-}" ]; then # a Ray of its own; without a token it would write one into the home
  RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
  export RAY_AUTH_TOKEN RAY_TMPDIR=$TMPDIR
fi

end_run() { # also where the launcher alone is terminated: nothing that it started goes on
  if pkill -TERM -P $$; then
    for _ in {1..600}; do pgrep -P $$ >/dev/null || break; sleep 0.2; done
  fi
  rm -rf "$TMPDIR"
}
trap end_run EXIT
