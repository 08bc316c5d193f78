"""Shared by all tests: the repository root is importable, so tests reach ``berth`` and the entry points uninstalled."""

import os
import sys
from pathlib import Path

# before torch is imported: waiting threads give their core away, or two busy processes on two cores stand still
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
