"""Runs each test once as where packages are missing: `python without.py NAME,NAME [pytest's arguments]`."""

import re
import sys
from importlib.machinery import PathFinder

import pytest

absent, found = sys.argv[1].split(","), PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name in absent else found(name, path, target)


class OnceEach:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        first = {}
        for item in items:
            if not {"cuda", "emulated"} & {*re.split(r"[\[\]-]", item.name)} and not item.get_closest_marker("slow"):
                first.setdefault((item.path, item.function), item)
        items[:] = first.values()


if __name__ == "__main__":
    PathFinder.find_spec = find_spec
    sys.exit(pytest.main(["-p", "no:randomly", "-p", "no:cacheprovider", *sys.argv[2:]], plugins=[OnceEach()]))
