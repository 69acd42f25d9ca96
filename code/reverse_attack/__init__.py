"""Part IV: reversal of adversarial attacks."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in main.py, before torch starts
