#!/usr/bin/env bash
# The test command: set-up, lint with a scan for insecure code, types, dependency audit and the whole
# test-suite, or with arguments what pytest makes of them.
#
#   bash tests/run.sh [--on RUNNER] [PYTEST ARGUMENT...]
#
# RUNNER is 0.32/V1 (the default), 0.33/V1 or 0.33/V2, a vLLM and one of its model runners, or "all".
# Without any argument the tests are shared among the three; the README beside this file says how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${SWA_VENV:-.venv}
newer=$(realpath -m "$venv-0.33")
RAN=.cache/ran.jsonl

stage() { printf '\n== after %d s: %s\n' "$SECONDS" "$*"; "$@"; }

# pytest ARGUMENT... on RUNNER
on() {
    case $1 in
        0.32/V1) stage "$venv/bin/pytest" "${@:2}" ;;
        0.33/V1) stage "$newer/bin/pytest" "${@:2}" ;;
        0.33/V2)
            stage env VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 \
                PYTHONPATH="$newer/interpreter${PYTHONPATH:+:$PYTHONPATH}" \
                "$newer/bin/pytest" "${@:2}"
            ;;
    esac
}

runners=(0.32/V1) is_shared=$((!$#))
if [[ ${1:-} == --on ]]; then
    case ${2:-nothing} in
        0.32/V1 | 0.33/V1 | 0.33/V2) runners=("$2") ;;
        all) runners=(0.32/V1 0.33/V1 0.33/V2) ;;
        *)
            echo "tests/run.sh: error: --on ${2:-without a name}; allowed are 0.32/V1, 0.33/V1," \
                "0.33/V2 and all" >&2
            exit 2
            ;;
    esac
    shift 2
fi

bash examples/setup_env.sh
bash tests/vllm_0_33/setup_env.sh "$venv" "$newer"

stage "$venv/bin/ruff" check
stage "$venv/bin/ruff" format --check
stage "$venv/bin/mypy"
stage "$venv/bin/lint-imports" --no-cache --no-logo
stage "$venv/bin/python" tests/audit.py
for script in examples/*.sh examples/*/*.sh tests/*.sh tests/*/*.sh .ci/run; do
    bash -n "$script"
done
status=0
if ((!is_shared)); then
    for runner in "${runners[@]}"; do
        on "$runner" "$@" || status=$?
    done
    exit "$status"
fi

rm -f "$RAN"
# Most tests keep one core busy; those of a file share engines, and so a process. Files begin in the
# order of tests/conftest.py.
for runner in 0.32/V1 0.33/V1 0.33/V2; do
    on "$runner" --share="$RAN" -n 2 --dist loadfile --no-loadscope-reorder \
        -m "not full and not soak and not alone" --durations=20 || status=$?
done
on 0.32/V1 --share="$RAN" -m "alone and not full and not soak" --durations=20 || status=$?
stage "$venv/bin/python" -m tests.ran "$RAN"
exit "$status"
