"""Ranks of NPUs: what HCCL reads is checked, and eight share the data."""

import concurrent.futures
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from ci import contract, npu_probe
from common import hccl_ranks

# The form without a table: HCCL numbers the ranks, through a chief.
CHIEF = {
    "CM_CHIEF_IP": "10.0.0.10",
    "CM_CHIEF_PORT": "6000",
    "CM_CHIEF_DEVICE": "0",
    "CM_WORKER_SIZE": "8",
    "CM_WORKER_IP": "10.0.0.11",
}


def of_rank(table: Path, rank: int, size: int = 8) -> dict[str, str]:
    """Returns the environment that a launcher gives to one rank."""
    return {
        "RANK_TABLE_FILE": str(table),
        "RANK_ID": str(rank),
        "RANK_SIZE": str(size),
        "ASCEND_DEVICE_ID": str(rank),
        "JOB_ID": "10087",
    }


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK_SIZE": "1", "RANK_ID": "0", "ASCEND_DEVICE_ID": "7"},
        {"HCCL_CONNECT_TIMEOUT": "7200", "HCCL_EXEC_TIMEOUT": "1836"},
        CHIEF,
        {**CHIEF, "CM_CHIEF_IP": "fe80::1", "ASCEND_DEVICE_ID": "3"},
    ],
)
def test_legal_environments(environment: dict[str, str]) -> None:
    """What HCCL accepts passes: a false alarm would block a good job."""
    hccl_ranks.check(environment)


@pytest.mark.parametrize(
    ("servers", "devices"), [(1, 1), (1, 2), (1, 8), (2, 8)]
)
@pytest.mark.parametrize("version", ["1.0", "1.2"])
def test_legal_rank_tables(
    servers: int, devices: int, version: str, tmp_path: Path
) -> None:
    """One and several servers, and every rank of each of them."""
    # Paths with a space come from users, and break naive code.
    path = tmp_path / "rank table.json"
    table = npu_probe.write_rank_table(path, servers, devices)
    table["version"] = version
    path.write_text(json.dumps(table))
    for rank in range(servers * devices):
        hccl_ranks.check(of_rank(path, rank, servers * devices))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK_SIZE": "eight"}, "RANK_SIZE=eight: must be an integer from 1"),
        ({"RANK_SIZE": "0"}, "RANK_SIZE=0: "),
        ({"RANK_SIZE": "-8"}, "RANK_SIZE=-8: "),
        ({"RANK_SIZE": ""}, "RANK_SIZE=: "),
        ({"RANK_SIZE": "1", "RANK_ID": "0"}, "8 devices, but RANK_SIZE=1"),
        ({"RANK_SIZE": "4"}, "8 devices, but RANK_SIZE=4"),
        ({"RANK_SIZE": None}, "RANK_SIZE is not set: "),
        ({"RANK_ID": "8"}, "RANK_ID=8: must be below RANK_SIZE, which is 8"),
        ({"RANK_ID": "-1"}, "RANK_ID=-1: "),
        ({"RANK_ID": "a"}, "RANK_ID=a: "),
        ({"RANK_ID": None}, "RANK_ID is not set: "),
        ({"RANK_TABLE_FILE": None}, "RANK_TABLE_FILE is not set: "),
        ({"RANK_TABLE_FILE": "/none.json"}, "RANK_TABLE_FILE=/none.json: "),
        ({"RANK_TABLE_FILE": "/"}, "RANK_TABLE_FILE=/: "),
        ({"ASCEND_DEVICE_ID": "npu0"}, "ASCEND_DEVICE_ID=npu0: "),
        ({"ASCEND_DEVICE_ID": ""}, "ASCEND_DEVICE_ID=: "),
        ({"JOB_ID": "007"}, "JOB_ID=007: "),
        ({"JOB_ID": "a job"}, "JOB_ID=a job: "),
        ({"HCCL_CONNECT_TIMEOUT": "60"}, "from 120 to 7200"),
        ({"HCCL_EXEC_TIMEOUT": "0"}, "HCCL_EXEC_TIMEOUT=0: "),
        ({"HCCL_SOCKET_FAMILY": "IPv4"}, "AF_INET or AF_INET6"),
        ({"HCCL_WHITELIST_DISABLE": "yes"}, "HCCL_WHITELIST_DISABLE=yes: "),
        ({"HOROVOD_SIZE": "8"}, "HOROVOD_SIZE=8: "),
        ({"CM_CHIEF_IP": "10.0.0.1"}, "CM_CHIEF_IP=10.0.0.1: not together"),
        ({"CM_WORKER_SIZE": "8"}, "CM_WORKER_SIZE=8: not together"),
    ],
)
def test_errors_of_the_environment(
    changes: dict[str, str], named: str, tmp_path: Path
) -> None:
    """A wrong variable of the table form is named with its value."""
    path = tmp_path / "8p.json"
    npu_probe.write_rank_table(path)
    # Rank 3, so that a rank that is lost does not look like 0.
    refuse({**of_rank(path, 3), **changes}, named)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *[
            ({name: None}, f"{name} is not set: ")
            for name in sorted(set(CHIEF) - {"CM_WORKER_IP"})
        ],
        ({"CM_CHIEF_IP": "chief"}, "CM_CHIEF_IP=chief: must be an IP address"),
        ({"CM_CHIEF_IP": "10.0.0.256"}, "CM_CHIEF_IP=10.0.0.256: "),
        ({"CM_WORKER_IP": "10.0.0"}, "CM_WORKER_IP=10.0.0: "),
        ({"CM_CHIEF_PORT": "65521"}, "CM_CHIEF_PORT=65521: "),
        ({"CM_CHIEF_DEVICE": "x"}, "CM_CHIEF_DEVICE=x: "),
        ({"CM_WORKER_SIZE": "32769"}, "CM_WORKER_SIZE=32769: "),
        ({"RANK_SIZE": "1"}, "not together with RANK_SIZE"),
        ({"RANK_ID": "0"}, "not together with RANK_ID"),
    ],
)
def test_errors_of_the_chief_form(changes: dict[str, str], named: str) -> None:
    """A wrong or missing CM_ variable is named with its value."""
    refuse({**CHIEF, **changes}, named)


def change(*keys: Any) -> Callable[[dict], None]:
    """Returns an edit of a table: the path to a field, then its new value."""
    *path, name, value = keys

    def edit(table: dict) -> None:
        for key in path:
            table = table[key]
        if value is None:
            del table[name]
        else:
            table[name] = value

    return edit


def device(server: int, number: int, name: str, value: Any) -> Callable:
    """Returns an edit of one field of one device."""
    return change("server_list", server, "device", number, name, value)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (change("version", "2.0"), "version=2.0: must be 1.0 or 1.2"),
        (change("version", 1.0), "version=1.0: must be a string in quotes"),
        (change("version", None), "version=null: "),
        (change("status", "done"), "status=done: "),
        (change("status", None), "status=null: "),
        (change("server_count", "3"), "server_count=3, but server_list has 2"),
        (change("server_count", 2), "server_count=2: must be a string"),
        (change("server_list", None), "no list server_list"),
        (change("server_list", []), "no list server_list"),
        (change("server_list", 5), "no list server_list"),
        (change("server_list", ["10.0.0.10"]), "no list server_list"),
        (change("server_list", 0, "device", None), "no list device"),
        (change("server_list", 0, "device", "0"), "no list device"),
        (change("server_list", 0, "server_id", ""), "server_id=: "),
        (change("server_list", 0, "server_id", "a" * 65), "1 to 64"),
        (change("server_list", 0, "server_id", "10.0.0.11"), "server_id ["),
        (device(0, 1, "device_id", "0"), "one twice on a server"),
        (device(0, 1, "device_id", 1), "device_id=1: must be a string"),
        (device(0, 1, "device_id", None), "device_id=null: "),
        (device(0, 1, "device_ip", "192.168.101.1"), "device_ip ["),
        (device(0, 1, "device_ip", "eth0"), "device_ip=eth0: "),
        (device(0, 1, "device_ip", None), "device_ip=null: "),
        (device(0, 1, "rank_id", "0"), "not 0 to 3 once each"),
        (device(1, 1, "rank_id", "7"), "not 0 to 3 once each"),
        (device(0, 1, "rank_id", "-1"), "rank_id=-1: "),
        (device(0, 1, "rank_id", 1), "rank_id=1: must be a string"),
        (
            lambda table: [
                device(0, 1, "rank_id", "2")(table),
                device(1, 0, "rank_id", "1")(table),
            ],
            "not consecutive",
        ),
    ],
)
def test_errors_of_the_rank_table(
    edit: Callable[[dict], None], named: str, tmp_path: Path
) -> None:
    """The line names the table and the field that is to be mended."""
    path = tmp_path / "rank table.json"
    table = copy.deepcopy(npu_probe.write_rank_table(path, 2, 2))
    edit(table)
    path.write_text(json.dumps(table))
    refuse(of_rank(path, 0, 4), named, f"RANK_TABLE_FILE={path}: ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"group_list": []}', "\udcff"]
)
def test_rank_tables_of_another_form(text: str, tmp_path: Path) -> None:
    """What is not JSON, or another JSON, raises nothing but ValueError."""
    path = tmp_path / "rank table.json"
    # As bytes: one of the texts is not valid UTF-8.
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse(of_rank(path, 0, 4), f"RANK_TABLE_FILE={path}: ")


def refuse(environment: dict[str, Any], *named: str) -> None:
    """Demands one line of error that names what is wrong."""
    # None in a case stands for a variable that is not set.
    given = {
        name: value for name, value in environment.items() if value is not None
    }
    with pytest.raises(ValueError) as caught:
        hccl_ranks.check(given)
    message = str(caught.value)
    assert "\n" not in message
    for text in named:
        assert text in message


def test_setup_refuses_them_in_one_line(tmp_path: Path) -> None:
    """setup() runs these checks, and takes rank and size from the adapter."""
    path = tmp_path / "8p.json"
    npu_probe.write_rank_table(path)
    good = of_rank(path, 5)
    cases = [
        good,
        CHIEF,
        {**good, "RANK_ID": "8"},
    ]
    table, chief, rank = npu_probe.ask(
        "try_setup",
        [{"flags": ["--device=npu"], "environment": each} for each in cases],
    )
    assert (table["rank"], table["size"]) == (5, 8)
    assert "rank 5 of 8" in table["described"]
    assert chief["size"] == 8
    assert rank["error"].startswith("RANK_ID=8: ")


def test_eight_processes_share_the_data(tmp_path: Path) -> None:
    """Each element falls to exactly one of eight ranks, 8 to each."""
    path = tmp_path / "8p.json"
    npu_probe.write_rank_table(path)

    def start(rank: int) -> dict:
        folders = f"{contract.REPOSITORY}:{npu_probe.ADAPTER}"
        # A device opens once per process, so eight ranks need eight.
        process = subprocess.run(
            [sys.executable, npu_probe.PROBES / "shard.py", "--device=npu"],
            env=contract.environment(
                PYTHONPATH=folders, **of_rank(path, rank)
            ),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    # Four at a time, since each holds a TensorFlow in memory.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(start, range(8)))
    assert [answer["rank"] for answer in answers] == list(range(8))
    assert all(len(answer["elements"]) == 8 for answer in answers)
    union = [each for answer in answers for each in answer["elements"]]
    assert sorted(union) == list(range(64))


def write_table(*servers: str) -> subprocess.CompletedProcess:
    """Runs the rank table writer as a user does."""
    script = contract.REPOSITORY / "common" / "npu_config.py"
    return contract.run([sys.executable, script, "rank_table", *servers])


def test_writes_rank_tables_for_several_servers(tmp_path: Path) -> None:
    """From address lists and from a server's own file, all in one order."""
    # Unsorted, as hccn_tool leaves it after a device was set again.
    (tmp_path / "hccn.conf").write_text(
        "address_1=10.1.0.4\nnetmask_1=255.255.0.0\naddress_0=10.1.0.3\n"
    )
    process = write_table(
        "10.0.0.1=10.1.0.1,10.1.0.2", f"10.0.0.2={tmp_path / 'hccn.conf'}"
    )
    assert process.returncode == 0, process.stderr
    path = tmp_path / "rank_table.json"
    path.write_text(process.stdout)
    for rank in range(4):
        hccl_ranks.check(of_rank(path, rank, 4))
    devices = [
        (server["server_id"], *device.values())
        for server in json.loads(process.stdout)["server_list"]
        for device in server["device"]
    ]
    assert devices == [
        ("10.0.0.1", "0", "10.1.0.1", "0"),
        ("10.0.0.1", "1", "10.1.0.2", "1"),
        ("10.0.0.2", "0", "10.1.0.3", "2"),
        ("10.0.0.2", "1", "10.1.0.4", "3"),
    ]


@pytest.mark.parametrize(
    ("servers", "named"),
    [
        ([], "no server is given"),
        (["10.0.0.1"], "'10.0.0.1' names no addresses"),
        (["a=10.1.0.1", "a=10.1.0.2"], "server_id ['a', 'a'], one twice"),
        (["a=10.1.0.1,10.1.0.1"], "one twice"),
        (["a=10.1.0.1,"], "device_ip=: must be an IP address"),
        (["a=10.1.0.300"], "device_ip=10.1.0.300: must be an IP address"),
        ([f"a={__file__}"], "has no line such as address_0="),
    ],
)
def test_refuses_what_is_no_rank_table(servers: list[str], named: str) -> None:
    """No table at all rather than one that HCCL would reject later."""
    with pytest.raises(ValueError, match=re.escape(named)):
        hccl_ranks.rank_table(servers)


def test_rank_table_errors_are_one_line() -> None:
    """Exit status 1 and nothing on stdout, which is a file's content."""
    process = write_table("a=")
    assert contract.error_line(process).startswith("error: 'a=' names no")
    assert process.stdout == ""
