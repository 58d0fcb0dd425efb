"""What the oracle tests share stands beside them."""

from __future__ import annotations

import sys
from pathlib import Path

# Test modules are imported by their path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
