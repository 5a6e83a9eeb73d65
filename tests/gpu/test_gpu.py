"""What holds on cards. `make gpu` runs the same and prints its figures."""

import pytest

from tests.gpu import process
from tests.gpu.checks import CHECKS, Check
from tests.gpu.place import LIMIT_S

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(LIMIT_S + 2 * process.GRACE_S)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_on_cards(check: Check, tmp_path):
    outcome = process.run(check, tmp_path, rehearsal=False)
    if outcome.status == "skip":
        pytest.skip(outcome.reason)
    assert outcome.status == "pass", f"{outcome.reason} {outcome.rows}"
