"""`python -m pquant_jax` is `pquant-jax`."""

from __future__ import annotations

import sys

from pquant_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
