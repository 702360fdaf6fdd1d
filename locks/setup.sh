#!/usr/bin/env bash
# Makes .venv, or brings it up to date: ./reproduce.sh setup [full | cpu | gpu] ends here. With a GPU the full set, else a smaller
# one; `full` adds vLLM, verl and Ray, `cpu` ignores a GPU, `gpu` needs none to be seen (the image of a container).
# From outside: PYTHON (3.11 or 3.12), TORCH_INDEX (where to take torch from, if not from the configured registry).

TORCH="torch==2.13.0"

has_gpu() { command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
    stop "no Python 3.11 or 3.12 was found; install one, or name it: PYTHON=/path/to/python3.11 ./reproduce.sh"
}

make_venv() {
    local python=$1
    rm -rf "$VENV"
    if "$python" -m venv "$VENV" > /dev/null 2>&1; then return; fi
    rm -rf "$VENV"
    if command -v uv > /dev/null && uv venv --quiet --seed --python "$python" "$VENV"; then return; fi
    stop "$python cannot make a virtual environment; install Debian's package python3-venv, or uv, and call again"
}

install() {  # uv where it is present, pip otherwise; both obey the registry that this machine is configured for
    local log=$VENV/set-up.log links=() place
    if command -v uv > /dev/null; then
        # uv reads neither pip.conf nor PIP_FIND_LINKS: a folder of wheels that was configured for pip is passed on
        for place in ${PIP_FIND_LINKS:-} $("$VENV/bin/python" -m pip config get global.find-links 2> /dev/null); do
            links+=(--find-links "$place")
        done
        export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1  # the same by its new and its old name: trust the certificates that this machine trusts
        set -- uv pip install --python "$VENV/bin/python" ${links[@]+"${links[@]}"} "$@"  # a Mac's bash, 3.2, takes an empty list for an error
    else
        set -- "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input "$@"
    fi
    "$@" >> "$log" 2>&1 && return
    tail -n 5 "$log" >&2
    stop "the installation failed (above: its last words; all of them: $log); mend what it names and call again, it goes on from here"
}

# full-gpu, full-cpu or default. A machine with a GPU gets the full set at once: its profiles need vLLM. A full set stays one:
# a login node shares it with the nodes that have GPUs, and perhaps no network.
wanted_set() {
    local kept
    kept=$(cut -d' ' -f1 "$VENV/.set-up" 2> /dev/null) || true
    if [ "${1:-}" = cpu ]; then echo default
    elif [ "${1:-}" = gpu ] || has_gpu || [ "$kept" = full-gpu ]; then echo full-gpu
    elif [ "${1:-}" = full ] || [ "$kept" = full-cpu ]; then echo full-cpu
    else echo default; fi
}

lock_of() { if [ "$1" = default ]; then echo locks/requirements.lock; else echo "locks/requirements-$1.lock"; fi; }
state_of() { { cat "$(lock_of "$1")" pyproject.toml locks/compat/*/*.{toml,py,pth}; echo "$TORCH"; } | cksum | tr ' ' -; }

DRIVER=580  # the oldest driver with CUDA 13, for which the torch of the registry is built

check_driver() {  # an old driver would end in a torch that sees no GPU; TORCH_INDEX may name a torch for another CUDA
    local driver
    [ -z "${TORCH_INDEX:-}" ] || return 0
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | head -n 1)
    [[ $driver =~ ^[0-9]+ ]] || return 0
    [ "${BASH_REMATCH[0]}" -ge "$DRIVER" ] ||
        stop "the NVIDIA driver of this machine is $driver, and torch is built for CUDA 13, which needs $DRIVER or newer: it would see no GPU; update the driver, name a torch for an older CUDA (TORCH_INDEX), or call ./reproduce.sh setup cpu"
}

check_platform() {  # llguidance, which vLLM needs, is the wheel that asks for the newest glibc
    local libc
    libc=$(getconf GNU_LIBC_VERSION 2> /dev/null) || true
    [ "$(uname -sm)" = "Linux x86_64" ] && [[ $libc =~ ^glibc\ 2\.([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge 31 ] ||
        stop "vLLM and verl are built for Linux on x86_64 with glibc 2.31 or newer (RHEL 9, Ubuntu 20.04), and this is $(uname -sm)${libc:+ with $libc}; ./reproduce.sh setup cpu needs neither, and a container (Dockerfile) brings a newer glibc"
}

check_compiler() {  # Triton compiles its kernels on the machine where they run
    command -v cc > /dev/null || command -v gcc > /dev/null || command -v clang > /dev/null ||
        say "There is no C compiler on this machine; vLLM and torch.compile need one (Debian: gcc)."
    "$VENV/bin/python" -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        say "There are no headers of Python on this machine; vLLM and torch.compile need them (Debian: python3-dev)."
}

mend_moved() {  # programs in .venv/bin begin with the path of its Python, and JupyterLab's kernel names it
    say "This clone was at $1 when $VENV was made: its programs are mended."
    "$VENV/bin/python" - "$1/$VENV" "$PWD/$VENV" << 'PYTHON'
import pathlib, sys
before, now = (place.encode() for place in sys.argv[1:])
venv = pathlib.Path(sys.argv[2])
for path in [venv / "pyvenv.cfg", *(venv / "bin").iterdir(), *(venv / "share").rglob("*.json")]:
    if path.is_file() and not path.is_symlink() and before in (text := path.read_bytes()) and b"\0" not in text:
        path.write_bytes(text.replace(before, now))
PYTHON
}

setup() {
    local set lock hash place
    set=$(wanted_set "${1:-}")
    lock=$(lock_of "$set")
    hash=$(state_of "$set")
    read -r _ _ place 2> /dev/null < "$VENV/.set-up" || place=$PWD
    [ "$(cat "$VENV/.set-up" 2> /dev/null)" = "$set $hash $PWD" ] && return
    [ "$set" = default ] || check_platform
    [ "$set" = full-gpu ] && has_gpu && check_driver

    say "Setting up $VENV ($set, from $lock). The first time this takes a few minutes and about 3 GB (full: 5 GB; with a GPU: 10 GB, 4.3 GB of it downloaded)."
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c '' 2> /dev/null || make_venv "$(find_python)"
    [ -e "$VENV/.set-up" ] && [ "$place" != "$PWD" ] && mend_moved "$place"
    rm -f "$VENV/.set-up"
    install --no-deps --require-hashes -r "$lock"
    # Torch is not in the locks: its build depends on the machine. An exact version lets a CPU build win where one is offered.
    install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
    local local_packages=()
    [ "$set" != full-gpu ] && local_packages+=(./locks/compat/torchvision-cpu-shim)
    [ "$set" = full-cpu ] && local_packages+=(./locks/compat/vllm-metadata)
    install --no-deps --no-build-isolation ${local_packages[@]+"${local_packages[@]}"} --editable .
    "$VENV/bin/python" -c 'import torch, transformers
print(f"torch {torch.__version__} on", "CUDA" if torch.cuda.is_available() else "CPU", f"· transformers {transformers.__version__}")'
    printf '%s\n' "$set $hash $PWD" > "$VENV/.set-up"
    if [ "$set" = full-gpu ]; then
        check_compiler
        has_gpu || return 0  # while the image of a container is built
        "$VENV/bin/python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
            stop "nvidia-smi lists a GPU, but torch sees none: its build does not fit the driver ($(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | head -n 1)); update the driver, or name a torch that fits (TORCH_INDEX) and call ./reproduce.sh setup again"
    fi
}

# Before every verb but setup: the environment that is there is used as it is, and only where there is none it is made. A login node
# without GPUs shares its disk with the nodes that have them: `status` there must not change what a job is using.
ready() {
    local set hash place wanted
    read -r set hash place 2> /dev/null < "$VENV/.set-up" || { setup; return; }
    [ "$place" = "$PWD" ] || stop "this clone was at $place when $VENV was made, and its programs still point there; ./reproduce.sh setup mends it"
    wanted=$(wanted_set)
    if [ "$set" != "$wanted" ]; then
        say "$VENV holds the set $set, and this machine would get $wanted; it is used as it is (./reproduce.sh setup changes it)." >&2
    elif [ "$hash" != "$(state_of "$set")" ]; then
        say "The locks are newer than $VENV; it is used as it is (./reproduce.sh setup brings it up to date)." >&2
    fi
}

need_browser() {
    if command -v chromium > /dev/null; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        say "Installing chromium for the browser tests."
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } < /dev/null > /dev/null 2>&1 ||
            say "chromium could not be installed: the browser tests will be skipped."
    else
        say "chromium is not installed: the browser tests will be skipped."
    fi
}

read_env() {  # keys may stand in .env, a NAME=value a line, which git ignores; the lines are read, not run, and what the environment says counts
    local line name value
    [ -f .env ] || return 0
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line#$'\xef\xbb\xbf'}  # a byte-order mark, as Windows' editors write it
        [[ ${line%$'\r'} =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z_0-9]*)=(.*)$ ]] || continue
        name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
        [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]] && value=${BASH_REMATCH[1]}
        [ -n "${!name+set}" ] || export "$name=$value"
    done < .env
}
