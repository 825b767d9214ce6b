"""The files that come with the package but are no modules: configs/ and launch/."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from vlm_dist.errors import MachineError


def starter_file(name: str) -> Path:
    """Where a file such as `launch/train.py` lies: inside the package, where a wheel puts it, else beside it, in a checkout.

    Raises:
        MachineError: it lies in neither.
    """
    package = Path(str(resources.files("vlm_dist"))).resolve()
    for folder in (package / "starter", package.parent):
        if (folder / name).is_file():
            return folder / name
    raise MachineError(f"{name} is neither in the package nor beside it ({package}); install the wheel again, or use a whole checkout")
