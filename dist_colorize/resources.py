"""Where the files that are not Python lie: `configs/` and `kernels/`.

A checkout has them at its top level; an installed package has them inside dist_colorize (see setup.py).
"""

from __future__ import annotations

from pathlib import Path

from dist_colorize.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def resource(folder: str, *parts: str) -> Path:
    """The path of a file or folder that comes with the package, e.g. `resource("configs", "quickstart.yaml")`.

    Only the first part is checked, so that a caller can word the error for a name that its user typed.
    """
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / folder).is_dir():
            return parent.joinpath(folder, *parts)
    raise UserError(
        f"the folder {folder}/ is neither in {_PACKAGE} nor beside it; "
        "the installation is incomplete: reinstall dist_colorize"
    )
