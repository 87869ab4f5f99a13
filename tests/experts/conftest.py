"""Fixtures that block the vendor libraries or replace them by fakes."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from experts.te import library
    from tests.experts import fakes

    fakes.remove(monkeypatch)
    yield
    library.not_installed.cache_clear()


@pytest.fixture
def fake_libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from experts.te import library
    from tests.experts import fakes

    fakes.install(monkeypatch)
    yield
    library.not_installed.cache_clear()
