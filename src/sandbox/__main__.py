"""Run the simulated exchanges: `python -m src.sandbox --port 9100`."""

from src.sandbox.server import main

main()
