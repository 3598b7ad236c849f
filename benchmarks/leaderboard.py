"""The table of benchmarks/leaderboard.md: every method that exists, on the bundled models, over a fixed suite.

    python benchmarks/leaderboard.py

Runs what `benchmarks/results/leaderboard` does not have yet of the suite `leaderboard`, with every method of the
registry, and writes the table. A new method adds its rows and leaves the others.
"""

import argparse
from pathlib import Path

from kvfold.cli.eval import run_with_progress
from kvfold.evaluation.report import make_report
from kvfold.evaluation.sweep import check_sweep, suite
from kvfold.files import write_whole
from kvfold.methods import list_methods

HERE = Path(__file__).parent
INTRO = """# Leaderboard

Made by `python benchmarks/leaderboard.py` from `benchmarks/results/leaderboard`; see docs/evaluation.md for what the
tasks and protocols are. Small models and short texts: differences within the intervals say nothing. Methods at their
defaults.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "leaderboard")
    args = parser.parse_args()
    methods = ["full", *(info.slug for info in list_methods() if info.slug != "full")]
    sweep = check_sweep({**suite("leaderboard"), "methods": methods}, "leaderboard")
    done = run_with_progress(sweep, args.results, args.device, None)
    tables = make_report([args.results]).markdown().split("\n", 2)[2]
    write_whole(HERE / "leaderboard.md", (INTRO + tables.lstrip()).encode())
    print(f"{done.done} results, {done.failed} new failures; benchmarks/leaderboard.md")


if __name__ == "__main__":
    main()
