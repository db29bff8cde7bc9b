#!/bin/sh
# Makes $VENV and installs the package, its kernels and the test tools, all pinned. Run by `make setup`.
set -eu
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "setup: $("$python" --version) is too old; Python 3.11 or newer is needed (make setup PYTHON=python3.11)" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
  { echo "setup: could not make $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

pip="$venv/bin/python -m pip --disable-pip-version-check -q"
torch=$(sed -n 's/^ *"\(torch==[^"]*\)",*$/\1/p' pyproject.toml)

# Without build isolation, which would fetch them again; venv of Python 3.11 seeds a setuptools that is too old.
$pip install "setuptools>=77" wheel

if "$venv/bin/python" -c "import sys, torch; sys.exit('$torch' != 'torch==' + torch.__version__.split('+')[0])" 2>/dev/null; then
  echo "setup: $torch is in place"
elif [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1; then
  echo "setup: an NVIDIA driver is here: installing $torch with CUDA"
  $pip install "$torch"
# A CPU build is named by the local version +cpu: a wheel that pip's own configuration offers, else PyTorch's index.
elif $pip install --no-deps "$torch+cpu" 2>/dev/null; then
  echo "setup: no NVIDIA driver: $torch+cpu, from where pip is configured to look"
elif $pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch+cpu" 2>/dev/null; then
  echo "setup: no NVIDIA driver: $torch+cpu, from PyTorch's own index"
else
  echo "setup: no NVIDIA driver, and no CPU build of $torch within reach; pip's default build would bring gigabytes of" >&2
  echo "       CUDA. Offer a CPU wheel (PIP_FIND_LINKS=DIR), or install any build of $torch into $venv, and run again." >&2
  exit 1
fi
echo "setup: installing the other dependencies"
$pip install --no-build-isolation -e ".[dev]"
echo "setup: done; try $venv/bin/cluster --help"
