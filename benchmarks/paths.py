"""Where things lie; and it puts what benchmarks share with examples/ and tests/models on the path of imports."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(ROOT / "tests" / "models")]
