import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
CACHE = Path(__file__).parents[1] / ".cache" / "prometheus"


@pytest.fixture(scope="session")
def prometheus():
    """The folder of Prometheus and promtool: installed, or the Debian package unpacked into .cache."""
    if installed := shutil.which("prometheus"):
        return Path(installed).parent
    folder = CACHE / "usr" / "bin"
    if not (folder / "prometheus").exists():
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            pytest.skip("Prometheus is not on the PATH, and there is no apt-get to fetch it with")
        CACHE.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run(
            ["apt-get", "download", "prometheus"], cwd=CACHE, capture_output=True, text=True, check=False
        )
        if fetched.returncode:
            pytest.skip(f"Prometheus is not on the PATH and cannot be fetched: {fetched.stderr.strip()}")
        (package,) = CACHE.glob("prometheus_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, CACHE], check=True)
        package.unlink()
    return folder


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items):
    """Run each file on one worker, so that what its tests share is made once.

    Those on Kafka, which take most of the time, are two groups: each worker begins with one of them, and a broker.
    """
    for item in items:
        place = item.path.relative_to(ROOT)
        group = str(place)
        if place.parts[0] == "kafka":
            group = "kafka a-k" if place.name < "test_l" else "kafka l-z"
        item.add_marker(pytest.mark.xdist_group(group))
