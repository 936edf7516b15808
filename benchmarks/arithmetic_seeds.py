"""The demo run over several seeds: is it stable, or was one seed lucky?

python -m benchmarks.arithmetic_seeds      # about a minute a seed; writes benchmarks/results/arithmetic_seeds.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "arithmetic_seeds.json"


def main() -> None:
    """Command line; further arguments go to `gvpo fit`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments, overrides = parser.parse_known_args()
    summaries = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "gvpo_lightning.cli", "fit", "--config", "configs/arithmetic.yaml"]
            command += [f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}", *overrides]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            summaries[seed] = json.loads((Path(folder) / "summary.json").read_text())
        shown = {key: round(summaries[seed][key], 3) for key in ("reward_before", "reward_after", "reached_optimum")}
        print(f"seed {seed}: {shown}, {summaries[seed]['seconds']['total']:.0f} s", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"overrides": overrides, "summaries": summaries}, indent=2) + "\n")


if __name__ == "__main__":
    main()
