"""A class of submissions: found, unpacked, run in a sandbox, judged in another process."""

import os
import sys

if os.name != "posix":
    sys.exit("error: grade.py needs Linux or macOS; on Windows, run it in WSL or a container")
