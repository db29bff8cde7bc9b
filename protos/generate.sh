#!/bin/sh
# Generates cluster/v1 from protos/. With --check: changes nothing, fails where the checked-in files differ.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON_BIN:-.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$python" -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/cluster/v1/*.proto
if [ "${1:-}" = --check ]; then
  for file in "$out"/cluster/v1/*; do
    cmp -s "$file" "cluster/v1/$(basename "$file")" || { echo "cluster/v1/$(basename "$file") is not what protos/ generates: run 'make proto'" >&2; exit 1; }
  done
else
  cp "$out"/cluster/v1/* cluster/v1/
fi
