"""How every entry script starts and ends: flags in, exit status out.

0 done; 1 a mistake that the user can mend, told in one line; 2 unknown flag;
3 diverged; 143 or 130 stopped by a signal after saving.
"""

import os
import signal
import sys
import textwrap
import traceback
from types import FrameType
from typing import Callable, Optional

import tensorflow as tf
from absl import app, flags

from common.npu_config import UserError

FLAGS = flags.FLAGS


class Diverged(Exception):
    """The loss is not finite; the message holds the step and every term."""


class Stopped(Exception):
    """A signal asked to stop, and everything has been saved."""

    received: Optional[int] = None  # number of the signal, once it came


def launch(
    main: Callable[[], None], switches: Optional[dict[str, str]] = None
) -> None:
    """Parses the command line, runs `main` and exits with its status.

    Args:
      main: takes no arguments; reads absl's FLAGS.
      switches: bare switches of the seed's commands and the flags they mean.
    """
    # The seed's commands carry bare switches where we have values.
    switches = switches or {}
    arguments = [switches.get(argument, argument) for argument in sys.argv]
    if {"--help", "-h"} & set(arguments):
        print(_help())
        sys.exit(0)
    app.define_help_flags()
    try:
        rest = FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        sys.exit(_complain(f"{error}; --help lists the flags", 2))
    except flags.Error as error:
        sys.exit(_complain(str(error), 1))
    if len(rest) > 1:
        sys.exit(
            _complain(f"{rest[1]!r} is not a flag; write --flag=value", 1)
        )
    # Who reads through a pipe sees a line when it is written, too.
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(_status_of(main))


def stop_softly() -> None:
    """From now on a signal asks the training loop to save and stop.

    Not before: there is nothing to save while data is read or a graph is
    traced, and a user who presses Ctrl-C then should not have to wait.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note_signal)


def _note_signal(number: int, _: Optional[FrameType]) -> None:
    """Asks the training loop to stop; a second signal ends at once."""
    if Stopped.received is not None:
        os._exit(128 + number)
    Stopped.received = number


def _status_of(main: Callable[[], None]) -> int:
    """Runs `main`; tells what a user can mend in one line."""
    # Nothing here needs its Python rewritten as a graph; to do so for all that
    # tf.data maps takes seconds of every start.
    main = tf.autograph.experimental.do_not_convert(main)
    try:
        main()
    except UserError as error:
        return _complain(str(error), 1)
    except Diverged as error:
        return _complain(str(error), 3)
    except Stopped as error:
        return _complain(str(error), 128 + Stopped.received)
    except KeyboardInterrupt:
        return _complain("interrupted", 128 + signal.SIGINT)
    except (OSError, tf.errors.OpError) as error:
        reason = _file_or_memory(error)
        # What is left is a defect of ours, and its traceback is needed.
        if reason is None:
            raise
        return _complain(reason, 1)
    return 0


def _file_or_memory(error: Exception) -> Optional[str]:
    """One line for a full disk, a refused file or full memory, else None."""
    # TensorFlow's writers wrap the system's words in errors of their own.
    text = str(error)
    if "No space left" in text or "Disk quota" in text:
        return (
            "the disk is full: make room and run the same command again; it "
            "continues from the last good checkpoint"
        )
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another path"
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return (
            "out of memory: lower --batch_size or --image_size, or use "
            "--precision_mode=allow_mix_precision"
        )
    return None


def _complain(message: str, status: int) -> int:
    """Prints one line; with --verbosity=1 the traceback comes before it."""
    if status == 1 and FLAGS.is_parsed() and FLAGS["verbosity"].value > 0:
        traceback.print_exc()
    # One line, so that a log's last line says why a run has ended.
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    return status


def _help() -> str:
    """One screen: each flag of the script with its default and meaning."""
    module = sys.modules["__main__"]
    lines = [module.__doc__.strip().splitlines()[0], ""]
    # absl knows the main script by the name it was called with.
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    for flag in sorted(own, key=lambda flag: flag.name):
        if flag.help.startswith("Alias for"):
            continue
        default = "" if flag.default is None else flag.default
        text = f"  --{flag.name}={default}"
        # absl writes an enum's values as <a|b>: before its help.
        meaning = flag.help.replace("<", "").replace(">:", ":")
        # A default of many words leaves no room, and shorten() wants some.
        room = max(98 - max(len(text), 35), len(" .."))
        if len(meaning.split()[0]) > room - len(" .."):
            # So many values would be left out as one long word.
            meaning = meaning.replace("|", ", ")
        meaning = textwrap.shorten(meaning, room, placeholder=" ..")
        lines.append(f"{text:<35} {meaning}")
    lines.append("--helpfull says all of it, with the rarer flags.")
    return "\n".join(lines)
