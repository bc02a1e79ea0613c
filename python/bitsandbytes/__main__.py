"""python -m bitsandbytes: what is installed here, and whether it works."""

from .diagnostics.main import main

if __name__ == "__main__":
    main()
