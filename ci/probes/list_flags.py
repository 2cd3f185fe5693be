"""Prints what users see of the flags of a model's scripts.

python ci/probes/list_flags.py MODEL SCRIPT... prints, as JSON, type and help
of every flag that each script defines.
"""

import importlib
import json
import sys

from absl.flags import FLAGS


def table_of(name: str) -> dict[str, list[str]]:
    """Defines a script's flags, describes them and takes them away again."""
    script = importlib.import_module(name)
    before = set(FLAGS)
    script.define_flags()
    own = {name: FLAGS[name] for name in set(FLAGS) - before}
    for name in own:
        # Scripts define flags of the same names.
        delattr(FLAGS, name)
    return {name: [flag.flag_type(), flag.help] for name, flag in own.items()}


def main() -> None:
    """Lists the flags of the scripts on the command line."""
    model, *scripts = sys.argv[1:]
    tables = {name: table_of(f"{model}.{name}") for name in scripts}
    print(json.dumps(tables))


if __name__ == "__main__":
    main()
