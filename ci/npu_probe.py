"""What the tests of npu_config share: programs that run in other processes.

A device is opened once per process, and importing TensorFlow takes seconds,
so a probe takes many cases and answers with one JSON line.
"""

import json
import sys
from pathlib import Path
from typing import Any, Optional

from ci import contract

PROBES = contract.REPOSITORY / "ci" / "probes"
ADAPTER = contract.REPOSITORY / "ci" / "doubles"


def ask(name: str, cases: Any, adapter: Optional[Path] = ADAPTER) -> Any:
    """Runs a probe and returns its answer.

    Args:
      name: the probe's file name, without its suffix.
      cases: what the probe reads from its command line, as JSON.
      adapter: the folder that npu_device is imported from; None has none.
    """
    path = [str(contract.REPOSITORY), *([str(adapter)] if adapter else [])]
    process = contract.run(
        [sys.executable, PROBES / f"{name}.py", json.dumps(cases)],
        PYTHONPATH=":".join(path),
    )
    assert process.returncode == 0, process.stdout + process.stderr
    # TensorFlow and the double print too; the answer comes last.
    return json.loads(process.stdout.splitlines()[-1])


def write_rank_table(path: Path, servers: int = 1, devices: int = 8) -> dict:
    """Writes a legal rank table of `servers` times `devices` NPUs."""
    # All values are strings, because HCCL refuses a bare number.
    table = {
        "status": "completed",
        "version": "1.0",
        "server_count": str(servers),
        "server_list": [
            {
                "server_id": f"10.0.0.{10 + server}",
                "device": [
                    {
                        "device_id": str(device),
                        "device_ip": f"192.168.{100 + server}.{device + 1}",
                        "rank_id": str(server * devices + device),
                    }
                    for device in range(devices)
                ],
            }
            for server in range(servers)
        ],
    }
    path.write_text(json.dumps(table))
    return table
