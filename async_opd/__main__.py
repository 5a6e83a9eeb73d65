import sys

from async_opd.cli.main import main

sys.exit(main())
