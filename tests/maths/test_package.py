import sys

import pytest

from async_opd import maths


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "async_opd.maths.importance", raising=False)
    monkeypatch.delattr(maths, "importance", raising=False)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        maths.importance  # noqa: B018


def test_a_module_that_is_none_of_ours_is_no_attribute():
    with pytest.raises(
        AttributeError, match=r"^module 'async_opd\.maths' has no attribute 'importanse'$"
    ):
        maths.importanse  # noqa: B018
