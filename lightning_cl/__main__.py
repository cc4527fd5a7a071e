"""Make ``python -m lightning_cl`` the same program as the console script ``lightning-cl``."""

from lightning_cl.cli import run

if __name__ == "__main__":
    run()
