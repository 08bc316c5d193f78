"""Does this environment have what berth's metadata asks for, in the versions it asks for? Exit 1 and a line for each that is wrong.

``pip check`` would also speak of packages that are none of berth's business. Pre-releases count: containers hold builds like 2.11.0a0.
"""

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from pip._vendor.packaging.requirements import Requirement  # pip's own copy: the package itself may be missing


def problems(requirements: list[str]) -> list[str]:
    """What is wrong, a sentence for each requirement that is not met; extras are left out."""
    wrong = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement} is needed, {found} is installed")
    return wrong


if __name__ == "__main__":
    wrong = problems(requires("berth") or [])
    print("\n".join(wrong) or "everything berth needs is installed", file=sys.stderr)
    sys.exit(1 if wrong else 0)
