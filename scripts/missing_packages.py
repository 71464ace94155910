"""What scripts/setup.sh is to install beside a Python that has torch already, such as that of NVIDIA's containers.

    python scripts/missing_packages.py requirements.txt .venv

Writes into the new environment, which sees this Python's packages: `missing.txt`, the lines of the requirements that
this Python has no package for, with those of TESTED, whose version decides what Megatron does; and `kept.txt`, as
constraints for pip, the packages that must stay as they are, for others of this Python are compiled for them.
"""

import re
import site
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

TESTED = ("megatron-core", "transformers")
KEPT = r"torch.*|.*triton|numpy|transformer-engine.*|flash-attn.*|apex|(nvidia|cuda)-.*"


def main(requirements: Path, environment: Path) -> None:
    """Write both files."""
    have = {canonical(found.name): found.version for found in distributions() if found.name}
    lines = [line for line in requirements.read_text().splitlines() if re.match(r"\w", line)]
    missing = [line for line in lines if (name := canonical(line)) not in have or name in TESTED]
    kept = [f"{name}=={version}" for name, version in sorted(have.items()) if re.fullmatch(KEPT, name)]
    (environment / "missing.txt").write_text("\n".join(missing) + "\n")
    (environment / "kept.txt").write_text("\n".join(kept) + "\n")
    if sys.prefix != sys.base_prefix:
        # The environment of an environment sees only the packages of the Python that both of them are made from.
        purelib = sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)})
        paths = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
        Path(purelib, "packages_of_site.pth").write_text("".join(paths))


def canonical(requirement: str) -> str:
    """Return the name of a package or of a line of requirements as pip compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
