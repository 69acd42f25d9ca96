#!/bin/sh
# Download MiniPlaces (about 0.5 GB, 120,000 images of 128x128) into data/:
#
#     sh download_dataset.sh
#
# Leaves data/images, data/objects, data/train.txt and data/val.txt. It may be interrupted at any
# moment and run again: it resumes where it stopped, and says so when everything is there.
# Without internet access, put the archive at data/data.tar.gz and run it: that file is used first.
#
# The work is in download_dataset.py. It needs Python 3.8 or newer (.venv's if there is one, else
# python3; PYTHON=... chooses another). Google Drive, the last source, also needs gdown, which
# `make demo` installs.
#
# Variables, all optional:
#   MINIPLACES_DIR        where to put everything (default: data/ in the folder of this script)
#   MINIPLACES_URLS       addresses of the archive, in order of preference
#   MINIPLACES_DRIVE      the archive's Google Drive id, tried last ('' = do not)
#   MINIPLACES_LABELS     address of the folder that has train.txt and val.txt
#   MINIPLACES_MIN_BYTES  an archive smaller than this is refused
#   MINIPLACES_COUNTS     the least number of train, val and test images
#   MINIPLACES_TIMEOUT    seconds of silence after which a connection counts as lost
#   MINIPLACES_WAIT       seconds before the second try; later ones wait longer

cd "$(dirname "$0")" || exit 1
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || {
    echo "download_dataset.sh: $PYTHON is not there or older than Python 3.8;" \
        "try: PYTHON=/path/to/python3 sh download_dataset.sh" >&2
    exit 1
}
exec "$PYTHON" download_dataset.py "$@"
