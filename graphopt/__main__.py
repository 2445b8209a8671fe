"""`python -m graphopt` is `graphopt`."""

import sys

from graphopt.cli import main

sys.exit(main())
