"""Checks what tells an NPU its rank: the environment and HCCL's rank table.

HCCL reports a wrong value after minutes and by an error number. This is a
part of npu_config, which alone imports it: models do not. It also writes rank
tables, for `python common/npu_config.py rank_table`.
"""

import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

_USAGE = (
    "give each server as ID=ADDRESS,ADDRESS,... with the device addresses in "
    "the order of device_id, or as ID=FILE with its /etc/hccn.conf"
)

# HCCL takes the ranks in one of two forms, each of them whole.
_BY_TABLE = ("RANK_TABLE_FILE", "RANK_ID", "RANK_SIZE")
_BY_CHIEF = (
    "CM_CHIEF_IP",
    "CM_CHIEF_PORT",
    "CM_CHIEF_DEVICE",
    "CM_WORKER_SIZE",
)


def _integer(lowest: int, highest: int) -> tuple:
    return (
        lambda text: text.isdecimal() and lowest <= int(text) <= highest,
        f"an integer from {lowest} to {highest}",
    )


def _one_of(*words: str) -> tuple:
    return words.__contains__, " or ".join(words)


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _is_job(text: str) -> bool:
    letters = text.replace("-", "").replace("_", "")
    is_padded = text.isdecimal() and text.startswith("0")
    return letters.isascii() and letters.isalnum() and not is_padded


_ADDRESS = (_is_address, "an IP address")
_NUMBER = _integer(0, 32767)

# A rule is a test of a text and, in words, what passes it.
# Ranges are from HCCL's guide where it gives any.
_RULES = {
    "RANK_SIZE": _integer(1, 32768),
    "RANK_ID": _NUMBER,
    "ASCEND_DEVICE_ID": _NUMBER,
    "JOB_ID": (_is_job, "letters, digits, - and _, but no number like 007"),
    "CM_CHIEF_IP": _ADDRESS,
    "CM_CHIEF_PORT": _integer(0, 65520),
    "CM_CHIEF_DEVICE": _NUMBER,
    "CM_WORKER_SIZE": _integer(1, 32768),
    "CM_WORKER_IP": _ADDRESS,
    "HCCL_CONNECT_TIMEOUT": _integer(120, 7200),
    # A 910A takes 17340 at most, but the chip is not known here.
    "HCCL_EXEC_TIMEOUT": _integer(1, 2**31 - 1),
    "HCCL_SOCKET_FAMILY": _one_of("AF_INET", "AF_INET6"),
    "HCCL_WHITELIST_DISABLE": _one_of("0", "1"),
}
_TABLE_RULES = {
    # 1.2 is that of an Atlas A3.
    "version": _one_of("1.0", "1.2"),
    "status": _one_of("completed", "initializing"),
    "server_count": _integer(1, 32768),
}
_SERVER_RULES = {
    "server_id": (lambda text: 0 < len(text) <= 64, "1 to 64 characters")
}
_DEVICE_RULES = {"device_id": _NUMBER, "rank_id": _NUMBER}


def check(environment: Mapping[str, str]) -> None:
    """Checks that the environment places this process among the ranks.

    Raises:
      ValueError: one line with a name, its value and how to mend it.
    """
    # horovodrun sets it: Horovod and HCCL would both number the ranks.
    if "HOROVOD_SIZE" in environment:
        raise ValueError(
            f"HOROVOD_SIZE={environment['HOROVOD_SIZE']}: horovodrun starts "
            "GPUs and CPUs; start one process for each NPU, with its RANK_ID"
        )
    rules = {name: _RULES[name] for name in _RULES if name in environment}
    _check_fields(environment, rules, "")
    size = _check_form(environment)
    rank = int(environment.get("RANK_ID", "0"))
    if rank >= size:
        raise ValueError(
            f"RANK_ID={rank}: must be below RANK_SIZE, which is {size}; "
            "export RANK_SIZE, and to each process a RANK_ID of its own"
        )
    if "RANK_TABLE_FILE" in environment:
        _check_table(environment["RANK_TABLE_FILE"], size)


def _check_form(environment: Mapping[str, str]) -> int:
    """Raises ValueError unless one form is there and whole; returns the size.

    The size is 1 for CM_*, where HCCL numbers the ranks.
    """
    by_table = [name for name in _BY_TABLE if name in environment]
    by_chief = [name for name in _BY_CHIEF if name in environment]
    if by_table and by_chief:
        raise ValueError(
            f"{by_chief[0]}={environment[by_chief[0]]}: not together with "
            f"{' and '.join(by_table)}; ranks come from CM_* or from a rank "
            "table and RANK_*, unset the one or the other"
        )
    size = int(environment.get("RANK_SIZE", "1"))
    needed = ()
    if by_chief:
        needed = _BY_CHIEF
    elif size > 1 or "RANK_TABLE_FILE" in environment:
        needed = _BY_TABLE
    for name in needed:
        if name not in environment:
            raise ValueError(
                f"{name} is not set: {', '.join(needed)} go together; export "
                "it, or unset the others and run a single rank"
            )
    return size


def _check_fields(record: Mapping, rules: Mapping, where: str) -> None:
    """Raises ValueError for the first field that breaks its rule."""
    for name, (is_legal, allowed) in rules.items():
        value = record.get(name)
        # HCCL reads strings only: a bare number is an error there too.
        if not isinstance(value, str):
            raise ValueError(
                f"{where}{name}={json.dumps(value)}: must be a string in "
                f"quotes, {allowed}"
            )
        if not is_legal(value):
            raise ValueError(f"{where}{name}={value}: must be {allowed}")


def _check_table(path: str, size: int) -> None:
    """Raises ValueError unless `path` holds a table of `size` ranks."""
    where = f"RANK_TABLE_FILE={path}: "
    try:
        with open(path, encoding="utf-8") as stream:
            table = json.load(stream)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where}cannot be read as JSON ({error}); name a rank table"
        ) from error
    _check_content(table, size, where)


def _check_content(table: Any, size: int, where: str) -> None:
    """Raises ValueError unless the table places `size` ranks."""
    servers = _records(table, "server_list", where)
    devices = [_records(server, "device", where) for server in servers]
    _check_fields(table, _TABLE_RULES, where)
    for server in servers:
        _check_fields(server, _SERVER_RULES, where)
    for device in sum(devices, []):
        _check_fields(device, _DEVICE_RULES, where)
        # An Atlas A2 may leave it out when it is the only server.
        if "device_ip" in device or len(servers) > 1:
            _check_fields(device, {"device_ip": _ADDRESS}, where)
    for fault, is_found in _faults(table, servers, devices, size).items():
        if is_found:
            raise ValueError(f"{where}{fault}; mend the table")


def _records(record: Any, name: str, where: str) -> list:
    """Returns the field of a record that must be a list of records."""
    records = record.get(name) if isinstance(record, dict) else None
    is_list = isinstance(records, list) and records
    if not is_list or not all(isinstance(each, dict) for each in records):
        raise ValueError(
            f"{where}no list {name} of objects in {str(record)[:40]!r}; write "
            "it as in HCCL's rank table 1.0"
        )
    return records


def _faults(
    table: dict, servers: list, devices: list, size: int
) -> dict[str, bool]:
    """Returns what may be wrong with a whole table, and whether it is."""
    count = table["server_count"]
    server_ids = [server["server_id"] for server in servers]
    device_ids = [[each["device_id"] for each in of] for of in devices]
    # As numbers, since the text "10" sorts before "2".
    ranks = [sorted(int(each["rank_id"]) for each in of) for of in devices]
    all_ranks = sorted(sum(ranks, []))
    addresses = [
        each["device_ip"] for each in sum(devices, []) if "device_ip" in each
    ]
    return {
        f"server_count={count}, but server_list has {len(servers)}": (
            int(count) != len(servers)
        ),
        f"server_id {server_ids}, one twice": _repeats(server_ids),
        f"device_id {device_ids}, one twice on a server": any(
            map(_repeats, device_ids)
        ),
        f"device_ip {addresses}, one twice": _repeats(addresses),
        f"rank_id {all_ranks}, not 0 to {len(all_ranks) - 1} once each": (
            all_ranks != list(range(len(all_ranks)))
        ),
        f"rank_id {ranks}, not consecutive on each server": any(
            of[-1] - of[0] >= len(of) for of in ranks
        ),
        f"{len(all_ranks)} devices, but RANK_SIZE={size}": (
            len(all_ranks) != size
        ),
    }


def rank_table(servers: Sequence[str]) -> str:
    """The text of the rank table of some servers, checked as HCCL would.

    Args:
      servers: `ID=ADDRESSES` each, as the command line takes them.

    Raises:
      ValueError: one line with the value that cannot serve.
    """
    listed, rank = [], 0
    for text in servers:
        server_id, sign, addresses = text.partition("=")
        if not (server_id and sign and addresses):
            raise ValueError(f"{text!r} names no addresses; {_USAGE}")
        devices = []
        for device_id, address in _device_addresses(addresses):
            numbers = {"device_id": device_id, "device_ip": address}
            devices.append({**numbers, "rank_id": str(rank)})
            rank += 1
        listed.append({"server_id": server_id, "device": devices})
    table = {
        "status": "completed",
        "version": "1.0",
        "server_count": str(len(listed)),
        "server_list": listed,
    }
    if not listed:
        raise ValueError(f"no server is given; {_USAGE}")
    _check_content(table, rank, "rank_table: ")
    return json.dumps(table, indent=2)


def _device_addresses(text: str) -> list[tuple[str, str]]:
    """Pairs of device_id and address from a list or from an hccn.conf."""
    if not os.path.exists(text):
        return [(str(i), each) for i, each in enumerate(text.split(","))]
    with open(text, encoding="utf-8") as stream:
        lines = re.findall(r"^address_(\d+)=(\S+)", stream.read(), re.M)
    if not lines:
        raise ValueError(
            f"{text} has no line such as address_0=192.168.100.101; {_USAGE}"
        )
    return sorted(lines, key=lambda pair: int(pair[0]))


def _repeats(values: list) -> bool:
    return len(set(values)) < len(values)
