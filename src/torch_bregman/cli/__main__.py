"""`python -m torch_bregman.cli`."""

from . import main

if __name__ == "__main__":
    main()
