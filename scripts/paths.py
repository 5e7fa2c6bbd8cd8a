"""Where things are."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
EXAMPLES = TARGET / "release/examples"
DEMO = ROOT / "models/novelist-moe-31m-q4_0.gguf"
