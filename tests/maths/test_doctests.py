import doctest
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

from async_opd import maths, objectives

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (maths, objectives)
    for module in iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_hold(name):
    module = import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


@pytest.mark.parametrize("name", [name for name in MODULES if ".maths." in name])
def test_each_file_of_the_maths_has_an_example(name):
    assert any(test.examples for test in doctest.DocTestFinder().find(import_module(name)))
