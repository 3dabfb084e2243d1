# Sourced by run_rl.sh where no MODEL is given: which cells a small model is made for, and how its data are made of them.
# Sets name, scale and sft, and adds to settings; make_data writes OUTPUT/data.
[ -z "${H5AD:-}" ] || [ -e "$H5AD" ] || fail "H5AD=$H5AD does not exist; give an h5ad file, or a folder of them"
[ -z "${H5AD:-}" ] || [ -z "${CELLS:-}" ] || fail "H5AD and CELLS are set; leave one of them out"
[[ ${CELLS:-pbmc} == @(pancreas|pbmc) ]] || fail "CELLS=$CELLS is unknown; it is pancreas or pbmc"
cells=${CELLS:-pancreas}
[ "$SMOKE" != 1 ] || cells=${CELLS:-pbmc}
fetched=$root/outputs/cells
if [ -n "${H5AD:-}" ]; then
  cells=h5ad
elif [ "$cells" = pancreas ] && ! PYTHONSAFEPATH=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" \
  "$PYTHON" -m recipe.cello1 cells pancreas --out "$fetched"; then
  [ -z "${CELLS:-}" ] || exit 1
  printf 'note: the blood cells that come with scanpy are taken instead (CELLS=pbmc)\n' >&2
  cells=pbmc
fi

prepare=(--seed "$SEED" --per-size 0 --top-genes 12 --exclude-genes housekeeping --suspension any)
traces=(--teacher markers --cite top)
n_sft=16000 n_rl=456 n_test=400 # 19 batches for RL: the last 5 of its 43 steps see those of the first 5
case $cells in
pancreas)
  name=pancreas
  prepare+=(--sizes 4-6 --test-donors human3 --type-column cell_ontology_class --donor-column donor --gene-column index)
  ;;
pbmc) name=embedded prepare+=(--sizes 3-5 --test-donors part_5) ;;
h5ad)
  name=h5ad prepare+=(--sizes 4-6 --max-cells 3000)
  settings+=(data.max_prompt_length=512 data.max_response_length=384 actor_rollout_ref.rollout.max_model_len=2048)
  ;;
esac
scale=embedded sft=(--config embedded)
[ "$algorithm" = grpo ] || scale+=_$algorithm
if [ "$SMOKE" = 1 ]; then
  name=smoke scale+=,smoke n_sft=600 n_rl=60 n_test=24
  sft+=(--config smoke)
fi
own=()
if [ -n "${PREPARE_ARGS:-}" ]; then # in words as a shell would read them, but nothing is expanded
  words=$(xargs -n 1 printf '%s\n' <<<"$PREPARE_ARGS" 2>/dev/null) || fail "PREPARE_ARGS has a quote without its end: $PREPARE_ARGS"
  mapfile -t own <<<"$words"
fi
prepare+=(--max-test "$n_test" "${own[@]}")

make_data() {
  local data=$OUTPUT/data inputs made
  case $cells in
  pancreas) inputs=$fetched/human ;;
  pbmc) inputs=$OUTPUT/cells ;;
  h5ad) inputs=$H5AD ;;
  esac
  made="cells: $cells $([ "$cells" != h5ad ] || printf %s "$H5AD"), smoke: $SMOKE, prepare: ${prepare[*]}, traces: ${traces[*]}"
  if [ -e "$data/made_from" ]; then
    [ "$(<"$data/made_from")" = "$made" ] ||
      fail "$data was made with other settings ($(<"$data/made_from")); choose another OUTPUT, or remove that folder"
    return
  fi
  if [ "$cells" = pbmc ]; then
    "$PYTHON" -m recipe.cello1 cells pbmc --out "$inputs"
  fi
  stage "puzzles of $cells cells, test donors held out"
  "$PYTHON" -m recipe.cello1 prepare "$inputs" --out "$data" --quiet "${prepare[@]}"
  stage "puzzles of recombined training cells; traces of a teacher who knows the markers of the other donors"
  "$PYTHON" -m recipe.cello1 recombine --prepared "$data" --cells "$inputs" --n "$n_sft" --seed "$SEED" --out "$data/new.json"
  "$PYTHON" -m recipe.cello1 recombine --prepared "$data" --cells "$inputs" --n "$n_rl" --seed $((SEED + 1000)) --out "$data/rl.json"
  "$PYTHON" -m recipe.cello1 traces markers "${traces[@]}" --cells "$data/train/train_data.json" --data "$data/new.json" \
    --out "$data/sft.json"
  "$PYTHON" -m recipe.cello1 tiny-model --data "$data/sft.json" --seed "$SEED" --out "$data/model"
  mkdir -p "$data"
  printf '%s\n' "$made" >"$data/made_from"
}
