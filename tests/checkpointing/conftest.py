import pytest

from tests.checkpointing.survivor import Crew


@pytest.fixture(scope="session")
def through(arithmetic, tmp_path_factory):
    """The folder of an uninterrupted run with the strategy, made once."""
    runs = {}

    def run(strategy: str, **options):
        key = (strategy, *sorted(options.items()))
        if key not in runs:
            crew = Crew(tmp_path_factory.mktemp(strategy), arithmetic / "model", strategy, **options)
            assert set(crew.end()) == {0}, crew.errors()
            runs[key] = crew.folder
        return runs[key]

    return run


@pytest.fixture
def crew(arithmetic, tmp_path):
    """Starts the run in `tmp_path / "run"`, or goes on with it; what is left of it is killed in the end."""
    crews = []

    def start(strategy: str = "single", **options) -> Crew:
        crews.append(Crew(tmp_path / "run", arithmetic / "model", strategy, **options))
        return crews[-1]

    yield start
    for each in crews:
        each.kill()
