from importlib.metadata import version

from recipe.cello1.versions import NOT_INSTALLED, package_versions


def test_what_is_installed_and_what_is_not():
    found = package_versions(["pytest", "no-such-package", "numpy"])
    assert found == {"pytest": version("pytest"), "no-such-package": NOT_INSTALLED, "numpy": version("numpy")}
    assert list(found) == ["pytest", "no-such-package", "numpy"]
