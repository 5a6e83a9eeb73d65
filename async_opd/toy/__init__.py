"""The embedded demo task: column addition, with a trained teacher and a half-trained student in
`WEIGHTS`."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TEACHER = WEIGHTS / "teacher"
STUDENT = WEIGHTS / "student"
