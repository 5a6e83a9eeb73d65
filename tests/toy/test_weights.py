import hashlib
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from async_opd.toy import STUDENT, TEACHER, WEIGHTS
from async_opd.toy.build import accuracy
from async_opd.toy.task import dataset


def test_importing_the_task_loads_no_torch():
    code = "import sys, async_opd.toy.task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_shipped_files_are_those_of_the_checksums():
    listed = dict(
        reversed(line.split("  ")) for line in (WEIGHTS / "SHA256SUMS").read_text().splitlines()
    )
    files = {path.relative_to(WEIGHTS).as_posix(): path for path in WEIGHTS.glob("*/*")}
    assert listed == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }


def test_the_shipped_files_are_four_megabytes_at_most():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 4_000_000


@pytest.mark.parametrize(
    ("folder", "size", "low", "high"),
    [(TEACHER, 498_752, 0.95, 1.0), (STUDENT, 161_920, 0.1, 0.35)],
)
def test_heldout_accuracy_is_in_range(folder, size, low, high):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.num_parameters(), model.dtype) == (size, torch.float32)
    assert low <= accuracy(model, dataset(heldout=True)[:256]) <= high
