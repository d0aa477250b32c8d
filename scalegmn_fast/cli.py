"""The command ``scalegmn-fast``. A sub-command's module is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

#: sub-command -> (module with ``configure(parser)`` and ``run(args) -> int``, one line of help)
COMMANDS = {
    "info": ("scalegmn_fast.info", "versions, compiled parts and which backend serves what"),
    "check": ("scalegmn_fast.check", "every op and published configuration against the float64 reference"),
    "pack": ("scalegmn_fast.data.pack", "bring the field's dataset formats into one packed file"),
    "fit-inrs": ("scalegmn_fast.data.fit_inrs", "fit coordinate networks to images, many at once"),
    "canonicalize": ("scalegmn_fast.data.canonicalize", "fix phase, sign and scale of every network in a packed file"),
    "targets": ("scalegmn_fast.data.targets", "add target images to a packed file, for training to edit INRs"),
    "train": ("scalegmn_fast.train.train", "train a model on a packed dataset"),
    "embed": ("scalegmn_fast.train.embed", "a vector per network of packed files, as Parquet"),
    "eval": ("scalegmn_fast.train.evaluate", "evaluate a checkpoint on a packed dataset"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; its exit code, or 2 after one line on stderr for a user's error."""
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="scalegmn-fast",
        description="Fast graph networks over other networks' weights.",
        epilog=f"commands:\n{listing}\n\n`scalegmn-fast COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those listed below")
    name = parser.parse_args(argv[:1]).command
    module_name, text = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
        sub = argparse.ArgumentParser(prog=f"scalegmn-fast {name}", description=text)
        module.configure(sub)
        return int(module.run(sub.parse_args(argv[1:])) or 0)
    except (ValueError, TypeError, OSError, KeyError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        process = f" (process {os.environ.get('RANK')})" if several else ""
        print(f"scalegmn-fast {name}{process}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
