#!/bin/sh
# Gradescope runs this once, as root on Ubuntu. SKIP_INSTALL=1: everything is installed already.
set -e
root=${AUTOGRADER_ROOT:-/autograder}
[ -z "$SKIP_INSTALL" ] || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv
python3 -m venv "$root/venv"
"$root/venv/bin/python" -m pip install --no-cache-dir -r "$root/source/requirements.txt"
