#!/usr/bin/env bash
# Prints the path of a Python that can make virtual environments: find_python.sh LOW [HIGH]
# with versions such as 3.12. Asks the PATH, then pyenv, then uv (which may download one).
set -euo pipefail

low=$1
high=${2:-3.99}

fits() { # is "$1" a Python within [low, high] that has venv and pip's seed?
  "$1" - "$low" "$high" 2>/dev/null <<'PYTHON'
import sys

import ensurepip, venv

low, high = (tuple(map(int, text.split("."))) for text in sys.argv[1:])
sys.exit(not low <= sys.version_info[:2] <= high)
PYTHON
}

real() { "$1" -c 'import sys; print(sys.executable)'; }

for name in "python$low" python3.13 python3.12 python3.14 python3 python; do
  for path in $(type -aP "$name" || true); do
    if fits "$path"; then real "$path" && exit 0; fi
  done
done

if command -v pyenv >/dev/null; then
  for version in $(pyenv versions --bare --skip-aliases | sort -Vr); do
    path="$(pyenv root)/versions/$version/bin/python"
    if [[ -x $path ]] && fits "$path"; then real "$path" && exit 0; fi
  done
fi

if command -v uv >/dev/null; then
  path="$(uv python find "$low" 2>/dev/null || { uv python install --quiet "$low" && uv python find "$low"; })"
  if [[ -n $path ]] && fits "$path"; then real "$path" && exit 0; fi
fi

echo "error: no Python $low${2:+ to $high} with the venv module found on the PATH, in pyenv or in uv." >&2
echo "       Install one, for instance with 'pyenv install $low' or 'uv python install $low'." >&2
exit 1
