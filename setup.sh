#!/bin/sh
# Sets up everything in .venv. Run it as often as you like: it does only what is missing.
#   PYTHON=python3.12 sh setup.sh     chooses the Python (3.10 to 3.13)
set -eu
cd "$(dirname "$0")"

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

fits() { # is $1 a Python that we run on?
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

stamp=.venv/headkd_ray-installed # a copy of what was installed
if fits .venv/bin/python && cat requirements.lock pyproject.toml | cmp -s - "$stamp"; then
    echo "setup: .venv is up to date"
    exit 0
fi

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10 to 3.13"
    python=$PYTHON
else
    python=
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if fits "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || fail "needs Python 3.10 to 3.13, found $(python3 --version 2>/dev/null || echo none)." \
        "Install one, or name it: PYTHON=/path/to/python3.12 (before make or sh setup.sh)."
fi

if ! fits .venv/bin/python; then
    echo "setup: creating .venv with $("$python" --version)"
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        command -v uv >/dev/null || fail "$python cannot make virtual environments." \
            "On Debian and Ubuntu: sudo apt install python3-venv. Or install uv. Then run this again."
        rm -rf .venv
        uv venv --quiet --python "$python" .venv
    fi
fi

# uv, and not pip, because it takes torch and torchvision from the same place: builds that fit each other, on CPU and GPU.
if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
    uv() { .venv/bin/python -m uv "$@"; }
fi
echo "setup: installing (a few GB, most of it torch)"
# Compiled here, once: Ray starts many processes, and where Python may not write next to the sources each would compile anew.
uv pip install --python .venv/bin/python --compile-bytecode --require-hashes -r requirements.lock
uv pip install --python .venv/bin/python --quiet --no-deps -e .
cat requirements.lock pyproject.toml >"$stamp"
echo "setup: done"
