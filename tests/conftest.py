"""Fixtures for all tests."""

import pytest
from fakes import FakeTiers


@pytest.fixture
def fake_tiers() -> FakeTiers:
    """Colder tiers whose transfers end when the test says so."""
    return FakeTiers()
