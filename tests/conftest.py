"""What every test shares: no network, and the slow tests last."""

import os

import pytest
from hypothesis import settings

# Set before any test module imports the libraries, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MPLBACKEND"] = "Agg"

# No deadline: on a shared machine the first example of a test pays for imports.
settings.register_profile("cello1", deadline=None, print_blob=True)
settings.register_profile("fast", settings.get_profile("cello1"), max_examples=20)  # of `tests/run.sh fast`
settings.load_profile("cello1")


@pytest.fixture(autouse=True)
def cache_of_answers(tmp_path_factory, monkeypatch):
    """No test finds answers of another, or leaves any in the user's folder."""
    monkeypatch.setenv("CELLO1_CACHE", str(tmp_path_factory.mktemp("answers")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the integration tests last, so that a plain mistake shows within seconds, and the longest of them first."""

    def order(item: pytest.Item) -> tuple[bool, float]:
        time_out = item.get_closest_marker("timeout")
        return item.get_closest_marker("integration") is not None, -time_out.args[0] if time_out else 0

    items.sort(key=order)
    for item in items:
        if "site" in getattr(item, "fixturenames", ()):  # the whole documentation is built
            item.add_marker(pytest.mark.slow)
