"""Runs a training script as it is, and keeps what its rank has learned.

python ci/keep_weights.py FOLDER SCRIPT FLAGS... writes FOLDER/rank<N>.npz:
a run folder holds rank 0's weights only.
"""

import runpy
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    """Watches the step of the optimiser, which sees every variable."""
    folder, script = sys.argv[1:3]
    sys.argv[:] = sys.argv[2:]
    # The one that the script will import.
    sys.path.insert(0, str(Path(script).resolve().parent.parent))
    from common import npu_config

    seen = {}
    apply_gradients = npu_config.Runtime.apply_gradients

    def watched(runtime, optimizer, gradients, variables):
        """Steps as before, and keeps hold of the rank and its variables."""
        seen.update(rank=runtime.rank, variables=list(variables))
        apply_gradients(runtime, optimizer, gradients, variables)

    npu_config.Runtime.apply_gradients = watched
    try:
        # As the main program, or the script would only define itself.
        runpy.run_path(script, run_name="__main__")
    finally:
        # In `finally`, because a script ends by sys.exit().
        arrays = [variable.numpy() for variable in seen["variables"]]
        np.savez(f"{folder}/rank{seen['rank']}.npz", *arrays)


if __name__ == "__main__":
    main()
