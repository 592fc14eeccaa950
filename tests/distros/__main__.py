"""`make test-packages`: the package in clean Debians. `make test-distros`: the tests in others."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.distros import packages, suite
from tests.distros.trees import RELEASES
from tests.lab import process, scratch
from tests.lab.needs import Missing
from tests.lab.process import TOP


def main() -> int:
    names = [release.name for release in RELEASES]
    parser = argparse.ArgumentParser(prog="make test-packages", description=__doc__)
    parser.add_argument("what", choices=("packages", "suite"))
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=", ".join(names))
    parser.add_argument("--tests", default="", help="files or directories, for the suite")
    arguments = parser.parse_intermixed_args()
    wanted = arguments.releases or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such release: {', '.join(unknown)}")
    process.become_subreaper()
    good = True
    for release in (each for each in RELEASES if each.name in wanted):
        print(f"{release.name}:", flush=True)
        try:
            if arguments.what == "packages":
                for step in packages.run(release, _package()):
                    print(f"  {step}", flush=True)
            else:
                parts = [arguments.tests.split()] if arguments.tests else suite.PARTS
                for part in parts:
                    good = suite.run(release, *part) and good
        except (AssertionError, Missing, subprocess.TimeoutExpired) as error:
            good = False
            print(f"  FAILED: {error}", flush=True)
    print("All went well." if good else "Something FAILED: see above.")
    return 0 if good else 1


def _package() -> Path:
    debs = list((TOP / "dist").glob("qkilld_*.deb"))
    if len(debs) != 1:
        sys.exit("there is no package in dist/: make deb")
    return debs[0]


if __name__ == "__main__":
    try:
        code = main()
    finally:
        scratch.remove_run_directory()
    sys.exit(code)
