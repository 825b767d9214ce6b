#!/bin/sh
# What an image holds, for Containerfile and apptainer.def alike; run in the repository's folder of the image.
#   install.sh system               as root: Debian's packages
#   install.sh packages cpu|cuda    into .venv, at the versions of constraints.txt
set -eu
UV=0.13.9

system() {
    # g++: Triton and DeepSpeed compile at first use. libaio: offloading to a disk. wget: KubeRay's probes. openssh, pdsh: DeepSpeed's hosts
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends ca-certificates g++ libaio-dev openssh-client pdsh wget
    rm -rf /var/lib/apt/lists/*
    for name in ray vlm-dist; do ln -sf "/app/.venv/bin/$name" "/usr/local/bin/$name"; done # for login shells, which set PATH anew
}

packages() {
    case $1 in
        cpu) torch=${TORCH_BACKEND-cpu} toolkit= ;;                  # torch without CUDA; empty: the package index's own build
        cuda) torch= toolkit="cuda-toolkit[nvcc,cudart,cccl,cublas,cusparse,cusolver,curand]" ;; # nvcc and headers: only engine.offload compiles with them
        *) echo "install.sh: '$1' is neither cpu nor cuda" >&2; exit 2 ;;
    esac
    python3 -m venv .venv
    python3 -m venv /tmp/uv
    /tmp/uv/bin/pip install -q --no-cache-dir --disable-pip-version-check "uv==$UV"
    set -- --python .venv/bin/python --no-cache --quiet --constraints constraints.txt ${torch:+--torch-backend="$torch"}
    # DeepSpeed builds its wheel against the installed torch, so it comes last and without build isolation
    /tmp/uv/bin/uv pip install "$@" torch numpy setuptools wheel ninja packaging psutil py-cpuinfo hjson msgpack pydantic tqdm $toolkit
    DS_BUILD_OPS=0 /tmp/uv/bin/uv pip install "$@" --no-build-isolation --editable '.[s3,cider,datasets]'
    rm -rf /tmp/uv
    [ -z "$toolkit" ] || link_libraries .venv/lib/python3.*/site-packages/nvidia/cu*/
}

link_libraries() { # as a linker looks for them: lib64/libcudart.so
    ln -sfn lib "${1}lib64"
    for name in cudart cublas cublasLt curand cusolver cusparse; do
        for library in "${1}lib/lib$name".so.*; do ln -sf "$(basename "$library")" "${1}lib/lib$name.so"; done
    done
}

"$@"
