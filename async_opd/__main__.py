import sys

from async_opd.cli import main

sys.exit(main())
