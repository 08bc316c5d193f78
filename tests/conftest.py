"""Shared by all tests: the repository root is importable, so tests reach ``berth`` and the entry points uninstalled."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
