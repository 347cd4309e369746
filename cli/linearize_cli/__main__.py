"""`python -m linearize_cli`, for a source tree that is not installed."""

import sys

from linearize_cli.app import main

sys.exit(main())
