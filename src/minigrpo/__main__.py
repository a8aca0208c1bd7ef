"""`python -m minigrpo`: the same as the command minigrpo, where that is not on the PATH."""

from minigrpo.cli.main import main

if __name__ == "__main__":
    main()
