"""Makes the modules of code/ importable; every script here imports this first."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
