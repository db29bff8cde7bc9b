"""The compiled kernels are there wherever they can be: else the tests of each would skip without a word."""

import shutil

import pytest

from cluster.kernels.cpu.build import BuildError, build
from cluster.kernels.cpu.library import library


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler")
def test_the_kernels_load_where_there_is_a_compiler():
    assert library() is not None, "compiled or loaded in vain; the warning in the log says why"


def test_a_compiler_that_refuses_is_an_error_and_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    target = tmp_path / "library.so"
    with pytest.raises(BuildError, match="false"):
        build(target)
    assert not list(tmp_path.iterdir())
