"""Where files that are not Python lie, in a checkout and in an installed wheel."""

from pathlib import Path


def static_dir() -> Path:
    """The folder of the panel: `static/` beside this package in a checkout, inside it in a wheel (pyproject.toml)."""
    installed = Path(__file__).parent / "static"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "static"
