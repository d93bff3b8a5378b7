"""``python -m cartl_hub.cli``."""

from . import main

main()
