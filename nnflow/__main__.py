"""python -m nnflow, which is what `accelerate launch -m nnflow` runs."""

from nnflow.cli import main

if __name__ == "__main__":
    main()
