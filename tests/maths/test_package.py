import subprocess
import sys

PROGRAM = """
import sys
sys.modules["torch"] = None
from async_opd.maths import advantages, divergences, gates, importance, lag, packing, schedules
from async_opd.maths import segments, selection
print(lag.slots(2, 8), packing.plan([1], ranks=1, tokens=1, width=1), schedules.__name__)
for name in ("logprobs", "importanse"):
    try:
        exec(f"from async_opd.maths import {name}")
    except ImportError as e:
        print(e)
"""


def test_only_what_reads_logits_needs_torch_at_once_and_says_so():
    lines = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    assert lines[0] == "16 [[[0]]] async_opd.maths.schedules"
    assert "torch" in lines[1]
    assert lines[2].startswith("cannot import name 'importanse' from 'async_opd.maths'")
