"""All commands: `mixcpt COMMAND`, or `python -m mixcpt_jax COMMAND`."""

import importlib
import sys

from mixcpt_jax.cli import COMMANDS
from mixcpt_jax.core import text as text_lib
from mixcpt_jax.runtime import terminal


def main() -> None:
    """Hands the rest of the command line to a command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        terminal.show("usage: mixcpt COMMAND ...\n")
        for command, (_, summary) in COMMANDS.items():
            terminal.show(f"  {command:{width}}  {summary}")
        terminal.show("\n`mixcpt COMMAND --help` explains a command.")
        return
    if name not in COMMANDS:
        problem = f"error: mixcpt {text_lib.value(name)}: no such command"
        sys.exit(f"{problem}; {text_lib.advice(name, COMMANDS)}")
    module, _ = COMMANDS[name]
    sys.argv = [f"mixcpt {name}", *sys.argv[2:]]
    importlib.import_module(module).start()


if __name__ == "__main__":
    main()
