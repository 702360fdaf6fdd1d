#!/usr/bin/env bash
# MedVLThinker, a companion. Two commands do everything:
#
#   ./reproduce.sh [PROFILE] [key=value ...]   run the paper's notebooks: what is missing or out of date (PROFILE: smoke, mini or paper)
#   ./reproduce.sh test [all | heavy]          run the tests; heavy: those that need vLLM, verl, Ray or a browser
#
#   ./reproduce.sh setup [full | cpu | gpu]    make .venv, or bring it up to date; no other verb changes it
#   ./reproduce.sh clean                       remove what the runs wrote (_runs, _docs); the environment stays
#   ./reproduce.sh --help                      this text, and all other verbs; ./reproduce.sh VERB --help explains one
#
# Everything that a run writes lands in _runs/ (MEDVLTHINKER_HOME moves it). Keys (HF_TOKEN, OPENAI_API_KEY, WANDB_API_KEY)
# come from the environment, or from a file .env beside this one; SECURITY.md says where they never go.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")"  # the same place, by whatever link one came

VENV=.venv
# whatever other kernel is called python3 on this machine, ours comes first: in JupyterLab, and where papermill runs a notebook
export JUPYTER_PATH="$PWD/$VENV/share/jupyter${JUPYTER_PATH:+:$JUPYTER_PATH}"
unset PYTHONDONTWRITEBYTECODE  # many containers set it; every process would then compile torch anew, which doubles its start
say()  { printf '%s\n' "$*"; }
stop() { printf 'reproduce.sh: %s\n' "$*" >&2; exit 2; }
. locks/setup.sh
read_env

full() {
    [[ $(cat "$VENV/.set-up" 2> /dev/null) = full-* ]] || stop "these tests need vLLM, verl and Ray; ./reproduce.sh setup full installs them"
}
run_tests() {  # two workers, one thread each: more threads than cores make everything slower
    local run=("$VENV/bin/python" -m pytest -n 2 --dist loadfile)
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
    case "${1:-}" in
        all)   run_tests; run_tests heavy ;;
        heavy) need_browser; "${run[@]}" -m heavy ;;
        *)     "${run[@]}" -m "not heavy" "$@" ;;
    esac
}

case "${1:-} ${2:-}" in "setup -h" | "setup --help" | "test --help" | "clean -h" | "clean --help") set -- --help ;; esac

case "${1:-}" in
    setup)
        case "${2:-}" in
            "" | full | cpu | gpu) setup "${2:-}"; say "Ready: $VENV" ;;
            *) stop "setup knows the words full, cpu and gpu, and not $2" ;;
        esac ;;
    test)
        shift; ready
        case "${1:-}" in all | heavy) full ;; esac
        run_tests "$@" ;;
    clean)
        [ $# = 1 ] || stop "clean takes no word: it removes all of _runs and _docs; to remove less, remove a folder in them"
        rm -rf _runs _docs _site_src; say "Removed _runs and _docs."
        # a folder that somebody named may hold more than ours: it is theirs to delete
        [ -z "${MEDVLTHINKER_HOME:-}" ] || say "Left alone: MEDVLTHINKER_HOME, $MEDVLTHINKER_HOME." ;;
    -h | --help | help)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        [ ! -x "$VENV/bin/python" ] || "$VENV/bin/python" -m medvlthinker.app.cli --help ;;
    *)
        ready; exec "$VENV/bin/python" -m medvlthinker.app.cli "${@:-run}" ;;
esac
