"""`python -m kvfold`."""

from kvfold.cli import main

if __name__ == "__main__":
    main()
