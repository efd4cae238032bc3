"""The numbers of a small study, pinned in golden.json."""
import json
import sys
import warnings

import pytest
from conftest import ROOT, stage


def test_every_stage_computes_what_is_pinned(monkeypatch):
    """Two minutes on one thread; on another kind of processor or torch the numbers are others by right."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")             # golden sets it for good
    import golden
    pinned = json.loads(golden.PINNED.read_text())["machine"]
    if pinned != golden.machine():
        reason = f"golden.json was pinned on {pinned}, this is {golden.machine()}"
        warnings.warn(reason, stacklevel=1)                # which pytest prints without -rs too
        pytest.skip(reason)
    finished = stage(sys.executable, ROOT / "tests/golden.py")
    assert finished.returncode == 0, finished.stdout + finished.stderr
