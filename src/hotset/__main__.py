"""`python -m hotset`: the command line."""

from hotset.cli import main

if __name__ == "__main__":
    main()
