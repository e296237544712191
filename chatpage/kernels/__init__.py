"""The Triton kernels, which lie in the folder `kernels` at the top: a package `kernels` belongs to Hugging Face."""

from pathlib import Path

_folder = Path(__file__).parents[2] / "kernels"
if _folder.is_dir():  # in a wheel they lie here
    __path__ = [str(_folder)]
