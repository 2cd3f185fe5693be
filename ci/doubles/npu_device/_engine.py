"""What the real graph engine checks when a device opens.

The adapter's Python layer passes options and rank table on unread; CANN then
refuses them. A project's mistakes have to show in tests all the same.
"""

import json
import os
import warnings

_FILES = (
    "modify_mixlist",
    "fusion_switch_file",
    "op_precision_mode",
    "customize_dtypes",
    "op_debug_config",
)
_MIXED = (
    "allow_mix_precision",
    "allow_mix_precision_fp16",
    "allow_mix_precision_bf16",
    "mixed_float16",
    "mixed_bfloat16",
)


def check_options(options, device_id):
    """Raises RuntimeError for options that exclude or lack each other."""
    problem = _option_problem(options)
    if problem:
        raise RuntimeError(f"Failed open npu device {device_id} : {problem}")
    modes = {options.get("precision_mode"), options.get("precision_mode_v2")}
    if "modify_mixlist" in options and not modes & set(_MIXED):
        # The real engine ignores the file: no error, and no effect.
        warnings.warn("modify_mixlist without mixed precision", stacklevel=3)


def _option_problem(options):
    if {"precision_mode", "precision_mode_v2"} <= set(options):
        return "precision_mode and precision_mode_v2 exclude each other"
    dumps = options["enable_dump"], options["enable_dump_debug"]
    if dumps == ("1", "1"):
        return "enable_dump and enable_dump_debug exclude each other"
    if "1" in dumps and not os.path.isdir(options.get("dump_path", "")):
        return f"dump_path {options.get('dump_path')} is not a directory"
    for name in _FILES:
        if name in options and not os.path.isfile(options[name]):
            return f"{name} {options[name]} does not exist"
    if "modify_mixlist" in options:
        return _mixlist_problem(options["modify_mixlist"])
    return None


def _mixlist_problem(path):
    try:
        with open(path, encoding="utf-8") as stream:
            lists = json.load(stream)
    except ValueError as error:
        return f"modify_mixlist {path} is not JSON: {error}"
    names = {"black-list", "white-list", "gray-list"}
    if not isinstance(lists, dict) or not set(lists) <= names:
        return f"modify_mixlist {path} has keys other than {sorted(names)}"
    if not all(
        isinstance(change, dict) and set(change) <= {"to-add", "to-remove"}
        for change in lists.values()
    ):
        return f"modify_mixlist {path} needs to-add or to-remove"
    return None


def check_rank_table(path, rank_id, rank_size):
    """Raises RuntimeError with HCCL's EI0004 for an unusable rank table."""
    try:
        with open(path, encoding="utf-8") as stream:
            problem = _table_problem(json.load(stream), rank_id, rank_size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = repr(error)
    if problem:
        raise RuntimeError(f"EI0004: rank table {path}: {problem}")


def _table_problem(table, rank_id, rank_size):
    if not _all_strings(table):
        return "a value is not a string"
    # 1.2, an Atlas A3's, has further fields, which the double does not know.
    if table["version"] != "1.0":
        return f"version {table['version']}"
    servers = table["server_list"]
    if table["server_count"] != str(len(servers)):
        return f"server_count {table['server_count']}"
    devices = [device for server in servers for device in server["device"]]
    places = {
        (server["server_id"], device["device_id"])
        for server in servers
        for device in server["device"]
    }
    ranks = {device["rank_id"] for device in devices}
    if not len(devices) == len(places) == len(ranks):
        return "a server_id, device_id or rank_id occurs twice"
    if len(devices) != rank_size:
        return f"{len(devices)} devices for RANK_SIZE {rank_size}"
    if rank_id not in ranks:
        return f"no rank_id {rank_id}"
    return None


def _all_strings(node):
    # HCCL parses the table with strings only.
    if isinstance(node, dict):
        return all(map(_all_strings, node.values()))
    if isinstance(node, list):
        return all(map(_all_strings, node))
    return isinstance(node, str)
