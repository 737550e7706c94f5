"""``python -m modeconn`` is ``modeconn``."""

from modeconn.cli import main

if __name__ == "__main__":
    main()
