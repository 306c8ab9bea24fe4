"""``python -m nf4.cli``: the same as the ``nf4`` command."""

import sys

from nf4.cli import main

sys.exit(main())
