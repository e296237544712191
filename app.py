"""Serves the page: `python app.py`, and what a Hugging Face Space runs. `python app.py --help` lists every setting."""

import sys

from chatpage.cli import serve

if __name__ == "__main__":
    sys.exit(serve())
