"""Makes `harness` importable: tests/passes is no package, as a bare `passes` must not be importable."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("harness")
