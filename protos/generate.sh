#!/bin/sh
# Generates cluster/v1 and cluster/kserve from protos/. With --check: changes nothing, fails where the checked-in files
# differ.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON_BIN:-.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$python" -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/cluster/*/*.proto
if [ "${1:-}" = --check ]; then
  for file in "$out"/cluster/*/*; do
    name=${file#"$out"/}
    cmp -s "$file" "$name" || { echo "$name is not what protos/ generates: run 'make proto'" >&2; exit 1; }
  done
else
  cp -R "$out"/cluster/. cluster/
fi
